# SPDX-License-Identifier: GPL-3.0-only
"""Addresses: as text, from the names and files that users give, and their host names.

elfprobe.c has each address in 16 bytes, IPv4 as v4-mapped (RFC 4291, 2.5.5.2).
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import queue
import socket
import threading
from typing import Iterable

from elf.usage import Failure, printable

log = logging.getLogger("elfprobe")

V4_MAPPED = bytes(10) + b"\xff\xff"
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6"}
RESOLVER_THREADS = 4  # host names that are looked up at a time
NAMES_MAX = 10000  # host names that are kept


def pack_address(text: str) -> bytes:
    """Return the 16 bytes of an IPv4 or IPv6 address, without its scope. Raises ValueError."""
    address = ipaddress.ip_address(text.split("%")[0])
    return V4_MAPPED + address.packed if address.version == 4 else address.packed


@functools.lru_cache(maxsize=16384)  # 300 bytes each, and 2 us
def address_text(packed: bytes) -> str:
    """Return an address as text, from its 16 bytes."""
    if packed.startswith(V4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def flow_text(dest: str, sport: int, dport: int, protocol: int) -> str:
    """Return a flow's description. Ports are in host order; sport of ICMP is the echo identifier."""
    name = PROTOCOLS.get(protocol, str(protocol))
    if name.startswith("ICMP"):
        return f"{name} echo {sport} to {dest}"
    return f"{name} port {sport} to {dest} port {dport}"


def why_unreachable(packed: bytes) -> str:
    """Return why no router can ever answer for this destination; empty if one can, as for private addresses."""
    address = ipaddress.ip_address(address_text(packed))
    if address.is_multicast or packed.startswith(V4_MAPPED) and packed[12] >= 240:
        return "no router answers for multicast, broadcast and reserved addresses"
    if address.is_loopback or address.is_unspecified:
        return f"{address} never leaves this host"
    return ""


def resolve(name: str) -> set[bytes]:
    """Return all addresses of a name, which may itself be an address. Raises Failure."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a host name"
        raise Failure(f"address '{name}': neither an address nor a name that resolves ({reason})") from err
    return {pack_address(str(sockaddr[0])) for *_, sockaddr in found}


def read_address_file(path: str) -> list[tuple[str, str]]:
    """Return the names in an @FILE, each with its line number and file for an error message.

    Empty lines, and what follows a #, are left out. Raises Failure.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.split("#")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a text file"
        raise Failure(f"address file '{path}': {reason}") from err
    if not any(lines):
        raise Failure(f"address file '{path}': no address in it")
    return [(line, f" (line {number} of {path})") for number, line in enumerate(lines, 1) if line]


def resolve_all(arguments: Iterable[str], most: int) -> dict[bytes, str]:
    """Return the packed addresses of all address arguments, each with the user's name for it.

    Raises Failure, also if there are more than most.
    """
    found: dict[bytes, str] = {}
    for argument in arguments:
        for name, place in read_address_file(argument[1:]) if argument.startswith("@") else [(argument, "")]:
            try:
                resolved = resolve(name)
            except Failure as failure:
                raise Failure(f"{failure}{place}") from failure
            for packed in resolved:
                reason = why_unreachable(packed)
                if reason:
                    raise Failure(f"address '{name}': {reason}{place}")
                found.setdefault(packed, name)
    if len(found) > most:
        raise Failure(f"addresses: {len(found)} destinations, at most {most} are possible")
    return found


def name_servers(path: str = "/etc/resolv.conf") -> set[bytes]:
    """Return the addresses of the name servers that this host asks, resolv.conf(5)."""
    found = set()
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for words in map(str.split, file):
            if words[:1] == ["nameserver"]:
                with contextlib.suppress(ValueError, IndexError):
                    found.add(pack_address(words[1]))
    return found


class ReverseDns:
    """Host names of addresses. Threads look them up in the background, so no caller waits."""

    def __init__(self) -> None:
        self.servers = name_servers()
        self._is_asking = True
        self._names: dict[str, str] = {}
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads = 0

    def avoid(self, packed: bytes) -> None:
        """Ask nobody any more if this is the address of a name server."""
        if packed in self.servers and self._is_asking:
            self._is_asking = False
            log.info("no more names are looked up, because the name server %s is a target", address_text(packed))

    def name_of(self, address: str) -> str:
        """Return the address's name, empty while it is not known or where there is none."""
        if self._is_asking and address not in self._names and len(self._names) < NAMES_MAX:
            self._names[address] = ""
            self._requests.put(address)
            if self._threads < RESOLVER_THREADS:
                self._threads += 1
                threading.Thread(target=self._resolve, daemon=True).start()
        return self._names.get(address, "")

    def _resolve(self) -> None:
        while True:
            address = self._requests.get()
            with contextlib.suppress(Exception):  # whatever it is, the next name may be found
                if self._is_asking:
                    self._names[address] = printable(socket.gethostbyaddr(address)[0])
