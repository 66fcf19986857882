"""elfprobe against routers that answer in every way there is: see odd_routers.py, where WAYS lists them.

    client - r1, which is hop 1 ... hop 4 - server

Every packet of three protocols carries a probe. What the routers say that they answered is the truth; rows
are compared with it one by one. A way by which a probe cannot be known says so, and why, in WAYS.

One way alone: -k 'swapped and truncated-offload', about 20 s, because each kind of run asks for all ways. That a
way is odd as intended is not tested here: try a new one with a broken elfprobe.c.
"""

from __future__ import annotations

import csv
import fcntl
import json
import re
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.extensions import MalformedExtension, extension_texts
from lab import Lab, end, wait_until
from odd_routers import (
    HOPS,
    INTERFACE,
    THREE_LABELS_TEXT,
    WAYS,
    Answer,
    Case,
    Responder,
    hop_address,
    own_address,
    responding,
    ways_of,
)
from runs import (
    FAMILY,
    ICMP,
    ICMPV6,
    TCP,
    UDP,
    VERSIONS,
    Block,
    Packet,
    Row,
    blocks_in,
    check_delays,
    elfprobe,
    inside,
    parse_packet,
    time_exceeded_received,
)

pytestmark = pytest.mark.root

PROTOCOLS = {4: (ICMP, TCP, UDP), 6: (ICMPV6, TCP, UDP)}
TOS = 0x48  # a DSCP that nobody uses by default
QUIC, DNS, WEB = 443, 53, 80  # the server's ports
OFTEN = {1, 2, 3}  # hops
SCHEDULED = 1_000_000_000  # ns within which even a busy machine lets the routers look at a packet
DELIVERED = 50_000_000  # ns within which the kernel mostly hands it on once it was sent

Columns = Dict[str, str]


# Traffic


def set_tos(sock: socket.socket, version: int) -> None:
    if version == 4:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, TOS)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, TOS)


def quic(number: int) -> bytes:
    """As a packet with a short header: what differs is in the first bytes, lengths vary."""
    return struct.pack('!BQ', 0x40, number * 0x9E3779B97F4A7C15 % 2**64) + bytes(number * 37 % 1300)


def dns(number: int) -> bytes:
    """A query for an address."""
    name = b''.join(bytes([len(label)]) + label for label in (b'host%d' % number, b'example', b''))
    return struct.pack('!6H', number, 0x0100, 1, 0, 0, 0) + name + struct.pack('!2H', 1, 1)


def stream(number: int) -> bytes:
    """What is written to TCP at once; now and then more than a segment."""
    return bytes(3000 if number % 10 == 0 else 1 + number * 37 % 1300)


@contextmanager
def udp_flow(lab: Lab, version: int, port: int, content: Callable[[int], bytes]) -> Iterator[Callable[[int], None]]:
    """Sends a packet, which is answered with the same."""
    with ExitStack() as stack:
        sockets = []
        for host in lab.client, lab.server:
            with inside(host):
                sockets.append(stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM)))
            sockets[-1].settimeout(5)
            set_tos(sockets[-1], version)
        client, server = sockets
        server.bind((lab.server_address(version), port))
        client.connect((lab.server_address(version), port))

        def send(number: int) -> None:
            client.send(content(number))
            received = b''
            while received != content(number):  # a probe may have come this far
                received, sender = server.recvfrom(2000)
            server.sendto(received, sender)
            assert client.recv(2000) == received

        yield send


