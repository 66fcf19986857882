# SPDX-License-Identifier: GPL-3.0-only
"""The network devices of a run: find them, tell their state, lock them against another run."""

from __future__ import annotations

import array
import contextlib
import enum
import fcntl
import logging
import os
import socket
import struct
from typing import Any, Iterable, Iterator, NamedTuple

from elf.addresses import address_text
from elf.network import Routes, device_name, in_short, loopback
from elf.reasons import OwnAddress
from elf.usage import Failure

ARPHRD_ETHER, ARPHRD_TUNNEL, ARPHRD_LOOPBACK, ARPHRD_SIT = 1, 768, 772, 776  # linux/if_arp.h
# Links whose packets begin with IP; "none" are TUN, WireGuard and the like.
IP_LINKS = {
    512: "ppp", 519: "rawip", ARPHRD_TUNNEL: "ipip", 769: "ip6tnl", ARPHRD_SIT: "sit", 778: "gre",
    823: "ip6gre", 0xFFFE: "none",
}  # fmt: skip
# Tunnel devices -> the choices of -e that can occur inside. Inside other devices all can.
CARRIED = {
    ARPHRD_TUNNEL: ("ipinip",), 769: (), ARPHRD_SIT: ("ipinip", "ip6inip"), 778: (), 823: (),
}  # fmt: skip
IFF_UP, IFF_RUNNING = 1, 0x40  # linux/if.h
SIOCGIFFLAGS, SIOCETHTOOL = 0x8913, 0x8946  # linux/sockios.h
ETHTOOL_GDRVINFO = 3  # linux/ethtool.h
DEVICE_LOCKS = "/proc/sys/net/ipv4/tcp_fastopen_key"  # never written
FLOCK = "@hhqqi"  # struct flock, fcntl(2): type, whence, start, length, PID

Netlink = Any  # pyroute2.IPRoute

log = logging.getLogger("elfprobe")


class Frame(enum.IntEnum):
    """What packets on a device begin with; the same numbers as in elfprobe.c."""

    ETHERNET = 0
    IP = 1
    TUNNEL = 2  # IP, but receive programs may see the tunnel's own headers in front


def interface_failure(message: str) -> Failure:
    """Return a Failure that names the option -i."""
    return Failure(f"argument -i/--interface: {message}")


class Device(NamedTuple):
    """A network device of a run."""

    name: str
    ifindex: int
    frame: Frame = Frame.ETHERNET
    driver: str = ""  # the kernel's name of its driver


def names_of(devices: Iterable[Device], separator: str = ", ") -> str:
    """Return the names of devices in a row."""
    return separator.join(device.name for device in devices)


