"""Probes and answers as packets (-w): as others' tools read them, and as they were on the wire.

client - r1 - r2 - r3 - r4 - server        a probe with TTL k ends at lab.hop(version, k)
"""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.addresses import pack_address
from elf.clock import Clock
from elf.pcapng import PacketFile, Probe, Reply
from elf.usage import Failure
from lab import Host, end, nft_table, run, wait_until
from runs import (
    HOPS,
    ICMP,
    ICMPV6,
    PROBES,
    TCP,
    TIME_EXCEEDED,
    UDP,
    Packet,
    blocks_in,
    both,
    inside,
    ip_packets,
    realtime_offset,
    tcp_connected,
)
from runs import elfprobe as probing

root = pytest.mark.root
needs_tshark = pytest.mark.needs('tshark', 'capinfos')

OURS = '127.0.0.1', '::1'  # the addresses by which the loopback device reaches itself
V4, V6, ROUTER4, ROUTER6 = '127.0.0.9', '::1', '192.0.2.1', '2001:db8::1'
MPLS = bytes.fromhex('2000dcf6 00080101 000101ff')  # label 16, bottom of the stack, TTL 255
PROBE = Probe(sendtime=10**9, seq=17, pid=0, app=b'', outipid=0x1234, outttl=3, outtos=0xB8, payload_len=0,
              compensation=0, source=b'', dest=b'', sport=socket.htons(40000), dport=socket.htons(443), ident=0,
              protocol=0)  # fmt: skip
REPLY = Reply(recvtime=10**9 + 2158093, responder=b'', recvttl=62, inipid=0x4321, intos=0x20, qttl=2, qlen=99,
              rtos=0xC0, ripid=0x5EED)  # fmt: skip


def probe(dest: str, protocol: int, **fields: Any) -> Probe:
    source = pack_address('192.0.2.77' if '.' in dest else '2001:db8::77')
    return PROBE._replace(source=source, dest=pack_address(dest), protocol=protocol, **fields)


def made_file(path: Path) -> PacketFile:
    return PacketFile(str(path), 'a test', 'lo', Clock(), [*Probe._fields, *Reply._fields], Probe._fields)


def answered(file: PacketFile, sent: Probe, responder: str, extension: bytes = b'') -> None:
    file.add_answered([*sent, *REPLY._replace(responder=pack_address(responder))], extension)


def shark(path: Path, *fields: str) -> list[dict[str, str]]:
    """What tshark says of each packet, with all checksums verified."""
    options = [f'-o{protocol}.check_checksum:TRUE' for protocol in ('ip', 'tcp', 'udp')]
    shown = run(
        'tshark', '-nr', str(path), *options, '-Tfields', '-Eseparator=|', *(f'-e{field}' for field in fields)
    )
    # Some versions write a backslash twice.
    return [dict(zip(fields, line.replace('\\\\', '\\').split('|'))) for line in shown.stdout.splitlines()]


# Of each packet in test_each_kind_of_packet, some fields of tshark's. Those of a quoted packet come second.
SENT4 = {
    'frame.packet_flags_direction': '0x00000002', 'ip.src': '192.0.2.77', 'ip.dst': V4, 'ip.ttl': '3',
    'ip.dsfield': '0xb8', 'ip.id': '0x1234', 'ip.checksum.status': '1', 'frame.time_epoch': 1,
}  # fmt: skip
SENT6 = {'frame.packet_flags_direction': '0x00000002', 'ipv6.src': '2001:db8::77', 'ipv6.dst': V6,
         'ipv6.hlim': '3', 'ipv6.tclass': '0x000000b8', 'ipv6.flow': '0x001234', 'frame.time_epoch': 1}  # fmt: skip
