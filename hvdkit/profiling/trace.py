"""One trace of all ranks, in the JSON format of chrome://tracing and https://ui.perfetto.dev.

Its events are the parts of each step, from the marks; Horovod's timeline, which rank 0 writes; and each rank's
operations from `tf.profiler`. All times are on rank 0's clock. Format: "Trace Event Format", Google, 2016.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hvdkit.profiling.shares import Profile

_SHORTEST = 20.0  # µs; shorter operations are left out
_ANOTHER_CLOCK = 60.0  # seconds of difference from which the profiler is assumed to use another clock
_MOST = 20_000  # operations per rank; the longest are kept


def of_marks(profile: Profile, names: Sequence[str]) -> list[dict[str, Any]]:
    """The parts of each step; each rank is a process of the trace."""
    events: list[dict[str, Any]] = []
    for rank, name in enumerate(names):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "step"}})
        for step, (batch, ready, reduced, end) in enumerate(profile.times[rank]):
            last = min(profile.times[:, step, 1].max(), reduced)
            spans = [
                ("compute", batch, ready),
                ("waiting", ready, last),
                ("exchange", last, reduced),
                ("update", reduced, end),
            ]
            if step:
                spans.insert(0, ("input", profile.times[rank, step - 1, 3], batch))
            events += [
                _span(part, begin, until, rank, 0, {"step": step}) for part, begin, until in spans if until > begin
            ]
    return events


def of_timeline(file: Path, began: float) -> list[dict[str, Any]]:
    """The events of Horovod's timeline, which counts microseconds from its start.

    Args:
        file: the file that Horovod has written: a JSON list, perhaps without its end.
        began: seconds since 1970 at its start, if the file does not contain this.
    """
    text = file.read_text().strip().rstrip(",") if file.is_file() else ""
    if not text:
        return []
    try:
        found = json.loads(text if text.endswith("]") else text + "]")
    except ValueError:  # cut off in the middle of an event
        found = json.loads(text[: text.rindex("},") + 1] + "]")
    shifted = []
    for event in found:
        # Horovod counts from its initialization, and writes when that was.
        began = event.get("args", {}).get("start_time_since_epoch_in_micros", began * 1e6) / 1e6
        if "ts" in event:
            event = {**event, "ts": event["ts"] + began * 1e6}
        if event:
            shifted.append({**event, "pid": f"Horovod, as rank 0 sees it: {event.get('pid', '')}"})
    return shifted


def of_profiler(folder: Path, rank: int, began: float) -> list[dict[str, Any]]:
    """The operations that `tf.profiler` has recorded.

    Args:
        folder: the folder given to `tf.profiler.experimental.start`.
        rank: the rank that recorded them.
        began: seconds since 1970 when the profiler was started. If the profiler uses another clock, its first line
            is assumed to start at this time.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    events: list[dict[str, Any]] = []
    for file in folder.rglob("*.xplane.pb"):
        space = xplane_pb2.XSpace()
        space.ParseFromString(file.read_bytes())
        firsts = [line.timestamp_ns for plane in space.planes for line in plane.lines if line.timestamp_ns]
        first = min(firsts, default=0) / 1e9
        offset = first - began if abs(first - began) > _ANOTHER_CLOCK else 0.0
        for plane in space.planes:
            if plane.name.startswith(("/host:CPU", "/device:GPU")):
                events += _of_plane(plane, rank, offset)
    longest = sorted(events, key=lambda event: -event["dur"])[:_MOST]
    return sorted(longest, key=lambda event: event["ts"])


def _of_plane(plane: Any, rank: int, offset: float) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(plane.lines):
        for event in line.events:
            duration = event.duration_ps / 1e6
            if duration >= _SHORTEST:
                begin = (line.timestamp_ns + event.offset_ps / 1e3) / 1e9 - offset
                name = plane.event_metadata[event.metadata_id].name
                yield _span(name, begin, begin + duration / 1e6, rank, number + 1, {})


def _span(name: str, begin: float, end: float, process: Any, thread: int, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": begin * 1e6,
        "dur": (end - begin) * 1e6,
        "args": more,
    }


def write(path: Path, events: Sequence[dict[str, Any]]) -> None:
    """Writes a gzipped trace. Time 0 is its first event."""
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    moved = [{**event, "ts": round(event["ts"] - first, 3)} if "ts" in event else event for event in events]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": moved, "displayTimeUnit": "ms"}, file)
