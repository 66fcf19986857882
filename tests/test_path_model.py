"""The path model of elfprobe.c without a kernel: tables of events and what becomes of a path, then a fuzzer.

A longer run of the fuzzer: ELFPROBE_FUZZ_PATHS=1000000 tests/run test_path_model.py -k fuzzer
"""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Dict

import pytest

import path_model
from path_model import (
    BACKING_OFF,
    FALLBACK,
    GUARDED,
    HOP_UNRESPONSIVE,
    NONE_DUE,
    RETRIED_EARLY,
    USUAL,
    Path_,
    PathModel,
    new_path,
)

pytestmark = pytest.mark.needs('gcc')

MS, SECOND = 10**6, 10**9  # ns
NOW = 1000 * SECOND
TICK = 4 * MS
NEVER = 1 << 62
FUZZ_PATHS = int(os.environ.get('ELFPROBE_FUZZ_PATHS', '1000'))

Fields = Dict[str, int]


@pytest.fixture(scope='module')
def model() -> PathModel:
    return PathModel(interval_ns=10 * MS, tick_ns=TICK)


def fields(path: Path_, names: Any) -> Fields:
    """Return these fields of a path's records."""
    records = path.pacing, path.distance, path.liveness
    return {name: next(getattr(r, name) for r in records if hasattr(r, name)) for name in names}


RESPONSIVE = dict(last_responsive=4, proven=4, max_ttl_tried=4, farthest_reply=NEVER)
CHOICES: dict[str, tuple[Fields, dict[int, Fields], int]] = {
    # the path, its hops; the TTL that is chosen
    'the first hop': (dict(length=5), {}, 1),
    'the next hop': (dict(length=5, proven=4, last_probed=2), {}, 3),
    'the first again': (dict(length=5, proven=4, last_probed=4), {}, 1),
    'the first again, because the second is not proven': (dict(length=5, last_probed=1), {}, 1),
    'the second, because the first is proven': (dict(length=5, proven=1, last_probed=1), {}, 2),
    'not the second while the first is waited for': (
        dict(length=5, max_ttl_tried=1),
        {1: dict(unanswered=1, since=NOW - 499 * MS, due=NOW + MS)},
        NONE_DUE,
    ),
    'the second, because the first does not respond': (
        dict(length=5, max_ttl_tried=1),
        {1: dict(unanswered=1, since=NOW - 501 * MS, due=NOW + SECOND, state=BACKING_OFF)},
        2,
    ),
    'a hop that is not proven waits as long as the one before needed': (
        dict(length=5, max_ttl_tried=2, proven=1, last_responsive=1),
        {1: dict(rtt=1000, due=NOW + SECOND), 2: dict(unanswered=1, since=NOW - 23 * MS, due=NOW + MS)},
        NONE_DUE,
    ),
    'and no longer': (
        dict(length=5, max_ttl_tried=2, proven=1, last_responsive=1, last_probed=2),
        {1: dict(rtt=1000, due=NOW + SECOND), 2: dict(unanswered=1, since=NOW - 25 * MS, due=NOW + SECOND)},
        3,
    ),
    'not before the path is due': (dict(length=5, next_due=NOW + 1), {}, NONE_DUE),
    'the destination is no hop': (dict(length=1), {}, NONE_DUE),
    'a hop that is not due is passed over': (dict(length=5, proven=4), {1: dict(due=NOW + 1)}, 2),
    'exploration': (dict(length=5, proven=4, explore=1), {}, 5),
    'exploration now and then': (dict(length=5, proven=4, seq=19999), {}, 5),
    'no exploration before the hops are proven': (dict(length=5, explore=1, last_probed=3), {}, 1),
    'no exploration before the last one is over': (dict(length=5, explore=1), {5: dict(due=NOW + 1)}, 1),
    'an unresponsive router': (dict(RESPONSIVE, length=5), {1: dict(unanswered=9, since=1)}, HOP_UNRESPONSIVE),
    'a router with losses': (dict(RESPONSIVE, length=5), {1: dict(unanswered=8, since=1)}, 1),
    'the last hop, one loss': (
        dict(last_responsive=4, proven=4, length=5, last_probed=3),
        {4: dict(unanswered=1, since=1)},
        HOP_UNRESPONSIVE,
    ),
    'a back-off that is over': (dict(RESPONSIVE, length=5), {1: dict(unanswered=9, since=1, state=BACKING_OFF)}, 1),
    'an early retry after an outage': (
        dict(length=5, outage_start=NOW - 9 * SECOND, outage_end=NOW),
        {1: dict(unanswered=9, since=NOW - 9 * SECOND, state=BACKING_OFF, due=NEVER)},
        1,
    ),
    'no second early retry': (
        dict(length=2, outage_start=NOW - 9 * SECOND, outage_end=NOW),
        {1: dict(unanswered=9, since=NOW - 9 * SECOND, due=NEVER, state=BACKING_OFF | RETRIED_EARLY)},
        NONE_DUE,
    ),
    'length unknown: one hop': ({}, {}, 1),
    'length unknown: the next one after a while': (
        dict(max_ttl_tried=2, last_responsive=1, last_probed=2),
        {1: dict(due=NEVER), 2: dict(due=NEVER, unanswered=1, since=NOW - SECOND)},
        3,
    ),
}


