#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-only
"""Hop-by-hop latency inside an application's own flow.

$ sudo python3 elfprobe.py -i eno2 -a speedtest
14:02:11.396 of interest: speedtest (4127)
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
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import enum
import errno
import fcntl
import functools
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import secrets
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from typing import Any, Callable, Iterable, Iterator, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python3 -I leaves it out
    sys.dont_write_bytecode = True  # elf/__pycache__ would be root's, in the user's folder
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the packages are loaded

from elf.addresses import V4_MAPPED, ReverseDns, address_text, flow_text, pack_address
from elf.console import Console, LogFormat
from elf.extensions import MalformedExtension, extension_texts
from elf.findings import PathRewrites
from elf.rows import HEADER, row_function
from elf.summary import Summary
from elf.usage import Failure, Parser, not_empty, printable

MISSING: dict[str, str] = {}  # module -> Debian's name of the package that has it
try:
    import bcc
except ImportError:
    MISSING["bcc"] = "python3-bpfcc"
try:
    import pyroute2
except ImportError:
    MISSING["pyroute2"] = "python3-pyroute2"
try:
    import psutil
except ImportError:
    MISSING["psutil"] = "python3-psutil"

VERSION = "0.1.0"
HERE = os.path.dirname(os.path.realpath(__file__))
C_FILE = os.path.join(HERE, "elfprobe.c")
HOOKS_FILE = os.path.join(HERE, "elfhooks.c")

UNANSWERED_AFTER = 5.0  # s that a probe may be outstanding
ALIVE_FOR = 2.0  # s without a heartbeat after which the kernel makes no more probes
BEAT_EVERY = 0.5  # s
DRAIN_EVERY = 0.25  # s between two looks at the result ring, at most
BATCH = 4096  # entries of a hash that are read at once
STRAY_REPLIES = 0.5  # s to wait for replies after the last probe
LOOK_EVERY = 5.0  # s between two looks whether our programs are still attached
RESET_FOR = 10.0  # s after XDP was attached in which a lost carrier is the driver's doing
SCAN_EVERY = 1.0  # s between two looks at the processes
REMOVED_MAX = 1 << 16  # destinations no longer of interest that are remembered
LOCK_TRIES, LOCK_EVERY = 500, 0.01  # to lock the folder of the CSV; s between two
MAKE_UP_SHARE = 0.05  # of a processor, at most, to look for processes whose events were missed
FORKS_SAMPLED, FORKS_SAMPLED_MAX = 3, 30  # to find out where a task has its PID; so many may be missed
LINGER = 30.0  # s that a destination stays of interest after its last connection ended
DRAW_EVERY = 1.0  # s between two tables on a terminal
DESTINATIONS_MAX = 65536
FLOW_DESTINATIONS_MAX = 16384  # destinations of processes' flows
RING_HOLDS = 0.25  # s of results at the highest rate
RING_PAGE = os.sysconf("SC_PAGESIZE")
RING_PAGES_MIN = 64  # replies may come in bursts at any rate
RESULT_BYTES = 128  # of struct result in the ring, at most
RESULT_PERF_PAGES = 512  # of each CPU's perf buffer, where there is no ring

CLOCK_MONOTONIC_COARSE = 6  # linux/time.h
# linux/capability.h
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_SYS_PTRACE = 1, 2, 12, 19
CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 21, 38, 39
ARPHRD_ETHER, ARPHRD_TUNNEL, ARPHRD_LOOPBACK, ARPHRD_SIT = 1, 768, 772, 776  # linux/if_arp.h
# Links whose packets begin with IP; "none" are TUN, WireGuard and the like.
IP_LINKS = {
    512: "ppp", 519: "rawip", ARPHRD_TUNNEL: "ipip", 769: "ip6tnl", ARPHRD_SIT: "sit", 778: "gre",
    823: "ip6gre", 0xFFFE: "none",
}  # fmt: skip
# Tunnels -> what of -e there is in them; in the others there is anything.
CARRIED = {
    ARPHRD_TUNNEL: ("ipinip",), 769: (), ARPHRD_SIT: ("ipinip", "ip6inip"), 778: (), 823: (),
}  # fmt: skip
TUNNELS = {"ethernet": 0, "ipinip": 4, "ip6inip": 41}  # -e -> IP protocol that is wrapped in IPv4
IFF_UP, IFF_RUNNING = 1, 0x40  # linux/if.h
SIOCGIFFLAGS, SIOCETHTOOL = 0x8913, 0x8946  # linux/sockios.h
ETHTOOL_GDRVINFO = 3  # linux/ethtool.h
BPF_MAP_TYPE_RINGBUF = 27  # enum bpf_map_type, linux/bpf.h
BPF_CGROUP_INET_SOCK_CREATE, BPF_XDP = 2, 37  # enum bpf_attach_type, linux/bpf.h
BPF_TCX_INGRESS, BPF_TCX_EGRESS = 46, 47  # the same, since Linux 6.6
BTF_KIND_STRUCT = 4  # linux/btf.h
BPF_STATS_RUN_TIME = 0  # enum bpf_stats_type, linux/bpf.h
UNDECIDED, TARGET = 1, 2  # as in elfprobe.c
TASK_COMM_LEN = 16  # linux/sched.h: of a command name, the final zero included
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h: its inode number, always
# asm-generic/unistd.h: one number on all machines
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT, SYS_PIDFD_OPEN, SYS_PIDFD_GETFD = 430, 431, 432, 434, 438
FSCONFIG_CMD_CREATE = 6  # linux/mount.h
XDP_FLAGS_UPDATE_IF_NOEXIST = 1  # linux/if_link.h
XDP_FLAGS_SKB_MODE = 2
XDP_FLAGS_DRV_MODE = 4
IFLA_XDP_ATTACHED, IFLA_XDP_PROG_ID = 2, 4  # linux/if_link.h
# As the kernel, ip link and pyroute2 say, and as people do.
XDP_MODES = {1: "native", "xdp": "native", 2: "generic", "xdpgeneric": "generic"}
# Deletions as linux/rtnetlink.h and linux/netlink.h have them: pyroute2 before 0.6 adds a flag to
# its own that the kernel does not take.
RTM_DELQDISC, RTM_DELTFILTER, NLM_F_REQUEST, NLM_F_ACK = 37, 45, 1, 4
# TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS) and the same of egress, linux/pkt_sched.h
CLSACT_INGRESS, CLSACT_EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
ETH_P_ALL = 0x0003

# What runs a script named on its command line: name, without its version -> which options have code
# behind them in the place of a script, and which a word that is none.
SHELL = (r"-\w*c", ("-o", "-O", "+o", "+O", "--rcfile", "--init-file"))
NODE = (r"-pe?|-e|--eval|--print", ("-r", "--require", "--import", "--loader"))
INTERPRETERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "python": (r"-\w*c", ("-W", "-X")),
    "perl": (r"-\w*[eE]", ("-I",)),
    "ruby": (r"-\w*e", ("-I", "-r")),
    "node": NODE,
    "nodejs": NODE,
    "php": (r"-r", ("-c", "-d")),
    "lua": (r"-e", ("-l",)),
    "tclsh": (r"-", ("-encoding",)),
    "Rscript": (r"-e", ()),
    **dict.fromkeys(("sh", "bash", "dash", "zsh", "ksh"), SHELL),
}

# The counters of elfprobe.c that say why a probe was not made, or its reply not written -> in words.
LOSSES = {
    "results_lost": "replies came faster than they could be written",
    "send_failed": "dropped by another filter, the queue or the device",
    "clone_lost": "copies were lost: no memory, a filter before ours, or a kind of device that this kernel "
                  "does not send copies to",
    "build_failed": "copies could not be trimmed",
    "key_busy": "not to be told from a probe in flight",
    "in_flight_full": "no room to wait for more answers",
    "over_max_rate": "more than --max-rate",
}  # fmt: skip
# Those that say why a packet of interest carried none.
UNFIT = {
    "carrier_low_ttl": "TTL of 32 or less, as traceroute's",
    "carrier_unfit": "SYN, FIN, RST, fragments, other protocols",
    "carrier_resent": "retransmissions and keep-alives",
    "carrier_zerocopy": "sent with MSG_ZEROCOPY, of which the kernel would tell that it was copied",
    "hop_unresponsive": "the next hop stopped responding and is backing off",
    "flow_stalled": "nothing was acknowledged any more",
    "lease_expired": "elfprobe was stopped or starved",
    "hook_dropped": "the hook's verdict",
}

log = logging.getLogger("elfprobe")


def counted(words: dict[str, str], count: dict[str, int]) -> str:
    """Those counters, with the words for them, that are not 0."""
    return ", ".join(f"{name} {count[name]} ({words[name]})" for name in words if count[name])


# ---- Configuration ------------------------------------------------------------------------------


class Frame(enum.IntEnum):
    """What packets on a device begin with; as in elfprobe.c."""

    ETHERNET = 0
    IP = 1
    TUNNEL = 2  # IP, but receive programs may be shown the tunnel's headers in front


class ZeroCopy(NamedTuple):
    """Where the kernel marks a packet that holds memory of user space (MSG_ZEROCOPY).

    head and end are offsets in struct sk_buff. flags is the offset of a byte in struct skb_shared_info, flag
    the bit in that byte. All are 0 if the kernel does not tell them.
    """

    head: int = 0
    end: int = 0
    flags: int = 0
    flag: int = 0


@dataclasses.dataclass(frozen=True)
class Build:
    """The parameters of elfprobe.c that depend on the machine and the device, not on the command line."""

    frame: Frame = Frame.ETHERNET
    ingress_tc: bool = False  # elf_ingress runs at TC ingress, not at XDP
    tcx: bool = False  # TC programs are attached by tcx links
    by_owner: bool = False
    tick: int = 0  # ns; 0: programs cannot count ticks
    old_maps: bool = False
    preemptible: bool = False
    zerocopy: ZeroCopy = ZeroCopy()


@dataclasses.dataclass(frozen=True)
class Config:
    """The command line, checked as far as it can be without looking at the machine."""

    interface: str
    addresses: tuple[str, ...] = ()
    apps: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    encapsulation: str = "ethernet"
    ingress: str = "drop"
    ingress_hook: str = "auto"
    logfile: bool = False
    filebase: str = "elf"
    debug: bool = False
    probeint: int = 10  # ms
    rate_global: bool = False
    notrunc: bool = False
    hooks: str = HOOKS_FILE
    quiet: bool = False
    live: bool = True
    duration: float | None = None  # s
    max_rate: int = 50000  # probes per second
    salt: int = 0  # 16 bits that nobody else knows

    @property
    def by_process(self) -> bool:
        return bool(self.apps or self.pids)

    def build_flags(self, build: Build) -> dict[str, str]:
        """Return the -D flags of elfprobe.c."""
        waiting = self.max_rate * (UNANSWERED_AFTER + 1)
        pages = power_of_two(max(self.max_rate * RING_HOLDS * RESULT_BYTES / RING_PAGE, RING_PAGES_MIN))
        return {
            "FRAME": str(int(build.frame)),
            "TUNNEL": str(TUNNELS[self.encapsulation]),
            "NOTRUNC": str(int(self.notrunc)),
            "RATE_GLOBAL": str(int(self.rate_global)),
            "INTERVAL_NS": f"{self.probeint * 1000000}ULL",
            "MAX_RATE": f"{self.max_rate}ULL",
            "SALT": str(self.salt),
            "INGRESS_DROP": str(int(self.ingress == "drop")),
            "INGRESS_TC": str(int(build.ingress_tc)),
            "TCX": str(int(build.tcx)),
            "SKB_HEAD": str(build.zerocopy.head),
            "SKB_END": str(build.zerocopy.end),
            "ZEROCOPY_FLAGS": str(build.zerocopy.flags),
            "ZEROCOPY_FLAG": str(build.zerocopy.flag),
            "TICK_NS": f"{build.tick}ULL",
            "BY_OWNER": str(int(build.by_owner)),
            "BY_APP": str(int(build.by_owner and bool(self.apps))),
            "DESTINATIONS_MAX": str(DESTINATIONS_MAX),
            "FLOW_DESTINATIONS_MAX": str(FLOW_DESTINATIONS_MAX if build.by_owner else 1),
            "IN_FLIGHT_MAX": str(power_of_two(min(max(waiting, 1024), 1 << 18))),
            "OLD_MAPS": str(int(build.old_maps)),
            "PREEMPTIBLE": str(int(build.preemptible)),
            "RESULTS_PAGES": str(pages),
            "WAKE_EVERY": str(max(pages * RING_PAGE // RESULT_BYTES // 4 // (os.cpu_count() or 1), 1)),
        }


def power_of_two(least: float) -> int:
    """The first that is no less."""
    return 1 << (max(math.ceil(least), 1) - 1).bit_length()


EPILOG = """\
examples:
  elfprobe.py -i eno2 -a speedtest           the flows of every speedtest, started now or later
  elfprobe.py -i eno2 -P 4127 -r g -p 100    of one process and its children, 10 probes/s to a destination
  elfprobe.py -i eno2 example.net 192.0.2.7  whatever goes to these destinations
  elfprobe.py -i eno2 -I pass -T -l @hosts   destinations from a file, payload kept, elf.log too
  elfprobe.py -i eno2 -q -f /var/tmp/night --duration 28800 -a backup &
                                             all night, in the background (with nohup: after the logout, too)
  elfprobe.py -i wg0 10.8.0.1                inside a tunnel device, whose packets begin with IP
  elfplot.py --html elf.csv                  the summary again, and pictures

