# SPDX-License-Identifier: GPL-3.0-only
"""The rows of elf.csv: COLUMNS is the one table from which all else follows.

    HEADER              the first line of the file
    RowMaker            makes rows of probes that have ended, and tells the summary of them

elf/batches.py reads a file. To add a column, append it to COLUMNS. If the summary is to know it, give Record below
a field of the same name; if elfplot.py is to draw it, add it to READ there.
"""

from __future__ import annotations

import functools
import itertools
import re
import socket
import struct
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

from elf.addresses import address_text


class Column(NamedTuple):
    """A column's name, and its value for answered and for unanswered probes, as Python expressions.

    An expression may use the fields of elfprobe.c's struct result (unanswered: of struct probe and struct
    probe_key) by name, mpls and ifinfo (see RowMaker.rows), and the functions in IN_EXPRESSIONS. None means
    that the value is not known: the field is empty.
    """

    name: str
    answered: str
    unanswered: str


COLUMNS = (
    Column("recvcpu", "recvcpu", "0"),
    Column("seq", "seq", "seq"),
    Column("origseq", "origseq", "origseq"),
    Column("latency", "recvtime - sendtime", "-1"),
    Column("sendtime", "sendtime", "sendtime"),
    Column("recvtime", "recvtime", "-1"),
    Column("dest", "address_text(dest)", "address_text(dest)"),
    Column("responder", "address_text(responder)", "''"),
    Column("outttl", "outttl", "outttl"),
    Column("recvttl", "recvttl", "-1"),
    Column("sport", "ntohs(sport)", "ntohs(sport)"),
    Column("dport", "ntohs(dport)", "ntohs(dport)"),
    Column("protocol", "protocol", "protocol"),
    Column("outipid", "outipid", "outipid"),
    Column("inipid", "inipid", "-1"),
    Column("app", "app_text(app)", "app_text(app)"),
    Column("pid", "pid or None", "pid or None"),
    # The socket has a congestion window (cwnd) if it is TCP's; srtt is 0 until it has been measured.
    Column("srtt", "srtt or None if cwnd else None", "srtt or None if cwnd else None"),
    Column("cwnd", "cwnd or None", "cwnd or None"),
    Column("retrans", "retrans if cwnd else None", "retrans if cwnd else None"),
    Column("outtos", "outtos", "outtos"),
    Column("intos", "intos", "None"),
    Column("mpls", "mpls", "None"),
    Column("ifinfo", "ifinfo and csv_field(ifinfo)", "None"),
    Column("source", "address_text(source)", "address_text(source)"),
    Column("inflight", "inflight if cwnd else None", "inflight if cwnd else None"),
    Column("qttl", "qttl", "None"),
    Column("qlen", "qlen", "None"),
    Column("rsize", "rsize", "None"),
    Column("rtos", "rtos", "None"),
    Column("ripid", "ripid", "None"),
)
NAMES = tuple(column.name for column in COLUMNS)
HEADER = ",".join(NAMES) + "\n"

ALWAYS_THERE = 15  # number of columns that every version writes; numbers in them are never empty


class Record(NamedTuple):
    """A probe that has ended, as the summary and the findings take it: values of columns, by their names.

    translated is a field of struct result without a column: what of the probe is quoted otherwise, see
    elf/findings.py.
    """

    dest: str
    sport: int
    dport: int
    protocol: int
    outttl: int
    sendtime: int  # ns, CLOCK_MONOTONIC
    latency: int  # ns
    responder: str  # empty: no reply
    srtt: int | None = None  # us
    cwnd: int | None = None
    retrans: int | None = None
    outtos: int | None = None
    intos: int | None = None
    origseq: int = 0
    translated: int = 0
    app: str = ""  # as in the CSV: text_of_field() tells the name
    pid: int | None = None
    source: str = ""
    ripid: int | None = None
    recvttl: int = -1


