# SPDX-License-Identifier: GPL-3.0-only
"""What both programs share at the command line: fatal errors, the argument parser, printable text."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import platform
import re
import shlex
import struct
import sys
import types
from typing import Any, Callable, Iterable, Iterator, NoReturn

FOLDER = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # of elfprobe.py and the C files
OS_RELEASE = "/etc/os-release", "/usr/lib/os-release"  # os-release(5)
# ID or ID_LIKE there -> how to install packages, and how that distribution begins the name of one of Python's.
INSTALLERS = {
    "debian": ("apt install", "python3-"),
    "ubuntu": ("apt install", "python3-"),
    "fedora": ("dnf install", "python3-"),
    "rhel": ("dnf install", "python3-"),
    "centos": ("dnf install", "python3-"),
    "arch": ("pacman -S", "python-"),
    "suse": ("zypper install", "python3-"),
    "alpine": ("apk add", "py3-"),
}


def printable(text: str) -> str:
    """Return the text as one line, with control characters escaped, so that no terminal acts on them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Failure(Exception):
    """Fatal error, shown to the user as one line, plus compiler output (detail) if any.

    status is the exit status: 2 for wrong usage, 1 for everything else.
    """

    def __init__(self, message: str, status: int = 1, detail: str = "") -> None:
        super().__init__(printable(message) + (f"\n{detail}" if detail else ""))
        self.status = status


class Parser(argparse.ArgumentParser):
    """An argument parser that raises Failure, where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise Failure(message, 2)


def as_called(text: str) -> str:
    """Return a text with both programs' names as they are installed, if this one was called by such a name.

    A comment in the same line, two spaces or more behind the command, stays in its column.
    """
    if os.path.basename(sys.argv[0]) not in ("elfprobe", "elfplot"):
        return text
    script = r"(?:python3 )?(elfprobe|elfplot)\.py((?:.*?\S(?=  ))?)"
    return re.sub(script, lambda found: found[1] + found[2] + (" " * len(".py") if found[2] else ""), text)


def not_empty(text: str) -> str:
    """Return the text: an argparse type that refuses empty and blank arguments."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def whole_number(least: int, most: int, what: str) -> Callable[[str], int]:
    """Return an argparse type: a decimal number between two bounds, which the error message names."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what}, {least} to {most}")
        return int(text)

    return parse


def positive_seconds(text: str) -> float:
    """Return the number of seconds: an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return value


def package_version(name: str) -> str:
    """Return the version of an installed Python package, or "missing"."""
    from importlib import metadata  # takes long, and is seldom needed

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def require_attributes(package: Any, *names: str) -> None:
    """Raise ImportError unless a package has these attributes: others may have the same name."""
    for name in names:
        if not hasattr(package, name):
            raise ImportError(f"it has no {name}, so it is another package of that name")


def import_parts(name: str, parts: dict[str, str]) -> Any:
    """Return a package with only some of its names: name -> the module of the package that defines it.

    Its own __init__ is not run, because it imports much that takes long and is not needed. If the package has other
    modules, import the whole package. Raises what that raises.
    """
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        package = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with quick_import():
                for part, module in parts.items():
                    setattr(package, part, getattr(importlib.import_module(module), part))
            return package
        except Exception:  # another version
            for each in [each for each in sys.modules if each.partition(".")[0] == name]:
                del sys.modules[each]
    return importlib.import_module(name)


@contextlib.contextmanager
def quick_import() -> Iterator[None]:
    """Spare pyroute2 what it does not need here: Python's unittest, and to ask the programs `uname` and `file`."""
    stand_in, before = types.ModuleType("unittest"), (platform.uname, platform.architecture)
    vars(stand_in)["mock"] = None
    sys.modules.setdefault("unittest", stand_in)
    vars(platform).update(uname=os.uname, architecture=lambda: (f"{8 * struct.calcsize('P')}bit", ""))
    try:
        yield
    finally:
        platform.uname, platform.architecture = before
        if sys.modules["unittest"] is stand_in:
            del sys.modules["unittest"]


def why_unusable(name: str, error: BaseException) -> str:
    """Return what is wrong with a package that was not imported, and where it is."""
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return f"{sys.executable} has no module {name}"
    place = "somewhere"
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec:
            place = spec.origin or ", ".join(spec.submodule_search_locations or ())
    return f"the module {name} in {place} cannot be used ({type(error).__name__}: {error})"


def distribution(paths: Iterable[str] = OS_RELEASE) -> list[str]:
    """Return what names the distribution, the most precise name first; empty if nothing does."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            fields = dict(word.split("=", 1) for word in shlex.split(file.read(), comments=True) if "=" in word)
            return [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]
    return []


def how_to_install(modules: Iterable[str], names: Iterable[str]) -> str:
    """Return the command that installs these modules, on a distribution that goes by these names."""
    command, prefix = next((INSTALLERS[name] for name in names if name in INSTALLERS), INSTALLERS["debian"])
    # Some distributions give some packages other names.
    own = {"bcc": "bpfcc"} if command.startswith("apt") else {}
    if command.startswith("ap"):  # apt, apk: no underscores
        own["prometheus_client"] = "prometheus-client"
    return " ".join([command, *(prefix + own.get(module, module) for module in modules)])


def missing_packages(missing: dict[str, str]) -> Failure:
    """Return what the user is told of modules that are missing or unusable: module -> why."""
    other = "" if sys.executable == "/usr/bin/python3" else ", and run it with /usr/bin/python3"
    return Failure(f"{'; '.join(missing.values())}: {how_to_install(missing, distribution())}{other}")
