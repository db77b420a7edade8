"""`hvdkit compress` on a finished run."""

import json

import keras
import pytest

from tests import forked
from tests.conftest import run_command


@pytest.mark.slow
def test_a_run_is_made_smaller_and_measured(tmp_path):
    run, table = tmp_path / "run", tmp_path / "table.json"
    trained = forked.command("-m", "hvdkit.train", "--strategy=single", f"--workdir={run}", "--notensorboard")
    assert run_command(trained, timeout=300).code == 0
    command = ["-m", "hvdkit.compress", run, "--quantize=int8,int4", "--prune=0.9", "--export=saved_model,litert"]
    command += ["--finetune=2"]
    ended = run_command(forked.command(*command, "--json", table), timeout=400)
    assert ended.code == 0, ended.output
    found = json.loads(table.read_text())
    assert found["left_out"] == []
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == [
        "as trained",
        "int8",
        "int4",
        "pruned 0.9",
        "pruned 0.9, finetuned",
        "pruned 0.9, finetuned, int8",
        "pruned 0.9, finetuned, int4",
        "saved_model",
        "litert",
    ]
    result = json.loads((run / "result.json").read_text())
    assert rows["as trained"]["accuracy"] == pytest.approx(result["test_accuracy"])
    assert rows["int8"]["accuracy"] > result["test_accuracy"] - 0.02
    assert rows["int8"]["bytes"] < 0.5 * rows["as trained"]["bytes"]
    assert rows["pruned 0.9"]["zipped_bytes"] < 0.5 * rows["as trained"]["zipped_bytes"]
    assert rows["pruned 0.9, finetuned"]["zipped_bytes"] < 0.5 * rows["as trained"]["zipped_bytes"]
    assert rows["pruned 0.9, finetuned"]["accuracy"] > rows["pruned 0.9"]["accuracy"] + 0.05
    assert all(row["samples_per_second"] > 0 for row in rows.values())
    keras.saving.load_model(run / "compressed" / "pruned-0.9-finetuned-int8.keras")
    assert "as trained" in ended.output