def csv_field(text: str) -> str:
    """Return the text as a field of the CSV: control characters replaced, quoted where necessary."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return '"' + text.replace('"', '""') + '"' if '"' in text or "," in text else text


def text_of_field(field: str) -> str:
    """Return the text that csv_field() has made a field of."""
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


@functools.lru_cache(maxsize=65536)
def app_text(comm: bytes) -> str:
    """Return a command name (zero-terminated, as in the kernel) as a field of the CSV."""
    return csv_field(comm.split(b"\0")[0].decode(errors="replace"))


IN_EXPRESSIONS = {"address_text": address_text, "app_text": app_text, "csv_field": csv_field, "ntohs": socket.ntohs}

# Fields that mostly are the same in all rows of a flow and hop. Rows are right with any choice, but made faster if
# these are next to each other in elfprobe.c's structs.
SHARED = frozenset({
    "dest", "sport", "dport", "protocol", "source", "outttl", "outtos", "pid", "app", "responder", "recvttl",
    "rtos", "intos", "qttl", "qlen", "rsize", "translated",
})  # fmt: skip
# Fields of Record that differ by probe.
NOTED = "sendtime", "latency", "origseq", "srtt", "cwnd", "retrans", "ripid"
ALIKE_MAX = 16384  # some 600 bytes each
NUMBER, NUMBER_OR_NONE = "\1", "\2"  # in the text of a row, before a number is filled in


class Alike:
    """What rows have in common whose SHARED fields are the same."""

    __slots__ = ("values", "template", "template_of_texts", "note")

    def __init__(self, values: dict[str, Any], text: str) -> None:
        """values: the fields of Record that are the same. text: the row, with marks where numbers are missing."""
        text = text.replace("%", "%%").replace(NUMBER, "%d")
        self.values = values
        self.template = text.replace(NUMBER_OR_NONE, "%d")
        self.template_of_texts = text.replace(NUMBER_OR_NONE, "%s")
        self.note: Callable[..., None] | None = None  # notes such a probe in the summary


class RowMaker:
    """Makes rows of probes that have ended, and tells the summary of each probe.

    What SHARED fields say is put into words once, for all rows that have it in common. The other columns are filled
    in by a function that is compiled from COLUMNS, as collections.namedtuple does it: a loop over the columns would
    take several times as long for each row.
    """

    def __init__(self, layout: str, names: Sequence[str], noter: Callable[[Record], Callable[..., None]]) -> None:
        """layout and names: the struct module's format of a probe, and the names of the values in it.

        If "recvtime" is not among the names, the probes are unanswered. noter returns the function that notes
        probes like this one: it takes their NOTED fields.
        """
        values = {column.name: column.answered if "recvtime" in names else column.unanswered for column in COLUMNS}
        for name, default in Record._field_defaults.items():
            values.setdefault(name, name if name in names else repr(default))
        used = {name: words(value).intersection(names) for name, value in values.items()}
        same = {name: value for name, value in values.items() if used[name] <= SHARED}
        others = {name: value for name, value in values.items() if name not in same}
        self._noter = noter
        self._known: dict[tuple[Any, ...], Alike] = {}
        found = list(values_of(layout, names))
        shared = [value.name for value in found if value.name in SHARED]
        self._layout, self._parts, fields = packed(found, set().union(*(used[name] for name in others)))
        namespace: dict[str, Any] = {
            **IN_EXPRESSIONS, "Alike": Alike, "known": self._known.get, "new": self._new, "begin": self._begin,
        }  # fmt: skip
        exec(alike_source(shared, same, others), namespace)
        exec(rows_source(fields, others, same), namespace)
        self._alike, self._rows = namespace["alike"], namespace["rows"]

    def rows(self, data: bytes, *texts: str) -> list[str]:
        """Return the rows of probes, one behind the other in data. texts: mpls and ifinfo of all of them."""
        rows: list[str] = self._rows(self._layout.iter_unpack(data), texts)
        return rows

    def forget_noters(self) -> None:
        """Forget the functions that note probes: noter returns others from now on."""
        self._known.clear()

    def _new(self, key: tuple[Any, ...]) -> Alike:
        if len(self._known) >= ALIKE_MAX:
            self._known.clear()
        *parts, texts = key
        fields = [value for part, data in zip(self._parts, parts) for value in part.unpack(data)]
        alike: Alike = self._alike(fields, *texts)
        self._known[key] = alike
        return alike

    def _begin(self, alike: Alike, *noted: Any) -> Callable[..., None]:
        """Return the function that notes probes like this one, which is the first of them."""
        alike.note = self._noter(Record(**{**alike.values, **dict(zip(NOTED, noted))}))
        return alike.note


def words(expression: str) -> set[str]:
    """Return the names in an expression."""
    return set(re.findall(r"[a-z_]\w*", expression))


class Value(NamedTuple):
    """A value, or padding, in a format of the struct module."""

    name: str  # empty: padding
    code: str


def values_of(layout: str, names: Iterable[str]) -> Iterator[Value]:
    """Yield the values, and the padding, of a format of the struct module."""
    its_names = iter(names)
    for code in re.findall(r"\d*[a-zA-Z]", layout):
        if code != "0x":
            yield Value("" if code.endswith("x") else next(its_names), code)


def size_of(values: Iterable[Value]) -> int:
    return struct.calcsize("=" + "".join(value.code for value in values))


def packed(values: Iterable[Value], chosen: set[str]) -> tuple[struct.Struct, list[struct.Struct], list[str]]:
    """Return a layout that yields each run of adjacent SHARED fields as bytes, and the chosen ones of the others.

    Also return the layouts of these runs, and the names of all that it yields. The runs are part0, part1 and so on.
    """
    whole, names = "=", []
    parts: list[struct.Struct] = []
    for is_shared, group in itertools.groupby(values, lambda value: value.name in SHARED):
        its = list(group)
        if is_shared:
            names.append(f"part{len(parts)}")
            whole += f"{size_of(its)}s"
            parts.append(struct.Struct("=" + "".join(value.code for value in its)))
            continue
        names += [value.name for value in its if value.name in chosen]
        whole += "".join(value.code if value.name in chosen else f"{size_of([value])}x" for value in its)
    return struct.Struct(whole), parts, names


def alike_source(fields: list[str], values: dict[str, str], others: dict[str, str]) -> str:
    """Return the source of a function that makes an Alike of the SHARED fields."""
    marks = {name: NUMBER_OR_NONE if "None" in value else NUMBER for name, value in others.items()}
    row = ",".join(marks.get(name) or f"{{'' if its_{name} is None else its_{name}}}" for name in NAMES)
    kept = ", ".join(f"{name}=its_{name}" for name in values if name in Record._fields)
    return "\n".join((
        "def alike(fields, mpls='', ifinfo=''):",
        f"    {', '.join(fields)} = fields",
        *(f"    its_{name} = {value}" for name, value in values.items()),
        f'    return Alike(dict({kept}), f"{row}\\n")',
    ))  # fmt: skip


def rows_source(fields: list[str], values: dict[str, str], same: dict[str, str]) -> str:
    """Return the source of a function that makes rows of what packed() yields.

    values: of columns and of Record, by name. same: those that an Alike has.
    """
    called = {name: value if value in fields else f"its_{name}" for name, value in values.items()}
    columns = [name for name in NAMES if name in values]
    can_be_none = [name for name in columns if "None" in values[name]]
    numbers = ", ".join(called[name] for name in columns)
    texts = ", ".join(
        f"'' if {called[name]} is None else {called[name]}" if name in can_be_none else called[name]
        for name in columns
    )
    are_numbers = " and ".join(f"{called[name]} is not None" for name in can_be_none) or "True"
    noted = ", ".join(called.get(name) or same[name] for name in NOTED)
    key = "".join(f"{name}, " for name in fields if name.startswith("part")) + "texts"
    return "\n".join((
        "def rows(probes, texts):",
        "    made = []",
        "    append = made.append",
        f"    for {', '.join(fields)} in probes:",
        f"        alike = known(({key})) or new(({key}))",
        *(f"        {name} = {values[its]}" for its, name in called.items() if name not in fields),
        f"        append(alike.template % ({numbers}) if {are_numbers} else alike.template_of_texts % ({texts}))",
        f"        (alike.note or begin(alike, {noted}))({noted})",
        "    return made",
    ))  # fmt: skip