class LinkState(enum.Enum):
    """Whether packets can leave the device. The values are the log's words."""

    UP = "is up again"
    NO_CARRIER = "has no carrier: no packets until it has one"
    DOWN = "is down: no packets until it is up"

    @classmethod
    def of(cls, device: Device) -> LinkState:
        """Return a device's state. Raises OSError if there is no such device any more."""
        name = socket.if_indextoname(device.ifindex)
        reply = device_ioctl(SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
        (flags,) = struct.unpack_from("16xH", reply)
        if flags & IFF_RUNNING:
            return cls.UP
        return cls.NO_CARRIER if flags & IFF_UP else cls.DOWN


def device_ioctl(number: int, request: bytes) -> bytes:
    """Return the struct ifreq, netdevice(7), that the kernel has filled in. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return fcntl.ioctl(any_socket, number, request)


def driver_of(name: str) -> str:
    """Return the name of a device's driver, empty if the kernel does not tell it."""
    info = array.array("B", struct.pack("=I192x", ETHTOOL_GDRVINFO))  # struct ethtool_drvinfo
    try:
        device_ioctl(SIOCETHTOOL, struct.pack("16sP16x", name.encode(), info.buffer_info()[0]))
    except OSError:
        return ""
    return info.tobytes()[4:36].split(b"\0")[0].decode(errors="replace")


def find_device(ipr: Netlink, name: str, encapsulation: str = "ethernet") -> Device:
    """Return the device of this name. Raises Failure unless it is up and -e fits its packets."""
    names = [found for _, found in socket.if_nameindex()]
    if name not in names:
        raise interface_failure(f"there is no '{name}' here; there are: {', '.join(names)}")
    ifindex = socket.if_nametoindex(name)
    link = ipr.get_links(ifindex)[0]
    kind = link["ifi_type"]
    if not link["flags"] & IFF_UP:
        raise interface_failure(f"'{name}' is down: ip link set {name} up")
    if kind == ARPHRD_LOOPBACK:
        raise interface_failure(f"'{name}' is the loopback device: nothing is ever a hop away there")
    if kind != ARPHRD_ETHER and kind not in IP_LINKS:
        raise interface_failure(f"packets on '{name}' begin with neither Ethernet nor IP (link type {kind})")
    if kind in CARRIED and encapsulation not in ("ethernet", *CARRIED[kind]):
        fit = f"{IP_LINKS[kind]}, which takes {' or '.join(('ethernet', *CARRIED[kind]))}"
        raise Failure(f"argument -e/--encapsulation: '{encapsulation}' does not fit '{name}', {fit}")
    frame = Frame.TUNNEL if kind in CARRIED else Frame.ETHERNET if kind == ARPHRD_ETHER else Frame.IP
    return Device(name, ifindex, frame, driver_of(name))


def find_devices(ipr: Netlink, names: Iterable[str], encapsulation: str) -> list[Device]:
    """Return the devices of these names, as find_device() does. Raises Failure unless the same programs fit all."""
    devices = [find_device(ipr, name, encapsulation) for name in names]
    for device in devices:
        if device.frame != devices[0].frame:
            begins = {Frame.ETHERNET: "Ethernet", Frame.IP: "IP", Frame.TUNNEL: "IP, in a tunnel"}
            kinds = (f"'{each.name}' ({begins[each.frame]})" for each in (devices[0], device))
            raise interface_failure(f"{' and '.join(kinds)} are not of the same kind: start a run for each")
    return devices


def find_interface(routes: Routes, fixed: dict[bytes, str], by_process: bool) -> str:
    """Return the name of the device by which the targets are reached. Raises Failure unless it is one.

    fixed are the target destinations. by_process: the default route's device, too.
    """
    users: dict[int, list[str]] = {}
    for packed in fixed:
        for ifindex in routes.devices_to(packed):
            users.setdefault(ifindex, []).append(address_text(packed))
    if by_process:
        for ifindex in routes.default_devices():
            users.setdefault(ifindex, []).append("the default route")
    own = users.pop(loopback(), [])  # a list for many hosts has this one, too
    if own and not users:
        raise Failure(OwnAddress(own[0]).text())
    if not users:
        nowhere = f"no route leads to {in_short(list(map(address_text, fixed)))}" if fixed else "no default route"
        raise interface_failure(f"{nowhere}: name the device")
    if len(users) > 1:
        devices = "; ".join(f"{device_name(ifindex)} to {in_short(names)}" for ifindex, names in users.items())
        raise interface_failure(f"the targets are reached by several devices, name one or more: {devices}")
    return device_name(*users)


@contextlib.contextmanager
def sole_user(devices: Iterable[Device]) -> Iterator[None]:
    """Make sure that no other elfprobe uses the devices. Raises Failure, with the PID of the other one.

    The locks are record locks, fcntl(2), on DEVICE_LOCKS: the bytes with the numbers of the devices. The file
    belongs to the network namespace, as the devices do. To open it for writing takes the same right as to attach a
    program (CAP_NET_ADMIN), so that nobody else can keep elfprobe from starting. The locks go with this process,
    however it ends.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = os.open(DEVICE_LOCKS, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as err:
            names = names_of(devices)
            log.warning("another elfprobe on %s would not be noticed: %s: %s", names, DEVICE_LOCKS, err.strerror)
        else:
            stack.callback(os.close, file)
            for device in devices:
                lock_device(file, device)
        yield


def lock_device(file: int, device: Device) -> None:
    """Lock the device's byte of DEVICE_LOCKS, open as a descriptor. Raises Failure if another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, device.ifindex)
    except BlockingIOError as err:
        request = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, device.ifindex, 1, 0)
        *_, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, request))
        who = f" (pid {pid})" if pid > 0 else ""  # it may be in a PID namespace that cannot be seen from here
        raise interface_failure(f"another elfprobe{who} runs on '{device.name}'") from err
