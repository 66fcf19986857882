"""The programs of elfprobe.c on one packet at a time (BPF_PROG_TEST_RUN), and the maps beside them.

    with own_namespace(), Programs(notrunc=True) as programs:
        verdict, frame = programs.run('elf_probe', frame)       # one program alone
        verdict, frame = programs.receive(frame)                # elf_ingress, at TC ingress or at XDP
        programs.follow('198.51.100.80', length=5)
        with programs.attached() as send:
            [probe] = send(packet)                              # elf_egress and all that comes of it

The kernel runs a program as if the packet were about to leave by, or had come in from, the loopback
device. So a clone goes to loopback, too: in a namespace of our own, where elf_egress is attached to it,
it is made a probe there, and a packet socket sees it leave.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import socket
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Iterator, NamedTuple

import bcc
import pyroute2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import elfprobe
from elf.addresses import address_text, pack_address
from elf.devices import Device, Frame
from elf.options import Config
from elf.results import Results
from elf.rows import NAMES
from elf.summary import Summary

LOOPBACK = Device('lo', 1)
TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_STOLEN = -1, 2, 4
XDP_DROP, XDP_PASS = 1, 2
DROP, PASS = 'drop', 'pass'  # verdicts of elf_ingress, wherever it runs
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
BPF_NOEXIST = 1  # linux/bpf.h
# BCC's library, by a handle of our own: what BCC declares of functions' arguments does not matter here. BCC
# 0.31 began to declare those of bpf_prog_test_run_opts, with a structure of its own, and ctypes then takes no
# other. BCC 0.26 declares nothing.
LIBBCC = ctypes.CDLL(bcc.lib._name, use_errno=True)
FRAME_MAX = 4096
MAX_HOPS = 32
USUAL, GUARDED, FALLBACK = 0, 1, 2  # enum probe_form


class Options(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf, bpf/bpf.h; what is 0 is left to the kernel."""

    _fields_ = [
        ('sz', ctypes.c_size_t),
        ('data_in', ctypes.c_char_p),
        ('data_out', ctypes.c_void_p),
        ('data_size_in', ctypes.c_uint32),
        ('data_size_out', ctypes.c_uint32),
        ('ctx_in', ctypes.c_void_p),
        ('ctx_out', ctypes.c_void_p),
        ('ctx_size_in', ctypes.c_uint32),
        ('ctx_size_out', ctypes.c_uint32),
        ('retval', ctypes.c_uint32),
        ('repeat', ctypes.c_int),
        ('duration', ctypes.c_uint32),
        ('flags', ctypes.c_uint32),
        ('cpu', ctypes.c_uint32),
        ('batch_size', ctypes.c_uint32),
    ]


class SkBuff(ctypes.Structure):
    """struct __sk_buff, linux/bpf.h. The kernel takes and tells the fields that have a name here."""

    _fields_ = [
        ('_1', ctypes.c_uint32 * 2),
        ('mark', ctypes.c_uint32),
        ('_2', ctypes.c_uint32 * 5),
        ('priority', ctypes.c_uint32),
        ('_3', ctypes.c_uint32 * 3),
        ('cb', ctypes.c_uint32 * 5),
        ('_4', ctypes.c_uint32 * 21),
        ('tstamp', ctypes.c_uint64),
        ('_5', ctypes.c_uint32),
        ('gso_segs', ctypes.c_uint32),
        ('_6', ctypes.c_uint64),
        ('gso_size', ctypes.c_uint32),
        ('_7', ctypes.c_uint32 * 3),
    ]


class Outcome(NamedTuple):
    verdict: int
    frame: bytes  # the packet, afterwards


class Received(NamedTuple):
    verdict: str  # DROP or PASS
    frame: bytes  # the packet, afterwards


