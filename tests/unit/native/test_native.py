import pytest

from hvdkit import UsageError, native


def test_the_built_library_is_the_one_of_these_sources():
    assert native.is_built(), "launch/bootstrap.sh builds it"
    assert native.build() == native.library()
    operations = {"hvdkit_adam", "hvdkit_sparse_adam", "hvdkit_shared_gather", "hvdkit_shared_sum"}
    assert operations <= set(dir(native.load()))


def test_without_a_compiler_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: tmp_path / "operations.so")
    monkeypatch.setenv("CXX", "nosuch++")
    with pytest.raises(UsageError, match=r"cannot be compiled with nosuch\+\+: .*Install g\+\+"):
        native.build()
    assert not list(tmp_path.iterdir()), "nothing half-made is left"


def test_what_was_spent_in_exchanges_is_counted_from_zero():
    in_all, waiting, number, brought = native.exchange_times()
    assert 0 <= waiting <= in_all
    assert (number == 0) == (brought == 0)
