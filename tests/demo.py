"""The main job of elfprobe in a network on one machine; tests/demo calls this.

A program named speedtest uploads from a client through four routers to a server, for real, while
elfprobe measures its flow. For some seconds the link behind the third router is slow, so its queue
fills: that is what the table must show, and the picture, where elfplot.py has what it draws with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from lab import CommandFailed, Lab, interrupt_on_signals

ELFPROBE = Path(__file__).resolve().parent.parent / 'elfprobe.py'
SECONDS, SLOW_FROM, SLOW_UNTIL = 12, 4, 8
RATE, BURST, QUEUE, LOAD = '50mbit', '32kb', '30ms', '200M'
FILEBASE = 'elf-demo'
DRAWN_WITH = ('matplotlib',)  # what elfplot.py needs; numpy comes with it


def probe(lab: Lab, speedtest: Path) -> None:
    """Run speedtest in the client, and elfprobe beside it; the link is slow for a while."""
    command = (
        '/usr/bin/python3',
        str(ELFPROBE),
        '-i',
        lab.client_device,
        '-a',
        'speedtest',
        '-l',
        '-f',
        FILEBASE,
        '--duration',
        str(SECONDS),
    )
    print('$ sudo python3 elfprobe.py', *command[2:], flush=True)
    slow = 'dev', lab.routers[2].devices[1], 'root', 'tbf', 'rate', RATE, 'burst', BURST, 'latency', QUEUE
    with lab.iperf3_server():
        lab.client.popen(
            str(speedtest),
            '-c',
            lab.server_address(4),
            '-b',
            LOAD,
            '-t',
            str(SECONDS + 5),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        elfprobe = lab.client.popen(*command)
        for wait, verb in (SLOW_FROM, 'add'), (SLOW_UNTIL - SLOW_FROM, 'del'):
            time.sleep(wait)
            lab.routers[2].run('tc', 'qdisc', verb, *slow)
        if elfprobe.wait(SECONDS + 30):
            raise CommandFailed(f'elfprobe: exit status {elfprobe.returncode}')


def main() -> int:
    interrupt_on_signals()
    iperf3 = shutil.which('iperf3')
    assert iperf3
    try:
        with tempfile.TemporaryDirectory(prefix='elf-demo-') as directory, Lab(routers=4) as lab:
            speedtest = Path(directory, 'speedtest')
            shutil.copy(iperf3, speedtest)
            print(
                f'client - r1 - r2 - r3 - r4 - server; from second {SLOW_FROM} to {SLOW_UNTIL} '
                f'{RATE} and a queue of {QUEUE} from r3 to r4\n'
            )
            probe(lab, speedtest)
    except CommandFailed as failure:
        print(f'demo: {failure}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    path = Path(FILEBASE + '.csv')
    print(f'\n$ head -4 {path}', *path.read_text().splitlines()[:4], sep='\n', flush=True)
    if not all(map(find_spec, DRAWN_WITH)):
        packages = ' '.join(f'python3-{name}' for name in DRAWN_WITH)
        print(
            f'\nThere is no picture, since elfplot.py needs more packages. To get it:\n'
            f'$ sudo apt-get install --no-install-recommends {packages}\n$ python3 elfplot.py {path}'
        )
        return 0
    print(f'\n$ python3 elfplot.py {path}', flush=True)
    return subprocess.run(
        ['/usr/bin/python3', str(ELFPROBE.with_name('elfplot.py')), str(path)], check=False
    ).returncode


if __name__ == '__main__':
    os.umask(0o022)
    sys.exit(main())
