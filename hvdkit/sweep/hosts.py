"""The slots in which tasks run: which hosts answer, and which cores and GPUs belong to each slot."""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError
from hvdkit.launch import agent, binding, hosts, job
from hvdkit.launch.link import GONE, Link, address_of, is_this_host, own_address_towards

_AGAIN_SECONDS = 20.0  # between two checks of a host that does not answer


@dataclasses.dataclass(frozen=True)
class Slot:
    """The cores and GPUs of one task on a host.

    Attributes:
        host: its host.
        number: its number on the host, from 0.
        cores: its own cores; None if all slots share all cores.
        gpus: its own GPUs, by CUDA's names; None without GPUs.
    """

    host: "SweepHost"
    number: int
    cores: tuple[int, ...] | None
    gpus: tuple[str, ...] | None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.host.name}/{self.number}"


class SweepHost:
    """A host and its slots.

    Args:
        given: its name and its number of ranks.
        settings: how to reach it.
        folder: a folder of the sweep, which the host must see.
        ranks: the number of ranks per task.

    Attributes:
        name: the name that the user gave; for localhost, the host's own name.
        is_here: whether it is this host.
        is_asked: whether a check of it is running.
        is_up: whether it answered the last check and can run tasks.
        slots: its slots; empty before its first answer.
        why: why the last check failed.
    """

    def __init__(self, given: hosts.Host, settings: job.Settings, folder: Path, ranks: int) -> None:
        self.given = given
        self.name = given.name
        self.is_here = False
        self.is_up = False
        self.slots: list[Slot] = []
        self.why = ""
        self._settings = settings
        self._folder = folder
        self._ranks = ranks
        self.is_asked = False
        self._answers: queue.SimpleQueue[dict[str, Any] | UsageError] = queue.SimpleQueue()
        self._asked_at = 0.0

    def ask(self) -> None:
        """Checks in another thread whether the host answers. It gets no tasks until it has answered."""
        if not self.is_asked:
            self.is_asked, self.is_up = True, False
            self._asked_at = time.monotonic()
            threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        try:
            self._answers.put(ask(self.given.name, self._settings, self._folder))
        except UsageError as error:
            self._answers.put(error)

    def hear(self) -> bool:
        """Handles the answer, if there is one, and returns whether there was. Checks a host that is down again."""
        if not self.is_asked and not self.is_up and time.monotonic() - self._asked_at > _AGAIN_SECONDS:
            self.ask()
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            return False
        self.is_asked = False
        try:
            if isinstance(answer, UsageError):
                raise answer
            self._take(answer)
        except UsageError as error:
            self.why = str(error)
        return True

    def _take(self, about: dict[str, Any]) -> None:
        self.is_here = about["is_here"]
        if self.name == "localhost":
            self.name = str(about["hostname"])
        if not self.slots:
            self.slots = divide(self, about, self.given.slots, self._ranks)
        self.is_up, self.why = True, ""


def divide(host: SweepHost, about: dict[str, Any], places: int, ranks: int) -> list[Slot]:
    """Divides a host into slots of `ranks` ranks each, with neighbouring cores and GPUs, evenly.

    With fewer cores than slots, all slots share all cores.

    Raises:
        UsageError: the host has GPUs, but fewer than ranks.
    """
    gpus = len(about["gpus"])
    if 0 < gpus < places:
        raise UsageError(
            f"Host {about['hostname']} shows {gpus} GPU(s) for {places} ranks, and each rank needs its own. Give it "
            f"{gpus} rank(s), or hide the GPUs with CUDA_VISIBLE_DEVICES='' to train on the CPU."
        )
    number = places // ranks
    shares = binding.bindings({**about, "gpus": []}, number, "cores")
    return [
        Slot(
            host,
            i,
            None if share.cores is None else tuple(share.cores),
            tuple(about["gpus"][i * ranks : (i + 1) * ranks]) or None,
        )
        for i, share in enumerate(shares)
    ]


def ask(name: str, settings: job.Settings, folder: Path) -> dict[str, Any]:
    """A host's description of itself, and whether it `is_here`.

    Raises:
        UsageError: the host does not answer, or does not see the sweep's folder or the directory where tasks run.
    """
    address = address_of(name, settings.shell)
    is_here = is_this_host(name, address)
    needed = {"sweep's folder": str(folder), "directory": settings.directory}
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    link = Link(name, None if is_here else settings.shell, settings.python, events)
    try:
        answers = {what: _answer(link, events, settings, address, path) for what, path in needed.items()}
    finally:
        link.send(end=0)
        link.hang_up()
        link.close(time.monotonic() + 2)
    for what, answer in answers.items():
        if not answer["has_directory"]:
            raise UsageError(
                f"Host {name} does not see the {what} {needed[what]}. All hosts of a sweep must share its folder (over "
                f"NFS, for example), and have the directory where you start it at the same path."
            )
    return {**answer, "is_here": is_here}


def _answer(
    link: Link, events: "queue.SimpleQueue[Any]", settings: job.Settings, address: str, directory: str
) -> dict[str, Any]:
    peer = own_address_towards(address) if link.is_remote else "127.0.0.1"
    link.send(ask={"peer": peer, "interface": None, "directory": directory, "silence": 30})
    until = time.monotonic() + settings.start_limit
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            event = events.get(timeout=left)
            if event.kind == GONE:
                raise UsageError(link.complaint())
            if event.kind == agent.HELLO:
                return dict(event.content())
    raise UsageError(f"No answer from {link.host} within {settings.start_limit} s.")


def words(found: Sequence[SweepHost]) -> str:
    """The hosts and their slots, in words."""
    parts = []
    for host in found:
        own = "" if not host.slots or host.slots[0].cores is None else f" of {len(host.slots[0].cores)} core(s)"
        own = f" of {len(host.slots[0].gpus)} GPU(s)" if host.slots and host.slots[0].gpus else own
        parts.append(f"{host.name}: {len(host.slots)} slot(s){own}" if host.slots else f"{host.name}: no answer")
    return ", ".join(parts)
