# SPDX-License-Identifier: GPL-3.0-only
"""The command line of elfprobe.py. Each option is a field of Config, and the parser is made of the fields."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import secrets
import shlex
import sys
from typing import Any, Callable, Sequence

from elf.files import FILE_EXTENSIONS
from elf.metrics import SERIES_DEFAULT, listening_address
from elf.usage import FOLDER, Failure, Parser, as_called, not_empty, positive_seconds, whole_number

HOOKS_FILE = os.path.join(FOLDER, "elfhooks.c")
TUNNELS = {"ethernet": 0, "ipinip": 4, "ip6inip": 41}  # -e -> IP protocol that IPv4 encapsulates
OPTIONS_WITH_INTERFACE = re.compile(r"(-[dlqT]*)i(.*)|--interface(=.*)?", re.S)

USAGE = "sudo python3 elfprobe.py [-i INTERFACE] [options] [address ...] [-- COMMAND [ARGUMENT ...]]"
DESCRIPTION = """\
Shows hop by hop where the latency of a running application comes from, by lowering
the TTL of copies of the application's own packets. At least one of -a, -P, an address
and -- COMMAND is needed. COMMAND is started as the user who called sudo; the run ends
with it.

Without -i elfprobe takes the device by which the addresses are reached; with -a, -P and COMMAND that of the default
route. 'ip route get ADDRESS' names it. While elfprobe runs, probes ride on packets that the application sends:
without traffic there are none. On a terminal a table is redrawn each second, unless a command has the terminal.
Keys: q ends the run, p pauses the view, d shows the next destination, f shows flows, h helps."""
EPILOG = """\
examples:
  elfprobe.py -- curl -O http://example.net/file
                                             the flows of this curl, from its first packet to its end
  elfprobe.py -i eno2 -a speedtest           the flows of every speedtest, started now or later
  elfprobe.py -i eno2 -P 4127 -r g -p 100    of one process and its children, 10 probes/s to a destination
  elfprobe.py -i eno2 example.net 192.0.2.7  whatever goes to these destinations
  elfprobe.py -i eno2 -I pass -T -l @hosts   destinations from a file, payload kept, elf.log too
  elfprobe.py -i eno2 -q -f /var/tmp/night --duration 28800 -a backup &
                                             all night, in the background (with nohup: after the logout, too)
  elfprobe.py -w probes.pcapng example.net   packets as well: tshark -r probes.pcapng -T fields -e frame.comment
  elfprobe.py -i wg0 10.8.0.1                inside a tunnel device, whose packets begin with IP
  elfplot.py --html elf.csv                  the summary again, and pictures

what the summary shows, for each destination and hop (TTL, or hop limit):
  probes, answered   how many probes were sent with that TTL, and what share was answered
  min ... max        time to that router and back, ms
  jitter             mean difference of one latency to the next, ms
  adds               what the link in front adds, ms: median difference in the same flow and moment
  responder          who answered; if there are several, with the share of each
  TCP                round-trip time by the kernel's TCP (srtt), and segments that it retransmitted

files:
  FILEBASE.csv       a row for each probe: docs/columns.md explains the columns
  FILEBASE.json      all that the tables say, and more: docs/report.md explains the keys
  FILEBASE.log       log and tables (-l, -q)
  FILE (-w)          probes and answers as packets: docs/packets.md says what is in it
  FILEBASE.MAP.json  each BPF map that the hooks file (-H) defines, after the run

exit status: 0 after a run, 3 after a run in which no probe was sent, 2 for wrong usage, 1 for every other error;
one line says what is wrong
"""


def is_rate_global(text: str) -> bool:
    """Return whether a rate type is the global one: an argparse type."""
    if text not in ("g", "global", "h", "perhop"):
        raise argparse.ArgumentTypeError(f"'{text}' is none of g, global, h, perhop")
    return text.startswith("g")


def file_name(text: str) -> str:
    """Return the name of a file that can be written: an argparse type."""
    if text == "-":
        raise argparse.ArgumentTypeError("'-' would be standard output, which has the tables: give a file")
    return not_empty(text)


class ShowVersion(argparse.Action):
    """Print what a function, const, returns, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(self.const())
        parser.exit()


def argument(*flags: str, default: object, **how: object) -> Any:
    """Return a field of Config that is an argument of the command line.

    flags and how are what ArgumentParser.add_argument() takes.
    """
    return dataclasses.field(default=default, metadata={"flags": flags, "how": how})


