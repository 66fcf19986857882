"""The main job of elfprobe in a network on one machine; tests/demo calls this.

A program named speedtest uploads from a client through four routers to a server, for real, while
elfprobe measures its flow. The link behind the third router is slow, so its queue fills: that is
what the table must show.
"""

from __future__ import annotations

import os
import shutil
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
    path = Path(FILEBASE + '.csv')
    print(f'\n$ head -4 {path}', *path.read_text().splitlines()[:4], sep='\n')
    return 0


if __name__ == '__main__':
    os.umask(0o022)
    sys.exit(main())
