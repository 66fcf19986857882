#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-only
"""Hop-by-hop latency inside an application's own flow.

$ sudo python3 elfprobe.py -i eno2 -a speedtest
14:02:11.402 probing on eno2, XDP native, answers dropped; rows go to elf.csv
14:02:12.418 of interest: 203.0.113.80 (speedtest 4127)
^C14:02:19.120 2804 probes, 2797 replies, 7 unanswered
$ head -3 elf.csv
recvcpu,seq,origseq,latency,sendtime,recvtime,dest,responder,outttl,recvttl,sport,dport,protocol,outipid,inipid
0,0,2943351213,211358,731841604110,731841815468,203.0.113.80,192.0.2.1,1,64,40112,443,6,21931,21931
1,1,2943352661,1498120,731851689002,731853187122,203.0.113.80,198.51.100.9,2,254,40112,443,6,21945,21945

A TC egress program clones one of the application's own packets now and then, lowers the clone's
TTL and sends it along; the router where the TTL ends answers with an ICMP time exceeded, which an
XDP program reads and times. Both are in elfprobe.c, which this driver compiles with BCC, attaches,
tells what is of interest, and drains into FILEBASE.csv.
"""

from __future__ import annotations

import argparse
import array
import atexit
import bisect
import collections
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
import operator
import os
import queue
import re
import secrets
import select
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

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the packages are loaded

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

COLUMNS = (
    "recvcpu", "seq", "origseq", "latency", "sendtime", "recvtime", "dest", "responder",
    "outttl", "recvttl", "sport", "dport", "protocol", "outipid", "inipid", "app", "pid",
    "srtt", "cwnd", "retrans", "outtos", "intos", "mpls", "ifinfo",
)  # fmt: skip

UNANSWERED_AFTER = 5.0  # s that a probe may be outstanding
ALIVE_FOR = 2.0  # s without a heartbeat after which the kernel makes no more probes
BEAT_EVERY = 0.5  # s
DRAIN_EVERY = 0.25  # s between two looks at the result ring, at most
BATCH = 4096  # entries of a hash that are read at once
STRAY_REPLIES = 0.5  # s to wait for replies after the last probe
LOOK_EVERY = 5.0  # s between two looks whether our TC filter and XDP program are still there
SCAN_EVERY = 1.0  # s between two looks at the processes
REMOVED_MAX = 1 << 16  # destinations no longer of interest that are remembered
LOCK_TRIES, LOCK_EVERY = 500, 0.01  # to lock the folder of the CSV; s between two
MAKE_UP_SHARE = 0.05  # of a processor, at most, to look for processes whose events were missed
FORKS_SAMPLED, FORKS_SAMPLED_MAX = 3, 30  # to find out where a task has its PID; so many may be missed
LINGER = 30.0  # s that a destination stays of interest after its last connection ended
CHANGES_MAX = 1000  # of what the network changes on the way that are kept in mind
HOPS_MAX = 8192  # of all destinations together that the summary has
FLOWS_MAX = 32768  # whose responders are remembered
ANOTHER_AFTER = 10**9  # ns in which a flow was not probed: less retransmitted then is another connection's
TABLES_MAX = 50  # destinations in the summary at the end
CHANGES_TOLD = 10  # changes of a hop's responder that are logged, the rest is counted
DRAW_EVERY = 1.0  # s between two tables on a terminal
RESOLVERS = 4  # names of responders that are asked for at once
NAMES_MAX = 10000
DESTINATIONS_MAX = 65536
PEERS_MAX = 16384  # destinations of processes' flows
RING_HOLDS = 0.25  # s of results at the highest rate
RING_PAGE = os.sysconf("SC_PAGESIZE")
RING_PAGES_MIN = 64  # replies may come in bursts at any rate
RESULT_BYTES = 128  # of struct result in the ring, at most
RESULT_PERF_PAGES = 512  # of each CPU's perf buffer, where there is no ring
CONSOLE_LINES = 10000  # that may wait for a console which does not take them
CONSOLE_PATIENCE = 1.0  # s that the end waits for it

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
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6"}
IFF_UP = 1  # linux/if.h
SIOCGIFFLAGS = 0x8913  # linux/sockios.h
BPF_MAP_TYPE_RINGBUF = 27  # enum bpf_map_type, linux/bpf.h
BPF_XDP = 37  # enum bpf_attach_type, linux/bpf.h
BPF_CGROUP_INET_SOCK_CREATE = 2  # enum bpf_attach_type, linux/bpf.h
BPF_STATS_RUN_TIME = 0  # enum bpf_stats_type, linux/bpf.h
UNDECIDED, OF_INTEREST = 1, 2  # as in elfprobe.c
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
CLSACT_EGRESS = 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS), linux/pkt_sched.h
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
    "hop_silent": "the hop whose turn it was had fallen silent",
    "flow_stalled": "nothing was acknowledged any more",
    "driver_silent": "elfprobe was stopped or starved",
    "hook_dropped": "the hook's verdict",
}

log = logging.getLogger("elfprobe")


def counted(words: dict[str, str], count: dict[str, int]) -> str:
    """Those counters, with the words for them, that are not 0."""
    return ", ".join(f"{name} {count[name]} ({words[name]})" for name in words if count[name])