@dataclasses.dataclass(frozen=True)
class Config:
    """The command line, checked as far as it can be without looking at the machine. Each field is an option."""

    interfaces: tuple[str, ...] = argument(
        "-i", "--interface", default=(), action="append", type=not_empty, metavar="INTERFACE",
        help="the device to attach to (default: by which the addresses are reached; for -a, -P and COMMAND that "
        "of the default route); may be given again, for devices of the same kind",
    )  # fmt: skip
    addresses: tuple[str, ...] = argument(
        "addresses", default=(), nargs="*", type=not_empty, metavar="address",
        help="target destination: a name (all its addresses), an IPv4 or IPv6 address, "
        "or @FILE with one of them per line (# begins a comment)",
    )  # fmt: skip
    apps: tuple[str, ...] = argument(
        "-a", "--app", default=(), action="append", type=not_empty, metavar="APP",
        help="probe the flows of processes of this name, and of their children; the name is the process's, its "
        "executable's, or that of its script, jar or class; with a slash it is a path; may be given again",
    )  # fmt: skip
    pids: tuple[int, ...] = argument(
        "-P", "--pid", default=(), action="append", metavar="PID", type=whole_number(1, 2**22, "a process ID"),
        help="probe the flows of this process and its children; may be given again",
    )  # fmt: skip
    probeint: int = argument(
        "-p", "--probeint", default=10, type=whole_number(0, 1000, "a whole number of milliseconds"),
        help="least interval between two probes, ms, 0 to 1000; 0: a probe for every packet "
        "that may carry one (default: %(default)s)",
    )  # fmt: skip
    rate_global: bool = argument(
        "-r", "--ratetype", default=False, type=is_rate_global, metavar="{g,global,h,perhop}",
        help="what -p spaces out: global, any two probes to a destination; perhop, two probes to the "
        "same hop of a destination (default: perhop)",
    )  # fmt: skip
    notrunc: bool = argument(
        "-T", "--notrunc", default=False, action="store_true",
        help="probes keep the payload of the packet they were cloned from",
    )  # fmt: skip
    ingress: str = argument(
        "-I", "--ingress", default="drop", choices=("pass", "drop"),
        help="what to do with the time exceeded that answers a probe, once it is recorded "
        "(default: %(default)s); every other packet passes",
    )  # fmt: skip
    ingress_hook: str = argument(
        "--ingress-hook", default="auto", choices=("auto", "xdp", "generic", "tc"),
        help="where answers are read: native XDP, generic XDP, or TC ingress; auto: native XDP where that "
        "costs the application nothing that is known, otherwise TC ingress (default: %(default)s)",
    )  # fmt: skip
    encapsulation: str = argument(
        "-e", "--encapsulation", default="ethernet", choices=tuple(TUNNELS),
        help="what encapsulates the flows: ethernet, nothing but the device's own header; ipinip, IPv4 in "
        "IPv4; ip6inip, IPv6 in IPv4 (default: %(default)s)",
    )  # fmt: skip
    filebase: str = argument(
        "-f", "--filebase", default="elf", type=not_empty,
        help="base name of FILEBASE.csv, FILEBASE.json and FILEBASE.log (default: %(default)s)",
    )  # fmt: skip
    rotate: int | None = argument(
        "--rotate", default=None, metavar="MIB", type=whole_number(1, 10**6, "a whole number of MiB"),
        help="begin a new CSV when this one has so many MiB: FILEBASE.2.csv, FILEBASE.3.csv and so on",
    )  # fmt: skip
    capture: str | None = argument(
        "-w", "--write", default=None, metavar="FILE", type=file_name,
        help="also write the probes and their answers as packets to FILE (pcapng), for Wireshark and the like",
    )  # fmt: skip
    logfile: bool = argument(
        "-l", "--logfile", default=False, action="store_true", help="also log to FILEBASE.log"
    )  # fmt: skip
    quiet: bool = argument(
        "-q", "--quiet", default=False, action="store_true",
        help="neither log nor tables on the console: they go to FILEBASE.log (-l)",
    )  # fmt: skip
    debug: bool = argument(
        "-d", "--debug", default=False, action="store_true",
        help="more log: the BPF counters, the CPU time that the programs take",
    )  # fmt: skip
    hooks: str = argument(
        "-H", "--hooks", default=HOOKS_FILE, metavar="FILE",
        help="hooks file to compile in (default: elfprobe's own elfhooks.c, whose hooks do nothing)",
    )  # fmt: skip
    duration: float | None = argument(
        "--duration", default=None, type=positive_seconds, metavar="SECONDS",
        help="stop after so long (default: on a signal)",
    )  # fmt: skip
    max_rate: int = argument(
        "--max-rate", default=50000, metavar="N",
        type=whole_number(1, 10**6, "a whole number of probes per second"),
        help="most probes per second over all destinations together (default: %(default)s)",
    )  # fmt: skip
    json: bool = argument(
        "--json", default=False, action="store_true",
        help="at the end print the content of FILEBASE.json in place of the tables",
    )  # fmt: skip
    metrics: tuple[str, int] | None = argument(
        "--metrics", default=None, type=listening_address, metavar="[ADDRESS:]PORT",
        help="serve OpenMetrics at http://ADDRESS:PORT/metrics while it runs; an IPv6 address is in brackets "
        "(default address: 127.0.0.1)",
    )  # fmt: skip
    metrics_series: int = argument(
        "--metrics-series", default=SERIES_DEFAULT, metavar="N",
        type=whole_number(1, 10**4, "a whole number of combinations"),
        help="most combinations of destination, hop and responder in the metrics (default: %(default)s)",
    )  # fmt: skip
    live: bool = argument(
        "--no-live", default=True, action="store_false",
        help="no table on the terminal while it runs, only log lines",
    )  # fmt: skip
    numeric: bool = argument(
        "-n", "--numeric", default=False, action="store_true", help="look up no host names of addresses"
    )  # fmt: skip
    cache: bool = argument(
        "--no-cache", default=True, action="store_false",
        help="compile programs and modules, and do not keep them for the next start",
    )  # fmt: skip
    command: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # no option: the arguments as given
    child: tuple[str, ...] = ()  # what follows --
    salt: int = 0  # no option: 16 random bits, so that nobody can guess the probes' identifiers

    @property
    def by_process(self) -> bool:
        """Return whether the flows of processes are targets."""
        return bool(self.apps or self.pids or self.child)