@pytest.mark.parametrize('before, hops, ttl', CHOICES.values(), ids=CHOICES)
def test_choose_hop(model: PathModel, before: Fields, hops: dict[int, Fields], ttl: int) -> None:
    path = new_path(hops, **before)
    assert model.choose_hop(path, NOW, NOW // TICK) == ttl
    if ttl == NONE_DUE:
        assert path.pacing.next_due > NOW
    else:
        assert path.pacing.last_probed == (ttl if ttl > 0 else before.get('last_probed', 0) + 1)


LAST = dict(last_responsive=4)  # the farthest hop that has answered
ANSWERS_BEHIND = dict(last_responsive=4, farthest_reply=NEVER)  # and it has done so since
BACK_OFFS: dict[str, tuple[Fields, int, Fields, int]] = {
    # path, hop, its fields, unanswered since long ago: for how many ms it backs off; 0: it is probed
    'a hop that answers': (ANSWERS_BEHIND, 2, dict(unanswered=0), 0),
    'a router, 8 lost': (ANSWERS_BEHIND, 2, dict(unanswered=8), 0),
    'a router, 9 lost': (ANSWERS_BEHIND, 2, dict(unanswered=9), 10),
    'a router, 10 lost': (ANSWERS_BEHIND, 2, dict(unanswered=10, level=1), 20),
    'a router, 14 lost': (ANSWERS_BEHIND, 2, dict(unanswered=14, level=5), 320),
    'an unresponsive router': (ANSWERS_BEHIND, 2, dict(unanswered=19, level=10), 10000),
    'a router that is unresponsive for long': (ANSWERS_BEHIND, 2, dict(unanswered=2**8 - 1, level=16), 10000),
    'a router whose back-off is over': (ANSWERS_BEHIND, 2, dict(unanswered=9, level=3, state=1), 0),
    'a router, behind which nothing has answered since': (LAST, 2, dict(unanswered=1, rtt=9), 200),
    'the last router, 1 lost': (LAST, 4, dict(unanswered=1, rtt=9), 200),
    'the last router, its back-off is over': (LAST, 4, dict(unanswered=1, rtt=9, level=1, state=1), 0),
    'the last router, 2 lost': (LAST, 4, dict(unanswered=2, rtt=9, level=1), 1600),
    'the last router, 3 lost': (LAST, 4, dict(unanswered=3, rtt=9, level=2), 12800),
    'the last router, 2 lost, of late as well': (LAST, 4, dict(unanswered=2, rtt=9, level=1, false_alarms=4), 200),
    'the last router, 3 lost, of late but 1': (LAST, 4, dict(unanswered=3, rtt=9, level=2, false_alarms=7), 1600),
    'the last router, 4 lost, of late as well': (LAST, 4, dict(unanswered=4, rtt=9, level=3, false_alarms=12), 200),
    'the last router, 5 lost': (LAST, 4, dict(unanswered=5, rtt=9, level=4, false_alarms=12), 1600),
    'the last router, many lost': (LAST, 4, dict(unanswered=99, rtt=9, level=16), 256000),
    'behind it, 1 lost': (ANSWERS_BEHIND, 5, dict(unanswered=1), 1000),
    'behind it, 1 lost, but it has answered once': (ANSWERS_BEHIND, 5, dict(unanswered=1, rtt=9), 200),
    'behind it, 2 lost': (ANSWERS_BEHIND, 5, dict(unanswered=2, level=1), 8000),
    'behind it, 4 lost': (ANSWERS_BEHIND, 5, dict(unanswered=4, level=3), 256000),
    'farther behind, nothing lost': (ANSWERS_BEHIND, 7, dict(unanswered=0), 0),
    'farther behind, 1 lost': (ANSWERS_BEHIND, 7, dict(unanswered=1), 64000),
    'far behind, 1 lost': (ANSWERS_BEHIND, 20, dict(unanswered=1), 256000),
    'nothing ever answered, 1 lost': ({}, 1, dict(unanswered=1), 1000),
}


@pytest.mark.parametrize('before, number, hop, delay', BACK_OFFS.values(), ids=BACK_OFFS)
def test_back_off(model: PathModel, before: Fields, number: int, hop: Fields, delay: int) -> None:
    """An unresponsive hop is probed only once after each back-off; each is longer than the one before."""
    path = new_path({number: dict(hop, since=1)}, length=25, proven=32, last_probed=number - 1, **before)
    chosen, known = model.choose_hop(path, NOW, NOW // TICK), path.hops[number]
    assert path.pacing.last_probed == number
    if not delay:
        assert (chosen, known.due, known.backoff.level) == (number, 0, hop.get('level', 0))
        return
    assert (chosen, known.due - NOW) == (HOP_UNRESPONSIVE, delay * MS)
    assert (known.backoff.state, known.backoff.level) == (BACKING_OFF, min(hop.get('level', 0) + 1, 16))
    # A last router that does not respond no longer proves that the hops before it are routers.
    last = before.get('last_responsive', 0)
    assert path.liveness.last_responsive == last - (number == last)


@pytest.mark.parametrize(
    'before, latency, waited, delay',
    [
        # latency of the last reply, 0: none; for how long the first unanswered probe is out; ms
        (ANSWERS_BEHIND, 160, 100, 0),
        (ANSWERS_BEHIND, 160, 270, 0),
        (ANSWERS_BEHIND, 160, 300, 10),
        (ANSWERS_BEHIND, 0, 20, 10),
        (LAST, 160, 310, 0),
        (LAST, 160, 340, 200),
        (LAST, 1, 2, 0),
        (LAST, 1, 20, 200),
    ],
)
def test_late_is_not_unresponsive(model: PathModel, before: Fields, latency: int, waited: int, delay: int) -> None:
    """Routers may be as late as a quarter of their latency and 8 intervals, the last one as late as its latency
    and 4 ms: it may have become the destination."""
    number = 2 if before is ANSWERS_BEHIND else 4
    hop = dict(unanswered=14, since=NOW - waited * MS, rtt=latency * 1000)
    path = new_path({number: hop}, length=9, proven=32, last_probed=number - 1, **before)
    assert model.choose_hop(path, NOW, NOW // TICK) == (HOP_UNRESPONSIVE if delay else number)
    if delay:
        assert path.hops[number].due == NOW + delay * MS


SEEN: dict[str, tuple[Fields, int, Fields]] = {
    # the path; the distance of a packet of the destination; the path afterwards
    'the first packet': ({}, 5, dict(length=5, reverse=5)),
    'shorter at once': (
        dict(length=5, reverse=5, last_responsive=4, proven=4),
        3,
        dict(length=3, reverse=3, last_responsive=2, changed_at=NOW, proven=0),
    ),
    'longer not at once': (
        dict(length=5, reverse=5, proven=4),
        6,
        dict(length=5, reverse=5, longer_packets=1, proven=4),
    ),
    'the first packet says nothing against proofs': (dict(proven=4), 5, dict(length=5, proven=4, changed_at=0)),
    'longer after 16': (
        dict(length=5, reverse=5, longer_packets=16, proven=4),
        6,
        dict(length=6, reverse=6, longer_packets=0, proven=0, changed_at=NOW),
    ),
    'not longer after all': (dict(length=5, reverse=5, longer_packets=9), 5, dict(length=5, longer_packets=0)),
    'an unusual initial TTL': (dict(length=5), 33, dict(length=0, reverse=33)),
}
OVER_BARE_ACKS = dict(length=3, reverse=3, proven=2), 5, dict(length=5, reverse=5, by_data=1, proven=0)
AGAINST_DATA: dict[str, tuple[Fields, int, Fields]] = {
    'shorter not at once': (
        dict(length=5, reverse=5, by_data=1, proven=4),
        3,
        dict(length=5, reverse=5, shorter_acks=1, proven=4),
    ),
    'shorter after 3': (
        dict(length=5, reverse=5, by_data=1, shorter_acks=3),
        3,
        dict(length=3, reverse=3, shorter_acks=0, by_data=1),
    ),
    'shorter, with longer ones in turn': (
        dict(length=5, reverse=5, by_data=1, shorter_acks=2),
        5,
        dict(length=5, reverse=5, shorter_acks=2, by_data=1),
    ),
}
CONFIRMED_BY_DATA = dict(length=5, reverse=5, by_data=1, shorter_acks=2), 5, dict(length=5, shorter_acks=0)


@pytest.mark.parametrize(
    'before, distance, has_data, after',
    [
        *((before, distance, 0, after) for before, distance, after in SEEN.values()),
        *(({**before, 'by_data': 1}, distance, 1, after) for before, distance, after in SEEN.values()),
        (*OVER_BARE_ACKS[:2], 1, OVER_BARE_ACKS[2]),
        (dict(length=5, reverse=5), 5, 1, dict(length=5, by_data=1)),
        (*CONFIRMED_BY_DATA[:2], 1, CONFIRMED_BY_DATA[2]),
        *((before, distance, 0, after) for before, distance, after in AGAINST_DATA.values()),
    ],
    ids=[*(f'{kind}: {name}' for kind in ('bare ACK', 'data') for name in SEEN), 'data over bare ACKs',
         'data as well', 'data after all', *(f'bare ACK against data: {name}' for name in AGAINST_DATA)],
)  # fmt: skip
def test_destination_seen(model: PathModel, before: Fields, distance: int, has_data: int, after: Fields) -> None:
    path = new_path(**before)
    model.destination_seen(path, distance, 0, 0, has_data, NOW, NOW // TICK)
    assert fields(path, after) == after


@pytest.mark.parametrize('gap, is_first, ended', [(100, 0, 0), (251, 0, NOW), (251, 1, 0)])
def test_gap_ends_an_outage(model: PathModel, gap: int, is_first: int, ended: int) -> None:
    path = new_path(reverse=5, length=5)
    model.destination_seen(path, 5, gap, is_first, 0, NOW, NOW // TICK)
    assert path.liveness.outage_end == ended
    assert path.liveness.last_received == NOW // TICK


REACHED: dict[str, tuple[Fields, int, Fields]] = {
    'unknown': ({}, 4, dict(length=4)),
    'shorter': (dict(length=9, last_responsive=8, proven=8), 4, dict(length=4, last_responsive=3, proven=0)),
    'as long': (dict(length=4, explore=1, reply_distances=6), 4, dict(length=4, explore=0, reply_distances=6)),
    'longer than known': (dict(length=3), 4, dict(length=3)),
    'by a TTL of 0': (dict(length=3, last_responsive=2), 0, dict(length=3, last_responsive=2)),
}


@pytest.mark.parametrize('before, ttl, after', REACHED.values(), ids=REACHED)
def test_destination_reached(model: PathModel, before: Fields, ttl: int, after: Fields) -> None:
    path = new_path(**before)
    model.destination_reached(path, ttl, NOW)
    assert fields(path, after) == after


REPLIED: dict[str, tuple[Fields, tuple[int, int], Fields]] = {
    # the path; the hop that answered and the reply's distance; the path afterwards
    'unknown length': (dict(max_ttl_tried=3), (3, 3), dict(max_ttl_tried=4, last_responsive=3, proven=3)),
    'beyond the length': (dict(length=5), (5, 5), dict(length=6, explore=1, last_responsive=5, proven=5)),
    'last router, as expected': (dict(length=5, reverse=5), (4, 4), dict(explore=0, reply_distances=1 << 4)),
    'last router, farther': (dict(length=5, reverse=5), (4, 5), dict(explore=1, last_explored=NOW)),
    'last router, farther, not again so soon': (
        dict(length=5, reverse=5, last_explored=NOW - SECOND),
        (4, 5),
        dict(explore=0, reply_distances=0),
    ),
    'of the old path': (dict(length=5, changed_at=NOW), (6, 6), dict(length=5, last_responsive=0, proven=0)),
    'of the old path, but a hop before the end': (
        dict(length=5, changed_at=NOW),
        (3, 3),
        dict(length=5, last_responsive=3, proven=0),
    ),
    'as far away as its reply says': (dict(length=5, reverse=5), (3, 3), dict(proven=3, symmetric=3)),
    'farther away': (dict(length=5, reverse=5), (3, 4), dict(proven=3, symmetric=0)),
}


@pytest.mark.parametrize('before, reply, after', REPLIED.values(), ids=REPLIED)
def test_hop_replied(model: PathModel, before: Fields, reply: tuple[int, int], after: Fields) -> None:
    path = new_path(**before)
    number, distance = reply
    model.hop_replied(path, number, USUAL, NOW - 5 * MS, distance, 1, NOW)
    assert fields(path, after) == after


FORMS: dict[str, tuple[Fields, Fields, tuple[int, int], int]] = {
    # the path, hop 3; the hop, whether the packet can carry a fallback probe; the form
    'proven': (dict(proven=3), {}, (3, 1), USUAL),
    'before a proven one': (dict(proven=4), {}, (3, 1), USUAL),
    'not proven': (dict(proven=2, reverse=9), {}, (3, 1), GUARDED),
    'a guarded probe was not answered': (dict(proven=2, reverse=9), dict(level=1), (3, 1), FALLBACK),
    'nor are others here': (dict(proven=2, reverse=9, guards_blocked=1), {}, (3, 1), FALLBACK),
    'not with this packet': (dict(proven=2, reverse=9), dict(level=1), (3, 0), GUARDED),
    'not so often': (dict(proven=2, reverse=9, fallbacks=3), dict(level=1), (3, 1), GUARDED),
    'not without a packet from the destination': (dict(proven=2), dict(level=1), (3, 1), GUARDED),
    'perhaps the destination': (dict(proven=2, reverse=4), dict(level=1), (3, 1), GUARDED),
    'the last hop of a symmetric path': (dict(proven=2, reverse=4, symmetric=2), dict(level=1), (3, 1), FALLBACK),
    'the destination': (dict(proven=2, reverse=3, symmetric=2), dict(level=1), (3, 1), GUARDED),
    'in an outage': (dict(proven=2, reverse=9, last_received=NOW // TICK - 251), dict(level=1), (3, 1), GUARDED),
}


@pytest.mark.parametrize('before, hop, probe, form', FORMS.values(), ids=FORMS)
def test_probe_form(model: PathModel, before: Fields, hop: Fields, probe: tuple[int, int], form: int) -> None:
    path = new_path({3: hop}, **{'last_received': NOW // TICK, **before})
    assert model.probe_form(path, *probe, NOW // TICK) == form


def test_fallback_probes_are_counted_until_one_is_answered(model: PathModel) -> None:
    path = new_path(reverse=9, length=9, proven=2)
    for count in 1, 2, 3:
        due = model.probe_reserved(path, 3, NOW, 0)
        model.probe_sent(path, 3, FALLBACK, NOW, due, NOW)
        assert fields(path, ('fallbacks', 'guards_blocked')) == dict(fallbacks=count, guards_blocked=0)
    model.hop_replied(path, 3, FALLBACK, NOW, 3, 1, NOW)
    assert fields(path, ('fallbacks', 'guards_blocked', 'proven')) == dict(fallbacks=0, guards_blocked=1, proven=3)


def test_last_hop_that_stops_responding_is_no_longer_proven(model: PathModel) -> None:
    """Hop 3 stays proven if it has answered by itself; if not, hop 4 was the proof for all before it."""
    for rtt, proven in (9, 3), (0, 0):
        hops = {3: dict(rtt=rtt), 4: dict(unanswered=1, since=1)}
        path = new_path(hops, length=5, proven=4, last_responsive=4, last_probed=3)
        assert model.choose_hop(path, NOW, 0) == HOP_UNRESPONSIVE
        assert fields(path, ('proven', 'last_responsive')) == dict(proven=proven, last_responsive=3)


def test_probes_in_flight_to_a_hop_are_few() -> None:
    path = new_path({2: dict(rtt=80_000)}, length=5, proven=4)
    model = PathModel(interval_ns=0)
    assert model.probe_reserved(path, 2, NOW, 0) == NOW + 10 * MS


def test_destinations_share_a_responder(model: PathModel) -> None:
    """Each gets the same, however many packets it has; one with fewer packets than turns gets a probe by each."""
    paths = [new_path(length=2, reverse=2, proven=1) for _ in range(20)]
    sent = [0] * 20
    for path in paths:
        model.hop_replied(path, 1, USUAL, NOW, 1, 7, NOW)
    for ms in range(20_000):
        now = NOW + ms * MS
        # The first has a packet in every ms, and is always the first one. The last has one in four seconds.
        for number, path in enumerate(paths):
            is_packet = ms % 4000 == 0 if number == 19 else ms % (1 + number) == 0
            if is_packet and model.choose_hop(path, now, 0) == 1:
                model.probe_sent(path, 1, USUAL, now, model.probe_reserved(path, 1, now, 0), now)
                model.hop_replied(path, 1, USUAL, now, 1, 7, now)
                sent[number] += 1
    assert 1950 < sum(sent) <= 2000 + 2 * len(paths)
    assert min(sent[:19]) > 0.9 * max(sent[:19])
    assert sent[19] == 5


def test_one_destination_needs_no_turns() -> None:
    for interval, rate_global in (10, False), (10, True), (100, False), (1, False), (0, False):
        model = PathModel(interval_ns=interval * MS, rate_global=rate_global)
        path = new_path(length=3, proven=2)
        for hop in 1, 2:
            model.hop_replied(path, hop, USUAL, NOW, hop, hop, NOW)
            due = model.probe_reserved(path, hop, NOW, 0)
            assert due - NOW <= (interval * MS or 1000)


FLOWS = {  # intervals between the packets of each flow, us; least share of each; probes in 10 s, at least
    'one': ([100], 1, 3800),
    'one with few packets': ([10_100], 1, 900),
    'two alike': ([100, 100], 0.45, 3800),
    'eight alike': ([100] * 8, 0.11, 3800),
    'one with more packets': ([20, 100, 100, 100], 0.2, 3800),
    'one with fewer packets': ([20, 2000], 0.1, 3500),
    'one with few packets beside one with many': ([20, 50_000], 0, 3800),
}


@pytest.mark.parametrize('rate_global', [False, True], ids=['per hop', 'global'])
@pytest.mark.parametrize('intervals, share, least', FLOWS.values(), ids=FLOWS)
def test_flows_take_turns(intervals: list[int], share: float, least: int, rate_global: bool) -> None:
    """Each is probed, at all hops, and all together are probed as often as one alone."""
    model = PathModel(interval_ns=10 * MS // (4 if rate_global else 1), rate_global=rate_global)
    path = new_path(length=5, proven=4)
    for hop in range(1, 5):
        model.hop_replied(path, hop, USUAL, NOW, hop, hop, NOW)
    found: list[Counter[int]] = [Counter() for _ in intervals]
    chance = random.Random(1)
    packets = sorted(
        (NOW + int((number + chance.random()) * interval * 1000), flow)
        for flow, interval in enumerate(intervals)
        for number in range(10_000_000 // interval)
    )
    for now, flow in packets:
        if now < path.pacing.next_due:
            continue
        hop = model.choose_hop(path, now, 0)
        if hop > 0 and model.takes_turn(path, hop, flow, now):
            model.probe_sent(path, hop, USUAL, now, model.probe_reserved(path, hop, now, 0), now)
            if hop < 5:
                model.hop_replied(path, hop, USUAL, now, hop, hop, now)
                found[flow][hop] += 1
            else:
                model.destination_reached(path, hop, now)
        elif hop > 0:
            model.probe_postponed(path, hop)
    probes = [sum(hops.values()) for hops in found]
    assert least <= sum(probes) <= 4004, probes
    assert min(probes) >= share * sum(probes), probes
    for hops in found:
        assert min(hops[hop] for hop in range(1, 5)) >= sum(hops.values()) / 8 - 5, found


def test_probe_that_is_cancelled_is_not_held_against_its_hop(model: PathModel) -> None:
    path = new_path(length=5, proven=4)
    due = model.probe_reserved(path, 2, NOW, 0)
    assert (due, path.hops[2].unanswered, path.pacing.seq) == (NOW + 10 * MS, 1, 1)
    model.probe_cancelled(path, 2, NOW)
    assert path.hops[2].unanswered == 0


def test_interval_begins_when_the_probe_leaves(model: PathModel) -> None:
    path = new_path(length=5, proven=4)
    due = model.probe_reserved(path, 2, NOW, 0)
    model.probe_sent(path, 2, USUAL, NOW, due, NOW + 3 * MS)
    assert (path.hops[2].due, path.pacing.last_sent) == (due + 3 * MS, NOW + 3 * MS)


def test_probe_that_is_postponed_is_next_again(model: PathModel) -> None:
    path = new_path(length=5, proven=4, last_probed=2)
    for _ in range(2):
        assert model.choose_hop(path, NOW, 0) == 3
        model.probe_postponed(path, 3)


# The fuzzer

BUILDS = [(10 * MS, False, TICK), (0, False, TICK), (SECOND, True, 0), (100 * MS, True, MS)]
MUTANTS = {  # what is broken in the model -> (text, its replacement)
    'back-off without end': ('hop->due = now + backoff_delay(path, nr, hop);', 'hop->due = ~0ULL;'),
    'early retries never end': ('hop->backoff.state = RETRIED_EARLY;', 'hop->due = ~0ULL >> 1; return hop->due;'),
    'the destination is a hop': ('? path->distance.length - 1 :', '? path->distance.length :'),
    'every hop is proven': ('if (nr <= distance->proven)', 'if (nr <= MAX_HOPS)'),
    'hops stay proven when the path changes': ('distance->proven = 0;', ';'),
    'hops stay proven when they stop responding': ('limit_proven(path, nr);', 'hop->unanswered = 1;'),
    'fallback probes are not counted': ('path->distance.fallbacks++;', 'hop = 0;'),
    'no exploration': ('path->pacing.seq % EXPLORE_EVERY == EXPLORE_EVERY - 1', '0'),
    'due for ever': (
        'set_next_due(&path->pacing, earliest, now, ticks);',
        'set_next_due(&path->pacing, now + 4000 * NSEC_PER_SEC, now, ticks);',
    ),
}


def fuzz(folder: Path, text: str, build: tuple[int, bool, int], first: int, count: int) -> tuple[int, str]:
    """Return the fuzzer's exit status and output for this text of the model."""
    fuzzer = folder / 'path_fuzz'
    rest = (path_model.HERE / 'path_fuzz.c').read_text()
    path_model.compile_c(path_model.PRELUDE + text + rest, fuzzer, *path_model.parameters(*build))
    ran = subprocess.run(
        [str(fuzzer), str(first), str(count)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return ran.returncode, ran.stdout


@pytest.mark.parametrize('build', BUILDS)
def test_fuzzer_finds_nothing(build: tuple[int, bool, int], tmp_path: Path) -> None:
    first = random.randrange(1 << 40)
    status, output = fuzz(tmp_path, path_model.section(), build, first, FUZZ_PATHS)
    assert status == 0, output


@pytest.mark.parametrize('name', MUTANTS)
def test_fuzzer_finds_mutants(name: str, tmp_path: Path) -> None:
    """Each breaks what the fuzzer is to watch."""
    text, replacement = MUTANTS[name]
    model = path_model.section()
    assert model.count(text) == 1
    outputs = [fuzz(tmp_path, model.replace(text, replacement), build, 1, 1000) for build in BUILDS[:2]]
    assert any(status for status, _ in outputs), outputs
