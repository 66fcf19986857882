"""What elfprobe costs per packet, over a floor: a program in its place that does nothing.

Where a packet carries no probe, programs are run by BPF_PROG_TEST_RUN, on one CPU, very often in a row:
so caches are warm, and what is measured is the program. Each figure is the least of those of all rounds, in
which what is measured and its floor take turns.

A packet that carries a probe is timed in real traffic, since a test run cannot make one of 64 KB nor has a
socket. Two TC filters stand around elf_egress and take the time. The second one drops the clone, when it
is a probe and recorded: then the network's part is the same as with the floor, which is a program in
the place of elf_egress that makes a clone and leaves it at that. Each figure is a difference of medians.

A reply is timed by the kernel's own statistics of BPF programs: mean times of elf_ingress and of an empty
program over packets of which nearly all are replies. So are packets of sockets whose owner is noted. What the
statistics cost themselves is in the floor, too. Packets arrive at TC ingress.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import statistics
import struct
import tempfile
import time
from contextlib import ExitStack, contextmanager
from ctypes import get_errno
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import bcc
import pyroute2
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from figures import Figure, Goal, at_most
from lab import CommandFailed, Lab
from loaded import load, pinned
from progtest import Programs, SkBuff, elfprobe, own_namespace, pack_address
from runs import inside

CLIENT, SERVER, OTHER = '192.0.2.1', '198.51.100.80', '198.51.100.81'
FLOWS = 256  # that packets belong to, in turn
SIZES = 1, 1000, 65536  # of the table of destinations
ALL = 65536
BPF_STATS_RUN_TIME = 0  # linux/bpf.h


def put(programs: Programs, array: str, program: str) -> None:
    """Have tail calls of `array` go to this program."""
    programs.kernel.map(array).put(0, programs.kernel.program(program))


DATAGRAM, SEGMENT = UDP(sport=40112, dport=443), TCP(sport=40112, dport=443, flags='A')


def frame(source: str = CLIENT, dest: str = OTHER, layer: Packet = DATAGRAM) -> bytes:
    """A packet without data."""
    ethernet = Ether(src='02:00:00:00:00:01', dst='02:00:00:00:00:02')
    return bytes(ethernet / IP(src=source, dst=dest) / layer)


# One packet, very often

CASES: dict[str, tuple[str, bytes, Goal]] = {
    'leaves, no target': ('egress', frame(), at_most(20)),
    'leaves, to a target, no probe due, UDP': ('egress', frame(dest=SERVER), at_most(50)),
    'leaves, to a target, no probe due, TCP': ('egress', frame(CLIENT, SERVER, SEGMENT), at_most(50)),
    'arrives, not ICMP': ('ingress', frame(OTHER, CLIENT), at_most(15)),
    'arrives, from a target destination': ('ingress', frame(SERVER, CLIENT), at_most(40)),
}


def by_test_run(quick: bool) -> Iterator[Figure]:
    rounds, repeat = (3, 100000) if quick else (15, 200000)
    for by_owner in False, True:
        shortest: dict[str, tuple[int, int]] = {}
        # After one probe, which the first packet is good for, none is due for a second.
        with own_namespace(), pinned(), load(by_owner, probeint=1000, rate_global=True) as programs:
            programs.follow(SERVER)
            for _ in range(rounds):
                for name, (way, packet, _goal) in CASES.items():
                    programs.run(f'elf_{way}', packet)
                    # What TCP sends has the time with it.
                    context = SkBuff(tstamp=time.monotonic_ns()) if name.endswith('TCP') else None
                    empty, elf = (
                        programs.duration(f'{program}_{way}', packet, repeat, context)
                        for program in ('empty', 'elf')
                    )
                    least_empty, least_elf = shortest.get(name, (empty, elf))
                    shortest[name] = min(empty, least_empty), min(elf, least_elf)
        for name, (_, _, goal) in CASES.items():
            empty, elf = shortest[name]
            yield Figure(f'{name}, {"-a" if by_owner else "by address"}', elf - empty, 'ns', goal, empty)


# Many packets, many destinations


def by_table_size(quick: bool) -> Iterator[Figure]:
    """Packets of FLOWS flows, in turn, to or from as many of the destinations, chosen by chance: what
    differs is the table's size, not how much of it a CPU has in its caches. Where every packet belongs to
    another one of all destinations, there is nothing in the caches, which no table could help."""
    rounds = 3 if quick else 9
    chance = random.Random(1)
    addresses = chance.sample(range(0x0A000000, 0x0B000000), 2 * max(SIZES))
    known, unknown = addresses[: max(SIZES)], addresses[max(SIZES) :]
    took: dict[tuple[str, int, bool], tuple[float, float]] = {}
    with own_namespace(), pinned(), load(probeint=1000, rate_global=True, max_rate=10**6) as programs:
        destinations, entered = elfprobe.Destinations(programs.kernel), 0
        for size in SIZES:
            for address in known[entered:size]:
                destinations.add(pack_address(socket.inet_ntoa(struct.pack('!I', address))))
            entered = size
            for name, measure in {
                'leaves, no target': ('egress', unknown),
                'leaves, to a target, no probe due': ('egress', known[:size]),
                'arrives, from a target destination': ('ingress', known[:size]),
            }.items():
                for in_cache in (True, False) if size == ALL else (True,):
                    took[name, size, in_cache] = cycle(programs, *measure, in_cache, rounds, chance)
    for name, size, in_cache in took:
        empty, elf = took[name, size, in_cache]
        which = f'{size:,} destination{"s" * (size > 1)}' if in_cache else f'all {size:,} in turn'
        yield Figure(f'{name}: {which}', elf - empty, 'ns', floor=empty)
        if size == ALL and in_cache:
            alone = took[name, 1, True]
            yield Figure(
                f'{name}: 65,536 against 1', (elf - empty) / max(alone[1] - alone[0], 1), 'times', at_most(1.5)
            )


def cycle(
    programs: Programs, way: str, addresses: list[int], in_cache: bool, rounds: int, chance: random.Random
) -> tuple[float, float]:
    """ns per packet of an empty program and ours."""
    chosen = chance.choices(addresses, k=FLOWS) * (ALL // FLOWS) if in_cache else chance.sample(addresses, ALL)
    others = programs.kernel.map('others')
    for turn, address in enumerate(chosen):
        others.put(turn, socket.htonl(address))

    def took(program: str) -> float:
        put(programs, way, f'{program}_{way}')
        # Once or twice through all: what is due gets its probe, and is due no more for a second.
        programs.duration(f'cycle_{way}', frame(), 2 * ALL)
        return programs.duration(f'cycle_{way}', frame(), 2 * ALL)

    return least(rounds, partial(took, 'empty'), partial(took, 'elf'))


# Probes and replies


class Traffic(NamedTuple):
    """iperf3's options, and bytes at least and at most of the frames that count."""

    options: tuple[str, ...]
    least: int
    most: int


