#!/usr/bin/env python3
"""Proves the versions of hvdkit/versions.py: every TensorFlow, with the oldest and the newest Keras, on real ranks.

    tests/versions.py                     all TensorFlow versions of the table, one after another
    tests/versions.py 2.16 2.21 --keep    these; their environments stay (2 GB each), and the next run is quick
    tests/versions.py --help              prints all options

For each TensorFlow: an environment of its own, outside of the checkout; `pip install tensorflow`; `launch/bootstrap.sh
--into`, which compiles Horovod for it (its wheel is kept); then, with each Keras in a folder of its own in front of
that environment, the tests of `SUITES`, on the sources of this checkout: what each private name of Keras means, and
what depends on them most. Prints a Markdown table. A version that fails does not hold up the next one.

Needs Python 3.10 to 3.13, and what launch/bootstrap.sh needs. Exit code: 0 all is proven; 1 something failed, and the
table says what and in which log; 2 the command line is wrong.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hvdkit.versions import OLDEST_KERAS  # noqa: E402 - from this checkout; does not import TensorFlow

SUITES = {
    "private names": ("tests/unit/compat",),
    "two ranks": ("tests/parallel/callbacks/test_broadcast.py",),
    "parity": ("tests/parallel/optimizers/test_parity.py",),
    "losses": ("tests/parallel/optimizers/test_weighing.py::test_two_ranks_train_and_show_what_one_process_does",),
    "optimizer": ("tests/unit/optimizers/test_distributed.py", "tests/unit/optimizers/test_fused_update.py"),
    "accumulation": (
        "tests/parallel/optimizers/test_distributed.py::test_accumulated_gradients_are_exchanged_once_and_right",
    ),
    "sharding": (
        "tests/parallel/optimizers/test_sharded.py::test_n_ranks_equal_one_process",
        "tests/unit/optimizers/test_sharded.py",
    ),
    "joined steps": ("tests/parallel/model/test_executions.py",),
    "batch normalization": (
        "tests/parallel/model/test_batch_normalization.py::test_it_trains_the_model_of_one_process",
    ),
    "checkpoints": (
        "tests/unit/checkpoint/test_checkpoint.py::test_fit_goes_on_bit_for_bit",
        "tests/unit/checkpoint/test_checkpoint.py::test_a_raised_patience_stays_raised",
        "tests/unit/checkpoint/test_checkpoint.py::test_the_learning_rate_and_mixed_precision_go_on",
        "tests/parallel/checkpoint/test_checkpoint.py::test_every_ranks_own_state_goes_on",
    ),
}
_PROBE = """
import json, sys, keras, numpy, tensorflow as tf
print(json.dumps({"python": sys.version.split()[0], "tensorflow": tf.__version__, "numpy": numpy.__version__,
                  "keras": keras.__version__}))
