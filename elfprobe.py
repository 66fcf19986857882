#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-only
"""Hop-by-hop latency inside an application's own flow.

$ sudo python3 elfprobe.py -i eno2 -a speedtest
14:02:11.396 tracing speedtest (pid 4127)
14:02:11.402 probing on eno2, answers read at TC ingress (...), then dropped; rows go to elf.csv
^C14:02:19.120 2804 probes, 2797 replies, 7 unanswered
$ head -3 elf.csv
recvcpu,seq,origseq,latency,sendtime,recvtime,dest,responder,outttl,recvttl,sport,dport,protocol,outipid,inipid
0,0,2943351213,211358,731841604110,731841815468,203.0.113.80,192.0.2.1,1,64,40112,443,6,21931,21931
1,1,2943352661,1498120,731851689002,731853187122,203.0.113.80,198.51.100.9,2,254,40112,443,6,21945,21945

A TC egress program clones one of the application's own packets from time to time, lowers the clone's TTL
and sends it along. The router where the TTL expires answers with an ICMP time exceeded. A program at TC
ingress or XDP reads and times this answer. Both are in elfprobe.c. This driver compiles it with BCC, attaches
the programs, tells them what the targets are, and writes their results to FILEBASE.csv.

The sections below behave like modules. Each has its constants at its head:

    C functions     of libbpf, which BCC's library exports, of BCC's library itself, and of the C library
    platform        Platform.detect(): what this kernel, this BCC and this process can do
    kernel          Kernel: elfprobe.c compiled and loaded, its maps, counters, lease and events
    attachments     one class for each way to attach a program to a device
    targets         destinations, target processes and their sockets
    run             one measurement, and the entry point

Only "C functions" and "kernel" call BCC or use ctypes. "platform" only checks whether functions exist.
"""

from __future__ import annotations

import atexit
import base64
import collections
import contextlib
import ctypes
import dataclasses
import enum
import errno
import itertools
import json
import logging
import math
import mmap
import os
import queue
import re
import resource
import select
import shlex
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence, TypeVar, Union

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python3 -I leaves it out
    sys.dont_write_bytecode = True  # elf/__pycache__ would be root's, in the user's folder
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the packages are loaded
    from elf.bytecode import Bytecode

    bytecode = None if "--no-cache" in itertools.takewhile("--".__ne__, sys.argv) else Bytecode()

from elf.addresses import ReverseDns, address_text, pack_address, resolve_all
from elf.cache import CACHE, Cache
from elf.clock import Clock, time_of_day, utc_text
from elf.command import Command
from elf.console import Console, LogFormat, open_standard_streams, output_columns, print_lines
from elf.counters import accounting, troubles, why_no_probes
from elf.devices import (
    Device,
    Frame,
    LinkState,
    Netlink,
    find_device,
    find_devices,
    find_interface,
    interface_failure,
    names_of,
    sole_user,
)
from elf.files import DiskUse, FileLog, Files, output_files
from elf.live import FlowEvent, LiveView
from elf.loop import Defects, Every, Stop
from elf.machine import (
    LOCKDOWN,
    PAGE,
    has_other_clock,
    is_kernel_memory_locked,
    linux_version,
    missing_capabilities,
    version_numbers,
)
from elf.metrics import Figures, Metrics, exporting
from elf.network import Routes, attributes
from elf.options import TUNNELS, Config, own_arguments, parse_arguments
from elf.pcapng import PacketFile
from elf.poller import SCAN_EVERY, ConnectionPoller
from elf.processes import (
    INTERPRETERS,
    TASK_COMM_LEN,
    AppNames,
    ProcessLog,
    choose_processes,
    look_at_process,
    process_ids,
    running_processes,
)
from elf.reasons import Reason, reasons_in_short
from elf.report import Report
from elf.results import FLOW_KEY_BYTES, UNANSWERED_AFTER, Results, log_flow_events, save_maps
from elf.ring import Events, Ring
from elf.source import C_FILE, kernel_headers, program_text, read_source
from elf.summary import Summary
from elf.unprobed import Reasons
from elf.usage import (
    Failure,
    as_called,
    import_parts,
    missing_packages,
    package_version,
    printable,
    require_attributes,
    why_unusable,
)

MISSING: dict[str, str] = {}  # module -> why it cannot be used
try:
    import bcc

    require_attributes(bcc, "BPF", "lib", "__version__")
except (Exception, SystemExit) as error:  # a broken one raises whatever comes up
    MISSING["bcc"] = why_unusable("bcc", error)
try:
    pyroute2 = import_parts(
        "pyroute2", {"IPRoute": "pyroute2.iproute", "NetlinkError": "pyroute2.netlink.exceptions"}
    )
    require_attributes(pyroute2, "IPRoute")
except (Exception, SystemExit) as error:
    MISSING["pyroute2"] = why_unusable("pyroute2", error)
try:
    import psutil

    require_attributes(psutil, "net_connections", "__version__")
except (Exception, SystemExit) as error:
    MISSING["psutil"] = why_unusable("psutil", error)

VERSION = "0.1.0"

CStruct = Any  # a ctypes structure that BCC makes of a C struct

log = logging.getLogger("elfprobe")


class Unsupported(Failure):
    """This machine lacks what one of several ways to do a thing needs. The caller tries the next way."""


# ---- C functions: of libbpf, BCC's library and the C library -----------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
BPF_MAP_TYPE_RINGBUF = 27  # enum bpf_map_type, linux/bpf.h
BPF_PROG_TYPE_SCHED_CLS = 3  # enum bpf_prog_type
BPF_XDP, BPF_TCX_INGRESS, BPF_TCX_EGRESS = 37, 46, 47  # enum bpf_attach_type; tcx since Linux 6.6
# enum bpf_attach_type
BPF_CGROUP_INET_SOCK_CREATE, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_GETPEERNAME = 2, 29, 30
BPF_STATS_RUN_TIME = 0  # enum bpf_stats_type
BTF_KIND_STRUCT, BTF_KIND_TYPEDEF = 4, 8  # linux/btf.h
VERIFIER_LOG = (1 << 24) - 1  # bytes, the most that every kernel takes
BPF_SYSCALL = {"x86_64": 321, "ppc64": 361, "ppc64le": 361, "s390x": 351}  # asm/unistd.h
BPF_SYSCALL_ELSEWHERE = 280  # asm-generic/unistd.h
EPOLL_EVENT_BYTES = 16  # sys/epoll.h, at most
PERF_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)  # as BCC has them
LOST_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.py_object, ctypes.c_ulonglong)


class SystemCall(enum.IntEnum):
    """Numbers of system calls, asm-generic/unistd.h: the same on all machines."""

    FSOPEN = 430
    FSCONFIG = 431
    FSMOUNT = 432
    PIDFD_OPEN = 434
    PIDFD_GETFD = 438


class BpfCommand(enum.IntEnum):
    """Numbers of commands of bpf(2): enum bpf_cmd, linux/bpf.h."""

    MAP_CREATE = 0
    PROG_LOAD = 5
    BTF_LOAD = 18


def raise_errno() -> None:
    """Raise OSError for the last C function that failed."""
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def system_call(number: SystemCall, *args: int | bytes | None) -> int:
    """Return the result of a system call. Raises OSError."""
    result: int = LIBC.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise_errno()
    return result


def bpf_call(name: str, *args: Any) -> int:
    """Return the result of a function of BCC's library. Raises OSError if it is negative."""
    result: int = getattr(bcc.lib, name)(*args)
    if result < 0:
        raise_errno()
    return result


def bpf(command: BpfCommand, attributes: bytes) -> int:
    """Return the result of bpf(2), for what BCC's library has no function. Raises OSError."""
    number = ctypes.c_long(BPF_SYSCALL.get(os.uname().machine, BPF_SYSCALL_ELSEWHERE))
    may_raise_limit, tries = True, 5
    while True:
        result: int = LIBC.syscall(number, ctypes.c_int(command), attributes, ctypes.c_uint(len(attributes)))
        if result >= 0:
            return result
        if ctypes.get_errno() == errno.EAGAIN and tries:  # a signal came while the program was verified
            tries -= 1
            continue
        if may_raise_limit and ctypes.get_errno() == errno.EPERM:  # before Linux 5.11, maps count as locked memory
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            may_raise_limit = False
            continue
        break
    raise_errno()
    return result


def release_library_pages(libraries: str) -> None:
    """Give back the memory of shared libraries that are not needed for now. libraries: a regular expression.

    Only pages that are exactly as in the file go, and the kernel reads them again when somebody needs them. Pages
    that the dynamic linker has written are mapped read-only, too (RELRO), but would be lost: they count as
    anonymous, or are swapped out. If the kernel does not tell, nothing is given back.
    """
    maps = ""
    with contextlib.suppress(OSError), open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        maps = file.read()
    readable = rf"^([0-9a-f]+)-([0-9a-f]+) r-.p .*/(?:{libraries})[^/\n]*\n((?:[A-Z]\w+: .*\n)+)"
    for start, end, fields in re.findall(readable, maps, re.M):
        if not re.search(r"^(Anonymous|Swap): +[1-9]", fields, re.M):
            size = int(end, 16) - int(start, 16)
            LIBC.madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@contextlib.contextmanager
