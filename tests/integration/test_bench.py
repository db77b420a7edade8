"""`python -m hvdkit.bench` and `python -m hvdkit.plan`: that they measure; how fast things are, tests do not judge."""

import json
import re
import sys

import pytest

from tests import forked
from tests.conftest import run_command


@pytest.fixture
def bench(tmp_path):
    """Runs a command of the bench, and returns its JSON and its table."""

    def start(command, *arguments, timeout=400):
        file, plot = tmp_path / f"{command}.json", tmp_path / f"{command}.png"
        common = ["--rounds", "1", "--seconds", "1", "--json", file, "--plot", plot]
        # Peers are looked for beside the interpreter, which must be the environment's own.
        run = forked.command if command != "peers" else lambda *words: [sys.executable, *words]
        ended = run_command(run("-m", "hvdkit.bench", command, *common, *arguments), timeout=timeout)
        assert ended.code == 0, ended.output
        assert plot.read_bytes().startswith(b"\x89PNG")
        return json.loads(file.read_text()), ended.output

    return start


@pytest.mark.slow
def test_throughput_tells_speed_start_and_memory(bench):
    found, output = bench(
        "throughput", "--workloads", "mlp", "--case", "-np 2", "--case", "HVDKIT_SHARED_MEMORY=0 -np 2"
    )
    ours, others = found["rows"]
    assert (ours["exchange"], others["exchange"]) == ("shared memory", "sockets")
    for row in found["rows"]:
        assert row["samples_per_second"] > 100
        assert row["peak_bytes"] > 100e6
        assert set(row["startup_seconds"]) == {"python", "imports", "data_and_model", "first_step"}
    assert 0 < ours["waiting_seconds"] < ours["exchange_seconds"] < 1
    assert re.search(r"^mlp +-np 2 +[\d,]+ .* shared memory$", output, re.MULTILINE), output
    assert found["machine"]["cores"] >= 1


@pytest.mark.slow
def test_collectives_lie_below_what_the_machine_can_do(bench, tmp_path):
    found, _ = bench("collectives", "--sizes", "1024,4194304")
    rows = {(row["operation"], row["bytes"]): row for row in found["rows"]}
    transfers = {"send_by_alltoall", "send_by_allgather", "send_by_shared_memory"}
    own = {"shared_allreduce", "shared_allgather"}
    assert {name for name, _ in rows} == {"allreduce", "allgather", "broadcast"} | own | transfers
    for (_, size), row in rows.items():
        assert row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        assert size / row["seconds"] < 2 * found["limits"]["memory_copy"]
    assert rows["allreduce", 4194304]["seconds"] > rows["allreduce", 1024]["seconds"]
    options = ["--links", tmp_path / "collectives.json", "--batch", "32", "--ranks", "1,2,512", "--seconds", "1"]
    flags = ["--model=mnist_mlp", "--dataset=synthetic:28x28x1:10:2048"]
    plan = forked.command("-m", "hvdkit.plan", *options, "--json", tmp_path / "plan.json", "--", *flags)
    ended = run_command(plan, timeout=400)
    assert ended.code == 0, ended.output
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["compute"]["gradient_bytes"] == 4 * 109386
    assert 0 <= content["compute"]["zero_share"] < 1
    assert {row["ranks"] for row in content["rows"]} == {1, 2, 512}
    modes = {row["mode"] for row in content["rows"]}
    assert modes >= {
        "data parallel",
        "int8",
        "topk",
        "powersgd",
        "local SGD",
        "DiLoCo",
        "tensor parallel",
        "independent",
    }
    assert content["advice"].startswith(("Use ", "Dense data parallelism does not pay", "Not at all"))
    assert content["advice"].splitlines()[0] in ended.output


@pytest.mark.slow
def test_each_mode_is_tried_beside_its_prediction(tmp_path):
    file = tmp_path / "tried.json"
    options = ["-H", "localhost:2", "--batch", "32", "--seconds", "1", "--modes", "data parallel,powersgd,local SGD"]
    flags = ["--model=mnist_mlp", "--dataset=synthetic:28x28x1:10:6400"]
    measure = forked.command("-m", "hvdkit.plan", "measure", *options, "--json", file, "--", *flags)
    ended = run_command(measure, timeout=400)
    assert ended.code == 0, ended.output
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert [row["mode"] for row in rows] == ["data parallel", "powersgd", "local SGD"]
    transfers = {row["operation"] for row in content["links"]["inside"]["rows"]}
    assert transfers == {"allreduce", "shared_allreduce", "shared_allgather", "shared_allreduce_after_pause"}
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in rows)
    assert rows[1]["predicted_wire_bytes"] < rows[0]["predicted_wire_bytes"] / 5
    scored = run_command(forked.command("-m", "hvdkit.plan", "score", file), timeout=60)
    assert "of 3" in scored.output
    again = forked.command("-m", "hvdkit.plan", "--model-from", file, "--ranks", "2,4", "--modes", "powersgd")
    ended = run_command(again, timeout=60)
    assert ended.code == 0, ended.output
    assert "powersgd" in ended.output


@pytest.mark.slow
def test_scaling_is_against_one_rank(bench):
    found, _ = bench("scaling", "--workloads", "mlp", "--mode", "strong")
    one, two = found["rows"]
    assert (one["ranks"], one["speedup"], one["efficiency"]) == (1, 1.0, 1.0)
    assert two["efficiency"] == pytest.approx(two["speedup"] / 2)


@pytest.mark.slow
def test_accuracy_is_timed_to_the_epoch_that_reached_it(bench):
    found, output = bench("accuracy", "--target", "0.9", "--case", "-np 2", "--", "--model=mnist_mlp", "--epochs=4")
    (run,) = found["rows"][0]["runs"]
    assert 1 <= run["epochs"] <= 4
    assert 0 < run["train_seconds"] < run["seconds_with_start"]
    assert "90.0%" in output


