# SPDX-License-Identifier: GPL-3.0-only
"""Rows by key, in bulk. Needs numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


class Groups:
    """Rows grouped by key. order[starts[g]:ends[g]] are the rows of group g, in their original order.

    "In order" means: an array with a value for each entry of order. Groups are in the order of their keys.
    """

    def __init__(self, keys: Any, rows: Any = None) -> None:
        """keys: of all rows, not negative. With rows, only these are grouped."""
        keys = keys if rows is None else keys[rows]
        if len(keys) and int(keys.max()) < 1 << 16:
            keys = keys.astype(np.uint16)  # numpy has a radix sort for 16 bits
        order = np.argsort(keys, kind="stable")
        self._set(order if rows is None else rows[order], keys[order])

    def _set(self, order: Any, ordered: Any) -> None:
        self.order = order
        self.starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
        self.ends = np.append(self.starts[1:], len(ordered))[: len(self.starts)]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def sizes(self) -> Any:
        return self.ends - self.starts

    @property
    def firsts(self) -> Any:
        """The first row of each group."""
        return self.order[self.starts]

    def numbers(self) -> Any:
        """Return the group number of each row, in order."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def of_rows(self) -> Any:
        """Return the group number of each row, by row. All rows must be grouped."""
        numbers = np.empty(len(self.order), int)
        numbers[self.order] = self.numbers()
        return numbers

    def only(self, mask: Any) -> tuple[Groups, Any]:
        """Return groups of the rows that a mask (by row) selects, and the number of each among these groups."""
        selected = mask[self.order]
        its_numbers = self.numbers()[selected]
        groups = object.__new__(Groups)
        groups._set(self.order[selected], its_numbers)
        return groups, its_numbers[groups.starts]

    def reduce(self, function: Any, values: Any) -> Any:
        """Return the values of each group, reduced by a ufunc. values: in order."""
        return function.reduceat(values, self.starts) if len(self) else values[:0]

    def running(self, values: Any, before: Any) -> Any:
        """Return for each value the maximum of before[g] and all values in front of it in its group.

        values: in order, below 2^35. before: by group.
        """
        step = self.numbers() << 35
        raised = values + step
        firsts = before + step[self.starts]
        shifted = np.concatenate([[0], raised[:-1]])[: len(raised)]
        shifted[self.starts] = firsts
        return np.maximum.accumulate(shifted) - step
