# SPDX-License-Identifier: GPL-3.0-only
"""The console: log lines and a live table on standard error, the results on standard output."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import sys
import threading
from typing import Callable, Iterable

from elf.usage import printable

LINES_MAX = 10000  # that may wait while the console accepts no data
PATIENCE = 1.0  # s to wait at the end for a console that accepts no data
CLEAR_BELOW = "\x1b[J"  # ECMA-48: ED
UP_TO_START = "\x1b[{}F"  # ECMA-48: CPL
SIZE = 80, 24  # columns and lines of a terminal that does not tell its size


def open_standard_streams() -> None:
    """Open /dev/null for closed standard streams, because the next opened file would take their place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def write_all(fd: int, data: bytes) -> None:
    """Write all of the data, also where another process has made the open file non-blocking. Raises OSError."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select((), (fd,), ())


def output_columns() -> int | None:
    """Return how many columns a line on standard output may have, None if that is no terminal."""
    if not os.isatty(1):
        return None
    return terminal_size(1)[0]


def print_lines(lines: Iterable[str]) -> str:
    """Write lines to standard output. Return what went wrong; empty: nothing.

    A reader that has seen enough (head) is no error.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        for line in lines:
            write_all(1, (printable(line) + "\n").encode(encoding, "backslashreplace"))
    except OSError as err:
        return "" if isinstance(err, BrokenPipeError) else err.strerror or str(err)
    return ""


def terminal_size(fd: int) -> tuple[int, int]:
    """Return a terminal's columns and lines."""
    try:
        columns, lines = os.get_terminal_size(fd)
    except OSError:
        columns = lines = 0
    return columns or SIZE[0], lines or SIZE[1]


class LogFormat(logging.Formatter):
    """Formats a log line: time and message. Line breaks in names are escaped, so it stays one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line. Lines of the results are logged with extra={"bare": True} and have no time."""
        return printable(record.message if hasattr(record, "bare") else super().formatMessage(record))


class Console(logging.Handler):
    """Standard error, written by its own thread, with a live table on a terminal.

    Only that thread waits while standard error accepts no data (a pipe that nobody reads, a stopped
    terminal). At most LINES_MAX lines wait with it; further ones are dropped and counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.dup(2)  # descriptor 2 itself is redirected while compiler messages are captured
        self.is_terminal = os.isatty(self._fd) and os.environ.get("TERM") not in (None, "", "dumb")
        self._texts: queue.Queue[str | list[str] | threading.Event] = queue.Queue(LINES_MAX)
        self._dropped = 0  # lines
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "bare"):  # results are for standard output
            self.say(self.format(record))

    def say(self, text: str) -> None:
        """Write a line, or several, as soon as the console accepts data. Never waits."""
        try:
            if self._dropped:
                self._texts.put_nowait(f"({self._dropped} lines left out: the console did not take them)")
                self._dropped = 0
            self._texts.put_nowait(text)
        except queue.Full:
            self._dropped += 1

    def draw(self, table: Callable[[int, int], list[str]]) -> None:
        """Replace the live table by what table(lines, columns) returns for the terminal's size.

        Does nothing while lines wait to be written, and while another job has the terminal.
        """
        if not self.is_terminal or not self._texts.empty():
            return
        with contextlib.suppress(OSError):  # if the terminal has no foreground job
            if os.tcgetpgrp(self._fd) != os.getpgrp():
                return
        columns, lines = terminal_size(self._fd)
        self._texts.put([printable(line)[: columns - 1] for line in table(max(lines - 2, 1), columns - 1)])

    def clear(self) -> None:
        """Remove the live table."""
        with contextlib.suppress(queue.Full):
            self._texts.put_nowait([])

    def flush(self) -> None:
        """Wait until everything is written, or until the console has accepted nothing for PATIENCE."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._texts.put(written, timeout=PATIENCE)
        waiting = -1
        while not written.is_set() and waiting != self._texts.qsize():
            waiting = self._texts.qsize()
            written.wait(PATIENCE)

    def _write(self) -> None:
        """Write the texts of the queue: a str is a log line, a list is the new live table. Set its events."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        table: list[str] = []
        while True:
            text = self._texts.get()
            if isinstance(text, threading.Event):
                text.set()
                continue
            columns = terminal_size(self._fd)[0] if table else 1  # a window made narrower wraps the table's lines
            height = sum(max(-(-len(line) // columns), 1) for line in table)
            clear = UP_TO_START.format(height) + CLEAR_BELOW if table else ""
            if isinstance(text, list):
                table, lines = text, text
            else:
                lines = [text, *table]
            data = (clear + "".join(f"{line}\n" for line in lines)).encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # the console is gone
                write_all(self._fd, data)