UDP_SMALL = ('-u', '-l', '64', '-b', '8M')  # 16,000 packets per second
PROBES: dict[str, tuple[Traffic, Goal]] = {
    'a probe, of a UDP packet of 64 bytes': (Traffic(UDP_SMALL, 106, 106), at_most(2000)),
    'a probe, of a TCP ACK': (Traffic(('-R', '-b', '2G'), 66, 100), at_most(2000)),
    'a probe, of a TCP packet of 64 KB': (Traffic(('-b', '4G'), 60000, 66000), at_most(8000)),
}


def in_traffic(quick: bool) -> Iterator[Figure]:
    rounds = 2 if quick else 4
    with traffic_lab() as (lab, ipr, device), load(probeint=0, rate_global=True, max_rate=10**6) as programs:
        samples: list[tuple[int, int]] = []

        def take(events: elfprobe.Events) -> None:
            samples.extend(struct.unpack_from('=II', event) for event in events.each())

        programs.kernel.on_events('samples', take)

        def median(traffic: Traffic, program: str) -> float:
            put(programs, 'egress', program)
            programs.clear()
            programs.follow(lab.server_address(4), length=5)
            samples.clear()
            transfer(lab, *traffic.options)
            programs.rows()  # consumes both rings
            recorded = programs.counters().get('send_failed', 0)
            if program == 'elf_egress' and recorded < 0.95 * len(samples):
                raise CommandFailed(f'{recorded} probes of {len(samples)} clones: {programs.counters()}')
            took = [took for took, length in samples if traffic.least <= length <= traffic.most]
            if len(took) < 500:
                raise CommandFailed(f'{program}, {traffic}: only {len(took)} of {len(samples)} packets count')
            return statistics.median(took)

        with two_filters(ipr, device, programs):
            for name, (traffic, goal) in PROBES.items():
                clone, elf = least(
                    rounds, *(partial(median, traffic, program) for program in ('clone_egress', 'elf_egress'))
                )
                yield Figure(name, elf - clone, 'ns', goal, clone)

        def mean(program: str) -> float:
            fd = programs.kernel.program(program)
            programs.clear()
            programs.follow(lab.server_address(4), length=5)
            with elfprobe.TcxAttachment(ipr, device, fd, elfprobe.BPF_TCX_INGRESS):
                took, runs = run_time(fd, partial(transfer, lab, *UDP_SMALL))
            replies = programs.counters().get('replies', 0)
            if program == 'elf_ingress' and replies < 0.95 * runs:
                raise CommandFailed(f'only {replies} of {runs} packets were replies')
            return took / runs

        egress = programs.kernel.program('elf_egress')
        with run_statistics(), elfprobe.TcxAttachment(ipr, device, egress, elfprobe.BPF_TCX_EGRESS):
            empty, elf = least(rounds, partial(mean, 'empty_ingress'), partial(mean, 'elf_ingress'))
        yield Figure('a reply, its row included', elf - empty, 'ns', floor=empty)


