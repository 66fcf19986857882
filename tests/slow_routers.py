"""Routers in Python that delay, lose, mark and answer as they are told: what findings are compared with.

    client                      r1                      server
    +--------+     +---------------------------+     +--------+
    |    eth0|-----|eth0 hop 1 ... hop HOPS eth1|-----|eth0    |
    +--------+     +---------------------------+     +--------+
            link 1     link 2 ...        link HOPS + 1

As in odd_routers.py, a process in the namespace of r1 takes the place of the kernel. Each packet waits at each link
for as long as the effects that are on say; packets do not overtake each other on a link. No qdisc is needed.

    with Lab(routers=1) as lab, slow_routers(lab) as routers:
        routers.do(Effect('forward', 3, begin, end, 0.005))     # s of CLOCK_MONOTONIC, s
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is a program, too

from lab import Lab, address, end, wait_for_line
from odd_routers import (
    DEST_AT,
    HOPS,
    Device,
    Way,
    packed,
    replaced,
    time_exceeded,
    ttl_of,
    version_of,
    with_mark,
    with_tos,
    with_ttl,
)

BASE = 0.0001  # s that each link takes


@dataclasses.dataclass
class Effect:
    """Something that is so for a while.

    what: 'forward', 'back': the link delays by `value` s. 'answers': the router answers `value` s later. 'loss',
    'loss_back': the link loses this share. 'limit': the router gives so many answers a second. 'way': from this hop
    on there are other routers, and `value` s more in front of it; 'balanced': for each other packet. 'mark',
    'dscp': the link marks this share of packets (CE), gives them this DSCP/ECN byte. 'rttl': the answers of this
    router come back over `value` more routers.
    """

    what: str
    hop: int  # or link
    begin: float  # s, CLOCK_MONOTONIC
    end: float
    value: float


class SlowRouters:
    """The process, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, *effects: Effect) -> None:
        assert self._process.stdin
        for effect in effects:
            self._process.stdin.write(json.dumps(dataclasses.asdict(effect)) + '\n')
        self._process.stdin.flush()


