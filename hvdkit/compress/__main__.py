"""Makes the model of a finished run smaller, and measures size, speed and quality before and after.

    hvdkit compress RUN_FOLDER --quantize=int8,int4 --prune=0.8 --finetune=2 --export=saved_model,litert

Each variant is measured on the run's test split, in this process: bytes of its file, and of the file compressed by gzip
(where zeros of a pruned model count), samples/s for a batch of the run's size, and the loss and metrics. The files are
in RUN_FOLDER/compressed, or --out. Quantized models are opened by Keras: `keras.saving.load_model`. What cannot be made
is listed with the reason.
"""

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from hvdkit import outcome, reporting
from hvdkit.command.arguments import Parser, new_file
from hvdkit.compress import FORMATS, QUANTIZATIONS
from hvdkit.errors import UsageError

if TYPE_CHECKING:  # it loads TensorFlow, and a wrong command line is told at once
    from hvdkit.compress.trained import Trained

_LEAST_EQUAL = 1e-3  # largest difference between outputs that rounding explains, as a share of the largest output


def main(argv: list[str]) -> int:
    """Makes and measures the variants, and prints their table; returns the exit code."""
    arguments = parser().parse_args(argv[1:])
    try:
        found = compress(arguments)
    except UsageError as error:
        print(f"hvdkit.compress: {error}", file=sys.stderr)
        return outcome.USAGE
    print(table(found))
    for reason in found["left_out"]:
        print(f"\n{reason}")
    print(f"\nwritten to {found['folder']}")
    reporting.write_measurement(arguments.json, found)
    return 0


def parser() -> Parser:
    """Returns the command's parser."""
    made = Parser("compress", description=__doc__)
    add: Any = made.add_argument
    add("run", metavar="RUN_FOLDER", type=Path, help="the --workdir of hvdkit train, finished")
    add(
        "--quantize",
        type=_some_of(QUANTIZATIONS),
        default=[],
        metavar="MODE,MODE",
        help=f"{', '.join(QUANTIZATIONS)} [none]",
    )
    add("--prune", type=_shares, default=[], metavar="SHARE,SHARE", help="share of weights to set to 0, such as 0.8")
    how = "epochs of training after pruning, in which the zeros stay: another variant [none]"
    add("--finetune", type=int, default=0, metavar="EPOCHS", help=how)
    add(
        "--export",
        type=_some_of(FORMATS),
        default=[],
        metavar="FORMAT,FORMAT",
        help=f"{', '.join(FORMATS)}: formats to write the model in as it was trained [none]",
    )
    add("--out", type=Path, metavar="DIR", help="where to write [RUN_FOLDER/compressed]")
    add("--json", type=new_file, metavar="FILE", help="write the results to this file, too")
    return made


def _some_of(known: tuple[str, ...]) -> Any:
    def names(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        wrong = [name for name in chosen if name not in known]
        if wrong or not chosen:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
        return list(dict.fromkeys(chosen))

    return names


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r}: give shares between 0 and 1, such as 0.5,0.8")
    return shares


def compress(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes the variants and measures each.

    Returns:
        `rows`, one a variant; `left_out`, why others could not be made; `main_metric`; and `folder`.

    Raises:
        UsageError: there is no finished run, or nothing to do.
    """
    if not (arguments.quantize or arguments.prune or arguments.export):
        raise UsageError("Nothing to do. Give --quantize=int8, --prune=0.8 or --export=saved_model, or several.")
    if arguments.finetune < 0 or (arguments.finetune and not arguments.prune):
        raise UsageError(
            f"--finetune={arguments.finetune} is a number of epochs, 1 or more, that follow --prune. Give both, or "
            f"leave it out."
        )
    if not all((arguments.run.expanduser() / name).is_file() for name in ("config.json", "result.json", "model.keras")):
        raise UsageError(f"{arguments.run} has no finished run. Give the --workdir of hvdkit train.")
    from hvdkit.compress.trained import open_run
    from hvdkit.compress.variants import makers

    run = open_run(arguments.run.expanduser())
    folder = (arguments.out or arguments.run / "compressed").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rows, left_out = [], []
    train = functools.partial(run.finetune, epochs=arguments.finetune) if arguments.finetune else None
    for name, make in makers(arguments.quantize, arguments.prune, train, run.windows).items():
        try:
            rows.append(_measured(run, name, make(run.load()), folder))
        except UsageError as error:
            left_out.append(str(error))
    for form in arguments.export:
        try:
            rows.append(_exported(run, form, folder))
        except UsageError as error:
            left_out.append(str(error))
    left_out = list(dict.fromkeys(left_out))  # of several variants for one reason
    return {"rows": rows, "left_out": left_out, "main_metric": run.main_metric, "folder": str(folder)}


def _measured(run: "Trained", name: str, model: Any, folder: Path) -> dict[str, Any]:
    from hvdkit.compress import trained

    file = folder / f"{name.replace(', ', '-').replace(' ', '-')}.keras"
    model.save(file)
    trained.check_opens(file, model, run.first_inputs(), name)
    speed = trained.samples_per_second(model.predict_on_batch, run.first_inputs())
    sizes = {"bytes": trained.bytes_of(file), "zipped_bytes": trained.zipped_bytes_of(file)}
    return {"variant": name, **sizes, "samples_per_second": speed, **run.judge(model)}


def _exported(run: "Trained", form: str, folder: Path) -> dict[str, Any]:
    """Writes another format, and returns its row: its outputs are compared, and not evaluated again."""
    import numpy as np

    from hvdkit.compress import exports, trained

    model, inputs = run.load(), run.first_inputs()
    expected = trained.outputs_of(model.predict_on_batch, inputs)  # which must come first: ONNX needs a called model
    path, predict = exports.export(model, form, folder)
    found = trained.outputs_of(predict, inputs)
    difference = float(np.abs(expected - found).max() / max(1e-9, np.abs(expected).max()))
    if difference > _LEAST_EQUAL:
        raise UsageError(f"{form}: its outputs differ from the model's by {difference:.2g} of the largest one.")
    sizes = {"bytes": trained.bytes_of(path), "zipped_bytes": trained.zipped_bytes_of(path)}
    return {"variant": form, **sizes, "samples_per_second": trained.samples_per_second(predict, inputs)}


def table(found: dict[str, Any]) -> str:
    """Formats the variants as a table."""
    metric = found["main_metric"]
    heads = ["variant", "file, MB", "gzip, MB", "samples/s", "test loss", f"test {metric}"]
    return reporting.table(heads, [_cells(row, metric) for row in found["rows"]])


def _cells(row: dict[str, Any], metric: str) -> list[str]:
    quality = [f"{row[name]:.4f}" if name in row else "the same outputs" for name in ("loss", metric)]
    sizes = [f"{row[name] / 1e6:,.2f}" for name in ("bytes", "zipped_bytes")]
    return [row["variant"], *sizes, f"{row['samples_per_second']:,.0f}", *quality]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
