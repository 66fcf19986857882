# SPDX-License-Identifier: GPL-3.0-only
"""The fallback if the kernel cannot tell which process a packet belongs to: it polls the connection tables."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Iterable, Iterator, Protocol

from elf.addresses import address_text, pack_address, why_unreachable
from elf.loop import Defects
from elf.processes import AppNames, ProcessLog, choose_processes, running_processes

SCAN_EVERY = 1.0  # s between two scans of the processes
LINGER = 30.0  # s that a destination stays a target after its last connection ended

log = logging.getLogger("elfprobe")


class Destinations(Protocol):
    """The part of Destinations in elfprobe.py that this module uses."""

    def add(self, packed: bytes) -> bool:
        """Make an address a target. Return False if there is no room."""

    def remove(self, packed: bytes) -> None:
        """Make an address no target any more."""


def connected_addresses(chosen: dict[int, str]) -> dict[bytes, str]:
    """Return the remote addresses of processes' sockets in this network namespace, each with its process."""
    import psutil  # elfprobe.py tells if it is missing

    found: dict[bytes, str] = {}
    for connection in psutil.net_connections("inet"):
        if connection.pid in chosen and connection.raddr:
            packed = pack_address(connection.raddr.ip)
            if not why_unreachable(packed):
                found[packed] = f"{chosen[connection.pid]}, pid {connection.pid}"
    return found


class ConnectionPoller:
    """The fallback if the kernel cannot tell which process a packet belongs to.

    It reads the target processes' connections again and again, and makes their remote addresses target
    destinations. It misses connections that are shorter than its interval. Packets that other processes send to
    the same addresses carry probes, too.
    """

    def __init__(
        self,
        defects: Defects,
        destinations: Destinations,
        fixed: Iterable[bytes],
        apps: AppNames,
        pids: Iterable[int],
        seen: ProcessLog,
    ) -> None:
        """fixed are the destinations that the user names. They are always targets."""
        self._defects = defects
        self._seen = seen
        self._destinations = destinations
        self._fixed = frozenset(fixed)
        self._apps = apps
        self._pids = tuple(pids)
        self._chosen: set[tuple[int, int]] | None = None  # PIDs and starts, at the last scan
        self._last_seen: dict[bytes, float] = {}

    def targets(self) -> list[int]:
        """Return the PIDs of the target processes at the last scan."""
        return [pid for pid, _ in self._chosen or ()]

    def scan(self) -> None:
        """Read the connections once."""
        now = time.monotonic()
        running = list(running_processes())
        known: Iterable[int] = self._pids
        if self._chosen is not None:  # leave out new processes with an old PID, keep children of ended parents
            known = [process.pid for process in running if (process.pid, process.started) in self._chosen]
        chosen = choose_processes(running, self._apps, known)
        for pid in {pid for pid, _ in self._chosen or ()} - chosen.keys():
            self._seen.ended(pid)
        for pid, name in chosen.items():
            self._seen.met(pid, name)
        self._chosen = {(process.pid, process.started) for process in running if process.pid in chosen}
        for packed, owner in connected_addresses(chosen).items():
            if packed in self._fixed:
                continue
            if packed not in self._last_seen:
                if not self._destinations.add(packed):
                    continue
                log.info("tracing destination %s (%s)", address_text(packed), owner)
            self._last_seen[packed] = now
        for packed in [packed for packed, seen in self._last_seen.items() if now - seen > LINGER]:
            del self._last_seen[packed]
            self._destinations.remove(packed)
            log.info("no longer tracing destination %s", address_text(packed))

    def try_scan(self) -> None:
        """Read the connections once, if they can be read."""
        with self._defects.noted("the processes' connections could not be read"):
            self.scan()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Scan now, then again and again in a thread of its own, so that no row waits for it."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(SCAN_EVERY):
                self.try_scan()

        self.scan()
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
