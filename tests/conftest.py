"""Fixtures, and what happens to tests that cannot run here.

Such a test is skipped, and says why; with ELFPROBE_TESTS_STRICT=1 in the environment it fails instead.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from functools import lru_cache
from typing import Callable, Iterator

import pytest

from lab import Lab, interrupt_on_signals

BPF_MAP_TYPE_ARRAY = 2


@lru_cache(maxsize=None)
def missing() -> str | None:
    """Why tests marked `root` cannot run here, or None."""
    if os.geteuid() != 0:
        return 'not root'
    try:
        from bcc import lib
    except (ImportError, OSError) as error:
        return f'bcc cannot be imported: {error}'
    descriptor = lib.bcc_create_map(BPF_MAP_TYPE_ARRAY, b'elf_missing', 4, 4, 1, 0)
    if descriptor < 0:
        return 'the bpf() system call does not work'
    os.close(descriptor)
    return None


def obstacle(item: pytest.Item) -> str | None:
    """Why this test cannot run here, or None."""
    if item.get_closest_marker('root') and missing():
        return missing()
    programs = [program for marker in item.iter_markers('needs') for program in marker.args]
    absent = [program for program in programs if not shutil.which(program)]
    return f'not installed: {", ".join(absent)}' if absent else None


def pytest_configure() -> None:
    interrupt_on_signals()
    for name in [name for name in os.environ if name.startswith('SUDO_')]:
        del os.environ[name]  # elfprobe would take these tests for the user's who called sudo
    os.environ['PYTHON_COLORS'] = '0'  # of tracebacks, since Python 3.13


# What no other test on the machine can disturb, nor it them; what follows processes by name, which may be those of
# other tests, too; what is left. Each group takes about a third of the time (see tests/run).
BESIDE = {
    'test_driver', 'test_findings', 'test_firewalls', 'test_install', 'test_lab', 'test_packets', 'test_page',
    'test_path_model',
    'test_plot', 'test_replies', 'test_stalls',
}  # fmt: skip
BY_NAME = {
    'test_arrivals', 'test_cache', 'test_command', 'test_fleet', 'test_harm', 'test_live', 'test_metrics',
    'test_owners', 'test_pcapng', 'test_reasons', 'test_report', 'test_summary',
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Three groups of modules. The tests of a group run one after the other."""
    for item in items:
        module = item.nodeid.partition('.')[0]
        group = 'beside' if module in BESIDE else 'by name' if module in BY_NAME else 'others'
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(tryfirst=True)  # before fixtures that would need the same
def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = obstacle(item)
    if reason and os.environ.get('ELFPROBE_TESTS_STRICT') == '1':
        pytest.fail(reason, pytrace=False)
    elif reason:
        pytest.skip(reason)


@pytest.fixture(scope='module')
def lab4() -> Iterator[Lab]:
    """A lab of four routers that the tests of a module share; leave it as you found it."""
    with Lab(routers=4) as lab:
        yield lab


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """Builds labs, with `Lab`'s arguments, that end with the test."""
    with ExitStack() as stack:
        yield lambda *args, **kw: stack.enter_context(Lab(*args, **kw))