class Flight(NamedTuple):
    """A probe in flight, in host order: its key, then what is known of it."""

    dest: str
    sport: int
    dport: int
    ident: int
    protocol: int
    seq: int = 0
    origseq: int = 0
    outttl: int = 1
    outipid: int = 0
    sendtime: int = 1
    payload_len: int = 0


@contextmanager
def own_namespace() -> Iterator[None]:
    """Moves this thread into a new network namespace, which has a loopback device that is up and
    nothing else, and ends with the block or the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    former = os.open('/proc/thread-self/ns/net', os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) < 0:
            raise OSError(ctypes.get_errno(), 'unshare')
        with pyroute2.IPRoute() as ipr:
            ipr.link('set', index=LOOPBACK.ifindex, state='up')
        yield
    finally:
        if libc.setns(former, CLONE_NEWNET) < 0:
            raise OSError(ctypes.get_errno(), 'setns')
        os.close(former)


class Programs:
    """elfprobe.c loaded, with `with_warnings` always compiled; `config` goes to `Config`, and `platform`
    changes fields of this machine's `elfprobe.Platform`."""

    def __init__(
        self,
        by_owner: bool = False,
        frame: Frame = Frame.ETHERNET,
        ingress_tc: bool = True,
        tcx: bool = True,
        has_routes: bool = False,
        with_warnings: bool = False,
        more_programs: dict[str, int] | None = None,
        platform: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        build = elfprobe.Build(frame, ingress_tc, tcx, by_owner)
        changes = dict(platform or {})
        if not has_routes:  # everything is on-link at the loopback device
            changes['routes'] = elfprobe.RouteOffsets()
        self.platform = dataclasses.replace(elfprobe.Platform.detect(), **changes)
        options = Config(('none',), cache=not with_warnings, **config)
        self.kernel = elfprobe.Kernel(options, build, self.platform, with_warnings, more_programs)
        self.results = Results(self.kernel, Summary())
        self._verdicts = {XDP_DROP: DROP, XDP_PASS: PASS}
        if ingress_tc:
            self._verdicts = {TC_ACT_SHOT: DROP, TC_ACT_UNSPEC: PASS}
        self._destinations = elfprobe.Destinations(self.kernel)
        self._out = ctypes.create_string_buffer(FRAME_MAX)
        self._stack = ExitStack()
        self._stack.callback(self.kernel.close)

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    # Programs

    def run(self, name: str, frame: Any, context: SkBuff | None = None) -> Outcome:
        """One program on a packet; `context` is read and written. OSError where the kernel refuses."""
        out = ctypes.addressof(self._out)
        ran = self._test_run(name, frame, context, data_out=out, data_size_out=FRAME_MAX)
        return Outcome(ctypes.c_int32(ran.retval).value, ctypes.string_at(out, ran.data_size_out))

    def receive(self, frame: Any) -> Received:
        """Run elf_ingress on a packet."""
        verdict, out = self.run('elf_ingress', frame)
        return Received(self._verdicts[verdict], out)

    def duration(self, name: str, frame: Any, repeat: int, context: SkBuff | None = None) -> int:
        """ns that a run of one program on a packet takes, the mean of so many in a row."""
        return int(self._test_run(name, frame, context, repeat=repeat).duration)

    def _test_run(self, name: str, frame: Any, context: SkBuff | None, **fields: int) -> Options:
        data = bytes(frame)
        options = Options(sz=ctypes.sizeof(Options), data_in=data, data_size_in=len(data), **fields)
        if context is not None:
            options.ctx_in = options.ctx_out = ctypes.addressof(context)
            options.ctx_size_in = options.ctx_size_out = ctypes.sizeof(context)
        program = self.kernel.program(name)
        if LIBBCC.bpf_prog_test_run_opts(program, ctypes.byref(options)) < 0:
            raise OSError(ctypes.get_errno(), f'{name} was not run')
        return options

    @contextmanager
    def attached(self) -> Iterator[Callable[[Any], list[bytes]]]:
        """Has clones come through elf_egress, as when the driver has attached it. Yields a function that
        has a packet leave, which must not change it, and gives what left besides: the probe, if any."""
        with ExitStack() as stack:
            ipr = stack.enter_context(pyroute2.IPRoute())
            hook = elfprobe.Hook('tc', '')
            *_, egress = elfprobe.attachments(ipr, [LOOPBACK], self.kernel, hook, self.platform.has_tcx)
            stack.enter_context(egress)
            wire = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            wire.bind((LOOPBACK.name, ETH_P_ALL))

            def send(frame: Any) -> list[bytes]:
                self.open_foreign_flow(frame)
                assert self.run('elf_egress', frame) == (TC_ACT_UNSPEC, bytes(frame))
                return list(left_by(wire))

            yield send

    # Maps

    def clear(self) -> None:
        """Forgets everything that was seen, but lets probes be made."""
        self.rows()
        for name in 'paths', 'in_flight', 'partial_checksums', 'schedules', 'counters':
            self.empty(name)
        self.set_reservation()
        self.set_alive_until(1 << 63)

    def empty(self, name: str) -> None:
        """Remove a map's entries; those of an array become 0."""
        table = self.kernel.map(name)
        for key in [key for key, _ in table.raw_items()]:
            if not table.remove(key):
                value = table.get(key)
                table.put(key, [table.new() for _ in value] if isinstance(value, list) else table.new())

    def set_alive_until(self, when: int) -> None:
        """The time (CLOCK_MONOTONIC, ns) after which no more probes are made."""
        self.kernel.map('alive_until').put(0, when)

    def set_reservation(self, **fields: int) -> None:
        """What elf_probe finds, on whichever CPU it runs, and with PREEMPT_RT in whichever task.

        Unless `form` is given, the probe has its usual one.
        """
        if self.platform.is_preemptible:
            self.empty('task_scratch')
        table = self.kernel.map('cpu_scratch')
        per_cpu = table.get(0)
        for scratch in per_cpu:
            ctypes.memset(ctypes.addressof(scratch), 0, ctypes.sizeof(scratch))
            for name, value in {'form': USUAL, **fields}.items():
                setattr(scratch.reservation, name, value)
        table.put(0, per_cpu)

    def follow(self, address: str, hops: dict[int, dict[str, int]] | None = None, **fields: int) -> None:
        """Make an address a target with this state of its path; `hops` by number."""
        path = self.new_path(**fields)
        for number, known in (hops or {}).items():
            for name, value in known.items():
                set_field(path.hops[number], name, value)
        assert self._destinations.add(pack_address(address), path)

    def new_path(self, **fields: int) -> Any:
        """Return a struct path with these fields; those of its records by their names alone.

        Unless `proven` is given, all hops are if the length is, and else those up to the farthest that answers.
        """
        path = self.kernel.map('paths').new()
        fields.setdefault('proven', MAX_HOPS if fields.get('length') else fields.get('last_responsive', 0))
        for name, value in fields.items():
            set_field(path, name, value)
        return path

    def set_path(self, address: str, path: Any) -> None:
        self.kernel.map('paths').put(pack_address(address), path)

    def path(self, address: str) -> Any:
        """struct path of an address."""
        return self.kernel.map('paths').get(pack_address(address))

    def open_foreign_flow(self, frame: Any, **fields: int) -> None:
        """Have the TCP flow of a frame (scapy's) be one whose peer knows it, as none here has a socket.

        `fields` set fields of struct flow, or of a struct inside it, by their names alone.
        """
        layer, ip = frame, None
        while layer and hasattr(layer, 'payload') and layer.name != 'TCP':
            ip = layer if layer.name in ('IP', 'IPv6') else ip
            layer = layer.payload
        if not ip or not layer or layer.name != 'TCP':
            return
        tcp = layer
        table = self.kernel.map('flows')
        key, flow = table.key_type(), table.new()
        flow.first_seq, flow.first_ack, flow.next_seq, flow.last_ack = (
            tcp.seq,
            (tcp.ack - 1) % 2**32,
            tcp.seq,
            tcp.ack,
        )
        flow.is_open = 1
        for name, value in fields.items():
            set_field(flow, name, value)
        key.sport, key.dport, key.protocol = socket.htons(tcp.sport), socket.htons(tcp.dport), socket.IPPROTO_TCP
        for field, address in ('source', ip.src), ('dest', ip.dst):
            ctypes.memmove(ctypes.addressof(key) + getattr(type(key), field).offset, pack_address(address), 16)
        table.put(bytes(key), flow)

    def put_in_flight(self, flight: Flight, cwnd: int = 0) -> None:
        """cwnd: the congestion window, if the probe's socket is on this machine and TCP's."""
        self.putter(flight, flags=0, cwnd=cwnd)()

    def putter(self, flight: Flight, flags: int = BPF_NOEXIST, cwnd: int = 0) -> Callable[[], None]:
        """A function that puts it in flight, often and fast; FileExistsError if it is already."""
        table = self.kernel.map('in_flight')
        key, probe = table.key_type(), table.new()
        fields = flight._replace(sport=socket.htons(flight.sport), dport=socket.htons(flight.dport))
        for name, value in fields._asdict().items():
            if name != 'dest':
                setattr(key if hasattr(key, name) else probe, name, value)
        ctypes.memmove(ctypes.addressof(key.dest), pack_address(flight.dest), 16)
        probe.tcp.cwnd = cwnd

        def put() -> None:
            if bcc.lib.bpf_update_elem(table.fd, ctypes.byref(key), ctypes.byref(probe), flags):
                raise OSError(ctypes.get_errno(), f'{flight} was not put in flight')

        return put

    def in_flight(self) -> list[Flight]:
        table = self.kernel.map('in_flight')
        return [
            Flight(
                address_text(bytes(key.dest)),
                socket.ntohs(key.sport),
                socket.ntohs(key.dport),
                key.ident,
                key.protocol,
                probe.seq,
                probe.origseq,
                probe.outttl,
                probe.outipid,
                probe.sendtime,
            )
            for key, probe in ((table.key_type.from_buffer_copy(key), probe) for key, probe in table.items())
        ]

    def counters(self) -> dict[str, int]:
        """Those that are not 0, over all CPUs."""
        sums = self.kernel.counters()
        return {name: value for name, value in sums.items() if value}

    def rows(self) -> list[dict[str, str]]:
        """Rows of the replies since the last call, by the columns' names."""
        return parsed(self.results.take())

    def expired(self, sent_before: int) -> list[dict[str, str]]:
        """Rows of the probes that left before this time and are no longer waited for."""
        return parsed("".join(self.results.expire(sent_before)))


def set_field(struct: Any, name: str, value: int) -> None:
    """Set a field of a ctypes structure, or of one inside it."""
    setattr(next(record for record in records(struct) if hasattr(record, name)), name, value)


def get_field(struct: Any, name: str) -> Any:
    """Return a field of a ctypes structure, or of one inside it."""
    return next(getattr(record, name) for record in records(struct) if hasattr(record, name))


def records(struct: Any) -> Iterator[Any]:
    """Yield the structure, then those that are inside it."""
    yield struct
    for name, kind, *_ in struct._fields_:
        if hasattr(kind, '_fields_'):
            yield from records(getattr(struct, name))


def parsed(rows: str) -> list[dict[str, str]]:
    return [dict(zip(NAMES, row.split(','))) for row in rows.splitlines()]


def left_by(wire: socket.socket) -> Iterator[bytes]:
    """The frames that a packet socket has seen leave."""
    while True:
        try:
            frame, address = wire.recvfrom(FRAME_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if address[2] == socket.PACKET_OUTGOING:
            yield frame