CAME4 = {
    'frame.packet_flags_direction': '0x00000001', 'ip.src': f'{ROUTER4},192.0.2.77',
    'ip.dst': f'192.0.2.77,{V4}', 'ip.ttl': '62,2', 'ip.dsfield': '0xc0,0x20', 'ip.id': '0x5eed,0x4321',
    'ip.checksum.status': '1,1', 'frame.time_epoch': 1.002158093,
}  # fmt: skip
CAME6 = {
    'frame.packet_flags_direction': '0x00000001', 'ipv6.src': f'{ROUTER6},2001:db8::77',
    'ipv6.dst': f'2001:db8::77,{V6}', 'ipv6.hlim': '62,2', 'ipv6.tclass': '0x000000c0,0x00000020',
    'ipv6.flow': '0x005eed,0x004321',
    'icmpv6.type': '3', 'icmpv6.checksum.status': '1', 'frame.time_epoch': 1.002158093,
}  # fmt: skip
PORTS = {'udp.srcport': '40000', 'udp.dstport': '443'}
EXPECTED: list[dict[str, Any]] = [
    {**SENT4, **PORTS, 'udp.length': '10', 'udp.checksum': '0x5678', 'data.data': 'abcd', 'frame.len': '30'},
    {**CAME4, **PORTS, 'udp.length': '10', 'udp.checksum': '0x5678', 'icmp.type': '11',
     'icmp.checksum.status': '1'},
    {**SENT6, 'tcp.srcport': '40000', 'tcp.dstport': '443', 'tcp.seq_raw': str(0x89ABCDEF), 'tcp.flags': '0x0018',
     'frame.len': '60', 'frame.comment': 'hop 3, latency 2.158093 ms: answered in frame 4; row: seq 17, sendtime '
                                         '1000000000, app a\\x1bb, pid 7'},
    {**CAME6, 'tcp.srcport': '40000', 'frame.comment': 'hop 3, latency 2.158093 ms: answers frame 3'},
    {**SENT4, 'icmp.type': '8', 'icmp.ident': '40000', 'icmp.seq': '9', 'frame.len': '32'},
    {**CAME4, 'icmp.type': '11,8', 'icmp.ident': '40000', 'icmp.seq': '9', 'icmp.mpls.label': '16',
     'icmp.ext.checksum.status': '1'},
    {**SENT6, 'icmpv6.type': '128', 'icmpv6.echo.identifier': '0x9c40', 'frame.len': '50'},
    {**CAME6, 'icmpv6.type': '3,128', 'icmpv6.echo.identifier': '0x9c40', 'icmpv6.echo.sequence_number': '9',
     'icmp.mpls.label': '16', 'icmpv6.checksum.status': '1,2'},
    {**SENT6, **PORTS, 'udp.length': '1200', 'frame.len': '1240'},
    {**PORTS, 'ip.ttl': '62,1', 'ip.proto': '1,41', 'ipv6.dst': V6, 'ipv6.hlim': '2', 'icmp.type': '11'},
    {**SENT6, 'frame.comment': 'hop 3, no answer; row: seq 17, sendtime 1000000000', 'udp.length': str(0x400A),
     'frame.len': '50', 'is_malformed': True},
]  # fmt: skip


TIMES = {'frame.time_epoch'}


def numbers(text: str) -> list[int | str]:
    """The values of a field, as numbers if they are: versions of tshark differ in their hexadecimal digits."""
    return [int(value, 0) if re.fullmatch(r'\d+|0x[0-9a-f]+', value) else value for value in text.split(',')]


@needs_tshark
@pytest.mark.sample
def test_each_kind_of_packet(tmp_path: Path) -> None:
    """tshark finds in each what was recorded, and nothing malformed but a guarded probe."""
    path = tmp_path / 'made.pcapng'
    file = made_file(path)
    udp = probe(V4, UDP, payload_len=2, compensation=socket.htons(0xABCD), ident=10 << 16 | 0x5678)
    answered(file, udp, ROUTER4)
    answered(file, probe(V6, TCP, ident=0x89ABCDEF, pid=7, app=b'a\x1bb\0'), ROUTER6)
    answered(file, probe(V4, ICMP, payload_len=4, dport=0, ident=9), ROUTER4, MPLS)
    answered(file, probe(V6, ICMPV6, payload_len=2, dport=0, ident=9), ROUTER6, MPLS)
    answered(file, probe(V6, UDP, ident=1200 << 16 | 0x5678), ROUTER4)  # in a tunnel over IPv4
    file.add_unanswered(probe(V6, UDP, payload_len=2, ident=0x400A << 16 | 0x5678))  # guarded
    file.write()
    file.publish()
    file.close()

    said = run('capinfos', '-M', str(path)).stdout
    for part in 'nanoseconds (9)', f'packets:   {len(EXPECTED)}\n', 'Raw IP', 'Name = lo', 'a test', 'Recorded: ':
        assert part in said, said
    names = sorted({name for fields in EXPECTED for name in fields} - {'is_malformed'} | {'_ws.malformed'})
    seen = shark(path, *names)
    assert len(seen) == len(EXPECTED)
    zero = Clock().utc(0)
    for number, (found, expected) in enumerate(zip(seen, EXPECTED), 1):
        seconds = expected.get('frame.time_epoch')
        if seconds:  # tshark tells all nine digits
            assert abs(int(found['frame.time_epoch'].replace('.', '')) - zero - seconds * 10**9) < 10**6
        assert bool(found.pop('_ws.malformed')) == expected.get('is_malformed', False), number
        others = {name: numbers(value) for name, value in expected.items() if name in found.keys() - TIMES}
        assert {name: numbers(found[name]) for name in others} == others, number


