# SPDX-License-Identifier: GPL-3.0-only
"""What the main loop of elfprobe.py is made of: timers, the signals that end it, and errors that do not."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from typing import Callable, Iterator

from elf.command import Command
from elf.service import ServiceManager

COMMAND_CHECK_EVERY = 0.1  # s, when nothing but the command's end is awaited
SI_KERNEL = 0x80  # asm-generic/siginfo.h: as of the signals that a terminal sends
WAKE = signal.SIGURG  # that the main thread gets when a signal has been taken

log = logging.getLogger("elfprobe")


class Every:
    """A timer: calls an action at intervals (s), the first time at once or after one interval."""

    def __init__(self, seconds: float, action: Callable[[], object], at_once: bool = False) -> None:
        self._seconds = seconds
        self._action = action
        self._due = time.monotonic() + (0 if at_once else seconds)

    def run(self) -> None:
        """Call the action if it is due."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._seconds
            self._action()


class Defects:
    """Errors in threads and callbacks, which do not end the measurement. The first one of each kind is logged at
    once, and the summary tells how many there were."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def note(self, what: str, why: str = "") -> None:
        """Note an error: what follows from it, and why; without a reason, the exception that is being handled."""
        kind, error, trace = sys.exc_info()
        self._counts[what] = self._counts.get(what, 0) + 1
        if self._counts[what] == 1:
            log.error("%s (%s)", what, why or f"{error.__class__.__name__}: {error}")
            if kind:
                log.debug("%s", "".join(traceback.format_exception(kind, error, trace)))

    @contextlib.contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Note an exception in the with-block, and end the block there."""
        try:
            yield
        except Exception:
            self.note(what)

    def texts(self) -> Iterator[str]:
        """Yield each kind of error, with their number if there were several."""
        for what, count in list(self._counts.items()):
            yield what if count == 1 else f"{what}: {count} times"


class Stop:
    """Counts the signals that ask for the end. While a command runs they go to the command, which ends the run.

    A thread takes them, and no handler, because only the one who takes a signal learns whether it comes from the
    terminal. Such a signal has reached the command already. Under a service manager SIGHUP is for new
    files instead.
    """

    def __init__(self) -> None:
        self.service = ServiceManager()
        self.asked = 0
        self.wants_reopened = False  # the files
        self.command: Command | None = None
        self.ends_output = False  # everything is done but writing to standard output, which may wait for a reader

    def watch(self) -> None:
        """Take the signals from now on. Threads that run already must block them."""
        numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup; a blocked signal is not ignored
            numbers.remove(signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        signal.signal(WAKE, lambda *_: None)
        threading.Thread(target=self._take, args=(numbers,), daemon=True).start()

    def _take(self, numbers: set[signal.Signals]) -> None:
        while True:
            found = signal.sigwaitinfo(numbers)
            if found.si_signo == signal.SIGHUP and self.service.is_there:
                self.wants_reopened = True
            elif not (self.command and self.command.is_running()):
                self.ask()
            elif found.si_code != SI_KERNEL:
                name = signal.Signals(found.si_signo).name
                try:
                    self.command.send_signal(found.si_signo)
                    log.info("%s goes to %s", name, self.command)
                except OSError as err:  # the command belongs to another user
                    log.warning("%s cannot go to %s (%s): probing ends", name, self.command, err.strerror)
                    self.ask()

    def ask(self) -> None:
        """Ask for the end, and wake the main thread, which may wait."""
        self.asked += 1
        if self.ends_output:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.pthread_kill(threading.main_thread().ident or 0, WAKE)

    def wait_for_command(self) -> None:
        """Wait until the command has ended, if it has begun: nobody else would pass signals on to it."""
        if self.command and self.command.is_running():
            log.info("%s still runs: waiting for its end", self.command)
            while self.command.is_running():
                time.sleep(COMMAND_CHECK_EVERY)
            log.info("%s", self.command.end_text())
