"""Compiled programs that are kept for the next start: they are used, and nothing else in the cache is trusted."""

from __future__ import annotations

import base64
import json
import marshal
import os
import py_compile
import re
import shutil
import sys
from pathlib import Path

import pytest

from lab import Lab, run, wait_until
from runs import ELFPROBE, Run, elfprobe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elf.cache import CACHE_FILE_MAX, CACHE_FILES_MAX, Cache

USED = 'programs that an earlier run compiled are loaded'

pytestmark = pytest.mark.root


def in_place_of_var_cache(folder: Path) -> list[str]:
    """Return the beginning of a command that sees `folder` in the place of /var/cache."""
    return ['unshare', '--mount', 'sh', '-c', f'mount --bind {folder} /var/cache && exec "$@"', 'sh']


def with_cache(lab: Lab, folder: Path) -> list[str]:
    """Return the command that enters the client's namespace, with `folder` in the place of /var/cache."""
    return [*lab.client.command(), *in_place_of_var_cache(folder)]


def programs_in(folder: Path) -> list[Path]:
    """Return the files with programs, and not those with Python's modules."""
    return [path for path in (folder / 'elfprobe').iterdir() if isinstance(json.loads(path.read_text()), dict)]


def start(lab: Lab, folder: Path, *options: str) -> Run:
    """Run elfprobe until it has rows. The routers answer a ping."""
    with elfprobe(lab, '-d', *options, lab.server_address(4), cwd=folder, via=with_cache(lab, folder)) as run:
        with lab.client.popen('ping', '-i.01', lab.server_address(4), stdout=-3) as ping:
            wait_until(lambda: len(run.rows()) > 40, 20, 'rows')
            ping.kill()
        resident, size = compiler_text(run.process.pid)
        assert resident < size / 20
        assert run.stop() == 0
    assert {row.responder for row in run.rows() if row.is_answered} == {lab.hop(4, nr) for nr in range(1, 5)}
    return run


def compiler_text(pid: int) -> tuple[int, int]:
    """Return how much of the compiler's instructions a process has in memory, and how much there is, in kB."""
    text = Path(f'/proc/{pid}/smaps').read_text()
    found = re.findall(r' r-xp .*/lib(?:clang|LLVM).*\nSize: +(\d+)(?:.*\n)*?Rss: +(\d+)', text)
    return sum(int(rss) for _, rss in found), sum(int(size) for size, _ in found)


@pytest.mark.sample
def test_second_start_takes_the_programs_of_the_first(lab4, tmp_path):
    options = '-a', 'ping'
    assert USED not in start(lab4, tmp_path, *options).log
    first = {path: path.read_bytes() for path in programs_in(tmp_path)}
    assert len(first) == 1
    assert USED in start(lab4, tmp_path, *options).log
    numbers = '-p', '20', '--max-rate', '1000', '-r', 'g', '-T', '-I', 'pass'
    assert USED in start(lab4, tmp_path, '-P', str(os.getpid()), *numbers).log  # the same programs
    assert USED not in start(lab4, tmp_path, *options, '--ingress-hook', 'generic').log
    assert USED not in start(lab4, tmp_path, *options, '--no-cache').log
    assert {path: path.read_bytes() for path in first} == first
    assert len(programs_in(tmp_path)) == 2


def of_another_form(kept: Path) -> None:
    kept.write_text('[1, 2]')


def refused_by_the_verifier(kept: Path) -> None:
    content = json.loads(kept.read_text())
    content['programs']['elf_egress'] = base64.b64encode(bytes(8)).decode(), {}
    kept.write_text(json.dumps(content))


def without_a_program(kept: Path) -> None:
    content = json.loads(kept.read_text())
    del content['programs']['elf_probe']
    kept.write_text(json.dumps(content))


def with_a_map_that_no_kernel_makes(kept: Path) -> None:
    content = json.loads(kept.read_text())
    content['maps']['schedules'][1] = 3
    kept.write_text(json.dumps(content))


def with_other_types(kept: Path) -> None:
    content = json.loads(kept.read_text())
    content['btf'] = base64.b64encode(bytes(100)).decode()
    kept.write_text(json.dumps(content))


@pytest.fixture(scope='module')
def filled(lab4, tmp_path_factory):
    """A folder with the programs of one start."""
    folder = tmp_path_factory.mktemp('filled')
    start(lab4, folder)
    return folder / 'elfprobe'


@pytest.mark.parametrize(
    'spoil',
    [
        of_another_form,
        refused_by_the_verifier,
        without_a_program,
        with_a_map_that_no_kernel_makes,
        with_other_types,
    ],
)
def test_what_is_wrong_in_the_cache_is_not_used(lab4, filled, tmp_path, spoil):
    shutil.copytree(filled, tmp_path / 'elfprobe')
    [kept] = programs_in(tmp_path)
    spoil(kept)
    run = start(lab4, tmp_path)
    assert USED not in run.log and 'rror' not in run.log


def cut(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:-3])


def empty(kept: Path) -> None:
    kept.write_bytes(b'')


def too_long(kept: Path) -> None:
    kept.write_text(json.dumps('x' * CACHE_FILE_MAX))


def of_another_user(kept: Path) -> None:
    os.chown(kept, 12345, -1)


def writable_by_others(kept: Path) -> None:
    kept.chmod(0o622)


def in_a_folder_that_others_write(kept: Path) -> None:
    kept.parent.chmod(0o777)


