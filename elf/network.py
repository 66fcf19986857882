# SPDX-License-Identifier: GPL-3.0-only
"""What this host does with packets, as the kernel tells by netlink: routes, and addresses that it translates."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import Iterable, Iterator

from elf.addresses import V4_MAPPED, address_text, pack_address

NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 1, 0x300, 2, 3  # linux/netlink.h
RTM_GETROUTE, RTN_UNICAST, RTN_LOCAL, RTM_F_FIB_MATCH = 26, 1, 2, 0x2000  # linux/rtnetlink.h
RTA_DST, RTA_OIF, RTA_MULTIPATH = 1, 4, 9
# RTMGRP_LINK, and addresses, routes and rules (linux/rtnetlink.h) of IPv4 and IPv6
ROUTE_GROUPS = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000
NETLINK_NETFILTER, CT_GET = 12, 0x101  # linux/netlink.h, linux/netfilter/nfnetlink_conntrack.h
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_STATUS_MASK, CTA_TUPLE_IP = 1, 2, 3, 26, 1
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC = 1, 2, 3
IPS_DST_NAT = 0x20  # linux/netfilter/nf_conntrack_common.h
# Root name servers: a route of their own leads hardly ever there, so these have the default route.
FAR_AWAY = pack_address("198.41.0.4"), pack_address("2001:503:ba3e::2:30")
WATCHED_MAX = 1000  # destinations whose routes are watched
CONNECTIONS = "/proc/sys/net/netfilter/nf_conntrack_count"  # there if the kernel tracks connections
CONNECTIONS_MAX = 50000  # to look through; more take too long
NAMED_MAX = 3  # destinations that a sentence names
NEWS_MAX = 10  # routes that are named at a time


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and content of each netlink attribute (struct nlattr). Nested ones have flags in their type."""
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        yield kind & 0x3FFF, data[4:size]
        data = data[max((size + 3) & ~3, 4) :]


def attribute(kind: int, content: bytes) -> bytes:
    """Return a netlink attribute."""
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def device_name(ifindex: int) -> str:
    """Return a device's name."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"device {ifindex}"


def loopback() -> int:
    """Return the index of the loopback device."""
    return socket.if_nametoindex("lo")


def either(devices: Iterable[int]) -> str:
    """Return the names of devices of which any will do."""
    return " or ".join(map(device_name, sorted(devices)))


def in_short(names: list[str]) -> str:
    """Return the first of the names, and how many more there are."""
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more


class Routes:
    """The kernel's routes."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._changes.setblocking(False)
        self._changes.bind((0, ROUTE_GROUPS))

    def __enter__(self) -> Routes:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._changes.close()

    def devices_to(self, packed: bytes) -> frozenset[int]:
        """Return the indexes of the devices by which an address is reached: none without a route, several if
        the kernel balances flows over them."""
        family, address = socket.AF_INET6, packed
        if packed.startswith(V4_MAPPED):
            family, address = socket.AF_INET, packed[12:]
        route = struct.pack("=8BI", family, 8 * len(address), 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH)  # struct rtmsg
        body = route + attribute(RTA_DST, address)
        self._socket.send(struct.pack("=IHHII", 16 + len(body), RTM_GETROUTE, NLM_F_REQUEST, 0, 0) + body)
        reply = self._socket.recv(1 << 16)
        kind, route_type = struct.unpack_from("=4xH17xB", reply)
        if kind == NLMSG_ERROR or route_type not in (RTN_UNICAST, RTN_LOCAL):
            return frozenset()
        if route_type == RTN_LOCAL:  # its route names the device that has the address
            return frozenset((loopback(),))
        found = dict(attributes(reply[28:]))
        if RTA_MULTIPATH in found:
            return frozenset(next_hop_devices(found[RTA_MULTIPATH]))
        return frozenset(struct.unpack("=I", found[RTA_OIF])) if RTA_OIF in found else frozenset()

    def default_devices(self) -> frozenset[int]:
        """Return the indexes of the devices of the default routes, of IPv4 and of IPv6."""
        return frozenset().union(*map(self.devices_to, FAR_AWAY))

    def have_changed(self) -> bool:
        """Return whether anything has changed that routes depend on, since this was asked last."""
        changed = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    changed = bool(self._changes.recv(1 << 16)) or changed
                except OSError as err:
                    if err.errno != errno.ENOBUFS:  # more changes than there is room for
                        raise
                    changed = True
        return changed


