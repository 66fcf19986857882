# SPDX-License-Identifier: GPL-3.0-only
"""The command of "-- COMMAND": a child that is held until it may begin, then runs as the user who called sudo."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import threading
import warnings
from typing import NamedTuple, NoReturn, Sequence

from elf.processes import close_programs, programs_on_path
from elf.usage import Failure

RESET_SIGNALS = signal.SIGPIPE, signal.SIGXFSZ  # Python ignores them


class User(NamedTuple):
    """Whose rights and surroundings a command gets."""

    uid: int
    gid: int
    groups: list[int]
    environment: dict[str, str]


def calling_user() -> User | None:
    """Return the user who called sudo, None if nobody did. The environment is as "sudo -u" makes it.

    Raises Failure.
    """
    if os.geteuid() != 0 or "SUDO_UID" not in os.environ:
        return None
    try:
        uid, gid = int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])
    except (KeyError, ValueError) as err:
        raise Failure("SUDO_UID and SUDO_GID do not tell who called sudo: unset them, and it is root") from err
    environment = {
        name: value for name, value in os.environ.items() if name != "MAIL" and not name.startswith("SUDO_")
    }
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return User(uid, gid, [gid], environment)
    environment.update(HOME=entry.pw_dir, LOGNAME=entry.pw_name, SHELL=entry.pw_shell, USER=entry.pw_name)
    return User(uid, gid, os.getgrouplist(entry.pw_name, gid), environment)


class Command:
    """A command in a child process. It has this process's terminal, working directory and standard streams."""

    def __init__(self, words: Sequence[str]) -> None:
        """Make the child, which waits for release(). If this process ends before, so does the child.

        Raises Failure if there is no such program.
        """
        self.name = os.path.basename(words[0])
        self._status: int | None = None
        self._lock = threading.Lock()  # only one thread can be told the status
        user = calling_user()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as it may be inherited, it takes the status away
        begin, self._begin = os.pipe()
        self._report, report = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads: the child needs nothing that they may have locked
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self._begin)  # or it would never end
            become(words, user, begin, report)
        os.close(begin)
        os.close(report)
        self.is_released = False
        problem = os.read(self._report, 4096)
        if problem != b"\n":
            self.close()
            raise self._failure(words[0], problem)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"

    def release(self) -> None:
        """Let the command begin. Raises Failure if the kernel does not take the program."""
        try:
            os.write(self._begin, b"\n")
        except BrokenPipeError:
            raise self._failure(self.name, b"") from None
        problem = os.read(self._report, 4096)  # empty: it has been closed by the exec
        if problem:
            raise self._failure(self.name, problem)
        self.is_released = True

    def _failure(self, program: str, problem: bytes) -> Failure:
        return Failure(f"command '{program}': {problem.decode(errors='replace') or 'it ended before it began'}")

    def has_ended(self) -> bool:
        """Return whether the command has ended."""
        with self._lock:
            return self._take_status()

    def _take_status(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def is_running(self) -> bool:
        """Return whether the command has begun, and not ended."""
        return self.is_released and not self.has_ended()

    def send_signal(self, number: int) -> None:
        """Send a signal to the command, unless it has ended."""
        with self._lock:
            if not self._take_status():  # and so the PID is still its own
                os.kill(self.pid, number)

    def close(self) -> None:
        """Forget the command: one that has not begun never will."""
        os.close(self._begin)
        os.close(self._report)
        if not self.is_released and not self.has_ended():
            self._status = os.waitpid(self.pid, 0)[1]

    def end_text(self) -> str:
        """Return how the command has ended."""
        assert self._status is not None
        if os.WIFSIGNALED(self._status):
            return f"{self} was ended by {signal.Signals(os.WTERMSIG(self._status)).name}"
        return f"{self} has ended with exit status {os.WEXITSTATUS(self._status)}"


def become(words: Sequence[str], user: User | None, begin: int, report: int) -> NoReturn:
    """Become the command, once there is a byte to read in begin. This is all that the child does.

    Write to report a line break once the program is found and may run, otherwise the reason why it cannot.
    """
    try:
        with open("/proc/self/comm", "wb", 0) as comm:  # its name from now on, as the exec will set it
            comm.write(os.fsencode(os.path.basename(words[0])))
        for number in RESET_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if user:
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
        environment = user.environment if user else dict(os.environ)
        program = shutil.which(words[0], path=environment.get("PATH"))
        if program:
            os.write(report, b"\n")
            if os.read(begin, 1):
                os.execve(program, list(words), environment)
        else:
            os.write(report, why_no_program(words[0]).encode(errors="backslashreplace"))
    except OSError as err:
        os.write(report, str(err.strerror).encode())
    finally:
        os._exit(127)


def why_no_program(name: str) -> str:
    """Return why a command cannot be run, with programs of similar names."""
    if os.path.dirname(name):
        return "no such file" if not os.path.exists(name) else "not a program that this user may run"
    return f"there is no such program{close_programs(name, programs_on_path())}"