@contextmanager
def slow_routers(lab: Lab) -> Iterator[SlowRouters]:
    """The only router of a lab becomes HOPS of them. It forwards by itself again at exit."""
    (router,) = lab.routers
    forwarding = ['net.ipv4.ip_forward={}', 'net.ipv6.conf.all.forwarding={}']
    macs = [
        host.run('cat', f'/sys/class/net/{host.device}/address').stdout.strip() for host in (lab.client, lab.server)
    ]
    router.run('sysctl', '-qw', *(setting.format(0) for setting in forwarding))
    try:
        process = router.popen(
            sys.executable,
            __file__,
            *macs,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            wait_for_line(process, 'ready')
            yield SlowRouters(process)
        finally:
            end(process)
    finally:
        router.run('sysctl', '-qw', *(setting.format(1) for setting in forwarding))


# The process itself


def other_side(begin: float) -> int:
    """Return the number of the address that the routers of another way have, by when they come into use."""
    return 3 + int(begin * 10) % 250


def address_of(side: int, packet: bytes, hop: int) -> bytes:
    return packed(version_of(packet), address(version_of(packet), hop, side))


def counted(answer: bytes, number: int) -> bytes:
    """Give an answer a counter as its IP identification, as many routers do. IPv6 has none."""
    return replaced(answer, 4, struct.pack('!H', number & 0xFFFF)) if version_of(answer) == 4 else answer


class Routers:
    """All of them: packets wait in one heap for the time at which they go out."""

    def __init__(self, near: Device, far: Device) -> None:
        self._near, self._far = near, far
        self._effects: list[Effect] = []
        self._heap: list[tuple[float, int, Device, bytes, bytes]] = []
        self._numbers = itertools.count()
        self._free = {True: [0.0] * (HOPS + 2), False: [0.0] * (HOPS + 2)}  # when a link's last packet has left it
        self._answered: dict[int, float] = {}
        self._answers = [0] * (HOPS + 1)
        self._turn = 0
        self._text = ''

    def run(self) -> None:
        """For ever."""
        selector = selectors.SelectSelector()  # epoll's time-outs are whole ms
        for device, receive in (self._near, self._from_client), (self._far, self._from_server):
            selector.register(device.socket, selectors.EVENT_READ, receive)
        selector.register(sys.stdin, selectors.EVENT_READ, self._read_effects)
        os.set_blocking(sys.stdin.fileno(), False)
        print('ready', file=sys.stderr, flush=True)
        while True:
            wait = max(0, self._heap[0][0] - time.monotonic()) if self._heap else None
            for key, _ in selector.select(wait):
                key.data()
            while self._heap and self._heap[0][0] <= time.monotonic():
                _, _, device, packet, known = heapq.heappop(self._heap)
                device.send(packet, known)

    def _read_effects(self) -> None:
        self._text += os.read(sys.stdin.fileno(), 1 << 16).decode()
        *lines, self._text = self._text.split('\n')
        self._effects += [Effect(**json.loads(line)) for line in lines]

    def _on(self, what: str, hop: int, at: float) -> list[float]:
        return [
            its.value for its in self._effects if its.what == what and its.hop == hop and its.begin <= at < its.end
        ]

    def _send(self, at: float, device: Device, packet: bytes, known: bytes = bytes(10)) -> None:
        heapq.heappush(self._heap, (at, next(self._numbers), device, packet, known))

    def _over(
        self, link: int, at: float, is_forward: bool, extra: float = 0.0, is_answer: bool = False
    ) -> float | None:
        """Return when a packet has passed a link, None if it is lost. Answers may overtake and be overtaken."""
        lost = self._on('loss' if is_forward else 'loss_back', link, at)
        if lost and random.random() < max(lost):
            return None
        delay = BASE + extra + sum(self._on('forward' if is_forward else 'back', link, at))
        if is_answer:
            return at + delay
        free = self._free[is_forward]
        free[link] = at = max(at + delay, free[link])
        return at

    def _from_server(self) -> None:
        for known, packet in iter(self._far.receive, None):
            if packet[DEST_AT[version_of(packet)]] in self._near.peers:
                at = self._way_back(time.monotonic(), HOPS + 1, False)
                if at is not None:
                    self._send(at, self._near, with_ttl(packet, ttl_of(packet) - HOPS), known)

    def _way_back(self, at: float | None, link: int, is_answer: bool) -> float | None:
        while link and at is not None:
            at = self._over(link, at, False, is_answer=is_answer)
            link -= 1
        return at

    def _from_client(self) -> None:
        for known, packet in iter(self._near.receive, None):
            if packet[DEST_AT[version_of(packet)]] not in self._far.peers:
                continue
            ttl, now = ttl_of(packet), time.monotonic()
            at: float | None = now
            source = Way().source
            self._turn += 1
            for link in range(1, min(ttl, HOPS + 1) + 1):
                assert at is not None
                kinds = ('way', 'balanced') if self._turn % 2 else ('way',)
                others = [
                    its
                    for its in self._effects
                    if its.what in kinds and its.hop == link and its.begin <= now < its.end
                ]
                if others:
                    side = other_side(others[0].begin)
                    source = partial(address_of, side)
                at = self._over(link, at, True, sum(its.value for its in others))
                if at is None:
                    break
                if any(random.random() < share for share in self._on('mark', link, now)):
                    packet = with_mark(packet)
                for tos in self._on('dscp', link, now):
                    packet = with_tos(packet, int(tos))
            if at is None:
                continue
            if ttl > HOPS:
                self._send(at, self._far, with_ttl(packet, ttl - HOPS), known)
            elif self._may_answer(ttl, now):
                self._answers[ttl] += 1
                at = self._way_back(at + sum(self._on('answers', ttl, now)), ttl, True)
                if at is not None:
                    farther = sum(map(int, self._on('rttl', ttl, now)))
                    way = Way(source=source, ttl=65 - ttl - farther)
                    self._send(at, self._near, counted(time_exceeded(way, packet, ttl), self._answers[ttl]))

    def _may_answer(self, hop: int, now: float) -> bool:
        for rate in self._on('limit', hop, now):
            if now < self._answered.get(hop, 0.0):
                return False
            self._answered[hop] = max(self._answered.get(hop, 0.0), now - 1 / rate) + 1 / rate
        return True


def main() -> None:
    client_mac, server_mac = sys.argv[1:]
    near = Device('eth0', client_mac, [address(version, 1, 1) for version in (4, 6)])
    far = Device('eth1', server_mac, [address(version, 2, 2) for version in (4, 6)])
    Routers(near, far).run()


if __name__ == '__main__':
    main()