def in_a_folder_of_another_user(kept: Path) -> None:
    os.chown(kept.parent, 12345, -1)


def elsewhere(kept: Path) -> None:
    kept.rename(kept.parent.parent / 'moved')
    kept.symlink_to(kept.parent.parent / 'moved')


def a_pipe(kept: Path) -> None:
    kept.unlink()
    os.mkfifo(kept, 0o600)


@pytest.mark.parametrize(
    'spoil',
    [
        cut,
        empty,
        too_long,
        of_another_user,
        writable_by_others,
        in_a_folder_that_others_write,
        in_a_folder_of_another_user,
        elsewhere,
        a_pipe,
    ],
)
def test_a_file_that_others_may_have_made_is_not_read(tmp_path, spoil):
    content = {'programs': ['something']}
    Cache(str(tmp_path / 'kept'), 'inputs').write(content)
    assert Cache(str(tmp_path / 'kept'), 'inputs').read() == content
    assert Cache(str(tmp_path / 'kept'), 'others').read() is None
    [kept] = (tmp_path / 'kept').iterdir()
    spoil(kept)
    assert Cache(str(tmp_path / 'kept'), 'inputs').read() is None


def test_only_the_files_used_last_stay(tmp_path):
    for number in range(CACHE_FILES_MAX + 5):
        Cache(str(tmp_path), number).write(number)
        if number:  # the first is used all the time
            assert Cache(str(tmp_path), 0).read() == 0
        for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)):
            os.utime(path, (age, age))  # times that differ on any file system
    assert len(list(tmp_path.iterdir())) == CACHE_FILES_MAX
    assert Cache(str(tmp_path), CACHE_FILES_MAX + 4).read() == CACHE_FILES_MAX + 4
    assert Cache(str(tmp_path), 1).read() is None


def test_messages_are_those_of_a_run_without_a_cache(lab4, tmp_path):
    """A hooks file that the verifier refuses is refused with the same words each time."""
    hooks = tmp_path / 'bad.c'
    hooks.write_text('static inline int elf_v4_icmp_beforesend(struct __sk_buff *ctx) { return *(int *)8; }\n')
    said = []
    for options in [], [], ['--no-cache']:
        via = with_cache(lab4, tmp_path)
        with pytest.raises(Exception) as raised, elfprobe(
            lab4, '-H', str(hooks), *options, lab4.server_address(4), cwd=tmp_path, via=via
        ):
            pass
        said.append(str(raised.value))
    assert len(set(said)) == 1 and 'does not take elf_probe' in said[0]


def test_modules_are_kept_as_programs_are(tmp_path):
    """Code is put into what a start has kept: only root's own file is believed, and only without --no-cache."""

    def refusal(*arguments: str, user: int = 0) -> str:
        command = *in_place_of_var_cache(tmp_path), 'setpriv', f'--reuid={user}', '--inh-caps=+dac_read_search'
        caps = '--ambient-caps=+dac_read_search', sys.executable, str(ELFPROBE), '-i', 'none0', '192.0.2.1'
        return run(*command, *caps, *arguments, check=False, cwd=tmp_path).stderr

    usual = refusal()
    assert "no 'none0'" in usual
    [kept] = (tmp_path / 'elfprobe').iterdir()
    codes = marshal.loads(base64.b64decode(json.loads(kept.read_text())))
    codes['elf.service'] = compile('raise SystemExit("what was kept")', 'kept', 'exec')
    changed = json.dumps(base64.b64encode(marshal.dumps(codes)).decode())
    kept.write_text(changed)
    assert refusal() == 'what was kept\n'
    assert refusal('--', 'true', '--no-cache') == 'what was kept\n'
    assert refusal('--no-cache') == usual
    assert 'must run as root' in refusal(user=12345)
    kept.parent.chmod(0o755)
    assert refusal() == usual
    kept.parent.chmod(0o700)
    os.chown(kept, 12345, -1)
    assert refusal() == usual
    for spoilt in '"%"', '"AAAA"', '{}', changed[:-9] + '"':
        kept.write_text(spoilt)
        assert refusal() == usual
    assert not ELFPROBE.with_name('elf').joinpath('__pycache__').exists()


def test_only_modules_that_can_be_read_are_kept(tmp_path):
    """What editors and file systems leave in the folder does no harm. What Python has compiled is not believed."""
    cache, tree = tmp_path / 'cache', tmp_path / 'tree'
    cache.mkdir()
    shutil.copytree(ELFPROBE.with_name('elf'), tree / 'elf')
    for path in ELFPROBE, ELFPROBE.with_suffix('.c'), ELFPROBE.with_name('elfhooks.c'):
        shutil.copy(path, tree)
    (tree / 'elf/.#lock.py').symlink_to('nobody@nowhere')
    (tree / 'elf/._fork.py').write_bytes(b'\xff\0')
    (tree / 'elf/folder.py').mkdir()
    module = tree / 'elf/service.py'
    text = module.read_text()
    module.write_text('raise SystemExit("stale")')
    py_compile.compile(str(module), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    module.write_text(text)
    command = *in_place_of_var_cache(cache), sys.executable, str(tree / ELFPROBE.name), '-i', 'none0', '192.0.2.1'
    for _ in range(2):
        assert "no 'none0'" in run(*command, check=False, cwd=tmp_path).stderr
        [kept] = (cache / 'elfprobe').iterdir()
        assert 'elf.service' in marshal.loads(base64.b64decode(json.loads(kept.read_text())))