def by_owner_in_traffic(quick: bool) -> Iterator[Figure]:
    """Packets of targets with no probe due, of sockets with an owner: a test run has none such."""
    rounds = 2 if quick else 3
    with traffic_lab() as (lab, ipr, device), run_statistics(), tempfile.TemporaryDirectory(
        prefix='elf-'
    ) as directory:
        speedtest = Path(directory, 'speedtest')
        shutil.copy(shutil.which('iperf3') or 'iperf3', speedtest)
        for by_owner in False, True:
            with ExitStack() as stack:
                programs = stack.enter_context(load(by_owner, probeint=1000, rate_global=True))
                if by_owner:
                    follower = elfprobe.ProcessFollower(
                        programs.kernel, elfprobe.AppNames(['speedtest']), [], elfprobe.ProcessLog()
                    )
                    stack.enter_context(follower.followed())
                else:
                    programs.follow(lab.server_address(4), length=5)

                def mean(options: tuple[str, ...], program: str, programs: Programs = programs) -> float:
                    fd = programs.kernel.program(program)
                    with elfprobe.TcxAttachment(ipr, device, fd, elfprobe.BPF_TCX_EGRESS):
                        took, runs = run_time(fd, partial(transfer, lab, *options, program=str(speedtest)))
                    return took / runs

                for kind, options in ('UDP', UDP_SMALL), ('TCP', ('-b', '4G')):
                    empty, elf = least(
                        rounds, *(partial(mean, options, program) for program in ('empty_egress', 'elf_egress'))
                    )
                    mode = '-a' if by_owner else 'by address'
                    yield Figure(
                        f'leaves, to a target, no probe due, {kind}, {mode}', elf - empty, 'ns', floor=empty
                    )
                if not programs.counters().get('probes'):
                    raise CommandFailed('the traffic had no target')


@contextmanager
def traffic_lab() -> Iterator[tuple[Lab, Any, Any]]:
    """A lab with an iperf3 server, this thread in its client; pyroute2 there, and the client's device."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(routers=4))
        stack.enter_context(lab.iperf3_server())
        stack.enter_context(inside(lab.client))
        ipr = stack.enter_context(pyroute2.IPRoute())
        yield lab, ipr, elfprobe.find_device(ipr, lab.client_device)


def transfer(lab: Lab, *options: str, program: str = 'iperf3') -> None:
    """One second of traffic."""
    lab.client.run(program, '-c', lab.server_address(4), '-t', '1', *options)


def least(rounds: int, floor: Callable[[], float], ours: Callable[[], float]) -> tuple[float, float]:
    """Of each, in turn."""
    took = [(floor(), ours()) for _ in range(rounds)]
    return min(first for first, _ in took), min(second for _, second in took)


@contextmanager
def two_filters(ipr: Any, device: Any, programs: Programs) -> Iterator[None]:
    """begin_egress and, behind it, end_egress."""
    ipr.tc('add', 'clsact', device.ifindex)
    try:
        for prio, name in enumerate(('begin_egress', 'end_egress'), 1):
            ipr.tc(
                'add-filter',
                'bpf',
                device.ifindex,
                handle=1,
                prio=prio,
                fd=programs.kernel.program(name),
                name=name,
                parent=elfprobe.CLSACT_EGRESS,
                protocol=elfprobe.ETH_P_ALL,
                direct_action=True,
                classid=1,
            )
        yield
    finally:
        ipr.tc('del', 'clsact', device.ifindex)


@contextmanager
def run_statistics() -> Iterator[None]:
    """The kernel keeps statistics of BPF programs."""
    stats = bcc.lib.bpf_enable_stats(BPF_STATS_RUN_TIME)
    if stats < 0:
        raise OSError(get_errno(), 'BPF_ENABLE_STATS')
    try:
        yield
    finally:
        os.close(stats)


def run_time(program: int, meanwhile: Callable[[], None]) -> tuple[int, int]:
    """ns that the kernel sees a program run meanwhile, and how often."""

    def now() -> tuple[int, int]:
        lines = Path(f'/proc/self/fdinfo/{program}').read_text().splitlines()
        fields = dict(line.split(':', 1) for line in lines)
        return int(fields['run_time_ns']), int(fields['run_cnt'])

    before = now()
    meanwhile()
    after = now()
    return after[0] - before[0], after[1] - before[1]
