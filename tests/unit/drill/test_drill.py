"""A drill's report: what it makes of the notes that ranks took; and the drill's command line."""

import collections
import json

import numpy as np
import pytest

from hvdkit.drill import __main__ as drill
from hvdkit.drill import report
from hvdkit.outcome import Resumed, Unsaved

EXAMPLES = list(range(100, 112))  # the hashes of 12 examples; an epoch is 3 steps of 4


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of 2 epochs on 2 ranks that was started twice; the functions change its notes."""
    monkeypatch.setattr(report, "_hashes_of_the_split", lambda flags: collections.Counter(EXAMPLES))
    (tmp_path / "drill").mkdir()
    result = {"size": 2, "steps": 6, "epochs": 2, "global_batch": 4, "test_accuracy": 0.9, "weights_sha256": "a"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "drill" / "fault.json").write_text(json.dumps({"rank": 1, "host": "h2", "step": 4, "time": 104.2}))
    write(tmp_path, "100.000", first=0, steps=5)
    write(tmp_path, "110.000", first=2, steps=6)
    return tmp_path


def write(folder, began, first, steps, leave_out=()):
    """One start's notes: each rank has two examples of each step, a second a step."""
    for rank in (0, 1):
        notes = [{"first": first}]
        for step in range(first, steps):
            batch = EXAMPLES[step % 3 * 4 + rank * 2 :][:2]
            notes.append({"step": step, "hashes": [h for h in batch if (step, h) not in leave_out]})
            if rank == 0:
                notes.append({"time": float(began) + step, "done": step + 1})
        text = "".join(json.dumps(note) + "\n" for note in notes)
        (folder / "drill" / f"{began}-rank-{rank:04d}.jsonl").write_text(text)


def made(folder, code=0):
    return report.make("kill", folder, code, [], [])


def test_what_was_redone_counts_once(job):
    found = made(job)
    assert (found["starts"], found["steps_redone"], found["samples"]) == (2, 3, 24)
    assert (found["samples_lost"], found["samples_twice"], found["is_well"]) == (0, 0, True)
    assert found["recovery_seconds"] == 7.8, "from the fault at 104.2 to the first step of the second start, at 112"


def test_an_example_that_nobody_trained_on_is_lost(job):
    write(job, "110.000", first=2, steps=6, leave_out=[(4, EXAMPLES[4])])
    found = made(job)
    assert (found["samples_lost"], found["samples_twice"], found["is_well"]) == (1, 0, False)


def test_an_example_in_two_steps_of_an_epoch_is_seen_twice(job):
    path = job / "drill" / "110.000-rank-0001.jsonl"
    path.write_text(path.read_text().replace(str(EXAMPLES[6]), str(EXAMPLES[0])))
    found = made(job)
    assert found["samples_twice"] > 0
    assert not found["is_well"]


def test_a_line_that_a_killed_rank_left_half_written_is_passed_over(job):
    with (job / "drill" / "100.000-rank-0001.jsonl").open("a") as file:
        file.write('{"step": 5, "hash')
    assert made(job)["is_well"]


def test_a_job_that_failed_or_had_no_fault_is_not_well(job):
    assert not made(job, code=1)["is_well"]
    (job / "drill" / "fault.json").unlink()
    found = made(job)
    assert (found["is_well"], found["recovery_seconds"]) == (False, None)


def test_a_full_disk_that_no_checkpoint_met_is_no_drill(job):
    assert not report.make("disk-full", job, 0, [Resumed(2)], [])["is_well"]
    found = report.make("disk-full", job, 0, [Unsaved(3, "No space left on device"), Resumed(2), Unsaved(4)], [])
    assert (found["is_well"], found["warnings"]) == (True, 2)


def test_a_hash_is_of_the_content():
    batch = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    first, second, third = report.hashes(batch)
    assert len({first, second, third}) == 3
    assert report.hashes(batch[1:2].copy()) == [second]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kill", "--step", "0"], "--rank 1 --step 0 of 2 rank(s): expected are a rank from 0 to 1, and a step from 1"),
        (["partition"], "partition cuts one of several hosts off; name them: -H h1:1,h2:1"),
        (["explode"], "invalid choice: 'explode'"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        drill.main(["drill", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_a_drill_is_not_used_again(tmp_path, capsys):
    (tmp_path / "drill").mkdir()
    (tmp_path / "drill" / "fault.json").touch()
    assert drill.main(["drill", "kill", "--workdir", str(tmp_path)]) == 2
    assert "has a drill already; choose another --workdir" in capsys.readouterr().err
