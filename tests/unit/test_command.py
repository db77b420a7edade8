"""The command `hvdkit`: its jobs, how options are spelled, completion, and what it says of what is installed."""

import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hvdkit import versions
from hvdkit.command import build, completion, jobs
from hvdkit.command.arguments import Parser
from hvdkit.errors import UsageError
from hvdkit.launch import options
from hvdkit.train import flags as train_flags
from hvdkit.train import local

ROOT = Path(__file__).parents[2]
BEGINS = 99  # the exit code of a command that begins its work; see outcomes_program.py


def hvdkit(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "hvdkit", *map(str, arguments)], capture_output=True, text=True, timeout=120, **settings
    )


# ------------------------------------------------------------------------------------------------------------ The jobs


def test_every_job_is_a_command():
    runnable = {path.parent.name for path in ROOT.glob("hvdkit/*/__main__.py")} - {"native"}  # which builds
    runnable |= {path.stem for path in ROOT.glob("hvdkit/*.py") if "__name__ ==" in path.read_text()} - {"__main__"}
    assert set(jobs.JOBS) == runnable


def test_help_lists_all_jobs_by_what_one_wants_to_do():
    said = hvdkit("--help").stdout
    assert [line for line in said.splitlines() if line.endswith(":") and line[0] != " "][:4] == [
        f"{group}:" for group in jobs.GROUPS
    ]
    for name, summary in jobs.JOBS.items():
        assert f"  {name.replace('_', '-'):<15} {summary}\n" in said


@pytest.mark.parametrize("arguments", [["--help"], ["launch", "--help"]])
def test_help_starts_at_once(arguments):
    seconds = []
    for _ in range(3):  # others on a crowded machine cost caches, and so CPU time
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert hvdkit(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1  # 0.2 on a machine that does nothing else; TensorFlow takes 10


def test_a_command_does_what_the_module_does(tmp_path):
    module = [sys.executable, "-m", "hvdkit.lint", "--list"]
    expected = subprocess.run(module, capture_output=True, text=True, timeout=60)
    assert expected.stdout.startswith("HVD")
    assert hvdkit("lint", "--list").stdout == expected.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["launch", "-np", "2", "--", sys.executable, "-c", "raise SystemExit(7)"], 7),
        (["launch", "-np", "1", "--", "true"], 0),
        (["launch", "-np", "none"], 2),
        (["train", "--modle=x"], 2),
    ],
    ids=lambda value: "",
)
def test_exit_codes_are_passed_on(arguments, code):
    ended = hvdkit(*arguments)
    assert ended.returncode == code, ended.stdout + ended.stderr


def test_modules_beside_the_user_are_found_as_by_python_m(tmp_path):
    (tmp_path / "layers.py").write_text("WIDTH = 8\n")
    script = tmp_path / "bin" / "hvdkit"  # as an installer writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom hvdkit.__main__ import main\nsys.exit(main())\n")
    (tmp_path / "job.py").write_text(
        "import runpy, sys\n"
        "def show(name, **_): import layers; print(name, sys.argv[1:], layers.WIDTH)\n"
        "runpy.run_module = show\n"
    )
    program = f"import sys, runpy; sys.path.append({str(tmp_path)!r}); import job; sys.path.pop()\n"
    program += f"sys.path[0] = {str(script.parent)!r}\n"
    program += "sys.argv = ['hvdkit', 'verify-resume', '--a_b=c_d', '--', '--e_f']\n"
    program += f"exec(open({str(script)!r}).read())"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ended.stdout == "hvdkit.verify_resume ['--a_b=c_d', '--', '--e_f'] 8\n", ended.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lanch", "hvdkit: There is no command 'lanch'. Did you mean launch? `hvdkit --help` lists all."),
        ("verify", "hvdkit: There is no command 'verify'. Did you mean verify-resume? `hvdkit --help` lists all."),
        ("xyzzy", "hvdkit: There is no command 'xyzzy'. `hvdkit --help` lists all."),
        ("--np", "hvdkit: There is no option '--np'. `hvdkit --help` lists all."),
    ],
)
def test_an_unknown_command_gets_one_sentence(given, said):
    ended = hvdkit(given)
    assert (ended.returncode, ended.stderr, ended.stdout) == (2, f"{said}\n", "")