"""


class StepError(Exception):
    """A command of this script failed; the message contains the command and the path of its log."""


@dataclasses.dataclass
class Tested:
    """The result of one Keras version on one TensorFlow version: passed and total tests of each suite."""

    keras: str
    python: str
    numpy: str
    tensorflow: str
    passed: dict[str, int]
    total: dict[str, int]
    failed: list[str]
    seconds: int
    log: str

    @property
    def ok(self):
        return not self.failed and any(self.total.values())

    def cell(self):
        counts = ", ".join(f"{suite} {self.passed.get(suite, 0)}/{self.total.get(suite, 0)}" for suite in SUITES)
        return f"{self.keras}: {counts}" + ("" if self.ok else f" **failed**: {', '.join(self.failed)} ({self.log})")


@dataclasses.dataclass
class Row:
    """One TensorFlow version: its build and the Keras versions tested on it. `error` says why it stopped early."""

    minor: str
    compile_seconds: int | None = None
    tested: list[Tested] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def ok(self):
        return not self.error and bool(self.tested) and all(t.ok for t in self.tested)

    def markdown(self):
        if not self.tested:
            return f"| {self.minor} | | | **failed**: {self.error} | | |"
        first = self.tested[0]
        cells = [t.cell() for t in self.tested] + ([f"**failed**: {self.error}"] if self.error else [])
        compiled = f"{self.compile_seconds} s" if self.compile_seconds else "before"
        return f"| {first.tensorflow} | {first.python} | {first.numpy} | {compiled} | {' | '.join(cells)} |"


def main():
    options = parse_arguments()
    options.cache.mkdir(parents=True, exist_ok=True)
    rows = []
    for minor in options.versions:
        row = Row(minor)
        rows.append(row)
        prefix = options.cache / f"tf{minor}-py{python_minor(options.python)}"
        try:
            prove(row, prefix, options)
        except StepError as error:
            row.error = str(error)
        if not options.keep and prefix.exists():
            shutil.rmtree(prefix)
        say(f"TensorFlow {minor}: {'proven' if row.ok else 'FAILED ' + row.error}")
        report(rows, options)
    print(table(rows))
    return 0 if all(row.ok for row in rows) else 1


def parse_arguments():
    known = [dotted(minor) for minor in OLDEST_KERAS]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hvdkit-versions"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="2.N", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--cache", type=Path, default=cache, help="where they are made; default: %(default)s")
    parser.add_argument("--python", default=sys.executable, help="the Python they get; default: the one that runs this")
    parser.add_argument(
        "--keras",
        action="append",
        help="try this version instead, or the keras/ of this folder",
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="only these tests, as pytest's -k: for a quicker look")
    parser.add_argument("--json", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    unknown = [minor for minor in options.versions if minor not in known]
    if unknown:
        parser.error(f"TensorFlow {', '.join(unknown)} is not in hvdkit/versions.py, which has {', '.join(known)}")
    options.versions = options.versions or known
    return options


def prove(row, prefix, options):
    python = prefix / "bin" / "python"
    make_environment(row.minor, prefix, options.python)
    row.compile_seconds = build_horovod(prefix)
    native = [python, "-m", "hvdkit.native"]  # of this checkout's sources, for this TensorFlow
    run(native, prefix / "native.log", {**os.environ, "PYTHONPATH": str(ROOT)})
    oldest = dotted(OLDEST_KERAS[tuple(map(int, row.minor.split(".")))])
    for keras in options.keras or [oldest, newest_keras()]:
        try:
            overlay = install_keras(python, keras, options.cache)
            results = options.cache / f"{prefix.name}-keras{Path(keras).name}"
            row.tested.append(run_tests(python, overlay, results, options.k))
        except StepError as error:  # continue with the other Keras
            row.error = f"Keras {keras}: {error}"


def make_environment(minor, prefix, python):
    if installed(prefix, "tensorflow", minor) and installed(prefix, "pytest_timeout"):
        return
    say(f"TensorFlow {minor}: making {prefix}")
    log = prefix.parent / f"{prefix.name}.log"
    run([python, "-m", "venv", "--clear", prefix], log)
    pytest = re.findall(r'"(pytest[\w-]*==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    run([prefix / "bin" / "python", "-m", "pip", "install", f"tensorflow=={minor}.*", *pytest], log)


def build_horovod(prefix):
    """Run launch/bootstrap.sh if it or its dependencies have changed. Return the compile time in seconds."""
    needs = re.search(r"^dependencies = \[.*?^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[0]
    script = (ROOT / "launch" / "bootstrap.sh").read_text()
    inputs = hashlib.sha256((needs + script).encode()).hexdigest()
    note = prefix / "versions.json"
    built = json.loads(note.read_text()) if note.exists() else {}
    if built.get("inputs") != inputs:
        say(f"{prefix.name}: launch/bootstrap.sh --into {prefix}")
        log = prefix / "versions.log"
        run([ROOT / "launch" / "bootstrap.sh", "--into", prefix], log)
        run([prefix / "bin" / "python", "-m", "pip", "check"], log)
        compiled = re.search(r"==> Compiling Horovod.*?done in (\d+) s", log.read_text(), re.DOTALL)
        # Without a compile time in the log, the wheel came from the cache; keep the earlier time, if any.
        built = {"inputs": inputs, "seconds": int(compiled[1]) if compiled else built.get("seconds")}
        note.write_text(json.dumps(built))
    return built["seconds"]


def newest_keras():
    """Return the Keras version that requirements.txt pins."""
    return re.search(r"^keras==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]


def install_keras(python, version, cache):
    """Return a folder that contains only this Keras; first on PYTHONPATH, it overrides the environment's Keras."""
    if Path(version).is_dir():
        return Path(version).resolve()
    overlay = cache / "keras" / version
    if not overlay.exists():
        aside = overlay.with_name(f"{version}.new")
        shutil.rmtree(aside, ignore_errors=True)
        run([python, "-m", "pip", "install", "--no-deps", "--target", aside, f"keras=={version}"], cache / "keras.log")
        aside.rename(overlay)
    return overlay


