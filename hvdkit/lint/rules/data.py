"""HVD3: the data, of which each rank must read its own shard."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import depends_on_rank, depends_on_size, is_rank, on_root_only
from hvdkit.lint.script import Derivation, Script, is_constant
from hvdkit.lint.training import fits, last_part

_SHARDERS = {"shard", "even_splits", "even_share", "InputContext", "shard_datasets", "distribute", "AutoShardPolicy"}
# These return the same data on all ranks.
_ARRAYS = (
    "np.load",
    "np.loadtxt",
    "np.genfromtxt",
    "np.arange",
    "np.zeros",
    "np.ones",
    "pd.read_",
    "sklearn.datasets.",
)
_DATASETS = (
    "tfds.load",
    "tf.data.TFRecordDataset",
    "tf.data.TextLineDataset",
    "tf.data.FixedLengthRecordDataset",
    "tf.data.Dataset.range",
    "tf.data.Dataset.list_files",
    "tf.data.experimental.make_csv_dataset",
    "tf.range",
)
_SAME = (*_ARRAYS, *_DATASETS)
_DIRECTORIES = ("image_dataset_from_directory", "text_dataset_from_directory", "audio_dataset_from_directory")
_SEEDS = ("keras.utils.set_random_seed", "tf.random.set_seed", "np.random.seed", "random.seed")
_SKLEARN = ("sklearn.model_selection.train_test_split", "sklearn.utils.shuffle", "sklearn.utils.resample")


def not_sharded(script: Script) -> Iterator[Problem]:
    """Every rank trains on all of the data.

    N ranks that all read the whole data set do the work N times: an epoch takes as long as on one process. Ranks that
    read in the same order even compute the same gradients, and averaging them changes nothing. Wrong:

        model.fit(dataset, epochs=5)

    Right:

        model.fit(hvd.data.shard(dataset).batch(32), epochs=5)

    The same call shards arrays, a `PyDataset`, a generator and the loaders of PyTorch and Grain. Not reported if the
    data depend on the rank in any way (`dataset.shard`, `files[hvd.rank()::hvd.size()]`, tfds.even_splits), if a
    function of another file is involved, or if each rank draws at random and hvd.size() divides the steps or epochs.
    """
    if "hvd" not in script.libraries:
        return
    for fit in fits(script):
        data = script.argument(fit, "x", 0) or script.argument(fit, "generator")
        if data is None or on_root_only(script, fit):
            continue
        made_from = script.derivation(data)
        if made_from.unknown or _is_sharded(script, made_from) or not _is_the_same(script, made_from):
            continue
        if _takes_fewer(script, fit) and _draws_at_random(script, fit, made_from):
            continue
        what = ast.unparse(data) if isinstance(data, ast.Name | ast.Attribute) else "the data"
        labels = script.argument(fit, "y", 1)
        fix = f"hvd.data.shard({what if what != 'the data' else '...'}), before any batch()."
        if labels:
            fix = _of_arrays([data, labels, script.argument(fit, "sample_weight")])
        yield Problem(data, f"fit() reads all of {what} on every rank, not a shard of it.", fix)


def _of_arrays(given: list[ast.expr | None]) -> str:
    """How to shard x, y and sample weights. They stay arrays, so `fit` shuffles them and splits them for validation."""
    arrays = [array for array in given if array is not None]
    shown = [ast.unparse(array) for array in arrays]
    if all(isinstance(array, ast.Name) for array in arrays):
        return f"{', '.join(shown)} = hvd.data.shard(({', '.join(shown)})), before fit()."
    return f"fit({', '.join(f'hvd.data.shard({array})' for array in shown)}, ...)."


def shuffled_differently(script: Script) -> Iterator[Problem]:
    """Each rank shuffles the data in a different order before they are sharded.

    Each rank then takes its shard of a different order: some examples go to several ranks, others to none. Wrong:

        hvd.data.shard(dataset.shuffle(10_000))

    Right, either of:

        hvd.data.shard(dataset.shuffle(10_000, seed=0))
        hvd.data.shard(dataset).shuffle(10_000)

    The same applies to the shuffling of numpy, scikit-learn and tfds before a slice such as
    `x[hvd.rank() :: hvd.size()]`. Not reported if the script sets one global seed, the same on all ranks.
    """
    if "hvd" not in script.libraries or _is_seeded(script):
        return
    reported = set()
    for sharded in _sharded(script):
        made_from = script.derivation(sharded)
        for node in made_from.nodes:
            if isinstance(node, ast.Call) and node not in reported and _shuffles_differently(script, node):
                reported.add(node)
                yield Problem(
                    node,
                    f"{_function(node)}() runs before the data are sharded, without the same seed on all ranks, so "
                    f"shards overlap and some examples are never read.",
                    _seed(script, node),
                )


def _sharded(script: Script) -> Iterator[ast.expr]:
    """The expressions that are sharded over the ranks."""
    for call in script.calls:
        if script.called(call) == "hvd.data.shard":
            data = script.argument(call, "dataset", 0)
            if data is not None:
                yield data
        elif isinstance(call.func, ast.Attribute) and call.func.attr == "shard" and len(call.args) == 2:
            yield call.func.value
    for node in script.nodes:
        if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Slice | ast.Tuple):
            continue
        if depends_on_rank(script, node.slice):
            yield node.value


def _shuffles_differently(script: Script, call: ast.Call) -> bool:
    name, method = script.called(call), call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name in _SKLEARN:
        shuffles = not is_constant(script.argument(call, "shuffle"), False)
        return shuffles and _differs_by_rank(script, script.argument(call, "random_state"))
    if last_part(name) in _DIRECTORIES or name == "tf.data.Dataset.list_files":  # they shuffle by default
        shuffles = not is_constant(script.argument(call, "shuffle"), False)
        return shuffles and _differs_by_rank(script, script.argument(call, "seed"))
    if name == "tfds.load":
        shuffles = is_constant(script.argument(call, "shuffle_files"), True)
        return shuffles and script.argument(call, "read_config") is None
    if name == "np.random.permutation":
        return True
    if method == "permutation":  # of a generator: numpy.random.default_rng()
        return any(script.called(c) == "np.random.default_rng" and not c.args for c in script.derivation(call).calls())
    if method == "shuffle" and not name:
        return _differs_by_rank(script, script.argument(call, "seed", 1))
    return False


def _differs_by_rank(script: Script, seed: ast.expr | None) -> bool:
    return seed is None or is_constant(seed, None) or depends_on_rank(script, seed)


def _seed(script: Script, call: ast.Call) -> str:
    name = script.called(call)
    if name in _SKLEARN:
        return "give it random_state=0."
    if name == "tfds.load":
        return "give it read_config=tfds.ReadConfig(shuffle_seed=0), or shuffle after sharding."
    if name == "np.random.permutation" or _function(call).endswith("permutation"):
        return "np.random.default_rng(0).permutation(...), with the same seed on all ranks."
    return "give it seed=0, the same on all ranks, or shuffle after sharding."


def _function(call: ast.Call) -> str:
    return last_part(ast.unparse(call.func))


def _is_sharded(script: Script, made_from: Derivation) -> bool:
    names = (n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in made_from.nodes)
    return any(name in _SHARDERS for name in names) or any(is_rank(script, n) for n in made_from.nodes)


def _is_the_same(script: Script, made_from: Derivation) -> bool:
    """Whether a known source among the inputs of the data returns the same on all ranks."""
    for call in made_from.calls():
        name = script.called(call)
        if name.startswith(_SAME) or last_part(name) in (*_DIRECTORIES, "timeseries_dataset_from_array"):
            return True
        if name.startswith("keras.datasets.") or (name == "np.random.default_rng" and call.args):
            return True
        if name.startswith(("np.random.", "tf.random.")) and _is_seeded(script) and name not in _SEEDS:
            return True
    return False


def _is_seeded(script: Script) -> bool:
    seeds = [call for call in script.calls_of(*_SEEDS) if call.args]
    return any(not depends_on_rank(script, call.args[0]) for call in seeds)


def _takes_fewer(script: Script, fit: ast.Call) -> bool:
    counts = [script.argument(fit, name) for name in ("steps_per_epoch", "epochs")]
    return any(depends_on_size(script, count) for count in counts if count)


def _draws_at_random(script: Script, fit: ast.Call, made_from: Derivation) -> bool:
    """Whether each rank reads the data in its own random order. `fit` itself shuffles arrays."""
    if _is_seeded(script):
        return False
    datasets = any(script.called(call).startswith(("tf.data.", "tfds.")) for call in made_from.calls())
    shuffled = any(_shuffles_differently(script, call) for call in made_from.calls())
    return shuffled or not (datasets or is_constant(script.argument(fit, "shuffle"), False))
