"""The path model of elfprobe.c, compiled for the host: no kernel, no root.

model = PathModel(interval_ns=10_000_000)
path = new_path()
ttl = model.choose_hop(path, now, ticks)
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ELFPROBE_C = HERE.parent / 'elfprobe.c'
ACCEPTED = 'unknown-pragmas', 'sign-compare', 'unused-parameter'  # warnings that gcc need not give
MAX_HOPS = 32
NONE_DUE, HOP_UNRESPONSIVE = 0, -1
BACKING_OFF, RETRIED_EARLY = 1, 2
USUAL, GUARDED, FALLBACK = 0, 1, 2  # enum probe_form

# What the section needs from the rest of elfprobe.c, as plain C.
PRELUDE = """\
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
#define NSEC_PER_MSEC 1000000ULL
#define NSEC_PER_SEC 1000000000ULL
#define IPPROTO_TCP 6
#define MAX_HOPS 32
#define READ_ONCE(x) (*(volatile __typeof__(x) *)&(x))
#define ADVANCE(pointer, nr, max) ((pointer) += (nr))
#define inline __attribute__((unused)) inline
"""
# The functions are static. Each gets a name that the library exports.
EXPORTED = """\
int exported_choose_hop(struct path *p, __u64 now, __u64 ticks) { return choose_hop(p, now, ticks); }
void exported_probe_postponed(struct path *p, __u32 nr) { probe_postponed(p, nr); }
int exported_takes_turn(struct path *p, __u32 nr, __u64 slot, __u64 now) { return takes_turn(p, nr, slot, now); }
static __u64 queues[RESPONDERS];
__u64 exported_probe_reserved(struct path *p, __u32 nr, __u64 now, __u64 ticks)
{ return probe_reserved(p, nr, queues, now, ticks); }
int exported_probe_form(struct path *p, __u32 nr, int can_fall_back, __u64 ticks)
{ return probe_form(p, nr, hop_at(p, nr), can_fall_back, ticks); }
void exported_probe_sent(struct path *p, __u32 nr, __u32 form, __u64 reserved, __u64 due, __u64 sendtime)
{ probe_sent(p, nr, form, reserved, due, sendtime); }
void exported_probe_cancelled(struct path *p, __u32 nr, __u64 reserved) { probe_cancelled(p, nr, reserved); }
void exported_hop_replied(struct path *p, __u32 nr, __u32 form, __u64 sendtime, __u32 seen, __u32 queue, __u64 now)
{ hop_replied(p, nr, form, sendtime, seen, queues, queue, now); }
void exported_destination_seen(struct path *p, __u32 seen, __u64 gap, int is_first, int has_data, __u64 now,
                               __u64 ticks)
{ destination_seen(p, seen, gap, is_first, has_data, now, ticks); }
int exported_flow_looked(struct path *p, __u32 protocol, struct progress *flow, struct flow_look *look,
                         int can_stall, __u64 now)
{ return flow_looked(p, trust_in(p, protocol), flow, look, can_stall, now); }
void exported_flow_probed(struct path *p, __u32 protocol, struct progress *flow, __u32 ttl, __u32 form,
                          __u64 now)
{ flow_probed(trust_in(p, protocol), flow, ttl, form, now); }
void exported_flow_received(struct path *p, struct reception *received, struct progress *flow, __u64 now)
{ (void)p; flow_received(received, flow, now); }
int exported_look_at_conversation(struct path *p, struct reception *received, struct progress *flow,
                                  struct flow_look *look, __u64 now)
{ (void)p; look_at_conversation(received, flow, look, now); return is_conversation(received, flow); }
int exported_may_begin_probed(struct path *p, __u32 protocol, __u32 port, __u32 is_probed, __u64 now)
{ return may_begin_probed(trust_in(p, protocol), port, is_probed, now); }
void exported_destination_reached(struct path *p, __u32 ttl, __u64 now) { destination_reached(p, ttl, now); }
"""


class Backoff(ctypes.Structure):
    _fields_ = [('level', ctypes.c_uint8), ('state', ctypes.c_uint8), ('false_alarms', ctypes.c_uint8)]


class Turns(ctypes.Structure):
    _fields_ = [
        ('flows', ctypes.c_uint32),
        ('since', ctypes.c_uint16),
        ('taken', ctypes.c_uint8),
        ('expected', ctypes.c_uint8),
    ]


class Hop(ctypes.Structure):
    _fields_ = [
        ('due', ctypes.c_uint64),
        ('since', ctypes.c_uint64),
        ('rtt', ctypes.c_uint32),
        ('unanswered', ctypes.c_uint8),
        ('backoff', Backoff),
        ('turns', Turns),
    ]


class Pacing(ctypes.Structure):
    _fields_ = [
        ('next_due', ctypes.c_uint64),
        ('next_due_tick', ctypes.c_uint64),
        ('last_sent', ctypes.c_uint64),
        ('seq', ctypes.c_uint32),
        ('last_probed', ctypes.c_uint8),
    ]


class Distance(ctypes.Structure):
    _fields_ = [
        ('changed_at', ctypes.c_uint64),
        ('reply_distances', ctypes.c_uint64),
        ('last_explored', ctypes.c_uint64),
        ('length', ctypes.c_uint8),
        ('reverse', ctypes.c_uint8),
        ('longer_packets', ctypes.c_uint8),
        ('max_ttl_tried', ctypes.c_uint8),
        ('explore', ctypes.c_uint8),
        ('is_confirmed', ctypes.c_uint8),
        ('proven', ctypes.c_uint8),
        ('symmetric', ctypes.c_uint8),
        ('fallbacks', ctypes.c_uint8),
        ('guards_blocked', ctypes.c_uint8),
        ('by_data', ctypes.c_uint8),
        ('shorter_acks', ctypes.c_uint8),
    ]


class Liveness(ctypes.Structure):
    _fields_ = [
        ('last_received', ctypes.c_uint64),
        ('outage_start', ctypes.c_uint64),
        ('outage_end', ctypes.c_uint64),
        ('farthest_reply', ctypes.c_uint64),
        ('routers_proven', ctypes.c_uint64),
        ('last_responsive', ctypes.c_uint8),
    ]


class Trust(ctypes.Structure):
    _fields_ = [
        ('last_moved', ctypes.c_uint64),
        ('paused_until', ctypes.c_uint64),
        ('last_strike', ctypes.c_uint64),
        ('exam', ctypes.c_uint64),
        ('episode', ctypes.c_uint64),
        ('exams', ctypes.c_uint32),
        ('suspicion', ctypes.c_int),
        ('suspected_at', ctypes.c_uint64),
        ('awaits', ctypes.c_uint8),
        ('strikes', ctypes.c_uint8),
        ('passed', ctypes.c_uint8),
        ('max_ttl', ctypes.c_uint8),
        ('has_stalled', ctypes.c_uint8),
        ('doubt', ctypes.c_uint8),
        ('doubted_port', ctypes.c_uint32),
        ('doubted_at', ctypes.c_uint64),
        ('watched_until', ctypes.c_uint64),
    ]


class Flow(ctypes.Structure):
    """struct progress."""

    _fields_ = [
        ('moved', ctypes.c_uint64),
        ('since', ctypes.c_uint64),
        ('last_probed', ctypes.c_uint64),
        ('last_unproven', ctypes.c_uint64),
        ('last_repeat', ctypes.c_uint64),
        ('stalled_at', ctypes.c_uint64),
        ('position', ctypes.c_uint32),
        ('segments', ctypes.c_uint32),
        ('exams', ctypes.c_uint32),
        ('repeats', ctypes.c_uint8),
        ('doubted', ctypes.c_uint8),
        ('withheld', ctypes.c_uint8),
        ('under_probes', ctypes.c_uint8),
        ('resend_probed', ctypes.c_uint8),
        ('tries', ctypes.c_uint8),
        ('reported', ctypes.c_uint8),
    ]


class Look(ctypes.Structure):
    """struct flow_look."""

    _fields_ = [
        *(
            (name, ctypes.c_uint32)
            for name in (
                'position',
                'segments',
                'timeouts',
                'outstanding',
                'srtt',
                'port',
                'is_one_way',
                'is_probed',
            )
        ),
        ('patience', ctypes.c_uint64),
    ]


class Reception(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_uint64) for name in ('last', 'gap', 'left')), ('count', ctypes.c_uint32)]


class Path_(ctypes.Structure):
    """struct path."""

    _fields_ = [
        ('pacing', Pacing),
        ('distance', Distance),
        ('liveness', Liveness),
        ('excluded', ctypes.c_uint8),
        ('flows_only', ctypes.c_uint8),
        ('arrival_reported', ctypes.c_uint8),
        ('trusts', Trust * 2),  # of TCP, of all others
        ('responders', ctypes.c_uint16 * (MAX_HOPS + 1)),
        ('hops', Hop * (MAX_HOPS + 1)),
    ]


def section() -> str:
    """Return the text of the path model in elfprobe.c."""
    text = ELFPROBE_C.read_text()
    begin = text.index('/* ---- Path model: pacing')
    structs = (text.index(f'struct {name} {{') for name in ('progress', 'flow_look'))
    before = ''.join(text[each : text.index('};', each) + 3] for each in structs)
    return before + text[begin : text.index('/* ---- ', begin + 8)]


def compile_c(text: str, output: Path, *flags: str) -> None:
    """Compile C text with gcc. CalledProcessError with gcc's messages on standard error."""
    source = output.with_suffix('.c')
    source.write_text(text)
    warnings = '-Wall', '-Wextra', '-Werror', *(f'-Wno-{name}' for name in ACCEPTED)
    checks = '-fsanitize=undefined', '-fno-sanitize-recover'
    subprocess.run(['gcc', '-O2', *warnings, *checks, *flags, '-o', str(output), str(source)], check=True)


