"""Findings with a time, a place and a size, against what was so. tests/verdicts does the same at length.

client - r1, which is HOPS routers (slow_routers.py) - server
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.episodes import Comparisons
from elf.findings import findings_on
from elf.histogram import LatencyHistogram
from elf.inference import fisher, holm, median_interval, spearman, spearman_highest
from elf.losses import OPEN_MAX, Losses
from elf.rows import ALWAYS_THERE, HEADER, NAMES, Record
from elf.summary import Summary
from elf.unmatched import Sent, Unmatched, UnmatchedAnswers, find_offset
from runs import ELFPROBE
from verdicts import LOSSES, Score, Truth, measured, simulated, sizes, truths

root = pytest.mark.root


# Statistics


def test_exact_tests_are_exact() -> None:
    """Fisher's tea tasting; a coin; a correlation that is perfect, and one that is none."""
    assert math.isclose(fisher(4, 4, 0, 4), 1 / 70) and math.isclose(fisher(3, 4, 1, 4), 17 / 70)
    assert fisher(0, 4, 2, 4) == 1
    assert fisher(1000, 20000, 3000, 60000) == pytest.approx(0.5064, abs=1e-4)  # large, and not slow
    assert fisher(20, 100, 3000, 60000) == pytest.approx(1.4e-7, rel=0.5)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.001], tests=20) == pytest.approx([0.02])
    chance = random.Random(3)
    first, second = ([chance.random() for _ in range(200)] for _ in range(2))
    assert spearman(first, [each**3 for each in first])[0] == pytest.approx(1)
    rho, p = spearman(first, second)
    assert abs(rho) < 0.2 and p > 0.01 and rho < spearman_highest(first, second) < rho + 0.2


@pytest.mark.parametrize('count', [5, 10, 30, 200])
def test_intervals_hold_the_median_as_often_as_they_say(count: int) -> None:
    chance = random.Random(count)
    held = 0
    for _ in range(1000):
        _, low, high = median_interval([chance.expovariate(1) for _ in range(count)])
        held += low <= math.log(2) <= high
    assert 0.9 <= held / 1000 <= 0.995


# Episodes, on rows that are made up


def test_episodes_are_found_where_they_are() -> None:
    """Each kind, 0.3 s and longer, 1 ms and more; none is made up."""
    chance, score = random.Random(5), Score()
    for _ in range(2):
        its = [each for each in truths(chance, 14, 'upload') if each.kind not in LOSSES]
        score.add(*simulated(chance, its, its[-1].end + 2), 0)
    assert not list(score.missed())
    found = [each for its_ in score.truths.values() for each in its_]
    assert len(found) >= 24 and set(score.truths) == {
        'queue', 'queue_in_front', 'queue_beyond', 'slow_answers', 'path_change',
        'return_path_change',
    }  # fmt: skip
    for truth, match in found:
        assert match and abs(match.size - truth.size) < 0.1 * abs(truth.size) + 0.0002, (truth, match)


def test_nothing_is_found_where_nothing_is() -> None:
    chance = random.Random(6)
    for rate, noise, seconds in (100, 50e-6, 60), (25, 2e-3, 120), (400, 1e-4, 15):
        assert simulated(chance, [], seconds, rate, noise)[1] == []


def test_a_level_that_lasts_becomes_the_usual_one() -> None:
    """After ten minutes. What comes on top of it then counts from there."""
    its = [Truth('queue', 3, 40, 720, 0.02), Truth('queue', 3, 690, 705, 0.03)]
    first, second = simulated(random.Random(6), its, 720, rate=10)[1]
    assert 590 < first.end - first.begin < 640 and second.size == pytest.approx(0.03, rel=0.05)


def test_strangers_traceroutes_take_no_room() -> None:
    """Answers to flows without a probe are forgotten. One to a probed flow that nothing explains is told."""
    summary = Summary()
    flow = '203.0.113.80', 40000, 443, 6
    summary.note(Record(flow[0], *flow[1:], responder='', latency=-1, sendtime=1, outttl=3))
    unmatched = UnmatchedAnswers(summary)
    for number in range(5000):
        stranger = flow[0], number, 80, 6
        unmatched.note(stranger, Unmatched(number, 0, 40, 1, '192.0.2.1', b''))
        unmatched.drop(stranger)
    unmatched.note(flow, Unmatched(1, 0, 40, 1, '192.0.2.3', b''))
    (found,) = unmatched.findings()
    assert (found.kind, found.hop, found.responder, found.answers) == ('near_miss', 3, '192.0.2.3', 1)


