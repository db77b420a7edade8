"""The watchdog's parts: the rules, the stacks, the connections, and several watchdogs in one process."""

import dataclasses
import os
import pickle
import re
import secrets
import socket
import struct
import threading
import time

import keras
import pytest
import tensorflow as tf

from hvdkit import UsageError, watchdog, world
from hvdkit.watchdog import channel, stacks, stall_causes
from hvdkit.watchdog.channel import MOST_BYTES, Gone, call, listen
from hvdkit.watchdog.progress import Progress, Waiting
from hvdkit.watchdog.report import failure_sentence, stall_report
from hvdkit.watchdog.states import Failure, Job, RankState
from hvdkit.watchdog.thread import WatchdogThread
from hvdkit.world import limits


def state(rank, **fields):
    return RankState(rank, f"h{rank}", **fields)


def training(rank, step, **fields):
    return state(rank, phase="training", epoch=0, step=step, **fields)


GRADIENT = [[[4, 3], "float32", "head/kernel"], [[3], "float32", "head/bias"]]
NO_KERNEL = [[None, None, "head/kernel"], GRADIENT[1]]
WIDER = [[[4, 5], "float32", "head/kernel"], [[5], "float32", "head/bias"]]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([training(0, 3), training(1, 3, status="dead")], "rank 1 on host h1 died"),
        ([training(0, 3), state(1, status="frozen")], "rank 1 on host h1 does not answer"),
        (
            [training(0, 3), state(1, status="left", epoch=0, step=2)],
            "rank 1 on host h1 has ended its program (after step 3 of epoch 1), but rank 0 still needs it in step 4",
        ),
        (
            [state(0, collective="a", line="t.py:1 in f"), state(1, collective="b")],
            "in different order: rank 0 is in 'a', at t.py:1 in f, rank 1 in 'b'. Every rank must call the same ones",
        ),
        (
            [state(0, collective="loss", detail="float32[3]"), state(1, collective="loss", detail="float32[4]")],
            "in the collective 'loss': rank 0 has float32[3], and rank 1 has float32[4]",
        ),
        (
            [training(0, 3, traced={"g": [GRADIENT]}), training(1, 3, traced={"g": [WIDER]})],
            "in the collective 'g' head/kernel is float32[4, 3] on rank 0 and float32[4, 5] on rank 1",
        ),
        (
            [training(0, 3, traced={"g": [GRADIENT]}), training(1, 3, traced={"g": [GRADIENT[:1]]})],
            "the collective 'g' has 2 tensors on rank 0 and 1 on rank 1; head/bias is on rank 0 only",
        ),
        (
            [training(0, 3, traced={"g": [NO_KERNEL]}), training(1, 3, traced={"g": [GRADIENT]})],
            "in the collective 'g' head/kernel has a gradient on rank 1 and none on rank 0",
        ),
        (
            [training(0, 9), state(1, epoch=0, step=4), training(2, 9)],
            "rank 1 is done after step 5 of epoch 1 and has left the training loop, while rank 0 is in step 10",
        ),
        (
            [training(0, 3, collective="x"), training(1, 4), training(2, 4)],
            "only rank 0 entered the collective 'x', while ranks 1 and 2 is in step 5 of epoch 1 (training)",
        ),
        (
            [training(0, 3), training(1, 3, reading="r.py:7 in rows")],
            "slow input: rank 1 is reading its data, in r.py:7 in rows, while the others wait",
        ),
        (
            [state(0, line="prepare.py:3 in unpack"), state(1, collective="start")],
            "rank 0 has not come to the collective 'start', where rank 1 waits: it is still busy, at prepare.py:3",
        ),
        ([training(0, 3), training(1, 3)], "not clear: no rank is missing, and all are at the same place"),
    ],
)
def test_the_likely_cause(states, expected):
    assert expected in stall_causes.likely_cause(states)


def test_an_epoch_that_another_rank_has_not_begun_is_no_uneven_data():
    """Rank 0 is in a collective of its own after the epoch; the others have gone on to the next one."""
    states = [state(0, epoch=0, step=9, collective="save"), state(1, phase="training", epoch=1, step=0)]
    assert "only rank 0 entered the collective 'save'" in stall_causes.likely_cause(states)


