"""Figures: what the benchmarks measure, each with its goal, and the table of them."""

from __future__ import annotations

from typing import Iterable, NamedTuple


class Goal(NamedTuple):
    sign: str
    bound: float

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.sign == '<=' else value >= self.bound


def at_most(bound: float) -> Goal:
    return Goal('<=', bound)


def at_least(bound: float) -> Goal:
    return Goal('>=', bound)


class Figure(NamedTuple):
    """`floor` is what was measured in the same run without elfprobe, in the same unit; where it is not
    another quantity, it is subtracted from `value` already. `note` stands behind the line."""

    name: str
    value: float
    unit: str = ''
    goal: Goal | None = None
    floor: float | None = None
    note: str = ''


def number(value: float | None) -> str:
    if value is None:
        return ''
    if isinstance(value, int):
        return f'{value:,}'
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    return f'{value:,.{digits}f}'


def table_lines(title: str, figures: Iterable[Figure]) -> list[str]:
    lines = [f'{title:72} {"measured":>11} {"":6} {"floor":>9} {"goal":>10}  met']
    for figure in figures:
        goal = met = ''
        if figure.goal:
            goal = f'{figure.goal.sign} {number(figure.goal.bound)}'
            met = 'yes' if figure.goal.is_met(figure.value) else 'NO'
        lines.append(
            f'  {figure.name:70} {number(figure.value):>11} {figure.unit:6} '
            f'{number(figure.floor):>9} {goal:>10}  {met:3}  {figure.note}'.rstrip()
        )
    return lines
