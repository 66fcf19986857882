"""What the path model of elfprobe.c takes for a firewall's doing, and what not: by simulation, without a kernel."""

from __future__ import annotations

from typing import Any, Dict

import pytest

from path_model import PathModel
from stalls import MS, SECOND, Application, Network, Talk

pytestmark = pytest.mark.needs('gcc')

S = SECOND
FOR_EVER = 1 << 60
Arguments = Dict[str, Any]


@pytest.fixture(scope='module')
def model() -> PathModel:
    return PathModel()


def is_talk(application: Arguments) -> bool:
    return application.get('kind') == 'requests'


def simulate(model: PathModel, seconds: float, network: Arguments, applications: list[Arguments]) -> Any:
    """Return the network and its applications after so many seconds."""
    net = Network(model, **network)
    talking = [(Talk if is_talk(application) else Application)(net, **application) for application in applications]
    net.run(seconds)
    return net, talking


REQUESTS: Arguments = dict(kind='requests')  # and answers, by UDP or ping
ONE_WAY: Arguments = dict(REQUESTS, mute=(0.01, 400), patience=FOR_EVER)  # like iperf3 -u
FIREWALLS: dict[str, tuple[Arguments, Arguments, int]] = {
    # the network, the application; the number of connections that are lost
    **{
        f'{kind}, {name}': (network, dict(kind=kind), lost[kind == 'download'])
        for kind in ('upload', 'download')
        for name, network, lost in (
            ('blocks for 0.5 s', dict(block=S // 2), (0, 0)),
            ('blocks for 3 s', dict(block=3 * S), (0, 2)),
            ('blocks for 60 s', dict(block=60 * S), (2, 2)),
            ('blocks for good', dict(block=FOR_EVER), (2, 2)),
            ('lowers the TTL', dict(lowers=True), (2, 2)),
        )
    },
    **{
        f'upload, drops the probes, and blocks for {block:g} s at hop {hop}': (
            dict(block=int(block * S), drops=True, firewall=hop),
            dict(interval=interval * MS),
            lost,
        )
        for hop, interval in ((1, 10), (2, 50), (3, 10))
        for block, lost in ((0.5, 0), (3, 0), (60, 2))
    },
    **{
        f'{name}, {of}': (network, dict(kind='requests', interval=interval * MS), lost)
        for of, interval in (('requests', 10), ('ping', 1000))
        for name, network, lost in (
            ('blocks for 3 s', dict(block=3 * S), 2),
            ('blocks for 60 s', dict(block=60 * S), 2),
            ('blocks for good', dict(block=FOR_EVER), 2),
            ('at the last hop', dict(block=FOR_EVER, firewall=4), 2),
            ('lowers the TTL', dict(lowers=True), 2),
            ('drops the probes', dict(block=60 * S, drops=True), 2),
        )
    },
    'blocks for 0.5 s, requests': (dict(block=S // 2), REQUESTS, 0),
    'short conversations': (dict(block=FOR_EVER), dict(REQUESTS, life=2 * S), 0),
    'download, drops the probes': (dict(block=60 * S, drops=True), dict(kind='download'), 2),
    'connections are reset': (dict(block=FOR_EVER), dict(reset=True), 2),
    'one packet a second': (dict(block=FOR_EVER), dict(interval=S), 2),
    'short connections': (dict(block=FOR_EVER), dict(life=2 * S), 2),
    'after some packets': (dict(block=FOR_EVER, counted=20), {}, 2),
    'a long path': (dict(block=FOR_EVER, hops=20, rtt=100 * MS), {}, 2),
}


@pytest.mark.parametrize('network, application, lost', FIREWALLS.values(), ids=FIREWALLS)
def test_firewalls_are_found_out(model: PathModel, network: Arguments, application: Arguments, lost: int) -> None:
    net, (talking,) = simulate(model, 80, network, [application])
    assert net.path.excluded
    assert talking.lost <= lost
    assert talking.connection.last_moved > net.now - 2 * S


def outages(*lengths: float, hop: int = 3, every: int = 40, count: int = 6) -> list[tuple[int, int, int]]:
    """Outages of these lengths in turn, s."""
    begins = ((15 + number * every) * S for number in range(count))
    return [(hop, begin, begin + int(lengths[n % len(lengths)] * S)) for n, begin in enumerate(begins)]


SLOW, DOWNLOAD = dict(interval=100 * MS), dict(kind='download', interval=100 * MS)
HARMLESS: dict[str, tuple[Arguments, list[Arguments]]] = {
    'nothing': ({}, [SLOW]),
    'outages': (dict(outages=outages(1, 2.5, 5, 30)), [SLOW, DOWNLOAD]),
    'outages at the first hop': (dict(outages=outages(1, 2.5, 5, 30, hop=1)), [SLOW, DOWNLOAD]),
    'connections are reset': (dict(outages=outages(5, 12)), [dict(SLOW, reset=True), dict(DOWNLOAD, reset=True)]),
    'an outage soon after the start': (dict(outages=[(3, S, 40 * S)]), [SLOW]),
    'a peer that reboots': (
        dict(outages=outages(45, hop=5, every=100)),
        [dict(SLOW, reset=True), dict(interval=S)],
    ),
    'one of two links fails': (dict(outages=outages(20), share=2), [SLOW] * 4),
    'a long path, and an application that connects anew': (
        dict(hops=15, outages=outages(5, 12, every=20, count=12)),
        [SLOW, dict(DOWNLOAD, life=2 * S), dict(interval=S)],
    ),
    'an application with little to say': (dict(outages=outages(3, 10)), [dict(interval=S), dict(interval=3 * S)]),
    'short connections': (
        dict(outages=outages(0.4, 4, 12, every=20, count=12)),
        [dict(life=100 * MS, pause=S)] * 2,
    ),
    'very short ones': (
        dict(outages=outages(0.4, 0.4, 4, every=20, count=12)),
        [dict(life=30 * MS, pause=100 * MS), dict(life=30 * MS, pause=100 * MS, reset=True)],
    ),
    'idle connections that a NAT forgets': (dict(forgets=80 * S), [dict(interval=100 * S)] * 3),
    'and that are closed': (dict(forgets=80 * S), [dict(interval=100 * S, life=90 * S)] * 3),
    'silent routers and outages': (dict(silent=2, outages=outages(0.3, 1, every=7, count=40)), [SLOW, DOWNLOAD]),
    'silent routers and loss': (dict(silent=2, loss=0.05), [SLOW, DOWNLOAD, dict(interval=S)]),
    'outages of conversations': (
        dict(outages=outages(1, 2.5, 5, 30)),
        [dict(REQUESTS, interval=100 * MS), dict(REQUESTS, interval=S, patience=60 * S)],
    ),
    'and soon after the start': (dict(outages=[(3, 2 * S, 7 * S)]), [dict(REQUESTS, interval=100 * MS)]),
    'one conversation that is answered no more': (
        {},
        [dict(REQUESTS, interval=100 * MS), dict(REQUESTS, interval=100 * MS, mute=(3, 400), patience=FOR_EVER)],
    ),
    'one-way flows, answered once': ({}, [dict(ONE_WAY, life=5 * S)]),
    'and pings': ({}, [dict(ONE_WAY, port=8), dict(REQUESTS, interval=S, life=5 * S)]),
    'and short conversations': ({}, [dict(ONE_WAY, port=8, life=5 * S)] * 2 + [dict(REQUESTS, life=2 * S)]),
    'single requests, after the others stalled': (
        dict(outages=[(3, 8 * S, 10 * S)]),
        [dict(REQUESTS, interval=S, end=9), dict(REQUESTS, interval=S, life=1)],
    ),
    'idle conversations that a NAT forgets': (
        dict(forgets=40 * S),
        [dict(REQUESTS, interval=100 * MS, rest=90 * S, patience=200 * S)] * 3,
    ),
    'late answers after a rest': ({}, [dict(REQUESTS, interval=300 * MS, rest=20 * S, delay=400 * MS)] * 2),
    'a request each ten seconds': ({}, [dict(REQUESTS, interval=10 * S, patience=60 * S)]),
    'answers that take long': ({}, [dict(REQUESTS, interval=100 * MS, delay=2 * S), dict(REQUESTS, delay=S // 2)]),
    'one long pause, again and again': (
        {},
        [dict(REQUESTS, interval=100 * MS, mute=(10, 400), patience=20 * S)] * 2,
    ),
    'conversations with 10 % loss': (
        dict(loss=0.1),
        [dict(REQUESTS, interval=100 * MS), dict(REQUESTS, interval=S, patience=60 * S)],
    ),
    'a ping with 20 % loss': (dict(loss=0.2), [dict(REQUESTS, interval=S, patience=60 * S)]),
    '5 % loss': (dict(loss=0.05), [SLOW, DOWNLOAD]),
    '20 % loss': (dict(loss=0.2), [SLOW, DOWNLOAD, dict(interval=S)]),
}


@pytest.mark.parametrize('network, applications', HARMLESS.values(), ids=HARMLESS)
def test_what_is_no_firewall(model: PathModel, network: Arguments, applications: list[Arguments]) -> None:
    net, _ = simulate(model, 600 if 'forgets' in network else 320, network, applications)
    assert not net.path.excluded
    assert net.rows[-1][0] > net.now - 110 * S


@pytest.mark.parametrize('application', [SLOW, dict(REQUESTS, interval=100 * MS)], ids=['TCP', 'requests'])
def test_rows_tell_of_outages(model: PathModel, application: Arguments) -> None:
    """Retransmissions carry probes, or requests without an answer, which show up to where answers still come."""
    net, _ = simulate(model, 270, dict(outages=outages(1, 2.5, 5, 30)), [application])
    for hop, begin, end in net.outages:
        found = [(ttl, answered) for sent, ttl, answered in net.rows if begin + S // 2 <= sent < end]
        assert {(1, True), (2, True)} <= set(found) or (end - begin <= S and found)
        assert not any(answered for ttl, answered in found if ttl >= hop)


def test_firewall_after_a_long_time(model: PathModel) -> None:
    """It begins to block as flows had gone well for long: each fourth retransmission carries no probe."""
    net, (talking,) = simulate(model, 60, {}, [{}])
    assert net.path.trusts[0].passed > 50
    net.block = S // 2
    net.run(120)
    assert net.path.excluded
    assert talking.lost == 0


@pytest.mark.parametrize('kind', ['upload', 'download', 'requests'])
@pytest.mark.parametrize('network', [dict(block=60 * S), dict(block=60 * S, firewall=3), dict(block=3 * S)])
def test_firewall_in_spite_of_trust(model: PathModel, network: Arguments, kind: str) -> None:
    """Outages hid it: flows went well under probes to the hops before it, and stalled without any."""
    net, (talking,) = simulate(model, 0, network, [dict(kind=kind)])
    for trust in net.path.trusts:
        trust.passed, trust.max_ttl, trust.suspicion = 50, 5, -16
    net.run(80)
    assert net.path.excluded
    assert talking.lost <= 4
    assert talking.connection.last_moved > net.now - 2 * S


def test_one_way_flows_whose_answers_were_early(model: PathModel) -> None:
    """Beside one whose answer was counted, as with `iperf3 -u -P`: no doubt about that one ends their probes."""
    early = dict(REQUESTS, mute=(0, 400), patience=FOR_EVER)
    net, talking = simulate(model, 30, {}, [ONE_WAY, early, early])
    assert not net.path.excluded
    assert all(each.connection.flow.last_probed > net.now - S for each in talking)


def test_rare_stalls_do_not_add_up(model: PathModel) -> None:
    """One in a minute, the first of them at once, as where a radio link fails for a moment."""
    moments = [(3, (1 + 60 * n) * S, (1 + 60 * n) * S + 300 * MS) for n in range(15)]
    net, _ = simulate(model, 900, dict(outages=moments), [SLOW])
    assert not net.path.excluded