def test_a_signature_that_one_rank_has_not_traced_yet_is_no_mismatch():
    assert stall_causes.mismatch([training(0, 0, traced={"g": [GRADIENT, WIDER]}), training(1, 0)]) is None
    assert (
        stall_causes.mismatch([training(0, 0, traced={"g": [GRADIENT]}), training(1, 0, traced={"g": [GRADIENT]})])
        is None
    )


def test_the_report_shows_ranks_in_one_place_together():
    alike = {"stack": ["> train.py:5 in main: model.fit(x)", "  ... 9 in keras; the innermost is f()"], "still": 600.0}
    text = stall_report([state(0, collective="x"), *(training(r, 2, **alike) for r in range(1, 12))], 600, True, 75)
    assert text.startswith(
        "hvdkit: the job has made no progress for 600 s; all ranks exit with code 75.\nLikely cause: "
    )
    assert "ranks 1, 2, 3, 4, 5, 6 and 5 more on h1, h2, " in text
    assert text.count("    > train.py:5 in main: model.fit(x)") == 1
    assert "the job keeps waiting" in stall_report([state(0)], 600, False, 75)


def test_the_report_says_where_each_rank_is():
    inside = training(0, 3, collective="loss", detail="float32[3]", last="gradients", still=42.0)
    lines = stall_report([inside, training(1, 4, last="loss"), state(2, status="dead")], 600, True, 75).split("\n")
    assert lines[2] == (
        "rank 0 on h0: training, step 4 of epoch 1, in the collective 'loss' with float32[3], last collective "
        "'gradients', here for 42 s"
    )
    assert lines[3].startswith("rank 1 on h1: training, step 5 of epoch 1, last collective 'loss'")
    assert lines[4].startswith("rank 2 on h2: dead; when last heard of: ")


def test_the_sentence_of_a_failure():
    failure = Failure(1, "h2", "error", "failed: ValueError: no", 1)
    assert failure_sentence(failure) == "hvdkit: rank 1 on host h2 failed: ValueError: no. All ranks exit with code 1."


def test_a_stack_shows_the_users_lines_and_counts_the_libraries():
    seen = {}

    def look(_):
        seen.update(stack=stacks.readable(stacks.main_frame()), line=stacks.own_line(stacks.main_frame()))

    keras.tree.map_structure(look, [1])
    assert seen["line"].startswith("tests/unit/watchdog/test_watchdog.py:")
    assert seen["line"].endswith("line=stacks.own_line(stacks.main_frame()))")
    assert seen["stack"][-2] == f"> {seen['line']}"  # the last is main_frame() itself
    assert any(line.startswith("  ... ") and "keras" in line for line in seen["stack"])


def test_the_line_that_feeds_a_data_set_is_found():
    reached, done = threading.Event(), threading.Event()

    def rows():
        reached.set()
        done.wait(30)
        yield 1

    data = tf.data.Dataset.from_generator(rows, output_signature=tf.TensorSpec([], tf.int32))
    reader = threading.Thread(target=lambda: list(data))
    assert stacks.reading() is None
    reader.start()
    assert reached.wait(30)
    found = stacks.reading()
    done.set()
    reader.join()
    assert found.startswith("tests/unit/watchdog/test_watchdog.py:")
    assert "done.wait(30)" in found


def test_marks_move_on():
    progress = Progress()
    assert not progress.busy
    with Waiting(progress, "a", [3]), Waiting(progress, "b"):
        assert [w.name for w in progress.waits] == ["a", "b"]
        assert progress.busy
    assert (progress.marks, progress.last.name, progress.waits) == (4, "a", [])
    assert progress.sign("g", [((3, None), "float32", "w")]) == 0
    assert progress.sign("g", [((3, None), "float32", "w")]) is None
    assert progress.sign("g", [(None, "float32", "w")]) == 1


def test_a_new_world_begins_where_no_rank_has_been():
    progress = Progress()
    progress.phase, progress.epoch, progress.step = "training", 3, 4
    with Waiting(progress, "a", everyone=True), Waiting(progress, "b"):
        progress.begin()
        assert not progress.busy
    assert (progress.phase, progress.epoch, progress.step, progress.waits) == ("between", None, None, [])
    assert not progress.calls


