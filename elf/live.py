# SPDX-License-Identifier: GPL-3.0-only
"""The live view: what the terminal shows while a run goes on, and the keys that change it."""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import re
import select
import signal
import termios
import time
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from elf.console import Console, has_terminal
from elf.lines import Line, Mark, fitting
from elf.summary import Flow, FlowKey, Summary

ACTIVE_FOR = 3.0  # s after a flow's newest row: a hop that backs off lets others go without one for a while
FLOWS_WATCHED = 4096  # the newest ones; to look at more takes too long
FLOWS_NAMED = 2  # of a destination; of more than that only their number is shown
# Arrows, F1 and the like, whose further characters would be taken for keys (ECMA-48: CSI, SS3), and those with Alt
MANY_CHARACTERS = re.compile(rb"\x1b+(\[[0-?]*[ -/]*[@-~]|O?.)?", re.DOTALL)
NOTED_MAX = 32768  # stalled flows, and excluded destinations, that are remembered
# Signals that stop or end the process at once, and those that a terminal sends to a background process.
LEAVING = (
    signal.SIGTSTP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM,
    signal.SIGPROF, signal.SIGXCPU,
)  # fmt: skip
BACKGROUND = {signal.SIGTTIN, signal.SIGTTOU}

HELP = (
    "q  end the run",
    "p  pause the view, and go on with it; the measurement goes on all the time",
    "d  one destination, then the next one, then all again",
    "f  flows in place of hops, and back",
    "h  this help, and back",
)
COLOURS = (
    Line("yellow: a finding; a hop whose latency is far above its median at times", Mark.NOTABLE),
    Line("red: a flow that stalls, a destination that is excluded", Mark.BAD),
    Line("faint: an unresponsive hop, an idle flow", Mark.INACTIVE),
)