def test_the_installed_script_is_the_command():
    assert 'hvdkit = "hvdkit.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    scripts = importlib.metadata.entry_points(group="console_scripts", name="hvdkit")
    for script in scripts:  # none where this checkout was not installed since there is one
        assert script.load().__module__ == "hvdkit.command.main"


# --------------------------------------------------------------------------------------------- How options are spelled


def test_options_of_argparse_take_both_spellings_and_values_stay():
    parser = Parser("job")
    group = parser.add_argument_group("in a group")
    group.add_argument("--start-timeout", type=int)
    parser.add_argument("--ssh-args")
    parser.add_argument("--json")
    one = parser.add_subparsers(dest="what").add_parser("one")
    one.add_argument("--cache-gb", type=float)
    one.add_argument("rest", nargs="*")
    for dash in "-_":
        line = f"--start{dash}timeout=3 --ssh{dash}args=-o_a-b=c_d one --cache{dash}gb 2 -- --start_timeout --cache-gb"
        given = vars(parser.parse_args(line.split()))
        assert given == {
            "start_timeout": 3,
            "ssh_args": "-o_a-b=c_d",
            "json": None,
            "what": "one",
            "cache_gb": 2.0,
            "rest": ["--start_timeout", "--cache-gb"],
        }
    assert "_" not in "".join(re.findall(r"--\S+", parser.format_help()))


def test_abbreviations_are_no_options(capsys):
    parser = Parser("job")
    parser.add_argument("--start-timeout")
    with pytest.raises(SystemExit):
        parser.parse_args(["--start=3"])
    assert "hvdkit job: error: unrecognized arguments: --start=3" in capsys.readouterr().err


@pytest.mark.parametrize("dashes", [["--"], []], ids=["with --", "without --"])
def test_the_launcher_leaves_the_users_command_alone(dashes):
    command = ["python", "x.py", "--start_timeout=1", "--my-flag", "a_b-c", "--", "--np_x"]
    given = options.parse(["", "-np", "2", "--start_timeout", "7", "--stall-timeout=8", *dashes, *command])
    assert (given.start_timeout, given.stall_timeout, given.command) == (7, 8.0, command)


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("--global-batch=64", "--global_batch=64"),
        ("--global_batch=64", "--global_batch=64"),
        ("-global-batch 64", "--global_batch 64"),
        ("--workdir a-b_c --model-args=k-e_y=a-b", "--workdir a-b_c --model_args=k-e_y=a-b"),
        ("--workdir --global-batch", "--workdir --global-batch"),  # a value, though it looks like a flag
        ("--shard-optimizer --no-tensorboard", "--shard_optimizer --notensorboard"),
        ("--noshard-optimizer --notensorboard", "--noshard_optimizer --notensorboard"),
        ("--keep-worst=3 --local-batch=1", "--keep-worst=3 --local_batch=1"),
        ("--epochs=3 -- --local-batch=1", "--epochs=3 -- --local-batch=1"),
    ],
)
def test_flags_of_the_training_take_both_spellings_and_values_stay(given, spelled):
    assert train_flags.spelled(given.split()) == spelled.split()


def test_the_trainings_errors_show_dashes():
    with pytest.raises(UsageError, match=r"flag --global-batch=none: "):
        train_flags.parse(["", "--global_batch=none"])
    with pytest.raises(UsageError, match=r"Unknown command line flag 'global-btach'"):
        train_flags.parse(["", "--global-btach=64"])