def test_dimensions_that_differ_legally_are_no_mismatch():
    unknown = [[[None, 3], "float32", "head/kernel"], [None, "float32", "head/bias"]]
    assert (
        stall_causes.mismatch([training(0, 0, traced={"g": [GRADIENT]}), training(1, 0, traced={"g": [unknown]})])
        is None
    )
    other = [[[None, 4], "float32", "head/kernel"], [None, "float32", "head/bias"]]
    assert "float32[any, 4]" in stall_causes.mismatch(
        [training(0, 0, traced={"g": [GRADIENT]}), training(1, 0, traced={"g": [other]})]
    )


def test_what_a_rank_brings_is_described_as_far_as_it_must_be_alike():
    from hvdkit.collectives import wire

    rows = [tf.zeros([2, 3])]
    assert wire._detail("allreduce", [*rows, tf.zeros([], tf.int32)]) == "float32[2, 3], int32[]"
    assert wire._detail("grouped_allgather", rows) == wire._detail("alltoall", rows) == "float32[any, 3]"


def test_in_a_world_of_one_rank_nothing_runs():
    threads = threading.active_count()
    watchdog.start(world.World.single())
    assert threading.active_count() == threads
    assert watchdog.reason(0) is watchdog.fail(ValueError()) is watchdog.explain(ValueError("Mismatched ")) is None
    watchdog.stop()


@pytest.mark.parametrize(("name", "value"), [("SECONDS", "soon"), ("SECONDS", "-1"), ("SECONDS", "inf")])
def test_a_limit_that_is_no_number(monkeypatch, name, value):
    monkeypatch.setenv(f"HVDKIT_STALL_{name}", value)
    with pytest.raises(UsageError, match=f"HVDKIT_STALL_SECONDS={value} is not a number of seconds"):
        world.stall_limit()


