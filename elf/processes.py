# SPDX-License-Identifier: GPL-3.0-only
"""Processes, read from /proc, and which of them the options -a and -P name."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import threading
import time
from typing import Any, Iterable, Iterator, NamedTuple

PROCESSES_MAX = 4096  # that ProcessLog keeps
TASK_COMM_LEN = 16  # linux/sched.h: of a command name, the final zero included
OWN_PIDS = {os.getpid()}  # of processes that are never targets: elfprobe itself, and what it starts for itself


class Interpreter(NamedTuple):
    """How the command line of an interpreter names the program: its first word, but for what the fields say."""

    code: str = "$."  # a pattern of options, or of a first word, with code behind them in the place of a program
    with_value: tuple[str, ...] = ()  # options with a value behind them
    commands: tuple[str, ...] = ()  # first words that a program may follow
    with_program: tuple[str, ...] = ()  # options with the program behind them


# By the name of the executable, without its version. What belongs here: an executable that many programs share,
# so that neither its name nor that of its process tells them apart.
PYTHON = Interpreter(r"-\w*c", ("-W", "-X"), with_program=("-m",))
SHELL = Interpreter(r"-\w*c", ("-o", "-O", "+o", "+O", "--rcfile", "--init-file"))
NODE = Interpreter(r"-pe?|-e|--eval|--print", ("-r", "--require", "--import", "--loader"))
LUA = Interpreter(r"-e", ("-l",))
SCHEME = Interpreter(r"-c|-e", ("-L", "-l"), with_program=("-s",))
INTERPRETERS = {
    "python": PYTHON,
    "pypy": PYTHON,
    "perl": Interpreter(r"-\w*[eE]", ("-I",)),
    "ruby": Interpreter(r"-\w*e", ("-I", "-r")),
    "node": NODE,
    "nodejs": NODE,
    "deno": Interpreter(r"eval|repl", ("-c", "--config", "--import-map", "--cert", "--lock"), ("run", "serve")),
    "bun": Interpreter(r"-e|-p|--eval|--print", ("-r", "--preload", "--cwd", "--config", "--env-file"), ("run",)),
    "php": Interpreter(r"-r", ("-c", "-d"), with_program=("-f",)),
    "lua": LUA,
    "luajit": LUA,
    "tclsh": Interpreter(r"-", ("-encoding",)),
    "wish": Interpreter(r"-", ("-encoding",)),
    "Rscript": Interpreter(r"-e"),
    "julia": Interpreter(r"-[eE]|--eval|--print", ("-L", "--load", "-p", "-t", "-J")),
    "guile": SCHEME,
    "java": Interpreter(
        with_value=("-cp", "-classpath", "--class-path", "-p", "--module-path", "--upgrade-module-path", "--source",
                    "--add-modules", "--add-reads", "--add-exports", "--add-opens", "--patch-module"),
        with_program=("-jar", "-m", "--module"),
    ),
    "dotnet": Interpreter(
        with_value=("--depsfile", "--runtimeconfig", "--additionalprobingpath", "--fx-version", "--roll-forward"),
        commands=("exec",),
    ),
    **dict.fromkeys(("mono", "mono-sgen"), Interpreter(with_value=("--config",))),
    **dict.fromkeys(("uwsgi", "uwsgi-core"), Interpreter(
        with_value=("--http", "--http-socket", "-s", "--socket", "-p", "--processes"),
        with_program=("--wsgi-file", "--file", "-w", "--module", "--wsgi", "--ini", "--yaml", "--yml", "--xml"),
    )),
    **dict.fromkeys(("sh", "bash", "dash", "zsh", "ksh"), SHELL),
}  # fmt: skip


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

    They are the process's own name, its executable's, and those of the program that an interpreter runs: a
    script, with and without extension, a module, or a class, with and without its package.
    """
    names = {process.name, program_of(process), *program_names(interpreted(process))}
    return {name.lower() for name in names if name}


def program_of(process: Process) -> str:
    """Return the name of a process's executable, as far as that is known."""
    return os.path.basename(process.exe or (process.cmdline[0] if process.cmdline else ""))


def program_names(word: str) -> set[str]:
    """Return the names of a program that an interpreter runs. word is what its command line calls it."""
    base = os.path.basename(word)
    stem, extension = os.path.splitext(base)
    is_class = extension[1:2].isupper()  # org.example.Main
    return {base, extension[1:]} if is_class else {base, stem}


