"""Each rule on a wrong script, whose line it must name, and on the fixed one; then the command."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hvdkit.lint.__main__ import main
from hvdkit.lint.finding import findings
from hvdkit.lint.rules import RULES
from hvdkit.lint.script import Script

ROOT = Path(__file__).resolve().parents[3]
HEAD = "import keras, tensorflow as tf, numpy as np, hvdkit as hvd\nhvd.init()\n"  # a script's first two lines


def found(source, code=""):
    rules = [rule for rule in RULES if rule.code.startswith(code)]
    return [(f.code, f.line) for f in findings(Script(textwrap.dedent(source), "script.py"), rules)]


def lines(source, code):
    return [line for _, line in found(source, code)]


# Wrong scripts, with the rule's code behind the line that it must name, and fixed ones. The head comes before both.
CASES = """
m.compile('adam', loss='mse')  # HVD201
m.fit(d, epochs=1)
--- fixed ---
m.compile(hvd.DistributedOptimizer(keras.optimizers.Adam()), loss='mse')
m.fit(d, epochs=1)
==========
m.compile(loss='mse')  # HVD201
m.fit(d, epochs=1)
--- fixed ---
m.compile(loss='mse', **options)
m.fit(d, epochs=1)
==========
opt = keras.optimizers.SGD(0.1)
hvd.DistributedOptimizer(opt)
m.compile(opt)  # HVD201
m.fit(d, epochs=1)
--- fixed ---
opt = keras.optimizers.SGD(0.1)
opt = hvd.DistributedOptimizer(opt)
m.compile(opt)
m.fit(d, epochs=1)
==========
hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))  # HVD202
--- fixed ---
hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.1)))
==========
opt = hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.1)))
grads = tape.gradient(loss, weights)
grads, _ = tf.clip_by_global_norm(grads, 1.0)  # HVD203
opt.apply(grads, weights)
--- fixed ---
opt = keras.optimizers.SGD(hvd.scaled(0.1))
tape = hvd.DistributedGradientTape(tape)
grads, _ = tf.clip_by_global_norm(tape.gradient(loss, weights), 1.0)
opt.apply(grads, weights)
==========
rate = 1e-3
opt = tf.keras.optimizers.Adam(learning_rate=rate)  # HVD202
opt = hvd.DistributedOptimizer(opt)
--- fixed ---
rate = 1e-3 * hvd.size()
opt = keras.optimizers.Adam(rate)
opt = hvd.DistributedOptimizer(opt)
==========
K = keras.optimizers
rate = K.schedules.CosineDecay(0.1, 100)
hvd.DistributedOptimizer(K.SGD(rate))  # HVD202
--- fixed ---
K = keras.optimizers
rate = K.schedules.CosineDecay(hvd.scaled(0.1), 9)
hvd.DistributedOptimizer(K.SGD(rate))
==========
d = tf.data.Dataset.range(9).batch(3)
m.fit(d, epochs=1)  # HVD301
--- fixed ---
d = hvd.data.shard(tf.data.Dataset.range(9)).batch(3)
m.fit(d, epochs=1)
==========
(x, y), _ = keras.datasets.mnist.load_data()
m.fit(x / 255, y, epochs=1)  # HVD301
--- fixed ---
(x, y), _ = keras.datasets.mnist.load_data()
x, y = x[hvd.rank()::4], y[hvd.rank()::4]
m.fit(x, y, epochs=1)
==========
def data():
    d = tf.data.Dataset.range(9)
    return d.map(lambda x: x + 1)

m.fit(data(), epochs=1)  # HVD301
--- fixed ---
def data():
    d = tf.data.Dataset.range(9)
    return d.shard(hvd.size(), hvd.rank())

