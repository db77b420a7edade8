"""Calls a training function again whenever ranks are lost or added."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from horovod.common.elastic import run_fn
from horovod.common.exceptions import HorovodInternalError

from hvdkit import runtime
from hvdkit.elastic.errors import horovod_errors
from hvdkit.elastic.states import COMMIT_FOLDER, TensorFlowState
from hvdkit.errors import UsageError


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function `func(state, ...)` elastic: it is called again whenever ranks are lost or added.

    Args:
        func: trains from `state`; its first statement must not be a collective.

    Returns:
        A function with the same arguments. It returns what the last call of `func` returns.
    """

    @functools.wraps(func)
    def training(state: Any, *args: Any, **kwargs: Any) -> Any:
        with horovod_errors():
            return func(state, *args, **kwargs)

    under_horovod = run_fn(training, _reset)

    @functools.wraps(func)
    def elastic(state: Any, *args: Any, **kwargs: Any) -> Any:
        folder = os.environ.get(COMMIT_FOLDER)
        if not folder:
            return under_horovod(state, *args, **kwargs)
        if not isinstance(state, TensorFlowState):
            raise UsageError(
                f"hvdkit's launcher needs a hvd.elastic.KerasState or TensorFlowState, but was given "
                f"{type(state).__name__}, which it cannot keep for the next start. Use one of them, or Horovod's own "
                f"launcher, horovodrun."
            )
        with state.kept_in(Path(folder)):
            state.sync()
            result = func(state, *args, **kwargs)
            state.forget_commits()
            return result

    return elastic


def _reset() -> None:
    """Restarts Horovod, and retries if another rank is lost meanwhile."""
    while True:
        runtime.shutdown()
        try:
            with horovod_errors():
                runtime.init()
        except HorovodInternalError:
            continue
        return
