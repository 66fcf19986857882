# SPDX-License-Identifier: GPL-3.0-only
"""ICMP extensions: what a router appends to the packet that it quotes (RFC 4884, 7 and 8).

Two kinds of objects become text: MPLS label stacks (RFC 4950) and interface information (RFC 5837).
"""

from __future__ import annotations

import functools
import socket
import struct

VERSION = 2  # of the extension structure
MPLS_LABEL_STACK = 1, 1  # class and type (RFC 4950)
INTERFACE_INFORMATION = 2  # class (RFC 5837); the type is a bit field
INTERFACE_ROLES = ("incoming", "sub-ip", "outgoing", "next-hop")  # by the type's two highest bits
WITH_IFINDEX, WITH_ADDRESS, WITH_NAME, WITH_MTU = 8, 4, 2, 1  # bits of the type
ADDRESS_FAMILIES = {1: (socket.AF_INET, 4), 2: (socket.AF_INET6, 16)}  # IANA's number -> ours, bytes of an address


class MalformedExtension(ValueError):
    """The bytes are no extension structure that the RFCs allow."""


@functools.lru_cache(maxsize=4096)
def extension_texts(data: bytes, is_cut: bool = False) -> tuple[str, str]:
    """Return the MPLS label stack and the interfaces of an extension structure, as in the CSV.

    Labels are "label/tc/s/ttl", joined by ";". Interfaces are "name=value" joined by ";", several joined by
    "|". Objects of other kinds are skipped. is_cut: the end of the structure is missing, so its checksum
    cannot be verified. Raises MalformedExtension.
    """
    try:
        return parse(data, is_cut)
    except MalformedExtension:
        raise
    except (ValueError, IndexError, struct.error) as err:  # it ends too early
        raise MalformedExtension(str(err)) from err


def parse(data: bytes, is_cut: bool) -> tuple[str, str]:
    """Return what extension_texts() returns. If data ends too early, other exceptions may be raised, too."""
    version, checksum = data[0] >> 4, struct.unpack_from("!H", data, 2)[0]
    if version != VERSION:
        raise MalformedExtension("not version 2")
    if checksum and not is_cut and ones_complement_sum(data) != 0xFFFF:
        raise MalformedExtension("wrong checksum")
    labels: list[str] = []
    interfaces: list[str] = []
    at = 4
    while at < len(data):
        size, kind, subtype = struct.unpack_from("!HBB", data, at)
        if size < 4 or at + size > len(data):
            raise MalformedExtension("impossible length of an object")
        content = data[at + 4 : at + size]
        if (kind, subtype) == MPLS_LABEL_STACK:
            for (entry,) in struct.iter_unpack("!I", content):
                labels.append(f"{entry >> 12}/{entry >> 9 & 7}/{entry >> 8 & 1}/{entry & 255}")
        elif kind == INTERFACE_INFORMATION:
            interfaces.append(interface_text(subtype, content))
        at += size
    return ";".join(labels), "|".join(interfaces)


def interface_text(subtype: int, content: bytes) -> str:
    """Return the text of an interface information object (RFC 5837, 4)."""
    parts = [f"role={INTERFACE_ROLES[subtype >> 6]}"]
    if subtype & WITH_IFINDEX:
        parts.append(f"index={struct.unpack_from('!I', content)[0]}")
        content = content[4:]
    if subtype & WITH_ADDRESS:
        number = struct.unpack_from("!H", content)[0]
        if number not in ADDRESS_FAMILIES:
            raise MalformedExtension("unknown address family")
        family, size = ADDRESS_FAMILIES[number]
        parts.append(f"addr={socket.inet_ntop(family, content[4 : 4 + size])}")
        content = content[4 + size :]
    if subtype & WITH_NAME:
        size = content[0]
        if not 1 <= size <= len(content):
            raise MalformedExtension("impossible length of a name")
        parts.append("name=" + content[1:size].rstrip(b"\0").decode(errors="replace"))
        content = content[size:]
    if subtype & WITH_MTU:
        parts.append(f"mtu={struct.unpack_from('!I', content)[0]}")
    return ";".join(parts)


def ones_complement_sum(data: bytes) -> int:
    """Return the one's complement sum in 16 bits (RFC 1071): 0xFFFF where data includes its checksum."""
    # The sum of 16-bit words and the number that they make are the same modulo 0xFFFF.
    return (int.from_bytes(data + bytes(len(data) % 2), "big") - 1) % 0xFFFF + 1