m.fit(data(), epochs=1)
==========
d = tf.data.Dataset.range(9).batch(3)
m.fit(d, steps_per_epoch=9 // hvd.size())  # HVD301
--- fixed ---
d = tf.data.Dataset.range(9).repeat().shuffle(9)
m.fit(d, steps_per_epoch=9 // hvd.size())
==========
d = hvd.data.shard(tf.data.Dataset.range(9).shuffle(9))  # HVD302
--- fixed ---
d = hvd.data.shard(tf.data.Dataset.range(9).shuffle(9, seed=0))
==========
d = tf.data.Dataset.range(9).shuffle(9, seed=hvd.rank())  # HVD302
d = d.shard(hvd.size(), hvd.rank())
--- fixed ---
d = tf.data.Dataset.range(9)
d = d.shard(hvd.size(), hvd.rank()).shuffle(9, seed=hvd.rank())
==========
from sklearn.model_selection import train_test_split
x, t = train_test_split(a)  # HVD302
x = x[hvd.rank()::2]
--- fixed ---
from sklearn.model_selection import train_test_split
x, t = train_test_split(a, random_state=1)
x = x[hvd.rank()::2]
==========
d = tf.data.Dataset.list_files('*.png')  # HVD302
d = d.shard(hvd.size(), hvd.rank())
--- fixed ---
d = tf.data.Dataset.list_files('*.png', shuffle=False)
d = d.shard(hvd.size(), hvd.rank())
==========
d = hvd.data.shard(keras.utils.image_dataset_from_directory('x'))  # HVD302
--- fixed ---
d = hvd.data.shard(keras.utils.image_dataset_from_directory('x', seed=1))
==========
m.fit(d, epochs=1)  # HVD401
--- fixed ---
m.fit(d, callbacks=hvd.callbacks.standard())
==========
log = keras.callbacks.CSVLogger('x')
m.fit(d, callbacks=[log])  # HVD401
--- fixed ---
c = []
c.append(hvd.callbacks.BroadcastGlobalVariablesCallback(0))
m.fit(d, callbacks=c)
==========
m.fit(d, callbacks=[keras.callbacks.EarlyStopping(), hvd.callbacks.MetricAverageCallback()])  # HVD402
--- fixed ---
m.fit(d, callbacks=[hvd.callbacks.MetricAverageCallback(), keras.callbacks.EarlyStopping()])
==========
c = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
c.append(keras.callbacks.ReduceLROnPlateau())  # HVD402
m.fit(d, callbacks=c)
--- fixed ---
c = hvd.callbacks.standard()
c += [keras.callbacks.ReduceLROnPlateau()]
m.fit(d, callbacks=c)
==========
best = keras.callbacks.ModelCheckpoint('x', save_best_only=True)  # HVD402
m.fit(d, callbacks=[best])
--- fixed ---
best = keras.callbacks.ModelCheckpoint('x')
m.fit(d, callbacks=[best])
==========
keras.callbacks.ModelCheckpoint('best.keras')  # HVD403
--- fixed ---
if hvd.rank() == 0:
    keras.callbacks.ModelCheckpoint('best.keras')
==========
c = [keras.callbacks.CSVLogger('log.csv')]  # HVD403
m.fit(d, callbacks=c)
--- fixed ---
c = [keras.callbacks.CSVLogger('log.csv')]
m.fit(d, callbacks=c if hvd.rank() == 0 else [])
==========
if hvd.rank() != 0:
    tf.keras.callbacks.TensorBoard('logs')  # HVD403
--- fixed ---
keras.callbacks.TensorBoard(f'logs/{hvd.rank()}')
==========
m = keras.Sequential([])
m.save('m.keras')  # HVD403
--- fixed ---
m = keras.Sequential([])
def keep():
    if hvd.rank():
        return
    m.save('m.keras')
keep()
==========
m.fit(d, epochs=1)
def keep():
    m.save('m.keras')  # HVD403
keep()
--- fixed ---
m.fit(d, epochs=1)
def keep():
    m.save('m.keras')
if not hvd.rank():
    keep()
==========
m.fit(d, epochs=1)  # HVD404
--- fixed ---
m.fit(d, epochs=1, callbacks=hvd.callbacks.standard())
==========
m.fit(d, epochs=1,
      verbose=2)  # HVD404
--- fixed ---
m.fit(d, epochs=1,
      verbose=2 if hvd.rank() == 0 else 0)
==========
loud = 1
m.fit(d, epochs=1, verbose=loud)  # HVD404
--- fixed ---
loud = 1 if hvd.rank() == 0 else 0
m.fit(d, epochs=1, verbose=loud)
==========
if hvd.rank() == 0:
    hvd.barrier()  # HVD501
--- fixed ---
if hvd.size() > 1:
    hvd.barrier()
==========
if hvd.rank() == 0:
    print()
else:
    hvd.allreduce(1)  # HVD501
--- fixed ---
if hvd.rank() == 0:
    print()
hvd.allreduce(1)
==========
if hvd.rank() == 0:
    x = hvd.broadcast_object(1)  # HVD501
--- fixed ---
if hvd.rank() == 0:
    x = hvd.broadcast_object(1)
else:
    x = hvd.broadcast_object(None)
==========
def main():
    if hvd.rank() != 0:
        return
    hvd.allgather([1])  # HVD501
main()
--- fixed ---
def main():
    hvd.allgather([1])
    if hvd.rank() != 0:
        return
main()
==========
import sys
if hvd.rank() > 0:
    sys.exit()
hvd.barrier()  # HVD501
--- fixed ---
import sys
if hvd.rank() > 0:
    sys.exit('no data')
hvd.barrier()
==========
m.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()))
root = hvd.rank() == 0
if root:
    m.fit(d, epochs=1)  # HVD501