'ip route get ADDRESS' names the interface that leads to an address. While it runs, probes ride on
packets that the application sends: without traffic there are none. On a terminal a table is redrawn
each second.

what the summary shows, for each destination and hop (TTL, or hop limit):
  probes, answered   how many probes were sent with that TTL, and what share was answered
  min ... max        time to that router and back, ms; what a hop adds is the difference to the one before
  jitter             mean difference of one latency to the next, ms
  responder          who answered, with a share each where there are several
  TCP                round trip (srtt) as the kernel's TCP has it, and segments it sent again

files:
  FILEBASE.csv       a row for each probe: docs/columns.md explains the columns
  FILEBASE.log       the log (-l, -q)
  FILEBASE.MAP.json  each BPF map that the hooks file (-H) defines, after the run

exit status: 0 after a run, 2 for wrong usage, 1 for everything else, with a line that says what it is
"""


def whole_number(least: int, most: int, what: str) -> Callable[[str], int]:
    """An argparse type: a decimal number between two bounds, which the message names."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what}, {least} to {most}")
        return int(text)

    return parse


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return value


def rate_type(text: str) -> str:
    full = {"g": "global", "h": "perhop"}.get(text, text)
    if full not in ("global", "perhop"):
        raise argparse.ArgumentTypeError(f"'{text}' is none of g, global, h, perhop")
    return full


def package_version(name: str) -> str:
    from importlib import metadata  # takes long

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


class ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        found = {
            "BCC": getattr(sys.modules.get("bcc"), "__version__", "missing"),
            "pyroute2": package_version("pyroute2"),
            "psutil": getattr(sys.modules.get("psutil"), "__version__", "missing"),
        }
        parts = ", ".join(f"{name} {version}" for name, version in found.items())
        print(f"elfprobe {VERSION}: Linux {os.uname().release}, {parts}, Python {sys.version.split()[0]}")
        parser.exit()


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="elfprobe.py",
        usage="sudo python3 elfprobe.py -i INTERFACE [options] [address ...]",
        description="Shows hop by hop where the latency of a running application comes from, by lowering\n"
        "the TTL of copies of the application's own packets. At least one of -a, -P and an\n"
        "address is needed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("addresses", nargs="*", type=not_empty, metavar="address",
        help="destination of interest: a name (all its addresses), an IPv4 or IPv6 address, "
        "or @FILE with one of them per line (# begins a comment)")  # fmt: skip
    add("-i", "--interface", required=True, type=not_empty, help="the device to attach to")
    add("-a", "--app", action="append", default=[], type=not_empty,
        help="probe the flows of processes of this name, and of their children: the process's name, its "
        "executable's, or its script's; may be given again")  # fmt: skip
    add("-P", "--pid", action="append", default=[], type=whole_number(1, 2**22, "a process ID"),
        help="probe the flows of this process and its children; may be given again")  # fmt: skip
    add("-p", "--probeint", default=10, type=whole_number(0, 1000, "a whole number of milliseconds"),
        help="least interval between two probes, ms, 0 to 1000; 0: a probe for every packet "
        "that may carry one (default: 10)")  # fmt: skip
    add("-r", "--ratetype", default="perhop", type=rate_type, metavar="{g,global,h,perhop}",
        help="what -p spaces out: global, all probes to a destination; perhop, those to each "
        "hop of a destination (default: perhop)")  # fmt: skip
    add("-T", "--notrunc", action="store_true",
        help="probes keep the payload of the packet they were cloned from")  # fmt: skip
    add("-I", "--ingress", choices=("pass", "drop"), default="drop",
        help="what to do with the time exceeded that answers a probe, once it is recorded "
        "(default: drop); every other packet passes")  # fmt: skip
    add("--ingress-hook", choices=("auto", "xdp", "generic", "tc"), default="auto",
        help="where answers are read: native XDP, generic XDP, or TC ingress; auto: native XDP where that "
        "costs the application nothing that is known, otherwise TC ingress (default: auto)")  # fmt: skip
    add("-e", "--encapsulation", choices=("ethernet", "ipinip", "ip6inip"), default="ethernet",
        help="what the flows are wrapped in: ethernet, nothing but the device's own header; ipinip, IPv4 in "
        "IPv4; ip6inip, IPv6 in IPv4 (default: ethernet)")  # fmt: skip
    add("-f", "--filebase", default="elf", type=not_empty,
        help="base name of FILEBASE.csv and FILEBASE.log (default: elf)")  # fmt: skip
    add("-l", "--logfile", action="store_true", help="also log to FILEBASE.log")
    add("-q", "--quiet", action="store_true", help="no log on the console (implies -l)")
    add("-d", "--debug", action="store_true",
        help="more log: the BPF counters, the CPU time that the programs take")  # fmt: skip
    add("-H", "--hooks", default=HOOKS_FILE, metavar="FILE",
        help="hooks file to compile in (default: elfhooks.c beside elfprobe.py)")  # fmt: skip
    add("--duration", type=positive_seconds, metavar="SECONDS",
        help="stop after so long (default: on a signal)")  # fmt: skip
    probes = "a whole number of probes per second"
    add("--max-rate", default=50000, metavar="N", type=whole_number(1, 10**6, probes),
        help="most probes per second over all destinations together (default: 50000)")  # fmt: skip
    add("--no-live", action="store_true",
        help="no table on the terminal while it runs, only log lines")  # fmt: skip
    add("--version", nargs=0, action=ShowVersion, help="version, and what it runs on")
    return parser


def parse_arguments(argv: list[str]) -> Config:
    """Raises Failure (status 2) for what cannot be meant."""
    args = argument_parser().parse_intermixed_args(argv)
    if not (args.addresses or args.app or args.pid):
        raise Failure("nothing to probe: give an address, -a APP or -P PID", 2)
    return Config(
        interface=args.interface,
        addresses=tuple(args.addresses),
        apps=tuple(args.app),
        pids=tuple(args.pid),
        encapsulation=args.encapsulation,
        ingress=args.ingress,
        ingress_hook=args.ingress_hook,
        logfile=args.logfile or args.quiet,
        filebase=args.filebase,
        debug=args.debug,
        probeint=args.probeint,
        rate_global=args.ratetype == "global",
        notrunc=args.notrunc,
        hooks=args.hooks,
        quiet=args.quiet,
        live=not (args.quiet or args.no_live),
        duration=args.duration,
        max_rate=args.max_rate,
        salt=secrets.randbits(16),
    )


# ---- Addresses --------------------------------------------------------------------------------------


def why_unreachable(packed: bytes) -> str:
    """Why no router will ever answer for this destination, or nothing. Private ones may do."""
    address = ipaddress.ip_address(address_text(packed))
    if address.is_multicast or packed.startswith(V4_MAPPED) and packed[12] >= 240:
        return "no router answers for what goes to many, or to addresses that are reserved"
    if address.is_loopback or address.is_unspecified:
        return f"{address} never leaves this host"
    return ""


def resolve(name: str) -> set[bytes]:
    """All addresses of a name, or the one that it spells. Raises Failure."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a host name"
        raise Failure(f"address '{name}': neither an address nor a name that resolves ({reason})") from err
    return {pack_address(str(sockaddr[0])) for *_, sockaddr in found}


def read_address_file(path: str) -> list[tuple[str, str]]:
    """Names and where they stand, from the lines of an @FILE; empty ones and what follows a # are left
    out. Raises Failure."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.split("#")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a text file"
        raise Failure(f"address file '{path}': {reason}") from err
    if not any(lines):
        raise Failure(f"address file '{path}': no address in it")
    return [(line, f" (line {number} of {path})") for number, line in enumerate(lines, 1) if line]


def resolve_all(arguments: Iterable[str]) -> dict[bytes, str]:
    """Packed addresses -> what the user called them, for all address arguments. Raises Failure."""
    found: dict[bytes, str] = {}
    for argument in arguments:
        for name, place in read_address_file(argument[1:]) if argument.startswith("@") else [(argument, "")]:
            try:
                resolved = resolve(name)
            except Failure as failure:
                raise Failure(f"{failure}{place}") from failure
            for packed in resolved:
                reason = why_unreachable(packed)
                if reason:
                    raise Failure(f"address '{name}': {reason}{place}")
                found.setdefault(packed, name)
    if len(found) > DESTINATIONS_MAX:
        raise Failure(f"addresses: {len(found)} destinations, at most {DESTINATIONS_MAX} are possible")
    return found


# ---- Targets: what is of interest -----------------------------------------------------------------


class Process(NamedTuple):
    """What the choice of processes goes by."""

    pid: int
    ppid: int
    name: str
    exe: str
    cmdline: tuple[str, ...]
    started: int = 0  # ticks after the machine's start: tells it from others that have had its PID


def process_names(process: Process) -> set[str]:
    """All names that -a may call a process by, in lower case: the process's own, its executable's,
    and those of the script or module that an interpreter runs, with and without extension."""
    program = os.path.basename(process.exe or (process.cmdline[0] if process.cmdline else ""))
    names = {process.name, program}
    if is_interpreter(program):
        script = os.path.basename(script_of(program, process.cmdline))
        names |= {script, os.path.splitext(script)[0]}
    return {name.lower() for name in names if name}


def is_interpreter(program: str) -> bool:
    return program.rstrip("0123456789.") in INTERPRETERS


def script_of(program: str, cmdline: tuple[str, ...]) -> str:
    """The script or module that an interpreter's command line names, empty where it names none."""
    options_with_code, options_with_value = INTERPRETERS[program.rstrip("0123456789.")]
    words = iter(cmdline[1:])
    for word in words:
        if not word.startswith(("-", "+")):
            return word
        if re.fullmatch(options_with_code, word):
            return ""
        if word in options_with_value:
            next(words, "")
    return ""


def choose_processes(processes: Iterable[Process], apps: Iterable[str], pids: Iterable[int]) -> dict[int, str]:
    """PID -> process name of those of interest: named by -a or -P, and their descendants."""
    wanted = {app.lower() for app in apps}
    known = {process.pid: process for process in processes}
    children: dict[int, list[int]] = {}
    for process in known.values():
        children.setdefault(process.ppid, []).append(process.pid)
    todo = [pid for pid in pids if pid in known]
    todo += [process.pid for process in known.values() if wanted & process_names(process)]
    chosen: dict[int, str] = {}
    while todo:
        pid = todo.pop()
        if pid not in chosen:
            chosen[pid] = known[pid].name
            todo += children.get(pid, [])
    return chosen


def look_at_process(pid: int) -> Process:
    """Straight from /proc, as many may be started each second, and psutil remembers what a process was
    before it was another program. Raises OSError when it has ended."""
    with open(f"/proc/{pid}/comm", "rb") as file:
        name = os.fsdecode(file.read().rstrip(b"\n"))
    try:
        exe = re.sub(r" \(deleted\)$", "", os.readlink(f"/proc/{pid}/exe"))  # there may be a newer one
    except OSError:  # a kernel thread, a zombie, or somebody else's
        exe = ""
    words: tuple[str, ...] = ()
    if not exe or len(name) >= TASK_COMM_LEN - 1 or is_interpreter(os.path.basename(exe)):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = tuple(os.fsdecode(word) for word in file.read().split(b"\0")[:-1])
        full = os.path.basename(words[0]) if words else ""
        if len(name) == TASK_COMM_LEN - 1 and full.startswith(name):
            name = full
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()  # the third and those behind it, see proc(5)
    return Process(pid, int(fields[1]), name, exe, words, int(fields[19]))


def running_processes() -> Iterator[Process]:
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            yield look_at_process(pid)


def connected_addresses(chosen: dict[int, str]) -> dict[bytes, str]:
    """Remote addresses of the processes' sockets in this network namespace -> whose they are."""
    found: dict[bytes, str] = {}
    for connection in psutil.net_connections("inet"):
        if connection.pid in chosen and connection.raddr:
            packed = pack_address(connection.raddr.ip)
            if not why_unreachable(packed):
                found[packed] = f"{chosen[connection.pid]} {connection.pid}"
    return found


def filter_slot(packed: bytes) -> int:
    """Return the slot of an address in the address filter: filter_slot() of elfprobe.c."""
    first, second, third, fourth = struct.unpack("=4I", packed)
    number: int = (first ^ second ^ third ^ fourth) * 0x9E3779B1 & 0xFFFFFFFF
    return number >> 12