def test_what_the_disk_does_not_take(tmp_path: Path) -> None:
    """The file ends with a whole packet, and those that are lost are counted."""
    file = made_file(tmp_path / 'made.pcapng')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = os.fstat(file._file.fd).st_size
    file.add_unanswered(probe(V4, UDP))
    file.write()
    packet = file.written
    for _ in range(100):
        file.add_unanswered(probe(V4, UDP))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3 * packet + packet // 2, limits[1]))
    try:
        with pytest.raises(Failure, match='cannot write .*made.pcapng.: File too large'):
            file.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (os.fstat(file._file.fd).st_size, file.written, file.lost) == (size + 3 * packet, 3 * packet, 98)
    file.close()
    assert not list(tmp_path.iterdir())


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Failure, match='argument -w/--write: cannot write .*made.pcapng.: No such file'):
        made_file(tmp_path / 'nowhere' / 'made.pcapng')


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'link'])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / 'made.pcapng'
    {'folder': path.mkdir, 'pipe': lambda: os.mkfifo(path), 'link': lambda: path.symlink_to('/dev/null')}[kind]()
    with pytest.raises(Failure, match='argument -w/--write: .* no regular file'):
        made_file(path)
    assert [each.name for each in tmp_path.iterdir()] == ['made.pcapng']


# Of a run


def outside(packet: Packet) -> tuple[Any, ...]:
    """What is recorded of the IP header of a probe and of an answer."""
    return packet.version, packet.source, packet.dest, packet.ttl, packet.protocol, packet.tos, packet.ip_id


def check_probe(probe: Packet, seen: Packet) -> None:
    """It is one that was on the wire, as far as it is recorded."""
    assert outside(probe) == outside(seen)
    length = {TCP: 8, UDP: 10, ICMP: 2, ICMPV6: 2}[probe.protocol]  # identifier and sequence are in sent's keys
    assert probe.segment[:length] == seen.segment[:length]
    assert abs(probe.time - seen.time) < 10**8


def check_answer(answer: Packet, seen: Packet) -> None:
    """It is one that was on the wire, as far as it is recorded."""
    assert outside(answer) == outside(seen)
    assert (outside(answer.quote), answer.quote.length) == (outside(seen.quote), seen.quote.length)
    assert answer.has_valid_checksum and answer.has_valid_header_checksum
    assert abs(answer.time - seen.time) < 10**8


@pytest.fixture
def silent(lab4) -> Iterator[Host]:
    """The second router, which answers nobody."""
    rules = 'icmp type time-exceeded drop; icmpv6 type time-exceeded drop;'
    with nft_table(lab4.routers[1], f'chain output {{ type filter hook output priority 0; {rules} }}'):
        yield lab4.routers[1]