--- fixed ---
m.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()))
root = hvd.rank() == 0
m.fit(d, epochs=1)
if root:
    m.evaluate(d)
==========
def total(x):
    return hvd.allreduce(x)
if hvd.local_rank() == 0:
    total(1)  # HVD501
--- fixed ---
def total(x):
    return hvd.allreduce(x)
if hvd.local_rank() == 0:
    print()
total(1)
==========
import horovod.tensorflow.keras as hvd  # HVD601
--- fixed ---
import horovod.tensorflow as hvd
==========
from horovod import keras as hvd  # HVD601
--- fixed ---
import os, horovod.keras as hvd
os.environ['TF_USE_LEGACY_KERAS'] = '1'
==========
keras.optimizers.Adam(lr=1)  # HVD602
--- fixed ---
keras.optimizers.Adam(learning_rate=1)
==========
from tensorflow.keras.optimizers import SGD
SGD(1.0, decay=0.1)  # HVD602
--- fixed ---
from optimizers import SGD
SGD(1.0, decay=0.1)
==========
m.compile('sgd', loss='mse', experimental_run_tf_function=False)  # HVD602
--- fixed ---
m.compile('sgd', loss='mse')
==========
m.fit_generator(d)  # HVD603
--- fixed ---
m.fit(d)
==========
keras.optimizers.legacy.Adam()  # HVD603
--- fixed ---
keras.optimizers.Adam()
==========
opt = keras.optimizers.Adam()
print(opt.lr)  # HVD603
--- fixed ---
opt = keras.optimizers.Adam()
print(opt.learning_rate, args.lr)
==========
tf.Session()  # HVD603
--- fixed ---
if tf.__version__ < '2':
    tf.Session()
