"""Directory trees with the packages of Debian's suites, which meet this machine's kernel: for tests/fresh and
for tests/vm/run --userland.

mmdebstrap builds a tree from the mirror that this machine's apt uses. The tree is kept in $ELFPROBE_VM_CACHE
(default: ~/.cache/elfprobe-vm) until it is deleted there, and so are the packages that are fetched inside it.
Nothing else that is done inside it stays: each visit gets a copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Sequence

from lab import end

TREE = Path(__file__).resolve().parents[1]  # the checkout
BUILD_SECONDS = 3600
END_SECONDS = 60  # for tests that are interrupted to clean up

# What a visit runs first, in a mount namespace of its own, with the cache as its working directory. Its
# arguments: names there of the tree, of the copy's folder and of the packages', then the shared folder, and
# what to run. Overlayfs gets names without a folder, since paths may have colons and commas. It works on most
# file systems; on others the tree is copied. Either way the root is a mount, as `ip netns exec` wants it.
ENTER = '''
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root" 2>/dev/null ||
    { cp -a "$1/." "$2/root"; mount --bind "$2/root" "$2/root"; }
root=$2/root
for there in proc sys dev; do mount --rbind "/$there" "$root/$there"; done
mount -t tmpfs tmpfs "$root/run"
mkdir -p "$3" "$root/host"
mount --bind "$3" "$root/var/cache/apt/archives"
mount --bind "$4" "$root/host"
for file in hosts resolv.conf; do
    rm -f "$root/etc/$file"
    cat "/etc/$file" >"$root/etc/$file" || true
done
exec chroot "$root" sh -c "$5"
'''


class Failure(Exception):
    """Cannot go on; the text says why."""


def cache() -> Path:
    """Return the folder for what is kept; it may not exist yet."""
    default = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'elfprobe-vm')
    return Path(os.environ.get('ELFPROBE_VM_CACHE') or default).absolute()


def mirror() -> str:
    """Return the address where this machine's apt gets Debian's main archive from."""
    uris = subprocess.run(
        ['apt-get', 'indextargets', '--format', '$(REPO_URI)'], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    for uri in uris:
        if uri.rstrip('/').endswith('/debian'):
            return uri
    raise Failure('none of this machine\'s apt sources is a mirror of Debian, whose address ends in /debian')


def sources(*suites: str) -> list[str]:
    """Return the lines for apt."""
    return [f'deb {mirror()} {suite} main' for suite in dict.fromkeys(suites)]


def recipe(*ingredients: str) -> str:
    """Return a short name for what is made of these."""
    return hashlib.sha256('\n'.join(ingredients).encode()).hexdigest()[:8]


def bootstrap(suite: str, packages: Sequence[str], to: Path, *options: str, lines: list[str]) -> None:
    """Have mmdebstrap make a tree; `lines` are apt's sources. Failure where it cannot."""
    apt = [
        'Acquire::Check-Valid-Until "false"',  # mirrors may lag
        'Binary::apt::APT::Keep-Downloaded-Packages "true"',
    ]  # apt-get keeps them anyway
    command = [
        'mmdebstrap',
        '--quiet',
        '--variant=apt',
        '--dpkgopt=force-unsafe-io',
        *(f'--aptopt={one}' for one in apt),
        *options,
        f'--include={",".join(packages)}',
        suite,
        str(to),
        *lines,
    ]
    try:
        status = call(command, BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failure(f'{suite}: mmdebstrap took more than {BUILD_SECONDS} s') from None
    if status:
        raise Failure(
            f'{suite}: mmdebstrap could not make a tree of {", ".join(lines)}: exit status {status}; above is why'
        )


def tree(suite: str, packages: Sequence[str]) -> Path:
    """Return the directory tree of a suite with some packages; build it where it is missing."""
    lines = sources(suite)
    root = cache() / f'{suite}-{recipe(*packages, *lines)}.root'
    if not root.exists():
        print(f'{suite}: building the directory tree', file=sys.stderr, flush=True)
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='build.', dir=cache()) as build:
            bootstrap(suite, packages, Path(build, 'root'), lines=lines)
            Path(build, 'root').rename(root)
    return root


def shared_folder(name: str) -> Path:
    """Return a folder in the cache with nothing but a copy of elfprobe's tree and an empty `out`.

    It belongs to this process, as long as that runs. Failure where it is another's.
    """
    share = cache() / name
    share.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(f'{share}.lock', os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)  # until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(f'{share} is in use by another run') from None
    shutil.rmtree(share, ignore_errors=True)
    (share / 'out').mkdir(parents=True)
    shutil.copytree(TREE, share / 'elfprobe', ignore=shutil.ignore_patterns('.git', '__pycache__'))
    return share


def visit(root: Path, share: Path, script: str, output: BinaryIO, timeout: float) -> int:
    """Run a script as root in a copy of a tree, on this machine's kernel; return its exit status.

    /host is `share`. Processes, devices and networks are the machine's. TimeoutExpired after so many seconds.
    """
    with tempfile.TemporaryDirectory(prefix='visit.', dir=cache()) as copy:
        packages = f'{root.name.rpartition("-")[0]}.packages'
        return call(
            [
                'unshare',
                '--mount',
                '--propagation',
                'private',
                'sh',
                '-euc',
                ENTER,
                'sh',
                root.name,
                Path(copy).name,
                packages,
                str(share),
                script,
            ],
            timeout,
            cwd=cache(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'HOME': '/root'},
        )


def call(command: Sequence[str], timeout: float, **options: object) -> int:
    """Run a command, which may clean up where it takes too long or this is interrupted; its exit status."""
    process: subprocess.Popen[str] = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        return process.wait(timeout)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        raise
    finally:
        end(process)
