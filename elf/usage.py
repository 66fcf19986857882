# SPDX-License-Identifier: GPL-3.0-only
"""What both programs share at the command line: fatal errors, the argument parser, printable text."""

from __future__ import annotations

import argparse
import re
from typing import Callable, NoReturn


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