==========
import tf_keras  # HVD604
--- fixed ---
import keras
""".strip().split("\n==========\n")


@pytest.mark.parametrize("case", CASES)
def test_a_rule_names_the_line_and_is_silent_on_the_fixed_script(case):
    wrong, fixed = case.split("\n--- fixed ---\n")
    code = re.search(r"# (HVD\d+)", wrong)[1]
    (line,) = [number for number, text in enumerate((HEAD + wrong).split("\n"), 1) if f"# {code}" in text]
    assert lines(HEAD + wrong, code) == [line]
    assert lines(HEAD + fixed, code) == []


def test_every_rule_has_a_case():
    assert {rule.code for rule in RULES} - set(re.findall(r"# (HVD\d+)", "".join(CASES))) == {
        "HVD101",
        "HVD102",
        "HVD103",
    }


def test_hvd_init_must_be_there_and_come_first():
    use = "import hvdkit as hvd\nimport keras\n"
    assert found(use + "print(hvd.rank())") == [("HVD101", 3)]
    assert found(use + "from mine import setup_job\nsetup_job()\nprint(hvd.rank())") == []
    assert found(use + "def mine():\n    return hvd.rank()") == [], "a module that only defines"
    assert found(use + "keras.Sequential([])\nhvd.init()") == [("HVD102", 4)]
    assert found(use + "def model():\n    return keras.Sequential([])\nm = model()\nhvd.init()") == [("HVD102", 6)]
    assert found(use + "v = keras.optimizers.SGD()\ndef main():\n    hvd.init()\nmain()", "HVD1") == [("HVD102", 5)]
    assert found(use + "def model():\n    return keras.Sequential([])\nhvd.init()\nm = model()") == []


@pytest.mark.parametrize(
    "use",
    [
        "import hvdkit\nhvdkit.{}",
        "import hvdkit as h\nh.{}",
        "from hvdkit import barrier\nbarrier()",
        "from hvdkit.collectives import barrier as wait\nwait()",
        "import horovod.tensorflow as h\nh.{}",
        "import horovod.tensorflow.keras\nhorovod.tensorflow.keras.{}",
        "from horovod.tensorflow import keras as h\nh.{}",
    ],
)
def test_names_are_known_under_any_alias(use):
    first, call = use.format("barrier()").split("\n")
    assert lines(f"{first}\nimport hvdkit\nif hvdkit.rank() == 0:\n    {call}", "HVD501") == [4]


@pytest.mark.parametrize("name", ["keras", "tensorflow.keras", "tensorflow.python.keras"])
def test_keras_is_known_under_any_name(name):
    assert lines(f"import {name} as k\nk.optimizers.Adam(lr=1)", "HVD602") == [2]
    assert lines(f"from {name}.optimizers import Adam as A\nA(lr=1)", "HVD602") == [2]
    assert lines("from tensorflow import keras\nkeras.optimizers.Adam(lr=1)", "HVD602") == [2]
    assert lines("import tensorflow as tf\ntf.optimizers.Adam(lr=1)", "HVD602") == [2]


@pytest.mark.parametrize(
    "unknown",
    [
        "from mine import make_optimizer\nm.compile(make_optimizer())\nm.fit(d, epochs=1, verbose=0)",
        "from mine import make_data\nm.fit(make_data(), epochs=1, verbose=0)",
        "from mine import prepare\nd = prepare(tf.data.Dataset.range(9))\nm.fit(d, epochs=1, verbose=0)",
        "def train(m, d):\n    m.fit(d, epochs=1, verbose=0)",
        "from mine import callbacks\nm.fit(d, epochs=1, callbacks=callbacks)",
        "from PIL import Image\nImage.open('a.png').save('b.png')",
        "import re\nre.compile('x')\nfrom sklearn.svm import SVC\nSVC().fit(np.zeros(3), np.ones(3))",
    ],
)
def test_what_one_file_does_not_show_is_not_reported(unknown):
    assert [code for code, _ in found(HEAD + unknown) if code != "HVD401"] == []


def test_a_plain_keras_script_is_told_that_it_uses_no_hvdkit_and_nothing_about_many_ranks():
    plain = "import keras\nm = keras.Sequential([])\nm.compile('sgd')\n{}m.fit(x, y, epochs=1)\nm.save('x')"
    assert found(plain.format("")) == [("HVD103", 1)]
    assert found("import os\n" + plain.format("keras.optimizers.SGD(lr=1)\n")) == [("HVD103", 1), ("HVD602", 5)]
    assert found("import keras\ndef train(m):\n    m.compile('sgd')\n    m.fit(x, epochs=1)") == [], "only defines"
    assert found("from mine import setup\nsetup()\n" + plain.format("")) == []
    assert found("import tensorflow as tf\ns = tf.distribute.MirroredStrategy()\n" + plain.format("")) == []
    assert found("import horovod.torch\n" + plain.format(""), "HVD103") == []
    assert found("import keras\nprint(keras.__version__)") == []
    loop = "import tensorflow as tf\nopt = tf.optimizers.SGD()\nopt.apply_gradients(zip(g, v))\n"
    assert found(loop) == [("HVD103", 1)]
    assert found("import torch\nopt.apply_gradients(g)") == []


def test_the_tests_of_the_rank_are_told_from_others():
    assert lines(HEAD + "world = hvd.init()\nif world.is_root:\n    hvd.barrier()", "HVD501") == [5]
    assert lines(HEAD + "import os\nif os.environ['HOROVOD_RANK'] == '0':\n    hvd.barrier()", "HVD501") == [5]
    assert lines(HEAD + "def root():\n    return not hvd.rank()\nif root():\n    hvd.barrier()", "HVD501") == [6]
    assert lines(HEAD + "if x.shape.rank == 2:\n    hvd.barrier()", "HVD501") == []
    assert lines(HEAD + "x = hvd.broadcast_object(hvd.rank())\nif x == 0:\n    hvd.barrier()", "HVD501") == []
    share = "d = d.shard(2, hvd.rank())\n"
    assert lines(HEAD + share + "for b in d:\n    if b == 0:\n        hvd.barrier()", "HVD501") == []


def test_a_finding_says_what_is_wrong_and_how_to_fix_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(HEAD + 'é = "é", hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))\n')
    assert main(["lint", "train.py"]) == 1
    assert capsys.readouterr().out == (
        "train.py:3:56: HVD202 The learning rate (0.1) is for one process, but the global batch grows with the number "
        "of ranks. Fix: hvd.scaled(0.1) as the learning rate, or `# noqa: HVD202` if you chose it for the global "
        "batch.\n1 finding(s) in 1 file(s)\n"
    )


def test_the_readmes_script_is_clean():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scripts = [block for block in blocks if ".fit(" in block]
    assert scripts
    assert [found(script) for script in scripts] == [[]] * len(scripts)


def test_findings_are_waived_on_their_line():
    wrong = HEAD + "if hvd.rank() == 0:\n    hvd.allreduce(\n        1\n    ){}"
    assert lines(wrong.format(""), "HVD501") == [4]
    assert lines(wrong.format("  # noqa: HVD202"), "HVD501") == [4]
    assert lines(wrong.format("  # noqa: E501, HVD501"), "HVD501") == []
    assert lines(wrong.format("  # noqa"), "HVD501") == []
    assert lines(wrong.format("; '# noqa: HVD501'"), "HVD501") == [4], "a text is no comment"


def test_the_command(tmp_path, capsys):
    (tmp_path / "package").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "theirs.py").write_text(HEAD + "hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))")
    wrong, right = tmp_path / "package" / "wrong.py", tmp_path / "right.py"
    wrong.write_text(HEAD + "if hvd.rank() == 0:\n    hvd.barrier()\nkeras.optimizers.SGD(lr=1)\n")
    right.write_text(HEAD)
    assert main(["lint", str(right)]) == 0
    assert capsys.readouterr().out == "no finding(s) in 1 file(s)\n"
    assert main(["lint", "--json", str(tmp_path), str(wrong)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["files"], report["unread"]) == (2, [])
    assert [(f["path"], f["line"], f["column"], f["code"]) for f in report["findings"]] == [
        (str(wrong), 4, 5, "HVD501"),
        (str(wrong), 5, 22, "HVD602"),
    ]
    assert main(["lint", "--select", "hvd6", "--json", str(wrong)]) == 1
    assert [f["code"] for f in json.loads(capsys.readouterr().out)["findings"]] == ["HVD602"]
    assert main(["lint", "--ignore", "HVD501,HVD6", str(wrong)]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"if x\n", r"x\.py:1 is not Python .*: expected ':'\. Fix it first"),
        (b"x = '\xe9'\n", r"is not (UTF-8 text|Python)"),
        (b"x = 1\0\n", r"x\.py.* (cannot be parsed as|is not) Python"),
        (None, r"x\.py cannot be read: No such file or directory\. Give the path of a Python file"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "x.py").write_bytes(content)
    assert main(["lint", str(tmp_path / "x.py")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_mistakes_on_the_command_line(tmp_path, capsys):
    assert main(["lint", str(tmp_path)]) == 2
    assert "There is no Python file under" in capsys.readouterr().err
    assert main(["lint", "--select", "HVD9", str(tmp_path)]) == 2
    assert "There is no rule 'HVD9'. The rules are HVD101," in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["lint"])
    assert "no script was given" in capsys.readouterr().err


def test_rules_explain_themselves(capsys):
    assert main(["lint", "--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(RULES)
    for rule in RULES:
        assert re.fullmatch(r"[A-Zh].*\.", rule.title)
        assert "Wrong:" in rule.explanation
        assert "Right" in rule.explanation
    assert main(["lint", "--explain", "HVD501"]) == 0
    assert "waits for the others" in capsys.readouterr().out


def test_the_examples_of_the_explanations_are_what_they_say():
    """What stands indented below `Wrong:` is reported by its rule, and what stands below `Right` is not."""
    for rule in RULES:
        wrong, _, right = rule.explanation.partition("\nRight")
        if rule.code in ("HVD101", "HVD102", "HVD103", "HVD402", "HVD601", "HVD604"):
            continue  # fragments
        indented = [re.findall(r"^(    .*)$", part, re.MULTILINE) for part in (wrong, right)]
        examples = [textwrap.dedent("\n".join(example)) for example in indented]
        given = "d = dataset = tf.data.Dataset.range(9)\nmodel.compile(loss='mse')\n" if rule.code != "HVD201" else ""
        fit = "model.fit(dataset, epochs=1)\n" if rule.code == "HVD201" else ""
        assert lines(HEAD + given + examples[0] + "\n" + fit, rule.code), rule.code
        assert not lines(HEAD + given + examples[1] + "\n" + fit, rule.code), rule.code


def test_the_script_is_not_run_and_tensorflow_is_not_loaded(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import hvdkit as hvd\nraise SystemExit('was run')\n")
    program = (
        "import sys; from hvdkit.lint.__main__ import main; code = main(['lint', sys.argv[1]]);"
        "heavy = {'tensorflow', 'keras', 'horovod', 'numpy'} & {m.partition('.')[0] for m in sys.modules};"
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(script)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
