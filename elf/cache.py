# SPDX-License-Identifier: GPL-3.0-only
"""What is compiled and kept for the next start, in files that only root can write: BPF programs, Python modules."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import tempfile
from typing import Any

CACHE = "/var/cache/elfprobe"
CACHE_FILES_MAX = 64  # of some 170 KB
CACHE_FILE_MAX = 1 << 22  # bytes

log = logging.getLogger("elfprobe")


class Cache:
    """A file of JSON that an earlier run has written for the same inputs.

    Its name is a hash of everything that decides about its content, so a file is never out of date. If anything is
    wrong with it, nothing is read. Others than this user can neither read nor write it.
    """

    def __init__(self, folder: str, *inputs: object) -> None:
        self._folder = folder
        digest = hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()
        self._path = os.path.join(folder, f"{digest}.json")

    def read(self) -> Any:
        """Return the content, None if there is none."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, encoding="ascii") as file:
                if not (is_ours(os.lstat(self._folder)) and is_ours(os.fstat(fd))):
                    raise OSError(errno.EPERM, "others may read or write it")
                if os.fstat(fd).st_size > CACHE_FILE_MAX:
                    raise OSError(errno.EFBIG, "too long")
                content = json.load(file)
            os.utime(self._path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as err:
            log.debug("cache '%s': %s", self._path, err)
            return None
        return content

    def write(self, content: object) -> None:
        """Write the file, whole or not at all. Keep only the CACHE_FILES_MAX files that were used last."""
        try:
            os.makedirs(self._folder, 0o700, exist_ok=True)
            if not is_ours(os.lstat(self._folder)):
                raise OSError(errno.EPERM, "others may read or write the folder")
            with tempfile.NamedTemporaryFile("w", dir=self._folder, encoding="ascii", delete=False) as file:
                try:
                    json.dump(content, file)
                    file.flush()
                    os.replace(file.name, self._path)
                except BaseException:
                    os.unlink(file.name)
                    raise
            files = [entry for entry in os.scandir(self._folder) if entry.is_file(follow_symlinks=False)]
            files.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime, reverse=True)
            for entry in files[CACHE_FILES_MAX:]:
                os.unlink(entry.path)
        except OSError as err:
            log.debug("cache '%s': %s", self._path, err)

    def forget(self) -> None:
        """Remove the file, because its content could not be used."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def is_ours(status: os.stat_result) -> bool:
    """Return whether a file or folder is this user's, and others can neither read nor write it."""
    kind = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return kind and status.st_uid == os.geteuid() and not status.st_mode & 0o077
