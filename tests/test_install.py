"""make install, make uninstall and make deb: commands, man pages, completion in real shells, the package.

tests/fresh installs the package on Debian, measures with it, and purges it.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
from argparse import ArgumentParser
from pathlib import Path
from typing import Iterable

import pytest

from lab import PATIENCE, end, run
from runs import ELFPROBE

TREE = ELFPROBE.parent
sys.path.insert(0, str(TREE))
import elfplot  # noqa: E402
import elfprobe  # noqa: E402
from elf.options import argument_parser, command_in_namespace, parse_arguments  # noqa: E402

PARSERS = {'elfprobe': argument_parser, 'elfplot': elfplot.argument_parser}
PROGRAMS = pytest.mark.parametrize('program', PARSERS)
MAN = {'elfprobe': 'man8/elfprobe.8', 'elfplot': 'man1/elfplot.1'}
EPOCH = '1700000000'  # SOURCE_DATE_EPOCH
ROWS, COLUMNS = 100, 200  # of the terminal in which completion is tried
# What each shell reads before the first prompt; the folder with the completion is to be filled in. Nothing of the
# machine's own is read, and ambiguous words are listed at the first TAB, without a question.
SHELLS = {
    'bash': (
        ['bash', '--norc', '--noprofile', '-i'],
        """bind 'set show-all-if-ambiguous on' 'set completion-query-items -1' 'set page-completions off'
        bind 'set enable-bracketed-paste off'; for file in {}/bash-completion/completions/*; do . "$file"; done""",
    ),
    'zsh': (
        ['zsh', '-f', '-i'],
        """fpath=({}/zsh/site-functions $fpath); autoload -U compinit; compinit -D -u; LISTMAX=10000
        unsetopt beep; unset zle_bracketed_paste; bindkey -e""",
    ),
}


def make(
    *arguments: str, tree: Path = TREE, umask: int = 0o077, **variables: str
) -> subprocess.CompletedProcess[str]:
    """make in a tree, by a user whose files nobody else may read."""
    environment = {**os.environ, **variables}
    return run('make', *arguments, cwd=tree, env=environment, preexec_fn=lambda: os.umask(umask) and None)


@pytest.fixture(scope='module')
def usr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/usr of a system that is yet to be packed, with elfprobe."""
    folder = tmp_path_factory.mktemp('a system')
    make('install', f'DESTDIR={folder}', 'PREFIX=/usr', SOURCE_DATE_EPOCH=EPOCH)
    return folder / 'usr'


@pytest.fixture(scope='module')
def helped(usr: Path) -> dict[str, str]:
    """What each program says with -h when it is called by its installed name, from another folder."""
    environment = {**os.environ, 'PATH': f'{usr / "bin"}:{os.environ["PATH"]}'}
    return {program: run(program, '-h', cwd='/', env=environment).stdout for program in PARSERS}


def options(parser: ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def test_install_and_uninstall(usr: Path, tmp_path: Path) -> None:
    for path in usr.rglob('*'):
        assert path.stat().st_mode & 0o444 == 0o444, path
    assert {path.name for path in (usr / 'bin').iterdir()} == {'elfprobe', 'elfplot'}
    # The folder may be moved: nothing in it says where it lies now.
    assert [path for path in usr.rglob('*') if path.is_file() and str(usr).encode() in path.read_bytes()] == []
    (tmp_path / 'var/cache/elfprobe').mkdir(parents=True)
    make('install', f'DESTDIR={tmp_path}')
    assert (tmp_path / 'usr/local/bin/elfprobe').exists()
    make('uninstall', f'DESTDIR={tmp_path}')
    assert [path for path in tmp_path.rglob('*') if not path.is_dir() or 'elfp' in path.name] == []


def test_make_help() -> None:
    said = make().stdout
    targets = re.search(r'^\.PHONY: (.*)', (TREE / 'Makefile').read_text(), re.MULTILINE)
    assert targets and [name for name in targets[1].split() if f'make {name}' not in said] == []
    assert 'DESTDIR' in said and 'PREFIX' in said


@PROGRAMS
def test_goes_by_its_installed_name(program, helped, monkeypatch, capfd) -> None:
    """In the help and in errors."""
    assert re.match(rf'usage: (sudo )?{program} \[', helped[program]) and '.py' not in helped[program]
    monkeypatch.setattr('sys.argv', [f'/usr/bin/{program}'])
    for arguments in ['--loud'], ['--']:
        assert {'elfprobe': elfprobe, 'elfplot': elfplot}[program].main(arguments) == 2
        said = capfd.readouterr().err
        assert said.startswith(f'{program}: ') and '.py' not in said


def test_help_is_aligned_by_either_name(helped) -> None:
    """Comments on the examples begin in one column."""
    for shown in helped['elfprobe'], run(sys.executable, str(ELFPROBE), '-h').stdout:
        examples = shown.partition('examples:\n')[2].partition('\n\n')[0].splitlines()
        starts = [found.end() for line in examples if (found := re.search(r'\S {2,}|^ {9,}', line))]
        assert len(starts) > 5 and len(set(starts)) == 1, examples


@pytest.mark.root
def test_hooks_are_the_installed_ones(usr: Path, tmp_path: Path, lab4) -> None:
    """Not those of the working directory. In another namespace, the same command is named as was called."""
    shutil.copytree(usr, tmp_path / 'usr', symlinks=True)
    hooks = tmp_path / 'usr/share/elfprobe/elfhooks.c'
    hooks.write_text('#error installed\n')
    shutil.copy(TREE / 'elfhooks.c', tmp_path)
    command = str(tmp_path / 'usr/bin/elfprobe'), '-i', 'eth0', '--no-cache', lab4.server_address(4)
    ended = lab4.client.run(*command, check=False, cwd=tmp_path)
    assert ended.returncode == 1 and f'{hooks}:1' in ended.stderr and 'installed' in ended.stderr


def test_command_in_a_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named as this one was called."""
    config = parse_arguments(['-a', 'nginx'])
    monkeypatch.delenv('SUDO_UID', raising=False)
    for called, named in (
        ('/opt/bin/elfprobe', '/opt/bin/elfprobe'),
        ('./elfprobe.py', f'{sys.executable} {ELFPROBE}'),
    ):
        monkeypatch.setattr('sys.argv', [called, '-i', 'eth0', '-a', 'nginx'])
        assert command_in_namespace(7, config) == f'nsenter -t 7 -n {named} -a nginx'


@pytest.mark.needs('man')
@PROGRAMS
def test_man_page(usr: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has each option and all that --help says, and man has nothing to complain of."""
    monkeypatch.setattr('sys.argv', [program])
    page, parser = str(usr / 'share/man' / MAN[program]), PARSERS[program]()
    environment = {**os.environ, 'MANWIDTH': '80', 'LC_ALL': 'C.UTF-8', 'MANROFFSEQ': ''}
    shown = run('man', '--warnings', '-E', 'UTF-8', '-l', '-Tutf8', page, env=environment)
    assert shown.stderr == ''
    text = re.sub(r'.\x08|\x1b\[[\d;]*m', '', shown.stdout)
    heads = ' '.join(re.findall(r'^ {7}(-.*)', text, re.MULTILINE))
    assert [option for option in options(parser) if not re.search(rf'(^| ){option}[, ]', heads + ' ')] == []

    def squeezed(text: str) -> str:
        return re.sub(r'[\s\u2010]', '', text)  # U+2010: where the page hyphenates a word

    said = [(action.help or '') % vars(action) for action in parser._actions]
    lines = [line for line in (parser.epilog or '').splitlines() if not line.endswith(':')]
    said += [part for line in lines for part in re.split(' {2,}', line.partition('exit status: ')[2] or line)]
    missing = [part for part in [*said, parser.description or ''] if squeezed(part) not in squeezed(text)]
    assert missing == []


def typed(shell: str, share: Path, lines: Iterable[str], folder: Path) -> list[str]:
    """What a shell with a terminal shows as each of these is typed at its prompt, without a return."""
    command, setup = SHELLS[shell]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', ROWS, COLUMNS, 0, 0))
    path = f'{share.parent / "bin"}:{os.environ["PATH"]}'
    environment = {'PATH': path, 'TERM': 'dumb', 'HOME': str(folder), 'LC_ALL': 'C.UTF-8'}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment, start_new_session=True
    )
    os.close(theirs)

    def shown(keys: str) -> str:
        """What is shown until the next prompt; Ctrl-U takes back what was not entered."""
        os.write(ours, (keys + "\x15echo 'en''d'\n").encode())
        text = ''
        while not re.search(r'\nend\r?\n.*ready>', text, re.DOTALL):
            assert select.select([ours], [], [], 20 * PATIENCE)[0], text
            text += os.read(ours, 65536).decode(errors='replace')
        return text

    try:
        shown(setup.replace('{}', f"'{share}'") + "; PS1='ready>'\n")
        return [shown(line) for line in lines]
    finally:
        end(process)
        os.close(ours)


@pytest.mark.parametrize('shell', [pytest.param(name, marks=pytest.mark.needs(name)) for name in SHELLS])
def test_completion(usr: Path, tmp_path: Path, shell: str) -> None:
    """All options, choices, names of devices and files, and the command behind --. A name is never run."""
    (tmp_path / 'hooks file.c').touch()
    (tmp_path / 'elf.csv').touch()
    (tmp_path / 'elf.png').touch()
    shutil.copy('/bin/sleep', tmp_path / '$(>ran)')
    # Several answers are listed, and a single one is filled in.
    tried = {
        **{f'{name} -\t': [o for o in options(parser()) if o.startswith('--')] for name, parser in PARSERS.items()},
        'elfprobe --ingress-h\t': ['--ingress-hook'],
        'elfprobe --ingress-hook \t': ['auto', 'generic', 'tc', 'xdp'],
        'elfprobe --ingress-hook=g\t': ['--ingress-hook=generic'],
        'elfprobe -a x -I dr\t': ['-I drop '],
        'elfprobe --ratetype p\t': ['--ratetype perhop '],
        'elfprobe -i l\t': ['-i lo '],
        f'elfprobe -a {shell[:-1]}\t': [f'-a {shell}'],
        'elfprobe -a \t': [shell],
        'elfprobe -H hoo\t': [r'-H hooks\ file.c '],
        'elfprobe -i lo -- elfpl\t': ['-- elfplot '],
        'elfprobe loc\t': ['elfprobe localhost'],
        'elfplot el\t': ['elfplot elf.csv '],
    }
    process = subprocess.Popen([str(tmp_path / '$(>ran)'), '1000'], start_new_session=True)
    try:
        shown_each = typed(shell, usr / 'share', tried, tmp_path)
    finally:
        end(process)
    assert not (tmp_path / 'ran').exists()
    for expected, shown in zip(tried.values(), shown_each):
        assert [one for one in expected if one not in shown] == [], shown
        assert 'command not found' not in shown and '$(>ran)' not in shown


def contents(usr: Path) -> dict[str, bytes]:
    """All files, unpacked, whatever distributions call the folder for zsh."""
    found = {}
    for path in usr.rglob('*'):
        if path.is_file():
            name = re.sub(r'zsh/\w+-\w+|\.gz$', '', str(path.relative_to(usr)))
            found[name] = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    return found


def test_package(usr: Path, tmp_path: Path) -> None:
    """It has what make install installs, it depends on what README.md says, and all builds are alike."""
    built = set()
    for zone, umask in ('UTC', 0o077), ('Pacific/Kiritimati', 0o002):
        tree = tmp_path / zone
        shutil.copytree(TREE, tree, ignore=shutil.ignore_patterns('__pycache__', '.git', '*.deb'))
        make('deb', tree=tree, umask=umask, TZ=zone, SOURCE_DATE_EPOCH=EPOCH)
        (package,) = tree.glob('*.deb')
        built.add(package.read_bytes())
    assert len(built) == 1 and package.name == f'elfprobe_{elfprobe.VERSION}_all.deb'
    listed = run('bash', '-c', 'source "$0"; echo "${elfprobe_packages[@]}"', str(TREE / 'tests/lib.sh')).stdout
    depends = re.sub(r' \(.*?\)', '', run('dpkg-deb', '-f', str(package), 'Depends').stdout.strip())
    assert sorted(depends.split(', ')) == sorted([*listed.split(), 'python3'])
    run('dpkg-deb', '-x', str(package), str(tmp_path / 'root'))
    assert contents(usr).items() <= contents(tmp_path / 'root/usr').items()
