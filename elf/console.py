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
from typing import Callable, Iterable, Iterator

from elf.lines import Line, Mark, cut, width
from elf.usage import printable

LINES_MAX = 10000  # that may wait while the console accepts no data
PATIENCE = 1.0  # s to wait at the end for a console that accepts no data
SIZE = 80, 24  # columns and lines of a terminal that does not tell its size
# ECMA-48: CPL and CNL (to the start of a line above or below), CHA (to a column), EL and ED (erase from here to the
# end of the line or of the screen), SGR (colour)
LINES_UP, LINES_DOWN, TO_COLUMN = "\x1b[{}F", "\x1b[{}E", "\x1b[{}G"
CLEAR_LINE, CLEAR_BELOW, COLOUR = "\x1b[K", "\x1b[J", "\x1b[{}m"
GAP_MIN = 6  # equal characters between two changes from which on it is shorter to go behind them


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


def has_terminal(fd: int) -> bool:
    """Return whether this process is in the foreground of a terminal, or no process is."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True


class Screen:
    """Makes a terminal show a table below log lines, in few bytes: only what has changed is written.

    Between two calls, the cursor is at the start of the line below the table.
    """

    def __init__(self, has_colours: bool) -> None:
        self._has_colours = has_colours
        self._table: list[Line] = []  # that is shown
        self._size = SIZE  # of the terminal, when the table was written

    def draw(self, table: list[Line], size: tuple[int, int]) -> str:
        """Return what replaces the table. Its lines must be shorter than the terminal's."""
        if size != self._size:  # the terminal may have moved and broken the lines
            return self.clear(size) + self._append(table, size)
        before, row, parts = self._table, len(self._table), []
        for number, (old, new) in enumerate(zip(before, table)):
            if old != new:
                parts += [to_row(row, number), *self._changes(old, new)]
                row = number
        kept = min(len(before), len(table))
        if row != kept:
            parts.append(to_row(row, kept))
        if kept < len(before):
            parts.append(CLEAR_BELOW)
        self._table = table[:kept]
        return "".join(parts) + self._append(table[kept:], size)

    def log(self, text: str, size: tuple[int, int]) -> str:
        """Return what writes a line above the table."""
        table = self._table
        return f"{self.clear(size)}{text}\n{self._append(table, size)}"

    def clear(self, size: tuple[int, int]) -> str:
        """Return what removes the table."""
        height = sum(max(-(-width(line.text) // size[0]), 1) for line in self._table)
        self._table = []
        return LINES_UP.format(height) + CLEAR_BELOW if height else ""

    def leave(self) -> None:
        """Leave the table as it is, since others have written below it: the next one comes below that."""
        self._table = []

    def _append(self, lines: list[Line], size: tuple[int, int]) -> str:
        self._table = self._table + lines
        self._size = size
        return "".join(self._coloured(line.text, line.mark) + "\n" for line in lines)

    def _coloured(self, text: str, mark: Mark) -> str:
        if not (self._has_colours and mark.value and text):
            return text
        return COLOUR.format(mark.value) + text + COLOUR.format("")

    def _changes(self, old: Line, new: Line) -> Iterator[str]:
        """Yield what turns a line, at whose start the cursor is, into another one."""
        if old.mark != new.mark or not (old.text + new.text).isascii():  # other characters may take two columns
            yield self._coloured(*new) + CLEAR_LINE
            return
        for begin, end in differences(old.text, new.text):
            yield TO_COLUMN.format(begin + 1) + self._coloured(new.text[begin:end], new.mark)
        if len(new.text) < len(old.text):
            yield TO_COLUMN.format(len(new.text) + 1) + CLEAR_LINE


def to_row(row: int, to: int) -> str:
    """Return what moves the cursor from a row to the start of another one."""
    return LINES_UP.format(row - to) if to < row else LINES_DOWN.format(to - row)


def differences(old: str, new: str) -> list[tuple[int, int]]:
    """Return where the new text is not as the old one: begin and end of each part, at least GAP_MIN apart."""
    parts: list[tuple[int, int]] = []
    for at in range(len(new)):
        if at >= len(old) or old[at] != new[at]:
            begin = parts.pop()[0] if parts and at - parts[-1][1] < GAP_MIN else at
            parts.append((begin, at + 1))
    return parts


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
        self.has_colours = not os.environ.get("NO_COLOR")
        self._screen = Screen(self.has_colours)
        self._texts: queue.Queue[str | list[Line] | threading.Event | Callable[[], None]] = queue.Queue(LINES_MAX)
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

    def draw(self, table: Callable[[int, int], list[Line]]) -> None:
        """Replace the live table by what table(lines, columns) returns for the terminal's size.

        Does nothing while lines wait to be written, and while another job has the terminal.
        """
        if not self.is_terminal or not self._texts.empty():
            return
        if not has_terminal(self._fd):
            self.leave()
            return
        columns, lines = terminal_size(self._fd)
        self._texts.put(
            [Line(cut(printable(text), columns - 1), mark) for text, mark in table(max(lines - 2, 1), columns - 1)]
        )

    def leave(self) -> None:
        """Leave the live table as it is, since others have written below it: the next one comes below that."""
        with contextlib.suppress(queue.Full):
            self._texts.put_nowait(self._screen.leave)

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
        """Write the texts of the queue: a str is a log line, a list is the new live table. Set its events, and
        call its functions."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        while True:
            text = self._texts.get()
            if isinstance(text, threading.Event):
                text.set()
                continue
            size = terminal_size(self._fd)
            if isinstance(text, str):
                data = self._screen.log(text, size)
            elif isinstance(text, list):
                data = self._screen.draw(text, size)
            else:
                text()
                continue
            with contextlib.suppress(OSError):  # the console is gone
                write_all(self._fd, data.encode(errors="backslashreplace"))