# ---------------------------------------------------------------------------------------------------------- Completion


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """What bash offers for the last word of a command line, after the completion was loaded as users load it."""
    script = tmp_path_factory.mktemp("completion") / "hvdkit"
    ended = hvdkit("--print-completion", "bash")
    assert ended.returncode == 0, ended.stderr
    script.write_text(ended.stdout)
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); function=$(complete -p hvdkit); '
        'function=${function#*-F }; "${function%% *}" hvdkit "${COMP_WORDS[COMP_CWORD]}"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def offer(*words):
        command = ["bash", "--norc", "-c", program, "bash", script, "hvdkit", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.stderr == ""
        return ended.stdout.split()

    return offer


def test_bash_completes_jobs_and_options(bash):
    assert bash("la") == ["launch"]
    assert set(bash("")) == {job.replace("_", "-") for job in jobs.JOBS}
    assert bash("--v") == ["--version"]
    assert bash("launch", "--start") == ["--start-timeout"]
    assert bash("launch", "--remote-shell", "s") == ["ssh", "srun"]
    assert bash("train", "--global") == ["--global-batch"]
    assert bash("train", "--no-ten") == ["--no-tensorboard"]
    assert bash("train", "--strategy", "m") == ["mirrored", "multiworker"]
    assert bash("verify-resume", "--kill-") == ["--kill-seed"]
    assert bash("bench", "thr") == ["throughput"]
    assert bash("bench", "scaling", "--mode", "w") == ["weak"]


def test_bash_completes_files(bash, tmp_path):
    (tmp_path / "hosts-of-mine").touch()
    assert bash("launch", "--hostfile", f"{tmp_path}/ho") == [f"{tmp_path}/hosts-of-mine"]


@pytest.mark.parametrize(("shell", "begin"), [("zsh", "#compdef hvdkit"), ("fish", "complete -c hvdkit")])
def test_other_shells_get_a_script_of_theirs(shell, begin):
    said = hvdkit("--print-completion", shell).stdout
    assert begin in said
    assert "start-timeout" in said
    assert "global-batch" in said


def test_completion_knows_every_job():
    commands = next(action for action in completion.whole_parser()._actions if action.choices and action.nargs)
    assert set(commands.choices) == {job.replace("_", "-") for job in jobs.JOBS}
    for parser in commands.choices.values():
        assert parser.prog.startswith("hvdkit ")
        assert parser.format_help()


def test_completion_for_an_unknown_shell():
    ended = hvdkit("--print-completion", "ksh")
    assert ended.returncode == 2
    assert ended.stderr == "hvdkit: --print-completion was given ksh, and expects one of: bash, zsh, fish.\n"


# ------------------------------------------------------------------------------------------------- What is installed


def test_version_says_how_horovod_was_built():
    horovod = pytest.importorskip("horovod.tensorflow")
    said = hvdkit("--version").stdout
    assert said.splitlines()[:2] == [
        f"hvdkit {importlib.metadata.version('hvdkit')}, Python {sys.version.split()[0]}",
        f"TensorFlow {versions.of('tensorflow')}, Keras {versions.of('keras')}",
    ]
    built = {"Gloo": horovod.gloo_built(), "MPI": horovod.mpi_built(), "NCCL": horovod.nccl_built()}
    with_, _, without = said.splitlines()[2].removeprefix("Horovod 0.28.1, built with ").partition(", without ")
    assert with_.split(" and ") == [name for name, there in built.items() if there]
    assert list(filter(None, without.split(" and "))) == [name for name, there in built.items() if not there]


def test_a_horovod_that_does_not_load(tmp_path, monkeypatch):
    broken = tmp_path / "horovod" / "tensorflow"
    broken.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (broken / "mpi_lib.so").write_text("no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "horovod", raising=False)
    importlib.invalidate_caches()
    assert build.how_horovod_was_built() == "which cannot be loaded: build it with launch/bootstrap.sh"


# ------------------------------------------------------------------------- launch/local.sh: options and flags mixed


def divided(*arguments):
    """The command and the number of ranks that the launcher would be given."""
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "launch", lambda given: launched.append(given) or 0)
        assert local.main(["", *arguments]) == 0
    (given,) = launched
    assert given.command[:3] == [sys.executable, "-m", "hvdkit.train"]
    return given, given.command[3:]


@pytest.mark.parametrize(
    ("line", "ranks"),
    [
        ("", 2),
        ("--strategy=mirrored", 1),
        ("--strategy single", 1),
        ("--strategy=single -np 2", 2),
        ("--strategy=multiworker", 2),
        ("-np 3", 3),
        ("-H h1:2,h2:2 --strategy=mirrored", None),
        ("--hosts_from slurm", None),
        ("--elastic --host-discovery-script ./hosts --workdir w", None),
    ],
)
def test_how_many_ranks_the_launch_script_starts(line, ranks):
    assert divided(*line.split())[0].np == ranks


def test_the_launch_script_divides_options_from_flags():
    line = "--epochs 3 -np 2 --remote-shell ssh --workdir runs/w --model_args width=1 --start_timeout=9"
    given, flags = divided(*line.split(), "--no-tensorboard")
    assert (given.np, given.remote_shell, given.start_timeout, given.workdir) == (2, "ssh", 9, "runs/w")
    assert flags == ["--epochs", "3", "--model_args", "width=1", "--no-tensorboard", "--workdir=runs/w"]


@pytest.mark.parametrize(("line", "is_quick_start"), [("", True), ("-np 1 --workdir=w", True), ("--epochs=2", False)])
def test_without_flags_of_the_training_it_is_the_quick_start(line, is_quick_start):
    _, flags = divided(*line.split())
    assert (set(local.QUICK_START) <= set(flags)) is is_quick_start


def test_launcher_and_training_share_no_option_but_the_workdir():
    launcher = {name for action in options.parser()._actions for name in action.option_strings}
    training = {name for action in train_flags.parser()._actions for name in action.option_strings}
    assert launcher & training == {"--workdir", "-h", "--help"}


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("-np x", 2, "argument -np: invalid int value: 'x'"),
        ("-np 2 --modle=x", 2, "hvdkit.train: Unknown command line flag 'modle'"),
        ("-np 2 --help", 0, "--global-batch"),
    ],
)
def test_the_launch_script_starts_no_rank_for(line, code, said):
    command = [sys.executable, "-m", "hvdkit.train.local", *line.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"})
    assert ended.returncode == code
    assert said in ended.stdout + ended.stderr


# ------------------------------------------------------------------------- Mistakes are found before any work is done


NO_ARGUMENT = {  # what a command says of it; None if it begins to work
    "train": None,
    "generate": "the following arguments are required: RUN_FOLDER",
    "sweep": "the following arguments are required: --workdir",
    "launch": "no command was given; write it after --",
    "lint": "no script was given",
    "doctor": "one of the arguments -H --hostfile --list is required",
    "drill": "the following arguments are required: fault",
    "verify-resume": None,
    "bench": "the following arguments are required: COMMAND",
    "compare": None,
    "plan": None,
    "compress": "the following arguments are required: RUN_FOLDER",
    "distill": "the following arguments are required: --teacher",
}
MISTAKES = {
    "train --bogus=1": "Unknown command line flag 'bogus'",
    "train --epochs=0": "flag --epochs=0: 0 is not a positive integer",
    "train --augment=flop": "--augment=flop: 'flop' is unknown. Name some of flip, crop, rand, mixup, cutmix.",
    "compress x": "Nothing to do. Give --quantize=int8, --prune=0.8 or --export=saved_model, or several.",
    "compress nowhere --quantize=int8": "nowhere has no finished run. Give the --workdir of hvdkit train.",
    "compress x --quantize=int3": "'int3': choose from int8, int4, float8, gptq",
    "compress x --quantize=int8 --finetune=2": "--finetune=2 is a number of epochs, 1 or more, that follow --prune.",
    "compress x --prune=80": "'80': give shares between 0 and 1, such as 0.5,0.8",
    "distill --teacher=nowhere": "--teacher=nowhere has no model: there is no file nowhere/model.keras.",
    "distill --teacher=x.keras --foo=3": "Unknown command line flag 'foo'",
    "distill --teacher=x.keras -np 0": "-np 0: at least one rank is needed",
    "distill --teacher=x.keras --class-weights": "--teacher and --class-weights exclude each other",
    "generate x --bogus": "unrecognized arguments: --bogus",
    "generate x.keras --top-k=0": "top_k=0, seed=0: top_k must be 1 or more",
    "generate nowhere.keras": "nowhere.keras does not exist. Give the folder that hvdkit.train wrote",
    "sweep --workdir=x --bogus": "unrecognized arguments: --bogus",
    "sweep --workdir=x --folds=1": "--folds=1 must be 2 or more",
    "sweep --workdir=x --folds=3 -- --foo=3": "Unknown command line flag 'foo'",
    "launch --bogus -- true": "unrecognized arguments: --bogus",
    "launch -np 0 -- true": "-np 0: at least one rank is needed",
    "launch -np 2": "no command was given",
    "lint --bogus": "unrecognized arguments: --bogus",
    "lint nowhere.py": "nowhere.py cannot be read: No such file or directory",
    "lint --explain HVD999": "There is no rule 'HVD999'. The rules are HVD101",
    "doctor --list --bogus": "unrecognized arguments: --bogus",
    "doctor -H h1:x": "expected a name or IPv4 address and its number of ranks, as in h1:2",
    "doctor -H h1:1 --skip foo": "foo",
    "drill kill --foo=3": "Unknown command line flag 'foo'",
    "drill kill -np 0": "-np 0: at least one rank is needed",
    "drill kill --rank 7 -np 2": "--rank 7 --step 60 of 2 rank(s): expected are a rank from 0 to 1",
    "drill kill -H h1:2,h2:x": "h2:x",
    "verify-resume --bogus=1": "Unknown command line flag 'bogus'",
    "verify-resume --kills=-1": "-np and --kills must be 1 or more, but are 2 and -1",
    "verify-resume --model-args=1": "--model-args=1 cannot be read",
    "bench foo": "invalid choice: 'foo'",
    "bench throughput --json .": ". is a folder; give the name of a file",
    "bench throughput -- --foo=3": "Unknown command line flag 'foo'",
    "bench imbalance -- --epochs=1": "Give all trainings the same steps: -- --steps=1000.",
    "bench scaling --ranks=0,1": "--ranks=0,1: at least one rank is needed",
    "compare -np 0": "-np 0: at least one rank is needed",
    "compare --ways foo": "--ways: 'foo' is not one of",
    "compare -- --epochs=1 --steps=1": "--epochs and --steps exclude each other",
    "plan --modes foo": "There is no mode 'foo'. Choose from data parallel, fp16, ",
    "plan --seconds 0": "--seconds=0 must be above 0",
    "plan -- --foo=3": "Unknown command line flag 'foo'",
    "plan --json /no/such/folder/x.json": "there is no folder /no/such/folder for x.json; create it first",
}


def test_help_no_argument_and_mistakes_of_every_command(tmp_path):
    """Help and mistakes are told before TensorFlow loads, and before a process starts or a file is written."""
    named = [job.replace("_", "-") for job in jobs.JOBS]
    assert set(named) == set(NO_ARGUMENT)
    assert all(sum(line.split()[0] == job for line in MISTAKES) >= 3 for job in named)
    helps = [f"{job} --help" for job in named]
    program = [sys.executable, str(Path(__file__).with_name("outcomes_program.py"))]
    environment = {**os.environ, "OUTCOMES_FOLDER": str(tmp_path), "COLUMNS": "200"}
    lines = "\n".join([*helps, *NO_ARGUMENT, *MISTAKES])
    ended = subprocess.run(program, input=lines, capture_output=True, text=True, timeout=200, env=environment)
    assert ended.returncode == 0, ended.stderr
    outcomes = json.loads(ended.stdout)
    wrong = {}
    for line in helps:
        code, said = outcomes[line]
        if code != 0 or re.findall(r"--[a-z]+_[a-z_]+", said) or "hvdkit" not in said:
            wrong[line] = code, said
    for line, message in {**NO_ARGUMENT, **MISTAKES}.items():
        code, said = outcomes[line]
        as_expected = code == BEGINS if message is None else code == 2 and message in said and "Traceback" not in said
        if not as_expected:
            wrong[line] = code, said
    assert not wrong
    assert not list(tmp_path.iterdir())
