"""What elfprobe finds, compared with what was so: tests/verdicts calls this.

A run is a list of truths (what was slow, where, from when until when) that slow_routers.py makes true, or a
simulator (--simulated). Half of the parameters come from the list of the goals, half are drawn from a seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.clock import utc_ns
from elf.findings import findings_on
from elf.rows import Record
from elf.summary import Summary
from lab import CommandFailed, Lab, end, interrupt_on_signals, wait_for_line, wait_until
from odd_routers import HOPS
from runs import elfprobe
from slow_routers import Effect, other_side, slow_routers

SIZES, SECONDS = (0.001, 0.005, 0.030), (0.3, 1, 4, 20)  # s; those of the goals
LOST = 0.01, 0.1  # shares
STATE_SECONDS = 20.0  # s
SETTLE, GAP = 6.0, 2.0  # s before the first truth, least between two
APPLICATIONS = 'upload', 'download', 'udp'  # each sends 500 bytes at a time, as often as it likes
QUIET_APPLICATIONS = 'upload', 'bursty', 'download', 'idle', 'udp'
BURSTS = {'bursty': (0.5, 100), 'idle': (1.0, 1)}  # s between two, packets of each; these upload
PORT = 7010
LOSSES = 'loss_episode', 'unanswered_episode'
OF_THE_RUN = 'loss', 'none_behind', 'too_few_behind', 'rate_limit'  # that tell of loss episodes, too
UNANSWERED_AFTER = 5.3e9  # ns until the row of an unanswered probe comes
WHOLE = 'loss', 'rate_limit', 'congestion_marks', 'responder_changes', 'outage'  # whose times are not compared
CAUSES = {'own': "it rises and falls with the flow's own", 'others': "others' traffic"}  # and words that tell
CHANGES = 'path_change', 'return_path_change'
CHANGE_OFF = 1.0  # s by which a change of the path may be told too early or too late

CLIENT = """
import select, socket, sys, time
kind, host, port, interval, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
family = socket.AF_INET6 if ':' in host else socket.AF_INET
is_udp = kind in ('udp', 'ecn')
s = socket.socket(family, socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM)
if kind == 'ecn':
    ipv6 = socket.IPPROTO_IPV6, socket.IPV6_TCLASS
    s.setsockopt(*(ipv6 if ':' in host else (socket.IPPROTO_IP, socket.IP_TOS)), 2)
s.connect((host, port))
if not is_udp:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
s.setblocking(False)
due = time.monotonic()
while True:
    for _ in range(count if kind != 'download' else 0):
        try:
            s.send(bytes(500))
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            pass
    due += interval
    while True:
        left = due - time.monotonic()
        if left <= 0:
            due = max(due, time.monotonic() - 0.05)
            break
        if select.select([s], [], [], left)[0]:
            try:
                if not s.recv(65536) and not is_udp:
                    sys.exit('closed')
            except (BlockingIOError, ConnectionRefusedError):
                pass
"""
SERVER = """
import select, socket, sys, time
kind, host, port, interval = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
family = socket.AF_INET6 if ':' in host else socket.AF_INET
if kind in ('udp', 'ecn'):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.bind((host, port))
    print('listens', file=sys.stderr, flush=True)
    n = 0
    while True:
        _, peer = s.recvfrom(65536)
        n += 1
        if n % 10 == 1:
            s.sendto(b'x', peer)
listener = socket.create_server((host, port), family=family)
print('listens', file=sys.stderr, flush=True)
s, _ = listener.accept()
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while s.recv(65536) if kind != 'download' else True:
    if kind == 'download':
        s.send(bytes(500))
        time.sleep(interval)
