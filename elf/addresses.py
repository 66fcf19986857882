# SPDX-License-Identifier: GPL-3.0-only
"""Addresses and flows as text, and the host names of addresses.

elfprobe.c has each address in 16 bytes, IPv4 as v4-mapped (RFC 4291, 2.5.5.2).
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import queue
import socket
import threading

from elf.usage import printable

V4_MAPPED = bytes(10) + b"\xff\xff"
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6"}
RESOLVER_THREADS = 4  # so many names are asked for at once
NAMES_MAX = 10000  # host names that are kept


def pack_address(text: str) -> bytes:
    """Return the 16 bytes of an IPv4 or IPv6 address, without its scope. Raises ValueError."""
    address = ipaddress.ip_address(text.split("%")[0])
    return V4_MAPPED + address.packed if address.version == 4 else address.packed


@functools.lru_cache(maxsize=65536)
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


class ReverseDns:
    """Host names of addresses. Threads ask for them in the background: no caller ever waits."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._threads = 0

    def name_of(self, address: str) -> str:
        """Return the address's name, empty while it is not known or where there is none."""
        if address not in self._names and len(self._names) < NAMES_MAX:
            self._names[address] = ""
            self._requests.put(address)
            if self._threads < RESOLVER_THREADS:
                self._threads += 1
                threading.Thread(target=self._resolve, daemon=True).start()
        return self._names.get(address, "")

    def with_name(self, address: str) -> str:
        """Return the address, followed by its name if that is known."""
        return f"{address} {self.name_of(address)}".rstrip()

    def _resolve(self) -> None:
        while True:
            address = self._requests.get()
            with contextlib.suppress(OSError, UnicodeError):
                self._names[address] = printable(socket.gethostbyaddr(address)[0])
