"""What elfprobe costs a download by virtio_net, the card of most virtual machines in clouds.

    guest: elfprobe, iperf3 - virtio_net - TAP - r1 - r2 - r3 - r4 - server: iperf3

The guest is a virtual machine of tests/vm, emulated, and so its throughput says nothing. The ratios do: each
divides what one boot measured on and off, in turn. Its image is built where it is missing, which takes
minutes.

This module runs at both ends: in the guest its main program measures, and leaves the figures in a file of
the folder that guest and machine share.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Iterator

sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / 'vm')]

import guest

import vm
from compare import EMPTY_TC, Comparison, Measured, Modes, Scene, empty_at_tc
from figures import Figure, Goal
from lab import Lab
from loaded import load
from runs import INGRESS_HOOKS, elfprobe

SUITE = 'trixie'
SECONDS = 900  # for all
TRANSFERS = 3  # with each attachment, which takes the guest longer than a transfer
DOWNLOADS = {'download, 1 stream': ('-P', '1', '-R'), 'download, 8 streams': ('-P', '8', '-R')}


def downloads(quick: bool) -> Iterator[Figure]:
    """Have the guest measure; tests/bench/run says which packages it is made of."""
    folder = vm.image(SUITE, os.environ['ELFPROBE_VM_PACKAGES'].split())
    share = vm.prepare(f'{SUITE}.bench', {}, patience=vm.PATIENCE)
    (share / 'job').write_text(
        f'export ELFPROBE_TESTS_PATIENCE={vm.PATIENCE} PYTHONDONTWRITEBYTECODE=1\n'
        f'python3 tests/bench/virtual.py /host/out/figures {1 if quick else 2} >/host/out/log 2>&1\n'
    )
    vm.start(SUITE, folder, share, SECONDS)
    measured = share / 'out' / 'figures'
    if not measured.exists():
        raise vm.Failure(f'the guest has measured nothing:\n{vm.text(share / "out/log")}')
    for name, value, unit, goal, floor, note in json.loads(measured.read_text()):
        yield Figure(f'guest, virtio_net, {name}', value, unit, Goal(*goal) if goal else None, floor, note)


def measured_inside(rounds: int) -> Iterator[Figure]:
    """Measure, in the guest."""
    compared = Comparison()
    with tempfile.TemporaryDirectory(prefix='elf-') as folder, load(ingress_tc=False) as programs, guest.card(
        'virtio_net'
    ) as lab:
        modes: Modes = {EMPTY_TC: partial(empty_at_tc, Scene(lab, programs, Path(folder), lab.client))}
        for hook, options in INGRESS_HOOKS.items():
            modes[f'by address, hook {hook}'] = partial(
                elfprobe, lab, *options, lab.server_address(4), cwd=Path(folder)
            )
        compared.run(modes, rounds, partial(measure_downloads, lab))
    for what in DOWNLOADS:
        yield from compared.figures(what, 'Gbit/s')


def measure_downloads(lab: Lab) -> Measured:
    program = Path(shutil.which('iperf3') or 'iperf3')
    return {
        what: statistics.median(
            transfer(lab, program, *options)['sum_received']['bits_per_second'] / 1e9 for _ in range(TRANSFERS)
        )
        for what, options in DOWNLOADS.items()
    }


def transfer(lab: Lab, speedtest: Path, *options: str) -> dict[str, Any]:
    """Return what iperf3 says at the end of one second."""
    said = lab.client.run(str(speedtest), '-c', lab.server_address(4), '-t', '1', '-J', *options)
    end: dict[str, Any] = json.loads(said.stdout)['end']
    return end


if __name__ == '__main__':
    Path(sys.argv[1]).write_text(json.dumps(list(measured_inside(int(sys.argv[2])))))
