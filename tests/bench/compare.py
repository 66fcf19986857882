"""Compare modes: with empty programs at elfprobe's places, and with elfprobe, against neither.

A ratio ("on / off") divides what was measured with a mode by what was measured without, just before, after or
between. The figure is the median of all ratios. The interval beside it contains the median of ever more with 95
% confidence (order statistics; it takes six). The floor of a ratio is the ratio for empty programs at TC ingress
and TC egress.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, NamedTuple

import pyroute2

from figures import Figure, at_least
from lab import Host, Lab
from progtest import Programs
from progtest import elfprobe as driver
from runs import elfprobe, inside

EMPTY_TC, EMPTY_XDP, BY_ADDRESS, BY_NAME = 'empty at TC', 'empty at XDP', 'by address', '-a'
APP = 'speedtest'  # the name of the program that makes the traffic
ON_OFF = 0.97  # the least ratio that nobody notices

Modes = Dict[str, Callable[[], ContextManager[Any]]]
Measured = Dict[str, float]


class Scene(NamedTuple):
    """An end of a lab, with elfprobe's programs loaded beside, and a folder for files."""

    lab: Lab
    programs: Programs
    folder: Path
    host: Host  # the client or the server, on whose first device elfprobe is
    app: str = APP  # what -a is given there

    def program(self, source: Path, name: str) -> Path:
        """Return the path of a program's copy that has this name."""
        path = self.folder / name
        if not path.exists():
            shutil.copy(source, path)
        return path

    def python(self, name: str) -> Path:
        """Return the path of a copy of the interpreter that has this name."""
        return self.program(Path(sys.executable).resolve(), name)

    def elfprobe(self, *arguments: str) -> ContextManager[Any]:
        """Return elfprobe at the host's device, to be entered."""
        return elfprobe(self.lab, *arguments, cwd=self.folder, host=self.host)

    def modes(self) -> Modes:
        return {
            EMPTY_TC: partial(empty_at_tc, self),
            EMPTY_XDP: partial(empty_at_xdp, self),
            BY_ADDRESS: partial(self.elfprobe, self.target),
            BY_NAME: partial(self.elfprobe, '-a', self.app),
        }

    @property
    def target(self) -> str:
        """The address of the other end."""
        lab = self.lab
        return lab.server_address(4) if self.host is lab.client else lab.client_address(4)


@contextmanager
def empty_at_tc(scene: Scene) -> Iterator[None]:
    """Attach an empty program at TC ingress and at TC egress of the host's device."""
    with inside(scene.host), pyroute2.IPRoute() as ipr:
        device = driver.find_device(ipr, scene.host.device)
        empty = scene.programs.kernel.program('empty_egress')
        with driver.TcxAttachment(ipr, device, empty, driver.BPF_TCX_INGRESS), driver.TcxAttachment(
            ipr, device, empty, driver.BPF_TCX_EGRESS
        ):
            yield


@contextmanager
def empty_at_xdp(scene: Scene) -> Iterator[None]:
    """Attach an empty program at native XDP and at TC egress of the host's device."""
    with inside(scene.host), pyroute2.IPRoute() as ipr:
        device, programs = driver.find_device(ipr, scene.host.device), scene.programs
        ingress, egress = map(programs.kernel.program, ('empty_ingress', 'empty_egress'))
        with driver.XdpAttachment(ipr, device, ingress, is_native=True, has_links=True), driver.TcxAttachment(
            ipr, device, egress, driver.BPF_TCX_EGRESS
        ):
            yield


class Comparison:
    """What was measured with each mode, and without elfprobe at about the same time."""

    def __init__(self) -> None:
        self._pairs: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))

    def add(self, what: str, mode: str, on: float, off: float) -> None:
        self._pairs[what][mode].append((on, off))

    def run(self, modes: Modes, rounds: int, measure: Callable[[], Measured]) -> None:
        """Measure all modes in each round, and without any before and after each. Rounds alternate the order."""
        off = measure()
        for number in range(rounds):
            for mode in list(modes)[:: -1 if number % 2 else 1]:
                with modes[mode]():
                    on = measure()
                before, off = off, measure()
                for what, value in on.items():
                    self.add(what, mode, value, (before[what] + off[what]) / 2)

    def off(self, what: str) -> float:
        """Return the median of what was measured without elfprobe."""
        return statistics.median(off for pairs in self._pairs[what].values() for _, off in pairs)

    def ratios(self, what: str, mode: str) -> list[float]:
        return [on / off for on, off in self._pairs[what][mode]]

    def ratio(self, what: str, mode: str) -> float:
        return statistics.median(self.ratios(what, mode))

    def figures(self, what: str, unit: str, note: Callable[[str], str] = lambda mode: '') -> Iterator[Figure]:
        """Yield the value without elfprobe, then the ratio of each other mode that measured it."""
        yield Figure(f'{what}: off', self.off(what), unit)
        floor = self.ratio(what, EMPTY_TC) if EMPTY_TC in self._pairs[what] else None

        def notes(mode: str) -> str:
            return ', '.join(filter(None, [interval(self.ratios(what, mode)), note(mode)]))

        for mode in self._pairs[what]:
            goal = None if mode not in (BY_ADDRESS, BY_NAME) else at_least(min(ON_OFF, floor or ON_OFF))
            yield Figure(
                f'{what}: {mode}, on / off', self.ratio(what, mode), 'times', goal, goal and floor, notes(mode)
            )


def interval(values: list[float], confidence: float = 0.95) -> str:
    """Return the confidence interval of the median in words; '' if there are too few values for one."""
    values, n = sorted(values), len(values)
    outside, rank = 0.0, 0  # the chance that the median is below the first `rank` values, or above the last
    while rank < n // 2 and outside + 2 * math.comb(n, rank) / 2**n <= 1 - confidence:
        outside += 2 * math.comb(n, rank) / 2**n
        rank += 1
    return f'95 %: {values[rank - 1]:.3f} to {values[n - rank]:.3f}' if rank else ''
