"""The driver: from the ring to the CSV, and what its process needs."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import statistics
import struct
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

from figures import Figure, at_least, at_most
from lab import Lab, wait_until
from loaded import load
from packets import frame
from progtest import LOOPBACK, Programs, elfprobe, own_namespace, pack_address
from runs import elfprobe as started

# Of a result; what has no value here is 0. The names are the driver's.
VALUES = {
    'seq': 123456, 'origseq': 3038610452, 'sendtime': 9555274576635, 'recvtime': 9555274637014,
    'dest': pack_address('10.0.5.2'), 'responder': pack_address('10.0.1.2'),
    'outttl': 3, 'recvttl': 62, 'sport': 5652, 'dport': 20756, 'protocol': 6, 'outipid': 2068, 'inipid': 2068,
    'app': b'speedtest', 'pid': 21592,
}  # fmt: skip


# From the ring to the CSV


def rows(quick: bool) -> Iterator[Figure]:
    """Results come from another process, by test runs of a program that puts one into the ring; the driver's
    own loop makes rows of them."""
    with tempfile.TemporaryDirectory(prefix='elf-') as directory, own_namespace(), load() as programs:
        result = programs.kernel.layout('result').member('result')
        layout, names = result.format, result.names
        assert set(VALUES) <= set(names)
        blank = {name: b'' if text.endswith('s') else 0 for name, text in zip(names, value_codes(layout))}
        template = struct.pack(layout, *({**blank, **VALUES}[name] for name in names))
        table = programs.kernel.map('layouts')
        layouts = table.new()
        ctypes.memmove(ctypes.addressof(layouts.result), template, len(template))
        table.put(0, layouts)
        path = Path(directory, 'rows')
        written, _, cpu, took = drained(programs, path, 10**6, 3)
        yield Figure('rows per second, when more come', written / took, '', at_least(600000))
        yield Figure('CPU time per row, when more come', 1e6 * cpu / written, 'us', at_most(1.5))
        seconds = 3 if quick else 10
        written, lost, cpu, took = drained(programs, path, 110000, seconds)  # 100,000 and some, as it starts late
        came = f'{(written + lost) / took:,.0f} per second'
        yield Figure(f'lost in {seconds} s, {came}', lost, '', at_most(0))
        yield Figure(f'CPU time per row, {came}', 1e6 * cpu / written, 'us', at_most(1.5))


def value_codes(layout: str) -> list[str]:
    """Those of a struct's format that stand for values."""
    return [code for code in re.findall(r'\d*[a-zA-Z]', layout) if not code.endswith('x')]


def drained(programs: Programs, path: Path, rate: int, seconds: float) -> tuple[int, int, float, float]:
    """Rows written, results lost, s of CPU time, and s in all, while results come at a rate."""
    programs.clear()
    config = elfprobe.Config((LOOPBACK.name,), duration=seconds)
    hook, elsewhere = elfprobe.Hook('tc', ''), ExitStack()
    attached = elfprobe.Attached([LOOPBACK], hook, programs.kernel, [], '', None, elsewhere)
    results, clock = programs.results, elfprobe.Clock()
    report = elfprobe.Report(
        elfprobe.facts(config, attached), clock, results.summary, results.rewrites, elfprobe.ProcessLog()
    )
    before = results.replies
    feeder = multiprocessing.get_context('fork').Process(target=feed, args=(programs, rate), daemon=True)
    with elfprobe.output_files(
        str(path), None, report.pieces({}, [], has_ended=False), None, []
    ) as files, elfprobe.Routes() as routes:
        destinations = elfprobe.Destinations(programs.kernel)
        reasons = elfprobe.Reasons(
            config, [LOOPBACK], routes, elfprobe.AppNames(()), destinations, (), tuple, elfprobe.duplicated_sockets,
            attached.read_elsewhere,
        )  # fmt: skip
        view = elfprobe.LiveView(None, LOOPBACK.name, results.summary)
        measurement = elfprobe.Measurement(config, attached, results, files, report, clock, view, reasons)
        feeder.start()
        try:
            cpu, begun = time.process_time(), time.monotonic()
            measurement.measure(elfprobe.Stop())
            cpu, took = time.process_time() - cpu, time.monotonic() - begun
        finally:
            feeder.kill()
            feeder.join()
    return results.replies - before, programs.counters().get('results_lost', 0), cpu, took


def feed(programs: Programs, rate: int) -> None:
    """Results at a rate, until killed or nobody's child any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    parent = os.getppid()
    start, done, packet = time.monotonic(), 0, frame()
    while os.getppid() == parent:
        due = int(rate * (time.monotonic() - start)) - done
        programs.duration('one_result', packet, max(due, 1))
        done += max(due, 1)
        time.sleep(0.001)


# Its process


def process(quick: bool) -> Iterator[Figure]:
    starts, seconds = (2, 3) if quick else (7, 10)
    with tempfile.TemporaryDirectory(prefix='elf-') as directory, Lab(routers=1) as lab:
        modes = {'by address': (lab.server_address(4),), '-a': ('-a', 'speedtest')}
        for mode, arguments in modes.items():
            took, peak, resident = [], 0, 0
            for _ in range(starts):
                start = time.monotonic()
                with started(lab, *arguments, cwd=Path(directory)) as run:
                    took.append(time.monotonic() - start)
                    peak = max(peak, memory(run.process.pid, 'VmHWM'))
                    resident = max(resident, memory(run.process.pid, 'VmRSS'))
            yield Figure(f'start to attached, {mode}, least', min(took), 's', at_most(0.6))
            yield Figure(f'start to attached, {mode}, median', statistics.median(took), 's', at_most(0.6))
            yield Figure(f'resident memory, {mode}', resident / 1e6, 'MB', at_most(70))
            yield Figure(f'resident memory while it compiles, {mode}', peak / 1e6, 'MB')
        with ExitStack() as stack:
            hosts = lab.client, lab.routers[0]  # there is one elfprobe per device
            runs = {
                mode: stack.enter_context(started(lab, *modes[mode], cwd=Path(directory), host=host))
                for mode, host in zip(modes, hosts)
            }
            wait_until(lambda: all(cpu_time(run.process.pid) for run in runs.values()), 5, 'they have run')
            before = {mode: cpu_time(run.process.pid) for mode, run in runs.items()}
            time.sleep(seconds)
            for mode, run in runs.items():
                used = cpu_time(run.process.pid) - before[mode]
                yield Figure(f'CPU without traffic, {mode}', 100 * used / seconds, '%', at_most(0.5))


def memory(pid: int, field: str) -> int:
    """Bytes, of a field of proc(5)'s status."""
    fields = dict(line.split(':') for line in Path(f'/proc/{pid}/status').read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def cpu_time(pid: int) -> float:
    """s of all its threads."""
    tasks = Path(f'/proc/{pid}/task')
    return sum(int((tasks / task / 'schedstat').read_text().split()[0]) for task in os.listdir(tasks)) / 1e9