class Destinations:
    """The kernel's table of target destinations, and the address filter in front of it."""

    IN_PATHS = 1  # as in elfprobe.c

    def __init__(self, bpf: Any) -> None:
        self._paths = bpf["paths"]
        self._filter = bpf["address_filter"]
        self._line_size = ctypes.sizeof(self._filter.Leaf)
        self._lines: dict[int, Any] = {}  # lines of the filter that are not empty
        self._removed: dict[bytes, tuple[int, int]] = {}  # what holds for the whole run: seq, excluded
        self._full = False

    def add(self, packed: bytes, path: Any = None) -> bool:
        """Makes an address one of interest, with nothing known of the way there or this struct path.
        False where there is no room; the first time that is logged."""
        if path is None:
            seq, excluded = self._removed.get(packed, (0, 0))
            path = self._paths.Leaf(excluded=excluded)
            path.pacing.seq = seq
        try:
            self._paths[self._paths.Key.from_buffer_copy(packed)] = path
        except Exception as err:  # BCC raises a bare Exception where the table is full
            if not self._full:
                log.warning("no room for more destinations (%s): %s is left out", err, address_text(packed))
            self._full = True
            return False
        self._removed.pop(packed, None)
        number, place = divmod(filter_slot(packed), self._line_size)
        line = self._lines.get(number) or self._lines.setdefault(number, self._filter.Leaf())
        if not line.slots[place]:
            line.slots[place] = self.IN_PATHS
            self._filter[self._filter.Key(number)] = line
        return True

    def remove(self, packed: bytes) -> None:
        key = self._paths.Key.from_buffer_copy(packed)
        with contextlib.suppress(KeyError):
            path = self._paths[key]
            self._removed[packed] = path.pacing.seq, path.excluded
            if len(self._removed) > REMOVED_MAX:
                del self._removed[next(iter(self._removed))]
            del self._paths[key]
        self._full = False


class ConnectionTables:
    """Flows by process where the kernel cannot tell whose a packet is: looks at the processes'
    connections again and again, and makes destinations of their remote addresses. Misses what is
    shorter than its intervals, and probes what other processes send to the same addresses."""

    def __init__(
        self, destinations: Destinations, fixed: Iterable[bytes], apps: Iterable[str], pids: Iterable[int]
    ) -> None:
        self._destinations = destinations
        self._fixed = frozenset(fixed)
        self._apps = tuple(apps)
        self._pids = tuple(pids)
        self._chosen: set[tuple[int, int]] | None = None  # PID and start, at the last look
        self._last_seen: dict[bytes, float] = {}

    def scan(self) -> None:
        """One look at the processes' connections."""
        now = time.monotonic()
        running = list(running_processes())
        known: Iterable[int] = self._pids
        if self._chosen is not None:  # nobody else who has a PID by now, but whose parent has ended
            known = [process.pid for process in running if (process.pid, process.started) in self._chosen]
        chosen = choose_processes(running, self._apps, known)
        self._chosen = {(process.pid, process.started) for process in running if process.pid in chosen}
        current = connected_addresses(chosen)
        for packed, owner in current.items():
            if packed in self._fixed:
                continue
            if packed not in self._last_seen:
                if not self._destinations.add(packed):
                    continue
                log.info("of interest: %s (%s)", address_text(packed), owner)
            self._last_seen[packed] = now
        for packed in [packed for packed, seen in self._last_seen.items() if now - seen > LINGER]:
            del self._last_seen[packed]
            self._destinations.remove(packed)
            log.info("no longer of interest: %s", address_text(packed))

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Scans now, then again and again in a thread of its own, so that no row waits for it."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(SCAN_EVERY):
                try:
                    self.scan()
                except (psutil.Error, OSError) as err:
                    log.warning("could not look at the processes: %s", err)

        self.scan()
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class Unsupported(Exception):
    """What this machine lacks for one of several ways; another one is taken then."""


def comm_bytes(name: str) -> bytes:
    """A command name as the kernel has it: cut, and filled up with zeros."""
    return os.fsencode(name)[: TASK_COMM_LEN - 1].ljust(TASK_COMM_LEN, b"\0")