@contextmanager
def tcp_flow(lab: Lab, version: int) -> Iterator[Callable[[int], None]]:
    """Sends some bytes, and waits until they have arrived."""
    with inside(lab.server):
        listener = socket.create_server((lab.server_address(version), WEB), family=FAMILY[version])
    with inside(lab.client):
        client = socket.socket(FAMILY[version])
    with listener, client:
        set_tos(client, version)
        client.settimeout(5)
        client.connect(listener.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with listener.accept()[0] as server:
            server.settimeout(5)

            def send(number: int) -> None:
                client.sendall(stream(number))
                missing = len(stream(number))
                while missing:
                    received = server.recv(missing)
                    assert received
                    missing -= len(received)

            yield send


@contextmanager
def download(lab: Lab, version: int, in_turn: bool = False) -> Iterator[Callable[[], None]]:
    """Sends a segment to the client, which acknowledges it at once. In turn: when the last ACK has arrived."""
    with inside(lab.server):
        listener = socket.create_server((lab.server_address(version), WEB), family=FAMILY[version])
    with inside(lab.client), listener, socket.socket(FAMILY[version]) as client:
        client.settimeout(5)
        client.connect(listener.getsockname())
        with listener.accept()[0] as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def is_acknowledged() -> bool:
                return not int.from_bytes(fcntl.ioctl(server, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

            def send() -> None:
                if in_turn:
                    wait_until(is_acknowledged, 10, 'an ACK')
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                server.sendall(bytes(1000))
                missing = 1000
                while missing:
                    received = client.recv(missing)
                    assert received
                    missing -= len(received)

            yield send


def ping(lab: Lab, version: int, *options: str) -> subprocess.Popen[str]:
    return lab.client.popen(
        'ping',
        '-nq',
        '-Q',
        str(TOS),
        *options,
        lab.server_address(version),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def talk(lab: Lab, until: Callable[[], bool]) -> None:
    """Pings, and packets of the other flows in turn, none lost, until a condition is true."""
    with ExitStack() as stack:
        flows = []
        for version in VERSIONS:
            stack.callback(end, ping(lab, version, '-i.002'))
            flows += [
                stack.enter_context(flow)
                for flow in (
                    udp_flow(lab, version, QUIC, quic),
                    udp_flow(lab, version, DNS, dns),
                    tcp_flow(lab, version),
                )
            ]
        numbers = iter(range(1, 1 << 16))

        def is_enough() -> bool:
            for _, number in zip(range(10), numbers):
                for send in flows:
                    send(number)
            return until()

        wait_until(is_enough, 60, 'enough answers')


# Rows and answers


class Observed(NamedTuple):
    """A probe: its row, with the columns as they are in the file, and what the routers did about it."""

    row: Row
    columns: Columns
    answer: Answer


class Measured(NamedTuple):
    """A run with a probe for every packet."""

    offload: bool
    rows: list[Row]
    answers: list[Answer]
    observed: list[Observed]
    packets: list[Block]
    passed: list[int]  # time exceeded that the client's stack has seen: IPv4's, IPv6's

    def __repr__(self) -> str:
        return f'Measured({len(self.rows)} rows, {len(self.answers)} answers)'


def column(columns: Columns, name: str) -> str | None:
    """The text in a column, None where elfprobe has no such column as yet."""
    return columns.get(name)


def cell(answer: Answer) -> tuple[int, int, int]:
    return answer.probe.version, answer.probe.protocol, answer.hop


def is_every_way_used(responder: Responder) -> bool:
    """By each protocol, at the first hops: those behind are asked less often while answers are missing."""
    used: dict[tuple[int, int, int], set[str]] = defaultdict(set)
    for answer in responder.answers():
        used[cell(answer)].add(answer.way)
    return all(
        len(used[version, protocol, hop]) >= (len(ways_of(version)) if hop in OFTEN else 10)
        for version in VERSIONS
        for protocol in PROTOCOLS[version]
        for hop in range(1, HOPS + 1)
    )


def key_of_row(row: Row) -> tuple[Any, ...]:
    return row.flow + (row.outttl, row.outipid)


def key_of_answer(answer: Answer) -> tuple[Any, ...]:
    return answer.probe.flow + (answer.probe.ttl, answer.probe.ip_id)


def pair(rows: list[tuple[Row, Columns]], answers: list[Answer]) -> list[Observed]:
    """Each row with what the routers did: of those alike, in their order."""
    seen = defaultdict(list)
    for answer in reversed(answers):
        seen[key_of_answer(answer)].append(answer)
    return [
        Observed(row, columns, seen[key_of_row(row)].pop())
        for row, columns in sorted(rows, key=lambda item: item[0].sendtime)
        if seen[key_of_row(row)]
    ]


@pytest.fixture(scope='module')
def lab() -> Iterator[Lab]:
    with Lab(routers=1) as lab:
        yield lab


@pytest.fixture(scope='module', params=list(product(('truncated', 'whole'), ('offload', 'finished'))), ids='-'.join)
def measured(lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    truncated, offload = request.param[0] == 'truncated', request.param[1] == 'offload'
    directory = tmp_path_factory.mktemp('measured')
    options = ['-w', 'answers.pcapng', '-p', '0', *([] if truncated else ['-T'])]
    lab.set_checksum_offload(offload)
    before = time_exceeded_received(lab.client)
    try:
        with responding(lab, directory / 'answers') as responder:
            with elfprobe(lab, *options, *map(lab.server_address, VERSIONS), cwd=directory) as run:
                for version in VERSIONS:  # from then on the path's length is known
                    assert ping(lab, version, '-c1').wait(5) == 0
                talk(lab, partial(is_every_way_used, responder))
                wait_until(responder.is_idle, 5, 'late answers are sent')
            rows = run.rows()
            with (directory / 'elf.csv').open() as file:
                columns = list(csv.DictReader(file))
            answers, packets = responder.answers(), list(blocks_in(directory / 'answers.pcapng'))
    finally:
        lab.set_checksum_offload(True)
    passed = [now - then for now, then in zip(time_exceeded_received(lab.client), before)]
    return Measured(offload, rows, answers, pair(list(zip(rows, columns)), answers), packets, passed)


def test_rows_and_answers_are_one_to_one(measured: Measured) -> None:
    """A row for each probe that came to the routers, when it came there, and none besides."""
    assert Counter(map(key_of_row, measured.rows)) == Counter(map(key_of_answer, measured.answers))
    assert all(0 < one.answer.arrived - one.row.sendtime < SCHEDULED for one in measured.observed)


def test_what_makes_no_row_passes(measured: Measured) -> None:
    """Second answers, too, and what cannot be known: the stack sees them, and nothing else."""
    for version, passed in zip(VERSIONS, measured.passed):
        observed = [one for one in measured.observed if one.answer.probe.version == version]
        sent = sum(len(one.answer.sent) for one in observed)
        assert passed == sent - sum(one.row.is_answered for one in observed) > 0


def test_packets_have_the_extensions(measured: Measured) -> None:
    """Those of -w. The rows have the texts of what was well-formed."""
    expected = {(one.row.dest, one.row.seq): one.columns for one in measured.observed}
    seen = Counter()
    for (probe, comment, _), (answer, _, is_inbound) in zip(measured.packets, measured.packets[1:]):
        if is_inbound:
            columns = expected.get((probe.dest, int(re.search(r'seq (\d+)', comment)[1])))
            icmp = answer.segment
            length = icmp[5] * 4 if answer.version == 4 else icmp[4] * 8
            with suppress(MalformedExtension):
                texts = (
                    extension_texts(icmp[8 + length :], is_cut=len(icmp) == 8 + length + 252)
                    if length
                    else ('', '')
                )
                if columns:
                    labels, interfaces = texts
                    shown = ''.join(character if character.isprintable() else '?' for character in interfaces)
                    assert (labels, shown) == (columns['mpls'], columns['ifinfo'])
                    seen[texts] += 1
    assert len(seen) > 5 and not any(one.columns['mpls'] for one in measured.observed if not one.row.is_answered)


def test_few_probes_go_farther(measured: Measured) -> None:
    """One hop, and only where the TTL of the last router's answer is odd."""
    farther = [one for one in measured.observed if not one.answer.way]
    odd = [
        one
        for one in measured.observed
        if one.row.outttl == HOPS and one.row.is_answered and one.row.recvttl != 65 - HOPS
    ]
    assert len(farther) <= len(odd)
    assert all(one.row.outttl == HOPS + 1 and not one.row.is_answered for one in farther)


def quote_of(answer: Answer) -> Packet:
    """What was quoted. In IPv6 the answer may have had an extension header."""
    assert answer.reply
    behind = len(WAYS[answer.way].header) + 1 if answer.reply.protocol == 0 else 0
    return parse_packet(answer.reply.segment[behind + 8 :])


@pytest.mark.parametrize('way', dict.fromkeys(way for version in VERSIONS for way in ways_of(version)))
def test_row(measured: Measured, way: str) -> None:
    """Of a probe that was answered this way: as it was answered, or without an answer, as WAYS says."""
    unmatched = WAYS[way].unmatched
    cells: dict[Case, list[Observed]] = {
        Case(version, protocol, measured.offload): []
        for version in VERSIONS
        if way in ways_of(version)
        for protocol in PROTOCOLS[version]
    }
    for one in measured.observed:
        if one.answer.way == way:
            cells[Case(one.answer.probe.version, one.answer.probe.protocol, measured.offload)].append(one)
    for case, observed in cells.items():
        assert {one.row.outttl for one in observed} >= OFTEN, case
        answered = [one for one in observed if one.row.is_answered]
        assert len(answered) == (0 if unmatched and unmatched.applies(case) else len(observed)), case
        for one in answered:
            assert_right(one)
        check_delays([one.row.recvtime - one.answer.sent[0][0] for one in answered], DELIVERED)


def assert_right(one: Observed) -> None:
    """The row tells what the hop, which answered, has sent."""
    row, columns, answer = one
    way, reply, quote = WAYS[answer.way], answer.reply, quote_of(answer)
    assert reply
    assert (row.outttl, row.responder, row.recvttl, row.inipid) == (
        answer.hop,
        reply.source,
        reply.ttl,
        quote.ip_id,
    )
    if way.source is own_address:
        assert row.responder == hop_address(reply.version, row.outttl)
    assert row.latency == row.recvtime - row.sendtime > way.delay * 1e9
    assert (row.source, row.qttl, row.qlen) == (answer.probe.source, quote.ttl, quote.length)
    assert (row.rsize, row.rtos, row.ripid) == (reply.length, reply.tos, reply.ip_id)
    expected = dict(outtos=answer.probe.tos, intos=quote.tos, mpls=way.mpls, ifinfo=way.ifinfo)
    for name, value in expected.items():
        assert value is None or column(columns, name) in (None, str(value)), name


def answered_by(lab: Lab, directory: Path, *ways: str) -> list[Observed]:
    """A run in which the routers answer some thousand probes in these ways alone."""
    with responding(lab, directory / 'answers', ways) as responder:
        with elfprobe(lab, '-p', '0', *map(lab.server_address, VERSIONS), cwd=directory) as run:
            talk(lab, lambda: len(responder.answers()) > 2000)
        return pair([(row, {}) for row in run.rows()], responder.answers())


def test_two_ttls_of_the_last_router(lab: Lab, tmp_path: Path) -> None:
    """As from two routers at the same hop, with ways back of different lengths: few probes go farther."""
    observed = answered_by(lab, tmp_path, 'all of it', 'odd TTL')
    assert sum(one.row.outttl > HOPS for one in observed) <= 3 * len(VERSIONS)


def test_checksums_of_a_nat(lab: Lab, tmp_path: Path) -> None:
    """UDP probes are quoted with the checksum of one sent before: better no answers than others'."""
    lab.set_checksum_offload(False)
    try:
        observed = answered_by(lab, tmp_path, 'checksum of another probe')
    finally:
        lab.set_checksum_offload(True)
    wrong = [
        one
        for one in observed
        if one.row.is_answered
        and not any(before < one.row.recvtime < after + SCHEDULED for before, after in one.answer.sent)
    ]
    assert not wrong


def test_sequence_numbers_that_a_middlebox_changes(lab: Lab, tmp_path: Path) -> None:
    """In front of hop 3. Answers from behind it quote other numbers, which the log says."""
    behind = 3
    with ExitStack() as stack:
        responder = stack.enter_context(responding(lab, tmp_path / 'answers', ['all of it'], (behind, 0x9ABCDEF0)))
        dests = [lab.server_address(version) for version in VERSIONS]
        run = stack.enter_context(elfprobe(lab, *dests, cwd=tmp_path))
        sends = [stack.enter_context(tcp_flow(lab, version)) for version in VERSIONS]
        numbers = iter(range(1, 1 << 16))

        def is_enough() -> bool:
            for _, number in zip(range(10), numbers):
                for send in sends:
                    send(number)
            answered = Counter((row.dest, row.outttl) for row in run.rows() if row.is_answered)
            return all(answered[dest, hop] > 20 for dest in dests for hop in range(1, HOPS + 1))

        wait_until(is_enough, 30, 'rows of all hops')
        assert run.stop() == 0
        observed = pair([(row, {}) for row in run.rows()], responder.answers())
    assert len(observed) == len(run.rows())
    for row, _, answer in observed:
        if row.is_answered:
            [(before, _)] = answer.sent
            assert before < row.recvtime < before + SCHEDULED and row.responder == hop_address(
                answer.probe.version, answer.hop
            )
    unanswered = Counter(row.outttl for row in run.rows() if not row.is_answered)
    assert not {hop for hop, count in unanswered.items() if hop < behind or count > 10}
    for version, dest in zip(VERSIONS, dests):
        where = f'before hop {behind} ({hop_address(version, behind)})'
        assert f'to {dest}: the TCP sequence numbers are changed {where}' in run.log


@pytest.mark.parametrize('ack_filter', ['drop', 'overwrite'])
def test_ack_filter(lab: Lab, tmp_path: Path, ack_filter: str) -> None:
    """In front of hop 2, while the client receives. It has to do with bare ACKs only, and probes are none."""
    before = 2
    with ExitStack() as stack:
        responder = stack.enter_context(
            responding(lab, tmp_path / 'answers', ['all of it'], ack_filter=(before, ack_filter))
        )
        dests = [lab.server_address(version) for version in VERSIONS]
        run = stack.enter_context(elfprobe(lab, *dests, cwd=tmp_path))
        sends = [stack.enter_context(download(lab, version)) for version in VERSIONS]

        def is_enough() -> bool:
            for send in 10 * sends:
                send()
            sent = Counter((answer.probe.dest, answer.hop) for answer in responder.answers())
            return all(sent[dest, 1] > 50 for dest in dests) and len(run.rows()) > 100

        wait_until(is_enough, 30, 'probes')
        assert run.stop() == 0
        ended = [answer.probe for answer in responder.answers()]
    own = {(row.flow, row.origseq) for row in run.rows()}
    assert not [packet for packet in ended if (packet.flow, packet.sequence) in own]
    probes, answered = (
        Counter((row.dest, row.outttl) for row in run.rows() if row.is_answered or everything)
        for everything in (True, False)
    )
    for dest in dests:
        for hop in range(1, HOPS + 1):
            assert probes[dest, hop] > 10 and answered[dest, hop] > 0.9 * probes[dest, hop]


def test_ack_filter_that_goes_by_length(lab: Lab, tmp_path: Path) -> None:
    """It writes ACKs of the client into probes: once that is seen, the destinations have no more probes.

    The queue is empty before each ACK, or it might be an older ACK into which the probe is written.
    """
    with ExitStack() as stack:
        responder = stack.enter_context(
            responding(lab, tmp_path / 'answers', ['all of it'], ack_filter=(2, 'overwrite by length'))
        )
        dests = [lab.server_address(version) for version in VERSIONS]
        run = stack.enter_context(elfprobe(lab, *dests, cwd=tmp_path))
        sends = [stack.enter_context(download(lab, version, in_turn=True)) for version in VERSIONS]

        def is_told() -> bool:
            for send in 10 * sends:
                send()
            return all(f'{dest}: an ACK filter on the way' in run.log for dest in dests)

        wait_until(is_told, 90, 'it is told')
        told = time.monotonic()
        wait_until(lambda: is_told() and time.monotonic() > told + 2, 20, 'more are sent')
        after = [answer for answer in responder.answers() if answer.arrived > (told + 1) * 10**9]
        assert responder.answers() and not after
        assert run.stop() == 0
    findings = json.loads((tmp_path / 'elf.json').read_text())['findings']
    found = {each['destination']: each for each in findings if each['kind'] == 'ack_filter'}
    for dest, version in zip(dests, VERSIONS):
        its, behind = found[dest]['figures'], {hop_address(version, hop) for hop in range(2, HOPS + 1)}
        assert found[dest]['hop'] >= 2 and its['responder'] in behind and its['answers'] >= 2
        assert found[dest]['from'] < found[dest]['until']


@pytest.mark.parametrize('version', [pytest.param(4, marks=pytest.mark.sample), 6])
def test_traceroute_sees_routers(lab: Lab, tmp_path: Path, version: int) -> None:
    """In another program's eyes these are routers, and the extensions of their answers what WAYS says."""
    server, way = lab.server_address(version), 'interface and MPLS labels'
    with responding(lab, tmp_path / 'answers', [way]) as responder:
        said = lab.client.run('traceroute', '-neU', '-q1', server).stdout.splitlines()[1:]
        answers = responder.answers()
    words = ','.join(INTERFACE[at : at + 4].hex() for at in range(4, len(INTERFACE), 4))
    labels = ['L={},E={},S={},T={}'.format(*entry.split('/')) for entry in THREE_LABELS_TEXT.split(';')]
    mpls, hops = f'MPLS:{"/".join(labels)}', range(1, HOPS + 1)
    # traceroute 2.1.2 does not know RFC 5837 and shows its words, 2.1.6 reads them.
    assert [line.split()[1:3] for line in said[:HOPS]] in [
        [[hop_address(version, hop), f'<{interface};{mpls}>'] for hop in hops]
        for interface in (f'2/15:{words}', 'INC:3,192.0.2.1,"eth0",mtu=1500')
    ]
    assert said[HOPS].split()[1] == server
    assert Counter((answer.hop, answer.way) for answer in answers if answer.way) == Counter(
        (hop, way) for hop in hops
    )