def captured_stderr(captured: list[str]) -> Iterator[None]:
    """Append to the list what C libraries write to file descriptor 2 inside the block. Raises Failure."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError as err:
        raise Failure(f"no temporary file can be written: {err.strerror}") from err
    with file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            captured.append(file.read().decode(errors="replace"))


class Instruction(ctypes.Structure):
    """struct bpf_insn, linux/bpf.h."""

    _fields_ = [
        ("code", ctypes.c_uint8), ("dst", ctypes.c_uint8, 4), ("src", ctypes.c_uint8, 4),
        ("off", ctypes.c_int16), ("imm", ctypes.c_int32),
    ]  # fmt: skip


def takes_program(instructions: Sequence[tuple[int, int, int, int, int]]) -> bool:
    """Return whether the kernel takes these instructions as a TC program."""
    program = (Instruction * len(instructions))(*(Instruction(*each) for each in instructions))
    with contextlib.suppress(OSError):
        os.close(program_descriptor("elfprobe", BPF_PROG_TYPE_SCHED_CLS, bytes(program)))
        return True
    return False


def takes_ring_buffer() -> bool:
    """Return whether the kernel has ring buffers."""
    with contextlib.suppress(OSError):
        os.close(bpf_call("bcc_create_map", BPF_MAP_TYPE_RINGBUF, b"elfprobe", 0, 0, PAGE, 0))
        return True
    return False


class ProgInfo(ctypes.Structure):
    """The beginning of struct bpf_prog_info, linux/bpf.h, which only ever grows at its end."""

    _fields_ = [
        ("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("tag_to_map_ids", ctypes.c_uint64 * 7),
        ("name", ctypes.c_char * 16), ("ifindex_to_prog_tags", ctypes.c_uint64 * 14),
        ("run_time_ns", ctypes.c_uint64), ("run_cnt", ctypes.c_uint64), ("recursion_misses", ctypes.c_uint64),
    ]  # fmt: skip


class MapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info, linux/bpf.h."""

    _fields_ = [
        ("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32), ("max_entries", ctypes.c_uint32), ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16), ("ifindex_to_netns_ino", ctypes.c_uint64 * 3), ("btf_id", ctypes.c_uint32),
        ("btf_key", ctypes.c_uint32), ("btf_value", ctypes.c_uint32),
    ]  # fmt: skip


class BtfInfo(ctypes.Structure):
    """The beginning of struct bpf_btf_info, linux/bpf.h."""

    _fields_ = [("btf", ctypes.c_uint64), ("btf_size", ctypes.c_uint32), ("id", ctypes.c_uint32)]


class LinkInfo(ctypes.Structure):
    """struct bpf_link_info, linux/bpf.h, of a link to a device."""

    _fields_ = [
        ("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("prog_id", ctypes.c_uint32),
        ("unused", ctypes.c_uint32), ("ifindex", ctypes.c_uint32), ("more", ctypes.c_uint32 * 27),
    ]  # fmt: skip


class LinkOptions(ctypes.Structure):
    """The beginning of libbpf's struct bpf_link_create_opts. sz is the size of the fields that are given."""

    _fields_ = [("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32), ("unused", ctypes.c_uint32)]


Info = TypeVar("Info", bound=ctypes.Structure)


def object_info(fd: int, info: Info) -> Info:
    """Fill in the kernel's information about a BPF object, and return it. Raises OSError."""
    bpf_call("bpf_obj_get_info", fd, ctypes.byref(info), ctypes.byref(ctypes.c_uint32(ctypes.sizeof(info))))
    return info


def program_info(fd: int) -> ProgInfo:
    """Return the kernel's information about a loaded program. Raises OSError."""
    return object_info(fd, ProgInfo())


def map_info(fd: int) -> MapInfo:
    """Return the kernel's information about a map. Raises OSError."""
    return object_info(fd, MapInfo())


def read_btf(btf_id: int) -> bytes:
    """Return type information (BTF) that the kernel has loaded. Raises OSError."""
    fd = bpf_call("bpf_btf_get_fd_by_id", btf_id)
    try:
        data = ctypes.create_string_buffer(object_info(fd, BtfInfo()).btf_size)
        object_info(fd, BtfInfo(btf=ctypes.addressof(data), btf_size=len(data)))
        return data.raw
    finally:
        os.close(fd)


def load_btf(data: bytes) -> int:
    """Return the descriptor of type information (BTF) that the kernel loads. Raises Failure."""
    kept = ctypes.create_string_buffer(data, len(data))
    try:
        return bpf(BpfCommand.BTF_LOAD, struct.pack("=QQ4I", ctypes.addressof(kept), 0, len(data), 0, 0, 0))
    except OSError as err:
        raise Failure(f"the kernel (Linux {os.uname().release}) takes no BTF: {err.strerror}") from err


def program_descriptor(name: str, kind: int, code: bytes, attach_type: int = 0, messages: Any = None) -> int:
    """Return the descriptor of a program with these instructions. Raises OSError.

    kind is enum bpf_prog_type. messages is a buffer for the verifier's.
    """
    kept, license_name = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    log_to = (1, len(messages), ctypes.addressof(messages)) if messages else (0, 0, 0)
    attributes = struct.pack(
        "=IIQQIIQII16sII", kind, len(code) // ctypes.sizeof(Instruction), ctypes.addressof(kept),
        ctypes.addressof(license_name), *log_to, 0, 0, name[:15].encode(), 0, attach_type,
    )  # fmt: skip
    return bpf(BpfCommand.PROG_LOAD, attributes)


def load_program(name: str, kind: int, code: bytes, lines: int, attach_type: int = 0) -> int:
    """Return the descriptor of a program, as program_descriptor() does.

    Raises Failure, with so many lines of the verifier's log at most.
    """
    try:
        return program_descriptor(name, kind, code, attach_type)
    except OSError as err:
        messages = ctypes.create_string_buffer(VERIFIER_LOG)
        with contextlib.suppress(OSError):
            os.close(program_descriptor(name, kind, code, attach_type, messages))
        detail = "\n".join(messages.value.decode(errors="replace").strip().splitlines()[-lines:])
        kernel = f"the kernel (Linux {os.uname().release})"
        raise Failure(f"{kernel} does not take {name}: {err.strerror}", detail=detail) from err


def program_name(prog_id: int) -> str:
    """Return the kernel's name of a loaded program, empty if it has none or is gone."""
    try:
        fd = bpf_call("bpf_prog_get_fd_by_id", prog_id)
    except OSError:
        return ""
    try:
        return bytes(program_info(fd).name).decode(errors="replace")
    finally:
        os.close(fd)


def create_link(program: int, target: int, attach_type: int, flags: int = 0) -> int:
    """Return the descriptor of a new BPF link. Raises OSError, with EINVAL if the kernel has no such links.

    The link, and with it the program, goes when this process ends, however it ends.
    """
    options = LinkOptions(sz=ctypes.sizeof(LinkOptions), flags=flags)
    return bpf_call("bpf_link_create", program, target, attach_type, ctypes.byref(options) if flags else None)


def link_is_attached(link: int) -> bool:
    """Return whether a BPF link still has its device. root can detach a tcx link (bpftool link detach)."""
    with contextlib.suppress(OSError):
        return bool(object_info(link, LinkInfo()).ifindex)
    return False


def count_attached(ifindex: int, attach_type: int) -> int:
    """Return how many programs are attached to a device in this way, 0 if the kernel does not tell."""
    flags, count = ctypes.c_uint32(), ctypes.c_uint32(0)
    with contextlib.suppress(OSError):
        bpf_call("bpf_prog_query", ifindex, attach_type, 0, ctypes.byref(flags), None, ctypes.byref(count))
    return count.value


def set_xdp(name: str, fd: int, flags: int) -> None:
    """Attach an XDP program to the device of this name, or with fd -1 detach it. Raises OSError.

    pyroute2 cannot do it: 0.7.2 writes the flags wrongly.
    """
    with captured_stderr([]):
        bpf_call("bpf_attach_xdp", name.encode(), fd, flags)


class BtfType(ctypes.Structure):
    """struct btf_type, linux/btf.h."""

    _fields_ = [("name_off", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32)]


class BtfMember(ctypes.Structure):
    """struct btf_member, linux/btf.h."""

    _fields_ = [("name_off", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


@contextlib.contextmanager
def kernel_btf(load: str) -> Iterator[ctypes.c_void_p]:
    """Yield a handle of the kernel's type information (BTF). load is the name of the libbpf function to call.

    Raises LookupError if the kernel has none.
    """
    function = getattr(bcc.lib, load)
    function.restype = ctypes.c_void_p
    handle = function()
    if not handle or handle >= (1 << 64) - 4096:  # libbpf before 1.0 returns an error number, not NULL
        raise LookupError("the kernel has no BTF")
    try:
        yield ctypes.c_void_p(handle)
    finally:
        bcc.lib.btf__free(ctypes.c_void_p(handle))


def struct_offsets(btf: ctypes.c_void_p, name: bytes) -> dict[bytes, int]:
    """Return the byte offsets of a kernel struct's members, by name. Raises LookupError.

    Members of an anonymous struct or union inside it count as its own. name is that of the struct or of a typedef.
    """
    lib = bcc.lib
    lib.btf__type_by_id.restype = ctypes.c_void_p
    lib.btf__name_by_offset.restype = ctypes.c_char_p
    found = lib.btf__find_by_name_kind(btf, name, BTF_KIND_STRUCT)
    if found < 0:  # it may have no name but that of its typedef
        typedef = lib.btf__find_by_name_kind(btf, name, BTF_KIND_TYPEDEF)
        if typedef < 0:
            raise LookupError(name)
        found = BtfType.from_address(lib.btf__type_by_id(btf, typedef)).size  # the type
    return dict(member_offsets(btf, found))


def member_offsets(btf: ctypes.c_void_p, type_id: int) -> Iterator[tuple[bytes, int]]:
    """Yield name and byte offset of each member of a struct or union."""
    address = bcc.lib.btf__type_by_id(btf, type_id)
    kind = BtfType.from_address(address)
    members = (BtfMember * (kind.info & 0xFFFF)).from_address(address + ctypes.sizeof(BtfType))
    bits = 0xFFFFFF if kind.info >> 31 else 0xFFFFFFFF  # with bit fields, their size is in the highest byte
    for member in members:
        offset = (member.offset & bits) // 8
        if member.name_off:
            yield bcc.lib.btf__name_by_offset(btf, member.name_off), offset
        else:
            for name, inside in member_offsets(btf, member.type):
                yield name, offset + inside


# ---- Platform: what this kernel, this BCC and this process can do ------------------------------------

CLOCK_MONOTONIC_COARSE = 6  # linux/time.h
# Programs that call one helper each. BPF instructions: code, destination, source, offset, immediate value.
CALL, EXIT, ZERO_R0 = 0x85, (0x95, 0, 0, 0, 0), (0xB7, 0, 0, 0, 0)
CALLS_JIFFIES64 = ((CALL, 0, 0, 0, 118), ZERO_R0, EXIT)  # bpf_jiffies64()
CALLS_GET_CURRENT_TASK = ((CALL, 0, 0, 0, 35), ZERO_R0, EXIT)  # bpf_get_current_task()
CALLS_SKC_TO_MPTCP_SOCK = (  # bpf_skc_to_mptcp_sock(skb->sk), if that is not NULL
    (0x79, 1, 1, 168, 0), (0x55, 1, 0, 2, 0), ZERO_R0, EXIT, (CALL, 0, 0, 0, 196), ZERO_R0, EXIT,
)  # fmt: skip
CALLS_PROBE_READ_KERNEL = (  # bpf_probe_read_kernel(r10 - 8, 8, 0)
    (0x7A, 10, 0, -8, 0), (0xBF, 1, 10, 0, 0), (0x07, 1, 0, 0, -8), (0xB7, 2, 0, 0, 8), (0xB7, 3, 0, 0, 0),
    (CALL, 0, 0, 0, 113), ZERO_R0, EXIT,
)  # fmt: skip


class RouteOffsets(NamedTuple):
    """Where the kernel keeps the route of a packet, and its gateway.

    skb_dst is an offset in struct sk_buff, dst_flags in struct dst_entry, the others in struct rtable and struct
    rt6_info. All are 0 if the kernel does not tell them.
    """

    skb_dst: int = 0
    dst_flags: int = 0
    gateway_family: int = 0
    route6_flags: int = 0


class SharedInfo(NamedTuple):
    """Where the kernel marks a packet that holds memory of user space (MSG_ZEROCOPY), or needs a time stamp.

    head and end are offsets in struct sk_buff. flags and tx_flags are offsets of bytes in struct
    skb_shared_info. flag is the bit in flags for MSG_ZEROCOPY. All are 0 if the kernel does not tell them.
    """

    head: int = 0
    end: int = 0
    flags: int = 0
    flag: int = 0
    tx_flags: int = 0


class SocketLock(NamedTuple):
    """Where the kernel keeps whether a process holds the lock of a packet's socket.

    skb_sk is an offset in struct sk_buff, owned one in struct sock. Both are 0 if the kernel does not tell them.
    """

    skb_sk: int = 0
    owned: int = 0


class ExecutableOffsets(NamedTuple):
    """Where the kernel keeps the name of the executable that a process begins to run, and its parent.

    They are offsets in struct linux_binprm, struct file, struct dentry and struct task_struct, all 0 if the kernel
    does not tell them.
    """

    bprm_file: int = 0
    file_dentry: int = 0
    dentry_name: int = 0
    task_parent: int = 0


@dataclasses.dataclass(frozen=True)
class Platform:
    """What the kernel and BCC can do. The defaults are those of the oldest ones: BCC 0.12, Linux 5.4.

    Each field decides about a fallback. If a field is true on every system that we support, the field and its
    fallback can go.
    """

    version: tuple[int, int, int] = (0, 0, 0)  # of the kernel
    has_links: bool = False  # BCC exports libbpf's bpf_link_create(). The kernel may still lack a kind of link
    has_tcx: bool = False  # may have tcx links (Linux 6.6). Only attaching shows whether it has them
    has_ring_buffer: bool = False  # BCC 0.16 and Linux 5.8. Older ones have no socket storage at TC, either
    has_batches: bool = False  # BCC 0.19 reads maps in batches. Only reading shows whether Linux does (5.6)
    has_run_time_stats: bool = False  # BCC exports bpf_enable_stats(), Linux 5.8
    has_malloc_trim: bool = False  # the C library is glibc
    compiles_faster: bool = False  # BCC 0.26. With FASTER_COMPILATION, BCC 0.18 crashes
    has_mptcp: bool = False  # TC programs can find the MPTCP socket of a TCP socket (Linux 5.19)
    is_preemptible: bool = False  # another program run may preempt a program run on its CPU
    tick: int = 0  # ns between two values of bpf_jiffies64() (Linux 5.6); 0: programs cannot call it
    shared_info: SharedInfo = SharedInfo()
    routes: RouteOffsets = RouteOffsets()
    socket_lock: SocketLock = SocketLock()
    executable: ExecutableOffsets = ExecutableOffsets()

    @classmethod
    def detect(cls) -> Platform:
        """Return what this machine can do. Raises Failure if no temporary file can be written."""
        version = linux_version()
        has_links = hasattr(bcc.lib, "bpf_link_create")
        tick = round(time.clock_getres(CLOCK_MONOTONIC_COARSE) * 1e9)
        can_read = takes_program(CALLS_PROBE_READ_KERNEL)
        offsets = find_offsets() if can_read else {}
        if not takes_program(CALLS_GET_CURRENT_TASK):
            offsets.pop("socket_lock", None)
        return cls(
            version=version,
            has_links=has_links,
            has_tcx=has_links and version >= (6, 6, 0),
            has_ring_buffer=hasattr(bcc.BPF, "ring_buffer_poll") and takes_ring_buffer(),
            has_batches=hasattr(bcc.lib, "bpf_lookup_batch"),
            has_run_time_stats=hasattr(bcc.lib, "bpf_enable_stats"),
            has_malloc_trim=hasattr(LIBC, "malloc_trim"),
            compiles_faster=version_numbers(bcc.__version__) >= (0, 26, 0),
            has_mptcp=takes_program(CALLS_SKC_TO_MPTCP_SOCK),
            # Since Linux 6.18, PREEMPT_RT disables softirqs without a lock, so that runs can preempt each other
            # (CONFIG_PREEMPT_RT_NEEDS_BH_LOCK). Older kernels with PREEMPT_RT are treated alike.
            is_preemptible="PREEMPT_RT" in os.uname().version,
            tick=tick if takes_program(CALLS_JIFFIES64) else 0,
            **offsets,
        )


def find_offsets() -> dict[str, Any]:
    """Return the fields of Platform that the kernel's BTF tells: offsets."""
    found: dict[str, Any] = {}
    new, old = "btf__load_vmlinux_btf", "libbpf_find_kernel_btf"  # the old name is from before libbpf 0.5
    with contextlib.suppress(AttributeError, LookupError), kernel_btf(new if hasattr(bcc.lib, new) else old) as btf:
        skb = struct_offsets(btf, b"sk_buff")
        with contextlib.suppress(LookupError):
            found["shared_info"] = shared_info_offsets(skb, struct_offsets(btf, b"skb_shared_info"))
        with contextlib.suppress(LookupError):  # before Linux 5.2
            dst, route, route6 = (struct_offsets(btf, name) for name in (b"dst_entry", b"rtable", b"rt6_info"))
            found["routes"] = RouteOffsets(
                skb[b"_skb_refdst"], dst[b"flags"], route[b"rt_gw_family"], route6[b"rt6i_flags"]
            )
        with contextlib.suppress(LookupError):
            lock, owned = struct_offsets(btf, b"sock")[b"sk_lock"], struct_offsets(btf, b"socket_lock_t")[b"owned"]
            found["socket_lock"] = SocketLock(skb[b"sk"], lock + owned)
        with contextlib.suppress(LookupError):
            file, path = struct_offsets(btf, b"file")[b"f_path"], struct_offsets(btf, b"path")[b"dentry"]
            name = struct_offsets(btf, b"dentry")[b"d_name"] + struct_offsets(btf, b"qstr")[b"name"]
            bprm, parent = struct_offsets(btf, b"linux_binprm")[b"file"], struct_offsets(btf, b"task_struct")
            found["executable"] = ExecutableOffsets(bprm, file + path, name, parent[b"real_parent"])
    return found


def shared_info_offsets(skb: dict[bytes, int], shared: dict[bytes, int]) -> SharedInfo:
    """Return the SharedInfo for these offsets in struct sk_buff and struct skb_shared_info. Raises LookupError."""
    stamps = shared[b"tx_flags"]
    if b"flags" in shared:  # SKBFL_ZEROCOPY_ENABLE, since Linux 5.12
        return SharedInfo(skb[b"head"], skb[b"end"], shared[b"flags"], 1, stamps)
    return SharedInfo(skb[b"head"], skb[b"end"], stamps, 8, stamps)  # SKBTX_DEV_ZEROCOPY


def versions() -> str:
    """Return the versions of elfprobe and of what it runs on."""
    found = {
        "BCC": "missing" if "bcc" in MISSING else bcc.__version__,
        "pyroute2": package_version("pyroute2"),
        "psutil": "missing" if "psutil" in MISSING else psutil.__version__,
    }
    parts = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"elfprobe {VERSION}: Linux {os.uname().release}, {parts}, Python {sys.version.split()[0]}"


def require_machine(config: Config) -> None:
    """Raise Failure unless this process has the packages, the rights and the clock that a run needs."""
    if MISSING:
        raise missing_packages(MISSING)
    if has_other_clock():
        raise Failure("cannot run in this time namespace: its CLOCK_MONOTONIC is not the kernel's own")
    missing = missing_capabilities(config.by_process)
    if missing:
        how = as_called("sudo python3 elfprobe.py")
        raise Failure(f"must run as root: {how} ... (missing: {', '.join(missing)})")


# ---- Kernel: elfprobe.c compiled and loaded, its maps and events -------------------------------------

LD_IMM64, MAP_FD = 0x18, 1  # linux/bpf.h: BPF_LD | BPF_DW | BPF_IMM, BPF_PSEUDO_MAP_FD
PARAMETER_MARK = 0xE1F0BE0000000000  # as in elfprobe.c
# By their numbers in elfprobe.c.
PARAMETERS = (
    "INTERVAL_NS",
    "MAX_RATE",
    "WAKE_EVERY",
    "RATE_GLOBAL",
    "NOTRUNC",
    "INGRESS_DROP",
    "BY_APP",
    "ODD_NAMES",
)
PER_CPU_MAPS = 5, 6, 10, 21  # enum bpf_map_type, linux/bpf.h: hash, array, lru_hash, cgroup_storage
BPF_MAP_TYPE_QUEUE, BPF_MAP_TYPE_STACK = 22, 23
BATCH = 4096  # entries of a map that are read at once
EVENT_PERF_PAGES = 64  # of each CPU's perf buffer, if there are no ring buffers
PARTIAL_CHECKSUMS_MAX = 1 << 14  # probes with a partial checksum: 0.33 s of them at 50,000 a second
FLOW_DESTINATIONS_MAX = 16384  # destinations of processes' flows
MADE_ROOM = 4  # if there is no room for more of these, about one of so many is forgotten: make_room()
# Probes in flight, at most: up to --max-rate 170000 all that are sent have room, even if none is ever answered.
IN_FLIGHT_MAX = 1 << 20
IN_FLIGHT_SEARCHED = 1 << 17  # probes in flight among which those of unmatched answers are looked for
RING_HOLDS = 0.25  # s of results at the highest rate
RING_PAGES_MIN = 64  # replies may come in bursts at any rate
RESULT_BYTES = 160  # of struct result in the ring, at most
CGROUP_PROGRAMS = {  # program of elfprobe.c -> enum bpf_attach_type
    "elf_sock_create": BPF_CGROUP_INET_SOCK_CREATE,
    "elf_accept_v4": BPF_CGROUP_INET4_GETPEERNAME,
    "elf_accept_v6": BPF_CGROUP_INET6_GETPEERNAME,
}
TRACEPOINTS = {  # program of elfprobe.c -> raw tracepoint
    "elf_exit": "sched_process_exit",
    "elf_fork": "sched_wakeup_new",
    "elf_exec": "sched_process_exec",
}

# BCC optimises what clang hands over, so clang need not do it. Debug information of inlined functions, which nobody
# reads, takes a fifth of the time.
FASTER_COMPILATION = ["-Xclang", "-disable-llvm-passes", "-Dinline=inline __attribute__((nodebug))"]

Key = Union[int, bytes]  # of a map: a number, or the bytes of a C struct


@dataclasses.dataclass(frozen=True)
class Build:
    """The parameters of elfprobe.c that depend on the device and on how the programs are attached."""

    frame: Frame = Frame.ETHERNET
    ingress_tc: bool = False  # elf_ingress runs at TC ingress, not at XDP
    tcx: bool = False  # tcx links attach the TC programs
    by_owner: bool = False  # the programs know the process that owns a packet's socket


def build_flags(config: Config, build: Build, platform: Platform) -> dict[str, str]:
    """Return the -D flags of elfprobe.c: name -> value."""
    return {
        "FRAME": str(int(build.frame)),
        "TUNNEL": str(TUNNELS[config.encapsulation]),
        "INGRESS_TC": str(int(build.ingress_tc)),
        "TCX": str(int(build.tcx)),
        "SKB_HEAD": str(platform.shared_info.head),
        "SKB_END": str(platform.shared_info.end),
        "ZEROCOPY_FLAGS": str(platform.shared_info.flags),
        "ZEROCOPY_FLAG": str(platform.shared_info.flag),
        "TX_FLAGS": str(platform.shared_info.tx_flags),
        "SKB_DST": str(platform.routes.skb_dst),
        "DST_FLAGS": str(platform.routes.dst_flags),
        "RT4_GATEWAY": str(platform.routes.gateway_family),
        "RT6_FLAGS": str(platform.routes.route6_flags),
        "SKB_SK": str(platform.socket_lock.skb_sk),
        "SOCK_OWNED": str(platform.socket_lock.owned),
        "BPRM_FILE": str(platform.executable.bprm_file),
        "FILE_DENTRY": str(platform.executable.file_dentry),
        "DENTRY_NAME": str(platform.executable.dentry_name),
        "TASK_PARENT": str(platform.executable.task_parent),
        "MPTCP": str(int(platform.has_mptcp)),
        "TICK_NS": f"{platform.tick}ULL",
        "BY_OWNER": str(int(build.by_owner)),
        "OLD_MAPS": str(int(not platform.has_ring_buffer)),
        "PREEMPTIBLE": str(int(platform.is_preemptible)),
    }


def map_sizes(config: Config, build: Build, platform: Platform) -> dict[str, int]:
    """Return the sizes of the maps whose size elfprobe.c leaves open: entries, or bytes of a ring buffer."""
    waiting = max(config.max_rate * (UNANSWERED_AFTER + 1), 1024)
    sizes = {
        "paths": DESTINATIONS_MAX,
        "flow_paths": FLOW_DESTINATIONS_MAX if build.by_owner else 1,
        "in_flight": power_of_two(min(waiting, IN_FLIGHT_MAX)),
        "partial_checksums": power_of_two(min(waiting, PARTIAL_CHECKSUMS_MAX)),
    }
    if platform.has_ring_buffer:
        sizes["results"] = power_of_two(max(config.max_rate * RING_HOLDS * RESULT_BYTES, RING_PAGES_MIN * PAGE))
    return sizes


def parameters(config: Config, sizes: dict[str, int]) -> dict[str, int]:
    """Return the values of PARAMETERS."""
    results = sizes.get("results", RESULT_BYTES) // RESULT_BYTES
    wake_every = max(results // 4 // (os.cpu_count() or 1), 1)
    values = config.probeint * 1000000, config.max_rate, wake_every
    odd_names = any("/" in app or not app.isascii() for app in config.apps)
    flags = config.rate_global, config.notrunc, config.ingress == "drop", bool(config.apps), odd_names
    return dict(zip(PARAMETERS, (*values, *map(int, flags))))


def program_types(build: Build) -> dict[str, int]:
    """Return the programs to load, with BCC's number for the type of each."""
    types = bcc.BPF
    kinds = dict.fromkeys(("elf_egress", "elf_probe", "elf_ingress"), types.SCHED_CLS)
    if not build.ingress_tc:
        kinds["elf_ingress"] = types.XDP
    if build.by_owner:
        kinds.update(dict.fromkeys(CGROUP_PROGRAMS, types.CGROUP_SOCK_ADDR), elf_sock_create=types.CGROUP_SOCK)
        kinds.update(dict.fromkeys(TRACEPOINTS, types.RAW_TRACEPOINT))
    return kinds


def power_of_two(least: float) -> int:
    """Return the lowest power of two that is not below the number."""
    return 1 << (max(math.ceil(least), 1) - 1).bit_length()


@contextlib.contextmanager
def compiled_by_bcc(hooks: str, text: str, flags: list[str]) -> Iterator[ctypes.c_void_p]:
    """Yield BCC's module with the text compiled. Raises Failure."""
    messages = [""]

    def failure(_: str) -> Failure:
        said = messages[-1].strip()
        if re.search(r":\d+:\d+: (fatal )?error: ", said):
            return Failure(f"elfprobe.c with hooks '{hooks}' does not compile", detail=said)
        return Failure(f"the kernel (Linux {os.uname().release}) makes no BPF map: {said}")

    try:
        with kernel_headers(), bcc_errors(failure), captured_stderr(messages):
            compiler = bcc.BPF(text=text, cflags=flags)
    except OSError as err:
        raise Failure(f"no temporary file can be written: {err.strerror}") from err
    for line in messages[-1].strip().splitlines():
        log.warning("compiler: %s", line)
    try:
        yield ctypes.c_void_p(compiler.module)
    finally:
        compiler.cleanup()
        atexit.unregister(compiler.cleanup)  # BCC 0.12 would do it again, and fail


def map_descriptors(module: ctypes.c_void_p) -> dict[str, int]:
    """Return the descriptors of a module's maps by name."""
    count, name_of = bcc.lib.bpf_num_tables, bcc.lib.bpf_table_name  # BCC does not declare their types
    count.restype, count.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_size_t)
    names = [name_of(module, number) for number in range(count(module))]
    return {name.decode(): bcc.lib.bpf_table_fd(module, name) for name in names}


@contextlib.contextmanager
def bcc_errors(failure: Callable[[str], Failure]) -> Iterator[None]:
    """Raise failure(text) for whatever BCC raises, mostly a bare Exception with this text."""
    try:
        yield
    except Failure:
        raise
    except Exception as err:
        raise failure(str(err)) from err


def struct_format(structure: Any) -> tuple[str, list[str]]:
    """Return the struct module's format for a ctypes Structure, and the names of the values in it.

    BCC makes the Structure of a C struct. Nested structs are flattened. An array, or a struct with one field,
    is one value: its bytes. Fields named unused or __pad are left out.
    """
    formats, names, end = ["="], [], 0
    for name, kind, *_ in structure._fields_:
        offset = getattr(structure, name).offset
        formats.append(f"{offset - end}x")
        end = offset + ctypes.sizeof(kind)
        if name.startswith(("unused", "__pad")):
            formats.append(f"{ctypes.sizeof(kind)}x")
        elif hasattr(kind, "_fields_") and len(kind._fields_) > 1:
            inner_format, inner_names = struct_format(kind)
            formats.append(inner_format[1:])
            names += inner_names
        elif hasattr(kind, "_fields_") or hasattr(kind, "_length_"):
            formats.append(f"{ctypes.sizeof(kind)}s")
            names.append(name)
        else:
            formats.append({1: "B", 2: "H", 4: "I", 8: "Q"}[ctypes.sizeof(kind)])
            names.append(name)
    formats.append(f"{ctypes.sizeof(structure) - end}x")
    return "".join(formats), names


def plain(value: Any) -> Any:
    """Return a ctypes value as JSON can hold it: structs are objects, char arrays are texts."""
    if hasattr(value, "_fields_"):
        names = [name for name, *_ in value._fields_ if not name.startswith("__pad")]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (ctypes.Array, list)):
        return [plain(element) for element in value]
    return getattr(value, "value", value)


class Layout:
    """The layout of a struct of elfprobe.c, from the ctypes Structure that BCC makes of it."""

    def __init__(self, structure: Any) -> None:
        self._structure = structure
        self.format, self.names = struct_format(structure)

    def member(self, name: str) -> Layout:
        """Return the layout of a struct inside this one."""
        return Layout(dict(self._structure._fields_)[name])

    def new(self, **fields: Any) -> CStruct:
        """Return a new struct. Fields that are not given are 0."""
        return self._structure(**fields)

    def read(self, data: bytes) -> CStruct:
        """Return the struct in these bytes. Padding may follow it."""
        return self._structure.from_buffer_copy(data)


class MapSpec(NamedTuple):
    """What a map is: the fields of union bpf_attr that make it (linux/bpf.h), and its C types as BCC tells them."""

    kind: int  # enum bpf_map_type
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str  # at most 15 characters
    btf_key: int  # type in the BTF, 0 without
    btf_value: int
    key_type: str  # C types as BCC describes them, JSON: see c_type()
    value_type: str

    @classmethod
    def of(cls, fd: int, key_type: str, value_type: str) -> MapSpec:
        """Return the spec of an existing map. fd: its descriptor. Raises OSError."""
        one = map_info(fd)
        sizes = one.key_size, one.value_size, one.max_entries, one.map_flags
        return cls(one.type, *sizes, one.name.decode(), one.btf_key, one.btf_value, key_type, value_type)

    def create(self, btf: int) -> int:
        """Return the descriptor of a new map of this kind. btf: descriptor of its BTF, or -1. Raises Failure."""
        with_btf = (btf, self.btf_key, self.btf_value) if self.btf_value and btf >= 0 else (0, 0, 0)
        name = self.name.encode()
        sizes = self.kind, self.key_size, self.value_size, self.max_entries, self.flags
        try:
            return bpf(BpfCommand.MAP_CREATE, struct.pack("=7I16s4I", *sizes, 0, 0, name, 0, *with_btf))
        except OSError as err:
            raise Failure(f"the kernel (Linux {os.uname().release}) makes no BPF map: {err.strerror}") from err


class Map:
    """A BPF map. A key is a number or the bytes of a C struct. A value is a ctypes object for the C type, or a list
    of one for each CPU."""

    def __init__(self, fd: int, spec: MapSpec, has_batches: bool) -> None:
        self.fd = fd
        self.max_entries = spec.max_entries
        self.key_type: Any = c_type(spec.key_type) if spec.key_size else None
        self.value_type = c_type(spec.value_type)
        self._kind = spec.kind
        self._key_size, self._value_size = spec.key_size, spec.value_size
        if spec.kind in PER_CPU_MAPS:
            self._value_size = len(bcc.utils.get_possible_cpus()) * self._stride
        self._has_batches = has_batches

    @property
    def _stride(self) -> int:
        """Return the bytes of one CPU's value, its padding included."""
        return (ctypes.sizeof(self.value_type) + 7) & ~7

    def _key(self, key: Key) -> bytes:
        return bytes(self.key_type(key)) if isinstance(key, int) and self.key_type else bytes(key)

    def _value(self, data: bytes) -> Any:
        """Return the value in these bytes."""
        if self._kind in PER_CPU_MAPS:
            return [self.value_type.from_buffer_copy(data, at) for at in range(0, len(data), self._stride)]
        return self.value_type.from_buffer_copy(data)

    def _raw_value(self, key: bytes | None, function: str = "bpf_lookup_elem") -> bytes:
        """Return the bytes of a value. Raises OSError, with ENOENT if there is none."""
        value = ctypes.create_string_buffer(self._value_size)
        bpf_call(function, self.fd, key, value)
        return value.raw

    def new(self, **fields: Any) -> CStruct:
        """Return a new value for an entry. Fields that are not given are 0."""
        return self.value_type(**fields)

    def get(self, key: Key) -> Any:
        """Return the value of an entry, or None if there is no such entry."""
        try:
            return self._value(self._raw_value(self._key(key)))
        except OSError:
            return None

    def put(self, key: Key, value: Any) -> None:
        """Write an entry: a ctypes object, a number, or for each CPU one. Raises Failure if the map has no room."""
        each = value if isinstance(value, list) else [value]
        data = [bytes(one if isinstance(one, self.value_type) else self.value_type(one)) for one in each]
        if self._kind in PER_CPU_MAPS:
            data = [one.ljust(self._stride, b"\0") for one in data]
        try:
            bpf_call("bpf_update_elem", self.fd, self._key(key), b"".join(data), 0)
        except OSError as err:
            raise Failure(f"a BPF map takes no entry: {err.strerror}") from err

    def remove(self, key: Key) -> bool:
        """Remove an entry. Return whether there was one."""
        try:
            bpf_call("bpf_delete_elem", self.fd, self._key(key))
        except OSError:
            return False
        return True

    def items(self) -> Iterator[tuple[bytes, Any]]:
        """Yield keys and values. Entries that come or go meanwhile may be missing, or come twice."""
        for key, value in self.raw_items():
            yield key, self._value(value)

    def raw_items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values as items() does, but the values as bytes."""
        return itertools.chain.from_iterable(self.raw_batches())

    def raw_batches(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """Yield raw_items() in lists of at most BATCH: read at once, which is faster, if BCC and the kernel can.

        Raises OSError if the map cannot be read.
        """
        size, value_size, batch = self._key_size, self._value_size, min(BATCH, self.max_entries)
        keys = ctypes.create_string_buffer(batch * size)
        values = ctypes.create_string_buffer(batch * value_size)
        place = (ctypes.c_uint32 * (size // 4 + 1))()  # the kernel's position: a number, in a trie a key
        after = None
        is_over = not self._has_batches
        error = errno.ENOTSUP
        while not is_over:
            count = ctypes.c_uint32(batch)
            try:
                bpf_call("bpf_lookup_batch", self.fd, after, place, keys, values, ctypes.byref(count))
            except OSError as err:
                is_over, error = True, err.errno or 0
                if error != errno.ENOENT:  # ENOENT: this batch is the last one
                    break
            after = place
            pairs = zip(
                struct.iter_unpack(f"{size}s", ctypes.string_at(keys, count.value * size)),
                struct.iter_unpack(f"{value_size}s", ctypes.string_at(values, count.value * value_size)),
            )
            yield [(key, value) for (key,), (value,) in pairs]
        if error != errno.ENOENT:  # BCC before 0.19, Linux before 5.6, and maps that cannot be read in batches
            items = self._items_one_by_one()
            yield from iter(lambda: list(itertools.islice(items, BATCH)), [])

    def _items_one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        key, after = ctypes.create_string_buffer(self._key_size), None
        while True:
            try:
                bpf_call("bpf_get_next_key", self.fd, after, key)
            except OSError as err:
                if err.errno == errno.ENOENT:
                    return
                raise
            after = key.raw
            with contextlib.suppress(FileNotFoundError):  # it has gone
                yield after, self._raw_value(after)

    def plain_items(self) -> Iterator[dict[str, Any]]:
        """Yield entries as JSON can hold them; values of a queue or stack are taken out.

        A map that has a value for each CPU yields a list of values. Raises Failure.
        """
        try:
            if self._kind in (BPF_MAP_TYPE_QUEUE, BPF_MAP_TYPE_STACK):
                with contextlib.suppress(FileNotFoundError):
                    while True:
                        yield {"value": plain(self._value(self._raw_value(None, "bpf_lookup_and_delete")))}
                return
            if not self.key_type:
                raise Failure("maps of its type cannot be read")
            for key, value in self.items():
                yield {"key": plain(self.key_type.from_buffer_copy(key)), "value": plain(value)}
        except OSError as err:
            raise Failure("maps of its type cannot be read") from err


def c_type(description: str) -> Any:
    """Return the ctypes type for a C type, from BCC's description of it (JSON)."""
    return bcc.BPF._decode_table_type(json.loads(description))


class Program(NamedTuple):
    """A compiled program. links: index of each instruction that loads a map or a parameter -> name of that."""

    code: bytes
    links: dict[int, str]

    @classmethod
    def extract(cls, code: bytes, maps: dict[int, str]) -> Program:
        """Return a program from its instructions as compiled. maps: descriptor -> name. Raises KeyError."""
        marks = {PARAMETER_MARK + number: name for number, name in enumerate(PARAMETERS)}
        found, links = instructions(code), {}
        for at, one in enumerate(found):
            if one.code == LD_IMM64:
                value = one.imm & 0xFFFFFFFF | (found[at + 1].imm & 0xFFFFFFFF) << 32
                if one.src == MAP_FD:
                    links[at] = maps[one.imm]
                elif value in marks:
                    links[at] = marks[value]
        return cls(code, links)

    def linked(self, values: dict[str, int]) -> bytes:
        """Return the instructions with map descriptors and parameters put in. values: name -> either of them.

        Raises KeyError or IndexError if the program does not fit them.
        """
        code = instructions(self.code)
        for at, name in self.links.items():
            code[at].imm, code[at + 1].imm = values[name], values[name] >> 32
        return bytes(code)


class Compiled(NamedTuple):
    """What BCC has made of elfprobe.c: programs, maps, and their BTF (empty if we may not read it)."""

    programs: dict[str, Program]
    maps: dict[str, MapSpec]
    btf: bytes

    @classmethod
    def of(cls, module: Any, names: Iterable[str], fds: dict[str, int]) -> Compiled:
        """Return what BCC has compiled. fds: descriptors of its maps."""
        lib = bcc.lib
        start, size = lib.bpf_function_start, lib.bpf_function_size
        key_type, value_type = lib.bpf_table_key_desc, lib.bpf_table_leaf_desc
        by_fd = {fd: name for name, fd in fds.items()}
        programs = {
            name: Program.extract(
                ctypes.string_at(start(module, name.encode()), size(module, name.encode())), by_fd
            )
            for name in names
        }
        types = {name: (key_type(module, name.encode()), value_type(module, name.encode())) for name in fds}
        maps = {name: MapSpec.of(fd, *(each.decode() for each in types[name])) for name, fd in fds.items()}
        btf = b""
        with contextlib.suppress(OSError):  # without CAP_SYS_ADMIN
            btf = read_btf(max(map_info(fd).btf_id for fd in fds.values()))
        return cls(programs, maps, btf)

    def can_be_kept(self) -> bool:
        """Return whether the maps can be made without BCC. If they have BTF types, that takes the BTF."""
        return bool(self.btf) or not any(spec.btf_value for spec in self.maps.values())

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        encoded = {name: (base64.b64encode(one.code).decode(), one.links) for name, one in self.programs.items()}
        return dict(programs=encoded, maps=self.maps, btf=base64.b64encode(self.btf).decode())

    @classmethod
    def from_json(cls, content: Any) -> Compiled | None:
        """Return what as_json() has made, None if it is nothing of that kind."""
        try:
            programs = {
                name: Program(base64.b64decode(code), {int(at): text for at, text in links.items()})
                for name, (code, links) in content["programs"].items()
            }
            maps = {name: MapSpec(*fields) for name, fields in content["maps"].items()}
            return cls(programs, maps, base64.b64decode(content["btf"]))
        except (ValueError, TypeError, AttributeError, KeyError):
            log.debug("cache of programs: not what a run has written")
            return None


def instructions(code: bytes) -> ctypes.Array[Instruction]:
    """Return a copy of a program's instructions."""
    return (Instruction * (len(code) // ctypes.sizeof(Instruction))).from_buffer_copy(code)


class Kernel:
    """elfprobe.c, compiled now or kept from an earlier run, and loaded, until close(): programs, maps, events."""

    def __init__(
        self,
        config: Config,
        build: Build,
        platform: Platform,
        with_warnings: bool = False,
        more_programs: dict[str, int] | None = None,
    ) -> None:
        """Compile and load. more_programs of the hooks file: name -> type. Raises Failure."""
        self._kinds = {**program_types(build), **(more_programs or {})}
        self.platform = platform
        self.defects = Defects()
        self._program_fds: dict[str, int] = {}
        self._map_fds: dict[str, int] = {}
        self._specs: dict[str, MapSpec] = {}
        self._maps: dict[str, Map] = {}
        self.tracepoint_fds: dict[str, int] = {}
        self._rings: list[tuple[Ring, Callable[[Events], None]]] = []
        self._epoll = select.epoll()
        self._readers: list[int] = []  # BCC's perf buffers
        self._callbacks: list[Any] = []  # as long as the library may call them
        self._events_failed = 0
        flags = [f"-D{name}={value}" for name, value in build_flags(config, build, platform).items()]
        flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"] if with_warnings else ["-w"]
        flags += FASTER_COMPILATION if platform.compiles_faster else []
        text = program_text(config.hooks)
        try:
            self._load_all(config, build, text, flags)
        except BaseException:
            self.close()
            raise
        release_library_pages("libbcc|libclang|libLLVM")  # of the compiler, some 80 MB
        self.map("programs").put(0, self.program("elf_probe"))
        if build.ingress_tc:
            self.map("programs").put(1, self.program("elf_ingress"))
        schedules = self.map("schedules")
        schedules.put(0, schedules.new(salt=config.salt))
        self._in_flight = self.map("in_flight")
        probe, key = Layout(self._in_flight.value_type), Layout(self._in_flight.key_type)
        # Format and names of what take_expired() yields.
        self.outstanding = probe.format + key.format[1:], probe.names + key.names
        self._sendtime: int = self._in_flight.value_type.sendtime.offset
        self.oldest_in_flight = 0  # CLOCK_MONOTONIC, ns
        self._no_room = 0  # the counter no_room when make_room() last looked

    def _load_all(self, config: Config, build: Build, text: str, flags: list[str]) -> None:
        """Load what an earlier run has kept, or else compile and load. Raises Failure."""
        # Two kinds of text are not kept. With an #include: the key of the cache does not cover that file. With maps
        # that their MapSpec does not describe completely: pinned or shared ones, maps of maps.
        odd = r"^\s*#\s*include\b|_PINNED\b|_SHARED\b|\bBPF_TABLE_PUBLIC\b|_OF_MAPS\b|\bextern\b"
        use_cache = config.cache and "BCC_KERNEL_SOURCE" not in os.environ and not re.search(odd, text, re.M)
        cache = Cache(CACHE, text, flags, sorted(self._kinds), bcc.__version__, os.uname()) if use_cache else None
        kept = cache.read() if cache else None
        compiled = Compiled.from_json(kept) if kept else None
        if cache and compiled:
            try:
                self._load(config, build, compiled, {})
                log.debug("programs that an earlier run compiled are loaded")
                return
            except Failure as failure:  # compile, so that the messages are those of a run without a cache
                log.debug("cache of programs: %s", failure)
                cache.forget()
                self._close_files()
        with compiled_by_bcc(config.hooks, text, flags) as module:
            fds = map_descriptors(module)
            compiled = Compiled.of(module, self._kinds, fds)
            self._load(config, build, compiled, fds)
        if self.platform.has_malloc_trim:
            LIBC.malloc_trim(0)  # give back what the compiler used, some 20 MB
        if cache and compiled.can_be_kept():
            cache.write(compiled.as_json())

    def _load(self, config: Config, build: Build, compiled: Compiled, existing: dict[str, int]) -> None:
        """Make the maps, unless they exist in the right size, and load the programs. Raises Failure."""
        sizes = map_sizes(config, build, self.platform)
        btf = load_btf(compiled.btf) if compiled.btf else -1
        try:
            for name, spec in compiled.maps.items():
                sized = spec._replace(max_entries=sizes.get(name, spec.max_entries))
                has_size = name in existing and name not in sizes
                self._map_fds[name] = os.dup(existing[name]) if has_size else sized.create(btf)
                self._specs[name] = sized
        finally:
            if btf >= 0:
                os.close(btf)
        values = {**self._map_fds, **parameters(config, sizes)}
        for name, kind in self._kinds.items():
            try:
                code = compiled.programs[name].linked(values)
            except (KeyError, IndexError) as err:
                raise Failure(f"{name} is not whole") from err
            attach_type = CGROUP_PROGRAMS.get(name, 0)
            self._program_fds[name] = load_program(name, kind, code, 40 if config.debug else 3, attach_type)

    def _close_files(self) -> None:
        """Close the programs and maps."""
        for fds in self.tracepoint_fds, self._program_fds, self._map_fds:
            for fd in fds.values():
                os.close(fd)
            fds.clear()

    def close(self) -> None:
        """Close everything, once."""
        for ring, _ in self._rings:
            ring.close()
        for reader in self._readers:
            bcc.lib.perf_reader_free(reader)
        self._rings, self._readers = [], []
        self._epoll.close()
        self._close_files()

    # Programs

    def program(self, name: str) -> int:
        """Return the descriptor of a program."""
        return self._program_fds[name]

    def attach_tracepoint(self, program: str) -> None:
        """Attach a program to its raw tracepoint. Raises Unsupported."""
        name = TRACEPOINTS[program]
        try:
            fd = bpf_call("bpf_attach_raw_tracepoint", self.program(program), name.encode())
        except OSError as err:
            raise Unsupported(f"the raw tracepoint {name}") from err
        self.tracepoint_fds[program] = fd

    def detach_tracepoint(self, program: str) -> None:
        """Detach a program from its raw tracepoint."""
        os.close(self.tracepoint_fds.pop(program))

    def missed_events(self) -> int:
        """Return how many events of processes user space has not received.

        Linux 7.2 skips a program at a tracepoint while another run of it is preempted on that CPU (seen with
        execs and exits; up to 6.18 none is preempted). Others are lost when the ring buffer has no room, or by an
        error in user space.
        """
        skipped = sum(int(program_info(self.program(name)).recursion_misses) for name in TRACEPOINTS)
        return skipped + self.counters()["events_lost"] + self._events_failed

    @contextlib.contextmanager
    def run_time_stats(self) -> Iterator[bool]:
        """Make the kernel measure how long all BPF programs take. Yield whether it does.

        That costs some 20 ns for each run of a program. The kernel stops when nobody asks for it any more.
        """
        with contextlib.ExitStack() as stack:
            is_on = False
            if self.platform.has_run_time_stats:
                with contextlib.suppress(OSError):
                    stack.callback(os.close, bpf_call("bpf_enable_stats", BPF_STATS_RUN_TIME))
                    is_on = True
            yield is_on

    def run_times(self) -> Iterator[tuple[str, int, int]]:
        """Yield each program that ran since it was loaded: its name, the number of runs, and ns in all."""
        for name, fd in sorted(self._program_fds.items()):
            info = program_info(fd)
            if info.run_cnt:
                yield name, info.run_cnt, info.run_time_ns

    # Maps

    def map(self, name: str) -> Map:
        """Return a map of elfprobe.c or of the hooks file. Raises Failure if BCC cannot tell its C types."""
        if name not in self._maps:
            with bcc_errors(Failure):
                self._maps[name] = Map(self._map_fds[name], self._specs[name], self.platform.has_batches)
        return self._maps[name]

    def layout(self, name: str) -> Layout:
        """Return the layout of a struct of elfprobe.c that no map holds: a field of struct layouts."""
        return Layout(self.map("layouts").value_type).member(name)

    def counters(self) -> dict[str, int]:
        """Return the counters of elfprobe.c, each the sum over all CPUs."""
        per_cpu = self.map("counters").get(0)
        return {name: sum(getattr(cpu, name) for cpu in per_cpu) for name, *_ in per_cpu[0]._fields_}

    def renew_lease(self, until: float) -> None:
        """Allow probes until a time (CLOCK_MONOTONIC, s)."""
        self.map("alive_until").put(0, int(until * 1e9))

    def end_lease(self) -> None:
        """Allow no more probes."""
        self.renew_lease(0)

    def set_link_up_since(self, device: Device, when: int) -> None:
        """Set the time when the device's link came up (CLOCK_MONOTONIC, ns). A future time says that it is down."""
        self.map("link_up_since").put(device.ifindex, when)

    def take_expired(self, sent_before: int) -> Iterator[list[bytes]]:
        """Remove the probes in flight that left before a time (CLOCK_MONOTONIC, ns), and yield them.

        Each is the bytes of struct probe and of its key: see outstanding. It yields a list, perhaps an empty one,
        after each BATCH of probes in flight: there may be so many that the caller has to do something else
        meanwhile. At the end, oldest_in_flight is not later than the departure of any probe that is left.
        """
        oldest = time.monotonic_ns()
        for batch in self._in_flight.raw_batches():
            found = []
            for key, probe in batch:
                (sendtime,) = struct.unpack_from("=Q", probe, self._sendtime)
                if sendtime >= sent_before:
                    oldest = min(oldest, sendtime)
                # If the probe cannot be removed, its reply has come meanwhile: whoever removes a probe owns it.
                elif self._in_flight.remove(key):
                    found.append(probe + key)
            yield found
        self.oldest_in_flight = oldest

    def in_flight_of(self, flows: set[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Yield the keys and values of these flows' probes in flight. Only IN_FLIGHT_SEARCHED probes are searched.

        flows are beginnings of keys: destination and ports.
        """
        for key, probe in itertools.islice(self._in_flight.raw_items(), IN_FLIGHT_SEARCHED):
            if key[:FLOW_KEY_BYTES] in flows:
                yield key, probe

    def let_report(self, unmatched: int) -> None:
        """Let elfprobe.c report this many answers that quote no probe, from now on."""
        self.map("unmatched_left").put(0, unmatched)

    def set_seq_offset(self, flow: bytes, offset: int) -> None:
        """Let elfprobe.c subtract an offset from quoted TCP sequence numbers of a flow that fit no probe.

        flow is its key in the map.
        """
        self.map("seq_offsets").put(flow, offset)

    def exclude(self, packed: bytes) -> None:
        """Send no more probes to a destination."""
        for table in self.map("paths"), self.map("flow_paths"):
            path = table.get(packed)
            if path is not None:
                path.excluded = 1
                table.put(packed, path)

    def make_room(self) -> None:
        """If there was no room for a flow's destination, forget those to which no probe has left for longest.

        An excluded destination is not forgotten, because it would be probed again. Of n others, at most
        n // MADE_ROOM + 1 are forgotten.
        """
        no_room = self.counters()["no_room"]
        if no_room == self._no_room:
            return
        self._no_room = no_room
        table = self.map("flow_paths")
        path = table.new()
        excluded, last_sent = (
            type(path).excluded.offset,
            type(path).pacing.offset + type(path.pacing).last_sent.offset,
        )
        paths = list(table.raw_items())
        others = sorted(
            (struct.unpack_from("=Q", data, last_sent), key) for key, data in paths if not data[excluded]
        )
        surplus = len(paths) - table.max_entries * (MADE_ROOM - 1) // MADE_ROOM
        for _, key in others[: min(max(surplus, 0), len(others) // MADE_ROOM + 1)]:
            table.remove(key)

    def take_probe(self, key: bytes) -> bool:
        """Remove a probe in flight. Return whether it was there: whoever removes a probe owns it."""
        return self._in_flight.remove(key)

    def socket_owner(self, fd: int, layout: Layout) -> CStruct:
        """Return the owner of one of this process's sockets, None if it has none."""
        owner = layout.new()
        try:
            bpf_call(
                "bpf_lookup_elem", self._map_fds["sockets"], ctypes.byref(ctypes.c_int(fd)), ctypes.byref(owner)
            )
        except OSError:
            return None
        return owner

    def set_socket_owner(self, fd: int, owner: CStruct) -> None:
        """Make a process the owner of one of this process's sockets. A socket that has gone is ignored."""
        with contextlib.suppress(OSError):
            bpf_call(
                "bpf_update_elem", self._map_fds["sockets"], ctypes.byref(ctypes.c_int(fd)), ctypes.byref(owner), 0
            )

    def hook_maps(self) -> list[str]:
        """Return the names of the maps that the hooks file defines: all but those of elfprobe.c."""
        # The first argument of a macro, or the fourth if the first one is the type of the map.
        ours = re.findall(r'^BPF_\w+\((?:"\w+", [^,]+, [^,]+, )?(\w+)', read_source(C_FILE, "program"), re.M)
        return [name for name in self._specs if name not in ours]

    # Events

    def on_events(self, name: str, take: Callable[[Events], object], pages: int = EVENT_PERF_PAGES) -> None:
        """Call a function with the events of a ring buffer, inside take_events() and wait_for_events().

        Without ring buffers it is a perf buffer with so many pages for each CPU.
        """

        def receive(events: Events) -> None:
            try:
                take(events)
            except Exception:
                self._events_failed += len(events)
                self.defects.note(f"an event of {name} could not be handled")

        if self.platform.has_ring_buffer:
            ring = Ring(self._map_fds[name], self._specs[name].max_entries)
            self._rings.append((ring, receive))
            self._epoll.register(ring.fd, select.EPOLLIN)
        else:
            self._open_perf_buffers(name, receive, pages)

    def _open_perf_buffers(self, name: str, receive: Callable[[Events], None], pages: int) -> None:
        """Open the perf buffers of all CPUs that are online."""
        read = ctypes.string_at
        function = PERF_CALLBACK(lambda _, data, size: receive(Events.of_perf_buffer(read(data, size))))
        self._callbacks.append(function)
        for cpu in bcc.utils.get_online_cpus():
            reader = bcc.lib.bpf_open_perf_buffer(function, LOST_CALLBACK(), None, -1, cpu, pages)
            if not reader:
                raise Failure(f"the kernel opens no perf buffer: {os.strerror(ctypes.get_errno())}")
            self._readers.append(reader)
            index, target = ctypes.c_int(cpu), ctypes.c_int(bcc.lib.perf_reader_fd(reader))
            bpf_call("bpf_update_elem", self._map_fds[name], ctypes.byref(index), ctypes.byref(target), 0)

    def _poll_perf_buffers(self, milliseconds: int) -> None:
        """Wait at most so long for events of perf buffers, and handle them."""
        readers = (ctypes.c_void_p * len(self._readers))(*self._readers)
        bcc.lib.perf_reader_poll(len(readers), readers, milliseconds)

    def take_events(self) -> None:
        """Handle the events that are there."""
        if self.platform.has_ring_buffer:
            for ring, receive in self._rings:
                for events in ring.take():
                    receive(events)
        else:
            self._poll_perf_buffers(0)

    def wait_for_events(self, seconds: float) -> None:
        """Wait at most so long for enough events, or a signal, and handle the events."""
        if self.platform.has_ring_buffer:
            # select.epoll.poll() would not end with a signal.
            ready = ctypes.create_string_buffer(EPOLL_EVENT_BYTES)
            LIBC.epoll_wait(self._epoll.fileno(), ready, 1, int(1000 * seconds))
            self.take_events()
        else:
            self._poll_perf_buffers(int(1000 * seconds))


# ---- Attachments: the programs that are attached to devices -------------------------------------------

XDP_FLAGS_UPDATE_IF_NOEXIST, XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE = 1, 2, 4  # linux/if_link.h
IFLA_XDP_ATTACHED, IFLA_XDP_PROG_ID = 2, 4  # linux/if_link.h
# XDP modes as the kernel, ip link and pyroute2 name them -> as users do.
XDP_MODES = {1: "native", "xdp": "native", 2: "generic", "xdpgeneric": "generic"}
RTM_DELQDISC, RTM_DELTFILTER, NLM_F_REQUEST, NLM_F_ACK = 37, 45, 1, 4  # linux/rtnetlink.h, netlink.h
# TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS) and the same of egress, linux/pkt_sched.h
CLSACT_INGRESS, CLSACT_EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
ETH_P_ALL = 0x0003
# Names of our TC filters. The second one tells the run that clears up after a kill that the qdisc was ours too.
FILTER_NAME = "elfprobe"
FILTER_NAME_QDISC_OURS = "elfprobe+clsact"
OFFLOADS_WITHOUT_XDP = "rx-lro", "rx-gro-hw"  # generic XDP switches these off, and never on again
# Drivers that take a native XDP program without a reset of their queues, and give up no offload for it. Found in
# the kernel's source: efx_xdp_setup_prog() of sfc just sets a pointer. i40e, ice, ixgbe, igb, igc, mlx5, bnxt, ena
# and others set up their queues anew; some take the link down.
XDP_WITHOUT_RESET = frozenset({"sfc"})
XDP_COSTS = {
    "veth": "native XDP would take the segmentation offload of the other end of a veth",
    "virtio_net": "native XDP would take the receive offload of virtio_net",
}


class Attachment:
    """A program that is attached to a device while a with-block runs.

    attach() raises Failure, or Unsupported if this kernel has no such hook. detach() may be called at any
    time. It ignores what is gone already.
    """

    what = ""  # as the user reads it

    def __init__(self, ipr: Netlink, device: Device, program: int) -> None:
        self._ipr = ipr
        self.device = device
        self._program = program
        self._link = -1

    def __enter__(self) -> Attachment:
        try:
            self.attach()
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Attach the program."""
        raise NotImplementedError

    def is_attached(self) -> bool:
        """Return whether the program is still attached."""
        return self._link >= 0 and link_is_attached(self._link)

    def detach(self) -> None:
        """Detach the program."""
        if self._link >= 0:
            os.close(self._link)
        self._link = -1

    def _quietly(self, remove: Callable[..., None], *args: Any) -> None:
        """Call a function that detaches. Ignore it if there is nothing to detach any more."""
        try:
            remove(self._ipr, self.device, *args)
        except (pyroute2.NetlinkError, OSError) as err:
            code = getattr(err, "code", None) or getattr(err, "errno", None)
            if code not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                log.error("could not detach from %s: %s", self.device.name, err)


class XdpAttached(NamedTuple):
    """The XDP program on a device."""

    mode: str
    prog_id: int


def attached_xdp(ipr: Netlink, device: Device) -> XdpAttached | None:
    """Return the XDP program on the device, None if there is none."""
    xdp = ipr.get_links(device.ifindex)[0].get_attr("IFLA_XDP")
    # pyroute2 before 0.7 does not parse this attribute: it is text, in hexadecimal. With pyroute2 0.7 as the
    # oldest version, this branch can go.
    if isinstance(xdp, str):
        found = attributes(bytes.fromhex(xdp.replace(":", "")))
        numbers = {kind: int.from_bytes(content, sys.byteorder) for kind, content in found}
        mode: int | str | None = numbers.get(IFLA_XDP_ATTACHED)
        prog_id = numbers.get(IFLA_XDP_PROG_ID, 0)
    else:
        attrs = dict(xdp["attrs"]) if xdp else {}
        mode, prog_id = attrs.get("IFLA_XDP_ATTACHED"), attrs.get("IFLA_XDP_PROG_ID", 0)
    return XdpAttached(XDP_MODES.get(mode, str(mode)), prog_id) if mode else None


def remove_xdp(ipr: Netlink, device: Device, prog_id: int) -> None:
    """Detach the XDP program with this ID, if it is there. Raises OSError."""
    found = attached_xdp(ipr, device)
    if found and found.prog_id == prog_id:
        name = socket.if_indextoname(device.ifindex)  # it may have another name by now
        set_xdp(name, -1, XDP_FLAGS_DRV_MODE if found.mode == "native" else XDP_FLAGS_SKB_MODE)


def ethtool_features(name: str) -> Any:
    """Return pyroute2's ethtool handle and the device's features."""
    from pyroute2.ethtool.ioctl import IoctlEthtool  # takes long, and is seldom needed

    ethtool = IoctlEthtool(name)
    return ethtool, ethtool.get_features()


def active_offloads(name: str) -> list[str]:
    """Return which of OFFLOADS_WITHOUT_XDP a device has on."""
    try:
        _, features = ethtool_features(name)
    except Exception as err:  # devices without ethtool; pyroute2 raises errors of its own
        log.debug("offloads of %s are not known: %s", name, err)
        return []
    return [offload for offload in OFFLOADS_WITHOUT_XDP if offload in features and features[offload]]


def switch_on_offloads(_ipr: Netlink, device: Device, offloads: list[str]) -> None:
    """Switch offloads on again that generic XDP has switched off. Raises OSError."""
    ethtool, features = ethtool_features(device.name)
    for offload in offloads:
        features[offload] = True
    ethtool.set_features(features)


class XdpAttachment(Attachment):
    """A program at XDP. A BPF link holds it, so that it goes when this process ends, however it ends.

    Linux before 5.9 has no links for XDP, BCC before 0.14 none at all. There the program stays until it is
    detached.
    """

    what = "XDP program"

    def __init__(self, ipr: Netlink, device: Device, program: int, is_native: bool, has_links: bool) -> None:
        super().__init__(ipr, device, program)
        self._mode = XDP_FLAGS_DRV_MODE if is_native else XDP_FLAGS_SKB_MODE
        self._has_links = has_links
        self._prog_id = program_info(program).id
        self._offloads: list[str] = []

    def attach(self) -> None:
        name, is_native = self.device.name, self._mode == XDP_FLAGS_DRV_MODE
        found = attached_xdp(self._ipr, self.device)
        if found:
            theirs = program_name(found.prog_id) or "without a name"
            raise interface_failure(
                f"'{name}' has an XDP program already: {theirs}, id {found.prog_id}; it stays. "
                "--ingress-hook tc reads answers beside it"
            )
        if not is_native:
            self._offloads = active_offloads(name)
        try:
            self._attach()
        except OSError as err:
            kind = "native" if is_native else "generic"
            raise interface_failure(
                f"'{name}' takes no {kind} XDP program ({err.strerror}); --ingress-hook tc does without"
            ) from err

    def _attach(self) -> None:
        if self._has_links:
            try:
                self._link = create_link(self._program, self.device.ifindex, BPF_XDP, self._mode)
                return
            except OSError as err:
                if err.errno != errno.EINVAL:
                    raise
        name = socket.if_indextoname(self.device.ifindex)
        set_xdp(name, self._program, self._mode | XDP_FLAGS_UPDATE_IF_NOEXIST)

    def is_attached(self) -> bool:
        found = attached_xdp(self._ipr, self.device)
        return found is not None and found.prog_id == self._prog_id

    def detach(self) -> None:
        super().detach()
        self._quietly(remove_xdp, self._prog_id)
        offloads, self._offloads = self._offloads, []
        if offloads:
            self._quietly(switch_on_offloads, offloads)


class TcxAttachment(Attachment):
    """A program at TC. A tcx link (Linux 6.6) holds it, so that it goes when this process ends, however it ends.

    It runs after the tcx programs that are there already, and before all filters of clsact.
    """

    what = "TC program"

    def __init__(self, ipr: Netlink, device: Device, program: int, attach_type: int) -> None:
        super().__init__(ipr, device, program)
        self._attach_type = attach_type

    def attach(self) -> None:
        others = count_attached(self.device.ifindex, self._attach_type)
        try:
            self._link = create_link(self._program, self.device.ifindex, self._attach_type)
        except OSError as err:
            raise Unsupported(f"tcx ({err.strerror})") from err
        if others:
            direction = "egress" if self._attach_type == BPF_TCX_EGRESS else "ingress"
            said = "%d programs of others come first on TC %s of %s: packets that they take are not seen"
            log.info(said, others, direction, self.device.name)


class TcFilter(NamedTuple):
    """A filter of clsact."""

    kind: str
    prio: int
    protocol: int
    handle: int
    name: str


def tc_filters(ipr: Netlink, device: Device, parent: int) -> list[TcFilter]:
    """Return the filters of clsact, of one direction."""
    found = []
    for message in ipr.get_filters(index=device.ifindex, parent=parent):
        options = message.get_attr("TCA_OPTIONS")
        name = options.get_attr("TCA_BPF_NAME") if hasattr(options, "get_attr") else None
        kind, handle = message.get_attr("TCA_KIND"), message["handle"]
        prio, protocol = message["info"] >> 16, socket.ntohs(message["info"] & 0xFFFF)
        if handle:  # the entry of the chain itself has none
            found.append(TcFilter(kind, prio, protocol, handle, name or ""))
    return found


def has_clsact(ipr: Netlink, device: Device) -> bool:
    """Return whether the device has a clsact qdisc."""
    return any(qdisc.get_attr("TCA_KIND") == "clsact" for qdisc in ipr.get_qdiscs(index=device.ifindex))


def tc_delete(ipr: Netlink, command: str, message: int, kind: str, device: Device, **which: int) -> None:
    """Delete a qdisc or a filter. message is the netlink message type of the command.

    pyroute2 before 0.6 sends "del" with a flag that kernels refuse (EOPNOTSUPP), but a raw message type with the
    right flags. pyroute2 0.9 takes no raw message types, but its commands work. With pyroute2 0.6 as the oldest
    version, the second attempt can go.
    """
    try:
        ipr.tc(command, kind, device.ifindex, **which)
    except pyroute2.NetlinkError as err:
        if err.code != errno.EOPNOTSUPP:
            raise
        ipr.tc((message, NLM_F_REQUEST | NLM_F_ACK), kind, device.ifindex, **which)


def remove_clsact(ipr: Netlink, device: Device) -> None:
    """Remove the clsact qdisc that we added, unless somebody else uses it by now."""
    in_use = tc_filters(ipr, device, CLSACT_EGRESS) or tc_filters(ipr, device, CLSACT_INGRESS)
    if has_clsact(ipr, device) and not in_use:
        tc_delete(ipr, "del", RTM_DELQDISC, "clsact", device)


def remove_filter(ipr: Netlink, device: Device, ours: TcFilter, parent: int) -> None:
    """Remove our filter, and the clsact qdisc if that is ours, too.

    If the filter is gone, the qdisc is not ours any more: whoever removed our qdisc removed the filter with it,
    and a qdisc that is there now is theirs.
    """
    if ours in tc_filters(ipr, device, parent):
        which = dict(handle=ours.handle, prio=ours.prio, protocol=ours.protocol, parent=parent)
        tc_delete(ipr, "del-filter", RTM_DELTFILTER, "bpf", device, **which)
        if ours.name == FILTER_NAME_QDISC_OURS:
            remove_clsact(ipr, device)


class ClsactAttachment(Attachment):
    """A program at TC, as a filter of the clsact qdisc with the first free priority.

    If attach() adds the qdisc, detach() removes it.
    """

    what = "filter"

    def __init__(self, ipr: Netlink, device: Device, program: int, parent: int) -> None:
        super().__init__(ipr, device, program)
        self._parent = parent
        self._filter: TcFilter | None = None

    def attach(self) -> None:
        name = FILTER_NAME
        if not has_clsact(self._ipr, self.device):
            name = FILTER_NAME_QDISC_OURS
            self._add_clsact()
        with contextlib.ExitStack() as stack:
            if name == FILTER_NAME_QDISC_OURS:
                stack.callback(self._quietly, remove_clsact)
            self._add_filter(name)
            stack.pop_all()  # from here on the filter's name says whether the qdisc is ours

    def _add_clsact(self) -> None:
        try:
            self._ipr.tc("add", "clsact", self.device.ifindex)
        except pyroute2.NetlinkError as err:
            if err.code == errno.EEXIST:
                raise interface_failure(
                    f"'{self.device.name}' has an ingress qdisc, which excludes clsact: replace it by clsact, "
                    "where its filters work as well"
                ) from err
            if err.code == errno.ENOENT:
                raise Failure(
                    f"Linux {os.uname().release} has no clsact qdisc, which elfprobe needs before 6.6: the module "
                    "sch_ingress is missing; if the kernel was upgraded, boot the new one, or else install the "
                    "package with all modules of this one"
                ) from err
            raise Failure(f"'{self.device.name}' takes no clsact qdisc: {err}") from err

    def _add_filter(self, name: str) -> None:
        taken = {found.prio for found in tc_filters(self._ipr, self.device, self._parent)}
        prio = next(free for free in range(1, 0x10000) if free not in taken)
        if prio > 1:
            direction = "egress" if self._parent == CLSACT_EGRESS else "ingress"
            log.info("filters of others come first on TC %s: packets that they take are not seen", direction)
        self._filter = TcFilter("bpf", prio, ETH_P_ALL, 1, name)
        try:
            self._ipr.tc(
                "add-filter", "bpf", self.device.ifindex, handle=1, prio=prio, fd=self._program, name=name,
                parent=self._parent, protocol=ETH_P_ALL, direct_action=True, classid=1,
            )  # fmt: skip
        except pyroute2.NetlinkError as err:
            raise Failure(f"'{self.device.name}' takes no TC filter: {err}") from err

    def is_attached(self) -> bool:
        return self._filter in tc_filters(self._ipr, self.device, self._parent)

    def detach(self) -> None:
        if self._filter:
            self._quietly(remove_filter, self._filter, self._parent)
        self._filter = None


def remove_leftovers(ipr: Netlink, device: Device) -> None:
    """Remove what a killed elfprobe has left on the device. The caller is the device's sole user."""
    found = attached_xdp(ipr, device)
    if found and program_name(found.prog_id) == "elf_ingress":
        remove_xdp(ipr, device, found.prog_id)
        log.warning("an XDP program that a killed elfprobe left on %s is removed", device.name)
    for parent in CLSACT_EGRESS, CLSACT_INGRESS:  # the filter whose name tells of the qdisc is last
        for stale in tc_filters(ipr, device, parent):
            if stale.name.startswith(FILTER_NAME):
                remove_filter(ipr, device, stale, parent)
                log.warning("a TC filter that a killed elfprobe left on %s is removed", device.name)


class Hook(NamedTuple):
    """Where answers are read, and why there."""

    name: str  # as --ingress-hook has it
    reason: str

    def __str__(self) -> str:
        place = {"xdp": "native XDP", "generic": "generic XDP", "tc": "TC ingress"}[self.name]
        return f"{place} ({self.reason})"


def ingress_hooks(ipr: Netlink, devices: Sequence[Device], wanted: str) -> list[Hook]:
    """Return where answers may be read, the first choice first. wanted is the choice of --ingress-hook.

    All devices have the same hook, because the programs are compiled for it.
    """
    if wanted != "auto":
        return [Hook(wanted, "as asked for")]
    for reason in (why_not_native_xdp(ipr, device) for device in devices):
        if reason:
            return [Hook("tc", reason)]
    drivers = " and ".join(sorted({device.driver for device in devices}))
    free = f"the driver {drivers} takes a program without a reset"
    return [Hook("xdp", free), Hook("tc", f"{drivers} refuses native XDP")]


def why_not_native_xdp(ipr: Netlink, device: Device) -> str:
    """Return what native XDP would cost the application, or may cost; empty: no cost is known."""
    found = attached_xdp(ipr, device)
    if found:
        return f"{program_name(found.prog_id) or 'a program of somebody else'} is at XDP"
    if device.driver not in XDP_WITHOUT_RESET:
        unknown = f"native XDP may disturb the driver {device.driver or 'of this device'}"
        return XDP_COSTS.get(device.driver, unknown)
    offloads = active_offloads(device.name)
    return f"native XDP would take {' and '.join(offloads)}" if offloads else ""


def attachments(
    ipr: Netlink, devices: Iterable[Device], kernel: Kernel, hook: Hook, tcx: bool
) -> Iterator[Attachment]:
    """Yield what a run attaches, in this order: the receiving programs come first, so that no answer is missed."""
    ingress, egress = kernel.program("elf_ingress"), kernel.program("elf_egress")
    for device in devices:
        if hook.name != "tc":
            yield XdpAttachment(ipr, device, ingress, hook.name == "xdp", kernel.platform.has_links)
        elif tcx:
            yield TcxAttachment(ipr, device, ingress, BPF_TCX_INGRESS)
        else:
            yield ClsactAttachment(ipr, device, ingress, CLSACT_INGRESS)
    for device in devices:
        if tcx:
            yield TcxAttachment(ipr, device, egress, BPF_TCX_EGRESS)
        else:
            yield ClsactAttachment(ipr, device, egress, CLSACT_EGRESS)


# ---- Targets: destinations, target processes and their sockets ---------------------------------------

DESTINATIONS_MAX = 65536
UNDECIDED, TARGET, OURSELVES = 1, 2, 3  # status of a process, as in elfprobe.c
IN_PATHS = 1  # in a slot of the address filter, as in elfprobe.c
REMOVED_MAX = 1 << 16  # former target destinations whose sequence numbers are kept
EVENTS_MAX = 1 << 16  # events of processes that may wait; further ones count as missed
COUNT_EVERY = 10.0  # s between two lines with the number of target processes
SETTLED_AFTER = 0.05  # s without a new process, after which the log names it
RESCAN_CPU_SHARE = 0.05  # of a core, at most, to look for processes whose events were missed
FORKS_SAMPLED, FORKS_SAMPLED_MAX = 3, 30  # to find where a task has its PID; of 30 forks, 27 may be missed
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h: its inode number, always
FSCONFIG_CMD_CREATE = 6  # linux/mount.h
SO_COOKIE, IPPROTO_MPTCP = 57, 262  # asm-generic/socket.h, linux/in.h


def filter_slot(packed: bytes) -> int:
    """Return the slot of an address in the address filter. elfprobe.c does the same: filter_slot()."""
    first, second, third, fourth = struct.unpack("=4I", packed)
    number: int = (first ^ second ^ third ^ fourth) * 0x9E3779B1 & 0xFFFFFFFF
    return number >> 12


class Destinations:
    """The kernel's table of target destinations, and the address filter in front of it."""

    def __init__(self, kernel: Kernel) -> None:
        self._names: ReverseDns | None = None
        self._paths = kernel.map("paths")
        self._flow_paths = kernel.map("flow_paths")
        self._filter = kernel.map("address_filter")
        self._line_size = len(self._filter.new().slots)
        self._lines: dict[int, CStruct] = {}  # lines of the filter that are not empty
        self._removed: dict[bytes, tuple[int, int]] = {}  # seq and excluded, which hold for the whole run
        self._is_full = False

    def spare_lookups(self, names: ReverseDns) -> None:
        """Have no more names looked up once a name server is a target: our own packets would carry probes."""
        self._names = names
        for server in names.servers:
            if self._paths.get(server) is not None:
                names.avoid(server)

    def add(self, packed: bytes, path: CStruct = None) -> bool:
        """Make an address a target, with this struct path, or with an empty one.

        Return False if there is no room. The first time, that is logged.
        """
        if path is None:
            seq, excluded = self._removed.get(packed, (0, 0))
            path = self._paths.new(excluded=excluded)
            path.pacing.seq = seq
        try:
            self._paths.put(packed, path)
        except Failure as failure:
            if not self._is_full:
                log.warning("no room for more destinations (%s): %s is left out", failure, address_text(packed))
            self._is_full = True
            return False
        if self._names:
            self._names.avoid(packed)
        self._removed.pop(packed, None)
        number, place = divmod(filter_slot(packed), self._line_size)
        if number not in self._lines:
            self._lines[number] = self._filter.new()
        line = self._lines[number]
        if not line.slots[place]:
            line.slots[place] = IN_PATHS
            self._filter.put(number, line)
        return True

    def remove(self, packed: bytes) -> None:
        """Make an address no target any more. Its bit in the filter stays: other addresses may share it."""
        path = self._paths.get(packed)
        if path is not None:
            self._removed[packed] = path.pacing.seq, path.excluded
            if len(self._removed) > REMOVED_MAX:
                del self._removed[next(iter(self._removed))]
            self._paths.remove(packed)
        self._is_full = False

    def without_probes(self, wanted: Iterable[bytes]) -> dict[bytes, CStruct]:
        """Return the target destinations among these to which no probe has left, with their struct path."""
        paths = {packed: self._paths.get(packed) for packed in wanted}
        return {packed: path for packed, path in paths.items() if path is not None and not path.pacing.seq}

    def without_answers(self) -> list[str]:
        """Return the destinations to which probes left, but neither they nor routers in front of them respond."""
        paths = itertools.chain(self._paths.items(), self._flow_paths.items())
        return [
            address_text(key)
            for key, path in paths
            if path.pacing.seq > 1 and not path.liveness.last_received and not path.liveness.last_responsive
        ]

    def begin_anew(self, addresses: Iterable[str]) -> None:
        """Forget which hops on the path to destinations were unresponsive: only now can their answers be read."""
        for packed in map(pack_address, addresses):
            for table in self._paths, self._flow_paths:
                old = table.get(packed)
                if old is not None:
                    path = table.new(excluded=old.excluded, flows_only=old.flows_only)
                    path.pacing.seq = old.pacing.seq
                    table.put(packed, path)

    def one_hop_away(self) -> list[str]:
        """Return the destinations with no router before them, those of processes' flows included."""
        paths = itertools.chain(self._paths.items(), self._flow_paths.items())
        return [address_text(key) for key, path in paths if path.distance.length == 1]


def comm_bytes(name: str) -> bytes:
    """Return a command name as the kernel has it: cut, and filled up with zeros."""
    return os.fsencode(name)[: TASK_COMM_LEN - 1].ljust(TASK_COMM_LEN, b"\0")


def open_cgroup_root() -> int:
    """Return a descriptor of the topmost cgroup (version 2) that can be seen from here. Raises OSError.

    It need not be mounted: a new network namespace comes with a new /sys, without the mount.
    """
    mounts: dict[bytes, bytes] = {}  # root of the mount, seen from our cgroup namespace's root -> mount point
    with open("/proc/self/mountinfo", "rb") as file:
        for fields in (line.split(b" ") for line in file):
            if fields[fields.index(b"-") + 1] == b"cgroup2" and re.fullmatch(rb"/|(/\.\.)+", fields[3]):
                mounts[fields[3]] = fields[4]
    if mounts:
        top = mounts[max(mounts, key=len)]
        path = re.sub(rb"\\([0-7]{3})", lambda escape: bytes([int(escape[1], 8)]), top)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    context = system_call(SystemCall.FSOPEN, b"cgroup2", 0)
    try:
        system_call(SystemCall.FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = system_call(SystemCall.FSMOUNT, context, 0, 0)
    finally:
        os.close(context)
    try:
        return os.open(f"/proc/self/fd/{mount}", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(mount)


def covers_all_processes(cgroup: int) -> bool:
    """Return whether every process that can be seen belongs to a cgroup, given as a descriptor.

    Only the root has no cgroup.events. A cgroup that has it belongs to a container, or to a service with a
    cgroup namespace; processes outside it have a path that begins with "/..".
    """
    try:
        os.close(os.open("cgroup.events", os.O_RDONLY, dir_fd=cgroup))
    except FileNotFoundError:
        return True
    for pid in process_ids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", "rb") as file:
            if any(line.startswith(b"0::/..") for line in file):
                return False
    return True


def find_task_pid_offset(kernel: Kernel) -> None:
    """Tell elfprobe.c where struct task_struct has its pid, with tgid behind it. Raises Unsupported.

    No header and no type information is needed: this forks a few children and looks for their PIDs in the
    copies of their task_struct that elf_fork makes.
    """
    samples = kernel.map("task_sample")
    possible: set[int] = set()
    taken = 0
    for _ in range(FORKS_SAMPLED_MAX):
        samples.put(0, samples.new(parent=os.getpid()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a fork with threads: the child takes no lock
            child = os.fork()
        if child == 0:
            os._exit(0)
        with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored; the child has ended all the same
            os.waitpid(child, 0)
        sample = bytes(samples.get(0).task)
        if not any(sample):
            continue  # the kernel skipped elf_fork: see Kernel.missed_events()
        twice = struct.pack("=II", child, child)
        found = {at for at in range(0, len(sample) - 4, 4) if sample.startswith(twice, at)}
        possible = found & possible if taken else found
        taken += 1
        if taken == FORKS_SAMPLED:
            break
    samples.put(0, samples.new(parent=0))
    if len(possible) != 1:
        raise Unsupported("the place of the PID in struct task_struct")
    kernel.map("task_pid_offset").put(0, possible.pop())


def duplicated_sockets(pid: int) -> Iterator[socket.socket]:
    """Yield duplicates of another process's IPv4 and IPv6 sockets, each closed before the next one.

    Raises OSError if the process has ended.
    """
    pidfd = system_call(SystemCall.PIDFD_OPEN, pid, 0)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
                duplicate = system_call(SystemCall.PIDFD_GETFD, pidfd, int(name), 0)
            except FileNotFoundError:
                continue
            except OSError as err:
                if err.errno == errno.EBADF:
                    continue
                raise
            try:
                found = socket.socket(fileno=duplicate)
            except OSError:  # another file has the number by now
                os.close(duplicate)
                continue
            with found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    yield found
    finally:
        os.close(pidfd)


class SocketTagger:
    """Stores the owner with sockets that were open before elf_sock_create could do so."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._owner = kernel.layout("owner")

    def tag(self, pid: int, process: CStruct) -> bool:
        """Make a process (a struct process) the owner of its sockets. Sockets of other targets keep their owner.

        Return False if its sockets cannot be duplicated, or the process has ended.
        """
        owner = self._owner.new(process=process.id, status=process.status, pid=pid)
        owner.app.text = process.app.text
        try:
            for found in duplicated_sockets(pid):
                known = self._kernel.socket_owner(found.fileno(), self._owner)
                (cookie,) = struct.unpack("=Q", found.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
                owner.socket = 0 if found.proto == IPPROTO_MPTCP else cookie
                if known is None or known.status != TARGET or known.socket != owner.socket:
                    self._kernel.set_socket_owner(found.fileno(), owner)
        except OSError as err:
            if err.errno not in (errno.ESRCH, errno.ENOENT):
                log.warning("sockets that process %d has open already are not probed: %s", pid, err.strerror)
            return False
        return True


class ProcessTable:
    """The kernel's table of processes that are targets, or about which user space has yet to decide.

    A process has an ID beside its PID. The ID tells processes apart that have the same PID one after the other.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._processes = kernel.map("processes")

    def get(self, pid: int) -> CStruct:
        """Return the entry of the process that has this PID now, None if there is none."""
        return self._processes.get(pid)

    def entry(self, process_id: int, pid: int) -> CStruct:
        """Return the entry of the process with this ID and PID, None if there is none."""
        entry = self.get(pid)
        return entry if entry is not None and entry.id == process_id else None

    def add(self, process_id: int, pid: int, name: str, status: int = TARGET) -> CStruct:
        """Enter a process. Return its entry. Raises Failure if there is no room."""
        entry = self._processes.new(id=process_id, status=status)
        entry.app.text = comm_bytes(name)
        self._processes.put(pid, entry)
        return entry

    def forget(self, process_id: int, pid: int) -> None:
        """Remove the entry of the process with this ID and PID, if there is one."""
        if self.entry(process_id, pid):
            self._processes.remove(pid)

    def forget_ended(self) -> None:
        """Remove the entries of processes that have ended."""
        for pid, entry in list(self._items()):
            if not os.path.exists(f"/proc/{pid}"):
                self.forget(entry.id, pid)

    def targets(self) -> set[int]:
        """Return the PIDs of the target processes."""
        return {pid for pid, entry in self._items() if entry.status == TARGET}

    def _items(self) -> Iterator[tuple[int, CStruct]]:
        for key, entry in self._processes.items():
            yield int.from_bytes(key, sys.byteorder), entry


class ProcessFollower:
    """Follows the target processes, exactly and from their first packet.

    The programs of elfprobe.c store with each socket the process that creates or accepts it, and follow exec, fork
    and exit of target processes. This class adds what only user space sees when a process starts: scripts, and
    names that are long or paths.
    """

    def __init__(
        self,
        kernel: Kernel,
        apps: AppNames,
        pids: Iterable[int],
        seen: ProcessLog,
        fallback: Callable[[], None] = lambda: None,
    ) -> None:
        """fallback is called again and again if the processes cannot be followed any more."""
        self._kernel = kernel
        self._fallback = fallback
        self._apps = apps
        self._pids = tuple(pids)
        self._seen = seen
        self._processes = ProcessTable(kernel)
        self._tagger = SocketTagger(kernel)
        # Of struct process_event. None wakes the thread.
        self._events: queue.SimpleQueue[CStruct] = queue.SimpleQueue()
        self._read_event = kernel.layout("process_event").read
        self._events_left_out = 0
        self._ended = False
        # IDs and PIDs of processes: adopted since the last check; adopted before it; whose first thread has ended.
        self._adopted: list[tuple[int, int]] = []
        self._adopted_before: list[tuple[int, int]] = []
        self._ending: set[tuple[int, int]] = set()
        self._untold: list[tuple[int, int, str]] = []  # adopted processes that are not logged yet: ID, PID, name
        self._counts: collections.Counter[str] = collections.Counter()  # adopted processes by name
        self._counts_told: collections.Counter[str] = collections.Counter()
        self._made_up_for = 0  # number of missed events for which all processes were scanned
        self._next_rescan = 0.0  # CLOCK_MONOTONIC, s

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the processes inside the block, which must take or wait for the kernel's events.

        Raises Unsupported.
        """
        if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
            raise Unsupported("the PIDs that the kernel itself uses (this is a PID namespace of its own)")
        with contextlib.ExitStack() as stack:
            self._enter_names()
            # The look-ups of names that elfprobe makes belong to no target.
            self._processes.add(time.monotonic_ns(), os.getpid(), "", OURSELVES)
            self._kernel.on_events("process_events", self._take_events)
            for program in TRACEPOINTS:
                self._kernel.attach_tracepoint(program)
                stack.callback(self._kernel.detach_tracepoint, program)
            find_task_pid_offset(self._kernel)
            self._attach_to_cgroup(stack)
            self._adopt_running()
            thread = threading.Thread(target=self._follow, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(self._end)
            yield

    def _take_events(self, events: Events) -> None:
        for event in map(self._read_event, events.each()):
            if self._events.qsize() < EVENTS_MAX:
                self._events.put(event)
            else:
                self._events_left_out += 1
                self._kernel.defects.note("an event of a process could not wait", f"{EVENTS_MAX} others do")

    def _end(self) -> None:
        """Have the thread end."""
        self._ended = True
        self._events.put(None)

    def targets(self) -> set[int]:
        """Return the PIDs of the target processes."""
        return self._processes.targets()

    def _enter_names(self) -> None:
        """Write the names of -a to the kernel's table, each with whether that is certainly the whole name.

        Also the names of interpreters, up to a digit or dot.
        """
        table = self._kernel.map("apps")
        for app in self._apps.names:
            table.put(comm_bytes(app), len(os.fsencode(app)) < TASK_COMM_LEN - 1)
        table = self._kernel.map("interpreters")
        for interpreter in INTERPRETERS:
            table.put(comm_bytes(re.split(r"[0-9.]", interpreter)[0]), 1)

    def _attach_to_cgroup(self, stack: contextlib.ExitStack) -> None:
        """Attach CGROUP_PROGRAMS by BPF links, which go when this process ends, however it ends."""
        try:
            cgroup = open_cgroup_root()
        except OSError as err:
            raise Unsupported(f"cgroup version 2 ({err.strerror})") from err
        stack.callback(os.close, cgroup)
        if not covers_all_processes(cgroup):
            raise Unsupported("a cgroup that all processes here belong to")
        for program, attach_type in CGROUP_PROGRAMS.items():
            try:
                link = create_link(self._kernel.program(program), cgroup, attach_type)
            except OSError as err:
                if attach_type == BPF_CGROUP_INET_SOCK_CREATE:
                    raise Unsupported(f"a BPF link to the cgroup ({err.strerror})") from err
                # Somebody's program is there that allows no other one (Cilium before 1.14).
                log.warning("who accepts a connection is known only once it sends: %s: %s", program, err.strerror)
                continue
            stack.callback(os.close, link)

    def _adopt_running(self) -> None:
        """Adopt the target processes that run already, and the children that they have forked so far.

        elf_fork enters later children. Tag their sockets, too: a child may have some that its parent has closed.
        """
        adopted: set[int] = set()
        while True:
            chosen = choose_processes(running_processes(), self._apps, self._pids)
            missing = chosen.keys() - self._processes.targets() - adopted  # for some there may have been no room
            if not missing:
                break
            for pid in sorted(missing):
                self._adopt(pid, time.monotonic_ns(), chosen[pid])
            adopted |= missing
        for pid in chosen.keys() - adopted:
            entry = self._processes.get(pid)
            if entry is not None:
                self._tagger.tag(pid, entry)
        self._tell_adopted()

    def _adopt(self, pid: int, process_id: int, name: str) -> None:
        """Make a process a target, and the owner of its sockets, if there is room for one more."""
        try:
            entry = self._processes.add(process_id, pid, name)
        except Failure as failure:
            self._kernel.defects.note("no room for a target process", f"{name}, pid {pid}: {failure}")
            return
        if self._tagger.tag(pid, entry):
            self._adopted.append((process_id, pid))
        self._seen.began(pid, name)
        self._untold.append((process_id, pid, name))

    def _tell_adopted(self) -> None:
        """Log the first target process of each name, and count the others.

        A process that has run another program since goes by the name that it has now.
        """
        for process_id, pid, name in self._untold:
            entry = self._processes.entry(process_id, pid)
            comm = os.fsdecode(entry.app.text) if entry else ""
            if not name.startswith(comm):
                name = comm
            self._counts[name] += 1
            if self._counts[name] == 1:
                log.info("tracing %s (pid %d)", name, pid)
        self._untold.clear()

    def _tell_counts(self) -> None:
        """Log the number of target processes so far, for each name that has more than when last logged."""
        for name, count in self._counts.items():
            if count > max(self._counts_told[name], 1):
                log.info("tracing %s: %d processes so far", name, count)
        self._counts_told = self._counts.copy()

    def _follow(self) -> None:
        """Follow the processes until the end, if need be by the fallback. Runs in a thread of its own."""
        try:
            self._handle_events()
        except Exception:
            self._kernel.defects.note(
                "flows by process are not exact any more: from now on, the connection tables are read"
            )
            fallback = Every(SCAN_EVERY, self._fallback, at_once=True)
            while not self._ended:
                fallback.run()
                with contextlib.suppress(queue.Empty):
                    self._events.get(timeout=SCAN_EVERY)

    def _handle_events(self) -> None:
        """Handle events until the end."""
        checks = Every(SCAN_EVERY, self._check), Every(COUNT_EVERY, self._tell_counts)
        while not self._ended:
            event = None
            try:
                event = self._events.get(timeout=SETTLED_AFTER if self._untold else SCAN_EVERY)
            except queue.Empty:
                self._tell_adopted()
            for check in checks:
                check.run()
            if event and event.status:
                self._decide(event.id, event.pid, event.status)
            elif event:
                self._ending.add((event.id, event.pid))
        self._tell_adopted()
        self._tell_counts()

    def _check(self) -> None:
        """Tag sockets again, make up for missed events, and forget processes that have ended."""
        self._tell_adopted()
        self._tag_again()
        missed = self._kernel.missed_events() + self._events_left_out
        if missed != self._made_up_for and time.monotonic() >= self._next_rescan:
            self._made_up_for = missed
            self._next_rescan = self._rescan()
        for process_id, pid in list(self._ending):
            if not os.path.exists(f"/proc/{pid}") or not self._processes.entry(process_id, pid):
                self._ending.remove((process_id, pid))
                self._processes.forget(process_id, pid)
                self._seen.ended(pid)

    def _tag_again(self) -> None:
        """Tag the sockets of each process once more, a second or more after it was adopted.

        When it was adopted, a socket may have been past elf_sock_create, but without a descriptor yet.
        """
        due, self._adopted_before, self._adopted = self._adopted_before, self._adopted, []
        for process_id, pid in due:
            entry = self._processes.entry(process_id, pid)
            if entry:
                self._tagger.tag(pid, entry)

    def _rescan(self) -> float:
        """Make up for missed events: scan all processes.

        Return the earliest time for the next rescan (CLOCK_MONOTONIC, s), so that scanning stays below
        RESCAN_CPU_SHARE of a core. Adopting does not count: it is done once for each process.
        """
        begun = time.thread_time()
        self._processes.forget_ended()
        known = self._processes.targets()  # not the PIDs of -P: other processes may have them by now
        chosen = choose_processes(running_processes(), self._apps, known)
        earliest = time.monotonic() + (time.thread_time() - begun) / RESCAN_CPU_SHARE
        for pid in chosen.keys() - known:
            self._adopt(pid, time.monotonic_ns(), chosen[pid])
        return earliest

    def _decide(self, process_id: int, pid: int, status: int) -> None:
        """Make a process a target, or forget it. status is its status in the kernel's event."""
        try:
            process = look_at_process(pid)
        except OSError:  # it has ended
            self._processes.forget(process_id, pid)
            return
        entry = self._processes.get(pid)
        if entry is not None and entry.id != process_id:  # it has ended, or is another program by now
            return
        if entry is None:  # it went with the entry of the program before the exec, or this is another process
            status = UNDECIDED
        parent = self._processes.get(process.ppid)
        inherits = parent is not None and parent.status == TARGET  # the parent became a target after the fork
        if self._apps.match(process) or status == TARGET or inherits:
            self._adopt(pid, process_id, process.name)
        else:
            self._processes.forget(process_id, pid)


# ---- Run: one measurement, and the entry point -------------------------------------------------------

DEVICES_MAX = 64  # on which answers are read
LEASE = 2.0  # s after a renewal for which the programs send probes
RENEW_EVERY = 0.5  # s
DRAIN_EVERY = 0.25  # s between two reads of the result ring, at most
STRAY_REPLIES = 0.5  # s to wait for replies after the last probe
CLOCK_EVERY = 1.0  # s between two checks that CLOCK_MONOTONIC still maps to UTC as before
DISK_EVERY = 3.0  # s between two checks of how much the rows take
JSON_EVERY = 10.0  # s between two versions of FILEBASE.json
JSON_SHARE = 0.03  # of a processor, for these versions: with tens of thousands of flows they come less often
SLICE = 0.05  # s to spend on FILEBASE.json or on metrics before results are read again, well below RING_HOLDS
CHECK_EVERY = 5.0  # s between two checks that our programs are still attached
REPORT_EVERY = 10.0  # s between two lines with the counters (-d)
SCRAPE_EVERY = 0.1  # s between two looks whether somebody asks for metrics
DRAW_EVERY = 1.0  # s between two tables on a terminal
DIGEST_EVERY = 0.25  # s between two looks for episodes ...
DIGEST_MOST = 1024  # ... in so many rows at most; of more rows, in a sample
KEYS_EVERY = 0.1  # s between two looks at the keyboard, at most
NO_PROBES = 3  # exit status
RESET_FOR = 10.0  # s after attaching XDP for which the network driver is suspected if the link goes down


def facts(config: Config, attached: Attached) -> dict[str, Any]:
    """Return the part of FILEBASE.json that does not change during a run."""
    return {
        "elfprobe": VERSION,
        "command": config.command,
        "host": os.uname().nodename,
        "kernel": os.uname().release,
        "bcc": bcc.__version__,
        "interfaces": attached.interfaces(),
    }


def labels(attached: Attached) -> dict[str, str]:
    """Return the labels of the metrics that say what runs: versions, devices, hook and mode."""
    where = {**attached.interfaces()[0], "interface": names_of(attached.devices, ",")}
    del where["name"]  # the other facts are those of all devices
    return {"version": VERSION, "kernel": os.uname().release, "bcc": bcc.__version__, **where}


def heading_lines(ipr: Netlink, devices: Iterable[Device], config: Config, clock: Clock) -> list[str]:
    """Return the first lines of the log: when, what, where, and how CLOCK_MONOTONIC maps to UTC."""
    addresses: dict[int, list[str]] = {}
    for message in ipr.get_addr():
        address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        addresses.setdefault(message["index"], []).append(f"{address}/{message['prefixlen']}")
    return [
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z (%Z)')}: {as_called('elfprobe.py')} {shlex.join(config.command)}",
        f"elfprobe {VERSION}, {os.uname().nodename}, Linux {os.uname().release}, BCC {bcc.__version__}",
        *(
            f"{device.name} ({device.driver or 'no driver known'}): "
            f"{', '.join(addresses.get(device.ifindex, ['no address']))}"
            for device in devices
        ),
        f"CLOCK_MONOTONIC 0 is {utc_text(clock.mappings[0].zero)}",
    ]


def log_lines(lines: Iterable[str]) -> None:
    for line in lines:
        log.info("%s", line)


@dataclasses.dataclass
class Attached:
    """The programs of a run, loaded and attached."""

    devices: list[Device]
    hook: Hook
    kernel: Kernel
    attachments: list[Attachment]
    why_no_owners: str  # why the programs do not know the owner of a packet's socket; empty: they do
    ipr: Netlink
    elsewhere: contextlib.ExitStack  # detaches what read_elsewhere() attaches

    def interfaces(self) -> list[dict[str, str]]:
        """Return the devices as FILEBASE.json names them."""
        modes = {"xdp": "native", "generic": "generic"}
        tc = "tcx" if any(isinstance(each, TcxAttachment) for each in self.attachments) else "clsact"
        hook = "xdp" if self.hook.name in modes else "tc"
        mode = modes.get(self.hook.name, tc)
        return [{"name": device.name, "hook": hook, "mode": mode} for device in self.devices]

    def read_elsewhere(self) -> tuple[list[str], bool]:
        """Read answers also on the other devices with the same kind of packets. Return their names, and whether
        that is possible.

        It is done with tcx links only. They do not outlive this process, whatever ends it. Filters of clsact do
        after a kill, and so does an XDP program without a link (before Linux 5.9).
        """
        names, can_read = [], isinstance(self.attachments[0], TcxAttachment)
        ours = {device.name for device in self.devices}
        for _, name in socket.if_nameindex()[:DEVICES_MAX]:
            with contextlib.suppress(Failure):
                device = find_device(self.ipr, name)
                if name in ours or device.frame != self.devices[0].frame:
                    continue
                if can_read:
                    program = self.kernel.program("elf_ingress")
                    self.elsewhere.enter_context(TcxAttachment(self.ipr, device, program, BPF_TCX_INGRESS))
                names.append(name)
        return names, can_read


class Measurement:
    """The part of a run from "probing on" to the summary. CLOCK_MONOTONIC is time.monotonic()."""

    def __init__(
        self,
        config: Config,
        attached: Attached,
        results: Results,
        files: Files,
        report: Report,
        clock: Clock,
        view: LiveView,
        reasons: Reasons,
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config
        self._attached = attached
        self._reasons = reasons
        self._kernel = attached.kernel
        self._results = results
        self._files = files
        self._csv, self._json, _ = files
        self._packets = results.packets
        self._disk = DiskUse(self._csv.path, "rows and packets" if self._packets else "rows")
        self.json_problem = ""  # why FILEBASE.json could not be written at last; empty: it was
        self._report = report
        self._clock = clock
        self._view = view
        self._metrics = metrics
        self.probes = 0  # of the whole run, once it has ended
        self.output: list[str] = []  # lines for standard output, once the run has ended
        self._links = dict.fromkeys(attached.devices, LinkState.UP)
        self._begun_at = self._ended_at = time.monotonic()
        self._lease_until = math.inf  # until the first renewal
        self._end = self._begun_at + (config.duration or math.inf)
        self._json_begun, self._json_took = self._begun_at, 0.0  # the newest version: begun at, s of CPU time
        self._expired: Iterator[str] | None = None  # portions of rows, while probes in flight are looked through
        self._next_expiry = self._begun_at
        self._steps = (
            Every(RENEW_EVERY, self._renew_lease),
            Every(0, self._expire),
            Every(RENEW_EVERY, self._kernel.make_room),
            Every(CHECK_EVERY, self._check_attachments),
            Every(RENEW_EVERY, self._look_for_reasons),
            Every(REPORT_EVERY, self._log_counters),
            Every(CLOCK_EVERY, self._check_clock),
            Every(DISK_EVERY, self._check_disk),
            Every(JSON_EVERY, self._begin_json),
            Every(0, self._go_on_with_json),
            Every(0, self._take),
            Every(RENEW_EVERY, self._match_late),
            Every(DIGEST_EVERY, self._digest),
            Every(SCRAPE_EVERY, self._answer_scraper),
            Every(DRAW_EVERY, self._draw),
        )

    def measure(self, stop: Stop) -> None:
        """Measure until a stop is asked for, the duration is over, or the command has ended.

        Raises Failure if it cannot go on.
        """
        self._match_late()  # so that the first answers are reported
        self._renew_lease()  # before anybody learns that packets are probed
        self._announce()
        self._reasons.begin()
        with self._view.shown():
            self._measure(stop)

    def _announce(self) -> None:
        attached = self._attached
        fate = "dropped" if self._config.ingress == "drop" else "passed"
        packets = f", packets to {self._packets.path}" if self._packets else ""
        log.info(
            "probing on %s, answers read at %s, then %s; rows go to %s%s",
            names_of(attached.devices), attached.hook, fate, self._csv.path, packets,
        )  # fmt: skip

    def _measure(self, stop: Stop) -> None:
        command = stop.command
        if command and not stop.asked:
            command.release()
        stop.service.tell("READY=1")
        watchdog = Every(RENEW_EVERY, lambda: stop.service.tell("WATCHDOG=1"))
        while not stop.asked and time.monotonic() < self._end:
            watchdog.run()
            if stop.wants_reopened:
                stop.wants_reopened = False
                self._reopen_files()
            if command and command.has_ended():
                log.info("%s", command.end_text())
                break
            if self._view.take_keys():  # first: after a stop, log lines must not go where the table was
                stop.ask()
            for step in self._steps:
                step.run()
            patience = 0 if self._expired else KEYS_EVERY if self._view.is_shown else DRAIN_EVERY
            self._kernel.wait_for_events(min(patience, max(self._end - time.monotonic(), 0)))
        stop.service.tell("STOPPING=1")

    def drain(self) -> None:
        """End probing. Write the replies that are still on their way, then what is outstanding."""
        self._kernel.end_lease()
        self._ended_at = time.monotonic()
        try:
            while time.monotonic() < self._ended_at + STRAY_REPLIES:
                self._take()
                time.sleep(STRAY_REPLIES / 10)
        finally:
            results = self._results
            first = [results.take(), results.match_late()]
            self._write_all(itertools.chain(first, results.expire(1 << 63), iter(results.take, "")))
            self._digest(is_over=True)

    def _write_all(self, portions: Iterable[str]) -> None:
        """Write rows, even if some before could not be written: all must be counted. Raises Failure at the end."""
        failures = []
        for rows in portions:
            try:
                self._write(rows)
            except Failure as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    def _write(self, rows: str) -> None:
        """Write rows, and their packets. Raises Failure."""
        try:
            if rows:
                self._csv.write_lines(rows)
        finally:
            if self._packets:
                self._packets.write()

    def _reopen_files(self) -> None:
        try:
            self._files.reopen()
        except Failure as failure:
            log.warning("%s: the file that was there goes on", failure)

    def _take(self) -> None:
        """Write the rows of new replies."""
        self._write(self._results.take())

    def _match_late(self) -> None:
        self._write(self._results.match_late())
        for found in self._results.unmatched.take_ack_filters():
            self._kernel.exclude(pack_address(found.dest))
            log.warning("%s", found.text())
            self._view.note(FlowEvent.EXCLUDED, (found.dest, 0, 0, socket.IPPROTO_TCP))

    def _expire(self) -> None:
        """Write a portion of the rows of probes that have been outstanding for too long.

        There may be hundreds of thousands in flight, and the lease must be renewed between two portions.
        """
        now = time.monotonic()
        if self._expired is None and now >= self._next_expiry:
            self._next_expiry = now + RENEW_EVERY
            count = self._kernel.counters()
            # The counters are cheaper than the map: to see that it is empty, the kernel looks into each bucket.
            results = self._results
            if count["probes"] != count["replies"] + results.matched_late + results.unanswered:
                self._expired = self._results.expire(int((now - UNANSWERED_AFTER) * 1e9))
        if self._expired:
            rows = next(self._expired, None)
            if rows is None:
                self._expired = None
                oldest = self._kernel.oldest_in_flight / 1e9
                self._next_expiry = max(self._next_expiry, oldest + UNANSWERED_AFTER)
            else:
                self._write(rows)

    def _renew_lease(self) -> None:
        """Allow probes for another LEASE seconds, if the devices are still there. Raises Failure if one is not."""
        now = time.monotonic()
        if now > self._lease_until:
            why = "elfprobe was stopped, or waited for a processor or its file"
            log.warning("no probes for %.1f s: %s", now - self._lease_until, why)
        for device, former in self._links.items():
            try:
                state = LinkState.of(device)
            except OSError as err:
                raise Failure(f"the interface '{device.name}' is gone") from err
            if state != former:
                self._links[device] = state
                self._log_link(device, state)
                self._kernel.set_link_up_since(device, time.monotonic_ns() if state == LinkState.UP else 1 << 63)
        self._lease_until = now + LEASE
        self._kernel.renew_lease(self._lease_until)

    def _log_link(self, device: Device, state: LinkState) -> None:
        log.warning("the interface %s %s", device.name, state.value)
        is_new = time.monotonic() < self._begun_at + RESET_FOR
        if state == LinkState.NO_CARRIER and self._attached.hook.name == "xdp" and is_new:
            log.warning(
                "the driver %s may have taken the link down for our XDP program: use --ingress-hook tc",
                device.driver,
            )

    def _check_attachments(self) -> None:
        """Raise Failure if a program is no longer attached."""
        for attachment in self._attached.attachments:
            if not attachment.is_attached():
                raise Failure(f"somebody has removed our {attachment.what} from '{attachment.device.name}'")

    def _log_counters(self) -> None:
        log.debug("counters: %s", self._kernel.counters())

    def _check_clock(self) -> None:
        moved = self._clock.check()
        if moved:
            zero = utc_text(self._clock.mappings[-1].zero)
            log.warning("%s: CLOCK_MONOTONIC 0 is %s from now on", moved, zero)

    def _check_disk(self) -> None:
        results = self._results
        written = self._csv.written + (self._packets.written if self._packets else 0)
        said = self._disk.look(written, results.replies + results.unanswered, results.summary.hops)
        if said:
            log.info("%s", said)

    def _pieces(self, counters: dict[str, int], has_ended: bool = False) -> Iterator[str]:
        return self._report.pieces(counters, [os.path.basename(path) for path in self._csv.paths], has_ended)

    @contextlib.contextmanager
    def _json_errors(self) -> Iterator[None]:
        """Log why FILEBASE.json cannot be written, once: its former content stays, and the run goes on."""
        try:
            yield
        except Failure as failure:
            if str(failure) != self.json_problem:
                log.warning("%s", failure)
            self.json_problem = str(failure)
        else:
            self.json_problem = ""

    def _begin_json(self) -> None:
        now = time.monotonic()
        if self._json_took > JSON_SHARE * (now - self._json_begun):
            return
        self._json_begun, self._json_took = now, 0.0
        with self._json_errors():
            self._json.begin(self._pieces(self._kernel.counters()))

    def _go_on_with_json(self) -> None:
        before = time.thread_time()
        with self._json_errors():
            self._json.go_on(SLICE)
        self._json_took += time.thread_time() - before

    def _answer_scraper(self) -> None:
        if self._metrics:
            with self._kernel.defects.noted("the metrics are not up to date"):
                self._metrics.answer(self._figures, SLICE)

    def _figures(self) -> Figures:
        results = self._results
        user = {
            "replies": results.replies,
            "unanswered": results.unanswered,
            "malformed_extensions": results.malformed,
            "rows_lost": self._csv.lines_lost,
        }
        return results.rewrites.findings(), {"bpf": self._kernel.counters(), "user": user}

    def _digest(self, is_over: bool = False) -> None:
        with self._kernel.defects.noted("when links were slower is not known"):
            self._results.summary.digest(DIGEST_MOST, is_over)

    def _draw(self) -> None:
        if self._view.is_shown:
            results = self._results
            self._view.draw(self._kernel.counters()["probes"], results.replies, results.unanswered)

    def _look_for_reasons(self) -> None:
        with self._kernel.defects.noted("the reasons for missing probes are not known"):
            self._reasons.look()

    def summarise(self, destinations: Destinations, stop: Stop) -> None:
        """Log the accounting, the findings and the tables, and save the hooks' maps."""
        self._view.clear()
        results, count = self._results, self._kernel.counters()
        self.probes = count["probes"]
        log.info("%d probes, %d replies, %d unanswered", count["probes"], results.replies, results.unanswered)
        if self._csv.lines_lost:
            log.warning("%d rows of them could not be written to %s", self._csv.lines_lost, self._csv.path)
        if self._packets and self._packets.lost:
            log.warning("%d packets could not be written to %s", self._packets.lost, self._packets.path)
        reasons: list[Reason] = []
        with self._kernel.defects.noted("the reasons for missing probes are not known"):
            reasons = self._reasons.at_end(count)
        for text in itertools.chain(
            accounting(count, results.replies + results.unanswered),
            (finding.text() for finding in results.rewrites.findings()),
            reasons_in_short(reasons),
            why_no_probes(
                count, destinations.one_hop_away(), names_of(self._attached.devices, " or "), bool(reasons)
            ),
            troubles(count, results.malformed),
            self._kernel.defects.texts(),
        ):
            log.info("%s", text)
        log.debug("counters: %s", count)
        if self._config.debug:
            seconds = self._ended_at - self._begun_at
            for name, runs, took in self._kernel.run_times():
                share = took / (seconds * 1e9)
                log.info("%s ran %d times, %.0f ns each: %.2f%% of a core", name, runs, took / runs, 100 * share)
        self._clock.check()
        pieces = list(self._pieces(count, has_ended=True))
        with self._json_errors():
            self._json.finish(pieces)
        for line in results.summary.tables():
            log.info("%s", line, extra={"bare": True})
        if self._config.json:
            self.output = "".join(pieces).splitlines()
        elif not self._config.quiet:
            self.output = results.summary.tables(columns=output_columns())
        save_maps(self._kernel, self._csv.filebase, stop)


class ElfProbe:
    """A run, from its checks to its last row."""

    def __init__(
        self, config: Config, platform: Platform, stop: Stop, console: Console | None, file_log: FileLog | None
    ) -> None:
        """console is where the live table is drawn; None: nowhere."""
        self._config = config
        self._platform = platform
        self._stop = stop
        self._console = console
        self._file_log = file_log
        self._measurement: Measurement | None = None

    @property
    def status(self) -> int:
        """The exit status of a run without an error."""
        return NO_PROBES if self._measurement and not self._measurement.probes else 0

    @property
    def problem(self) -> str:
        """What went wrong with FILEBASE.json at last; empty: nothing."""
        return self._measurement.json_problem if self._measurement else ""

    @property
    def output(self) -> list[str]:
        """The lines for standard output. Empty before the end of a run."""
        return self._measurement.output if self._measurement else []

    def run(self) -> None:
        """Check, load, attach, follow processes, create the files, measure, detach, summarise. Raises Failure."""
        config = self._config
        with contextlib.ExitStack() as stack:
            ipr = stack.enter_context(pyroute2.IPRoute())
            routes = stack.enter_context(Routes())
            devices = find_devices(ipr, config.interfaces, config.encapsulation)
            pids = list(config.pids)
            for pid in pids:
                if not psutil.pid_exists(pid):
                    raise Failure(f"argument -P/--pid: there is no process {pid}")
            fixed = resolve_all(config.addresses, DESTINATIONS_MAX)
            if not devices:
                name = find_interface(routes, fixed, config.by_process)
                devices = find_devices(ipr, [name], config.encapsulation)
            if config.child:
                self._stop.command = Command(config.child)
                stack.callback(self._stop.command.close)
                pids.append(self._stop.command.pid)
            stack.enter_context(sole_user(devices))
            exporter = stack.enter_context(exporting(config.metrics))
            for device in devices:
                remove_leftovers(ipr, device)
            active = contextlib.ExitStack()  # while probes may be sent
            attached = self._attach(stack, active, ipr, devices)
            if attached is None:
                log.info("ended before anything was attached or written")
                return
            with active:
                names = None if config.numeric else ReverseDns()
                summary = Summary(names.name_of) if names else Summary()
                clock, processes = Clock(), ProcessLog()
                summary.when = lambda at: time_of_day(clock.utc(at))
                heading = heading_lines(ipr, devices, config, clock)
                view = LiveView(self._console, names_of(devices), summary)
                log_flow_events(attached.kernel, view)
                destinations = Destinations(attached.kernel)
                for packed in fixed:
                    destinations.add(packed)
                if config.by_process:  # lines about processes follow
                    log_lines(heading)
                apps = AppNames(config.apps)
                poller = ConnectionPoller(attached.kernel.defects, destinations, fixed, apps, pids, processes)
                targets, is_exact = self._follow_processes(active, attached, poller, apps, pids, processes)
                if names and not is_exact:  # exact programs know the sockets of elfprobe itself
                    destinations.spare_lookups(names)
                results = Results(attached.kernel, summary)
                if config.capture:
                    results.packets = PacketFile(
                        config.capture, f"elfprobe {VERSION}", names_of(devices), clock, results.names,
                        results.outstanding_names,
                    )  # fmt: skip
                    stack.callback(results.packets.close)
                active.callback(attached.kernel.end_lease)
                if config.debug and not active.enter_context(attached.kernel.run_time_stats()):
                    log.info("CPU time of the programs is not known: that needs Linux 5.8, new BCC, sys_admin")
                report = Report(facts(config, attached), clock, summary, results.rewrites, processes)
                first = report.pieces(attached.kernel.counters(), [], has_ended=False)
                files = stack.enter_context(
                    output_files(
                        config.filebase,
                        self._file_log,
                        first,
                        config.rotate and config.rotate << 20,
                        [results.packets] if results.packets else [],
                    )
                )
                if not config.by_process:
                    log_lines(heading)
                reasons = Reasons(
                    config, devices, routes, apps, destinations, fixed, targets, duplicated_sockets,
                    attached.read_elsewhere,
                )  # fmt: skip
                metrics = Metrics(exporter, labels(attached), summary, config.metrics_series) if exporter else None
                self._measurement = measurement = Measurement(
                    config, attached, results, files, report, clock, view, reasons, metrics
                )
                stack.callback(measurement.summarise, destinations, self._stop)  # when all is detached
                try:
                    measurement.measure(self._stop)
                finally:
                    measurement.drain()

    def _attach(
        self, stack: contextlib.ExitStack, active: contextlib.ExitStack, ipr: Netlink, devices: list[Device]
    ) -> Attached | None:
        """Load the programs, and attach them at the first of the possible hooks that takes them.

        stack unloads them, active detaches them. Return None if a stop was asked for before. Raises Failure.
        """
        hooks = ingress_hooks(ipr, devices, self._config.ingress_hook)
        choices = [(hook, tcx) for hook in hooks for tcx in (True, False) if self._platform.has_tcx or not tcx]
        while True:
            hook, tcx = choices.pop(0)
            with contextlib.ExitStack() as loaded:
                kernel, why_no_owners = self._load(Build(devices[0].frame, hook.name == "tc", tcx))
                loaded.callback(kernel.close)
                if self._stop.asked:
                    return None
                found = list(attachments(ipr, devices, kernel, hook, tcx))
                try:
                    with contextlib.ExitStack() as done:
                        for attachment in found:
                            done.enter_context(attachment)
                        active.push(done.pop_all())
                except Unsupported as err:
                    choices = [choice for choice in choices if not choice[1]]
                    reason: Failure = err
                except Failure as err:
                    choices = [choice for choice in choices if choice[0] != hook]
                    reason = err
                else:
                    stack.push(loaded.pop_all())
                    elsewhere = active.enter_context(contextlib.ExitStack())
                    return Attached(devices, hook, kernel, found, why_no_owners, ipr, elsewhere)
            log.debug("%s: %s", hook, reason)
            if not choices:
                raise Failure(str(reason)) from reason

    def _load(self, build: Build) -> tuple[Kernel, str]:
        """Return the loaded programs, and why they do not know the owner of a packet's socket; empty: they do."""
        if not self._config.by_process:
            refused = "nobody asks for it"
        elif not self._platform.has_ring_buffer:
            refused = "no ring buffers"
        elif not self._platform.has_links:
            refused = "no BPF links"
        else:
            try:
                return Kernel(self._config, dataclasses.replace(build, by_owner=True), self._platform), ""
            except Failure as failure:
                for line in str(failure).splitlines():
                    log.debug("%s", line)
                refused = str(failure).splitlines()[0]
                if is_kernel_memory_locked():
                    refused = f"{LOCKDOWN} is 'confidentiality', which lets programs read no memory of the kernel"
        return Kernel(self._config, build, self._platform), refused

    def _follow_processes(
        self,
        stack: contextlib.ExitStack,
        attached: Attached,
        poller: ConnectionPoller,
        apps: AppNames,
        pids: Sequence[int],
        processes: ProcessLog,
    ) -> tuple[Callable[[], Iterable[int]], bool]:
        """Follow the target processes until the stack unwinds: exactly, or if that is unsupported, by polling.

        Return what tells their PIDs, and whether they are followed exactly.
        """
        if not self._config.by_process:
            return tuple, False
        try:
            if attached.why_no_owners:
                what = "programs that note who owns a socket (Linux 5.10 and BCC 0.16)"
                raise Unsupported(f"{what}: {attached.why_no_owners}")
            follower = ProcessFollower(attached.kernel, apps, pids, processes, poller.try_scan)
            stack.enter_context(follower.followed())
            return follower.targets, True
        except Unsupported as err:
            log.warning(
                "flows by process are not exact without %s; instead the connection tables are read "
                "every %g s: short flows are missed, and others' to the same addresses probed",
                err, SCAN_EVERY,
            )  # fmt: skip
            stack.enter_context(poller.followed())
            return poller.targets, False


def set_up_logging(config: Config, console: Console) -> FileLog | None:
    """Send the log to the console, unless -q is given. Return the handler for FILEBASE.log, None without -l."""
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if config.debug else logging.INFO)
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
    if not config.quiet:
        console.setFormatter(LogFormat())
        root.addHandler(console)
    if not config.logfile:
        return None
    file_log = FileLog()
    file_log.setFormatter(LogFormat())
    root.addHandler(file_log)
    return file_log


def log_thread_error(args: threading.ExceptHookArgs) -> None:
    """Log that a thread has ended by an exception, in the place of a traceback on standard error."""
    name = args.thread.name if args.thread else "a thread"
    log.error(
        "%s has ended, and what it did is not done any more (%s: %s)", name, args.exc_type.__name__, args.exc_value
    )


def main(argv: list[str], detect: Callable[[], Platform] = Platform.detect) -> int:
    """Return the exit status: 0 after a run, 3 if it sent no probe, 2 for wrong usage, 1 for every other error."""
    open_standard_streams()
    threading.excepthook = log_thread_error
    ours = own_arguments(argv)
    debug = "-d" in ours or "--debug" in ours
    console = Console()
    status, stop = 0, Stop()
    try:
        config = parse_arguments(argv, versions)
        require_machine(config)
        file_log = set_up_logging(config, console)
        stop.watch()
        platform = detect()
        log.debug("%s", platform)
        run = ElfProbe(config, platform, stop, console if config.live else None, file_log)
        try:
            run.run()
        finally:
            stop.ends_output = True  # all is detached; a signal must not change the exit status
            console.flush()  # the table comes below the log
            unwritten = print_lines(run.output)
        status = run.status
        if unwritten or run.problem:
            raise Failure(run.problem or f"cannot write the results: {unwritten}")
    except Exception as err:
        if debug:
            console.say(traceback.format_exc().rstrip())
        message = str(err) if isinstance(err, Failure) else printable(str(err))
        hint = "" if debug or isinstance(err, Failure) else f" ({type(err).__name__}; -d shows where)"
        console.say(f"{as_called('elfprobe.py')}: {message}{hint}")
        status = err.status if isinstance(err, Failure) else 1
    stop.wait_for_command()
    console.flush()
    return status


if __name__ == "__main__":
    if bytecode:
        bytecode.keep()
    sys.exit(main(sys.argv[1:]))
