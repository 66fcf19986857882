"""Network cards of real drivers are left as they were, and keep their offloads while elfprobe runs.

tests/vm/run runs this in a virtual machine that has the cards: see guest.py, which draws them. A test is
skipped where the guest has no such card, or its kernel no driver.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Iterator

import pytest
from guest import CARDS, NoCard, card

from lab import CommandFailed, Host, Lab, wait_until
from runs import INGRESS_HOOKS, elfprobe

pytestmark = pytest.mark.root

# The hooks that must cost the application nothing: nothing of the card may change even meanwhile.
HARMLESS = 'auto', 'tc'
# What virtio_net calls its receive offload depends on the kernel.
RECEIVE_OFFLOADS = {'large-receive-offload: on', 'rx-gro-hw: on'}


@pytest.fixture(params=CARDS)
def lab(request) -> Iterator[Lab]:
    try:
        with card(request.param) as lab:
            yield lab
    except NoCard as error:
        pytest.skip(str(error))


def offloads(host: Host) -> list[str]:
    return host.run('ethtool', '-k', host.device).stdout.splitlines()


def state(host: Host) -> dict[str, list[str]]:
    """Return all that is set at the card, in lines, by the command that shows it."""
    filters = [f'tc filter show dev {host.device}{where}' for where in ('', ' ingress', ' egress')]
    commands = f'ip -d link show {host.device}', f'tc qdisc show dev {host.device}', *filters
    return {
        f'ethtool -k {host.device}': offloads(host),
        **{command: host.run(*command.split()).stdout.splitlines() for command in commands},
    }


def changes(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """Return the lines that differ, each with its command."""
    return [
        f'{sign} {command}: {line}'
        for command in before
        for sign, lines, others in (('-', before, after), ('+', after, before))
        for line in lines[command]
        if line not in others[command]
    ]


def download(lab: Lab) -> None:
    lab.client.run('iperf3', '-c', lab.server_address(4), '-R', '-n', '10M')


def returns_to(before: dict[str, list[str]], host: Host) -> list[str]:
    """Return what stays different. A card may take a while to have its carrier again."""
    with suppress(TimeoutError):
        wait_until(lambda: not changes(before, state(host)), 3, 'the card is as it was')
    return changes(before, state(host))


@pytest.mark.parametrize('hook', INGRESS_HOOKS)
def test_card_keeps_its_settings(lab, hook, tmp_path):
    """All of them when elfprobe has ended; the offloads also before, where the hook promises that."""
    before, meanwhile = state(lab.client), []
    try:
        with elfprobe(lab, *INGRESS_HOOKS[hook], lab.server_address(4), cwd=tmp_path) as run:
            meanwhile = offloads(lab.client)
            download(lab)
            assert run.stop() == 0
        assert any(row.is_answered for row in run.rows())
    except CommandFailed as refused:
        if hook != 'xdp' or 'exit status 1\n' not in str(refused):  # not all drivers have native XDP
            raise
    assert returns_to(before, lab.client) == []
    if hook in HARMLESS:
        assert [line for line in meanwhile if line not in offloads(lab.client)] == []


def test_virtio_has_receive_offload():
    """Without it, the test above would not see it go."""
    with card('virtio_net') as lab:
        assert RECEIVE_OFFLOADS & {line.strip() for line in offloads(lab.client)}
