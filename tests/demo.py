"""The main job of elfprobe in a network on one machine; tests/demo calls this.

A program named speedtest uploads from a client through four routers to a server, for real, while
elfprobe measures its flow. The link behind the third router is slow, so its queue fills: that is
what the table must show.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import CommandFailed, Lab, interrupt_on_signals

ELFPROBE = Path(__file__).resolve().parent.parent / 'elfprobe.py'
SECONDS = 8
RATE, BURST, QUEUE = '50mbit', '32kb', '30ms'
FILEBASE = 'elf-demo'


def probe(lab: Lab, speedtest: Path) -> None:
    """Run speedtest in the client, and elfprobe beside it."""
    command = ('/usr/bin/python3', str(ELFPROBE), '-i', lab.client_device, '-a', 'speedtest', '-f', FILEBASE,
               '--duration', str(SECONDS))
    print('$ sudo python3 elfprobe.py', *command[2:], flush=True)
    with lab.iperf3_server():
        lab.client.popen(str(speedtest), '-c', lab.server_address(4), '-t', str(SECONDS + 5),
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lab.client.run(*command, timeout=SECONDS + 30, stdout=None, stderr=None)


def milliseconds(nanoseconds: float) -> str:
    return f'{nanoseconds / 1e6:9.3f}'


def show(path: Path) -> None:
    """The rows' beginning, and what they say hop by hop."""
    lines = path.read_text().splitlines()
    print(f'\n$ head -4 {path}', *lines[:4], sep='\n')
    rows = list(csv.DictReader(lines))
    print('\nhop  responder        probes  answered   min ms  median ms     95 %       max')
    for hop in sorted({int(row['outttl']) for row in rows}):
        of_hop = [row for row in rows if int(row['outttl']) == hop]
        latencies = sorted(int(row['latency']) for row in of_hop if row['responder'])
        responders = sorted({row['responder'] for row in of_hop} - {''}) or ['(silent)']
        figures = [latencies[0], statistics.median(latencies), latencies[len(latencies) * 95 // 100],
                   latencies[-1]] if latencies else []
        print(f'{hop:3}  {responders[0]:15} {len(of_hop):7} {len(latencies):9}', *map(milliseconds, figures))


def main() -> int:
    interrupt_on_signals()
    iperf3 = shutil.which('iperf3')
    assert iperf3
    try:
        with tempfile.TemporaryDirectory(prefix='elf-demo-') as directory, Lab(routers=4) as lab:
            speedtest = Path(directory, 'speedtest')
            shutil.copy(iperf3, speedtest)
            lab.routers[2].run('tc', 'qdisc', 'add', 'dev', 'eth1', 'root', 'tbf', 'rate', RATE,
                               'burst', BURST, 'latency', QUEUE)
            print(f'client - r1 - r2 - r3 - r4 - server; from r3 to r4 {RATE} and a queue of {QUEUE}\n')
            probe(lab, speedtest)
    except CommandFailed as failure:
        print(f'demo: {failure}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    show(Path(FILEBASE + '.csv'))
    return 0


if __name__ == '__main__':
    os.umask(0o022)
    sys.exit(main())