def test_horovods_own_stall_check_comes_later(monkeypatch):
    for name in ("HVDKIT_STALL_SECONDS", "HVDKIT_STALL_ACTION", "HOROVOD_STALL_CHECK_TIME_SECONDS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "90")  # as an old script sets it
    for _ in range(2):  # the second time after a shutdown
        limits.leave_stalls_to_hvdkit()
        names = "HVDKIT_STALL_SECONDS", "HOROVOD_STALL_CHECK_TIME_SECONDS", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
        assert [os.environ[name] for name in names] == ["90", "300", "330"]
    monkeypatch.setenv("HVDKIT_STALL_ACTION", "warn")
    limits.leave_stalls_to_hvdkit()
    assert os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "0"
    monkeypatch.setenv("HVDKIT_STALL_ACTION", "panic")
    with pytest.raises(UsageError, match="HVDKIT_STALL_ACTION=panic is unknown. Use abort, .* or warn"):
        world.stall_aborts()


class Ranks:
    """Watchdogs of several ranks in one process, on loopback, that do not end it."""

    def __init__(self, number, limit=600.0):
        doors = [listen("127.0.0.1") for _ in range(number)]
        addresses = [door.getsockname()[:2] for door in doors]
        hosts = [f"h{rank}" for rank in range(number)]
        self.job = Job(secrets.token_bytes(32), hosts, addresses, limit, aborts=True, elastic=False)
        self.progress = [Progress() for _ in doors]
        self.codes = [[] for _ in doors]
        self.men = [
            WatchdogThread(rank, self.job, door, self.progress[rank], self.codes[rank].append)
            for rank, door in enumerate(doors)
        ]
        for man in self.men:
            man.start()
        self.until(lambda: len(self.men[0]._links.callers) == number - 1)
        # Both ends of a connection have to know of it before a test cuts it.
        self.until(lambda: number == 1 or all(man._links.everyone() for man in self.men))

    def until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    def train(self):
        for man, progress in zip(self.men, self.progress, strict=True):
            progress.phase, progress.epoch, progress.step = "training", 0, 4
            man.tell_phase()
        self.until(lambda: all(p.state.step == 4 for p in list(self.men[0]._peers.values())[1:]))

    def cut(self, rank, *, seen_by=None):
        """As the kernel does when a process dies: its connections end without a goodbye, all or to one other rank."""
        man = self.men[rank]
        connected = [c.sock for c in man._links.everyone() if seen_by in (None, c.rank)]
        man._links.door.close()
        man._on_lost = man._on_beat = lambda *_: None
        for sock in connected:
            sock.shutdown(socket.SHUT_RDWR)

    def end(self):
        for man in self.men:
            man.end()


@pytest.fixture
def started():
    made = []

    def start(number, **arguments):
        made.append(Ranks(number, **arguments))
        return made[-1]

    yield start
    for ranks in made:
        ranks.end()


def test_ranks_agree_on_when_to_leave(started):
    ranks = started(3)
    meetings, done = [progress.meeting for progress in ranks.progress], (5, 7, 6)
    assert not any(meeting.is_now(number) for meeting, number in zip(meetings, done, strict=True))
    for rank in (2, 0):  # both were told: one meeting
        ranks.men[rank].tell_to_leave()
    ranks.until(lambda: all(meeting._is_agreed.is_set() for meeting in meetings))
    assert [meeting.is_now(7) for meeting in meetings] == [False] * 3
    assert [meeting.is_now(8) for meeting in meetings] == [True] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_know_the_first_failure(started, capfd, rank):
    ranks = started(3)
    ranks.men[rank].tell_failure(Failure(rank, f"h{rank}", "error", "failed: ValueError: a", 3))
    for man in ranks.men:
        assert man.known.wait(20)
    ranks.men[2].tell_failure(Failure(2, "h2", "error", "failed: KeyError: a consequence", 1))
    assert {str(man.failure) for man in ranks.men} == {f"rank {rank} on host h{rank} failed: ValueError: a"}
    others = [codes for r, codes in enumerate(ranks.codes) if r != rank]
    ranks.until(lambda: others == [[3], [3]])
    assert ranks.codes[rank] == [], "a rank that failed leaves by itself"
    assert capfd.readouterr().err.count("hvdkit: ") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_in_training_is_known_to_all_others(started, capfd, rank):
    ranks = started(3)
    ranks.train()
    ranks.until(lambda: all(m._peers[0].state.phase == "training" for m in ranks.men[1:]))
    ranks.cut(rank)
    for man in (m for m in ranks.men if m.rank != rank):
        assert man.known.wait(20)
        assert (man.failure.rank, man.failure.kind, man.failure.code) == (rank, "death", 75)
    assert capfd.readouterr().err.count(f"hvdkit: rank {rank} on host h{rank} died (training, step 5 of epoch 1)") == 1


def test_the_next_hub_may_hear_of_the_hubs_death_before_it_sees_it(started, capfd):
    ranks = started(3)
    ranks.train()
    ranks.until(lambda: all(m._peers[0].state.phase == "training" for m in ranks.men[1:]))
    ranks.cut(0, seen_by=2)
    for man in ranks.men[1:]:
        assert man.known.wait(20)
        assert (man.failure.rank, man.failure.kind) == (0, "death")
    assert capfd.readouterr().err.count("hvdkit: rank 0 on host h0 died (training, step 5 of epoch 1)") == 1


def test_an_end_without_goodbye_is_silent_until_somebody_asks(started, capfd):
    ranks = started(2)
    ranks.cut(1)
    ranks.until(lambda: ranks.men[0]._peers[1].state.status == "dead")
    assert not ranks.men[0].known.wait(2)
    assert capfd.readouterr().err == ""
    ranks.men[0].tell_thrown_out()
    assert ranks.men[0].known.wait(20)
    assert str(ranks.men[0].failure).startswith("rank 1 on host h1 died (between, no step yet)")


def test_a_failure_is_shown_whatever_its_text_holds(started, capfd):
    ranks = started(2)
    ranks.men[1].tell_failure(Failure(1, "h1", "error", "failed: OSError: no file caf\udce9", 3))
    ranks.until(lambda: ranks.codes[0] == [3])
    assert "no file caf\\udce9. All ranks exit" in capfd.readouterr().err


def test_a_rank_whose_watchdog_ends_by_mistake_is_not_taken_for_dead(started):
    ranks = started(2)
    ranks.train()
    ranks.men[1].post(lambda: 1 / 0)
    ranks.until(lambda: ranks.men[0]._peers[1].state.status == "left")
    assert not ranks.men[0].known.wait(1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_goodbyes_in_any_order_are_silent(started, capfd, order):
    ranks = started(3)
    ranks.train()
    for rank in order:
        ranks.men[rank].end()
    assert not any(man.failure or man.is_alive() for man in ranks.men)
    assert capfd.readouterr().err == ""


def test_a_rank_that_left_too_early_is_the_reason(started):
    ranks = started(3)
    ranks.men[0].end()  # the hub
    ranks.men[2].tell_thrown_out()
    assert ranks.men[2].known.wait(20)
    assert "rank 0 on host h0 ended its program after no step yet, while other ranks" in str(ranks.men[2].failure)


def test_a_rank_that_shuts_down_because_of_an_error_says_so_to_who_asks(started):
    ranks = started(2)
    ranks.men[1].end("KeyError: 'label'")
    ranks.men[0].tell_thrown_out()
    assert ranks.men[0].known.wait(20)
    assert str(ranks.men[0].failure) == "rank 1 on host h1 failed: KeyError: 'label'"


def test_a_rank_that_stands_still_has_the_hub_report(started, capfd):
    ranks = started(2, limit=1.5)
    with Waiting(ranks.progress[0], "loss"), Waiting(ranks.progress[1], "metrics", "float32[3]"):
        ranks.until(lambda: ranks.codes == [[75], [75]])
    said = capfd.readouterr().err
    assert said.count("hvdkit: the job has made no progress for 1.5 s; all ranks exit with code 75.") == 1
    assert "rank 1 on h1: between, no step yet, in the collective 'metrics' with float32[3], here for" in said


def test_ranks_that_wait_for_one_that_moves_on_do_not_stand_still(started, capfd):
    """Rank 0 alone validates, for longer than the limit."""
    ranks = started(3, limit=2)
    ranks.progress[0].phase = "evaluating"
    with Waiting(ranks.progress[1], "digest"), Waiting(ranks.progress[2], "digest"):
        for _ in range(6):
            time.sleep(1)
            ranks.progress[0].marks += 1
        assert ranks.men[1]._own.asked, "it has asked, and got no report"
        assert capfd.readouterr().err == ""
        assert ranks.codes == [[], [], []]
        ranks.until(lambda: ranks.codes == [[75], [75], [75]])
    assert capfd.readouterr().err.count("hvdkit: the job has made no progress for 2 s; all ranks exit") == 1


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_rank_that_may_be_busy_has_three_times_the_limit(started, capfd, waiting):
    ranks = started(2, limit=1.5)
    with Waiting(ranks.progress[waiting], "digest"):
        ranks.until(lambda: ranks.men[0]._hub.reported)
        assert ranks.codes == [[], []]
        ranks.until(lambda: ranks.codes == [[75], [75]])
    said = capfd.readouterr().err
    reports = re.findall(r"^hvdkit: (the job has made no progress for .*)$", said, re.MULTILINE)
    # Once more before the end if a rank moved meanwhile, as it may on a busy machine: then it has another 4.5 s.
    warning = "the job has made no progress for 1.5 s; a rank may be busy where hvdkit cannot see its progress"
    assert all(report.startswith(warning) for report in reports[:-1])
    assert len(reports) > 1
    assert reports[-1] == "the job has made no progress for 4.5 s; all ranks exit with code 75."


def enter_and_leave(progress, *names):
    for name in names:
        with Waiting(progress, name, everyone=True):
            continue


def test_ranks_that_stay_in_different_collectives_end_the_job(started, capfd):
    ranks = started(3)
    names = ("a", "a", "b")
    for progress, order in zip(ranks.progress, (("a", "b"), ("b", "a"), ("a", "b")), strict=True):
        enter_and_leave(progress, *order)
    waits = [Waiting(p, name, everyone=True) for p, name in zip(ranks.progress, names, strict=True)]
    with waits[0], waits[1], waits[2]:
        ranks.until(lambda: ranks.codes == [[1], [1], [1]])
    said = capfd.readouterr().err
    assert "would wait for each other forever: rank 0 is in 'a', at" in said
    assert ", rank 2 in 'b', at " in said
    assert said.count("hvdkit: ") == 1


def test_collectives_that_returned_in_another_order_are_left_alone(started):
    """After a join the ranks have made different numbers of calls, and those of two threads come in any order."""
    ranks = started(2)
    enter_and_leave(ranks.progress[0], "a", "b", "only rank 0, while rank 1 had joined", "c")
    enter_and_leave(ranks.progress[1], "b", "a", "c")
    assert not ranks.men[0].known.wait(3)


def test_a_rank_that_is_ahead_of_a_slower_one_is_left_alone(started):
    """The root has sent its broadcast, and waits in the next collective until the others have received it."""
    ranks = started(2)
    enter_and_leave(ranks.progress[0], "weights")
    with Waiting(ranks.progress[0], "digest", everyone=True), Waiting(ranks.progress[1], "weights", everyone=True):
        ranks.until(lambda: ranks.men[0]._hub.compare_after)
        assert not ranks.men[0].known.wait(5)


def test_collectives_of_other_threads_are_left_alone(started):
    """A thread of each rank waits for one that the other rank's thread has not come to yet."""
    ranks = started(2)
    done = threading.Event()

    def wait(progress, name):
        with Waiting(progress, name, everyone=True):
            done.wait(30)

    threads = [threading.Thread(target=wait, args=pair) for pair in zip(ranks.progress, ("a", "b"), strict=True)]
    for thread in threads:
        thread.start()
    assert not ranks.men[0].known.wait(6)
    done.set()
    for thread in threads:
        thread.join()
    assert [list(progress.calls) for progress in ranks.progress] == [["a"], ["b"]]


def test_a_slow_rank_that_moves_is_left_alone(started):
    ranks = started(2, limit=2.5)
    ranks.train()
    for _ in range(5):
        time.sleep(1)
        for progress in ranks.progress:
            progress.marks += 1
    assert ranks.codes == [[], []]


def test_strangers_are_turned_away(started, caplog):
    ranks = started(2)
    door = ranks.job.doors[0]
    with pytest.raises(Gone):
        call(door, secrets.token_bytes(32), mine=1, theirs=0)
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        pickle.dumps({"type": "ended", "rank": 1}) * 10,
        struct.pack("!I", MOST_BYTES + 1) * 40,
        secrets.token_bytes(68),
    ):
        with socket.create_connection(door, timeout=20) as stranger:
            stranger.sendall(garbage)
            greeting = b""
            try:
                while data := stranger.recv(100):
                    greeting += data
            except ConnectionResetError:
                continue
            assert len(greeting) <= 32, "a stranger gets the challenge, and nothing else"
    silent = [socket.create_connection(door, timeout=20) for _ in range(80)]
    ranks.men[1].tell_failure(Failure(1, "h1", "error", "failed: ValueError: a", 3))
    assert ranks.men[0].known.wait(20), "the ranks still hear each other"
    for stranger in silent:
        stranger.close()
    assert "watchdog has failed" not in caplog.text


def test_a_stranger_that_stays_silent_is_turned_away(started, monkeypatch):
    monkeypatch.setattr(channel, "PATIENCE", 0.5)
    ranks = started(1)
    with socket.create_connection(ranks.job.doors[0], timeout=20) as stranger:
        while stranger.recv(100):
            continue


def test_a_rank_that_joins_late_is_told_of_the_failure(started):
    ranks = started(3)
    ranks.men[1].tell_failure(Failure(1, "h1", "error", "failed: ValueError: a", 3))
    assert ranks.men[0].known.wait(20)
    late = call(ranks.job.doors[0], ranks.job.token, mine=2, theirs=0)
    late.send({"type": "join", "statuses": {}, **ranks.men[2]._own.beat_fields()})
    told = []
    ranks.until(lambda: told.extend(late.receive()) or any(message["type"] == "ended" for message in told))
    failure = next(message["failure"] for message in told if message["type"] == "ended")
    assert (failure["rank"], failure["code"]) == (1, 3)
    late.close()


def test_what_a_proved_rank_sends_is_bounded(started):
    ranks = started(2)
    connection = call(ranks.job.doors[0], ranks.job.token, mine=1, theirs=0)
    connection.sock.setblocking(True)
    connection.sock.settimeout(20)
    connection.sock.sendall(struct.pack("!I", MOST_BYTES + 1))
    while connection.sock.recv(4096):
        continue
    with pytest.raises(ValueError, match="over the limit"):
        connection.send({"type": "x" * MOST_BYTES})
    connection.close()


def test_states_of_another_version_are_read():
    from hvdkit.watchdog.states import from_message

    assert from_message({**dataclasses.asdict(state(1)), "new": 1}, rank=2) == dataclasses.replace(state(1), rank=2)
