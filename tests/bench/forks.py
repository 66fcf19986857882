"""What elfprobe costs other programs' new processes.

A program that elfprobe does not look for starts /bin/true and waits for it, again and again, beside an elfprobe
that looks at each new process for the name of -a.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Iterator

from compare import APP, BY_NAME, Comparison
from figures import Figure
from lab import Lab
from loaded import pinned
from runs import elfprobe


def forks(quick: bool) -> Iterator[Figure]:
    rounds, seconds = (2, 0.5) if quick else (8, 1)
    true, compared = shutil.which('true') or '/bin/true', Comparison()
    what = "other programs' fork and exec"
    with tempfile.TemporaryDirectory(prefix='elf-') as folder, Lab(routers=1) as lab:
        compared.run(
            {BY_NAME: partial(elfprobe, lab, '-a', APP, cwd=Path(folder))},
            rounds,
            lambda: {what: spawn_rate(true, seconds)},
        )
    yield from compared.figures(what, '1/s')


def spawn_rate(program: str, seconds: float) -> float:
    """Return how many times a second a program can be started and waited for, on one processor."""
    done, start = 0, time.perf_counter()
    end = start + seconds
    with pinned():  # not around elfprobe, which would inherit it
        while time.perf_counter() < end:
            os.waitpid(os.posix_spawn(program, [program], {}), 0)
            done += 1
    return done / (time.perf_counter() - start)
