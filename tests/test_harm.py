"""A flow in trouble is left alone."""

from __future__ import annotations

import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

from lab import Lab, wait_until
from runs import Run, elfprobe

BLOCK = """\
table inet trouble {
    chain forward {
        type filter hook forward priority 0
        tcp dport 5201 drop
    }
}
"""
STALL = 3e9  # ns without an acknowledgement


@contextmanager
def blocked(lab: Lab) -> Iterator[None]:
    """A firewall at hop 2 drops what the client sends."""
    lab.routers[1].run('nft', '-f', '-', input=BLOCK)
    try:
        yield
    finally:
        lab.routers[1].run('nft', 'delete', 'table', 'inet', 'trouble')


def stall(lab: Lab, run: Run, says: str) -> tuple[int, int]:
    """Block the flow, once it is probed, until elfprobe says so. From when to when, CLOCK_MONOTONIC, ns."""
    rows = len(run.rows())
    wait_until(lambda: len(run.rows()) >= rows + 50, 10, 'the flow is probed')
    with blocked(lab):
        begin = time.monotonic_ns()
        wait_until(lambda: says in run.log, 20, says)
        return begin, time.monotonic_ns()


def segments_sent(lab: Lab) -> int:
    return int(lab.client.run('nstat', '-asz', 'TcpOutSegs').stdout.split()[-2])


@pytest.mark.root
@pytest.mark.parametrize('version', [4, 6])
def test_stalled_flow_is_not_probed(lab4: Lab, tmp_path: Path, version: int) -> None:
    """Neither while it stalls nor, after a second time, ever again; nor are its retransmissions."""
    with lab4.iperf3_server(), elfprobe(lab4, '-d', lab4.server_address(version), cwd=tmp_path) as run:
        lab4.client.popen('iperf3', '-c', lab4.server_address(version), '-t', '60', '-b', '10M',
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        first = stall(lab4, run, 'nothing is acknowledged any more')
        wait_until(lambda: 'moves again' in run.log, 20, 'it moves again')
        second = stall(lab4, run, 'left alone for the rest of this run')
        sent = segments_sent(lab4)
        wait_until(lambda: segments_sent(lab4) >= sent + 100, 20, 'the flow goes on')
        assert run.stop() == 0
    assert all(end - begin > 0.8 * STALL for begin, end in (first, second))
    assert run.counters['carrier_resent'] > 0
    sendtimes = [row.sendtime for row in run.rows()]
    # What was not sent before goes out until the window is full, which takes less than a second.
    for begin, end in first, second:
        assert not [sendtime for sendtime in sendtimes if begin + 1e9 < sendtime < end]
    assert max(sendtimes) < second[1]