def printable(text: str) -> str:
    """One line, with nothing in it that a terminal could take for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Failure(Exception):
    """What ends the run, as the one line that the user gets, and the lines behind it of a compiler's.
    status: 2 for usage, 1 for the rest."""

    def __init__(self, message: str, status: int = 1, detail: str = "") -> None:
        super().__init__(printable(message) + (f"\n{detail}" if detail else ""))
        self.status = status


# ---- Configuration ------------------------------------------------------------------------------


class Frame(enum.IntEnum):
    """What packets on a device begin with; as in elfprobe.c."""

    ETHERNET = 0
    IP = 1
    TUNNEL = 2  # IP, but XDP may be shown the tunnel's headers in front


@dataclasses.dataclass(frozen=True)
class Config:
    """The command line, checked as far as it can be without looking at the machine."""

    interface: str
    addresses: tuple[str, ...] = ()
    apps: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    encapsulation: str = "ethernet"
    ingress: str = "drop"
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

    def build_flags(
        self,
        frame: Frame = Frame.ETHERNET,
        by_owner: bool = False,
        tick: int = 0,
        old_maps: bool = False,
        preemptible: bool = False,
    ) -> dict[str, str]:
        """The -D flags of elfprobe.c; tick in ns, 0: not to be used."""
        waiting = self.max_rate * (UNANSWERED_AFTER + 1)
        pages = power_of_two(max(self.max_rate * RING_HOLDS * RESULT_BYTES / RING_PAGE, RING_PAGES_MIN))
        return {
            "FRAME": str(int(frame)),
            "TUNNEL": str(TUNNELS[self.encapsulation]),
            "NOTRUNC": str(int(self.notrunc)),
            "RATE_GLOBAL": str(int(self.rate_global)),
            "INTERVAL_NS": f"{self.probeint * 1000000}ULL",
            "MAX_RATE": f"{self.max_rate}ULL",
            "SALT": str(self.salt),
            "INGRESS_DROP": str(int(self.ingress == "drop")),
            "TICK_NS": f"{tick}ULL",
            "BY_OWNER": str(int(by_owner)),
            "BY_APP": str(int(by_owner and bool(self.apps))),
            "DESTINATIONS_MAX": str(DESTINATIONS_MAX),
            "PEERS_MAX": str(PEERS_MAX if by_owner else 1),
            "IN_FLIGHT_MAX": str(power_of_two(min(max(waiting, 1024), 1 << 18))),
            "OLD_MAPS": str(int(old_maps)),
            "PREEMPTIBLE": str(int(preemptible)),
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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise Failure(message, 2)


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


def not_empty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


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


# ---- Addresses: 16 bytes, IPv4 as v4-mapped (RFC 4291, 2.5.5.2), as in elfprobe.c -----------------

V4_MAPPED = bytes(10) + b"\xff\xff"


def pack_address(text: str) -> bytes:
    """16 bytes of an IPv4 or IPv6 address, a scope left out; ValueError for anything else."""
    address = ipaddress.ip_address(text.split("%")[0])
    return V4_MAPPED + address.packed if address.version == 4 else address.packed


@functools.lru_cache(maxsize=65536)
def address_text(packed: bytes) -> str:
    if packed.startswith(V4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


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


def choose_processes(
    processes: Iterable[Process], apps: Iterable[str], pids: Iterable[int]
) -> dict[int, str]:
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


def mark_of(packed: bytes) -> int:
    """Which of all marks an address has: mark_of() of elfprobe.c."""
    first, second, third, fourth = struct.unpack("=4I", packed)
    number: int = (first ^ second ^ third ^ fourth) * 0x9E3779B1 & 0xFFFFFFFF
    return number >> 12


class Destinations:
    """The kernel's table of destinations of interest, with their marks."""

    IN_PATHS = 1  # as in elfprobe.c

    def __init__(self, bpf: Any) -> None:
        self._paths = bpf["paths"]
        self._marks = bpf["marks"]
        self._marks_per_line = ctypes.sizeof(self._marks.Leaf)
        self._lines: dict[int, Any] = {}  # what of the marks is not empty
        self._removed: dict[bytes, tuple[int, int]] = {}  # what holds for the whole run: seq, left_alone
        self._full = False

    def add(self, packed: bytes, path: Any = None) -> bool:
        """Makes an address one of interest, with nothing known of the way there or this struct path.
        False where there is no room; the first time that is logged."""
        if path is None:
            seq, left_alone = self._removed.get(packed, (0, 0))
            path = self._paths.Leaf(seq=seq, left_alone=left_alone)
        try:
            self._paths[self._paths.Key.from_buffer_copy(packed)] = path
        except Exception as err:  # BCC raises a bare Exception where the table is full
            if not self._full:
                log.warning("no room for more destinations (%s): %s is left out", err, address_text(packed))
            self._full = True
            return False
        self._removed.pop(packed, None)
        number, place = divmod(mark_of(packed), self._marks_per_line)
        line = self._lines.get(number) or self._lines.setdefault(number, self._marks.Leaf())
        if not line.marks[place]:
            line.marks[place] = self.IN_PATHS
            self._marks[self._marks.Key(number)] = line
        return True

    def remove(self, packed: bytes) -> None:
        key = self._paths.Key.from_buffer_copy(packed)
        with contextlib.suppress(KeyError):
            path = self._paths[key]
            self._removed[packed] = path.seq, path.left_alone
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
    """What is missing for telling in the kernel whose a packet is."""


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
        self._owner = bpf["owner_layout"].Leaf
        self._sockets = bcc.lib.bpf_table_fd(bpf.module, b"sockets")
        self._layout = bpf["process_event_layout"].Leaf
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
            if self._processes.Leaf.from_buffer_copy(value).interest == OF_INTEREST
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
        entry = self._processes.Leaf(id=process_id, interest=OF_INTEREST)
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
        owner = self._owner(process=process.id, interest=process.interest, pid=pid)
        owner.app.text = process.app.text
        known = self._owner()
        try:
            for found in duplicated_sockets(pid):
                key = ctypes.c_int(found.fileno())
                tagged = bcc.lib.bpf_lookup_elem(self._sockets, ctypes.byref(key), ctypes.byref(known)) == 0
                if not (tagged and known.interest == OF_INTEREST):
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
            if event and event.interest:
                self._decide(event.id, event.pid, event.interest)
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
        inherits = parent is not None and parent.interest == OF_INTEREST  # it was found so after the fork
        if interest == OF_INTEREST or inherits or self._apps & process_names(process):
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


