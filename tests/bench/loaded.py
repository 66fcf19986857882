"""The programs of elfprobe.c and of bench.c, loaded; and a thread that stays on one processor."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import bcc

from progtest import Programs

BENCH_C = str(Path(__file__).with_name('bench.c'))
EXTRA = {
    **dict.fromkeys(('empty_egress', 'cycle_egress', 'begin_egress', 'end_egress', 'clone_egress'),
                    bcc.BPF.SCHED_CLS),
    **dict.fromkeys(('empty_ingress', 'cycle_ingress', 'one_result'), bcc.BPF.XDP),
}


def load(by_owner: bool = False, **config: Any) -> Programs:
    """The programs of elfprobe.c and those of bench.c, with their maps empty but for the heartbeat."""
    if by_owner:
        config['apps'] = ('speedtest',)
    programs = Programs(by_owner, hooks=BENCH_C, **config)
    for name, kind in EXTRA.items():
        programs.bpf.load_func(name, kind)
    programs.clear()
    return programs


@contextmanager
def pinned() -> Iterator[None]:
    """This thread stays on one CPU, not the first, which has most of the interrupts."""
    former = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(former)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, former)
