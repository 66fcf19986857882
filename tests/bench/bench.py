"""All benchmarks, and one table of what they measured; tests/bench/run calls this.

A goal that is missed is shown, and is no failure: exit status 1 is for a benchmark that did not come to
its end. Everything is measured in namespaces of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Callable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bcc

import driver
import flows
import forks
import packets
import sockets
import twins
import virtual
from figures import Figure, table_lines
from lab import interrupt_on_signals

# Each takes whether to be quick: some times fewer rounds, and so less exact.
BENCHMARKS: dict[str, Callable[[bool], Iterator[Figure]]] = {
    'packets': packets.by_test_run,
    'destinations': packets.by_table_size,
    'owners': packets.by_owner_in_traffic,
    'probes': packets.in_traffic,
    'throughput': twins.throughput,
    'transactions': twins.transactions,
    'forks': forks.forks,
    'guest': virtual.downloads,
    'accuracy': flows.accuracy,
    'rows': driver.rows,
    'process': driver.process,
    'sockets': sockets.per_socket,
}


def first_line(path: str) -> str:
    """Of a file of the kernel's; it need not have it."""
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return 'unknown'


def machine() -> Iterator[str]:
    """What the figures depend on besides elfprobe."""
    cpuinfo = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(':') for line in Path('/proc/cpuinfo').read_text().splitlines())
    }
    model = cpuinfo.get('model name', platform.machine())
    virtual = ', virtual machine' if 'hypervisor' in cpuinfo.get('flags', '').split() else ''
    yield f'{model}, {os.cpu_count()} cores{virtual}; load {os.getloadavg()[0]:.1f} at the start'
    jit = {'0': 'off', '1': 'on', '2': 'on, for debugging'}.get(
        first_line('/proc/sys/net/core/bpf_jit_enable'), 'unknown'
    )
    yield (
        f'Linux {platform.release()} {platform.machine()}, BPF JIT {jit}; '
        f'Spectre v2: {first_line("/sys/devices/system/cpu/vulnerabilities/spectre_v2")}'
    )
    yield f'BCC {bcc.__version__}, Python {platform.python_version()}'


def main() -> int:
    parser = argparse.ArgumentParser(prog='tests/bench/run', description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='fewer rounds')
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(BENCHMARKS)}')
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f'no such benchmark: {", ".join(sorted(unknown))}')
    interrupt_on_signals()
    with tempfile.TemporaryDirectory(prefix='elf-bench-') as folder:
        tempfile.tempdir = os.environ['TMPDIR'] = folder  # what a killed child leaves goes, too
        return run(arguments.names or list(BENCHMARKS), arguments.quick)


def run(names: list[str], quick: bool) -> int:
    """The exit status."""
    lines, status = list(machine()), 0
    for name in names:
        start = time.monotonic()
        try:
            figures = list(BENCHMARKS[name](quick))
        except KeyboardInterrupt:
            status = 130
            break
        except Exception:
            traceback.print_exc()
            status = 1
            continue
        finally:
            print(f'{name}: {time.monotonic() - start:.0f} s', file=sys.stderr)
        lines += ['', *table_lines(name, figures)]
    print(*lines, sep='\n')
    return status


if __name__ == '__main__':
    sys.exit(main())
