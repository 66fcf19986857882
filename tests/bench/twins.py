"""Two labs side by side, one with elfprobe, in short turns: what elfprobe costs traffic, within a few per cent.

    client - r1 - r2 - r3 - r4 - server     elfprobe, or empty programs, at the client's device
    client - r1 - r2 - r3 - r4 - server     nothing

A machine drifts by more than elfprobe costs, within seconds. So the two labs make the same traffic in turns of
a fraction of a second, and each ratio ("on / off") divides one turn by the turn beside it. The figure is the
median of all; the interval beside it contains the median with 95 % confidence (order statistics). "nothing"
attaches nothing and shows how exact the method is. The floor is the ratio for empty programs at TC ingress and
TC egress.

The ends run on a processor each, and so everything else competes with them: elfprobe, and the routers, which
answer 400 probes a second here. "a probe a second" (-p 1000) shows what is left without that.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterator, NamedTuple

from compare import APP, EMPTY_XDP, Comparison, Scene
from figures import Figure
from lab import Lab, kernel_counters, wait_until
from loaded import load
from runs import elfprobe
from traffic import ECHO

TRAFFIC = Path(__file__).with_name('traffic.py')
NOTHING, RARELY = 'nothing', 'a probe a second'
TOPOLOGIES = {'four routers': 4, 'direct veth': 0}  # their routers
TRANSFERS = {
    'upload, 1 stream': 'upload',
    'upload, 8 streams': 'upload8',
    'download, 1 stream': 'download',
    'download, 8 streams': 'download8',
}
TRANSACTIONS = {
    'request and response, TCP': 'tcp',
    'request and response, UDP': 'udp',
    'TCP connections, one byte each way': 'connect',
    'UDP of 64 bytes, sent': 'datagrams',
}


class Twins(NamedTuple):
    """The lab with elfprobe and the lab without."""

    scene: Scene
    beside: Lab

    @property
    def labs(self) -> tuple[Lab, Lab]:
        return self.scene.lab, self.beside


@contextmanager
def twins(routers: int) -> Iterator[Twins]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='elf-')))
        programs = stack.enter_context(load(ingress_tc=False))
        on, off = (stack.enter_context(Lab(routers)) for _ in range(2))
        for lab in (on, off):
            lab.server.popen(sys.executable, '-I', '-S', str(TRAFFIC), 'serve', lab.server_address(4))
            wait_until(lambda lab=lab: lab.server.listens(ECHO), 10, 'the server listens')  # type: ignore[misc]
        yield Twins(Scene(on, programs, folder), off)


def throughput(quick: bool) -> Iterator[Figure]:
    """Yield figures of TCP in bulk. Upload is what leaves by elfprobe's device, download what arrives there."""
    for where, routers in TOPOLOGIES.items():
        with twins(routers) as at:
            for what, kind in TRANSFERS.items():
                yield from compared(at, f'{where}, {what}', kind, 1e9 / 8, 'Gbit/s', quick)


def transactions(quick: bool) -> Iterator[Figure]:
    """Yield figures of those who wait: request and response, new connections; and of small datagrams."""
    with twins(4) as at:
        for what, kind in TRANSACTIONS.items():
            yield from compared(at, what, kind, 1, '1/s', quick)


def compared(at: Twins, what: str, kind: str, divisor: float, unit: str, quick: bool) -> Iterator[Figure]:
    rounds, turns, seconds = (1, 6, 0.1) if quick else (3, 12, 0.2)
    address, folder = at.scene.lab.server_address(4), at.scene.folder
    modes: dict[str, Callable[[], ContextManager[Any]]] = {
        NOTHING: nullcontext,
        **at.scene.modes(),
        RARELY: partial(elfprobe, at.scene.lab, '-p', '1000', address, cwd=folder),
    }
    if not kind.startswith('download'):
        del modes[EMPTY_XDP]
    comparison, resent = Comparison(), dict.fromkeys(modes, 0)
    for number, mode in product(range(rounds), modes):
        with modes[mode](), clients(at, kind) as (on, off):
            before = segments_resent(at.scene.lab)
            for turn in range(turns):
                first, second = (on, off) if turn % 2 else (off, on)
                done = {first: first(seconds), second: second(seconds)}
                if number or turn:  # the first turn of all fills caches
                    comparison.add(what, mode, done[on] / divisor, done[off] / divisor)
            resent[mode] += segments_resent(at.scene.lab) - before
    yield from comparison.figures(what, unit, lambda mode: f'{resent[mode]} resent' if resent.get(mode) else '')


Turn = Callable[[float], float]


@contextmanager
def clients(at: Twins, kind: str) -> Iterator[tuple[Turn, Turn]]:
    """The two clients; only the one beside elfprobe has the name that -a looks for."""
    with ExitStack() as stack:
        made = []
        for lab, name in zip(at.labs, (APP, 'beside')):
            program = at.scene.program(Path(sys.executable).resolve(), name)
            process = lab.client.popen(
                str(program), '-I', '-S', str(TRAFFIC), kind, lab.server_address(4), stdin=-1, stdout=-1
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            made.append(partial(turn_of, process))
            made[-1](0.05)  # connections open, windows grow
        yield made[0], made[1]


def turn_of(process: Any, seconds: float) -> float:
    """Have a client make traffic; return how much a second."""
    process.stdin.write(f'{seconds}\n')
    process.stdin.flush()
    return float(process.stdout.readline())


def segments_resent(lab: Lab) -> int:
    return sum(kernel_counters(host)['TcpRetransSegs'] for host in (lab.client, lab.server))
