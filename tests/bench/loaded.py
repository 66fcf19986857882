"""The programs of elfprobe.c and of bench.c, loaded; and a thread that stays on one processor."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import bcc

from progtest import Programs

BENCH_C = str(Path(__file__).with_name('bench.c'))
EGRESS = 'empty_egress', 'cycle_egress', 'begin_egress', 'end_egress', 'clone_egress'
INGRESS = 'empty_ingress', 'cycle_ingress', 'one_result'


def load(by_owner: bool = False, ingress_tc: bool = True, **config: Any) -> Programs:
    """Load the programs of elfprobe.c and of bench.c. Their maps are empty but for the heartbeat."""
    if by_owner:
        config['apps'] = ('speedtest',)
    more = dict.fromkeys(EGRESS, bcc.BPF.SCHED_CLS)
    more.update(dict.fromkeys(INGRESS, bcc.BPF.SCHED_CLS if ingress_tc else bcc.BPF.XDP))
    programs = Programs(by_owner, ingress_tc=ingress_tc, hooks=BENCH_C, more_programs=more, **config)
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
