import json

import pytest

from hvdkit.errors import UsageError
from hvdkit.launch import binding
from hvdkit.launch.hosts import numbers
from hvdkit.sweep import __main__ as job
from hvdkit.sweep import options, space, tasks
from hvdkit.sweep.hosts import divide
from hvdkit.sweep.show import final_table
from hvdkit.sweep.study import Study, Trial, without_password
from hvdkit.sweep.tasks import Task
from hvdkit.train import flags

SGD = "momentum=0.9,nesterov=True"

# ---- What is searched --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("grid", "learning_rate=0.1,1e-2", {"values": (0.1, 0.01)}),
        ("grid", "epochs=1,2", {"values": (1, 2)}),
        ("choice", "optimizer=adam|sgd:momentum=0.9,nesterov=True", {"values": ("adam", f"sgd:{SGD}")}),
        ("random", "learning_rate=1e-4..1e-1 log", {"low": 1e-4, "high": 0.1, "log": True}),
        ("random", "warmup_epochs=0..2.5", {"low": 0.0, "high": 2.5, "log": False}),
        ("int", "local_batch=16..128:16", {"low": 16, "high": 128, "step": 16}),
        ("int", "local_batch=1..64 log", {"low": 1, "high": 64, "log": True}),
    ],
)
def test_a_parameter_is_read(kind, text, expected):
    parameter = space.parse(kind, text)
    assert (parameter.flag, parameter.kind) == (text.partition("=")[0], kind)
    assert {name: getattr(parameter, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("grid", "learning_rate", "expected a flag's name and its values"),
        ("grid", "learning_rate=1,1", "values must be neither empty nor repeated"),
        ("choice", "optimizer=adam,", "values must be neither empty nor repeated"),
        ("random", "learning_rate=0.1", "expected two numbers with .. between them"),
        ("random", "learning_rate=0..1:2", "expected two numbers with .. between them"),
        ("random", "learning_rate=1..0.1", "the first number must be less than the second"),
        ("random", "learning_rate=0..1 log", "a range on a logarithmic scale must begin above 0"),
        ("int", "local_batch=1.5..3", "1.5 is not an integer"),
        ("int", "local_batch=1..9:2 log", "a step and log exclude each other"),
    ],
)
def test_a_parameter_that_is_wrong_is_refused_with_the_form(kind, text, why):
    with pytest.raises(UsageError, match="is not understood") as refused:
        space.parse(kind, text)
    assert why in str(refused.value)
    assert f"The form is --{kind}" in str(refused.value)


def test_a_grid_is_the_product_and_repeats_come_behind():
    grid = [space.parse("grid", "epochs=1,2"), space.parse("grid", "seed=7,8"), space.parse("int", "steps=1..9")]
    once = space.points(grid, 1)
    assert [tuple(point.values()) for point in once] == [(1, 7), (1, 8), (2, 7), (2, 8)]
    assert space.points(grid, 2) == once * 2
    assert space.points(grid[2:], 3) == [{}, {}, {}]


# ---- The command line --------------------------------------------------------------------------------------------