def load_program(
    config: Config,
    by_owner: bool = False,
    warnings: bool = False,
    ticks: bool = True,
    frame: Frame = Frame.ETHERNET,
) -> Any:
    """Compiles and loads elfprobe.c; gives BCC's object, its programs in .funcs. Raises Failure."""
    text = program_text(config.hooks)
    tick = round(time.clock_getres(CLOCK_MONOTONIC_COARSE) * 1e9) if ticks else 0
    parameters = config.build_flags(frame, by_owner, tick, not has_ring_buffer(), is_preemptible())
    flags = [f"-D{name}={value}" for name, value in parameters.items()]
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
    kinds: dict[str, tuple[Any, ...]] = {"elf_egress": sched_cls}
    kinds.update(elf_probe=sched_cls, elf_ingress=(bcc.BPF.XDP,))
    if by_owner:
        # Without an attach type, which older BCC cannot pass on, the kernel takes it for sock_create's.
        kinds["elf_sock_create"] = (bcc.BPF.CGROUP_SOCK,)
        kinds.update({name.decode(): tracepoint for name in SocketOwners.AT_TRACEPOINTS})
    for name, kind in kinds.items():
        try:
            with captured_stderr(messages):
                bpf.load_func(name, *kind)
        except Exception as err:
            if ticks and "#118" in messages[-1]:  # bpf_jiffies64()
                unload(bpf)
                return load_program(config, by_owner, warnings, False, frame)
            detail = "\n".join(messages[-1].strip().splitlines()[-40 if config.debug else -3 :])
            kernel = f"the kernel (Linux {os.uname().release})"
            raise Failure(f"{kernel} does not take {name}: {err}", detail=detail) from err
    with contextlib.suppress(AttributeError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what the compiler had, some 20 MB
    tail_calls = bpf["programs"]
    tail_calls[tail_calls.Key(0)] = tail_calls.Leaf(bpf.funcs[b"elf_probe"].fd)
    return bpf


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
    return Device(name, ifindex, frame)


def device_is_up(device: Device) -> bool:
    """Raises OSError where there is no such device any more."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16s24x", socket.if_indextoname(device.ifindex).encode())
        reply = fcntl.ioctl(any_socket, SIOCGIFFLAGS, request)  # struct ifreq, netdevice(7)
    return bool(struct.unpack_from("16xH", reply)[0] & IFF_UP)


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


def create_link(program: int, target: int, attach_type: int, options: LinkOptions | None = None) -> int:
    """The descriptor of a BPF link. Raises OSError, EINVAL where the kernel or BCC knows none of the kind."""
    try:
        link: int = bcc.lib.bpf_link_create(program, target, attach_type, options and ctypes.byref(options))
    except AttributeError as err:  # an older BCC
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from err
    if link < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return link


def link_xdp(ipr: Any, device: Device, fd: int, mode: int, stack: contextlib.ExitStack) -> None:
    """Attaches until the stack unwinds. By a BPF link, which goes with this process, however that
    ends; before Linux 5.9, which has none for XDP, for good, until it is detached. Raises OSError."""
    options = LinkOptions(sz=ctypes.sizeof(LinkOptions), flags=mode)
    try:
        stack.callback(os.close, create_link(fd, device.ifindex, BPF_XDP, options))
        return
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
    stack.callback(quietly_gone, remove_xdp, ipr, device, program_info(fd).id)
    set_xdp(device, fd, mode | XDP_FLAGS_UPDATE_IF_NOEXIST)


@contextlib.contextmanager
def xdp_attachment(ipr: Any, device: Device, fd: int) -> Iterator[str]:
    """Attaches to XDP, native where the device can, and yields the mode. Raises Failure."""
    found = attached_xdp(ipr, device)
    if found and program_name(found.prog_id) == "elf_ingress":
        remove_xdp(ipr, device, found.prog_id)
        log.warning("an XDP program that a killed elfprobe left on %s is removed", device.name)
        found = attached_xdp(ipr, device)
    if found:
        name = program_name(found.prog_id) or "without a name"
        raise interface_failure(
            f"'{device.name}' has an XDP program already: {name}, id {found.prog_id}; it stays"
        )
    with contextlib.ExitStack() as stack:
        mode = "native"
        try:
            link_xdp(ipr, device, fd, XDP_FLAGS_DRV_MODE, stack)
        except OSError as native:
            log.debug("native XDP: %s", native)
            mode = "generic"
            try:
                link_xdp(ipr, device, fd, XDP_FLAGS_SKB_MODE, stack)
            except OSError as err:
                raise Failure(f"'{device.name}' takes no XDP program: {err.strerror}") from err
        yield mode


# Of our TC filter. The second tells the run that clears up after a kill that the qdisc was ours too.
FILTER_NAME = "elfprobe"
FILTER_NAME_QDISC_OURS = "elfprobe+clsact"


class TcFilter(NamedTuple):
    kind: str
    prio: int
    protocol: int
    handle: int
    name: str


def egress_filters(ipr: Any, device: Device, parent: int = CLSACT_EGRESS) -> list[TcFilter]:
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


def remove_filter(ipr: Any, device: Device, ours: TcFilter) -> None:
    which = dict(handle=ours.handle, prio=ours.prio, protocol=ours.protocol, parent=CLSACT_EGRESS)
    tc_delete(ipr, "del-filter", RTM_DELTFILTER, "bpf", device, **which)


def remove_clsact(ipr: Any, device: Device) -> None:
    """Removes the clsact qdisc that we added, unless somebody has come to use it."""
    ingress = CLSACT_EGRESS - 1
    if has_clsact(ipr, device) and not (egress_filters(ipr, device) or egress_filters(ipr, device, ingress)):
        tc_delete(ipr, "del", RTM_DELQDISC, "clsact", device)


def remove_ours(ipr: Any, device: Device, ours: TcFilter) -> None:
    """Removes our filter, and the clsact qdisc if that is ours, too. Without the filter it is not any
    more: who removed our qdisc took the filter away with it, and what is there now is theirs."""
    if ours in egress_filters(ipr, device):
        remove_filter(ipr, device, ours)
        if ours.name == FILTER_NAME_QDISC_OURS:
            remove_clsact(ipr, device)


@contextlib.contextmanager
def tc_attachment(ipr: Any, device: Device, fd: int) -> Iterator[TcFilter]:
    """Attaches to TC egress, as early among the filters that are there as can be; yields our filter. Raises
    Failure."""
    for stale in [found for found in egress_filters(ipr, device) if found.name.startswith(FILTER_NAME)]:
        remove_ours(ipr, device, stale)
        log.warning("a TC filter that a killed elfprobe left on %s is removed", device.name)
    with contextlib.ExitStack() as stack:
        name = FILTER_NAME
        if not has_clsact(ipr, device):
            name = FILTER_NAME_QDISC_OURS
            stack.callback(quietly_gone, remove_clsact, ipr, device)
            try:
                ipr.tc("add", "clsact", device.ifindex)
            except pyroute2.NetlinkError as err:
                if err.code == errno.EEXIST:
                    raise interface_failure(
                        f"'{device.name}' has an ingress qdisc, beside which there can be no clsact; "
                        "filters work with clsact's ingress as with it"
                    ) from err
                raise Failure(f"'{device.name}' takes no clsact qdisc: {err}") from err
        taken = {found.prio for found in egress_filters(ipr, device)}
        prio = next(free for free in range(1, 0x10000) if free not in taken)
        if prio > 1:
            log.info("filters of others come first on TC egress: what they take is not seen")
        ours = TcFilter("bpf", prio, ETH_P_ALL, 1, name)
        stack.callback(quietly_gone, remove_ours, ipr, device, ours)
        try:
            ipr.tc(
                "add-filter", "bpf", device.ifindex, handle=ours.handle, prio=ours.prio, fd=fd, name=name,
                parent=CLSACT_EGRESS, protocol=ours.protocol, direct_action=True, classid=1,
            )  # fmt: skip
        except pyroute2.NetlinkError as err:
            raise Failure(f"'{device.name}' takes no TC filter: {err}") from err
        stack.pop_all()  # from here on the filter tells whose the qdisc is
        stack.callback(quietly_gone, remove_ours, ipr, device, ours)
        yield ours


def quietly_gone(function: Callable[..., None], ipr: Any, device: Device, *args: Any) -> None:
    """Calls a function that detaches; what is not there any more need not be."""
    try:
        function(ipr, device, *args)
    except (pyroute2.NetlinkError, OSError) as err:
        code = getattr(err, "code", None) or getattr(err, "errno", None)
        if code not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            log.error("could not detach from %s: %s", device.name, err)


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
            failed = bcc.lib.bpf_lookup_batch(
                table.map_fd, after, place, keys, values, ctypes.byref(count)
            )
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


# Of what is known of a probe, what the summary wants: Summary.note().
ENDED = ("dest", "outttl", "sport", "dport", "protocol", "sendtime", "srtt", "cwnd", "retrans")


class Results:
    """Everything there is to know of probes that ended, from the kernel's maps to rows of text."""

    def __init__(self, bpf: Any) -> None:
        self._bpf = bpf
        self._in_flight = bpf["in_flight"]
        self._chunks: list[bytes] = []
        extended = bpf["result_layout"].Leaf
        layout, names = struct_format(dict(extended._fields_)["result"])
        self._result = struct.Struct(layout)
        self._row = rows_of(names)
        self.changes = Changes(names)
        self.summary = Summary(Names().with_name)
        self._ended = operator.itemgetter(*map(names.index, (*ENDED, "recvtime", "responder")))
        self._extended_chunks: list[bytes] = []
        self._extended_size = ctypes.sizeof(extended)
        self._extension_len = extended.extension_len.offset
        self._extension = extended.extension
        probe_layout, probe_names = struct_format(self._in_flight.Leaf)
        key_layout, key_names = struct_format(self._in_flight.Key)
        self._unanswered = struct.Struct(probe_layout + key_layout[1:])
        self._unanswered_row = rows_of(probe_names + key_names)
        self._ended_unanswered = operator.itemgetter(*map((probe_names + key_names).index, ENDED))
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
        """Rows of all replies that came since the last call."""
        take_events(self._bpf)
        if not self._chunks and not self._extended_chunks:
            return ""
        data, self._chunks = b"".join(self._chunks), []
        rows = []
        for fields in self._result.iter_unpack(data):
            rows.append(self._row(fields))
            self._note(fields)
        extended, self._extended_chunks = self._extended_chunks, []
        rows += map(self._extended_row, extended)
        self.replies += len(rows)
        return "".join(rows)

    def _note(self, fields: tuple[Any, ...]) -> None:
        self.changes.note(fields)
        self.summary.note(*self._ended(fields))

    def _extended_row(self, data: bytes) -> str:
        fields = self._result.unpack_from(data)
        self._note(fields)
        (size,) = struct.unpack_from("=I", data, self._extension_len)
        try:
            start, is_cut = self._extension.offset, size == self._extension.size
            mpls, ifinfo = extension_texts(data[start : start + size], is_cut)
        except (ValueError, struct.error, IndexError):
            self.malformed += 1
            mpls = ifinfo = ""
        return f"{self._row(fields)[:-2]}{mpls},{csv_field(ifinfo)}\n"

    def expire(self, sent_before: int) -> str:
        """Rows of the probes still in flight that left before this time (CLOCK_MONOTONIC, ns)."""
        rows = []
        for key, probe in list(entries(self._in_flight)):
            fields = self._unanswered.unpack(probe + key)
            if fields[self._sendtime] >= sent_before:
                continue
            if bcc.lib.bpf_delete_elem(self._in_flight.map_fd, key):
                continue  # its reply has come meanwhile, and the row with it
            rows.append(self._unanswered_row(fields))
            self.summary.note(*self._ended_unanswered(fields))
        self.unanswered += len(rows)
        return "".join(rows)


def csv_field(text: str) -> str:
    """Quoted where that is needed, without control characters."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return '"' + text.replace('"', '""') + '"' if '"' in text or "," in text else text


@functools.lru_cache(maxsize=65536)
def app_text(comm: bytes) -> str:
    """A command name as a field of the CSV."""
    return csv_field(comm.split(b"\0")[0].decode(errors="replace"))


# What routers tell behind their quotes: ICMP extension objects (RFC 4884, 7 and 8).
EXTENSION_VERSION = 2
MPLS_LABEL_STACK, INTERFACE_INFORMATION = (1, 1), 2  # class and type (RFC 4950); class (RFC 5837)
INTERFACE_ROLES = ("incoming", "sub-ip", "outgoing", "next-hop")
WITH_IFINDEX, WITH_ADDRESS, WITH_NAME, WITH_MTU = 8, 4, 2, 1  # bits of an interface object's type
ADDRESS_FAMILIES = {1: (socket.AF_INET, 4), 2: (socket.AF_INET6, 16)}  # of IANA -> ours, bytes


@functools.lru_cache(maxsize=4096)
def extension_texts(data: bytes, is_cut: bool = False) -> tuple[str, str]:
    """The MPLS label stack, "label/tc/s/ttl" joined by ";", and the interfaces, "name=value" joined by ";",
    several by "|". Objects of other kinds are passed over. Of what is_cut, the checksum cannot be told.
    ValueError, IndexError or struct.error for what is malformed."""
    version, checksum = data[0] >> 4, struct.unpack_from("!H", data, 2)[0]
    if version != EXTENSION_VERSION:
        raise ValueError("not version 2")
    if checksum and not is_cut and ones_complement_sum(data) != 0xFFFF:
        raise ValueError("wrong checksum")
    labels: list[str] = []
    interfaces: list[str] = []
    at = 4
    while at < len(data):
        size, kind, subtype = struct.unpack_from("!HBB", data, at)
        if size < 4 or at + size > len(data):
            raise ValueError("an object of no possible length")
        content = data[at + 4 : at + size]
        if (kind, subtype) == MPLS_LABEL_STACK:
            for (entry,) in struct.iter_unpack("!I", content):
                labels.append(f"{entry >> 12}/{entry >> 9 & 7}/{entry >> 8 & 1}/{entry & 255}")
        elif kind == INTERFACE_INFORMATION:
            interfaces.append(interface_text(subtype, content))
        at += size
    return ";".join(labels), "|".join(interfaces)


def interface_text(subtype: int, content: bytes) -> str:
    """An interface information object (RFC 5837, 4)."""
    parts = [f"role={INTERFACE_ROLES[subtype >> 6]}"]
    if subtype & WITH_IFINDEX:
        parts.append(f"index={struct.unpack_from('!I', content)[0]}")
        content = content[4:]
    if subtype & WITH_ADDRESS:
        number = struct.unpack_from("!H", content)[0]
        if number not in ADDRESS_FAMILIES:
            raise ValueError("an address of no known family")
        family, size = ADDRESS_FAMILIES[number]
        parts.append(f"addr={socket.inet_ntop(family, content[4 : 4 + size])}")
        content = content[4 + size :]
    if subtype & WITH_NAME:
        size = content[0]
        if not 1 <= size <= len(content):
            raise ValueError("a name of no possible length")
        parts.append("name=" + content[1:size].rstrip(b"\0").decode(errors="replace"))
        content = content[size:]
    if subtype & WITH_MTU:
        parts.append(f"mtu={struct.unpack_from('!I', content)[0]}")
    return ";".join(parts)


def ones_complement_sum(data: bytes) -> int:
    """In 16 bits (RFC 1071): 0xFFFF over what includes its own checksum."""
    words = struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    total: int = (sum(words) - 1) % 0xFFFF + 1
    return total


class Changes:
    """From which hop on packets to a destination are quoted with something changed on the way."""

    def __init__(self, names: list[str]) -> None:
        at = {name: position for position, name in enumerate(names)}
        self._outtos, self._intos, self._translated = at["outtos"], at["intos"], at["translated"]
        self._dest, self._outttl, self._responder = at["dest"], at["outttl"], at["responder"]
        self._first: dict[tuple[bytes, str], tuple[int, bytes]] = {}  # dest, what -> hop, responder

    def note(self, v: tuple[Any, ...]) -> None:
        if v[self._intos] != v[self._outtos]:
            self._note_change(v, f"DSCP/ECN {v[self._outtos]:#04x} becomes {v[self._intos]:#04x}")
        if v[self._translated]:
            self._note_change(v, "the source address is translated")

    def _note_change(self, v: tuple[Any, ...], what: str) -> None:
        key = v[self._dest], what
        found = self._first.get(key)
        if found is None and len(self._first) >= CHANGES_MAX:
            return
        if found is None or v[self._outttl] < found[0]:
            self._first[key] = v[self._outttl], v[self._responder]

    def texts(self) -> Iterator[str]:
        for (dest, what), (hop, responder) in sorted(self._first.items()):
            yield f"to {address_text(dest)}: {what} before hop {hop} ({address_text(responder)})"


# ---- The summary: what the rows say, hop by hop -----------------------------------------------------

# ns, 2 % apart, 1 us to 11 s: what is between two of them counts as one value once there are many.
BOUNDS = [round(1000 * 1.02**number) for number in range(820)]
MIDDLES = [(low + high) / 2 for low, high in zip([BOUNDS[0], *BOUNDS], [*BOUNDS, BOUNDS[-1]])]
FRESH_MAX = 512  # values that are kept as they are
ENOUGH_PROBES = 20  # for a hop's share of answers to mean something
MISSING_MIN = 0.005  # share of missing answers that is worth a word
SIGMAS = 3  # that two shares must be apart
SILENT_FROM = 3  # s without an answer, while others answer in more seconds than that
SPELLS_MAX = 5  # of silence, of a hop, that are kept
RESPONDERS_MAX = 64  # of a hop


class Spread:
    """How numbers (ns) are spread, in little memory: exactly as long as they are few, then with quantiles
    to 1 %."""

    __slots__ = ("_fresh", "_settled", "_folded", "_counts", "_least", "_greatest", "_last", "_steps")

    def __init__(self) -> None:
        self._fresh = array.array("Q")  # values as they came, the last ones
        self._settled = 0  # so many of these are in the figures from _least on
        self._folded = 0  # values that were here and are in _counts only
        self._counts = array.array("Q")  # by place among BOUNDS, once there are some
        self._least = self._greatest = self._last = self._steps = 0

    @property
    def count(self) -> int:
        return self._folded + len(self._fresh)

    def add(self, value: int) -> None:
        self._fresh.append(value)
        if len(self._fresh) >= FRESH_MAX:
            self._fold()

    def _settle(self) -> None:
        new = self._fresh[self._settled :]
        if not new:
            return
        is_first = not self._folded and not self._settled
        self._least = min(new) if is_first else min(self._least, *new)
        self._greatest = max(self._greatest, *new)
        before = [new[0] if is_first else self._last, *new]
        self._steps += sum(map(abs, map(operator.sub, new, before)))
        self._last = new[-1]
        self._settled = len(self._fresh)

    def _fold(self) -> None:
        self._settle()
        self._counts = self._counts or array.array("Q", bytes(8 * len(MIDDLES)))
        for place in map(functools.partial(bisect.bisect, BOUNDS), self._fresh):
            self._counts[place] += 1
        self._folded += len(self._fresh)
        self._settled = 0
        del self._fresh[:]

    def figures(self) -> Figures:
        """Of what has been added, at least one value."""
        if self._counts:
            self._fold()
            middles, upto = MIDDLES, list(itertools.accumulate(self._counts))
        else:
            self._settle()
            middles, upto = sorted(self._fresh), list(range(1, self.count + 1))
        median, percentile95, percentile99 = (
            min(max(middles[bisect.bisect_left(upto, share * self.count)], self._least), self._greatest)
            for share in (0.5, 0.95, 0.99)
        )
        jitter = self._steps / max(self.count - 1, 1)
        return Figures(self._least, median, percentile95, percentile99, self._greatest, jitter)


class Figures(NamedTuple):
    """ns; jitter is the mean difference of two values in a row, as mtr's Javg."""

    least: float
    median: float
    percentile95: float
    percentile99: float
    greatest: float
    jitter: float


class Spell(NamedTuple):
    """A hop that had answered was silent, while another answered: the one in front, and the one behind?"""

    begin: int  # s, CLOCK_MONOTONIC
    seconds: int
    ends_the_way: bool  # those behind were silent, too

    def overlaps(self, other: Spell) -> bool:
        return self.begin < other.begin + other.seconds and other.begin < self.begin + self.seconds


class Hop:
    """What is known of the probes with one TTL to one destination that have ended."""

    __slots__ = (
        "latency", "unanswered", "responders", "changes", "spells", "active", "second", "_others_then",
    )  # fmt: skip

    def __init__(self) -> None:
        self.latency = Spread()
        self.unanswered = 0
        self.responders: collections.Counter[Any] = collections.Counter()
        self.changes = 0  # of a flow's responder
        self.spells: list[Spell] = []
        self.active = 0  # seconds in which a probe left that was answered
        self.second = 0  # the last of them
        self._others_then = 0, 0  # active, of the hops in front and behind

    @property
    def probes(self) -> int:
        return self.latency.count + self.unanswered

    @property
    def missing(self) -> float:
        """Share of the probes that were not answered."""
        return self.unanswered / self.probes

    def misses_clearly_more(self, other: Hop) -> bool:
        """By a test of two proportions."""
        pooled = (self.unanswered + other.unanswered) / (self.probes + other.probes)
        error = math.sqrt(pooled * (1 - pooled) * (1 / self.probes + 1 / other.probes))
        return self.missing - other.missing > SIGMAS * error

    def note_second(self, second: int, front: Hop | None, behind: Hop | None) -> None:
        """An answered probe left in another second than the last. front and behind are the next hops that
        answer."""
        spell = self.spell_until(second, front, behind)
        if spell and len(self.spells) < SPELLS_MAX:
            self.spells.append(spell)
        self.second = second
        self.active += 1
        self._others_then = front.active if front else 0, behind.active if behind else 0

    def spell_until(self, second: int, front: Hop | None, behind: Hop | None) -> Spell | None:
        """How it was silent from its last answer until then, if others were not."""
        seconds = second - self.second
        if not self.active or seconds <= SILENT_FROM:
            return None
        front_since, behind_since = (
            (other.active if other else 0) - then for other, then in zip((front, behind), self._others_then)
        )
        if max(front_since, behind_since) <= SILENT_FROM:
            return None
        return Spell(self.second, seconds, behind_since <= SILENT_FROM)


class Destination:
    """The way to a destination, by TTL, and how TCP to it got on."""

    def __init__(self) -> None:
        self.hops: dict[int, Hop] = {}
        self.srtt = Spread()
        self.retransmitted = 0  # segments, by the probed flows since they began
        self.recent = 0.0  # probes lately
        self.seen = 0  # when the last one left, ns

    @property
    def probes(self) -> int:
        return sum(hop.probes for hop in self.hops.values())

    def neighbours(self, number: int) -> tuple[Hop | None, Hop | None]:
        """The next hops that answer, in front of this one and behind."""
        answering = [other for other, hop in self.hops.items() if hop.active]
        front = max((other for other in answering if other < number), default=0)
        behind = min((other for other in answering if other > number), default=0)
        return self.hops.get(front), self.hops.get(behind)

    def remarks(self) -> Iterator[str]:
        """Where answers are missing, and why, as far as the hops behind and TCP tell; and what changed."""
        spells = dict(self._spells())
        answering = [(number, hop) for number, hop in sorted(self.hops.items()) if hop.latency.count]
        for number, _ in answering:
            yield from self._remarks_on_spells(number, spells)
        enough = [(number, hop) for number, hop in answering if hop.probes >= ENOUGH_PROBES]
        lossy: Hop | None = None
        for at, (number, hop) in enumerate(enough):
            if hop.missing < MISSING_MIN or hop.unanswered < 3 or spells[number]:
                continue
            behind = [item for item in enough[at + 1 :] if not spells[item[0]]]
            best, other = min(behind, key=lambda item: item[1].missing, default=(0, hop))
            missing = f"{hop.missing:.1%} of the probes to hop {number} are not answered"
            if hop.misses_clearly_more(other):
                yield (
                    f"hop {number} limits the rate of its answers: {missing}, but {1 - other.missing:.1%} of "
                    f"those that pass it on their way to hop {best}"
                )
            elif lossy is None or hop.misses_clearly_more(lossy):
                lossy = hop
                if not behind:
                    yield f"{missing}: no hop behind it tells whether it loses packets{self._tcp_says(hop)}"
                elif other.missing < hop.missing / 2:
                    yield f"{missing}; those to hop {best} are too few to tell why"
                else:
                    but = self._tcp_says(hop) or ", unless all of them limit their answers"
                    where = f"packets are lost at hop {number} or on the way to it"
                    yield f"{where}: {missing}, and not clearly fewer to those behind it{but}"
        for number, hop in answering:
            if hop.changes * 4 > hop.latency.count:
                yield f"hop {number} is {len(hop.responders)} routers in turn, within the same flow"
            elif hop.changes:
                yield f"hop {number} changed {'once' if hop.changes == 1 else f'{hop.changes} times'}"

    def _tcp_says(self, hop: Hop) -> str:
        """Of loss as large as the hop's missing answers. Loss of answers, too, is in these."""
        if not self.srtt.count:
            return ""
        if self.retransmitted < hop.missing * self.srtt.count / 10:
            few = f"only {self.retransmitted}" if self.retransmitted else "no"
            return f"; but TCP retransmitted {few} segments, so rather answers are limited"
        return f"; TCP retransmitted {self.retransmitted} segments"

    def _spells(self) -> Iterator[tuple[int, list[Spell]]]:
        """By hop, with those that last."""
        now = self.seen // 10**9
        for number, hop in self.hops.items():
            lasting = hop.spell_until(now, *self.neighbours(number))
            yield number, hop.spells + [lasting] if lasting else hop.spells

    def _remarks_on_spells(self, number: int, spells: dict[int, list[Spell]]) -> Iterator[str]:
        nearer = [spell for other in spells if other < number for spell in spells[other]]
        nearer = [spell for spell in nearer if spell.ends_the_way]
        for spell in spells[number]:
            when = f"for {spell.seconds} s from {spell.begin} s on (CLOCK_MONOTONIC)"
            if not spell.ends_the_way:
                yield f"hop {number} was silent {when}, but not those behind it"
            elif not any(spell.overlaps(other) for other in nearer):
                yield f"from hop {number} on there was no answer {when}"


def flow_text(dest: str, sport: int, dport: int, protocol: int) -> str:
    """Ports as on the wire."""
    sport, dport, name = socket.ntohs(sport), socket.ntohs(dport), PROTOCOLS.get(protocol, str(protocol))
    if name.startswith("ICMP"):
        return f"{name} echo {sport} to {dest}"
    return f"{name} port {sport} to {dest} port {dport}"


# Of the table: what is above a figure, those that a narrow one has not, and the columns of a wide one.
FIGURE_HEADS = dict(zip(Figures._fields, ("min", "median", "95%", "99%", "max", "jitter")))
LESS_TELLING = "percentile99", "jitter"
WIDE = 100


class Flow:
    """What was seen of a flow last."""

    __slots__ = ("retrans", "seen", "responders", "since")

    def __init__(self) -> None:
        self.retrans = 0
        self.seen = 0  # when the last probe was sent that told it
        self.responders: dict[int, Any] = {}
        self.since: dict[int, int] = {}  # hop -> when the first probe left that its responder answered


class Names:
    """Host names of addresses, asked for in the background: nothing ever waits for them."""

    def __init__(self) -> None:
        self._known: dict[bytes, str] = {}
        self._asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._threads = 0

    def of(self, packed: bytes) -> str:
        """The name, empty where there is none or it is not known yet."""
        if packed not in self._known and len(self._known) < NAMES_MAX:
            self._known[packed] = ""
            self._asked.put(packed)
            if self._threads < RESOLVERS:
                self._threads += 1
                threading.Thread(target=self._resolve, daemon=True).start()
        return self._known.get(packed, "")

    def with_name(self, packed: bytes) -> str:
        return f"{address_text(packed)} {self.of(packed)}".rstrip()

    def _resolve(self) -> None:
        while True:
            packed = self._asked.get()
            with contextlib.suppress(OSError, UnicodeError):
                self._known[packed] = printable(socket.gethostbyaddr(address_text(packed))[0])


class Summary:
    """Of all probes that have ended, by destination and hop, in bounded memory. text_of makes what is
    printed of an address, which is packed or whatever else note() gets."""

    def __init__(self, text_of: Callable[[Any], str] = address_text) -> None:
        self._text_of = text_of
        self._destinations: dict[Any, Destination] = {}
        self._flows: dict[tuple[Any, int, int, int], Flow] = {}
        self._are_forgotten = False  # some flows
        self._hops = 0
        self._left_out = 0  # probes

    def note(
        self, dest: Any, number: int, sport: int, dport: int, protocol: int, sendtime: int,
        srtt: int = 0, cwnd: int = 0, retrans: int = 0, recvtime: int = 0, responder: Any = b"",
    ) -> None:  # fmt: skip
        """A probe with this TTL has ended; without a responder it was not answered. Times in ns, srtt in
        us, ports as on the wire."""
        destination = self._destinations.get(dest)
        if destination is None:
            destination = self._destinations[dest] = Destination()
            self._text_of(dest)  # so that its name is asked for
        hop = destination.hops.get(number)
        if hop is None:
            if self._hops >= HOPS_MAX:
                self._make_room(destination)
            self._hops += 1
            hop = destination.hops[number] = Hop()
        destination.recent += 1
        if sendtime > destination.seen:
            destination.seen = sendtime
        flow = self._flows.get((dest, sport, dport, protocol))
        if flow is None:
            flow = self._new_flow((dest, sport, dport, protocol), retrans)
        if cwnd:
            if retrans < flow.retrans and sendtime > flow.seen + ANOTHER_AFTER:
                flow.retrans = 0  # another connection by the same ports
            if retrans > flow.retrans:
                destination.retransmitted += retrans - flow.retrans
                flow.retrans = retrans
            flow.seen = max(flow.seen, sendtime)
            if srtt:
                destination.srtt.add(srtt * 1000)
        if not responder:
            hop.unanswered += 1
            return
        hop.latency.add(recvtime - sendtime)
        second = sendtime // 10**9
        if second > hop.second:
            hop.note_second(second, *destination.neighbours(number))
        if responder in hop.responders or len(hop.responders) < RESPONDERS_MAX:
            hop.responders[responder] += 1
        before = flow.responders.get(number)
        if before != responder:
            self._text_of(responder)
            if before is not None:
                if sendtime < flow.since[number]:
                    return  # a late answer, of the way that was
                self._note_change(hop, (dest, sport, dport, protocol), number, before, responder)
            flow.responders[number] = responder
            flow.since[number] = sendtime

    def _make_room(self, newest: Destination) -> None:
        """Forgets the quarter of the destinations that were not probed for longest."""
        ordered = sorted(self._destinations.items(), key=lambda item: item[1].seen)
        for dest, destination in ordered[: len(ordered) // 4 + 1]:
            if destination is not newest:
                self._left_out += destination.probes
                self._hops -= len(destination.hops)
                del self._destinations[dest]

    def _new_flow(self, key: tuple[Any, int, int, int], retrans: int) -> Flow:
        if len(self._flows) >= FLOWS_MAX:
            self._are_forgotten = True
            for oldest in list(itertools.islice(self._flows, FLOWS_MAX // 4)):
                del self._flows[oldest]
        flow = self._flows[key] = Flow()
        if self._are_forgotten:  # perhaps this one was, and what it sent again is counted
            flow.retrans = retrans
        return flow

    def _note_change(
        self, hop: Hop, flow: tuple[Any, int, int, int], number: int, before: Any, after: Any
    ) -> None:
        hop.changes += 1
        if hop.changes > CHANGES_TOLD:
            return
        more = "; from now on its changes are only counted" if hop.changes == CHANGES_TOLD else ""
        log.info("%s: hop %d is now %s, no longer %s%s", flow_text(self._text_of(flow[0]), *flow[1:]), number,
                 self._text_of(after), self._text_of(before), more)  # fmt: skip

    def tables(self, most: int = TABLES_MAX) -> list[str]:
        """Lines: a table for each of the destinations with most probes, and what there is to say of it."""
        ordered = sorted(self._destinations.items(), key=lambda item: -item[1].probes)
        lines = [line for item in ordered[:most] for line in self._table(*item)]
        if len(ordered) > most:
            lines.append(f"{len(ordered) - most} more destinations, with fewer probes each")
        if self._left_out:
            lines.append(f"{self._left_out} probes to destinations not probed lately are only in the rows")
        return lines

    def busiest(self, room: int, columns: int) -> list[str]:
        """As many lines at most, for so many columns: tables of the destinations that are probed most these
        days."""
        lines: list[str] = []
        for dest, destination in sorted(
            self._destinations.items(), key=lambda item: (-int(math.log2(item[1].recent + 1)), item[0])
        ):
            destination.recent /= 2
            if len(lines) < room:
                lines += self._table(dest, destination, columns < WIDE)
        return lines[:room]

    def _table(self, dest: Any, destination: Destination, is_narrow: bool = False) -> Iterator[str]:
        names = [name for name in Figures._fields if not (is_narrow and name in LESS_TELLING)]

        def figures(spread: Spread) -> str:
            found = spread.figures()
            return " ".join(f"{getattr(found, name) / 1e6:8.3f}" for name in names)

        answering = [number for number, hop in destination.hops.items() if hop.latency.count]
        heads = " ".join(f"{FIGURE_HEADS[name]:>8}" for name in names)
        yield ""
        yield f"{self._text_of(dest)}: {destination.probes} probes, latency in ms"
        yield f"hop  probes answered {heads}  responder"
        for number, hop in sorted(destination.hops.items()):
            share = f"{number:3} {hop.probes:7} {hop.latency.count / hop.probes:8.1%}"
            if not hop.latency.count:
                last = " (or the destination)" if number > max(answering, default=0) else ""
                yield f"{share}  silent{last}"
                continue
            (first, count), *others = hop.responders.most_common()
            more = f" {count / hop.latency.count:.0%}" if others else ""
            start = f"{share} {figures(hop.latency)}  "
            yield f"{start}{self._text_of(first)}{more}"
            for other, count in others[:3]:
                yield f"{'':{len(start)}}{self._text_of(other)} {count / hop.latency.count:.0%}"
            if len(others) > 3:
                yield f"{'':{len(start)}}and {len(others) - 3} more"
        if destination.srtt.count:
            resent = f"{destination.retransmitted} segments retransmitted since its flows began"
            yield f"TCP {'':16} {figures(destination.srtt)}  round trip by the kernel (srtt), {resent}"
        yield from destination.remarks()


def rows_of(names: list[str]) -> Callable[[tuple[Any, ...]], str]:
    """Makes a function that turns the values of these names into a line of the CSV. Without a
    reply's values among the names the line is that of an unanswered probe."""
    at = {name: position for position, name in enumerate(names)}
    ntohs = socket.ntohs
    seq, origseq, sendtime, dest = at["seq"], at["origseq"], at["sendtime"], at["dest"]
    outttl, outipid, sport, dport, protocol, app, pid, srtt, cwnd, retrans, outtos = (
        at["outttl"], at["outipid"], at["sport"], at["dport"], at["protocol"], at["app"], at["pid"],
        at["srtt"], at["cwnd"], at["retrans"], at["outtos"],
    )  # fmt: skip

    def tcp_text(v: tuple[Any, ...]) -> str:
        return f"{v[srtt] or ''},{v[cwnd]},{v[retrans]}" if v[cwnd] else ",,"

    def unanswered(v: tuple[Any, ...]) -> str:
        return (
            f"0,{v[seq]},{v[origseq]},-1,{v[sendtime]},-1,{address_text(v[dest])},,{v[outttl]},-1,"
            f"{ntohs(v[sport])},{ntohs(v[dport])},{v[protocol]},{v[outipid]},-1,"
            f"{app_text(v[app])},{v[pid] or ''},{tcp_text(v)},{v[outtos]},,,\n"
        )

    if "recvtime" not in at:
        return unanswered
    recvcpu, recvtime, responder = at["recvcpu"], at["recvtime"], at["responder"]
    recvttl, inipid, intos = at["recvttl"], at["inipid"], at["intos"]

    def answered(v: tuple[Any, ...]) -> str:
        return (
            f"{v[recvcpu]},{v[seq]},{v[origseq]},{v[recvtime] - v[sendtime]},{v[sendtime]},{v[recvtime]},"
            f"{address_text(v[dest])},{address_text(v[responder])},{v[outttl]},{v[recvttl]},"
            f"{ntohs(v[sport])},{ntohs(v[dport])},{v[protocol]},{v[outipid]},{v[inipid]},"
            f"{app_text(v[app])},{v[pid] or ''},{tcp_text(v)},{v[outtos]},{v[intos]},,\n"
        )

    return answered


# What the kernel's half says of flows and destinations, by enum of elfprobe.c.
FLOW_EVENTS = {
    1: "{flow}: nothing is acknowledged any more: no probes until it moves again",
    2: "{flow}: moves again, and is probed again",
    3: "{flow}: stalled under probes again: its destination is left alone for the rest of this run",
    4: "{dest}: a filter in front of ours took the copy of a packet, or let it out whole: the destination "
       "is left alone for the rest of this run",
}  # fmt: skip


class FlowEvents:
    """Logs them as they come."""

    def __init__(self, bpf: Any) -> None:
        self._layout = bpf["flow_event_layout"].Leaf
        hear(bpf, "flow_events", self._hear)

    def _hear(self, _context: Any, data: int, size: int) -> int:
        event = self._layout.from_buffer_copy(ctypes.string_at(data, size))
        flow = event.flow
        dest = address_text(bytes(flow.dest))
        text = flow_text(dest, flow.sport, flow.dport, flow.protocol)
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


class ElfProbe:
    """One measurement, from its checks to its last row."""

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self._config = config
        self._console = console  # where the table is drawn while it runs, if at all
        self._was_up = True

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
            self._bpf, refused = self._load()
            stack.callback(unload, self._bpf)
            if stop.asked:
                log.info("ended before anything was attached or written")
                return
            results = Results(self._bpf)
            FlowEvents(self._bpf)
            destinations = Destinations(self._bpf)
            for packed in fixed:
                destinations.add(packed)
            with contextlib.ExitStack() as attached:
                ingress, egress = (self._bpf.funcs[name].fd for name in (b"elf_ingress", b"elf_egress"))
                mode = attached.enter_context(xdp_attachment(ipr, self._device, ingress))
                csv = stack.enter_context(self._output_files())
                tables = ConnectionTables(destinations, fixed, config.apps, config.pids)
                self._follow_processes(attached, refused, tables)
                attached.callback(self._silence)
                ours = attached.enter_context(tc_attachment(ipr, self._device, egress))
                self._removed = functools.partial(self._what_is_removed, ipr, ours, program_info(ingress).id)
                csv.write_lines(",".join(COLUMNS) + "\n")
                log.info("CLOCK_MONOTONIC 0 is %s", monotonic_epoch())
                log.info("probing on %s, XDP %s, answers %s; rows go to %s", self._device.name, mode,
                         "dropped" if config.ingress == "drop" else "passed", csv.path)  # fmt: skip
                if config.debug and not attached.enter_context(run_time_stats()):
                    log.info("what the programs take is not known: that needs Linux 5.8, new BCC, sys_admin")
                stack.callback(self._summarise, results, csv, stop)  # when all is detached
                self._begun_at = time.monotonic()
                try:
                    self._measure(stop, results, csv)
                finally:
                    self._drain(results, csv)

    def _load(self) -> tuple[Any, str]:
        """BCC's object, and why it does not tell flows by their socket's owner: empty if it does."""
        if not self._config.by_process:
            refused = "nobody asks for it"
        elif not has_ring_buffer():
            refused = "no ring buffers"
        else:
            try:
                return load_program(self._config, by_owner=True, frame=self._device.frame), ""
            except Failure as failure:
                for line in str(failure).splitlines():
                    log.debug("%s", line)
                refused = str(failure).splitlines()[0]
        return load_program(self._config, frame=self._device.frame), refused

    def _follow_processes(self, stack: contextlib.ExitStack, refused: str, tables: ConnectionTables) -> None:
        """Follows the processes of interest until the stack unwinds, in the best way that there is."""
        if not self._config.by_process:
            return
        try:
            if refused:
                what = "programs that note who owns a socket (Linux 5.10 and BCC 0.16)"
                raise Unsupported(f"{what}: {refused}")
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
                removed = self._removed()
                if removed:
                    raise Failure(f"somebody has removed our {removed} from '{self._device.name}'")
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

    def _what_is_removed(self, ipr: Any, ours: TcFilter, xdp_id: int) -> str:
        """What of ours is not attached any more. Empty: all is."""
        if ours not in egress_filters(ipr, self._device):
            return "filter"
        xdp = attached_xdp(ipr, self._device)
        return "" if xdp and xdp.prog_id == xdp_id else "XDP program"

    def _drain(self, results: Results, csv: OutputFile) -> None:
        """No more probes; then the replies that are still on their way, then what is outstanding."""
        self._silence()
        self._ended_at = time.monotonic()
        while time.monotonic() < self._ended_at + STRAY_REPLIES:
            self._write(csv, results.take())
            time.sleep(STRAY_REPLIES / 10)
        self._write(csv, results.take() + results.expire(1 << 63))
        self._write(csv, results.take())

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
            is_up = device_is_up(self._device)
        except OSError as err:
            raise Failure(f"the interface '{self._device.name}' is gone") from err
        if is_up != self._was_up:
            log.warning("the interface is %s", "up again" if is_up else "down: no packets until it is up")
        self._was_up = is_up
        table = self._bpf["alive_until"]
        table[table.Key(0)] = table.Leaf(int(until * 1e9))

    def _silence(self) -> None:
        table = self._bpf["alive_until"]
        table[table.Key(0)] = table.Leaf(0)

    def _are_outstanding(self, results: Results) -> bool:
        """Whether probes are in flight. To ask the map itself takes a look into each of its buckets."""
        count = read_counters(self._bpf)
        return count["probes"] != count["replies"] + results.unanswered

    def _unprobed(self, count: dict[str, int]) -> Iterator[str]:
        """Why there are no probes, to some destinations or at all."""
        length = self._bpf["paths"].Leaf.length.offset
        paths = itertools.chain(entries(self._bpf["paths"]), entries(self._bpf["peers"]))
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
        for text in itertools.chain(results.changes.texts(), self._unprobed(count)):
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


class LogFormat(logging.Formatter):
    """A line for each message, whatever the names in it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Lines of a table (bare) stand alone, others behind the time."""
        return printable(record.message if hasattr(record, "bare") else super().formatMessage(record))


CLEAR_BELOW = "\x1b[J"  # ECMA-48: ED
UP_TO_START = "\x1b[{}F"  # CPL


class Console(logging.Handler):
    """Standard error, written to by a thread of its own: where it takes nothing (a pipe that nobody
    reads, a stopped terminal), only that thread waits. Lines that do not fit behind it are left out.
    On a terminal a table can stand below the lines."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.dup(2)  # the number 2 is sometimes another file's: captured_stderr()
        self.is_terminal = os.isatty(self._fd) and os.environ.get("TERM") not in (None, "", "dumb")
        self._texts: queue.Queue[str | list[str] | None] = queue.Queue(CONSOLE_LINES)
        self._left_out = 0
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self.say(self.format(record))

    def say(self, text: str) -> None:
        """Has the lines written, when the console takes them."""
        try:
            if self._left_out:
                self._texts.put_nowait(f"({self._left_out} lines left out: the console did not take them)")
                self._left_out = 0
            self._texts.put_nowait(text)
        except queue.Full:
            self._left_out += 1

    def draw(self, table: Callable[[int, int], list[str]]) -> None:
        """Puts in the place of the table that is there the one that this makes for so many lines and columns,
        unless the console still has lines to take, or is that of another job."""
        if not self.is_terminal or not self._texts.empty():
            return
        with contextlib.suppress(OSError):  # it is nobody's
            if os.tcgetpgrp(self._fd) != os.getpgrp():
                return
        columns, lines = self._size()
        self._texts.put([printable(line)[: columns - 1] for line in table(max(lines - 2, 1), columns - 1)])

    def _size(self) -> tuple[int, int]:
        try:
            columns, lines = os.get_terminal_size(self._fd)
        except OSError:
            columns = lines = 0
        return columns or 80, lines or 24

    def clear(self) -> None:
        """Takes the table away."""
        with contextlib.suppress(queue.Full):
            self._texts.put_nowait([])

    def end(self) -> None:
        """Waits until all is written, but not long for a console that takes nothing."""
        with contextlib.suppress(queue.Full):
            self._texts.put(None, timeout=CONSOLE_PATIENCE)
        waiting = -1
        while self._thread.is_alive() and waiting != self._texts.qsize():  # as long as it takes some
            waiting = self._texts.qsize()
            self._thread.join(CONSOLE_PATIENCE)

    def _write(self) -> None:
        table: list[str] = []
        for text in iter(self._texts.get, None):
            columns = self._size()[0] if table else 1  # a window made narrower has wrapped lines
            height = sum(max(-(-len(line) // columns), 1) for line in table)
            clear = UP_TO_START.format(height) + CLEAR_BELOW if table else ""
            if isinstance(text, list):
                table, lines = text, text
            else:
                lines = [text, *table]
            data = (clear + "".join(f"{line}\n" for line in lines)).encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # it has been closed
                while data:
                    try:
                        data = data[os.write(self._fd, data) :]
                    except BlockingIOError:  # so somebody else has set it
                        select.select((), (self._fd,), ())
        os.close(self._fd)


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
