# SPDX-License-Identifier: GPL-3.0-only
"""The rows of elf.csv: COLUMNS is the one table from which all else follows.

    HEADER              the first line of the file
    row_function()      returns a function that makes a row and a Record of a probe that has ended

elf/batches.py reads a file. To add a column, append it to COLUMNS. If the summary is to know it, give Record below
a field of the same name; if elfplot.py is to draw it, add it to READ there.
"""

from __future__ import annotations

import functools
import socket
from typing import Any, Callable, NamedTuple, Sequence

from elf.addresses import address_text


class Column(NamedTuple):
    """A column's name, and its value for answered and for unanswered probes, as Python expressions.

    An expression may use the fields of elfprobe.c's struct result (unanswered: of struct probe and struct
    probe_key) by name, mpls and ifinfo (see row_function), and the functions in IN_EXPRESSIONS. None means
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

    translated is a field of struct result without a column: the quoted source address is not the one that
    the reply was sent to.
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


def row_function(fields: Sequence[str]) -> Callable[..., tuple[str, Record]]:
    """Return a function that makes a row and a Record of the values of these fields, given as one tuple.

    mpls and ifinfo, the texts of a reply's extension, are its optional second and third argument. If
    "recvtime" is not a field, the probes are unanswered. The function is compiled from COLUMNS, as
    collections.namedtuple does it: a loop over the columns takes several times as long for each row.
    """
    is_answered = "recvtime" in fields
    values = {column.name: column.answered if is_answered else column.unanswered for column in COLUMNS}
    # An expression that is more than a name gets a variable of its own, so that it is evaluated only once.
    computed = {name: value for name, value in values.items() if not value.isidentifier()}
    variables = {name: f"its_{name}" if name in computed else value for name, value in values.items()}
    can_be_none = {name for name, value in values.items() if "None" in value}
    row = ",".join(
        f"{{'' if {variable} is None else {variable}}}" if name in can_be_none else f"{{{variable}}}"
        for name, variable in variables.items()
    )
    without_column = {name: name if name in fields else repr(default)
                      for name, default in Record._field_defaults.items()}  # fmt: skip
    record = ({**without_column, **variables}[name] for name in Record._fields)
    source = [
        "def row(fields, mpls='', ifinfo=''):",
        f"    {', '.join(fields)} = fields",
        *(f"    its_{name} = {value}" for name, value in computed.items()),
        f'    return f"{row}\\n", new(Record, ({", ".join(record)}))',
    ]
    namespace: dict[str, Any] = {**IN_EXPRESSIONS, "Record": Record, "new": tuple.__new__}
    exec("\n".join(source), namespace)
    compiled: Callable[..., tuple[str, Record]] = namespace["row"]
    return compiled
