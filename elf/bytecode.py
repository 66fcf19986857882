# SPDX-License-Identifier: GPL-3.0-only
"""This package's modules, compiled once and kept for the next start, as cache.py keeps programs.

Python itself would keep them in elf/__pycache__, which would be root's in the user's folder.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import marshal
import os
import sys
from importlib.machinery import FileFinder, SourceFileLoader
from types import CodeType
from typing import Iterator

from elf.cache import CACHE, Cache

PACKAGE = os.path.dirname(__file__)


class Bytecode:
    """Modules of this package that an earlier start has kept. From now on they are imported from there.

    The key has the text of all modules, so what was kept is never out of date.
    """

    def __init__(self) -> None:
        self._sources = dict(read_sources())
        hashes = [(path, hashlib.sha256(source).hexdigest()) for path, source in sorted(self._sources.items())]
        self._cache = Cache(CACHE, sys.version, sys.flags.optimize, hashes)
        self.kept = codes(self._cache.read())
        self.new: dict[str, CodeType] = {}
        bytecode = self

        class Loader(SourceFileLoader):
            """Take the code of a module from what was kept, or make it from the text whose hash is in the key."""

            def get_code(self, fullname: str) -> CodeType | None:
                path = self.get_filename(fullname)
                if path not in bytecode._sources:
                    return super().get_code(fullname)
                code = bytecode.kept.get(fullname)
                if code is None:
                    code = compile(bytecode._sources[path], path, "exec", dont_inherit=True)
                    bytecode.new[fullname] = code
                return code

        sys.path_importer_cache[PACKAGE] = FileFinder(PACKAGE, (Loader, [".py"]))

    def keep(self) -> None:
        """Keep the modules that were imported since, for the next start."""
        if self.new:
            self._cache.write(base64.b64encode(marshal.dumps({**self.kept, **self.new})).decode())


def codes(content: object) -> dict[str, CodeType]:
    """Return the code by module from what keep() has written; nothing if it is not of that kind."""
    with contextlib.suppress(ValueError, TypeError, EOFError):
        found = marshal.loads(base64.b64decode(content)) if isinstance(content, str) else {}
        if isinstance(found, dict):
            return found
    return {}


def read_sources() -> Iterator[tuple[str, bytes]]:
    """Yield path and text of each module of this package that can be read."""
    for entry in os.scandir(PACKAGE):
        name, extension = os.path.splitext(entry.name)
        if extension == ".py" and name.isidentifier():
            with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                yield entry.path, file.read()
