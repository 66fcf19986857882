# SPDX-License-Identifier: GPL-3.0-only
"""Reasons why a target has no probes, as data. Each kind of reason has its wording in its class."""

from __future__ import annotations

import dataclasses
from typing import Iterator

from elf.network import in_short

REASONS_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why there are no probes for what it is about: a name of -a, a process or an address."""

    about: str

    def text(self) -> str:
        """Return the sentence for the user."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NoSuchProcess(Reason):
    """No process has had this name of -a."""

    close: str  # names that are close to it, as the end of a sentence

    def text(self) -> str:
        return f"no process of the name {self.about} has run so far{self.close}"


@dataclasses.dataclass(frozen=True)
class OtherNamespace(Reason):
    """The process is in another network namespace. Its packets have no owner by the time they are here."""

    command: str  # to measure there
    namespace: int  # its inode

    def text(self) -> str:
        return f"{self.about} is in another network namespace; measure there: {self.command}"


@dataclasses.dataclass(frozen=True)
class OtherDevice(Reason):
    """The process sends by another device."""

    peer: str
    device: str
    ours: str

    def text(self) -> str:
        return f"{self.about} sends to {self.peer} by {self.device}, not by {self.ours}: use -i {self.device}"


@dataclasses.dataclass(frozen=True)
class OnThisHost(Reason):
    """All peers of the process are on this host."""

    peer: str  # one of them

    def text(self) -> str:
        return f"{self.about} talks to this host itself only ({self.peer}): no router is between"


class NotConnected(Reason):
    """The process has no connection, as far as its sockets tell."""

    def text(self) -> str:
        return (
            f"{self.about} has no connection to another host: it waits, or its sockets are not connected and may "
            "send by another interface"
        )


@dataclasses.dataclass(frozen=True)
class Idle(Reason):
    """The process is connected by our device, and no packet that may carry a probe left."""

    peer: str

    def text(self) -> str:
        return f"{self.about} is connected to {self.peer}, but sends nothing that can carry a probe"


@dataclasses.dataclass(frozen=True)
class Translated(Reason):
    """This host itself replaces the address before packets reach the device."""

    to: str  # addresses
    stays: bool  # packets do not leave this host

    def text(self) -> str:
        instead = "which is on this host: nothing leaves" if self.stays else f"name {self.to} instead"
        return f"this host translates {self.about} to {self.to} (DNAT): {instead}"


@dataclasses.dataclass(frozen=True)
class ByOtherDevice(Reason):
    """The route to the address leads by another device."""

    device: str
    ours: str

    def text(self) -> str:
        return f"the route to {self.about} leads by {self.device}, not by {self.ours}: use -i {self.device}"


class OwnAddress(Reason):
    """The address is this host's."""

    def text(self) -> str:
        return f"{self.about} is an address of this host: nothing that is sent there leaves it"


@dataclasses.dataclass(frozen=True)
class NobodySends(Reason):
    """No packet to the address left, or only some without a probe."""

    ours: str
    arrives: bool  # the address sends to us by this device
    has_unfit: bool  # packets left that cannot carry a probe, to whatever destination

    def text(self) -> str:
        if self.has_unfit:
            return f"no packet to {self.about} that can carry a probe left by {self.ours}"
        but = "though packets from there arrive by it" if self.arrives else "nobody here sends there"
        return f"no packet to {self.about} left by {self.ours}: {but}"


@dataclasses.dataclass(frozen=True)
class NothingArrives(Reason):
    """Probes left, but nothing arrives by our device: neither answers nor packets of the destination."""

    destinations: int  # to which this applies
    ours: str
    others: list[str]  # devices
    are_read: bool

    def text(self) -> str:
        more = f" and {self.destinations - 1} more destinations" if self.destinations > 1 else ""
        names = in_short(self.others)
        start = f"nothing arrives by {self.ours} from {self.about}{more}, nor from routers on the way: "
        if self.are_read:
            return f"{start}answers are read on {names}, too"
        return f"{start}answers may arrive by {names}, which --ingress-hook tc would read, too (Linux 6.6)"


def reasons_in_short(reasons: list[Reason]) -> Iterator[str]:
    """Yield a line for each of the first reasons, and one that counts the others."""
    yield from (reason.text() for reason in reasons[:REASONS_SHOWN])
    if len(reasons) > REASONS_SHOWN:
        yield f"{len(reasons) - REASONS_SHOWN} more reasons of these kinds"