@root
@needs_tshark
def test_packets_of_a_run(lab4, silent, tmp_path):
    """Each was on the wire, as far as it is recorded, and belongs to a row, and the other way round."""
    client = lab4.client
    (tmp_path / 'probes.pcapng').write_text('of an earlier run')
    client.run('ethtool', '-K', client.device, 'tx', 'off')  # or no device completes checksums
    try:
        with client.capture(filter=f'{PROBES} or {TIME_EXCEEDED}') as wire, probing(
            lab4, '-w', 'probes.pcapng', '-p', '5', *both(lab4), cwd=tmp_path
        ) as elf:
            with tcp_connected(lab4, 4, 4000) as tcp4, tcp_connected(lab4, 6, 4000) as tcp6, inside(client):
                udp = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
                pings = [client.popen('ping', '-nq', '-i.01', server) for server in both(lab4)]

                def cells() -> set[tuple[int, bool, int]]:
                    """Protocol, family and hop of the rows so far, after some more packets."""
                    for sender, receiver in tcp4, tcp6:
                        sender.sendall(bytes(100))
                        receiver.recv(9000)
                    for sock, server in zip(udp, both(lab4)):
                        sock.sendto(bytes(100), (server, 9))
                    return {(row.protocol, ':' in row.dest, row.outttl) for row in elf.rows()}

                wait_until(lambda: len(cells()) == 6 * len(HOPS), 30, 'rows of each protocol and hop')
                for process in pings:
                    end(process)
                for sock in udp:
                    sock.close()
            assert elf.stop() == 0
    finally:
        client.run('ethtool', '-K', client.device, 'tx', 'on')
    assert 'packets to probes.pcapng' in elf.log and 'probes.1.pcapng' in elf.log
    assert (tmp_path / 'probes.1.pcapng').read_text() == 'of an earlier run'

    sent, came = {}, {}
    for seen in ip_packets(wire):
        if seen.is_time_exceeded:
            came[seen.quote.flow, seen.quote.sequence, seen.source] = seen
        else:
            sent[seen.flow, seen.sequence, seen.ttl] = seen
    rows = {(row.dest, row.seq): row for row in elf.rows()}
    blocks, frames, offset = list(blocks_in(tmp_path / 'probes.pcapng')), 0, realtime_offset()
    following = iter(blocks)
    for probe, comment, is_inbound in following:
        row = rows.pop((probe.dest, int(comment.split('seq ')[1].split(',')[0])))
        latency = f'latency {row.latency / 1e6:.6f} ms'
        what = f'{latency}: answered in frame {frames + 2}' if row.is_answered else 'no answer'
        assert comment == f'hop {row.outttl}, {what}; row: seq {row.seq}, sendtime {row.sendtime}'
        assert not is_inbound and row.is_answered == (row.outttl != 2)
        assert probe.flow == row.flow and abs(probe.time - offset - row.sendtime) < 10**7
        check_probe(probe, sent[probe.flow, probe.sequence, row.outttl])
        frames += 1
        if row.is_answered:
            answer, comment, is_inbound = next(following)
            assert is_inbound and comment == f'hop {row.outttl}, {latency}: answers frame {frames}'
            assert abs(answer.time - offset - row.recvtime) < 10**7
            check_answer(answer, came[probe.flow, probe.sequence, row.responder])
            frames += 1
    assert not rows and frames == len(blocks)
    shown = shark(tmp_path / 'probes.pcapng', 'frame.comment', 'udp.checksum.status', 'udp.length')
    assert [each['frame.comment'] for each in shown] == [block.comment for block in blocks]
    usual = [
        each['udp.checksum.status']
        for each in shown
        if each['udp.length'] == '10'
        if 'row' in each['frame.comment']
    ]
    assert usual and set(usual) == {'1'}  # so the source address and the payload are right, too


@root
def test_disk_takes_no_more_packets(lab4, tmp_path):
    """The run ends, and says why; what is in the file is whole."""
    lab4.client.popen('ping', '-nq', '-i.01', lab4.server_address(4))
    via = lab4.client.command('prlimit', '--fsize=60000')
    with probing(lab4, '-w', 'probes.pcapng', lab4.server_address(4), cwd=tmp_path, via=via) as elf:
        assert elf.wait() == 1
    lab4.client.end_processes()
    [complaint] = [line for line in elf.log.splitlines() if line.startswith('elfprobe.py: ')]
    assert "cannot write 'probes.pcapng': File too large" in complaint
    [lost] = re.findall(r'(\d+) packets could not be written to probes.pcapng', elf.log)
    rows = elf.rows()
    written = len(list(blocks_in(tmp_path / 'probes.pcapng')))
    assert written > 20 and written + int(lost) == len(rows) + sum(row.is_answered for row in rows)
