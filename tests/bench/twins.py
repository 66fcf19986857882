"""Two labs side by side, one with elfprobe, in short turns: what elfprobe costs traffic, within a few per cent.

    client - r1 - r2 - r3 - r4 - server     elfprobe, or empty programs, at one end's device
    client - r1 - r2 - r3 - r4 - server     nothing

A machine drifts by more than elfprobe costs, within seconds. So the two labs make the same traffic in turns of
a fraction of a second, and a ratio ("on / off") divides one turn by the turn beside it. One lab may be faster
than the other, by a fifth. So elfprobe changes sides after each round, and the figure is the median of the
geometric means of a ratio on one side and one on the other. The interval beside it contains the median with
95 % confidence (order statistics). "nothing" attaches nothing and shows how exact the method is. The floor is
the ratio for empty programs at TC ingress and TC egress.

The ends run on a processor each, and so everything else competes with them: elfprobe, and the routers, which
answer 400 probes a second here. "a probe a second" (-p 1000) shows what is left without that.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, Iterator, List

from compare import APP, EMPTY_XDP, Comparison, Modes, Scene
from figures import Figure
from lab import Lab, kernel_counters, wait_until
from loaded import load
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
ANSWERED = 'request and response, TCP', 'TCP connections, one byte each way'  # measured at the server, too


Twins = List[Scene]  # one of each lab


@contextmanager
def twins(routers: int) -> Iterator[tuple[Twins, Twins]]:
    """Two labs, from their clients and from their servers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='elf-')))
        programs = stack.enter_context(load(ingress_tc=False))
        labs = [stack.enter_context(Lab(routers)) for _ in range(2)]
        clients = [Scene(lab, programs, folder, lab.client) for lab in labs]
        # -a is to find the server of one lab only.
        servers = [Scene(lab, programs, folder, lab.server, f'server{index}') for index, lab in enumerate(labs)]
        for scene in servers:
            scene.host.popen(
                str(scene.python(scene.app)), '-I', '-S', str(TRAFFIC), 'serve', scene.lab.server_address(4)
            )
            wait_until(lambda scene=scene: scene.host.listens(ECHO), 10, 'the server listens')  # type: ignore[misc]
        yield clients, servers


def throughput(quick: bool) -> Iterator[Figure]:
    """Yield figures of TCP in bulk. Upload is what leaves by elfprobe's device, download what arrives there."""
    for where, routers in TOPOLOGIES.items():
        with twins(routers) as (at, _):
            for what, kind in TRANSFERS.items():
                yield from compared(at, f'{where}, {what}', kind, 1e9 / 8, 'Gbit/s', quick)


def transactions(quick: bool) -> Iterator[Figure]:
    """Yield figures of those who wait: request and response, new connections; and of small datagrams."""
    with twins(4) as (at, servers):
        for what, kind in TRANSACTIONS.items():
            yield from compared(at, what, kind, 1, '1/s', quick)
        for what in ANSWERED:
            yield from compared(servers, f'{what}, at the server', TRANSACTIONS[what], 1, '1/s', quick)


def compared(at: Twins, what: str, kind: str, divisor: float, unit: str, quick: bool) -> Iterator[Figure]:
    rounds, turns, seconds = (2, 6, 0.1) if quick else (4, 12, 0.2)
    names = [mode for mode in modes_of(at[0]) if mode != EMPTY_XDP or kind.startswith('download')]
    comparison, resent = Comparison(), dict.fromkeys(names, 0)
    measured: dict[str, list[list[tuple[float, float]]]] = {mode: [] for mode in names}  # by round
    for number, mode in product(range(rounds), names):
        scene, beside = at if number % 2 else reversed(at)
        with modes_of(scene)[mode](), clients(scene, beside, kind) as (on, off):
            before = segments_resent(scene.lab)
            measured[mode].append([])
            for turn in range(turns):
                first, second = (on, off) if turn % 2 else (off, on)
                done = {first: first(seconds), second: second(seconds)}
                measured[mode][-1].append((done[on] / divisor, done[off] / divisor))
            resent[mode] += segments_resent(scene.lab) - before
    for mode, by_round in measured.items():
        for left, right in zip(by_round[::2], by_round[1::2]):
            for on_and_off in zip(left, right):
                comparison.add(what, mode, *map(statistics.geometric_mean, zip(*on_and_off)))
    yield from comparison.figures(what, unit, lambda mode: f'{resent[mode]} resent' if resent.get(mode) else '')


def modes_of(scene: Scene) -> Modes:
    return {NOTHING: nullcontext, **scene.modes(), RARELY: partial(scene.elfprobe, '-p', '1000', scene.target)}


Turn = Callable[[float], float]


@contextmanager
def clients(scene: Scene, beside: Scene, kind: str) -> Iterator[tuple[Turn, Turn]]:
    """Yield a turn for each client. Only the client in elfprobe's lab has the name APP."""
    with ExitStack() as stack:
        made = []
        for lab, name in ((scene.lab, APP), (beside.lab, 'beside')):
            process = lab.client.popen(
                str(scene.python(name)), '-I', '-S', str(TRAFFIC), kind, lab.server_address(4), stdin=-1, stdout=-1
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
