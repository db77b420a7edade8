"""The report of a drill: seconds, steps and examples lost, from the records of all ranks."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import zlib
from pathlib import Path
from typing import Any

from hvdkit import reporting
from hvdkit.outcome import Outcome, Unsaved


def make(kind: str, workdir: Path, code: int, told: list[Outcome], flags: list[str]) -> dict[str, Any]:
    """The report of a drill.

    Args:
        kind: kind of the fault.
        workdir: the job's folder; the records are in `drill/`.
        code: the launcher's exit code.
        told: the outcomes that the launcher reported.
        flags: the job's flags.

    Returns:
        Plain JSON. `is_well` is true if the fault happened, the job succeeded, and no example was lost or seen twice.
    """
    notes = workdir / "drill"
    runs = _read_runs(notes)
    fault = reporting.read_json(notes / "fault.json")
    result = reporting.read_json(workdir / "result.json") or {}
    report: dict[str, Any] = {
        "fault": kind,
        "rank": fault["rank"] if fault else None,
        "host": fault["host"] if fault else None,
        "step": fault["step"] if fault else None,
        "exit_code": code,
        "starts": len(runs),
        "ranks_at_the_end": result.get("size"),
        "steps": result.get("steps"),
        "steps_redone": _steps_redone(runs),
        "recovery_seconds": _recovery(runs, fault["time"]) if fault else None,
        "warnings": sum(isinstance(one, Unsaved) for one in told),
        "test_accuracy": result.get("test_accuracy"),
        "test_loss": result.get("test_loss"),
        "weights_sha256": result.get("weights_sha256"),
    }
    if code == 0 and result:
        report |= _audit(runs, result, flags)
    has_struck = fault is not None and (kind != "disk-full" or report["warnings"] > 0)
    ended_well = code == 0 and has_struck
    report["is_well"] = ended_well and report["samples_lost"] == report["samples_twice"] == 0
    return report


@dataclasses.dataclass
class _Start:
    """The records of all ranks for one start of the job.

    Attributes:
        first: the first step.
        done: (time, number of steps done) of rank 0, in order.
        hashes: hashes of all ranks' examples, by step.
    """

    first: int
    done: list[tuple[float, int]]
    hashes: dict[int, list[int]]


def _read_runs(notes: Path) -> list[_Start]:
    """Reads all starts, in order. Incomplete lines, which a killed rank may have left, are skipped."""
    starts: dict[str, _Start] = {}
    for path in sorted(notes.glob("*.jsonl")):
        begin, _, _ = path.stem.partition("-rank-")
        start = starts.setdefault(begin, _Start(0, [], {}))
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                note = json.loads(line)
                if "first" in note:
                    start.first = note["first"]
                elif "done" in note:
                    start.done.append((note["time"], note["done"]))
                else:
                    start.hashes.setdefault(note["step"], []).extend(note["hashes"])
    return [start for _, start in sorted(starts.items()) if start.done or start.hashes]


def _steps_redone(runs: list[_Start]) -> int:
    pairs = itertools.pairwise(runs)
    return sum(max(0, before.done[-1][1] - after.first) for before, after in pairs if before.done)


def _recovery(runs: list[_Start], fault: float) -> float | None:
    """Seconds from the fault to the next step of a new start; None if there was none."""
    later = [start.done[0][0] for start in runs if start.done and start.done[0][0] > fault]
    return round(later[0] - fault, 1) if later else None


def _audit(runs: list[_Start], result: dict[str, Any], flags: list[str]) -> dict[str, int]:
    """Compares the trained examples of each epoch with the data set, as multisets of hashes."""
    trained: dict[int, list[int]] = {}  # by step; the last start that did a step counts, earlier ones were rolled back
    for start in runs:
        trained |= {step: hashes for step, hashes in start.hashes.items() if step >= start.first}
        for step in [s for s in trained if s >= start.first and s not in start.hashes]:
            del trained[step]
    there = _hashes_of_the_split(flags)
    per_epoch = result["steps"] // result["epochs"]
    lost = twice = 0
    for epoch in range(result["epochs"]):
        seen = collections.Counter(
            h for s in range(epoch * per_epoch, (epoch + 1) * per_epoch) for h in trained.get(s, ())
        )
        twice += (seen - there).total()
        # The last, smaller batch of an epoch is not trained on, as in a run without a fault.
        lost += max(0, per_epoch * result["global_batch"] - (seen & there).total() - (seen - there).total())
    return {
        "samples_lost": lost,
        "samples_twice": twice,
        "samples": per_epoch * result["global_batch"] * result["epochs"],
    }


def _hashes_of_the_split(flags: list[str]) -> "collections.Counter[int]":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    from hvdkit.data import pipeline
    from hvdkit.data.sources import TokenSource, open_source, with_validation
    from hvdkit.train import flags as train_flags
    from hvdkit.train.build import find_model
    from hvdkit.train.data import schema_of

    config = train_flags.parse(["hvdkit.drill", *flags])
    model = find_model(config.model)
    dataset = config.dataset or model.recipes[0].dataset
    source = open_source(
        dataset, config.data_dir, image_size=config.image_size, schema=schema_of(config), seed=config.seed
    )
    if config.validates:
        source = with_validation(source, config.validation_share)
    if isinstance(source, TokenSource):
        source = source.cut(config.sequence_length or model.recipe_for(source.name).sequence_length)
    share = pipeline.read_share(source, "train", 0, 1, cache_bytes=config.cache_gb * 1e9)
    counter: collections.Counter[int] = collections.Counter()
    for batch in pipeline.evaluation_batches(share, 1024).as_numpy_iterator():
        counter.update(hashes(*(leaf for leaf in tf.nest.flatten(batch[0]) if hasattr(leaf, "tobytes"))))
    return counter


def show(report: dict[str, Any]) -> None:
    """Prints a report and a line of JSON."""
    where = f"rank {report['rank']} on {report['host']}, step {report['step']}" if report["host"] else "did not happen"
    ended = (
        f"exit code {report['exit_code']}, {report['starts']} start(s), {report['ranks_at_the_end']} rank(s) at last"
    )
    samples = f"{report.get('samples_lost')}, trained twice {report.get('samples_twice')}, of {report.get('samples')}"
    rows = [
        ("fault", f"{report['fault']}: {where}"),
        ("ended", ended),
        ("recovered after", f"{report['recovery_seconds']} s"),
        ("steps redone", f"{report['steps_redone']} of {report['steps']}"),
        ("samples lost", samples),
        _result(report),
    ]
    if report["warnings"]:
        rows.insert(2, ("warnings", f"{report['warnings']} checkpoint(s) could not be written"))
    print(reporting.fields(rows))
    print(json.dumps(report), flush=True)


def _result(report: dict[str, Any]) -> tuple[str, str]:
    """The row with the test accuracy, or of measured values with the test loss."""
    name = "test_accuracy" if report["test_accuracy"] is not None else "test_loss"
    return name.replace("_", " "), f"{report[name]}"


def hashes(*inputs: Any) -> list[int]:
    """One hash for each example of a batch, of its content; inputs are arrays [batch, ...]."""
    contents = [b"".join(map(_content, example)) for example in zip(*inputs, strict=True)]
    return [zlib.crc32(content) << 32 | zlib.adler32(content) for content in contents]


def _content(part: Any) -> bytes:
    if isinstance(part, bytes):  # a text
        return part
    return repr(part.tolist()).encode() if part.dtype == object else part.tobytes()
