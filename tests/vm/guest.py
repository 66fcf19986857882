"""A virtual machine with network cards: their other ends are TAPs of the first router of a lab.

    guest              r1                 r2                       server
    +----------+      +------------+     +-----------+            +--------+
    |virtio_net|------|tap0        |     |           |            |        |
    |e1000e    |------|tap1    eth1|-----|eth0   eth1|---- ... ---|eth0    |
    |...       |------|tap2        |     |           |            |        |
    +----------+      +------------+     +-----------+            +--------+

The guest stands where the lab's client is otherwise. r1 is 10.0.1.2 on each TAP, and card N of CARDS is
10.0.1.(10 + N), with routes of their own, so that all cards can be there at once. TAPs with vnet_hdr let
packets through whose checksums and segments the receiver need not have: virtio_net has the offloads that it
has in a cloud. Routers and server run outside of the virtual machine, on the machine's own kernel.

`outside()` is for the machine that runs QEMU, `card()` for the guest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import Lab, address, batch, remove, run, wait_until

ROUTERS = 4
# Names of drivers, and what QEMU calls the cards that they drive.
CARDS = {'virtio_net': 'virtio-net-pci', 'e1000e': 'e1000e', 'igb': 'igb', 'vmxnet3': 'vmxnet3'}
GATEWAY = address(4, 1, 2)


class NoCard(Exception):
    """This guest has no card for a driver; the text says why."""


def own_address(driver: str) -> str:
    return address(4, 1, 10 + [*CARDS].index(driver))


class Outside(NamedTuple):
    """A lab for a guest to be in, and what a command of QEMU needs in front and at its end."""

    lab: Lab
    prefix: Sequence[str]
    options: Sequence[str]


def emulated(emulator: str, drivers: Sequence[str]) -> list[str]:
    """Return the drivers whose cards this QEMU has."""
    listed = subprocess.run([emulator, '-device', 'help'], stdout=subprocess.PIPE, text=True, check=True).stdout
    known = set(re.findall(r'^name "(.+?)"', listed, re.MULTILINE))
    return [driver for driver in drivers if CARDS[driver] in known]


@contextmanager
def outside(emulator: str, drivers: Sequence[str]) -> Iterator[Outside]:
    """Build the lab around a guest that has cards of these drivers. iperf3 listens at its server."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(routers=ROUTERS))
        stack.enter_context(lab.iperf3_server())
        router, options = lab.routers[0], []
        commands = [f'link delete {router.device}']
        for number, driver in enumerate(emulated(emulator, drivers)):
            tap = f'tap{number}'
            commands += [
                f'tuntap add {tap} mode tap vnet_hdr',
                f'address add {GATEWAY}/32 dev {tap}',
                f'link set {tap} txqueuelen 10000 up',
                f'route add {own_address(driver)} dev {tap}',
            ]
            # Without romfile= QEMU looks for a ROM to boot from, which is a package of its own.
            options += [
                '-netdev',
                f'tap,id={tap},ifname={tap},script=no,downscript=no,vhost=off',
                '-device',
                f'{CARDS[driver]},netdev={tap},romfile=',
            ]
        batch(router.name, commands)
        yield Outside(lab, router.command(), options)


def device_of(driver: str) -> str | None:
    """Return the name of this namespace's first device that has the driver."""
    for device in sorted(Path('/sys/class/net').iterdir()):
        link = device / 'device' / 'driver'
        if link.exists() and link.resolve().name == driver:
            return device.name
    return None


@contextmanager
def card(driver: str) -> Iterator[Lab]:
    """Yield the lab around this guest, with the driver's card as the client's device.

    The driver is loaded anew, so the card has the settings that it begins with. Only `client`,
    `client_device` and the addresses of the lab are of use: the rest is outside. Raises NoCard.
    """
    run('modprobe', '-r', driver, check=False)  # fails where it is built in
    if run('modprobe', driver, check=False).returncode:
        raise NoCard(f'this kernel has no driver {driver}')
    device = device_of(driver)
    if not device:
        raise NoCard(f'this guest has no card for {driver}')
    lab = Lab(routers=ROUTERS)
    host = lab.client
    with ExitStack() as stack:
        stack.callback(remove, [host.name])
        batch('', [f'netns add {host.name}', f'link set {device} netns {host.name} name {host.device}'])
        stack.callback(host.end_processes)
        batch(
            host.name,
            [
                'link set lo up',
                f'address add {own_address(driver)}/24 dev {host.device}',
                f'link set {host.device} up',
                f'route add default via {GATEWAY}',
            ],
        )
        ping = 'ping', '-nc1', '-W1', lab.server_address(4)
        wait_until(lambda: host.run(*ping, check=False).returncode == 0, 10, f'{driver} reaches the server')
        yield lab