def is_interpreter(program: str) -> bool:
    """Return whether an executable has the name of an interpreter, with or without a version."""
    return program.rstrip("0123456789.") in INTERPRETERS


def interpreted(process: Process) -> str:
    """Return what an interpreter's command line calls the program that it runs, empty if it names none."""
    program = program_of(process)
    return script_of(program, process.cmdline) if is_interpreter(program) else ""


def script_of(program: str, cmdline: tuple[str, ...]) -> str:
    """Return the program that an interpreter's command line names, empty if it names none."""
    interpreter = INTERPRETERS[program.rstrip("0123456789.")]
    words = iter(cmdline[1:])
    may_be_command = True
    for word in words:
        option, is_joined, value = word.partition("=")
        if word in interpreter.with_program:
            return next(words, "").partition(":")[0]
        if is_joined and option in interpreter.with_program:
            return value.partition(":")[0]
        if re.fullmatch(interpreter.code, word):
            return ""
        if word in interpreter.with_value:
            next(words, "")
        elif may_be_command and word in interpreter.commands:
            may_be_command = False
        elif not word.startswith(("-", "+")):
            return word
    return ""


class AppNames:
    """The names of -a. One with a slash is the path of an executable, or of what an interpreter runs."""

    def __init__(self, apps: Iterable[str]) -> None:
        given = tuple(apps)
        self.names = frozenset(app.lower() for app in given if "/" not in app)
        self._paths = {os.path.realpath(app): app for app in given if "/" in app}
        self.unseen = {*self.names, *self._paths.values()}  # that no process has had so far

    def match(self, process: Process) -> bool:
        """Return whether a process has one of the names."""
        found = set(self.names & process_names(process))
        if self._paths:
            found |= {self._paths[path] for path in self._paths.keys() & program_paths(process)}
        self.unseen -= found
        return bool(found)


def program_paths(process: Process) -> set[str]:
    """Return the paths of a process's executable and of what an interpreter runs."""
    paths = {process.exe}
    script = interpreted(process)
    if script:
        with contextlib.suppress(OSError):  # it has ended
            paths.add(os.path.realpath(os.path.join(os.readlink(f"/proc/{process.pid}/cwd"), script)))
    return paths


def choose_processes(processes: Iterable[Process], apps: AppNames, pids: Iterable[int]) -> dict[int, str]:
    """Return PID -> process name of the target processes: those named by -a or -P, and their descendants."""
    known = {process.pid: process for process in processes}
    children: dict[int, list[int]] = {}
    for process in known.values():
        children.setdefault(process.ppid, []).append(process.pid)
    todo = [pid for pid in pids if pid in known]
    todo += [process.pid for process in known.values() if apps.match(process)]
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
        self._lock = threading.Lock()  # the thread that follows processes notes some, the main thread others

    def began(self, pid: int, name: str) -> None:
        """Note a process that is, or has become, a target."""
        parent = started = None
        with contextlib.suppress(OSError):
            process = look_at_process(pid)
            if comm(process.name) == comm(name):  # another process may have the PID by now
                parent = process.ppid
                ticks = process.started * 10**9 // os.sysconf("SC_CLK_TCK")  # CLOCK_BOOTTIME, ns
                started = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + ticks
        noted = dict(pid=pid, name=name, parent=parent, started=started, ended=None)
        with self._lock:
            self._newest[pid] = noted
            self._seen.append(noted)
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
        with self._lock:
            if pid in self._newest:
                self._newest[pid]["ended"] = time.time_ns()

    def all(self) -> list[dict[str, Any]]:
        """Return the newest PROCESSES_MAX processes: pid, name, parent, started, ended."""
        with self._lock:
            return list(self._seen)


def process_ids() -> list[int]:
    """Return the PIDs of all processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def running_processes() -> Iterator[Process]:
    """Yield all processes but elfprobe's own. One that ends meanwhile may be missing."""
    for pid in process_ids():
        if pid not in OWN_PIDS:
            with contextlib.suppress(OSError):
                yield look_at_process(pid)


def programs_on_path() -> Iterator[str]:
    """Yield the names of the programs that a shell would find."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        with contextlib.suppress(OSError):
            yield from os.listdir(folder)


def close_programs(name: str, candidates: Iterable[str]) -> str:
    """Return the candidates whose names are close to one that is not there, as the end of a sentence."""
    others = {each.lower() for each in candidates} - {name.lower()}  # a program that does not run is no other one
    close = difflib.get_close_matches(name.lower(), others, cutoff=0.7)
    return f" (close: {', '.join(close)})" if close else ""