"""


@dataclasses.dataclass
class Truth:
    """Something that was so."""

    kind: str  # of the finding that tells it
    hop: int  # by which the finding names the place
    begin: float  # s
    end: float
    size: float  # s, or a share
    effect: str = 'forward'

    @property
    def is_large(self) -> bool:
        """Whether the goals ask that it be found."""
        return self.size >= (0.1 if self.kind in LOSSES else 0.005) and self.end - self.begin >= 1

    @property
    def link(self) -> int:
        return HOPS + 1 if self.kind == 'queue_beyond' else self.hop


@dataclasses.dataclass
class Told:
    """A finding."""

    kind: str
    hop: int
    begin: float
    end: float
    size: float
    low: float
    high: float
    sentence: str
    direction: str | None = None  # of loss


def truths(chance: random.Random, count: int, application: str) -> list[Truth]:
    """Return so many truths, one behind the other."""
    kinds = (
        ['queue'] * 4
        + ['slow_answers'] * 2
        + ['queue_in_front', 'path_change']
        + ['loss_episode'] * 2
        + ['return_path_change']
        + ['queue_beyond'] * (application == 'upload')
    )
    found, at = [], SETTLE
    for number in range(count):
        kind = chance.choice(kinds)
        size, seconds = chance.choice(SIZES), chance.choice(SECONDS)
        if number % 2:
            size, seconds = math.exp(chance.uniform(math.log(0.001), math.log(0.05))), chance.uniform(0.3, 5)
        hop, effect = chance.randint(2, HOPS), chance.choice(['forward', 'forward', 'back'])
        if kind == 'loss_episode':
            effect = 'loss' if effect == 'forward' else 'loss_back'
            size, seconds = chance.choice(LOST) if size in SIZES else size * 10, max(seconds, 1)
            if hop == HOPS and (application != 'upload' or effect == 'loss_back'):  # TCP does not tell
                kind = 'unanswered_episode'
        if kind == 'queue_in_front':
            hop = 1
        elif kind == 'queue_beyond':
            hop = HOPS
        elif kind == 'slow_answers':  # only TCP tells that of the last one
            hop, effect = chance.randint(1, HOPS if application == 'upload' else HOPS - 1), 'answers'
        if kind == 'path_change':  # and back; half of them without a change of delay
            size, seconds = size * chance.randint(0, 1), seconds + 3
            found.append(Truth(kind, hop, at + seconds, at + seconds, -size, ''))
            effect = 'way'
        if kind == 'return_path_change':  # and back
            size, seconds = chance.randint(1, 5), seconds + 3
            found.append(Truth(kind, hop, at + seconds, at + seconds, -size, ''))
            effect = 'rttl'
        if kind == 'queue' and hop == HOPS and application != 'upload':  # nothing behind tells
            kind = 'slow_last_hop'
        found.append(Truth(kind, hop, at, at + seconds, size, effect))
        at += seconds + GAP + chance.uniform(0, 1)
    return found


def states(chance: random.Random) -> Iterator[tuple[str, Truth]]:
    """Yield what is so for a whole run, each with the application that tells it."""
    for effect, kind, application, size in (
        ('loss', 'loss', 'udp', chance.choice((0.1, chance.uniform(0.03, 0.2)))),
        ('loss_back', 'loss', 'udp', chance.choice((0.1, chance.uniform(0.03, 0.2)))),
        ('limit', 'rate_limit', 'upload', chance.choice((10, chance.uniform(10, 60)))),
        ('mark', 'congestion_marks', 'ecn', chance.choice((0.1, chance.uniform(0.02, 1)))),
        ('balanced', 'responder_changes', 'udp', 0.0),
    ):
        # Behind the last hop nothing tells loss from a limit.
        yield application, Truth(kind, chance.randint(2, HOPS - 1), 0.0, STATE_SECONDS, size, effect)
    yield 'udp', Truth('outage', chance.randint(2, HOPS), SETTLE, SETTLE + chance.uniform(6, 10), 1.0, 'loss')


def measured(
    application: str, version: int, its: Sequence[Truth], seconds: float, interval: float = 0.002, keep: str = ''
) -> tuple[list[Truth], list[Told]]:
    """Return what was so, with the times at which it was, and what elfprobe found."""
    with tempfile.TemporaryDirectory(prefix='elf-verdicts-') as directory, ExitStack() as stack:
        lab = stack.enter_context(Lab(routers=1 if its else HOPS))  # a quiet run has the kernel's own routers
        routers = stack.enter_context(slow_routers(lab)) if its else None
        pattern = BURSTS.get(application, (interval, 1))
        arguments = application, lab.server_address(version), str(PORT), *map(str, pattern)
        options: dict[str, Any] = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        server = lab.server.popen(sys.executable, '-c', SERVER, *arguments, **options)
        wait_for_line(server, 'listens')
        lab.client.popen(sys.executable, '-c', CLIENT, *arguments, stderr=subprocess.DEVNULL)
        rows = Path(directory, 'elf.csv')
        with elfprobe(lab, '-n', lab.server_address(version), cwd=Path(directory)):
            hops = [f',{hop},' for hop in range(1, HOPS + 1)]
            wait_until(lambda: all(hop in rows.read_text() for hop in hops), 20, 'all hops answer')
            start = time.monotonic()
            done = [dataclasses.replace(each, begin=start + each.begin, end=start + each.end) for each in its]
            effects = [
                Effect(each.effect, each.link, each.begin, each.end, each.size) for each in done if each.effect
            ]
            if routers:
                routers.do(*effects)
            until = max([start + seconds, *(each.end + 2 for each in done)])
            wait_until(lambda: time.monotonic() > until, until - start + 10, 'all is over')
        report = json.loads(Path(directory, 'elf.json').read_text())
        if keep:
            shutil.copytree(directory, keep)
            Path(keep, 'truths.json').write_text(json.dumps(list(map(dataclasses.asdict, done)), indent=1))
    return done, list(told_by(report))


def shaped(cause: str, version: int, chance: random.Random, keep: str = '') -> tuple[list[Truth], list[Told]]:
    """Return the same of a real queue (tbf) behind the second of the kernel's routers, filled for some seconds.

    cause: 'own': by the probed flow, CUBIC, for as long as the link is slow; 'others': by another flow, and the
    probed one sends little. How large it is, only the finding tells.
    """
    slow = f'dev eth1 root tbf rate 20mbit burst 16kb latency {chance.choice((20, 40, 80))}ms'.split()
    seconds = chance.uniform(4, 8)
    with tempfile.TemporaryDirectory(prefix='elf-verdicts-') as directory, ExitStack() as stack:
        lab = stack.enter_context(Lab(routers=HOPS))
        stack.enter_context(lab.iperf3_server())
        server, quiet = lab.server_address(version), {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        if cause == 'own':
            lab.client.popen('iperf3', '-c', server, '-t', '60', '-b', '60M', **quiet)
        else:
            arguments = 'upload', server, str(PORT), '0.002', '1'
            listener = lab.server.popen(sys.executable, '-c', SERVER, *arguments, stderr=subprocess.PIPE)
            wait_for_line(listener, 'listens')
            lab.client.popen(sys.executable, '-c', CLIENT, *arguments, **quiet)
            lab.routers[1].run('tc', 'qdisc', 'add', *slow)
        rows = Path(directory, 'elf.csv')
        with elfprobe(lab, '-n', server, cwd=Path(directory)):
            wait_until(lambda: all(f',{hop},' in rows.read_text() for hop in range(1, HOPS + 1)), 20, 'answers')
            start = time.monotonic()
            wait_until(lambda: time.monotonic() > start + SETTLE, SETTLE + 10, 'what is usual')
            begin = time.monotonic()
            if cause == 'own':
                lab.routers[1].run('tc', 'qdisc', 'add', *slow)
            else:
                other = lab.routers[0].popen('iperf3', '-c', server, '-t', '60', **quiet)
            wait_until(lambda: time.monotonic() > begin + seconds, seconds + 10, 'the queue')
            if cause == 'own':
                lab.routers[1].run('tc', 'qdisc', 'del', *slow[:3])
            else:
                end(other)
            stop = time.monotonic()
            wait_until(lambda: time.monotonic() > stop + 4, 15, 'all is over')
        report = json.loads(Path(directory, 'elf.json').read_text())
        if keep:
            shutil.copytree(directory, keep)
    # tbf drops what its queue has no room for, which other findings tell.
    told = [each for each in told_by(report) if each.kind not in (*LOSSES, *OF_THE_RUN) or each.hop != 3]
    return [Truth('queue', 3, begin, stop, 0.0, cause)], told


def told_by(report: dict[str, Any]) -> Iterator[Told]:
    """Yield the findings of a report with times of CLOCK_MONOTONIC."""
    zero = utc_ns(report['monotonic_zero'])
    for each in report['findings']:
        begin, end = ((utc_ns(each[key]) - zero) / 1e9 for key in ('from', 'until'))
        yield Told(
            each['kind'],
            each['hop'],
            begin,
            end,
            *sizes(each['figures']),
            each['sentence'],
            each['figures'].get('direction'),
        )


def sizes(figures: dict[str, Any]) -> tuple[float, float, float]:
    """Return how large something was, and between what: s, or shares."""
    size, low, high = (figures.get(key) or 0 for key in ('share', 'share_low', 'share_high'))
    if 'longer_by' in figures:
        size = low = high = figures['longer_by']
    if 'rise' in figures:
        size, low, high = ((figures[key] or 0) / 1e9 for key in ('rise', 'rise_low', 'rise_high'))
    return size, low, high


def simulated(
    chance: random.Random,
    its: Sequence[Truth],
    seconds: float,
    rate: float = 100,
    noise: float = 50e-6,
    window: Callable[[float], float] = lambda at: 10,
    own: float = 0.0,
    application: str = 'upload',
    keep: list[Record] | None = None,
) -> tuple[list[Truth], list[Told]]:
    """Return the same of rows that are made up: a probe to each hop at this rate, TCP's round trip beside it.

    Latencies have a skewed noise; each second of probes meets bursts of other traffic at some link. window is the
    congestion window at a time; what is above 20 segments of it waits for so many s each in front of hop 3. A
    bursty or idle application has probes when it sends only.
    """
    base = [0.0, *itertools.accumulate(chance.uniform(0.0002, 0.01) for _ in range(HOPS + 1))]
    bursts = [
        (chance.uniform(0, seconds), chance.expovariate(100), chance.expovariate(500), chance.randint(1, HOPS + 1))
        for _ in range(int(seconds))
    ]

    def latency(hop: int, at: float) -> float:
        value = base[hop] + chance.gammavariate(1.2, noise) + own * max(window(at) - 20, 0) * (hop >= 3)
        if chance.random() < 0.01:
            value += chance.expovariate(500)
        for truth in its:
            if truth.kind not in (*LOSSES, *WHOLE, 'return_path_change') and truth.begin <= at < truth.end:
                value += truth.size * (hop == truth.hop if truth.kind == 'slow_answers' else hop >= truth.link)
        return value + sum(
            size for begin, lasts, size, link in bursts if begin <= at < begin + lasts and hop >= link
        )

    def answer_ttl(hop: int, at: float) -> int:
        on = [each for each in its if each.effect == 'rttl' and each.hop == hop and each.begin <= at < each.end]
        return 65 - hop - sum(int(each.size) for each in on)

    def fate(hop: int, at: float) -> str:
        for truth in its:
            is_there = hop == truth.hop if truth.effect == 'limit' else truth.kind in LOSSES and hop >= truth.hop
            if is_there and truth.begin <= at < truth.end and chance.random() < truth.size:
                return truth.effect
        return ''

    def responder(hop: int, at: float) -> str:
        others = [each for each in its if each.begin <= at < each.end and hop >= each.hop]
        is_balanced = any(each.effect == 'balanced' for each in others) and chance.random() < 0.5
        begun = [each.begin for each in others if each.effect == 'way' or is_balanced]
        return f'10.0.{hop}.{other_side(begun[0]) if begun else 2}'

    summary, rows, at, srtt, retrans = Summary(), [], 0.0, base[-1], 0
    answers = [0] * (HOPS + 1)
    for number in itertools.count():
        at += chance.uniform(0.6, 1.4) / (rate * HOPS)
        if application in BURSTS:
            every, packets = BURSTS[application]
            at += every * (number % max(packets // 5, 1) == 0)  # a probe for each fifth packet
        if at > seconds:
            break
        hop = number % HOPS + 1
        srtt += (latency(HOPS + 1, at) - srtt) / 8
        lost = fate(hop, at)
        answers[hop] += lost != 'loss'
        retrans += fate(HOPS + 1, at) == 'loss'  # each carrier is a segment
        answer = (int(latency(hop, at) * 1e9), responder(hop, at)) if not lost else (-1, '')
        rows.append(
            Record(
                '198.51.100.9', 4000, 80, 6, hop, int(at * 1e9), *answer, srtt=int(srtt * 1e6),
                cwnd=int(window(at)), retrans=retrans, origseq=number * 500,
                ripid=None if lost else answers[hop] & 0xFFFF, recvttl=-1 if lost else answer_ttl(hop, at),
            )
        )  # fmt: skip
    rows.sort(key=lambda row: row.sendtime + (row.latency if row.responder else UNANSWERED_AFTER))
    if keep is not None:
        keep += rows
    for place, row in enumerate(rows):
        summary.note(row)
        if place % 100 == 99:
            summary.digest()
    summary.digest(is_over=True)
    found = []
    for _, destination in summary.destinations():
        for finding in findings_on(destination):
            span, figures = finding.span(), finding.figures()
            if span:
                its_direction = figures.get('direction')
                begin, end = (each / 1e9 for each in span)
                found.append(
                    Told(finding.kind, finding.hop, begin, end, *sizes(figures), finding.text(), its_direction)
                )
    return list(its), found


HEADS = (
    'kind', 'found', 'of large ones', 'right place', 'precision', 'size off, median', 'size off, 90 %',
    'begin off, median', 'interval holds it',
)  # fmt: skip


class Score:
    """Verdicts by kind."""

    def __init__(self) -> None:
        self.truths: dict[str, list[tuple[Truth, Told | None]]] = defaultdict(list)
        self.false: dict[str, list[Told]] = defaultdict(list)
        self.quiet = 0.0  # s
        self.false_in_quiet = 0

    def add(self, its: Sequence[Truth], told: Sequence[Told], seconds: float) -> None:
        """Match each truth with the finding of its kind that overlaps it most; findings of no truth are false."""
        left = list(told)
        for truth in its:

            def overlap(each: Told, truth: Truth = truth) -> float:
                if truth.kind in CHANGES:
                    return CHANGE_OFF - abs(each.begin - truth.begin) if each.kind == truth.kind else -1
                return min(each.end, truth.end) - max(each.begin, truth.begin) - (truth.end - truth.begin) / 4

            def fits(each: Told, truth: Truth = truth) -> bool:
                are_last = each.hop == truth.hop == HOPS  # where TCP decides the kind, which lost few segments
                return each.kind == truth.kind or (are_last and each.kind in LOSSES and truth.kind in LOSSES)

            near = [each for each in left if fits(each) if truth.kind in WHOLE or overlap(each) > 0]
            near += [each for each in left if not fits(each) and overlap(each) > 0]
            near.sort(key=lambda each: (fits(each), each.hop == truth.hop, overlap(each)))
            match = near[-1] if near and fits(near[-1]) else None
            if match:
                left.remove(match)
            if truth.kind in LOSSES:
                left = [each for each in left if each.kind not in OF_THE_RUN]
            if truth.kind == 'loss':  # it begins after the first probes
                left = [each for each in left if each.kind not in LOSSES or each.hop != truth.hop]
            if truth.kind == 'responder_changes':  # the hops behind change, too
                left = [each for each in left if each.kind != truth.kind or each.hop < truth.hop]
            self.truths[truth.kind].append((truth, match))
        for each in left:
            self.false[each.kind].append(each)
        if not its:
            self.quiet += seconds
            self.false_in_quiet += len(left)

    def lines(self) -> Iterator[str]:
        """Yield a table."""
        yield f'| {" | ".join(HEADS)} |'
        yield f'|{" --- |" * len(HEADS)}'
        for kind in sorted({*self.truths, *self.false}):
            its, false = self.truths[kind], len(self.false[kind])
            found = [(truth, match) for truth, match in its if match]
            large = [match for truth, match in its if truth.is_large]
            off = sorted(abs(match.size / truth.size - 1) for truth, match in found if match.size and truth.size)
            late = [abs(match.begin - truth.begin) for truth, match in found]
            cells = [
                kind,
                percent(len(found), len(its)),
                percent(sum(match is not None for match in large), len(large)),
                percent(sum(match.hop == truth.hop for truth, match in found), len(found)),
                percent(len(found), len(found) + false),
            ]
            if off:
                tenth = off[int(0.9 * (len(off) - 1))]
                cells += [
                    f'{statistics.median(off):.1%}',
                    f'{tenth:.1%}',
                    f'{statistics.median(late) * 1e3:.0f} ms',
                    percent(sum(match.low <= truth.size <= match.high for truth, match in found), len(found)),
                ]
            else:
                cells += ['-'] * 4
            yield f'| {" | ".join(cells)} |'
        lost = [pair for kind in LOSSES for pair in self.truths.get(kind, ()) if pair[1]]
        if lost:
            ways = {'loss': 'there', 'loss_back': 'back'}
            told = [ways[truth.effect] == match.direction for truth, match in lost if match and match.direction]
            yield ''
            yield f'Direction of loss: told of {len(told)} of {len(lost)}, right of {sum(told)}.'
        queues = [pair for pair in self.truths.get('queue', ()) if pair[1] and pair[0].effect in CAUSES]
        if queues:
            said = [
                (truth.effect, cause)
                for truth, match in queues
                for cause, words in CAUSES.items()
                if match and words in match.sentence
            ]
            right = sum(truth == cause for truth, cause in said)
            yield ''
            yield f'Whose queue (tbf): told of {len(said)} of {len(queues)}, right of {right}.'
        if self.quiet:
            yield ''
            yield f'Quiet runs: {self.quiet / 60:.1f} minutes, {self.false_in_quiet} false findings.'

    def missed(self) -> Iterator[str]:
        for its in self.truths.values():
            for truth, match in its:
                if not match:
                    yield f'missed: {truth}'
                elif match.hop != truth.hop:
                    yield f'wrong place: {truth} {match.sentence}'
        for its_ in self.false.values():
            for told in its_:
                yield f'false: {told.begin:.2f}-{told.end:.2f} {told.kind} {told.sentence}'


def percent(part: int, whole: int) -> str:
    return f'{part / whole:.1%} of {whole}' if whole else '-'


def main() -> int:
    interrupt_on_signals()
    parser = argparse.ArgumentParser(
        prog='verdicts', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--seed', type=int, default=int(time.time()), help='of the random half (default: the time)')
    parser.add_argument(
        '--simulated', action='store_true', help='made-up rows in place of packets: many in little time'
    )
    parser.add_argument('--runs', type=int, default=6, metavar='N', help='runs with truths (default: 6)')
    parser.add_argument('--truths', type=int, default=20, metavar='N', help='in each run (default: 20)')
    parser.add_argument('--quiet', type=int, default=1, metavar='N', help='runs without any (default: 1)')
    parser.add_argument(
        '--quiet-seconds', type=float, default=60, metavar='S', help='of each of these (default: 60)'
    )
    parser.add_argument(
        '--keep', default='', metavar='NAME', help='keep the files of each run in NAME-1, NAME-2 ...'
    )
    parser.add_argument(
        '--states', type=int, default=1, metavar='N', help='rounds of loss and the like (default: 1)'
    )
    parser.add_argument(
        '--queues', type=int, default=1, metavar='N', help='rounds of real queues: own, others (default: 1)'
    )
    args = parser.parse_args()
    print(f'seed {args.seed}', flush=True)
    chance, score = random.Random(args.seed), Score()
    plan: list[tuple[str, list[Truth], float]] = []  # application, truths, seconds
    for number in range(args.runs):
        application = 'upload' if args.simulated else APPLICATIONS[number % len(APPLICATIONS)]
        its = truths(chance, args.truths, application)
        plan.append((application, its, its[-1].end + 2))
    for number in range(args.quiet):
        plan.append((QUIET_APPLICATIONS[number % len(QUIET_APPLICATIONS)], [], args.quiet_seconds))
    for _ in range(0 if args.simulated else args.states):
        plan += [(application, [truth], STATE_SECONDS) for application, truth in states(chance)]
    for _ in range(0 if args.simulated else args.queues):
        plan += [(cause, [], 0) for cause in CAUSES]
    for number, (application, its, seconds) in enumerate(plan, 1):
        version = (4, 6)[number // len(APPLICATIONS) % 2]
        try:
            if args.simulated:
                rate, noise = chance.choice((50, 100)), math.exp(chance.uniform(math.log(20e-6), math.log(500e-6)))
                found = simulated(chance, its, seconds, rate, noise, application=application)
            elif application in CAUSES:
                found = shaped(application, version, chance, args.keep and f'{args.keep}-{number}')
            else:
                found = measured(application, version, its, seconds, keep=args.keep and f'{args.keep}-{number}')
        except CommandFailed as failure:
            print(f'verdicts: {failure}', file=sys.stderr)
            return 1
        score.add(*found, seconds)
        what = f'{application}, IPv{version}, {len(its)} truths, {len(found[1])} findings'
        print(f'run {number} of {len(plan)}: {what}', flush=True)
    print(*score.missed(), '', *score.lines(), sep='\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
