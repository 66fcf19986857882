# SPDX-License-Identifier: GPL-3.0-only
"""Targets without probes: why they have none. The words are in reasons.py."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import time
from typing import Any, Callable, Iterable, Iterator, Protocol, Sequence

from elf.addresses import address_text, pack_address
from elf.counters import UNFIT_PACKETS
from elf.devices import Device, names_of
from elf.network import WATCHED_MAX, Routes, RouteWatch, device_name, loopback, translations
from elf.options import Config, command_in_namespace
from elf.processes import (
    AppNames,
    close_programs,
    look_at_process,
    process_names,
    programs_on_path,
    running_processes,
)
from elf.reasons import (
    ByOtherDevice,
    Idle,
    NobodySends,
    NoSuchProcess,
    NotConnected,
    NothingArrives,
    OnThisHost,
    OtherDevice,
    OtherNamespace,
    OwnAddress,
    Reason,
    Translated,
)

FIRST_LOOK = 1.0  # s after the start; the next ones come after three times as long as the one before
TARGETS_LOOKED_AT, SOCKETS_LOOKED_AT = 50, 100  # processes; sockets of each

log = logging.getLogger("elfprobe")


class Destinations(Protocol):
    """The part of Destinations in elfprobe.py that this module uses."""

    def without_probes(self, wanted: Iterable[bytes]) -> dict[bytes, Any]:
        """Return the destinations to which no probe has left, with their struct path."""

    def without_answers(self) -> list[str]:
        """Return the destinations to which probes left, but neither they nor routers in front of them respond."""

    def begin_anew(self, addresses: Iterable[str]) -> None:
        """Forget which hops on the path to destinations were unresponsive: only now can their answers be read."""


def peers_of(sockets: Iterable[socket.socket], routes: Routes) -> dict[str, frozenset[int]]:
    """Return the addresses to which sockets are connected, with the devices that lead there.

    Raises OSError if the iterable does.
    """
    found = {}
    for sock in itertools.islice(sockets, SOCKETS_LOOKED_AT):
        with contextlib.suppress(OSError):  # not connected
            peer = sock.getpeername()[0]
            bound_to = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode()
            if bound_to:
                found[peer] = frozenset((socket.if_nametoindex(bound_to),))
            else:
                packed = pack_address(peer)
                found[address_text(packed)] = routes.devices_to(packed)
    return found


class Reasons:
    """Finds out why targets have no probes, and tells each reason as soon as it is known."""

    def __init__(
        self, config: Config, devices: Sequence[Device], routes: Routes, apps: AppNames, destinations: Destinations,
        fixed: Iterable[bytes], targets: Callable[[], Iterable[int]],
        sockets_of: Callable[[int], Iterable[socket.socket]],
        read_elsewhere: Callable[[], tuple[list[str], bool]],
    ) -> None:  # fmt: skip
        """targets returns the PIDs of the target processes.

        sockets_of yields a process's sockets, and closes each before the next one. Iterating raises OSError if the
        process has ended, or if its sockets cannot be had.
        read_elsewhere reads answers on other devices. It returns their names, and whether it works.
        """
        self._sockets_of = sockets_of
        self._read_elsewhere = read_elsewhere
        self._has_looked_elsewhere = False
        self._silent_before: frozenset[str] = frozenset()
        self._config = config
        self._devices = frozenset(device.ifindex for device in devices)
        self._device_names = names_of(devices, " or ")
        self._routes = routes
        self._watch = RouteWatch(routes, self._devices, fixed)
        self._apps = apps
        self._destinations = destinations
        self._fixed = list(fixed)[:WATCHED_MAX]
        self._targets = targets
        self._told: dict[tuple[type[Reason], object], Reason] = {}  # by the name of a process, or by address
        self._namespace = os.stat("/proc/self/ns/net").st_ino
        self._begun_at = time.monotonic()
        self._next_look = self._begun_at + FIRST_LOOK

    def begin(self) -> None:
        """Log the reasons that are known at the start."""
        self._tell_routes()
        for reason in self._missing_processes():
            log.info("%s", reason.text())

    def look(self) -> None:
        """Log changed routes, and, when the next look is due, reasons that are new."""
        if self._watch.have_changed():
            self._tell_routes()
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + 2 * (now - self._begun_at)
            for reason in itertools.chain(self._processes(is_end=False), self._translated()):
                log.warning("%s", reason.text())
            self._look_elsewhere()

    def _look_elsewhere(self) -> None:
        """Read answers on the other devices, too, if none comes by ours: it may be one of several uplinks."""
        if self._has_looked_elsewhere:
            return
        # If a destination had answers or no probes at the last look, its first answers may still be on their way.
        found, before = self._destinations.without_answers(), self._silent_before
        self._silent_before = frozenset(found)
        silent = [each for each in found if each in before]
        if not silent:
            return
        self._has_looked_elsewhere = True
        names, can_read = self._read_elsewhere()
        if names:
            if can_read:
                self._destinations.begin_anew(silent)
            log.warning("%s", NothingArrives(silent[0], len(silent), self._device_names, names, can_read).text())

    def at_end(self, count: dict[str, int]) -> list[Reason]:
        """Return all reasons of the run. count: the counters of elfprobe.c."""
        for _ in itertools.chain(self._processes(is_end=not count["probes"]), self._translated()):
            pass
        silent = self._destinations.without_probes(self._fixed)
        told = [
            reason
            for reason in self._told.values()
            if not isinstance(reason, Translated) or pack_address(reason.about) in silent
        ]
        has_unfit = any(count[name] for name in UNFIT_PACKETS)
        return [*self._missing_processes(), *told, *self._addresses(silent, has_unfit)]

    def _tell_routes(self) -> None:
        for text in self._watch.news():
            log.warning("%s", text)

    def _missing_processes(self) -> Iterator[Reason]:
        """Yield the names that no process has had."""
        if self._apps.unseen:
            candidates = itertools.chain(programs_on_path(), *map(process_names, running_processes()))
            known = frozenset(candidates)
            for name in sorted(self._apps.unseen):
                yield NoSuchProcess(name, close_programs(name, known))

    def _new(self, name: object, reason: Reason) -> Iterator[Reason]:
        if (type(reason), name) not in self._told:
            self._told[type(reason), name] = reason
            yield reason

    def _processes(self, is_end: bool) -> Iterator[Reason]:
        """Yield new reasons that processes give. At the end a process that does nothing gives one, too."""
        for pid in itertools.islice(self._targets(), TARGETS_LOOKED_AT):
            with contextlib.suppress(OSError):  # it has ended
                name = look_at_process(pid).name
                for reason in self._of_process(f"{name} (pid {pid})", pid):
                    if isinstance(reason, OtherNamespace):
                        yield from self._new((name, reason.namespace), reason)
                    elif is_end or isinstance(reason, OtherDevice):
                        yield from self._new(name, reason)

    def _of_process(self, about: str, pid: int) -> Iterator[Reason]:
        namespace = os.stat(f"/proc/{pid}/ns/net").st_ino
        if namespace != self._namespace:
            yield OtherNamespace(about, command_in_namespace(pid, self._config), namespace)
            return
        ours, peers = self._devices, peers_of(self._sockets_of(pid), self._routes)
        by_ours = [peer for peer, devices in peers.items() if ours & devices]
        elsewhere = [peer for peer, devices in peers.items() if devices and not devices & {*ours, loopback()}]
        if elsewhere:
            device = device_name(min(peers[elsewhere[0]]))
            yield OtherDevice(about, elsewhere[0], device, self._device_names)
        elif by_ours:
            yield Idle(about, by_ours[0])
        elif peers:
            yield OnThisHost(about, next(iter(peers)))
        else:
            yield NotConnected(about)

    def _translated(self) -> Iterator[Reason]:
        """Yield new reasons that address translation gives."""
        silent = self._destinations.without_probes(self._fixed)
        if silent:
            for packed, addresses in translations(silent).items():
                stays = all(loopback() in self._routes.devices_to(each) for each in addresses)
                to = " or ".join(sorted(map(address_text, addresses)))
                about = address_text(packed)
                yield from self._new(about, Translated(about, to, stays))

    def _addresses(self, silent: dict[bytes, Any], has_unfit: bool) -> Iterator[Reason]:
        """Yield why addresses have no probes. silent are these, with their struct path."""
        ours = self._device_names
        for packed, path in silent.items():
            about, devices = address_text(packed), self._routes.devices_to(packed)
            if (Translated, about) in self._told or path.distance.length == 1 or path.excluded:
                continue
            if loopback() in devices:
                yield OwnAddress(about)
            elif devices and not self._devices & devices:
                yield ByOtherDevice(about, device_name(min(devices)), ours)
            else:
                yield NobodySends(about, ours, bool(path.liveness.last_received), has_unfit)
