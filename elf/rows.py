# SPDX-License-Identifier: GPL-3.0-only
"""The rows of elf.csv: COLUMNS is the one table from which all else follows.

    HEADER              the first line of the file
    row_function()      returns a function that makes a row and a Record of a probe that has ended
    read_csv()          reads a file (needs pandas); joined() makes one of several
    records_in()        makes the same Records of a file's rows

To add a column, append it to COLUMNS. If the summary is to know it, give Record below a field
of the same name; if elfplot.py is to draw it, add it to READ.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import socket
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, Iterator, NamedTuple, Sequence

from elf.addresses import address_text
from elf.usage import Failure

if TYPE_CHECKING:
    import pandas as pd


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
)
NAMES = tuple(column.name for column in COLUMNS)
HEADER = ",".join(NAMES) + "\n"

# What read_csv() needs to know of the columns.
ALWAYS_THERE = 15  # number of columns that every version writes; numbers in them are never empty
TEXTS = "dest", "responder", "app"  # all others are numbers
READ = (
    "origseq", "latency", "sendtime", "dest", "responder", "outttl", "sport", "dport", "protocol",
    "app", "srtt", "cwnd", "retrans",
)  # fmt: skip
LEAST = {"latency": -1}  # the lowest valid value; 0 for other numbers
LIMITS = {  # by type
    "int64": 1 << 62,  # ns; the sum of two fits
    "float64": 1 << 32,  # these fields have 32 bits
}


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


def dtype(name: str) -> str:
    """Return pandas' type for a column. A number that may be unknown is a float, because no int is NaN."""
    if name in TEXTS:
        return "category"
    return "int64" if name in NAMES[:ALWAYS_THERE] else "float64"


def open_regular(path: str) -> BinaryIO:
    """Open a regular file to read. Raises OSError for any other one: a named pipe would wait for a writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "Is a directory" if stat.S_ISDIR(mode) else "not a regular file", path)
    return open(fd, "rb")


def read_csv(path: str) -> pd.DataFrame:
    """Return the columns in READ of a CSV, and the number of each line, ordered by sendtime.

    The last line is left out while elfprobe.py is writing it. Columns that an older version did not write are
    NaN. Raises Failure for files that cannot be read and for values that elfprobe.py never writes.
    """
    import pandas as pd

    types = {name: dtype(name) for name in READ}
    try:
        with open_regular(path) as file:
            whole = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
            if not whole:
                raise Failure(f"'{path}': there is no whole line in it yet")
            file.seek(0)
            text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
            rows = pd.read_csv(text, nrows=whole - 1, usecols=lambda name: name in types, dtype=types,
                               keep_default_na=False, na_values=[""])  # fmt: skip
    except OSError as err:
        raise Failure(f"cannot read '{path}': {err.strerror or err}") from err
    except (ValueError, OverflowError) as err:
        reason = str(err).strip().splitlines()[0]
        raise Failure(f"'{path}' is not as elfprobe writes it: {reason}") from err
    absent = [name for name in READ if name not in rows]
    required = [name for name in absent if name in NAMES[:ALWAYS_THERE]]
    if required:
        raise Failure(f"'{path}' is not from elfprobe: there is no column {', '.join(required)}")
    for name in absent:
        rows[name] = pd.Series(float("nan"), rows.index).astype(types[name])
    for name, values in rows.items():
        if types[name] in LIMITS:
            are_bad = (values < LEAST.get(name, 0)) | (values >= LIMITS[types[name]])  # NaN is neither
        else:
            are_bad = values.isna() & (name == "dest")
        if are_bad.any():
            bad, line = values[are_bad].iloc[0], are_bad.idxmax() + 2
            raise Failure(f"'{path}' is not as elfprobe writes it: {name} is {bad} in line {line}")
    rows["line"] = rows.index
    return rows.sort_values("sendtime", kind="mergesort").reset_index(drop=True)


def joined(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of several files, which read_csv() has read, as those of one file."""
    import pandas as pd

    if len(parts) == 1:
        return parts[0]
    before = 0
    for rows in parts:
        rows["line"] += before
        before += len(rows)
    rows = pd.concat(parts, ignore_index=True)
    for name in TEXTS:
        rows[name] = rows[name].astype("category")
    return rows.sort_values("sendtime", kind="mergesort").reset_index(drop=True)


def records_in(rows: pd.DataFrame) -> Iterator[Record]:
    """Yield a Record for each row that read_csv() has read, in the order of the file."""
    rows = rows.sort_values("line")
    names = [name for name in Record._fields if name in rows]
    columns = []
    for name in names:
        values = rows[name]
        if name == "responder":
            values = values.astype(object).where(rows.latency >= 0, "").fillna("")
        elif name == "app":
            values = values.astype(object).fillna("")
        elif dtype(name) == "float64":
            numbers = values.fillna(0).astype("int64").to_numpy(object)
            numbers[values.isna()] = None
            values = numbers
        columns.append(values.tolist())
    for values in zip(*columns):
        yield Record(**dict(zip(names, values)))
