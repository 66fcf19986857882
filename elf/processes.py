# SPDX-License-Identifier: GPL-3.0-only
"""Processes, read from /proc, and which of them the options -a and -P name."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import Any, Iterable, Iterator, NamedTuple

PROCESSES_MAX = 4096  # that ProcessLog keeps
TASK_COMM_LEN = 16  # linux/sched.h: of a command name, the final zero included
# An interpreter runs a script that its command line names. Interpreter, without its version -> a pattern of the
# options that code follows instead of a script, and the options that a value follows.
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


class Process(NamedTuple):
    """What decides whether a process is a target."""

    pid: int
    ppid: int
    name: str
    exe: str
    cmdline: tuple[str, ...]
    started: int = 0  # ticks after the machine's start: tells it from other processes that had its PID


def process_names(process: Process) -> set[str]:
    """Return all names that -a may call a process by, in lower case.

    They are the process's own name, its executable's, and those of the script or module that an interpreter
    runs, with and without extension.
    """
    program = os.path.basename(process.exe or (process.cmdline[0] if process.cmdline else ""))
    names = {process.name, program}
    if is_interpreter(program):
        script = os.path.basename(script_of(program, process.cmdline))
        names |= {script, os.path.splitext(script)[0]}
    return {name.lower() for name in names if name}


def is_interpreter(program: str) -> bool:
    """Return whether an executable has the name of an interpreter, with or without a version."""
    return program.rstrip("0123456789.") in INTERPRETERS


def script_of(program: str, cmdline: tuple[str, ...]) -> str:
    """Return the script or module that an interpreter's command line names, empty if it names none."""
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
    """Return PID -> process name of the target processes: those named by -a or -P, and their descendants."""
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
    """Return a process, read from /proc. Raises OSError if it has ended.

    psutil is too slow, because many processes may start each second. It also remembers the program that a
    process ran before an exec.
    """
    with open(f"/proc/{pid}/comm", "rb") as file:
        name = os.fsdecode(file.read().rstrip(b"\n"))
    try:
        exe = re.sub(r" \(deleted\)$", "", os.readlink(f"/proc/{pid}/exe"))  # a newer file may have replaced it
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
        fields = file.read().rpartition(b")")[2].split()  # the third field and those behind it, see proc(5)
    return Process(pid, int(fields[1]), name, exe, words, int(fields[19]))


def comm(name: str) -> str:
    """Return what the kernel keeps of a process name."""
    return name[: TASK_COMM_LEN - 1]


class ProcessLog:
    """The target processes of a run, as FILEBASE.json lists them. Times are ns from 1970, None if not known."""

    def __init__(self) -> None:
        self._seen: list[dict[str, Any]] = []
        self._newest: dict[int, dict[str, Any]] = {}  # by PID

    def began(self, pid: int, name: str) -> None:
        """Note a process that is, or has become, a target."""
        parent = started = None
        with contextlib.suppress(OSError):
            process = look_at_process(pid)
            if comm(process.name) == comm(name):  # another process may have the PID by now
                parent = process.ppid
                ticks = process.started * 10**9 // os.sysconf("SC_CLK_TCK")  # CLOCK_BOOTTIME, ns
                started = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + ticks
        self._newest[pid] = dict(pid=pid, name=name, parent=parent, started=started, ended=None)
        self._seen.append(self._newest[pid])
        if len(self._seen) > PROCESSES_MAX:
            oldest = self._seen.pop(0)
            if self._newest.get(oldest["pid"]) is oldest:
                del self._newest[oldest["pid"]]

    def met(self, pid: int, name: str) -> None:
        """Note a process that a row names, unless it has been noted."""
        if pid not in self._newest:
            self.began(pid, name)

    def ended(self, pid: int) -> None:
        """Note that the process has ended."""
        if pid in self._newest:
            self._newest[pid]["ended"] = time.time_ns()

    def all(self) -> list[dict[str, Any]]:
        """Return the newest PROCESSES_MAX processes: pid, name, parent, started, ended."""
        return list(self._seen)


def process_ids() -> list[int]:
    """Return the PIDs of all processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def running_processes() -> Iterator[Process]:
    """Yield all processes but this one. One that ends meanwhile may be missing."""
    for pid in process_ids():
        if pid != os.getpid():
            with contextlib.suppress(OSError):
                yield look_at_process(pid)