@pytest.mark.slow
def test_peers_train_the_same_model(bench):
    """Those that need no environment of their own; the others are started in the same way."""
    peers = "hvdkit,horovod_tape,mirrored,one_core"
    found, output = bench("peers", "--workloads", "mlp", "--peers", peers, "--cpus", "0,1", timeout=550)
    assert found["missing"] == {}, output
    rows = {row["peer"]: row for row in found["rows"]}
    assert set(rows) == {"hvdkit_script", "hvdkit", "horovod_tape", "mirrored", "one_core"}
    for row in found["rows"]:
        expected = rows["hvdkit_script"]["samples_per_second"] / row["samples_per_second"]
        assert row["ratio"]["median"] == pytest.approx(expected)
        assert row["slow_steps"] >= 1
    for peer in ("horovod_tape", "mirrored"):
        assert rows[peer]["setting"]["HVDKIT_BENCH_THREADS"]
    alone = rows["one_core"]
    (times,) = [one["step_seconds"] for one in alone["rounds"]]
    assert times["steps_per_execution"] == 1, "Keras' default"
    assert alone["samples_per_second"] == pytest.approx(64 / times["median"], rel=0.9), "of one process"
    (verdict,) = found["verdicts"]
    assert verdict["best_peer"] in ("horovod_tape", "mirrored")
    assert verdict["one_core"] == alone["ratio"]
    assert re.search(rf"^mlp +{verdict['best_peer']} ", output, re.MULTILINE), output


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_peers_across_hosts(cluster, tmp_path):
    file = tmp_path / "peers.json"
    peers = ["--peers", "horovod_tape,mirrored", "--workloads", "mlp", "--rounds", "1", "--seconds", "2"]
    command = [sys.executable, "-m", "hvdkit.bench", "peers", "-H", "h1:1,h2:1", "--cpus", "0,1", *peers]
    ended = cluster.run("h1", *command, "--json", file, timeout=600)
    assert ended.code == 0, ended.output
    found = json.loads(file.read_text())
    assert (found["ranks"], found["hosts"], found["cpus"]) == (2, "h1:1,h2:1", [0, 1])
    assert [row["peer"] for row in found["rows"]] == ["hvdkit_script", "horovod_tape"]
    assert all(row["samples_per_second"] > 100 for row in found["rows"])
    assert ended.output.splitlines()[-1] == "mirrored was left out: its replicas are in one process"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "throughput", "--workloads", "vgg"], "There is no workload 'vgg'. Choose from mlp, lenet"),
        (["bench", "peers", "--peers", "jax"], "There is no peer 'jax'. Choose from hvdkit, hvdkit_script, one_core"),
        (["bench", "peers", "--cpus", "0"], "--cpus 0 names 1 core(s) for 2 ranks."),
        (["bench", "accuracy", "--target", "97"], "--target=97.0 is no accuracy between 0 and 1."),
        (["bench", "accuracy", "--target", "0.9", "--", "--task=regression"], "which measured values do not have"),
        (["bench", "scaling", "--ranks", "two"], "--ranks=two is no list of numbers, as in --ranks=1,2,4."),
        (["plan", "--ranks", "0"], "--ranks=0 is no list of numbers from 1 up"),
        (["plan", "--bandwidth", "fast"], "'fast' is no bandwidth."),
        (["plan", "--links", "nowhere.json"], "nowhere.json does not hold measured exchanges"),
        (["plan", "--model-from", "nowhere.json"], "nowhere.json does not hold what is known of a model"),
        (["plan", "measure"], "measure needs hosts to try the modes on, as in -H h1:1,h2:1."),
        (["plan", "score", "nowhere.json"], "nowhere.json does not hold predictions and measurements"),
    ],
)
def test_mistakes_get_a_sentence(arguments, message):
    module, *rest = arguments
    ended = run_command(forked.command("-m", f"hvdkit.{module}", *rest), timeout=60)
    assert ended.code == 2
    assert message in ended.output
    assert "Traceback" not in ended.output


def test_predictions_are_scored(tmp_path):
    file = tmp_path / "pairs.json"
    rows = [{"case": f"{n} hosts", "predicted": p, "measured": 100} for n, p in ((2, 90), (3, 105), (4, 130))]
    file.write_text(json.dumps({"rows": rows}))
    ended = run_command(forked.command("-m", "hvdkit.plan", "score", file), timeout=60)
    assert ended.code == 0
    assert "median error 10%" in ended.output
    assert "+30%" in ended.output


def test_predictions_are_held_against_what_nvidia_published(tmp_path):
    plot = tmp_path / "published.png"
    ended = run_command(forked.command("-m", "hvdkit.plan", "published", plot), timeout=60)
    assert ended.code == 0, ended.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^(TF32|AMP) +(\d+) +([\d,]+) +([\d,]+) +([-+][\d.]+)%", ended.output, re.MULTILINE)
    assert [(precision, gpus, images) for precision, gpus, images, _, _ in rows] == [
        *(("TF32", gpus, images) for gpus, images in (("1", "165"), ("8", "1,308"), ("32", "4,782"), ("64", "9,473"))),
        *(("AMP", gpus, images) for gpus, images in (("1", "470"), ("8", "3,550"), ("32", "12,908"), ("64", "25,455"))),
    ], ended.output
    for _, _, images, predicted, error in rows:
        theirs, ours = (int(number.replace(",", "")) for number in (images, predicted))
        assert float(error) == pytest.approx(100 * (ours / theirs - 1), abs=0.4)
    assert "DeepLearningExamples" in ended.output
    assert "MXNet" not in ended.output