def run_tests(python, overlay, results, selected):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{overlay}:{ROOT}",
        "PYTHONNOUSERSITE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    log, report = Path(f"{results}.log"), Path(f"{results}.xml")
    targets = [target for of_suite in SUITES.values() for target in of_suite]
    run([python, "-c", _PROBE], log, environment)
    versions = json.loads(log.read_text().splitlines()[-1])
    say(f"TensorFlow {versions['tensorflow']}, Keras {versions['keras']}, NumPy {versions['numpy']}: the tests")
    start = time.monotonic()
    report.unlink(missing_ok=True)
    try:
        options = ["-q", "-p", "no:cacheprovider", "--timeout=1200", f"--junitxml={report}"]
        options += ["-k", selected] if selected else []
        run([python, "-m", "pytest", *options, *targets], log, environment)
    except StepError:
        if not report.exists():  # otherwise the report contains the failed tests
            raise
    return count(report, log, versions, round(time.monotonic() - start))


def count(report, log, versions, seconds):
    """Count the passed tests of each suite. Skipped tests and expected failures do not count as passed."""
    passed, total, failed = dict.fromkeys(SUITES, 0), dict.fromkeys(SUITES, 0), []
    for case in ElementTree.parse(report).iter("testcase"):
        suite = next((s for s, targets in SUITES.items() if any(is_of(case, target) for target in targets)), None)
        bad = any(child.tag in ("failure", "error", "skipped") for child in case)
        if bad or not suite:
            failed.append(case.get("name"))
        if suite:
            total[suite] += 1
            passed[suite] += not bad
    return Tested(**versions, passed=passed, total=total, failed=failed, seconds=seconds, log=str(log))


def is_of(case, target):
    """Return whether a test case belongs to a pytest target: a folder, a file or a test function."""
    path, _, function = target.partition("::")
    module = path.removesuffix(".py").replace("/", ".")
    there = case.get("classname") == module or case.get("classname").startswith(f"{module}.")
    return there and function in ("", case.get("name").partition("[")[0])


def report(rows, options):
    """Write the results; called after each row, to keep the results of an interrupted run."""
    if options.json:
        content = [{**dataclasses.asdict(row), "ok": row.ok} for row in rows]
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(table(rows) + "\n")


def table(rows):
    head = "| TensorFlow | Python | NumPy | Horovod compiled in | oldest Keras: tests | newest Keras: tests |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(row.markdown() for row in rows)])


def installed(prefix, package, version=""):
    return any(prefix.glob(f"lib/python3.*/site-packages/{package}-{version}*.dist-info"))


def python_minor(python):
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(command, log, environment=None):
    with log.open("w") as output:
        command = [str(part) for part in command]
        ended = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT
        )
    if ended.returncode:
        raise StepError(f"exit code {ended.returncode} of {' '.join(command[:6])} ..., see {log}")


def dotted(version):
    return ".".join(map(str, version))


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
