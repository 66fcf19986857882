# SPDX-License-Identifier: GPL-3.0-only
"""This package's modules, compiled once and kept for the next start, as cache.py keeps programs.

Python itself would keep them in elf/__pycache__, which would be root's in the user's folder.
"""

from __future__ import annotations

import base64
import contextlib
import marshal
import os
import sys
from importlib.machinery import FileFinder, SourceFileLoader
from types import CodeType

from elf.cache import CACHE, Cache

PACKAGE = os.path.dirname(__file__)


class Bytecode:
    """Modules of this package that an earlier start has kept. From now on they are imported from there.

    The key has the text of all modules, so what was kept is never out of date.
    """

    def __init__(self) -> None:
        sources = sorted(entry.path for entry in os.scandir(PACKAGE) if entry.name.endswith(".py"))
        self._cache = Cache(CACHE, sys.version, [(path, text(path)) for path in sources])
        self.kept = codes(self._cache.read())
        self.new: dict[str, CodeType] = {}
        bytecode = self

        class Loader(SourceFileLoader):
            """Take the code of a module from what was kept."""

            def get_code(self, fullname: str) -> CodeType | None:
                code = bytecode.kept.get(fullname) or super().get_code(fullname)
                if code and fullname not in bytecode.kept:
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


def text(path: str) -> str:
    """Return the text of a source file."""
    with open(path, encoding="utf-8") as file:
        return file.read()
