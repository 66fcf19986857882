# SPDX-License-Identifier: GPL-3.0-only
"""Lines of tables: broken or cut so that they fit, and marked with what a terminal shows by a colour."""

from __future__ import annotations

import enum
import textwrap
import unicodedata
from typing import NamedTuple

WIDTH_MIN = 20  # columns; a narrower terminal breaks the lines itself
CONTINUED = 4  # columns by which the rest of a broken line is indented


class Mark(enum.Enum):
    """What a line says beside its words. The value is the colour (ECMA-48: SGR)."""

    NONE = ""
    INACTIVE = "2"  # faint
    NOTABLE = "33"  # yellow
    BAD = "31"  # red


class Line(NamedTuple):
    """A line of a table."""

    text: str
    mark: Mark = Mark.NONE


def fitting(line: str, columns: int | None) -> list[str]:
    """Return the line, or several if it is longer than so many columns, the further ones indented."""
    if columns is None or len(line) <= columns:
        return [line]
    indent = " " * CONTINUED
    return textwrap.wrap(line, max(columns, WIDTH_MIN), subsequent_indent=indent, break_on_hyphens=False)


def width(text: str) -> int:
    """Return how many columns of a terminal a text without control characters takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def cut(text: str, columns: int) -> str:
    """Return the beginning of a text that takes at most so many columns."""
    text = text[:columns]
    while width(text) > columns:
        text = text[:-1]
    return text