def parameters(interval_ns: int, rate_global: bool, tick_ns: int) -> list[str]:
    """Return gcc's -D flags."""
    return [f'-DINTERVAL_NS={interval_ns}ULL', f'-DRATE_GLOBAL={int(rate_global)}', f'-DTICK_NS={tick_ns}ULL']


@lru_cache(maxsize=None)
def shared_library(*flags: str) -> bytes:
    """Return the path model as a shared library, compiled once for the same -D flags."""
    sizes = 'unsigned int path_size = sizeof(struct path), flow_size = sizeof(struct progress);\n'
    with tempfile.TemporaryDirectory(prefix='elf-') as directory:
        library = Path(directory, 'path_model.so')
        compile_c(PRELUDE + section() + EXPORTED + sizes, library, '-shared', '-fPIC', *flags)
        return library.read_bytes()


class PathModel:
    """The functions of one build. Each takes a path as its first argument."""

    def __init__(self, interval_ns: int = 10_000_000, rate_global: bool = False, tick_ns: int = 4_000_000) -> None:
        with tempfile.NamedTemporaryFile(prefix='elf-', suffix='.so') as library:  # each has queues of its own
            library.write(shared_library(*parameters(interval_ns, rate_global, tick_ns)))
            library.flush()
            self._library = ctypes.CDLL(library.name)
        size = ctypes.c_uint.in_dll(self._library, 'path_size').value
        assert size == ctypes.sizeof(Path_), 'struct path has changed: change Path_, too'
        assert ctypes.c_uint.in_dll(self._library, 'flow_size').value == ctypes.sizeof(Flow)
        u64, u32 = ctypes.c_uint64, ctypes.c_uint32
        self._arguments = {
            'choose_hop': (u64, u64),
            'probe_postponed': (u32,),
            'takes_turn': (u32, u64, u64),
            'probe_reserved': (u32, u64, u64),
            'probe_form': (u32, ctypes.c_int, u64),
            'probe_sent': (u32, u32, u64, u64, u64),
            'probe_cancelled': (u32, u64),
            'hop_replied': (u32, u32, u64, u32, u32, u64),
            'destination_seen': (u32, u64, ctypes.c_int, ctypes.c_int, u64, u64),
            'flow_looked': (u32, ctypes.POINTER(Flow), ctypes.POINTER(Look), ctypes.c_int, u64),
            'flow_probed': (u32, ctypes.POINTER(Flow), u32, u32, u64),
            'flow_received': (ctypes.POINTER(Reception), ctypes.POINTER(Flow), u64),
            'look_at_conversation': (ctypes.POINTER(Reception), ctypes.POINTER(Flow), ctypes.POINTER(Look), u64),
            'may_begin_probed': (u32, u32, u32, u64),
            'destination_reached': (u32, u64),
        }
        for name, arguments in self._arguments.items():
            function = getattr(self._library, f'exported_{name}')
            function.argtypes = (ctypes.POINTER(Path_), *arguments)
            function.restype = ctypes.c_uint64 if name == 'probe_reserved' else ctypes.c_int

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, f'exported_{name}')


def new_path(hops: dict[int, dict[str, int]] | None = None, **fields: int) -> Path_:
    """Return a path with these fields; those of its records by their names alone."""
    path = Path_()
    for name, value in fields.items():
        record = next(r for r in (path.pacing, path.distance, path.liveness, path) if hasattr(r, name))
        setattr(record, name, value)
    for number, known in (hops or {}).items():
        hop = path.hops[number]
        for name, value in known.items():
            setattr(hop if hasattr(hop, name) else hop.backoff, name, value)
    return path