def system_call(number: int, *args: Any) -> int:
    """Raises OSError."""
    result: int = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def open_cgroup_root() -> int:
    """A descriptor of the topmost cgroup (version 2) that can be seen from here, mounted or not: a new
    network namespace comes with a new /sys, without the mount. Raises OSError."""
    mounts: dict[bytes, bytes] = {}  # what is mounted, seen from our cgroup namespace's root -> where
    with open("/proc/self/mountinfo", "rb") as file:
        for fields in (line.split(b" ") for line in file):
            if fields[fields.index(b"-") + 1] == b"cgroup2" and re.fullmatch(rb"/|(/\.\.)+", fields[3]):
                mounts[fields[3]] = fields[4]
    if mounts:
        top = mounts[max(mounts, key=len)]
        path = re.sub(rb"\\([0-7]{3})", lambda escape: bytes([int(escape[1], 8)]), top)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    context = system_call(SYS_FSOPEN, b"cgroup2", 0)
    try:
        system_call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = system_call(SYS_FSMOUNT, context, 0, 0)
    finally:
        os.close(context)
    try:
        return os.open(f"/proc/self/fd/{mount}", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(mount)


def duplicated_sockets(pid: int) -> Iterator[socket.socket]:
    """The IPv4 and IPv6 sockets of another process, each closed when the next is asked for.
    Raises OSError where the process has ended."""
    pidfd = system_call(SYS_PIDFD_OPEN, pid, 0)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
                duplicate = system_call(SYS_PIDFD_GETFD, pidfd, int(name), 0)
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


def read_counters(bpf: Any) -> dict[str, int]:
    """Those of elfprobe.c, over all CPUs."""
    per_cpu = bpf["counters"][0]
    return {name: sum(getattr(cpu, name) for cpu in per_cpu) for name, *_ in per_cpu[0]._fields_}


class SocketOwners:
    """Flows by process, exactly and from the first packet: each socket is noted in the kernel with
    the process that makes it, processes of interest are known there from their exec or fork on, and
    what only this side can see of a process, its executable and its script, is added as it starts."""

    AT_TRACEPOINTS = {
        b"elf_exit": "sched_process_exit",
        b"elf_fork": "sched_wakeup_new",
        b"elf_exec": "sched_process_exec",
    }

    def __init__(self, bpf: Any, apps: Iterable[str], pids: Iterable[int]) -> None:
        self._bpf = bpf
        self._apps = frozenset(app.lower() for app in apps)
        self._pids = tuple(pids)
        self._processes = bpf["processes"]
        self._owner = struct_type(bpf, "owner")
        self._sockets = bcc.lib.bpf_table_fd(bpf.module, b"sockets")
        self._layout = struct_type(bpf, "process_event")
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # IDs and PIDs of processes adopted since the last look, and before it.
        self._adopted: list[tuple[int, int]] = []
        self._adopted_before: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Raises Unsupported. Events are heard while somebody polls the BPF object's ring buffers."""
        if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
            raise Unsupported("the PIDs that the kernel itself uses (this is a PID namespace of its own)")
        with contextlib.ExitStack() as stack:
            self._enter_names()
            hear(self._bpf, "process_events", self._hear)
            self._attach_tracepoints(stack)
            self._find_task_pid_offset()
            self._attach_to_cgroup(stack)
            self._adopt_running()
            thread = threading.Thread(target=self._decide_on_events, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(self._events.put, None)
            yield

    def _enter_names(self) -> None:
        table = self._bpf["apps"]
        for app in self._apps:
            exact = len(os.fsencode(app)) < TASK_COMM_LEN - 1
            table[table.Key.from_buffer_copy(comm_bytes(app))] = table.Leaf(exact)

    def _attach_tracepoints(self, stack: contextlib.ExitStack) -> None:
        for program, tracepoint in self.AT_TRACEPOINTS.items():
            try:
                self._bpf.attach_raw_tracepoint(tp=tracepoint, fn_name=program)
            except Exception as err:  # BCC raises a bare Exception
                raise Unsupported(f"the raw tracepoint {tracepoint}") from err
            stack.callback(self._bpf.detach_raw_tracepoint, tp=tracepoint)

    def _find_task_pid_offset(self) -> None:
        """Where struct task_struct has its pid, tgid behind it. No header and no type information
        is needed to find out: in copies of a few children's it is where their PIDs stand."""
        samples = self._bpf["task_sample"]
        offset = self._bpf["task_pid_offset"]
        possible: set[int] = set()
        taken = 0
        for _ in range(FORKS_SAMPLED_MAX):
            samples[samples.Key(0)] = samples.Leaf(parent=os.getpid())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads: the child does nothing that could meet a lock
                child = os.fork()
            if child == 0:
                os._exit(0)
            with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored; it has ended all the same
                os.waitpid(child, 0)
            sample = bytes(samples[samples.Key(0)].task)
            if not any(sample):
                continue  # elf_fork was not run: see _missed()
            twice = struct.pack("=II", child, child)
            found = {at for at in range(0, len(sample) - 4, 4) if sample.startswith(twice, at)}
            possible = found & possible if taken else found
            taken += 1
            if taken == FORKS_SAMPLED:
                break
        samples[samples.Key(0)] = samples.Leaf(parent=0)
        if len(possible) != 1:
            raise Unsupported("the place of the PID in struct task_struct")
        offset[offset.Key(0)] = offset.Leaf(possible.pop())

    def _attach_to_cgroup(self, stack: contextlib.ExitStack) -> None:
        """By a BPF link: it ends with this process, however that ends."""
        try:
            cgroup = open_cgroup_root()
        except OSError as err:
            raise Unsupported(f"cgroup version 2 ({err.strerror})") from err
        stack.callback(os.close, cgroup)
        if not self._covers_all(cgroup):
            raise Unsupported("a cgroup that all processes here belong to")
        program = self._bpf.funcs[b"elf_sock_create"].fd
        try:
            stack.callback(os.close, create_link(program, cgroup, BPF_CGROUP_INET_SOCK_CREATE))
        except OSError as err:
            raise Unsupported(f"a BPF link to the cgroup ({err.strerror})") from err

    @staticmethod
    def _covers_all(cgroup: int) -> bool:
        """Whether every process that can be seen belongs to it. One that is not the root, which has no
        events of its own, is that of a container, or of a service with a cgroup namespace."""
        try:
            os.close(os.open("cgroup.events", os.O_RDONLY, dir_fd=cgroup))
        except FileNotFoundError:
            return True
        for pid in psutil.pids():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", "rb") as file:
                if any(line.startswith(b"0::/..") for line in file):
                    return False
        return True

    def _adopt_running(self) -> None:
        """Enters the processes of interest that are there already, and those that they forked before they
        were entered. elf_fork enters the others, whose sockets their parents may have closed by now."""
        adopted: set[int] = set()
        while True:
            chosen = choose_processes(running_processes(), self._apps, self._pids)
            missing = chosen.keys() - self._known()
            if not missing:
                break
            for pid in missing:
                self._adopt(pid, time.monotonic_ns(), chosen[pid])
            adopted |= missing
        for pid in chosen.keys() - adopted:
            entry = self._processes.get(self._processes.Key(pid))
            if entry is not None:
                self._tag_sockets(pid, entry)

    def _known(self) -> set[int]:
        """PIDs of the processes that the kernel knows to be of interest."""
        return {
            self._processes.Key.from_buffer_copy(key).value
            for key, value in entries(self._processes)
            if self._processes.Leaf.from_buffer_copy(value).status == TARGET
        }

    def _missed(self) -> int:
        """How often the kernel has not run our programs at tracepoints, since another run of the same was
        preempted on that CPU (seen on Linux 7.2 with execs and exits; up to 6.18 none is preempted), or
        what they told had no room."""
        not_run = sum(program_info(self._bpf.funcs[name].fd).recursion_misses for name in self.AT_TRACEPOINTS)
        return int(not_run + read_counters(self._bpf)["events_lost"])

    def _make_up(self) -> float:
        """For execs, forks and exits that were missed. Gives the time from which on it may be done again:
        to look takes each time what it takes for all processes, to adopt one is done once."""
        begun = time.thread_time()
        for key, value in list(entries(self._processes)):
            pid = self._processes.Key.from_buffer_copy(key).value
            if not os.path.exists(f"/proc/{pid}"):
                self._forget(self._processes.Leaf.from_buffer_copy(value).id, pid)
        known = self._known()  # no PID of -P that another process may have by now
        chosen = choose_processes(running_processes(), self._apps, known)
        again = time.monotonic() + (time.thread_time() - begun) / MAKE_UP_SHARE
        for pid in chosen.keys() - known:
            self._adopt(pid, time.monotonic_ns(), chosen[pid])
        return again

    def _adopt(self, pid: int, process_id: int, name: str) -> None:
        """From now on the process is of interest, with the sockets that it has."""
        entry = self._processes.Leaf(id=process_id, status=TARGET)
        entry.app.text = comm_bytes(name)
        self._processes[self._processes.Key(pid)] = entry
        if self._tag_sockets(pid, entry):
            self._adopted.append((process_id, pid))
        log.info("of interest: %s (%d)", name, pid)

    def _look_again(self) -> None:
        """At each process once more, a second or more after it was adopted: a socket may have been in the
        making, past the program that notes it and without a descriptor yet."""
        due, self._adopted_before, self._adopted = self._adopted_before, self._adopted, []
        for process_id, pid in due:
            entry = self._entry(process_id, pid)
            if entry:
                self._tag_sockets(pid, entry)

    def _tag_sockets(self, pid: int, process: Any) -> bool:
        """Notes this process as owner of its sockets, but for those that one of interest has already.
        False where they cannot be had, or the process has ended."""
        owner = self._owner(process=process.id, status=process.status, pid=pid)
        owner.app.text = process.app.text
        known = self._owner()
        try:
            for found in duplicated_sockets(pid):
                key = ctypes.c_int(found.fileno())
                tagged = bcc.lib.bpf_lookup_elem(self._sockets, ctypes.byref(key), ctypes.byref(known)) == 0
                if not (tagged and known.status == TARGET):
                    bcc.lib.bpf_update_elem(self._sockets, ctypes.byref(key), ctypes.byref(owner), 0)
        except OSError as err:
            if err.errno not in (errno.ESRCH, errno.ENOENT):
                log.warning("sockets that %d has open already are not probed: %s", pid, err.strerror)
            return False
        return True

    def _hear(self, _context: Any, data: int, size: int) -> int:
        self._events.put(self._layout.from_buffer_copy(ctypes.string_at(data, size)))
        return 0

    def _decide_on_events(self) -> None:
        ending: set[tuple[int, int]] = set()  # IDs and PIDs of processes whose first thread has ended
        next_look, next_make_up = time.monotonic() + SCAN_EVERY, 0.0
        made_up = 0  # misses
        while True:
            event = None
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=SCAN_EVERY)
                if event is None:
                    return
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + SCAN_EVERY
                self._look_again()
                missed = self._missed()
                if missed != made_up and time.monotonic() >= next_make_up:
                    made_up = missed
                    next_make_up = self._make_up()
                for process_id, pid in list(ending):
                    if not os.path.exists(f"/proc/{pid}") or not self._entry(process_id, pid):
                        ending.remove((process_id, pid))
                        self._forget(process_id, pid)
            if event and event.status:
                self._decide(event.id, event.pid, event.status)
            elif event:
                ending.add((event.id, event.pid))

    def _decide(self, process_id: int, pid: int, interest: int) -> None:
        try:
            process = look_at_process(pid)
        except OSError:  # it has ended
            self._forget(process_id, pid)
            return
        entry = self._processes.get(self._processes.Key(pid))
        if entry is not None and entry.id != process_id:  # it has ended, or is another program by now
            return
        if entry is None:  # taken away with that of the program before, or this is another process
            interest = UNDECIDED
        parent = self._processes.get(self._processes.Key(process.ppid))
        inherits = parent is not None and parent.status == TARGET  # it was found so after the fork
        if interest == TARGET or inherits or self._apps & process_names(process):
            self._adopt(pid, process_id, process.name)
        else:
            self._forget(process_id, pid)

    def _entry(self, process_id: int, pid: int) -> Any:
        """A process's entry, None where it has none."""
        entry = self._processes.get(self._processes.Key(pid))
        return entry if entry is not None and entry.id == process_id else None

    def _forget(self, process_id: int, pid: int) -> None:
        if self._entry(process_id, pid):
            with contextlib.suppress(KeyError):
                del self._processes[self._processes.Key(pid)]


# ---- The program: text, compilation, loading --------------------------------------------------------

HOOKS = {
    **{
        f"elf_v{version}_{protocol}_beforesend": "static inline int %s(struct __sk_buff *ctx) { return 0; }"
        for version in (4, 6)
        for protocol in ("icmp", "tcp", "udp")
    },
    **{f"elf_v{version}_afterrecv": "static inline void %s(struct xdp_md *ctx) { }" for version in (4, 6)},
}

# The few headers that BCC's own prelude includes; elfprobe.c itself includes none.
KERNEL_TYPES = """\
typedef signed char __s8; typedef unsigned char __u8; typedef short __s16; typedef unsigned short __u16;
typedef int __s32; typedef unsigned int __u32; typedef long long __s64; typedef unsigned long long __u64;
typedef __s8 s8; typedef __u8 u8; typedef __s16 s16; typedef __u16 u16;
typedef __s32 s32; typedef __u32 u32; typedef __s64 s64; typedef __u64 u64;
typedef __u16 __be16; typedef __u32 __be32; typedef __u64 __be64; typedef __u16 __sum16; typedef __u32 __wsum;
typedef __u64 __aligned_u64 __attribute__((aligned(8)));
typedef _Bool bool; typedef unsigned long size_t; typedef unsigned long uintptr_t;
"""


@contextlib.contextmanager
def kernel_headers() -> Iterator[None]:
    """Points BCC to a folder with the little that it needs of the kernel's headers, so that none
    need be installed. One that the user has named in BCC_KERNEL_SOURCE is left alone."""
    if "BCC_KERNEL_SOURCE" in os.environ:
        yield
        return
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", os.uname().release)
    version = ",".join(part or "0" for part in match.groups()) if match else "0,0,0"
    files = {
        "linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
        "linux/types.h": KERNEL_TYPES,
        "linux/version.h": "#define KERNEL_VERSION(a, b, c) "
        "(((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))\n"
        f"#define LINUX_VERSION_CODE KERNEL_VERSION({version})\n",
        "asm/page.h": f"#define PAGE_SIZE {os.sysconf('SC_PAGESIZE')}\n",
        "linux/bpf_common.h": "",
        "linux/log2.h": "",
        "uapi/linux/bpf.h": "",
        "uapi/linux/if_packet.h": "",
    }
    with tempfile.TemporaryDirectory(prefix="elfprobe-") as folder:
        for name, text in files.items():
            path = os.path.join(folder, "include", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
        os.environ["BCC_KERNEL_SOURCE"] = folder
        try:
            yield
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]


@contextlib.contextmanager
def captured_stderr(captured: list[str]) -> Iterator[None]:
    """Appends what C libraries write to file descriptor 2 meanwhile."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            captured.append(file.read().decode(errors="replace"))


def read_source(path: str, what: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "not a text file"
        raise Failure(f"{what} '{path}': {reason}") from err


def program_text(hooks_file: str) -> str:
    """elfprobe.c with the hooks file in the place of its #include, since BCC knows map methods only
    in the main buffer. Compiler messages name the right file and line. A hook that the hooks file
    does not define does nothing. Raises Failure."""
    program = read_source(C_FILE, "program")
    hooks = read_source(hooks_file, "argument -H/--hooks:")
    code = re.sub(r"/\*.*?\*/|//[^\n]*", " ", hooks, flags=re.DOTALL)
    absent = "\n".join(text % name for name, text in HOOKS.items() if not re.search(rf"\b{name}\b", code))
    before, after = program.split('#include "elfhooks.c"\n')
    pieces = (
        (f'#line 1 "{C_FILE}"', before),
        (f'#line 1 "{hooks_file}"', hooks),
        ('#line 1 "absent hooks"', absent),
        (f'#line {before.count(chr(10)) + 2} "{C_FILE}"', after),
    )
    return "\n".join(line for piece in pieces for line in piece)


@functools.lru_cache(maxsize=None)
def has_ring_buffer() -> bool:
    """Whether BCC (0.16) and the kernel (Linux 5.8) have it. Those without have no socket storage where it
    is needed, either."""
    if not hasattr(bcc.BPF, "ring_buffer_poll"):
        return False
    fd = bcc.lib.bcc_create_map(BPF_MAP_TYPE_RINGBUF, b"elfprobe", 0, 0, RING_PAGE, 0)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def is_preemptible() -> bool:
    """Whether a program's run may be interrupted by another on its CPU: with PREEMPT_RT, as from Linux 6.18
    on softirqs being off takes no lock (CONFIG_PREEMPT_RT_NEEDS_BH_LOCK). Before, it is taken to be."""
    return "PREEMPT_RT" in os.uname().version


def hear(bpf: Any, name: str, callback: Callable[[Any, int, int], Any], pages: int = 64) -> None:
    """Has the callback called for each event in a ring buffer or, of so many pages for each CPU, a perf
    buffer, whose events may be longer than they are in the C program by some bytes of padding."""
    if has_ring_buffer():
        bpf[name].open_ring_buffer(callback)
    else:
        bpf[name].open_perf_buffer(callback, page_cnt=pages)


def take_events(bpf: Any) -> None:
    """Calls back for all events that are there."""
    if has_ring_buffer():
        bpf.ring_buffer_consume()
    else:
        bpf.perf_buffer_poll(0)


def wait_for_events(bpf: Any, seconds: float) -> None:
    """Waits so long, or until events come that want to be heard; calls back for some of them."""
    if has_ring_buffer():
        bpf.ring_buffer_poll(int(1000 * seconds))
    else:
        bpf.perf_buffer_poll(int(1000 * seconds))


def linux_version() -> tuple[int, int]:
    """Return the first two numbers of the kernel's version."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def may_have_tcx() -> bool:
    """Return whether the kernel is new enough for tcx links; whether it has them, only attaching tells."""
    return linux_version() >= (6, 6)


@functools.lru_cache(maxsize=None)
def find_zerocopy() -> ZeroCopy:
    """Return what the kernel's BTF says: zeros if there is no BTF, or BCC's libbpf cannot read it."""
    with contextlib.suppress(AttributeError, LookupError):
        lib = bcc.lib
        load = getattr(lib, "btf__load_vmlinux_btf", None) or lib.libbpf_find_kernel_btf  # libbpf before 0.5
        load.restype = ctypes.c_void_p
        btf = load()
        if not btf or btf >= (1 << 64) - 4096:  # an error number, before libbpf 1.0
            return ZeroCopy()
        try:
            skb = struct_offsets(btf, b"sk_buff")
            shared = struct_offsets(btf, b"skb_shared_info")
        finally:
            lib.btf__free(ctypes.c_void_p(btf))
        if b"flags" in shared:  # SKBFL_ZEROCOPY_ENABLE, since Linux 5.12
            return ZeroCopy(skb[b"head"], skb[b"end"], shared[b"flags"], 1)
        return ZeroCopy(skb[b"head"], skb[b"end"], shared[b"tx_flags"], 8)  # SKBTX_DEV_ZEROCOPY
    return ZeroCopy()


class BtfType(ctypes.Structure):
    """struct btf_type, linux/btf.h."""

    _fields_ = [("name_off", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32)]


class BtfMember(ctypes.Structure):
    """struct btf_member, linux/btf.h."""

    _fields_ = [("name_off", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32)]


def struct_offsets(btf: int, name: bytes) -> dict[bytes, int]:
    """Return the byte offsets of a kernel struct's own members, by name. Raises LookupError."""
    lib, handle = bcc.lib, ctypes.c_void_p(btf)
    lib.btf__type_by_id.restype = ctypes.c_void_p
    lib.btf__name_by_offset.restype = ctypes.c_char_p
    found = lib.btf__find_by_name_kind(handle, name, BTF_KIND_STRUCT)
    if found < 0:
        raise LookupError(name)
    address = lib.btf__type_by_id(handle, found)
    kind = BtfType.from_address(address)
    members = (BtfMember * (kind.info & 0xFFFF)).from_address(address + ctypes.sizeof(BtfType))
    bits = 0xFFFFFF if kind.info >> 31 else 0xFFFFFFFF  # with bit fields, their size is in the highest byte
    name_of = lib.btf__name_by_offset
    return {name_of(handle, member.name_off): (member.offset & bits) // 8 for member in members}


def load_program(config: Config, build: Build, warnings: bool = False) -> Any:
    """Compile and load elfprobe.c; return BCC's object, its programs in .funcs. Raises Failure."""
    text = program_text(config.hooks)
    flags = [f"-D{name}={value}" for name, value in config.build_flags(build).items()]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"] if warnings else ["-w"]
    messages: list[str] = []
    try:
        with kernel_headers(), captured_stderr(messages):
            bpf = bcc.BPF(text=text, cflags=flags)
    except OSError as err:
        raise Failure(f"no temporary file can be written: {err.strerror}") from err
    except Exception as err:  # BCC raises a bare Exception
        said = messages[-1].strip()
        if re.search(r":\d+:\d+: (fatal )?error: ", said):
            message = f"elfprobe.c with hooks '{config.hooks}' does not compile"
            raise Failure(message, detail=said) from err
        raise Failure(f"the kernel (Linux {os.uname().release}) makes no BPF map: {said}") from err
    for line in messages[-1].strip().splitlines():
        log.warning("compiler: %s", line)
    sched_cls, tracepoint = (bcc.BPF.SCHED_CLS,), (bcc.BPF.RAW_TRACEPOINT,)
    kinds: dict[str, tuple[Any, ...]] = {"elf_egress": sched_cls, "elf_probe": sched_cls}
    kinds["elf_ingress"] = sched_cls if build.ingress_tc else (bcc.BPF.XDP,)
    if build.by_owner:
        # Without an attach type, which older BCC cannot pass on, the kernel takes it for sock_create's.
        kinds["elf_sock_create"] = (bcc.BPF.CGROUP_SOCK,)
        kinds.update({name.decode(): tracepoint for name in SocketOwners.AT_TRACEPOINTS})
    for name, kind in kinds.items():
        try:
            with captured_stderr(messages):
                bpf.load_func(name, *kind)
        except Exception as err:
            if build.tick and "#118" in messages[-1]:  # bpf_jiffies64()
                unload(bpf)
                return load_program(config, dataclasses.replace(build, tick=0), warnings)
            if build.zerocopy.head and "#113" in messages[-1]:  # bpf_probe_read_kernel()
                unload(bpf)
                return load_program(config, dataclasses.replace(build, zerocopy=ZeroCopy()), warnings)
            detail = "\n".join(messages[-1].strip().splitlines()[-40 if config.debug else -3 :])
            kernel = f"the kernel (Linux {os.uname().release})"
            raise Failure(f"{kernel} does not take {name}: {err}", detail=detail) from err
    with contextlib.suppress(AttributeError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what the compiler had, some 20 MB
    tail_calls = bpf["programs"]
    tail_calls[tail_calls.Key(0)] = tail_calls.Leaf(bpf.funcs[b"elf_probe"].fd)
    if build.ingress_tc:
        tail_calls[tail_calls.Key(1)] = tail_calls.Leaf(bpf.funcs[b"elf_ingress"].fd)
    return bpf


def machine_build(frame: Frame, ingress_tc: bool, tcx: bool) -> Build:
    """Return the parameters for this machine. by_owner is off."""
    tick = round(time.clock_getres(CLOCK_MONOTONIC_COARSE) * 1e9)
    return Build(
        frame, ingress_tc, tcx, tick=tick, old_maps=not has_ring_buffer(), preemptible=is_preemptible(),
        zerocopy=find_zerocopy(),
    )  # fmt: skip


def unload(bpf: Any) -> None:
    """Closes all, once: at exit older BCC would try again, and fail."""
    bpf.cleanup()
    atexit.unregister(bpf.cleanup)


# ---- The device and what is attached to it ----------------------------------------------------------


def interface_failure(message: str) -> Failure:
    return Failure(f"argument -i/--interface: {message}")


class Device(NamedTuple):
    name: str
    ifindex: int
    frame: Frame = Frame.ETHERNET
    driver: str = ""  # the kernel's name of what drives it


def find_device(ipr: Any, name: str, encapsulation: str = "ethernet") -> Device:
    """Raises Failure unless there is such a device, it is up, and packets there may be what -e says."""
    names = [found for _, found in socket.if_nameindex()]
    if name not in names:
        raise interface_failure(f"there is no '{name}' here; there are: {', '.join(names)}")
    ifindex = socket.if_nametoindex(name)
    link = ipr.get_links(ifindex)[0]
    kind = link["ifi_type"]
    if not link["flags"] & IFF_UP:
        raise interface_failure(f"'{name}' is down: ip link set {name} up")
    if kind == ARPHRD_LOOPBACK:
        raise interface_failure(f"'{name}' is the loopback device: nothing is ever a hop away there")
    if kind != ARPHRD_ETHER and kind not in IP_LINKS:
        raise interface_failure(f"packets on '{name}' begin with neither Ethernet nor IP (link type {kind})")
    if kind in CARRIED and encapsulation not in ("ethernet", *CARRIED[kind]):
        fit = f"{IP_LINKS[kind]}, which takes {' or '.join(('ethernet', *CARRIED[kind]))}"
        raise Failure(f"argument -e/--encapsulation: '{encapsulation}' does not fit '{name}', {fit}")
    frame = Frame.TUNNEL if kind in CARRIED else Frame.ETHERNET if kind == ARPHRD_ETHER else Frame.IP
    return Device(name, ifindex, frame, driver_of(name))


def driver_of(name: str) -> str:
    """Return the name of a device's driver, empty where the kernel does not tell it."""
    info = ctypes.create_string_buffer(struct.pack("=I", ETHTOOL_GDRVINFO), 196)  # struct ethtool_drvinfo
    request = struct.pack("16sP16x", name.encode(), ctypes.addressof(info))  # struct ifreq, netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, SIOCETHTOOL, request)
        except OSError:
            return ""
    return info.raw[4:36].split(b"\0")[0].decode(errors="replace")


def device_flags(device: Device) -> int:
    """Return the device's flags. IFF_RUNNING is on if the device has a carrier. Raises OSError if there is no
    such device any more."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16s24x", socket.if_indextoname(device.ifindex).encode())
        reply = fcntl.ioctl(any_socket, SIOCGIFFLAGS, request)  # struct ifreq, netdevice(7)
    flags: int = struct.unpack_from("16xH", reply)[0]
    return flags


@contextlib.contextmanager
def sole_user(device: Device) -> Iterator[None]:
    """One elfprobe per device. The name in the abstract namespace belongs to the network namespace,
    as the device does, and is free again when we are gone, however that comes."""
    with socket.socket(socket.AF_UNIX) as holder:
        try:
            holder.bind(f"\0elfprobe-{device.ifindex}")
        except OSError as err:
            raise interface_failure(f"another elfprobe runs on '{device.name}'") from err
        yield


class ProgInfo(ctypes.Structure):
    """The beginning of struct bpf_prog_info, linux/bpf.h, which only ever grows at its end."""

    _fields_ = [
        ("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32), ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64), ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64), ("created_by_uid", ctypes.c_uint32), ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64), ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32), ("gpl_compatible", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64), ("netns_ino", ctypes.c_uint64),
        ("nr_jited_ksyms", ctypes.c_uint32), ("nr_jited_func_lens", ctypes.c_uint32),
        ("jited_ksyms", ctypes.c_uint64), ("jited_func_lens", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32), ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64), ("nr_func_info", ctypes.c_uint32), ("nr_line_info", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64), ("jited_line_info", ctypes.c_uint64),
        ("nr_jited_line_info", ctypes.c_uint32), ("line_info_rec_size", ctypes.c_uint32),
        ("jited_line_info_rec_size", ctypes.c_uint32), ("nr_prog_tags", ctypes.c_uint32),
        ("prog_tags", ctypes.c_uint64), ("run_time_ns", ctypes.c_uint64), ("run_cnt", ctypes.c_uint64),
        ("recursion_misses", ctypes.c_uint64),
    ]  # fmt: skip


def program_info(fd: int) -> ProgInfo:
    info = ProgInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    if bcc.lib.bpf_obj_get_info(fd, ctypes.byref(info), ctypes.byref(size)) < 0:
        raise OSError(ctypes.get_errno(), "BPF_OBJ_GET_INFO_BY_FD")
    return info


@contextlib.contextmanager
def run_time_stats() -> Iterator[bool]:
    """Has the kernel measure how long all BPF programs take, some 20 ns more for each run, if it can
    (Linux 5.8): yields whether. It stops when nobody asks for it any more."""
    try:
        fd = bcc.lib.bpf_enable_stats(BPF_STATS_RUN_TIME)
    except AttributeError:  # an older BCC
        fd = -1
    try:
        yield fd >= 0
    finally:
        if fd >= 0:
            os.close(fd)


def run_time_texts(bpf: Any, seconds: float) -> Iterator[str]:
    """What our programs took since they were loaded, if they ran; the measurement lasted so long."""
    for name, function in sorted(bpf.funcs.items()):
        info = program_info(function.fd)
        if info.run_cnt:
            each, share = info.run_time_ns / info.run_cnt, info.run_time_ns / (seconds * 1e9)
            yield f"{name.decode()} ran {info.run_cnt} times, {each:.0f} ns each: {share:.2%} of a core"


def program_name(prog_id: int) -> str:
    """The kernel's name of a loaded program, empty where it has none or is gone."""
    fd = bcc.lib.bpf_prog_get_fd_by_id(prog_id)
    if fd < 0:
        return ""
    try:
        return bytes(program_info(fd).name).decode(errors="replace")
    finally:
        os.close(fd)


class XdpAttached(NamedTuple):
    mode: str
    prog_id: int


def attached_xdp(ipr: Any, device: Device) -> XdpAttached | None:
    """The XDP program on the device, None where there is none."""
    xdp = ipr.get_links(device.ifindex)[0].get_attr("IFLA_XDP")
    if isinstance(xdp, str):  # pyroute2 before 0.7 leaves it as it is, in hexadecimal
        attrs = unpack_attributes(bytes.fromhex(xdp.replace(":", "")))
        mode: Any = attrs.get(IFLA_XDP_ATTACHED)
        prog_id = attrs.get(IFLA_XDP_PROG_ID, 0)
    else:
        attrs = dict(xdp["attrs"]) if xdp else {}
        mode, prog_id = attrs.get("IFLA_XDP_ATTACHED"), attrs.get("IFLA_XDP_PROG_ID", 0)
    return XdpAttached(XDP_MODES.get(mode, str(mode)), prog_id) if mode else None


def unpack_attributes(raw: bytes) -> dict[Any, int]:
    """Netlink attributes that hold numbers (struct nlattr, linux/netlink.h): type -> value."""
    found: dict[Any, int] = {}
    while len(raw) >= 4:
        size, kind = struct.unpack_from("=HH", raw)
        found[kind] = int.from_bytes(raw[4:size], sys.byteorder)
        raw = raw[max((size + 3) & ~3, 4) :]
    return found


def set_xdp(device: Device, fd: int, flags: int) -> None:
    """Attaches a program, or with fd -1 detaches. Raises OSError. (pyroute2 writes XDP flags wrongly.)"""
    messages: list[str] = []
    with captured_stderr(messages):
        name = socket.if_indextoname(device.ifindex)  # it may have another by now
        failed = bcc.lib.bpf_attach_xdp(name.encode(), fd, flags) < 0
        number = ctypes.get_errno()
    if failed:
        raise OSError(number, os.strerror(number))


def remove_xdp(ipr: Any, device: Device, prog_id: int) -> None:
    """Detaches this very program; where it is no longer there, nothing."""
    found = attached_xdp(ipr, device)
    if found and found.prog_id == prog_id:
        set_xdp(device, -1, XDP_FLAGS_DRV_MODE if found.mode == "native" else XDP_FLAGS_SKB_MODE)


class LinkOptions(ctypes.Structure):
    """The beginning of libbpf's struct bpf_link_create_opts, which tells its own size."""

    _fields_ = [("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32), ("unused", ctypes.c_uint32)]


class LinkInfo(ctypes.Structure):
    """struct bpf_link_info, linux/bpf.h, of a link to a device."""

    _fields_ = [
        ("type", ctypes.c_uint32), ("id", ctypes.c_uint32), ("prog_id", ctypes.c_uint32),
        ("unused", ctypes.c_uint32), ("ifindex", ctypes.c_uint32), ("more", ctypes.c_uint32 * 27),
    ]  # fmt: skip


def create_link(program: int, target: int, attach_type: int, options: LinkOptions | None = None) -> int:
    """The descriptor of a BPF link. Raises OSError, EINVAL where the kernel or BCC knows none of the kind."""
    try:
        link: int = bcc.lib.bpf_link_create(program, target, attach_type, options and ctypes.byref(options))
    except AttributeError as err:  # an older BCC
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from err
    if link < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return link


def link_is_attached(link: int) -> bool:
    """Return whether a BPF link still has its device. root can detach a tcx link (bpftool link detach)."""
    info = LinkInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    failed = bcc.lib.bpf_obj_get_info(link, ctypes.byref(info), ctypes.byref(size)) != 0
    return not failed and bool(info.ifindex)


class Attachment:
    """A program that is attached to a device while a with-block runs.

    attach() raises Failure, or Unsupported if this kernel has no such hook. detach() may be called at any
    time. It ignores what is gone already.
    """

    what = ""  # as the user reads it

    def __init__(self, ipr: Any, device: Device, program: int) -> None:
        self._ipr = ipr
        self._device = device
        self._program = program
        self._link = -1

    def __enter__(self) -> Attachment:
        try:
            self.attach()
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def attach(self) -> None:
        raise NotImplementedError

    def is_attached(self) -> bool:
        return self._link >= 0 and link_is_attached(self._link)

    def detach(self) -> None:
        if self._link >= 0:
            os.close(self._link)
        self._link = -1

    def _quietly(self, remove: Callable[..., None], *args: Any) -> None:
        """Call a function that detaches. Ignore it if there is nothing to detach any more."""
        try:
            remove(self._ipr, self._device, *args)
        except (pyroute2.NetlinkError, OSError) as err:
            code = getattr(err, "code", None) or getattr(err, "errno", None)
            if code not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                log.error("could not detach from %s: %s", self._device.name, err)


OFFLOADS_WITHOUT_XDP = "rx-lro", "rx-gro-hw"  # generic XDP switches these off, and never on again


class XdpAttachment(Attachment):
    """A program at XDP. A BPF link holds it, so that it goes when this process ends, however that comes.
    Linux before 5.9 has no links for XDP: there the program stays until it is detached."""

    what = "XDP program"

    def __init__(self, ipr: Any, device: Device, program: int, is_native: bool) -> None:
        super().__init__(ipr, device, program)
        self._mode = XDP_FLAGS_DRV_MODE if is_native else XDP_FLAGS_SKB_MODE
        self._prog_id = program_info(program).id
        self._offloads: list[str] = []

    def attach(self) -> None:
        name, is_native = self._device.name, self._mode == XDP_FLAGS_DRV_MODE
        found = attached_xdp(self._ipr, self._device)
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
        options = LinkOptions(sz=ctypes.sizeof(LinkOptions), flags=self._mode)
        try:
            self._link = create_link(self._program, self._device.ifindex, BPF_XDP, options)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            set_xdp(self._device, self._program, self._mode | XDP_FLAGS_UPDATE_IF_NOEXIST)

    def is_attached(self) -> bool:
        found = attached_xdp(self._ipr, self._device)
        return found is not None and found.prog_id == self._prog_id

    def detach(self) -> None:
        super().detach()
        self._quietly(remove_xdp, self._prog_id)
        offloads, self._offloads = self._offloads, []
        if offloads:
            self._quietly(switch_on_offloads, offloads)


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


def switch_on_offloads(_ipr: Any, device: Device, offloads: list[str]) -> None:
    """Switch offloads on again that generic XDP has switched off. Raises OSError."""
    ethtool, features = ethtool_features(device.name)
    for offload in offloads:
        features[offload] = True
    ethtool.set_features(features)


class TcxAttachment(Attachment):
    """A program at TC. A tcx link (Linux 6.6) holds it, so that it goes when this process ends, however that
    comes. It runs after the tcx programs that are there already, and before all filters of clsact."""

    what = "TC program"

    def __init__(self, ipr: Any, device: Device, program: int, attach_type: int) -> None:
        super().__init__(ipr, device, program)
        self._attach_type = attach_type

    def attach(self) -> None:
        others = self._count_others()
        try:
            self._link = create_link(self._program, self._device.ifindex, self._attach_type)
        except OSError as err:
            raise Unsupported(f"tcx ({err.strerror})") from err
        if others:
            direction = "egress" if self._attach_type == BPF_TCX_EGRESS else "ingress"
            said = "%d programs of others come first on TC %s: what they take is not seen"
            log.info(said, others, direction)

    def _count_others(self) -> int:
        """Return how many tcx programs are there already, 0 if the kernel does not tell."""
        flags, count = ctypes.c_uint32(), ctypes.c_uint32(0)
        try:
            bcc.lib.bpf_prog_query(
                self._device.ifindex, self._attach_type, 0, ctypes.byref(flags), None, ctypes.byref(count)
            )
        except AttributeError:  # a BCC that does not export libbpf's functions
            return 0
        return count.value


# Of our TC filters. The second tells the run that clears up after a kill that the qdisc was ours too.
FILTER_NAME = "elfprobe"
FILTER_NAME_QDISC_OURS = "elfprobe+clsact"


class TcFilter(NamedTuple):
    kind: str
    prio: int
    protocol: int
    handle: int
    name: str


def tc_filters(ipr: Any, device: Device, parent: int) -> list[TcFilter]:
    """Return the filters of clsact, of one direction."""
    found = []
    for message in ipr.get_filters(index=device.ifindex, parent=parent):
        options = message.get_attr("TCA_OPTIONS")
        name = options.get_attr("TCA_BPF_NAME") if hasattr(options, "get_attr") else None
        kind, handle = message.get_attr("TCA_KIND"), message["handle"]
        prio, protocol = message["info"] >> 16, socket.ntohs(message["info"] & 0xFFFF)
        if handle:  # one without is the chain's own entry
            found.append(TcFilter(kind, prio, protocol, handle, name or ""))
    return found


def has_clsact(ipr: Any, device: Device) -> bool:
    return any(qdisc.get_attr("TCA_KIND") == "clsact" for qdisc in ipr.get_qdiscs(index=device.ifindex))


def tc_delete(ipr: Any, command: str, message: int, kind: str, device: Device, **which: int) -> None:
    """Where pyroute2 before 0.6 gives a command of its name flags with which kernels delete nothing, the
    message is named itself, which 0.9 cannot."""
    try:
        ipr.tc(command, kind, device.ifindex, **which)
    except pyroute2.NetlinkError as err:
        if err.code != errno.EOPNOTSUPP:
            raise
        ipr.tc((message, NLM_F_REQUEST | NLM_F_ACK), kind, device.ifindex, **which)


def remove_clsact(ipr: Any, device: Device) -> None:
    """Remove the clsact qdisc that we added, unless somebody has come to use it."""
    in_use = tc_filters(ipr, device, CLSACT_EGRESS) or tc_filters(ipr, device, CLSACT_INGRESS)
    if has_clsact(ipr, device) and not in_use:
        tc_delete(ipr, "del", RTM_DELQDISC, "clsact", device)


def remove_filter(ipr: Any, device: Device, ours: TcFilter, parent: int) -> None:
    """Remove our filter, and the clsact qdisc if that is ours, too. Without the filter it is not any
    more: who removed our qdisc took the filter away with it, and what is there now is theirs."""
    if ours in tc_filters(ipr, device, parent):
        which = dict(handle=ours.handle, prio=ours.prio, protocol=ours.protocol, parent=parent)
        tc_delete(ipr, "del-filter", RTM_DELTFILTER, "bpf", device, **which)
        if ours.name == FILTER_NAME_QDISC_OURS:
            remove_clsact(ipr, device)


class ClsactAttachment(Attachment):
    """A program at TC, as a filter of the clsact qdisc with the first free priority. If this adds the qdisc,
    it also removes it."""

    what = "filter"

    def __init__(self, ipr: Any, device: Device, program: int, parent: int) -> None:
        super().__init__(ipr, device, program)
        self._parent = parent
        self._filter: TcFilter | None = None

    def attach(self) -> None:
        name = FILTER_NAME
        if not has_clsact(self._ipr, self._device):
            name = FILTER_NAME_QDISC_OURS
            self._add_clsact()
        with contextlib.ExitStack() as stack:
            if name == FILTER_NAME_QDISC_OURS:
                stack.callback(self._quietly, remove_clsact)
            self._add_filter(name)
            stack.pop_all()  # from here on the filter tells whose the qdisc is

    def _add_clsact(self) -> None:
        try:
            self._ipr.tc("add", "clsact", self._device.ifindex)
        except pyroute2.NetlinkError as err:
            if err.code == errno.EEXIST:
                raise interface_failure(
                    f"'{self._device.name}' has an ingress qdisc, beside which there can be no clsact; "
                    "filters work with clsact's ingress as with it"
                ) from err
            raise Failure(f"'{self._device.name}' takes no clsact qdisc: {err}") from err

    def _add_filter(self, name: str) -> None:
        taken = {found.prio for found in tc_filters(self._ipr, self._device, self._parent)}
        prio = next(free for free in range(1, 0x10000) if free not in taken)
        if prio > 1:
            direction = "egress" if self._parent == CLSACT_EGRESS else "ingress"
            log.info("filters of others come first on TC %s: what they take is not seen", direction)
        self._filter = TcFilter("bpf", prio, ETH_P_ALL, 1, name)
        try:
            self._ipr.tc(
                "add-filter", "bpf", self._device.ifindex, handle=1, prio=prio, fd=self._program, name=name,
                parent=self._parent, protocol=ETH_P_ALL, direct_action=True, classid=1,
            )  # fmt: skip
        except pyroute2.NetlinkError as err:
            raise Failure(f"'{self._device.name}' takes no TC filter: {err}") from err

    def is_attached(self) -> bool:
        return self._filter in tc_filters(self._ipr, self._device, self._parent)

    def detach(self) -> None:
        if self._filter:
            self._quietly(remove_filter, self._filter, self._parent)
        self._filter = None


def remove_leftovers(ipr: Any, device: Device) -> None:
    """Remove what a killed elfprobe has left on the device, which has no other elfprobe now."""
    found = attached_xdp(ipr, device)
    if found and program_name(found.prog_id) == "elf_ingress":
        remove_xdp(ipr, device, found.prog_id)
        log.warning("an XDP program that a killed elfprobe left on %s is removed", device.name)
    for parent in CLSACT_EGRESS, CLSACT_INGRESS:  # the one that was attached first tells whose the qdisc is
        for stale in tc_filters(ipr, device, parent):
            if stale.name.startswith(FILTER_NAME):
                remove_filter(ipr, device, stale, parent)
                log.warning("a TC filter that a killed elfprobe left on %s is removed", device.name)


class Hook(NamedTuple):
    """Where answers are read."""

    name: str  # as --ingress-hook has it
    reason: str

    def __str__(self) -> str:
        place = {"xdp": "native XDP", "generic": "generic XDP", "tc": "TC ingress"}[self.name]
        return f"{place} ({self.reason})"


# Drivers that take a native XDP program without a reset of their queues, and give up no offload for it. Found
# by reading: efx_xdp_setup_prog() of sfc just sets a pointer. i40e, ice, ixgbe, igb, igc, mlx5, bnxt, ena
# and others set up their queues anew; some take the link down.
XDP_WITHOUT_RESET = frozenset({"sfc"})
XDP_COSTS = {
    "veth": "native XDP would take the segmentation offload of the other end of a veth",
    "virtio_net": "native XDP would take the receive offload of virtio_net",
}


def ingress_hooks(ipr: Any, device: Device, wanted: str) -> list[Hook]:
    """Return where answers may be read, the first choice first."""
    if wanted != "auto":
        return [Hook(wanted, "as asked for")]
    reason = why_not_native_xdp(ipr, device)
    if reason:
        return [Hook("tc", reason)]
    free = f"the driver {device.driver} takes a program without a reset"
    return [Hook("xdp", free), Hook("tc", f"{device.driver} refuses native XDP")]


def why_not_native_xdp(ipr: Any, device: Device) -> str:
    """Return what native XDP would cost the application, or may cost; empty: nothing that is known."""
    found = attached_xdp(ipr, device)
    if found:
        return f"{program_name(found.prog_id) or 'a program of somebody else'} is at XDP"
    if device.driver not in XDP_WITHOUT_RESET:
        unknown = f"native XDP may disturb the driver {device.driver or 'of this device'}"
        return XDP_COSTS.get(device.driver, unknown)
    offloads = active_offloads(device.name)
    return f"native XDP would take {' and '.join(offloads)}" if offloads else ""


def attachments(ipr: Any, device: Device, bpf: Any, hook: Hook, tcx: bool) -> list[Attachment]:
    """Return what a run attaches, in this order: receiving comes first, so that no answer is missed."""
    ingress, egress = (bpf.funcs[name].fd for name in (b"elf_ingress", b"elf_egress"))
    receiving: Attachment
    if hook.name != "tc":
        receiving = XdpAttachment(ipr, device, ingress, hook.name == "xdp")
    elif tcx:
        receiving = TcxAttachment(ipr, device, ingress, BPF_TCX_INGRESS)
    else:
        receiving = ClsactAttachment(ipr, device, ingress, CLSACT_INGRESS)
    if tcx:
        return [receiving, TcxAttachment(ipr, device, egress, BPF_TCX_EGRESS)]
    return [receiving, ClsactAttachment(ipr, device, egress, CLSACT_EGRESS)]


# ---- Files ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_other_in_folder_of(path: str) -> Iterator[None]:
    """No other run chooses names, renames or removes files there meanwhile, where the folder can be
    locked and none keeps it for seconds, as one that is stopped just then."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            for _ in range(LOCK_TRIES):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(LOCK_EVERY)
        yield


def next_free_name(path: str) -> str:
    base, extension = os.path.splitext(path)
    number = 1
    while os.path.lexists(f"{base}.{number}{extension}"):
        number += 1
    return f"{base}.{number}{extension}"


class OutputFile:
    """A new file that the user who called sudo owns. One of the same name is renamed first, and
    renamed back if the run does not come to use this one."""

    def __init__(self, path: str) -> None:
        """Raises Failure."""
        self.path = path
        self.renamed = ""
        self.lines_lost = 0  # that could not be written
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        with no_other_in_folder_of(path):
            try:
                if os.path.lexists(path):
                    self.renamed = next_free_name(path)
                    os.rename(path, self.renamed)
                self.fd = os.open(path, flags, 0o644)
            except OSError as err:
                self._rename_back()
                raise Failure(f"argument -f/--filebase: cannot write '{path}': {err.strerror}") from err
        if "SUDO_UID" in os.environ and os.geteuid() == 0:
            with contextlib.suppress(OSError, ValueError):
                os.fchown(self.fd, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", "-1")))

    def _rename_back(self) -> None:
        if self.renamed and not os.path.lexists(self.path):
            with contextlib.suppress(OSError):
                os.rename(self.renamed, self.path)

    def write_lines(self, lines: str) -> None:
        """Appends whole lines; where the disk takes only a part, the last broken one is taken back.
        Raises Failure."""
        data = lines.encode(errors="backslashreplace")
        start = os.fstat(self.fd).st_size
        try:
            written = os.write(self.fd, data)
            while written < len(data):
                written += os.write(self.fd, data[written:])
        except OSError as err:
            kept = data.rfind(b"\n", 0, os.fstat(self.fd).st_size - start) + 1
            os.ftruncate(self.fd, start + kept)
            self.lines_lost += data.count(b"\n", kept)
            raise Failure(f"cannot write '{self.path}': {err.strerror}") from err

    def is_begun(self) -> bool:
        return os.fstat(self.fd).st_size > 0

    def close(self, used: bool) -> None:
        if not used:
            with no_other_in_folder_of(self.path):
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.lstat(self.path), os.fstat(self.fd)):  # not another run's by now
                        os.unlink(self.path)
                self._rename_back()
        os.close(self.fd)


class FileLog(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to an OutputFile. A log that cannot be written must not end a measurement."""

    def __init__(self, file: OutputFile) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Failure):
            self._file.write_lines(self.format(record) + "\n")


# ---- Results and rows -------------------------------------------------------------------------------


def struct_type(bpf: Any, name: str) -> Any:
    """Return the type of a field of struct layouts in elfprobe.c, which no map holds."""
    return dict(bpf["layouts"].Leaf._fields_)[name]


def struct_format(layout: Any) -> tuple[str, list[str]]:
    """struct's format for a ctypes Structure as BCC makes it of a C struct, nested ones flattened,
    and the names of its values. Arrays, alone in a struct or not, are bytes; fields named unused or
    __pad are left out."""
    formats, names, end = ["="], [], 0
    for name, kind, *_ in layout._fields_:
        offset = getattr(layout, name).offset
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
    formats.append(f"{ctypes.sizeof(layout) - end}x")
    return "".join(formats), names


def entries(table: Any) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a BPF hash or trie; what comes or goes meanwhile may be missed or come twice."""
    size, value_size = ctypes.sizeof(table.Key), ctypes.sizeof(table.Leaf)
    keys = ctypes.create_string_buffer(BATCH * size)
    values = ctypes.create_string_buffer(BATCH * value_size)
    place = (ctypes.c_uint32 * (size // 4 + 1))()  # a number; of a trie a key
    after = None
    failed = 0
    while not failed:
        count = ctypes.c_uint32(BATCH)
        try:
            failed = bcc.lib.bpf_lookup_batch(table.map_fd, after, place, keys, values, ctypes.byref(count))
            reason = ctypes.get_errno()
        except AttributeError:  # BCC before 0.19
            failed = reason = errno.ENOTSUP
        if failed and reason != errno.ENOENT:  # which is the end
            yield from ((bytes(key), bytes(value)) for key, value in table.items())  # Linux before 5.6, too
            return
        after = place
        for (key,), (value,) in zip(
            struct.iter_unpack(f"{size}s", keys.raw[: count.value * size]),
            struct.iter_unpack(f"{value_size}s", values.raw[: count.value * value_size]),
        ):
            yield key, value


def plain(value: Any) -> Any:
    """What JSON can hold of a ctypes value as BCC makes them: structs are objects, char arrays texts."""
    if hasattr(value, "_fields_"):
        names = [name for name, *_ in value._fields_ if not name.startswith("__pad")]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (ctypes.Array, list)):
        return [plain(element) for element in value]
    return getattr(value, "value", value)


def save_maps(bpf: Any, filebase: str, stop: Stop) -> None:
    """Writes each map of the hooks file to FILEBASE.MAP.json: its entries, with a value for each CPU where
    the map has that; no more once a stop is asked for again. What cannot be read is logged. Raises Failure
    for what cannot be written."""
    asked = stop.asked
    for name in hook_maps(bpf):
        try:
            table = bpf[name]
            log.debug("the hooks' map '%s' has room for %d entries", name, table.max_entries)
            lines = []
            for entry in map_entries(table):
                lines.append(json.dumps(entry))
                if stop.asked > asked:
                    raise InterruptedError("told to stop")
        except Exception as err:  # as bare as BCC raises it
            log.warning("the hooks' map '%s' is not saved: %s", name, err)
            continue
        file = OutputFile(f"{filebase}.{name}.json")
        try:
            file.write_lines(f'{{"map": "{name}", "entries": [\n' + ",\n".join(lines) + "\n]}\n")
        except Failure:
            file.close(used=False)
            raise
        file.close(used=True)
        if file.renamed:
            log.info("the %s that was there is now %s", file.path, file.renamed)
        log.info("the hooks' map '%s' is in %s", name, file.path)


def map_entries(table: Any) -> Iterator[dict[str, Any]]:
    """Keys and values, as far as a map has them; values of a queue or stack are taken out."""
    if isinstance(table, (bcc.table.RingBuf, bcc.table.PerfEventArray, bcc.table.ProgArray)):
        raise ValueError("it is of a type that nothing can be read from")
    if isinstance(table, bcc.table.QueueStack):
        yield from ({"value": plain(value)} for value in table.values())
    elif "PerCpu" in type(table).__name__:
        yield from ({"key": plain(key), "value": plain(table[key])} for key in table)
    else:
        for key, value in entries(table):
            told = table.Key.from_buffer_copy(key), table.Leaf.from_buffer_copy(value)
            yield dict(zip(("key", "value"), map(plain, told)))


def hook_maps(bpf: Any) -> list[str]:
    """Names of the maps that the hooks file defines: all but those of elfprobe.c."""
    count, name_of = bcc.lib.bpf_num_tables, bcc.lib.bpf_table_name  # whose types BCC does not declare
    count.restype, count.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
    name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.c_void_p, ctypes.c_size_t)
    names = [name_of(bpf.module, number).decode() for number in range(count(bpf.module))]
    # The first argument of a macro, or where that is the type of map the fourth.
    ours = re.findall(r'^BPF_\w+\((?:"\w+", [^,]+, [^,]+, )?(\w+)', read_source(C_FILE, "program"), re.M)
    return [name for name in names if name not in ours]


class Results:
    """The probes that ended, from the kernel's maps to rows of text, the summary and the findings."""

    def __init__(self, bpf: Any) -> None:
        self._bpf = bpf
        self._in_flight = bpf["in_flight"]
        self._chunks: list[bytes] = []
        extended = struct_type(bpf, "result")
        layout, names = struct_format(dict(extended._fields_)["result"])
        self._result = struct.Struct(layout)
        self._row = row_function(names)
        self.rewrites = PathRewrites()
        self.summary = Summary(ReverseDns().with_name)
        self._extended_chunks: list[bytes] = []
        self._extended_size = ctypes.sizeof(extended)
        self._extension_len = extended.extension_len.offset
        self._extension = extended.extension
        probe_layout, probe_names = struct_format(self._in_flight.Leaf)
        key_layout, key_names = struct_format(self._in_flight.Key)
        self._unanswered = struct.Struct(probe_layout + key_layout[1:])
        self._unanswered_row = row_function(probe_names + key_names)
        self._sendtime = probe_names.index("sendtime")
        self.replies = 0
        self.unanswered = 0
        self.malformed = 0  # extensions that routers put behind their quotes
        hear(bpf, "results", self._receive, RESULT_PERF_PAGES)

    def _receive(self, _context: Any, data: int, size: int) -> int:
        if size < self._extended_size:
            self._chunks.append(ctypes.string_at(data, self._result.size))
        else:
            self._extended_chunks.append(ctypes.string_at(data, size))
        return 0

    def take(self) -> str:
        """Return the rows of all replies that came since the last call."""
        take_events(self._bpf)
        if not self._chunks and not self._extended_chunks:
            return ""
        data, self._chunks = b"".join(self._chunks), []
        rows = []
        note_rewrites, note = self.rewrites.note, self.summary.note
        for fields in self._result.iter_unpack(data):
            row, probe = self._row(fields)
            rows.append(row)
            note_rewrites(probe)
            note(probe)
        extended, self._extended_chunks = self._extended_chunks, []
        rows += map(self._extended_row, extended)
        self.replies += len(rows)
        return "".join(rows)

    def _extended_row(self, data: bytes) -> str:
        (size,) = struct.unpack_from("=I", data, self._extension_len)
        try:
            start, is_cut = self._extension.offset, size == self._extension.size
            texts = extension_texts(data[start : start + size], is_cut)
        except MalformedExtension:
            self.malformed += 1
            texts = "", ""
        row, probe = self._row(self._result.unpack_from(data), *texts)
        self.rewrites.note(probe)
        self.summary.note(probe)
        return row

    def expire(self, sent_before: int) -> str:
        """Return rows of the probes still in flight that left before this time (CLOCK_MONOTONIC, ns)."""
        rows = []
        for key, probe in list(entries(self._in_flight)):
            fields = self._unanswered.unpack(probe + key)
            if fields[self._sendtime] >= sent_before:
                continue
            if bcc.lib.bpf_delete_elem(self._in_flight.map_fd, key):
                continue  # its reply has come meanwhile, and the row with it
            row, ended = self._unanswered_row(fields)
            rows.append(row)
            self.summary.note(ended)
        self.unanswered += len(rows)
        return "".join(rows)


# What the kernel's half says of flows and destinations, by enum of elfprobe.c.
FLOW_EVENTS = {
    1: "{flow}: nothing is acknowledged any more: no probes until it moves again",
    2: "{flow}: moves again, and is probed again",
    3: "{flow}: stalled under probes again: destination excluded for the rest of this run",
    4: "{dest}: a filter in front of ours took the copy of a packet, or let it out whole: destination "
       "excluded for the rest of this run",
}  # fmt: skip


class FlowEvents:
    """Logs them as they come."""

    def __init__(self, bpf: Any) -> None:
        self._layout = struct_type(bpf, "flow_event")
        hear(bpf, "flow_events", self._hear)

    def _hear(self, _context: Any, data: int, size: int) -> int:
        event = self._layout.from_buffer_copy(ctypes.string_at(data, size))
        flow = event.flow
        dest = address_text(bytes(flow.dest))
        text = flow_text(dest, socket.ntohs(flow.sport), socket.ntohs(flow.dport), flow.protocol)
        log.warning("%s", FLOW_EVENTS[event.kind].format(flow=text, dest=dest))
        return 0


# ---- The run ----------------------------------------------------------------------------------------


def monotonic_epoch() -> str:
    """When CLOCK_MONOTONIC, which all times in rows are of, was 0: UTC (ISO 8601), as the clocks are now."""
    nanoseconds = time.time_ns() - time.monotonic_ns()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(nanoseconds // 10**9))
    return f"{seconds}.{nanoseconds % 10**9 // 1000:06}Z"


class Stop:
    """How often a signal has asked for the end. Without a lock: a handler runs in the midst of anything."""

    asked = 0

    def ask(self, *_: Any) -> None:
        self.asked += 1


class LinkState(enum.Enum):
    """Whether packets can leave the device. The values are the log's words."""

    UP = "is up again"
    NO_CARRIER = "has no carrier: no packets until it has one"
    DOWN = "is down: no packets until it is up"

    @classmethod
    def of(cls, flags: int) -> LinkState:
        """Return the state that a device's flags say."""
        if flags & IFF_RUNNING:
            return cls.UP
        return cls.NO_CARRIER if flags & IFF_UP else cls.DOWN


class ElfProbe:
    """One measurement, from its checks to its last row."""

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self._config = config
        self._console = console  # where the table is drawn while it runs, if at all
        self._link = LinkState.UP

    def run(self, stop: Stop) -> None:
        """Measures until a stop is asked for, the duration is over, or it cannot go on (Failure)."""
        config = self._config
        with contextlib.ExitStack() as stack:
            ipr = stack.enter_context(pyroute2.IPRoute())
            self._device = find_device(ipr, config.interface, config.encapsulation)
            for pid in config.pids:
                if not psutil.pid_exists(pid):
                    raise Failure(f"argument -P/--pid: there is no process {pid}")
            fixed = resolve_all(config.addresses)
            stack.enter_context(sole_user(self._device))
            remove_leftovers(ipr, self._device)
            attached = self._load_and_attach(stack, ipr, stop)
            if attached is None:
                log.info("ended before anything was attached or written")
                return
            results = Results(self._bpf)
            FlowEvents(self._bpf)
            destinations = Destinations(self._bpf)
            for packed in fixed:
                destinations.add(packed)
            with attached:
                tables = ConnectionTables(destinations, fixed, config.apps, config.pids)
                csv = stack.enter_context(self._output_files())
                self._follow_processes(attached, tables)
                attached.callback(self._silence)
                csv.write_lines(HEADER)
                log.info("CLOCK_MONOTONIC 0 is %s", monotonic_epoch())
                fate = "dropped" if config.ingress == "drop" else "passed"
                log.info(
                    "probing on %s, answers read at %s, then %s; rows go to %s",
                    self._device.name, self._hook, fate, csv.path,
                )  # fmt: skip
                if config.debug and not attached.enter_context(run_time_stats()):
                    log.info("what the programs take is not known: that needs Linux 5.8, new BCC, sys_admin")
                stack.callback(self._summarise, results, csv, stop)  # when all is detached
                self._begun_at = time.monotonic()
                try:
                    self._measure(stop, results, csv)
                finally:
                    self._drain(results, csv)

    def _load_and_attach(self, stack: contextlib.ExitStack, ipr: Any, stop: Stop) -> contextlib.ExitStack | None:
        """Compile and load the programs, and attach them at the first of the possible hooks that takes them.
        Return what detaches them, or None if a stop was asked for before. Raises Failure."""
        hooks = ingress_hooks(ipr, self._device, self._config.ingress_hook)
        choices = [(hook, tcx) for hook in hooks for tcx in (True, False) if not tcx or may_have_tcx()]
        while True:
            hook, tcx = choices.pop(0)
            with contextlib.ExitStack() as loaded:
                build = machine_build(self._device.frame, hook.name == "tc", tcx)
                self._bpf, self._refused = self._load(build)
                loaded.callback(unload, self._bpf)
                if stop.asked:
                    return None
                attached = loaded.enter_context(contextlib.ExitStack())
                self._attachments = attachments(ipr, self._device, self._bpf, hook, tcx)
                try:
                    for attachment in self._attachments:
                        attached.enter_context(attachment)
                except Unsupported as err:
                    choices = [choice for choice in choices if not choice[1]]
                    reason: Exception = err
                except Failure as err:
                    choices = [choice for choice in choices if choice[0] != hook]
                    reason = err
                else:
                    self._hook = hook
                    stack.push(loaded.pop_all())
                    return attached
            log.debug("%s: %s", hook, reason)
            if not choices:
                raise Failure(str(reason)) from reason

    def _load(self, build: Build) -> tuple[Any, str]:
        """BCC's object, and why it does not tell flows by their socket's owner: empty if it does."""
        if not self._config.by_process:
            refused = "nobody asks for it"
        elif not has_ring_buffer():
            refused = "no ring buffers"
        else:
            try:
                return load_program(self._config, dataclasses.replace(build, by_owner=True)), ""
            except Failure as failure:
                for line in str(failure).splitlines():
                    log.debug("%s", line)
                refused = str(failure).splitlines()[0]
        return load_program(self._config, build), refused

    def _follow_processes(self, stack: contextlib.ExitStack, tables: ConnectionTables) -> None:
        """Follows the processes of interest until the stack unwinds, in the best way that there is."""
        if not self._config.by_process:
            return
        try:
            if self._refused:
                what = "programs that note who owns a socket (Linux 5.10 and BCC 0.16)"
                raise Unsupported(f"{what}: {self._refused}")
            owners = SocketOwners(self._bpf, self._config.apps, self._config.pids)
            stack.enter_context(owners.followed())
        except Unsupported as err:
            log.warning(
                "flows by process are not exact without %s; instead the connection tables are looked at "
                "every %g s: short flows are missed, and others' to the same addresses probed",
                err, SCAN_EVERY,
            )  # fmt: skip
            stack.enter_context(tables.followed())

    @contextlib.contextmanager
    def _output_files(self) -> Iterator[OutputFile]:
        """The CSV, and the log from here on, with what was logged until now."""
        root = logging.getLogger()
        early = [handler for handler in root.handlers if isinstance(handler, logging.handlers.MemoryHandler)]
        with contextlib.ExitStack() as stack:
            csv = OutputFile(self._config.filebase + ".csv")
            stack.callback(lambda: csv.close(used=csv.is_begun()))
            if self._config.logfile:
                file = OutputFile(self._config.filebase + ".log")
                stack.callback(lambda: file.close(used=csv.is_begun()))
                handler = FileLog(file)
                handler.setFormatter(LogFormat())
                root.addHandler(handler)
                stack.callback(root.removeHandler, handler)
                for memory in early:
                    memory.setTarget(handler)
                    memory.flush()
                    root.removeHandler(memory)
                if file.renamed:
                    log.info("the %s that was there is now %s", file.path, file.renamed)
            if csv.renamed:
                log.info("the %s that was there is now %s", csv.path, csv.renamed)
            yield csv

    def _measure(self, stop: Stop, results: Results, csv: OutputFile) -> None:
        now = time.monotonic()
        end = now + self._config.duration if self._config.duration else float("inf")
        alive_until = next_beat = next_expiry = now
        next_report = now + 10
        next_look = now + LOOK_EVERY
        next_table = now + DRAW_EVERY
        while not stop.asked and now < end:
            if now >= next_beat:
                if now > alive_until:
                    why = "elfprobe was stopped, or waited for a processor or its file"
                    log.warning("no probes for %.1f s: %s", now - alive_until, why)
                alive_until = now + ALIVE_FOR
                self._beat(alive_until)
                next_beat = now + BEAT_EVERY
            if now >= next_expiry:
                if self._are_outstanding(results):
                    self._write(csv, results.expire(int((now - UNANSWERED_AFTER) * 1e9)))
                next_expiry = now + BEAT_EVERY
            if now >= next_look:
                for attachment in self._attachments:
                    if not attachment.is_attached():
                        what, device = attachment.what, self._device.name
                        raise Failure(f"somebody has removed our {what} from '{device}'")
                next_look = now + LOOK_EVERY
            if now >= next_report:
                log.debug("counters: %s", read_counters(self._bpf))
                next_report = now + 10
            self._write(csv, results.take())
            if self._console and now >= next_table:
                self._console.draw(functools.partial(self._table, results))
                next_table = now + DRAW_EVERY
            wait_for_events(self._bpf, min(DRAIN_EVERY, max(end - now, 0)))
            now = time.monotonic()

    def _drain(self, results: Results, csv: OutputFile) -> None:
        """No more probes; then the replies that are still on their way, then what is outstanding."""
        self._silence()
        self._ended_at = time.monotonic()
        try:
            while time.monotonic() < self._ended_at + STRAY_REPLIES:
                self._write(csv, results.take())
                time.sleep(STRAY_REPLIES / 10)
        finally:  # what cannot be written is counted all the same
            self._write(csv, results.take() + results.expire(1 << 63) + results.take())

    def _table(self, results: Results, lines: int, columns: int) -> list[str]:
        """As many lines at most, on how it stands."""
        ended = f"{results.replies} replies, {results.unanswered} unanswered"
        return [f"{self._device.name}: {ended}", *results.summary.busiest(lines - 1, columns)]

    def _write(self, csv: OutputFile, rows: str) -> None:
        if rows:
            csv.write_lines(rows)

    def _beat(self, until: float) -> None:
        """Allows probes until then (time.monotonic, which is CLOCK_MONOTONIC), if the device still is."""
        try:
            flags = device_flags(self._device)
        except OSError as err:
            raise Failure(f"the interface '{self._device.name}' is gone") from err
        state = LinkState.of(flags)
        if state != self._link:
            self._log_link(state)
            self._link = state
            table = self._bpf["link_up_since"]
            table[table.Key(0)] = table.Leaf(time.monotonic_ns() if state == LinkState.UP else 1 << 63)
        table = self._bpf["alive_until"]
        table[table.Key(0)] = table.Leaf(int(until * 1e9))

    def _log_link(self, state: LinkState) -> None:
        log.warning("the interface %s", state.value)
        is_new = time.monotonic() < self._begun_at + RESET_FOR
        if state == LinkState.NO_CARRIER and self._hook.name == "xdp" and is_new:
            log.warning(
                "the driver %s may have taken the link down for our XDP program: use --ingress-hook tc",
                self._device.driver,
            )

    def _silence(self) -> None:
        table = self._bpf["alive_until"]
        table[table.Key(0)] = table.Leaf(0)

    def _are_outstanding(self, results: Results) -> bool:
        """Whether probes are in flight. To ask the map itself takes a look into each of its buckets."""
        count = read_counters(self._bpf)
        return count["probes"] != count["replies"] + results.unanswered

    def _unprobed(self, count: dict[str, int]) -> Iterator[str]:
        """Why there are no probes, to some destinations or at all."""
        leaf = self._bpf["paths"].Leaf
        length = leaf.distance.offset + dict(leaf._fields_)["distance"].length.offset
        paths = itertools.chain(entries(self._bpf["paths"]), entries(self._bpf["flow_paths"]))
        near = [address_text(key) for key, path in paths if path[length] == 1]
        if near:
            more = f" and {len(near) - 5} more" if len(near) > 5 else ""
            yield f"one hop away, with no router between: {', '.join(near[:5])}{more}"
        elif not count["probes"]:
            seen = counted({**UNFIT, **LOSSES}, count)
            if seen:
                yield f"packets of interest left, but none that could carry a probe: {seen}"
            else:
                way = "the way to a destination is what 'ip route get ADDRESS' says"
                yield f"no packet of interest left by {self._device.name}; {way}"

    def _summarise(self, results: Results, csv: OutputFile, stop: Stop) -> None:
        """Probes are replies, unanswered ones and lost results, and the log shows where they are not."""
        if self._console:
            self._console.clear()
        count = read_counters(self._bpf)
        for line in results.summary.tables():
            log.info("%s", line, extra={"bare": True})
        log.info("%d probes, %d replies, %d unanswered", count["probes"], results.replies, results.unanswered)
        if csv.lines_lost:
            log.warning("%d rows of them could not be written to %s", csv.lines_lost, csv.path)
        ended = results.replies + results.unanswered + count["results_lost"]
        if count["probes"] != ended:
            log.warning("this does not add up: %d probes, of which %d ended", count["probes"], ended)
        lost = counted(LOSSES, count)
        if lost:
            log.warning("not measured: %s", lost)
        rewrites = (finding.text() for finding in results.rewrites.findings())
        for text in itertools.chain(rewrites, self._unprobed(count)):
            log.info("%s", text)
        if results.malformed:
            log.warning("malformed extensions (RFC 4884) of %d replies are left out", results.malformed)
        if count["processes_full"]:
            log.warning("no room for %d processes of interest", count["processes_full"])
        if count["events_lost"]:
            log.warning("%d events of processes or flows were not heard", count["events_lost"])
        if count["reached"]:
            log.warning("%d probes reached their destination", count["reached"])
        log.debug("counters: %s", count)
        if self._config.debug:
            for text in run_time_texts(self._bpf, self._ended_at - self._begun_at):
                log.info("%s", text)
        save_maps(self._bpf, self._config.filebase, stop)


def set_up_logging(config: Config, console: Console) -> None:
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if config.debug else logging.INFO)
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
    if not config.quiet:
        console.setFormatter(LogFormat())
        root.addHandler(console)
    if config.logfile:
        root.addHandler(logging.handlers.MemoryHandler(1 << 20, logging.CRITICAL + 1))


def open_standard_streams() -> None:
    """Gives those that are closed a file, or else the next that is opened would take their place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def missing_capabilities(by_process: bool) -> list[str]:
    """Names of those that this process needs and has not, nor one that includes it."""
    needed = {
        "cap_net_admin": (CAP_NET_ADMIN,),
        "cap_bpf": (CAP_BPF, CAP_SYS_ADMIN),
        "cap_perfmon": (CAP_PERFMON, CAP_SYS_ADMIN),
    }
    if by_process:
        needed["cap_sys_ptrace"] = (CAP_SYS_PTRACE,)
        needed["cap_dac_read_search"] = (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE)
    effective = effective_capabilities()
    return [name for name, any_of in needed.items() if not any(effective >> number & 1 for number in any_of)]


def effective_capabilities() -> int:
    """A bit for each, by its number."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def has_other_clock() -> bool:
    """Whether this is a time namespace that shifts CLOCK_MONOTONIC, time_namespaces(7)."""
    with contextlib.suppress(OSError), open("/proc/self/timens_offsets", encoding="ascii") as file:
        return any(line.split()[1:] != ["0", "0"] for line in file if line.startswith("monotonic"))
    return False


def require_machine(config: Config) -> None:
    """Raises Failure unless this is root, or as good as, on a machine with the packages."""
    if MISSING:
        absent, packages = " and ".join(MISSING), " ".join(MISSING.values())
        other = "" if sys.executable == "/usr/bin/python3" else ", and run it with /usr/bin/python3"
        raise Failure(f"{sys.executable} has no module {absent}: apt install {packages}{other}")
    if has_other_clock():
        raise Failure("cannot run in this time namespace: its CLOCK_MONOTONIC is not the kernel's own")
    missing = missing_capabilities(config.by_process)
    if missing:
        raise Failure(f"must run as root: sudo python3 elfprobe.py ... (missing: {', '.join(missing)})")


def main(argv: list[str]) -> int:
    """Exit status: 0 after a run, 2 for wrong usage, 1 for all else that went wrong."""
    open_standard_streams()
    debug = "-d" in argv or "--debug" in argv
    console = Console()
    status = 0
    try:
        config = parse_arguments(argv)
        require_machine(config)
        set_up_logging(config, console)
        stop = Stop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                signal.signal(number, stop.ask)
        try:
            ElfProbe(config, console if config.live else None).run(stop)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # all is undone: the exit status stands
    except Exception as err:
        if debug:
            console.say(traceback.format_exc().rstrip())
        message = str(err) if isinstance(err, Failure) else printable(str(err))
        hint = "" if debug or isinstance(err, Failure) else f" ({type(err).__name__}; -d shows where)"
        console.say(f"elfprobe.py: {message}{hint}")
        status = err.status if isinstance(err, Failure) else 1
    console.end()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