def argument_parser(versions: Callable[[], str] = str) -> argparse.ArgumentParser:
    """Return the parser of the command line, made of the fields of Config.

    versions returns what --version prints.
    """
    parser = Parser(
        prog=as_called("elfprobe.py"), usage=as_called(USAGE), description=DESCRIPTION, epilog=as_called(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    for field in dataclasses.fields(Config):
        flags, how = field.metadata.get("flags", ()), dict(field.metadata.get("how", {}))
        if any(flag.startswith("-") for flag in flags):
            how["dest"] = field.name
        if flags:
            default = [] if field.default == () else field.default
            parser.add_argument(*flags, default=default, **how)
    parser.add_argument(
        "--version", dest=argparse.SUPPRESS, nargs=0, action=ShowVersion, const=versions,
        help="version, and what it runs on",
    )  # fmt: skip
    return parser


def own_arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments before "--". Those behind it are the command's."""
    return list(itertools.takewhile(lambda word: word != "--", argv))


def parse_arguments(argv: list[str], versions: Callable[[], str] = str) -> Config:
    """Return the configuration. Raises Failure (status 2) for wrong usage. versions: what --version prints."""
    ours = own_arguments(argv)
    dashes, child = len(ours) < len(argv), argv[len(ours) + 1 :]
    given: dict[str, Any] = vars(argument_parser(versions).parse_intermixed_args(ours))
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    config = Config(
        **{**given, **lists, "command": tuple(argv), "child": tuple(child), "salt": secrets.randbits(16)}
    )
    if dashes and not (child and child[0]):
        raise Failure(as_called("no command behind --: elfprobe.py [options] -- COMMAND [ARGUMENT ...]"), 2)
    if not (config.addresses or config.by_process):
        raise Failure("nothing to probe: give an address, -a APP, -P PID or -- COMMAND", 2)
    twice = [name for number, name in enumerate(config.interfaces) if name in config.interfaces[:number]]
    if twice:
        raise Failure(f"argument -i/--interface: '{twice[0]}' is given twice", 2)
    own = [os.path.abspath(config.filebase + extension) for extension in FILE_EXTENSIONS]
    if config.capture and os.path.abspath(config.capture) in own:
        raise Failure(f"argument -w/--write: '{config.capture}' is a file of -f: give another name", 2)
    if config.quiet:
        return dataclasses.replace(config, logfile=True, live=False)
    if config.child:  # the terminal is the command's
        return dataclasses.replace(config, live=False)
    return config


def without_interface(argv: Sequence[str]) -> list[str]:
    """Return the arguments before "--" without -i and its value."""
    kept: list[str] = []
    words = iter(own_arguments(argv))
    for word in words:
        match = OPTIONS_WITH_INTERFACE.fullmatch(word)
        if not match:
            kept.append(word)
            continue
        if match[1] and match[1] != "-":
            kept.append(match[1])
        if not (match[2] or match[3]):
            next(words, "")
    return kept


def command_in_namespace(pid: int, config: Config) -> str:
    """Return the command line that measures in the network namespace of a process."""
    options = without_interface(sys.argv[1:])
    if not (config.apps or config.pids or config.addresses):
        options += ["-P", str(pid)]
    sudo = ["sudo"] if "SUDO_UID" in os.environ else []
    installed = not as_called("elfprobe.py").endswith(".py")
    program = [os.path.abspath(sys.argv[0])] if installed else [sys.executable, os.path.join(FOLDER, "elfprobe.py")]
    return shlex.join([*sudo, "nsenter", "-t", str(pid), "-n", *program, *options])