def parse(tmp_path, *arguments):
    return options.parse(["hvdkit.sweep", f"--workdir={tmp_path / 'sweep'}", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-np", "1"], "There is nothing to search"),
        (["-np", "1", "--grid", "lerning_rate=1,2"], "Unknown command line flag 'lerning_rate'"),
        (["-np", "1", "--grid", "epochs=1,x"], "flag --epochs=x"),
        (["-np", "1", "--random", "learning_rate=-1..1", "--trials=2"], "flag --learning-rate=-1.0"),
        (["-np", "1", "--grid", "epochs=1,2", "--", "--steps=3"], "--epochs and --steps exclude each other"),
        (["-np", "1", "--grid", "epochs=1,2", "--", "--epochs=3"], "--epochs is searched, and also fixed after --"),
        (["-np", "1", "--grid", "epochs=1,2", "--int", "epochs=1..2", "--trials=1"], "--epochs is searched twice"),
        (["-np", "1", "--folds=3", "--", "--fold=0/3"], "--fold is set for each task by the sweep itself"),
        (["-np", "1", "--random", "learning_rate=0..1"], "How many values of --learning-rate should be sampled"),
        (["-np", "1", "--folds=1"], "--folds=1 must be 2 or more"),
        (["-np", "1", "--folds=3", "--asha"], "--asha and --folds exclude each other"),
        (["-np", "1", "--grid", "epochs=1,2", "--asha=1"], "--asha=1 is not of the form ETA:FIRST"),
        (["-np", "1", "--grid", "epochs=1,2", "--retries=-1"], "--retries=-1 must be 0 or more"),
        (["-np", "3", "--grid", "epochs=1,2", "--ranks_per_task=4"], "does not fit localhost, which has 3 slot"),
        (["--grid", "epochs=1,2"], "How many ranks?"),
        (["-np", "1", "--folds=3", "--goal=r2_score"], "--goal=r2_score is no metric of --task=auto. Use one of loss,"),
        (["-np", "1", "--folds=3", "--goal=dice"], "Write --goal=min:dice or --goal=max:dice"),
        (["-np", "1", "--folds=3", "--goal=up:dice"], "--goal=up:dice is not METRIC, min:METRIC or max:METRIC"),
        (["-np", "1", "--folds=3", "--goal=accuracy", "--", "--task=regression"], "Use one of loss, mean_absolute_err"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, capsys, arguments, message):
    assert job.main(["hvdkit.sweep", f"--workdir={tmp_path / 'sweep'}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_flag_of_one_command_line_does_not_stay_for_the_next():
    assert flags.parse(["", "--epochs=7"]).epochs == 7
    assert flags.parse([""]).epochs is None


def test_the_goal_follows_from_the_task(tmp_path):
    tasks = {
        "auto": ("accuracy", "maximize"),
        "multilabel": ("accuracy", "maximize"),
        "regression": ("loss", "minimize"),
    }
    for task, expected in tasks.items():
        chosen = parse(tmp_path, "-np", "1", "--folds=3", "--", f"--task={task}")
        assert (chosen.goal, chosen.direction) == expected
    chosen = parse(tmp_path, "-np", "1", "--folds=3", "--goal=mean_absolute_error", "--", "--task=regression")
    assert chosen.direction == "minimize"
    own = ["--dataset=mine.py:data", "--model=mine.py:build"]
    for given, expected in (
        ([], ("loss", "minimize")),
        (["--monitor=auc"], ("auc", "maximize")),
        (["--monitor=dice", "--monitor-mode=max"], ("dice", "maximize")),
    ):
        chosen = parse(tmp_path, "-np", "1", "--folds=3", "--", *own, *given)
        assert (chosen.goal, chosen.direction) == expected
    chosen = parse(tmp_path, "-np", "1", "--folds=3", "--goal=max:dice", "--", *own)
    assert (chosen.goal, chosen.direction) == ("dice", "maximize")


@pytest.mark.parametrize("fold", ["5/5", "0/1", "1", "a/b", "-1/3"])
def test_a_fold_that_is_none_is_refused(fold):
    with pytest.raises(UsageError, match="is not FOLD/FOLDS"):
        flags.parse(["", f"--fold={fold}"])
    assert flags.parse(["", "--fold=2/5"]).folding == (2, 5)


def test_a_sweep_may_become_longer_but_not_another(tmp_path):
    folder = tmp_path / "sweep"
    first = parse(tmp_path, "-np", "1", "--random", "learning_rate=0.1..1", "--trials=2")
    with job._own_folder(first), pytest.raises(UsageError, match="A sweep is running in"), job._own_folder(first):
        pass
    with job._own_folder(parse(tmp_path, "-np", "2", "--random", "learning_rate=0.1..1", "--trials=4")):
        pass
    with (
        pytest.raises(UsageError, match="has another sweep: its parameters, goal differ"),
        job._own_folder(parse(tmp_path, "-np", "1", "--grid", "epochs=1,2", "--goal=loss")),
    ):
        pass
    assert json.loads((folder / "sweep.json").read_text())["goal"] == "accuracy"


# ---- The study ---------------------------------------------------------------------------------------------------


def drawn(tmp_path, *more):
    search = ["-np", "1", "--grid", "epochs=1,2", "--random", "learning_rate=1e-3..1 log", "--trials=2", *more]
    chosen = parse(tmp_path, *search)
    chosen.folder.mkdir(exist_ok=True)
    return Study(chosen)


def test_an_interrupted_study_goes_on_with_what_it_had_drawn(tmp_path):
    study = drawn(tmp_path)
    first, second = study.take(), study.take()
    assert [first.values["epochs"], second.values["epochs"]] == [1, 2]
    study.end(first.number, "done", 0.5, {"seconds": 1.0})
    study = drawn(tmp_path)  # as after a kill
    assert [trial.values for trial in study.interrupted()] == [second.values]
    rest = [study.take(), study.take()]
    assert study.take() is None
    everything = [first, second, *rest]
    assert len({trial.values["learning_rate"] for trial in everything}) == 4
    study.end(second.number, "failed", None, {"error": "x" * 1000})
    study.end(rest[0].number, "done", 0.75, {})
    study.end(rest[1].number, "done", 0.75, {})
    assert study.best().number == rest[0].number, "of equals the first"
    assert [trial.state for trial in study.trials()] == ["done", "failed", "done", "done"]
    assert len(study.trials()[1].notes["error"]) == 500

    (tmp_path / "other").mkdir()
    other = drawn(tmp_path / "other")
    assert [other.take().values for _ in range(4)] == [trial.values for trial in everything], "a function of the seed"
    (tmp_path / "third").mkdir()
    assert drawn(tmp_path / "third", "--seed=1").take().values != first.values


def test_a_longer_study_keeps_what_there_is(tmp_path):
    study = drawn(tmp_path)
    assert len(study.trials()) == 4
    longer = parse(tmp_path, "-np", "1", "--grid", "epochs=1,2", "--random", "learning_rate=1e-3..1 log", "--trials=3")
    assert len(Study(longer).trials()) == 6


def test_two_sweeps_may_share_a_study(tmp_path):
    search = ["-np", "1", "--grid", "epochs=1,2,3,4", f"--storage=journal:{tmp_path / 'journal'}", "--study=one"]
    studies = []
    for name in ("a", "b"):
        (tmp_path / name / "sweep").mkdir(parents=True)
        studies.append(Study(parse(tmp_path / name, *search)))
    taken = [studies[turn].take() for turn in (0, 1, 0)]
    assert [trial.values["epochs"] for trial in taken] == [1, 2, 3]
    again = Study(parse(tmp_path / "a", *search))  # as after a kill
    assert [trial.number for trial in again.interrupted()] == [0, 2], "those of the other sweep are left alone"
    assert again.take().values == {"epochs": 4}
    assert studies[1].take() is None


def test_a_storage_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--storage=nosuch://db cannot be opened"):
        Study(parse(tmp_path, "-np", "1", "--grid", "epochs=1,2", "--storage=nosuch://db"))


@pytest.mark.parametrize("url", ["nosuch://me:s%40cret+1@host/db", "nosuch://host/db?user=me&password=s%40cret+1&x=1"])
def test_a_storages_password_is_not_shown(tmp_path, url):
    with pytest.raises(UsageError, match=r"--storage=nosuch://.*\*\*\*.* cannot be opened") as refused:
        Study(parse(tmp_path, "-np", "1", "--grid", "epochs=1,2", f"--storage={url}"))
    assert "cret" not in str(refused.value)
    assert without_password('invalid dsn: "host me:s@cret 1"', url) == 'invalid dsn: "host me:***"'
    assert without_password("nosuch://host/db", "nosuch://host/db") == "nosuch://host/db"


def test_asha_ends_what_is_worse_than_the_rest(tmp_path):
    chosen = parse(tmp_path, "-np", "1", "--grid", "seed=1,2,3", "--asha=2:1", "--goal=loss")
    chosen.folder.mkdir()
    study = Study(chosen)
    good, bad, better = (study.take().number for _ in range(3))
    assert not study.report(good, 1, 0.5)
    assert study.report(bad, 1, 0.9)
    assert not study.report(bad, 1, 0.9), "an epoch is judged once"
    assert not study.report(better, 1, 0.4)


@pytest.mark.parametrize(("goal", "expected"), [("accuracy", "1032"), ("loss", "0123")])
def test_the_table_at_the_end_begins_with_the_best(tmp_path, goal, expected):
    values = {0: ("done", 0.5), 1: ("done", 0.75), 2: ("failed", None), 3: ("ended early", 0.625)}
    trials = [Trial(n, {"epochs": n + 1}, state, value, {"tries": 2}) for n, (state, value) in values.items()]
    lines = final_table(trials, parse(tmp_path, "-np", "1", "--grid", "epochs=1,2,3,4", f"--goal={goal}")).splitlines()
    assert lines[0].split() == ["trial", "epochs", "state", goal, "seconds", "tries", "host"]
    assert "".join(line.split()[0] for line in lines[2:]) == expected
    assert ["1", "2", "done", "0.7500", "0.0", "2"] in [line.split() for line in lines]


def test_a_long_table_is_cut_and_says_so(tmp_path):
    trials = [Trial(number, {"seed": number}, "done", number / 100, {}) for number in range(40)]
    table = final_table(trials, parse(tmp_path, "-np", "1", "--grid", "seed=1,2"))
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["39", "38", "37"]
    assert table.endswith("\n... and 10 more, in result.json")


# ---- Places and tasks --------------------------------------------------------------------------------------------


def test_a_host_is_divided_into_slots():
    about = {"hostname": "h1", "cores": [0, 2, 1, 3], "gpus": []}
    assert [slot.cores for slot in divide(None, about, 4, 2)] == [(0, 2), (1, 3)]
    assert [slot.cores for slot in divide(None, about, 5, 1)] == [None] * 5, "fewer cores than places"
    with_gpus = {**about, "gpus": ["0", "1", "2", "3"]}
    assert [slot.gpus for slot in divide(None, with_gpus, 4, 2)] == [("0", "1"), ("2", "3")]
    with pytest.raises(UsageError, match=r"Host h1 shows 4 GPU\(s\) for 5 ranks"):
        divide(None, with_gpus, 5, 1)


def test_a_job_may_be_given_a_part_of_a_host():
    about = {"hostname": "h1", "cores": [0, 2, 1, 3], "gpus": ["0", "1"]}
    assert [b.cores for b in binding.bindings(about, 1, "auto", cores=[1, 3])] == [[1, 3]]
    assert [b.cores for b in binding.bindings(about, 2, "auto", cores=[3, 0])] == [[0], [3]]
    assert [b.cores for b in binding.bindings(about, 2, "none", cores=[3])] == [[3], [3]]
    assert [(b.cores, b.gpu) for b in binding.bindings(about, 1, "auto", gpus=["1"])] == [(None, "1")]
    assert [(b.cores, b.gpu) for b in binding.bindings(about, 1, "auto", [2], ["1"])] == [([2], "1")]
    with pytest.raises(UsageError, match=r"--cores names 7, and host h1 has 0, 1, 2, 3\."):
        binding.bindings(about, 1, "auto", cores=[0, 7])
    assert numbers("0-2,7", "--cores") == [0, 1, 2, 7]
    with pytest.raises(UsageError, match="--cores 0-x is not understood: '0-x' is no number or range like 0-3"):
        numbers("0-x", "--cores")


def test_each_try_has_a_folder_of_its_own(tmp_path):
    task = Task(3, None, tmp_path / "0003", [])
    assert task.next_try() == (tmp_path / "0003/try-1", [f"--workdir={tmp_path}/0003/try-1"])
    assert not task.find_result()
    (tmp_path / "0003/try-1/result.json").write_text('{"test_accuracy": 0.5, "test_loss": null}')
    assert task.next_try()[0].name == "try-2"
    assert task.find_result()
    assert tasks.value(task.result, "accuracy") == 0.5
    assert tasks.value(task.result, "loss") != tasks.value(task.result, "loss"), "NaN"


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    assert tasks.history(tmp_path, "val_loss") == []
    (tmp_path / "history.csv").write_text("epoch,loss,val_loss\n0,1.5,2.5\n1,1.0,2.0\n2,0.5,1")
    assert tasks.history(tmp_path, "val_loss") == [2.5, 2.0]


def test_an_epoch_without_a_value_is_left_out(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss,val_loss\n0,1.5,NA\n1,1.0,2.0\n")
    assert tasks.history(tmp_path, "val_loss") == [2.0]
    assert tasks.history(tmp_path, "loss") == [1.5, 1.0]


def test_a_log_says_what_went_wrong(tmp_path):
    log = tmp_path / "task.log"
    log.write_text("$ python -m x\nbye\nI0000 00:00 port.cc] notice\n")
    assert tasks.last_words(log) == "bye"
    log.write_text("Traceback\nValueError: no\n\n")
    assert tasks.last_words(log) == "ValueError: no"