def test_packets_that_are_balanced_are_no_changes_of_the_path() -> None:
    assert simulated(random.Random(8), [Truth('responder_changes', 3, 5, 20, 0, 'balanced')], 25)[1] == []


def test_own_traffic_is_told_from_that_of_others() -> None:
    """A queue that the flow itself fills when its window opens, and one beside a window that changes as much."""

    def window(at: float) -> float:
        return 10 if at < 8 else 15 + 30 * abs((at / 5) % 2 - 1)

    (own,) = (each for each in simulated(random.Random(7), [], 30, window=window, own=0.001)[1][:1])
    assert (own.kind, own.hop) == ('queue', 3) and 'own congestion window' in own.sentence
    its = [Truth('queue', 3, 15, 25, 0.01)]
    (others,) = simulated(random.Random(7), its, 30, window=lambda at: 10 + 30 * math.sin(at * 1e4 // 1500) ** 2)[1]
    assert "; others' traffic: it does not go with the flow's own congestion window" in others.sentence
    for unknown in lambda at: 10, window:  # it says nothing if it is constant, and too little if it changes slowly
        (others,) = simulated(random.Random(7), its, 30, window=unknown)[1]
        assert 'own congestion window' not in others.sentence


LOSS = Truth('loss_episode', 3, 20, 24, 0.1, 'loss')
LIMITED = Truth('rate_limit', 2, 0, 60, 0.5, 'limit')
ALWAYS = Truth('loss_episode', 1, 0, 60, 0.05, 'loss')
LOST = {
    'on the way there': ([LOSS], 'there'),
    'on the way back': ([dataclasses.replace(LOSS, effect='loss_back')], 'back'),
    'all for a moment': ([Truth('loss_episode', 2, 20, 20.4, 1, 'loss')], 'there'),
    'behind a router that limits its answers': ([LIMITED, LOSS], 'there'),
    'where some is usual': ([ALWAYS, dataclasses.replace(LOSS, size=0.2)], 'there'),
    'at the last hop': ([Truth('loss_episode', 4, 20, 24, 0.1, 'loss')], 'there'),
    'limited answers alone, for a while': ([dataclasses.replace(LIMITED, begin=20, end=30)], ''),
    'usual loss alone': ([ALWAYS], ''),
}


@pytest.mark.parametrize('its, direction', LOST.values(), ids=LOST)
def test_loss_is_found_when_and_where_it_is(its: list[Truth], direction: str) -> None:
    """With the share, and whether probes or answers were lost: the routers' IP identifications count answers."""
    found = simulated(random.Random(4), its, 45, rate=60)[1]
    assert len(found) == bool(direction), found
    for each in found:
        truth = its[-1]
        assert (each.kind, each.hop, each.direction) == ('loss_episode', truth.hop, direction)
        assert abs(each.begin - truth.begin) < (3 if ALWAYS in its else 0.5) and abs(each.end - truth.end) < 0.5
        usual = sum(other.size for other in its if other is ALWAYS)
        assert each.low <= truth.size + usual * (1 - truth.size) <= each.high, each


def test_loss_that_lasts_becomes_usual_and_an_outage_is_no_loss() -> None:
    """After ten minutes the share is usual. No answer at all for seconds is told as an outage only."""
    (lasting,) = simulated(random.Random(6), [Truth('loss_episode', 2, 40, 800, 0.3, 'loss')], 800, rate=10)[1]
    assert lasting.begin == pytest.approx(40, abs=1) and 590 < lasting.end - lasting.begin < 700
    kinds = {
        each.kind for each in simulated(random.Random(6), [Truth('loss_episode', 3, 20, 26, 1, 'loss')], 40)[1]
    }
    assert kinds == {'outage'}


def test_hops_that_vanish_for_a_while_lose_nothing() -> None:
    """The path becomes shorter by two hops: probes in flight to them have no answer, and none follow."""
    summary = Summary()
    flow = '203.0.113.80', 40000, 443, 6
    for step in range(8000):
        for hop in range(1, 7):
            is_gone = hop > 4 and 4000 <= step < 6000
            if not is_gone or step < 4040:
                its = Record(
                    *flow, outttl=hop, sendtime=step * 10**7 + hop, latency=-1 if is_gone else 10**6 * hop,
                    responder='' if is_gone else f'192.0.2.{hop}', srtt=7000, cwnd=10, retrans=0, origseq=step,
                )  # fmt: skip
                summary.note(its)
        if step % 50 == 0:
            summary.digest()
    summary.digest(is_over=True)
    (destination,) = (destination for _, destination in summary.destinations())
    assert [finding.kind for finding in findings_on(destination) if finding.span()] == []


def test_destinations_that_never_answer_take_no_memory() -> None:
    """Of one that stopped answering, a bounded number of moments waits."""
    losses = Losses(Comparisons())
    for moment in range(3000):
        losses.add_unanswered(2, moment, 1)
    assert not losses._open
    losses.note_moment(1, LatencyHistogram(), 3000, 0, '192.0.2.1', None)
    for moment in range(3000, 9000):
        losses.note_unanswered(2, moment)
    assert len(losses._open) <= OPEN_MAX


def test_a_few_expired_packets_are_no_ack_filter() -> None:
    """Packets of the application that end at routers, as in a routing loop: for a moment, or now and then."""
    unmatched = UnmatchedAnswers(Summary())

    def is_told_after(*seconds: float, dest: str = '203.0.113.80') -> bool:
        flow = dest, 40000, 443, 6
        for second in seconds:
            at = int(second * 10**9)
            sent = Sent(1000, 3048, 7, at, 3, b'', b'')
            unmatched.note(flow, Unmatched(3048, 7, 40, at + 10**6, '192.0.2.3', b''))
            assert not list(unmatched.match(flow, {sent.number: sent}))
        return [(each.dest, each.hop) for each in unmatched.take_ack_filters()] == [(flow[0], 3)]

    assert not is_told_after(1, 1.1)
    assert not is_told_after(100) and not is_told_after(170) and not is_told_after(240)
    assert is_told_after(241) and not is_told_after(300, 300.1, 300.2), 'only once'
    assert is_told_after(300, 300.1, 300.2, dest='203.0.113.81')


def test_signs_of_ack_filters_are_not_kept_for_long() -> None:
    """One for each of many destinations: an address scan through a routing loop."""
    unmatched = UnmatchedAnswers(Summary())
    for number in range(500):
        flow, at = (f'203.0.{number >> 8}.{number & 255}', 40000, 443, 6), number * 10**9
        sent = Sent(1000, 3048, 7, at, 3, b'', b'')
        unmatched.note(flow, Unmatched(3048, 7, 40, at + 10**6, '192.0.2.3', b''))
        assert not list(unmatched.match(flow, {sent.number: sent}))
        unmatched.forget(at)
        assert not unmatched.take_ack_filters()
    assert len(unmatched._overwritten) < 100


@pytest.mark.parametrize('version, ip_id, is_found', [(4, 7, True), (4, 0, False), (6, 7, False)])
def test_one_answer_tells_an_offset_only_if_it_can_quote_one_probe(
    version: int, ip_id: int, is_found: bool
) -> None:
    """In IPv6, and with an identification of 0, any packet of the flow fits. Two that agree are enough."""
    sent = {number: Sent(number, 9000, ip_id, 1, 3, b'', b'') for number in (1000, 2000)}
    responder = '192.0.2.3' if version == 4 else '2001:db8::3'
    answers = [Unmatched(number + 10**6, ip_id, 80, 10**6, responder, b'') for number in sent]
    assert (find_offset(answers[:1], [sent[1000]], 0) == 10**6) == is_found
    assert find_offset(answers, sent.values(), 0) == 10**6
    assert find_offset([answers[0]._replace(is_copy=True)], [sent[1000]], 0) == 0


def test_a_change_of_the_way_back_is_told() -> None:
    """Of some hops. Not if packets come back over two ways in turn, or the way there changes, too."""
    its = [Truth('return_path_change', hop, 10, 20, 2, 'rttl') for hop in (2, 3)]
    longer, shorter = simulated(random.Random(3), its, 30)[1]
    assert (longer.kind, longer.hop, longer.size) == ('return_path_change', 2, 2)
    assert abs(longer.begin - 10) < 0.2 and abs(shorter.begin - 20) < 0.2 and shorter.size == -2
    assert 'back from hop 2 (10.0.2.2) (and from hop 3) became longer by 2 hops' in longer.sentence
    chance = random.Random(3)
    begins = [10 + chance.random() * 10 for _ in range(400)]
    in_turn = [Truth('return_path_change', 2, begin, begin + chance.random() / 20, 2, 'rttl') for begin in begins]
    assert simulated(chance, in_turn, 30)[1] == []
    both = [*its, Truth('path_change', 2, 10, 20, 0, 'way')]
    assert {each.kind for each in simulated(random.Random(3), both, 30)[1]} == {'path_change'}


def test_elfplot_finds_the_same(tmp_path: Path) -> None:
    """In bulk, over the borders of blocks, batches and files."""
    np = pytest.importorskip('numpy')
    assert np
    from elf.sources import FOREVER, Window, read, sources_of

    chance = random.Random(9)
    its = truths(chance, 8, 'upload')
    its.append(Truth('loss_episode', 2, its[-1].end + 3, its[-1].end + 6, 0.1, 'loss'))
    its.append(Truth('return_path_change', 3, its[-1].end + 3, its[-1].end + 6, 2, 'rttl'))
    rows: list[Record] = []
    _, told = simulated(chance, its, its[-1].end + 2, keep=rows)
    columns = dict.fromkeys(NAMES, '')
    for part, its_rows in enumerate((rows[: len(rows) // 3], rows[len(rows) // 3 :])):
        lines = (
            ','.join(
                str(value) for value in {**columns, **dict.fromkeys(NAMES[:ALWAYS_THERE], 0), **fields}.values()
            )
            for fields in (
                {name: '' if value is None else value for name, value in row._asdict().items() if name in NAMES}
                for row in its_rows
            )
        )
        (tmp_path / f'{part}.csv').write_text(HEADER + '\n'.join(lines) + '\n')
    (source,), _ = sources_of([str(tmp_path / f'{part}.csv') for part in (0, 1)])
    summary = read(source, False, Window(0, FOREVER, []), 5).summary
    (destination,) = (destination for _, destination in summary.destinations())
    found = [finding for finding in findings_on(destination) if finding.span()]
    assert [(each.kind, each.hop) for each in found] == [(each.kind, each.hop) for each in told]
    for finding, each in zip(found, told):
        size, _, _ = sizes(finding.figures())
        assert abs(size - each.size) < 0.02 * abs(each.size) + 50e-6
    assert {'loss_episode', 'return_path_change'} <= {each.kind for each in told}


# Real packets


def in_words(sentence: str) -> str:
    """Return a sentence without its times and sizes."""
    return re.sub(r'\d+:\d+:[\d.]+|[\d.]+(?=[–\s%)]|$)', '#', sentence)


@root
def test_findings_of_real_packets(tmp_path: Path) -> None:
    """The table, elf.json and elfplot.py say the same: a slow link, a slow router, the way to the server, loss."""
    its = [
        Truth('queue', 3, 3, 4.5, 0.02),
        Truth('slow_answers', 2, 6, 7.5, 0.02, 'answers'),
        Truth('queue_beyond', 4, 9, 11, 0.03, 'back'),
        Truth('loss_episode', 2, 13, 15, 0.2, 'loss_back'),
    ]
    kept = tmp_path / 'kept'
    done, told = measured('upload', 4, its, 12, keep=str(kept))
    for truth in done:
        # The processes of the lab may wait for a core meanwhile, so that it has a gap.
        its_parts = [each for each in told if (each.kind, each.hop) == (truth.kind, truth.hop) and each.size > 0.01]
        assert its_parts, truth
        for match in its_parts:
            assert match.direction == ('back' if truth.kind == 'loss_episode' else None)
            assert abs(match.size - truth.size) < 0.1 * truth.size + 0.001 or match.direction, match
        assert abs(its_parts[0].begin - truth.begin) < 0.6, its_parts
        assert abs(its_parts[-1].end - truth.end) < 0.8, its_parts
    report = json.loads((kept / 'elf.json').read_text())
    found = [each for each in report['findings'] if each['kind'] in {truth.kind for truth in its}]
    queue = next(each for each in found if each['kind'] == 'queue' and each['figures']['rise'] > 10**7)
    assert queue['sure'] > 0.99 and queue['figures']['front'] == 2 and queue['figures']['behind'] == [4]
    assert queue['figures']['tcp_share'] > 0.8
    if find_spec('matplotlib') is None:
        return
    elfplot = sys.executable, str(ELFPROBE.with_name('elfplot.py')), 'elf.csv'
    shown = subprocess.run(elfplot, cwd=kept, stdout=subprocess.PIPE, text=True, check=True).stdout
    # Figures may differ a little: a run on a busy machine looks for episodes in a sample.
    said = [in_words(line) for line in shown.splitlines()]
    for each in found:
        if each['figures'].get('rise', 10**8) > 10**7:
            assert in_words(each['sentence']) in said
