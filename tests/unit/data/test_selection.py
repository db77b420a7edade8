import numpy as np
import pytest

from hvdkit.data.sources import FoldSource, long_tailed, open_source, with_validation
from hvdkit.data.sources.arrays import ArraySource
from hvdkit.data.sources.selection import assign
from hvdkit.data.sources.tokens import TokenSource
from hvdkit.errors import UsageError


def numbered(size, labels=None):
    """A source whose examples are their own places."""
    places = np.arange(size).reshape(size, 1, 1, 1)
    labels = np.zeros(size, int) if labels is None else labels
    return ArraySource("numbers", "image", ["a", "b"], {"train": (places, labels), "test": (places[:1], labels[:1])})


def places(source, split, start=0, stop=None):
    stop = source.size(split) if stop is None else stop
    return [int(x.numpy().item()) for x, _ in source.read(split, start, stop)]


@pytest.mark.parametrize(("size", "folds"), [(10, 2), (11, 3), (100, 7), (5, 5)])
def test_folds_are_disjoint_complete_even_and_always_the_same(size, folds):
    each = [FoldSource(numbered(size), fold, folds) for fold in range(folds)]
    tests = [places(source, "test") for source in each]
    assert sorted(sum(tests, [])) == list(range(size))
    assert max(map(len, tests)) - min(map(len, tests)) <= 1
    for source, test in zip(each, tests, strict=True):
        assert sorted(places(source, "train") + test) == list(range(size))
        assert (source.size("train"), source.size("test")) == (size - len(test), len(test))
    assert places(FoldSource(numbered(size), 0, folds), "test") == tests[0]


def test_any_part_of_a_fold_can_be_read():
    source = FoldSource(numbered(50), 1, 4)
    for split in ("train", "test"):
        whole = places(source, split)
        assert places(source, split, 3, 9) == whole[3:9]
        assert places(source, split, 4, 4) == []


def test_an_order_that_repeats_itself_gives_no_fold_of_one_class():
    labels = np.arange(1000) % 2
    for fold in range(2):
        held_out = labels[assign(1000, 2) == fold]
        assert 0.4 < held_out.mean() < 0.6


def test_classes_that_lie_together_are_spread_over_folds():
    labels = np.repeat([0, 1], 500)
    assert all(labels[assign(1000, 5) == fold].sum() == 100 for fold in range(5))


def test_a_fold_keeps_what_the_source_says_of_itself():
    digits = open_source("digits")
    fold = FoldSource(digits, 0, 5)
    assert (fold.name, fold.kind, fold.shape, len(fold.label_names)) == ("digits", "image", (8, 8, 1), 10)
    assert fold.size("train") + fold.size("test") == digits.size("train"), "the test split is not touched"


def test_more_folds_than_examples_are_refused():
    with pytest.raises(UsageError, match="3 training examples, fewer than 5 folds"):
        FoldSource(numbered(3), 0, 5)


@pytest.mark.parametrize(("size", "share", "number"), [(100, None, 10), (101, 0.2, 20), (7, 0.3, 2), (1000, 0.015, 15)])
def test_a_validation_split_is_held_out_of_the_training_examples(size, share, number):
    source = with_validation(numbered(size), share)
    assert source.splits == ("train", "validation", "test")
    held_out = places(source, "validation")
    assert (len(held_out), source.size("validation")) == (number, number)
    assert sorted(places(source, "train") + held_out) == list(range(size))
    assert places(with_validation(numbered(size), share), "validation") == held_out, "the same in every run"
    assert all(size * i // number <= place < size * (i + 1) // number for i, place in enumerate(held_out)), "spread"
    assert places(source, "validation", 1, 2) == held_out[1:2]
    assert (source.locate("validation", 0), source.locate("test", 0)) == (f"example {held_out[0]}", "example 0")
    assert places(source, "test") == [0], "is not touched"


def test_the_source_s_own_validation_split_is_used_unless_a_share_is_given(caplog):
    one = (np.zeros([4, 1, 1, 1], int), np.zeros(4, int))
    source = ArraySource("own", "image", ["a"], {"train": one, "test": one, "validation": one})
    assert with_validation(source, None) is source
    assert with_validation(source, 0.25).size("train") == 3


def test_a_text_is_validated_on_its_end():
    source = TokenSource("text", {"train": b"0123456789" * 10, "test": b"abcdef"}, 4)
    held = with_validation(source, 0.2).cut(3)
    assert {split: held.length(split) for split in held.splits} == {"train": 80, "test": 6, "validation": 20}
    with pytest.raises(UsageError, match="The validation part of text has 5 bytes, and a window of 6 needs 7"):
        with_validation(TokenSource("text", {"train": b"0123456789" * 10, "test": b"abcdefgh"}, 6), 0.05).cut(6)


def test_too_few_examples_to_validate_on_are_refused():
    with pytest.raises(UsageError, match="has 3 training examples, too few to hold out a share of 0.1"):
        with_validation(numbered(3), None)


def test_a_long_tail_falls_exponentially_from_class_to_class():
    digits = open_source("digits")
    labels = np.array([label for _, label in digits.read("train", 0, digits.size("train")).as_numpy_iterator()])
    tailed = long_tailed(digits, labels, 100.0)
    kept = [(image.tobytes(), int(label)) for image, label in tailed.read("train", 0, 999).as_numpy_iterator()]
    counts = np.bincount([label for _, label in kept])
    smallest = np.bincount(labels).min()
    np.testing.assert_array_equal(counts, np.round(smallest * 100 ** (-np.arange(10) / 9)))
    assert counts.sum() == tailed.size("train") == len(set(kept)), "each example once"
    assert tailed.size("test") == digits.size("test")
    assert long_tailed(digits, labels, 1.0).size("train") == 10 * smallest, "balanced"


def test_a_tail_without_examples_is_refused():
    digits = open_source("digits")
    labels = np.repeat(np.arange(10), 7)
    with pytest.raises(
        UsageError, match="would leave no training example of the last class: .* Use at most --long-t.*=7"
    ):
        long_tailed(digits, labels, 100.0)
