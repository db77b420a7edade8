"""What each rank of a parallel test runs: calls the test's function and writes down what it returned."""

import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `tests.conftest`, as pytest has it


def main(results):
    call = json.loads((results / "call.json").read_text())
    spec = importlib.util.spec_from_file_location("rank_program", call["file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_program"] = module  # where TensorFlow's autograph looks for the source of a function
    spec.loader.exec_module(module)
    returned = getattr(module, call["function"])(**call["arguments"])
    (results / f"{os.environ.get('HOROVOD_RANK', 0)}.pickle").write_bytes(pickle.dumps(returned))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