class Keyboard:
    """Keys that are pressed on standard input, if that is a terminal, while this process is in its foreground.

    The terminal then hands over each key at once and shows none. It gets its own settings back when the
    with-block ends, and before a signal stops or ends the process.
    """

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._is_there = os.isatty(fd)
        self._theirs: list[Any] = []  # the terminal's settings, as termios has them
        self._ours: list[Any] = []
        self._has_ours = False
        self._was_continued = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Take signals, and give the terminal its settings back at the end."""
        with contextlib.ExitStack() as stack:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, BACKGROUND)
            stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, blocked)
            handlers: dict[signal.Signals, Callable[[int, object], None]] = {
                signal.SIGCONT: self._note_continued,
                **dict.fromkeys(LEAVING, self._leave),
            }
            for number, handler in handlers.items():
                if signal.getsignal(number) == signal.SIG_DFL:
                    stack.callback(signal.signal, number, signal.SIG_DFL)
                    signal.signal(number, handler)
            stack.callback(self._give_back)
            yield

    def pressed(self) -> str:
        """Return the keys that were pressed since the last call. Never waits."""
        if not (self._is_there and has_terminal(self._fd)):
            self._has_ours = False  # who has the terminal now sets it
            return ""
        try:
            if not self._has_ours:
                self._take()
            if not select.select((self._fd,), (), (), 0)[0]:
                return ""
            data = os.read(self._fd, 64)
        except (OSError, termios.error):
            data = b""
        if not data:  # the terminal is gone
            self._is_there = False
        return MANY_CHARACTERS.sub(b"", data).decode("ascii", "replace").lower()

    def was_continued(self) -> bool:
        """Return whether the process was stopped and continued since the last call."""
        was_continued, self._was_continued = self._was_continued, False
        return was_continued

    def _take(self) -> None:
        now = termios.tcgetattr(self._fd)
        if now != self._ours:  # nobody may have changed them while the process was stopped
            self._theirs, self._ours = now, [*now[:6], list(now[6])]
            self._ours[3] &= ~(termios.ICANON | termios.ECHO)
            self._ours[6][termios.VMIN], self._ours[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._fd, termios.TCSANOW, self._ours)
            self._ours = termios.tcgetattr(self._fd)
        self._has_ours = True

    def _give_back(self) -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            if self._theirs and has_terminal(self._fd) and termios.tcgetattr(self._fd) == self._ours:
                termios.tcsetattr(self._fd, termios.TCSANOW, self._theirs)
        self._has_ours = False

    def _leave(self, number: int, _frame: object) -> None:
        """Let a signal do what it does without us, and go on if the process goes on."""
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        signal.signal(number, self._leave)

    def _note_continued(self, _number: int, _frame: object) -> None:
        self._has_ours = False
        self._was_continued = True


class FlowEvent(enum.IntEnum):
    """What the kernel finds out about a flow or its destination. The numbers are those of elfprobe.c."""

    STALLED = 1
    RESUMED = 2
    EXCLUDED = 3
    INTERCEPTED = 4  # which excludes the destination, too
    ARRIVED = 5


class FlowState(NamedTuple):
    """What a flow does now."""

    rank: int  # by which flows are ordered
    name: str
    mark: Mark


STALLED, EXCLUDED = FlowState(0, "stalled", Mark.BAD), FlowState(1, "excluded", Mark.BAD)
ACTIVE, IDLE = FlowState(2, "active", Mark.NONE), FlowState(3, "idle", Mark.INACTIVE)


class Activity:
    """How many rows a flow had at the last look, and what has changed since the look before."""

    __slots__ = ("flow", "rows", "rate", "since")

    def __init__(self, flow: Flow, now: float) -> None:
        self.flow = flow
        self.rows = 0
        self.rate = 0.0  # rows/s
        self.since = now  # when rows were added last (CLOCK_MONOTONIC, s)


class LiveView:
    """The live table, and what it shows."""

    def __init__(self, console: Console | None, device: str, summary: Summary) -> None:
        """Without a console, or if that is no terminal, nothing is shown."""
        self._console = console if console and console.is_terminal else None
        self._keyboard = Keyboard()
        self._device = device
        self._summary = summary
        self._begun_at = self._looked_at = time.monotonic()
        self._figures = 0, 0, 0  # probes, replies, unanswered
        self._rate = 0.0  # probes/s
        self._activity: dict[FlowKey, Activity] = {}
        self._stalled: set[FlowKey] = set()
        self._excluded: set[str] = set()
        self._destination: str | None = None  # the only one that is shown
        self._by_flow = self._has_help = self._is_paused = self._is_ended = False

    @property
    def is_shown(self) -> bool:
        return self._console is not None

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which keys are taken from the terminal."""
        return self._keyboard.watched() if self._console else contextlib.nullcontext()

    def note(self, kind: FlowEvent, key: FlowKey) -> None:
        """Note what the kernel tells of a flow."""
        if kind == FlowEvent.RESUMED:
            self._stalled.discard(key)
        elif kind == FlowEvent.STALLED and len(self._stalled) < NOTED_MAX:
            self._stalled.add(key)
        elif kind in (FlowEvent.EXCLUDED, FlowEvent.INTERCEPTED) and len(self._excluded) < NOTED_MAX:
            self._excluded.add(key[0])

    def take_keys(self) -> bool:
        """Do what the keys pressed since the last call say. Return whether the run is to end. Never waits."""
        if not self._console:
            return False
        if self._keyboard.was_continued():
            self._console.leave()
        pressed = self._keyboard.pressed()
        for key in pressed:
            self._press(key)
        if pressed:
            self._console.draw(self._lines)
        return self._is_ended

    def _press(self, key: str) -> None:
        if key == "q":
            self._is_ended = True
        elif key == "p":
            self._is_paused = not self._is_paused
        elif key == "d":
            self._destination = self._summary.destination_after(self._destination)
        elif key == "f":
            self._by_flow, self._has_help = not self._by_flow, False
        elif key == "h":
            self._has_help = not self._has_help

    def draw(self, probes: int, replies: int, unanswered: int) -> None:
        """Show the figures of now, unless the view is paused. probes: how many have been sent."""
        if self._console and not self._is_paused:
            self._look(probes)
            self._figures = probes, replies, unanswered
            self._console.draw(self._lines)

    def clear(self) -> None:
        """Remove the table."""
        if self._console:
            self._console.clear()

    def _look(self, probes: int) -> None:
        """Note what has come since the last look."""
        now = time.monotonic()
        seconds = max(now - self._looked_at, 1e-3)
        self._rate = (probes - self._figures[0]) / seconds
        self._looked_at = now
        before, self._activity = self._activity, {}
        for key, flow in itertools.islice(self._summary.newest_flows(), FLOWS_WATCHED):
            rows = sum(hop.answered + hop.unanswered for hop in flow.updated_hops().values())
            found = before.get(key)
            if not found or found.flow is not flow:  # it was forgotten meanwhile, and found again
                found = Activity(flow, now)
            self._activity[key] = found
            found.rate = (rows - found.rows) / seconds
            if rows != found.rows:
                found.rows, found.since = rows, now

    def _lines(self, room: int, columns: int) -> list[Line]:
        """Return at most so many lines for a terminal with so many columns."""
        minutes, seconds = divmod(int(self._looked_at - self._begun_at), 60)
        elapsed = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        state = "paused" if self._is_paused else f"{self._rate:.0f} probes/s"
        _, replies, unanswered = self._figures
        head = f"{self._device}: {elapsed}, {state}, {replies} replies, {unanswered} unanswered; h: keys"
        if self._has_help:
            lines = self._help()
        elif self._by_flow:
            lines = self._flows(room - 1, columns)
        else:
            lines = self._hops(columns)
        return [Line(head), *itertools.islice(lines, room - 1)]

    def _help(self) -> Iterator[Line]:
        yield Line("")
        yield from map(Line, HELP)
        if self._console and self._console.has_colours:
            yield Line("")
            yield from COLOURS

    def _hops(self, columns: int) -> Iterator[Line]:
        """Yield tables of the busiest destinations, or of the one that was chosen."""
        flows: dict[str, list[FlowKey]] = {}
        for key in self._activity:
            flows.setdefault(key[0], []).append(key)
        for dest, destination in self._summary.busiest():
            if self._destination in (None, dest):
                its = self._in_short(flows.get(dest, []), columns)
                yield from self._summary.table(dest, destination, columns, its)

    def _in_short(self, keys: Sequence[FlowKey], columns: int) -> Iterator[Line]:
        """Yield the state of a destination's flows."""
        states = sorted((self._state(key), key) for key in keys)
        if len(states) <= FLOWS_NAMED:
            for state, key in states:
                for text in fitting(
                    f"{state.name}: {self._summary.flow_label(key, self._activity[key].flow)}", columns
                ):
                    yield Line(text, state.mark)
            return
        same = itertools.groupby(state.name for state, _ in states)
        yield Line("flows: " + ", ".join(f"{sum(1 for _ in group)} {name}" for name, group in same))

    def _flows(self, room: int, columns: int) -> Iterator[Line]:
        """Yield at most so many lines: one or two for each flow. Stalled flows come first."""
        keys = [key for key in self._activity if self._destination in (None, key[0])]
        states = sorted((self._state(key), key) for key in keys)
        yield Line("")
        yield Line("state     rows/s   rows answered  hop mean, ms  resent  flow")
        room -= 2
        for number, (state, key) in enumerate(states):
            texts = fitting(self._flow(state, key), columns)
            if len(texts) + (number < len(states) - 1) > room:
                yield Line(f"{len(states) - number} more flows")
                return
            room -= len(texts)
            for text in texts:
                yield Line(text, state.mark)

    def _flow(self, state: FlowState, key: FlowKey) -> str:
        """Return the line of a flow."""
        activity = self._activity[key]
        hops = activity.flow.hops
        share = sum(hop.answered for hop in hops.values()) / max(activity.rows, 1)
        last = max((number for number, hop in hops.items() if hop.answered), default=0)
        mean = f"{last} {hops[last].total / hops[last].answered / 1e6:9.3f}" if last else ""
        figures = f"{activity.rate:7.1f} {activity.rows:6} {share:8.1%} {mean:>13} {activity.flow.retrans:7}"
        return f"{state.name:8} {figures}  {self._summary.flow_label(key, activity.flow)}"

    def _state(self, key: FlowKey) -> FlowState:
        if key in self._stalled:
            return STALLED
        if key[0] in self._excluded:
            return EXCLUDED
        return ACTIVE if self._looked_at - self._activity[key].since < ACTIVE_FOR else IDLE
