"""Compare modes: without elfprobe, with empty programs at its places, and with elfprobe.

Each round measures all modes, in an order that alternates, so that a drift of the machine hits all alike. A
ratio divides what a round measured with a mode by what it measured without elfprobe ("on / off"); the figure
is the median over the rounds. The floor of a ratio is that of empty programs at TC ingress and TC egress.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, NamedTuple

import pyroute2

from figures import Figure, at_least
from lab import Lab
from loaded import load
from progtest import Programs
from progtest import elfprobe as driver
from runs import elfprobe, inside

OFF, EMPTY_TC, EMPTY_XDP, BY_ADDRESS, BY_NAME = 'off', 'empty at TC', 'empty at XDP', 'by address', '-a'
APP = 'speedtest'  # the name of the program that makes the traffic
ON_OFF = 0.97  # the least ratio that nobody notices

Modes = Dict[str, Callable[[], ContextManager[Any]]]
Measured = Dict[str, float]


class Scene(NamedTuple):
    """A lab with elfprobe's programs loaded beside, and a folder for files."""

    lab: Lab
    programs: Programs
    folder: Path

    def program(self, source: str) -> Path:
        """Return the path of a program's copy that has the name APP."""
        path = self.folder / APP
        if not path.exists():
            shutil.copy(source, path)
        return path

    def modes(self) -> Modes:
        on = partial(elfprobe, self.lab, cwd=self.folder)
        return {
            OFF: nullcontext,
            EMPTY_TC: partial(empty_at_tc, self),
            EMPTY_XDP: partial(empty_at_xdp, self),
            BY_ADDRESS: partial(on, self.lab.server_address(4)),
            BY_NAME: partial(on, '-a', APP),
        }


@contextmanager
def scene(routers: int) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix='elf-') as folder, load(ingress_tc=False) as programs, Lab(
        routers
    ) as lab:
        yield Scene(lab, programs, Path(folder))


@contextmanager
def empty_at_tc(scene: Scene) -> Iterator[None]:
    """Attach an empty program at TC ingress and at TC egress of the client's device."""
    with inside(scene.lab.client), pyroute2.IPRoute() as ipr:
        device = driver.find_device(ipr, scene.lab.client_device)
        empty = scene.programs.bpf.funcs[b'empty_egress'].fd
        with driver.TcxAttachment(ipr, device, empty, driver.BPF_TCX_INGRESS), driver.TcxAttachment(
            ipr, device, empty, driver.BPF_TCX_EGRESS
        ):
            yield


@contextmanager
def empty_at_xdp(scene: Scene) -> Iterator[None]:
    """Attach an empty program at native XDP and at TC egress of the client's device."""
    with inside(scene.lab.client), pyroute2.IPRoute() as ipr:
        device, programs = driver.find_device(ipr, scene.lab.client_device), scene.programs
        ingress, egress = (programs.bpf.funcs[name].fd for name in (b'empty_ingress', b'empty_egress'))
        with driver.XdpAttachment(ipr, device, ingress, is_native=True), driver.TcxAttachment(
            ipr, device, egress, driver.BPF_TCX_EGRESS
        ):
            yield


class Comparison:
    """What each mode measured in each round, and what was measured without elfprobe to compare it with."""

    def __init__(self) -> None:
        self._pairs: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))

    def run(self, modes: Modes, rounds: int, measure: Callable[[str], Measured]) -> None:
        """Measure all modes in each round, OFF among them. `measure` gets the mode's name.

        Without OFF among the modes it is measured before each of them.
        """
        for number in range(rounds):
            on: dict[str, Measured] = {}
            off: dict[str, Measured] = {}
            for mode in list(modes)[:: -1 if number % 2 else 1]:
                if OFF not in modes:
                    off[mode] = measure(OFF)
                with modes[mode]():
                    on[mode] = measure(mode)
            for mode in modes:
                for what, value in on[mode].items():
                    without = off.get(mode) or on[OFF]
                    self._pairs[what][mode].append((value, without[what]))

    def total(self, what: str, mode: str) -> int:
        return round(sum(on for on, _ in self._pairs[what][mode]))

    def off(self, what: str) -> float:
        """Return the median of what was measured without elfprobe."""
        return statistics.median(off for pairs in self._pairs[what].values() for _, off in pairs)

    def ratio(self, what: str, mode: str) -> float:
        return statistics.median(on / off for on, off in self._pairs[what][mode])

    def figures(self, what: str, unit: str, note: Callable[[str], str] = lambda mode: '') -> Iterator[Figure]:
        """Yield the value without elfprobe, then the ratio of each other mode that measured it."""
        yield Figure(f'{what}: off', self.off(what), unit, note=note(OFF))
        floor = self.ratio(what, EMPTY_TC) if EMPTY_TC in self._pairs[what] else None
        for mode in self._pairs[what]:
            if mode in (EMPTY_TC, EMPTY_XDP):
                yield Figure(f'{what}: {mode}, on / off', self.ratio(what, mode), 'times', note=note(mode))
            elif mode != OFF:
                goal = at_least(min(ON_OFF, floor or ON_OFF))
                yield Figure(f'{what}: {mode}, on / off', self.ratio(what, mode), 'times', goal, floor, note(mode))
