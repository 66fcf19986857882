"""What elfprobe costs programs that are none of its business: time per socket() and close().

Measured without and with -a in turn. Each figure is the least of those of all rounds: of the means
of many batches, or, of sockets that are made at a steady rate, of a round's medians.
"""

from __future__ import annotations

import ctypes
import socket
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns
from typing import Callable, Iterator

from figures import Figure
from lab import Lab
from runs import elfprobe

BATCHES, BATCH = 50, 400
RATE, PACED = 10000, 5000  # sockets per second, sockets
KINDS = {'UDP': socket.SOCK_DGRAM, 'TCP': socket.SOCK_STREAM}
LIBC = ctypes.CDLL(None)


def make(kind: int, number: int) -> int:
    """Make and close so many sockets; ns per socket."""
    family, create, close = int(socket.AF_INET), LIBC.socket, LIBC.close
    start = perf_counter_ns()
    for _ in range(number):
        close(create(family, kind, 0))
    return (perf_counter_ns() - start) // number


def unpaced(kind: int) -> float:
    return min(make(kind, BATCH) for _ in range(BATCHES))


def paced(kind: int) -> float:
    times, due = [], perf_counter_ns()
    for _ in range(PACED):
        while perf_counter_ns() < due:
            pass
        times.append(make(kind, 1))
        due += 10**9 // RATE
    return statistics.median(times)


MEASURES: dict[str, Callable[[int], float]] = {'one after the other': unpaced, f'{RATE:,} a second': paced}


def per_socket(quick: bool) -> Iterator[Figure]:
    rounds = 2 if quick else 8
    least: dict[tuple[str, str, bool], float] = {}
    with tempfile.TemporaryDirectory(prefix='elf-') as folder, Lab(routers=1) as lab:
        for number in range(2 * rounds):
            with ExitStack() as stack:
                if number % 2:
                    stack.enter_context(elfprobe(lab, '-a', 'speedtest', cwd=Path(folder)))
                for kind, how in ((kind, how) for kind in KINDS for how in MEASURES):
                    case = kind, how, bool(number % 2)
                    least[case] = min(MEASURES[how](KINDS[kind]), least.get(case, float('inf')))
    for kind, how in ((kind, how) for kind in KINDS for how in MEASURES):
        without, beside = least[kind, how, False], least[kind, how, True]
        yield Figure(f'socket() and close(), {kind}, {how}, -a', beside - without, 'ns', floor=without)