def next_hop_devices(data: bytes) -> Iterator[int]:
    """Yield the device of each struct rtnexthop, linux/rtnetlink.h."""
    while len(data) >= 8:
        size, ifindex = struct.unpack_from("=H2xi", data)
        yield ifindex
        data = data[max((size + 3) & ~3, 8) :]


class RouteWatch:
    """Tells when routes lead to other devices than those of this run, or to another one of these."""

    def __init__(self, routes: Routes, ours: frozenset[int], fixed: Iterable[bytes]) -> None:
        """ours are the devices of this run, fixed the destinations. Without any, the default routes are watched."""
        self._routes = routes
        self._ours = ours
        self._names = {packed: f"the route to {address_text(packed)}" for packed in list(fixed)[:WATCHED_MAX]}
        is_default = not self._names
        if is_default:
            self._names = dict(zip(FAR_AWAY, ("the default route of IPv4", "the default route of IPv6")))
        self._known = self._look()
        if not is_default:  # for the default route, the user may have chosen another device
            self._known = {packed: devices & ours or ours for packed, devices in self._known.items()}

    def _look(self) -> dict[bytes, frozenset[int]]:
        return {packed: self._routes.devices_to(packed) for packed in self._names}

    def have_changed(self) -> bool:
        """Return whether routes may have changed since this was asked last."""
        return self._routes.have_changed()

    def news(self) -> list[str]:
        """Return a sentence for each route that leads elsewhere since the last call, or by our devices again."""
        before, self._known = self._known, self._look()
        lines = [
            self._sentence(self._names[packed], bool(before[packed] & self._ours), devices)
            for packed, devices in self._known.items()
            if devices & self._ours != before[packed] & self._ours
        ]
        return lines[:NEWS_MAX] + ([f"{len(lines) - NEWS_MAX} more routes as well"] if lines[NEWS_MAX:] else [])

    def _sentence(self, route: str, was_ours: bool, devices: frozenset[int]) -> str:
        if devices & self._ours:
            return f"{route} leads by {either(devices & self._ours)} {'now' if was_ours else 'again'}"
        if not devices:
            return f"{route} is gone: no packets until there is one"
        if loopback() in devices:
            return f"{route} ends on this host: nothing that is sent there leaves it"
        return f"{route} leads by {either(devices)}, not by {either(self._ours)}: no probes there"


def translations(wanted: Iterable[bytes]) -> dict[bytes, set[bytes]]:
    """Return the wanted addresses that this host itself translates (DNAT), each with those it sends to instead.

    They come from the kernel's connection tracking. Empty if there is none, if it may not be asked, or if it has
    more than CONNECTIONS_MAX connections. It is not asked if it is not in use, because a request would load it.
    """
    found: dict[bytes, set[bytes]] = {}
    wanted = frozenset(wanted)
    with contextlib.suppress(OSError, ValueError):
        with open(CONNECTIONS, encoding="ascii") as file:
            if int(file.read()) > CONNECTIONS_MAX:
                return found
        for family in (socket.AF_INET, socket.AF_INET6):
            for original, reply in destination_nats(family):
                before, after = tuple_end(original, CTA_IP_V4_DST), tuple_end(reply, CTA_IP_V4_SRC)
                if before in wanted and after and after != before:
                    found.setdefault(before, set()).add(after)
    return found


def destination_nats(family: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the tuples (struct nf_conntrack_tuple as attributes) of both directions of each translated
    connection. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        status = struct.pack("!I", IPS_DST_NAT)  # before Linux 5.10 the kernel ignores it, and yields all
        body = struct.pack("=BxH", family, 0) + attribute(CTA_STATUS, status) + attribute(CTA_STATUS_MASK, status)
        netlink.send(struct.pack("=IHHII", 16 + len(body), CT_GET, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body)
        while True:
            data = netlink.recv(1 << 17)
            while len(data) >= 16:
                size, kind = struct.unpack_from("=IH", data)
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    return
                found = dict(attributes(data[20:size]))
                if struct.unpack("!I", found[CTA_STATUS])[0] & IPS_DST_NAT:
                    yield found[CTA_TUPLE_ORIG], found[CTA_TUPLE_REPLY]
                data = data[(size + 3) & ~3 :]


def tuple_end(data: bytes, v4_kind: int) -> bytes:
    """Return the packed source or destination of a tuple. v4_kind is the attribute of IPv4's."""
    ends = dict(attributes(dict(attributes(data)).get(CTA_TUPLE_IP, b"")))
    if v4_kind in ends:
        return V4_MAPPED + ends[v4_kind]
    return ends.get(v4_kind + CTA_IP_V6_SRC - CTA_IP_V4_SRC, b"")
