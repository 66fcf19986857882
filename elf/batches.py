# SPDX-License-Identifier: GPL-3.0-only
"""The rows of CSVs in bulk: arrays of numpy, in memory that does not grow with the files.

    read_batches()      yields the rows of a file as Batches; two processes parse them if the file is large
    Texts               the table that gives each text (address, command name) a number

numpy finds the separators of a block of lines, and takes eight digits of all rows at a time. This takes about half
the time of pandas' C parser, and no package that matplotlib does not need.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import errno
import itertools
import os
import signal
import stat
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from elf.rows import ALWAYS_THERE, NAMES, Record, text_of_field
from elf.usage import Failure

TEXTS = "dest", "responder", "app"  # all others are numbers
READ = (
    "origseq", "latency", "sendtime", "dest", "responder", "outttl", "sport", "dport", "protocol",
    "app", "srtt", "cwnd", "retrans", "ripid", "recvttl",
)  # fmt: skip
REQUIRED = [name for name in READ if name in NAMES[:ALWAYS_THERE]]  # each version writes them
LIMITS = {"outttl": 1 << 8, "protocol": 1 << 8, "sport": 1 << 16, "dport": 1 << 16,
          "latency": 1 << 61, "sendtime": 1 << 61}  # numbers are below these, others below 2^32  # fmt: skip
UNKNOWN = -1  # stands for an empty field of a column of numbers that is not REQUIRED

BLOCK = 1 << 20  # bytes that are parsed at a time: their arrays stay in the caches
PART = 1 << 24  # bytes of a batch
SURVEY_PIECE, SURVEY_PIECES = 1 << 18, 16  # bytes of a piece of a survey, number of pieces
READERS = 2  # processes that parse
TEXTS_MAX = 1 << 18  # texts of a table; with more, a new table begins
LINE_MAX = 1 << 16  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_MAX = 1 << 25  # bytes of freed memory that glibc keeps
PAD = b"0" * 64  # around a block: words are read beyond both ends of a field
DIGITS_MAX = 18  # of a number that fits

COMMA, NEWLINE, RETURN, QUOTE, MINUS = b",\n\r\"-"
WORD = np.dtype("<u8")
FIRST_BYTES = np.array([(1 << 8 * number) - 1 for number in range(9)], WORD)
LAST_BYTES = ~FIRST_BYTES[::-1]


def u8(value: int) -> Any:
    return np.uint64(value)


@dataclasses.dataclass
class Batch:
    """Rows in the order of the file: arrays by column. A text is its number in names; 0 is the empty text."""

    names: list[str]
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["sendtime"])

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def take(self, which: Any) -> Batch:
        """Return some of the rows: a slice, a mask or their numbers."""
        return Batch(self.names, {name: values[which] for name, values in self.columns.items()})

    def text(self, name: str, row: int) -> str:
        return self.names[int(self.columns[name][row])]

    def texts(self, name: str, rows: Any) -> list[str]:
        return list(map(self.names.__getitem__, self.columns[name][rows].tolist()))

    def flows(self, rows: Any) -> list[tuple[str, int, int, int]]:
        """Return flow() of each of these rows."""
        ports = (self.columns[name][rows].tolist() for name in ("sport", "dport", "protocol"))
        return list(zip(self.texts("dest", rows), *ports))

    def flow(self, row: int) -> tuple[str, int, int, int]:
        """Return the key of the flow of a row, as the summary has it."""
        sport, dport, protocol = (int(self.columns[name][row]) for name in ("sport", "dport", "protocol"))
        return self.text("dest", row), sport, dport, protocol

    def record(self, row: int) -> Record:
        return next(self.take(slice(row, row + 1)).records())

    def records(self) -> Iterator[Record]:
        """Yield a Record for each row."""
        columns: list[Iterable[Any]] = []
        for name in Record._fields:
            if name not in READ:
                columns.append(itertools.repeat(Record._field_defaults[name]))
                continue
            values = self.columns[name].tolist()
            if name in TEXTS:
                values = map(self.names.__getitem__, values)
            elif name not in REQUIRED:
                values = [None if value == UNKNOWN else value for value in values]
            columns.append(values)
        yield from map(Record._make, zip(*columns))


class Part(NamedTuple):
    """A part of a file, as a reader sends it.

    names: the new texts. They come behind the first known ones of this reader. bad: a bad row and what is wrong.
    """

    columns: dict[str, Any]
    known: int
    names: list[str]
    bad: tuple[int, str] | None


class Texts:
    """The table of texts."""

    def __init__(self) -> None:
        self.clear()
        self._multipliers = np.frombuffer(os.urandom(16), WORD) | u8(1)  # so that nobody can make digests collide

    def clear(self) -> None:
        """Forget all. Batches keep the list that they have."""
        self.names = [""]
        self._numbers = {"": 0}
        self._known, self._number_of = np.array([0], WORD), np.array([0])  # sorted digests, and their numbers

    def number(self, text: str) -> int:
        """Return the number of a text."""
        number = self._numbers.setdefault(text, len(self.names))
        if number == len(self.names):
            self.names.append(text)
        return number

    def numbers(self, data: Any, words: Any, starts: Any, ends: Any) -> Any:
        """Return the number of each text data[starts:ends]. words: the eight bytes from each place on."""
        lengths = ends - starts
        digests = lengths.astype(WORD) * self._multipliers[1]  # 0 for the empty text
        for first in range(0, int(lengths.max(initial=0)), 8):
            part = words[np.minimum(starts + first, ends)] & FIRST_BYTES[np.clip(lengths - first, 0, 8)]
            digests = (digests ^ part) * self._multipliers[0]
            digests ^= digests >> u8(29)
        at = np.minimum(np.searchsorted(self._known, digests), len(self._known) - 1)
        if (self._known[at] != digests).any():
            self._learn(data, digests, starts, ends)
            at = np.searchsorted(self._known, digests)
        return self._number_of[at]

    def _learn(self, data: Any, digests: Any, starts: Any, ends: Any) -> None:
        found, rows = np.unique(digests, return_index=True)
        is_new = ~np.isin(found, self._known)
        added = [
            self.number(text_of_field(data[starts[row] : ends[row]].tobytes().decode(errors="replace")))
            for row in rows[is_new].tolist()
        ]
        known = np.concatenate([self._known, found[is_new]])
        order = np.argsort(known)
        self._known, self._number_of = known[order], np.concatenate([self._number_of, np.array(added, int)])[order]


def keep_freed_memory() -> None:
    """Let glibc keep what arrays have freed for those that follow.

    It would give large blocks back to the kernel, and take them again. The page faults took longer than parsing.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_MAX // 2)
        mallopt(M_TRIM_THRESHOLD, KEPT_MAX)


class BadRow(Exception):
    """A row that elfprobe.py never writes: its number in the block, and what is wrong with it."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def eight_digits(words: Any) -> Any:
    """Return the numbers of words with eight digits (0 to 9, not ASCII) each. Pairs, then fours are joined."""
    words = (words * u8(10) + (words >> u8(8))) & u8(0x00FF00FF00FF00FF)
    words = (words * u8(100) + (words >> u8(16))) & u8(0x0000FFFF0000FFFF)
    return (words * u8(10000) + (words >> u8(32))) & u8(0xFFFFFFFF)


def numbers(name: str, data: Any, words: Any, starts: Any, ends: Any) -> Any:
    """Return the numbers of a column. Raises BadRow."""
    lengths = ends - starts
    longest = int(lengths.max(initial=0))
    values = np.zeros(len(starts), WORD)
    are_odd = lengths > DIGITS_MAX if longest > DIGITS_MAX else np.zeros(len(starts), bool)
    for first in range((min(longest, DIGITS_MAX) - 1) // 8 * 8, -1, -8):
        part = words[ends - (first + 8)] ^ u8(0x3030303030303030)
        part &= LAST_BYTES[np.clip(lengths - first, 0, 8)]
        are_odd |= ((part + u8(0x7676767676767676)) | part) & u8(0x8080808080808080) != 0
        values = values * u8(10**8) + eight_digits(part)
    values = values.view("<i8")
    are_empty = lengths == 0
    if are_empty.any():
        if name in REQUIRED:
            raise BadRow(int(are_empty.argmax()), f"{name} is empty")
        values[are_empty] = UNKNOWN
    if name in ("latency", "recvttl"):
        are_unanswered = (lengths == 2) & (data[starts] == MINUS) & (data[starts + 1] == ord("1"))
        values[are_unanswered] = -1
        are_odd &= ~are_unanswered
    limit = LIMITS.get(name, 1 << 32)
    are_odd |= values >= limit
    for row in np.flatnonzero(are_odd).tolist():
        values[row] = odd_number(row, name, data[starts[row] : ends[row]].tobytes().decode(errors="replace"), limit)
    return values


def odd_number(row: int, name: str, text: str, limit: int) -> int:
    """Return a number that is written otherwise than with digits only. Raises BadRow."""
    try:
        value = int(text) if name in REQUIRED else round(float(text))  # other programs write 7.0
        if 0 <= value < limit:
            return value
    except (ValueError, OverflowError):
        pass
    raise BadRow(row, f"{name} is {text[:40]}")


def parse(block: bytes, header: Sequence[str], texts: Texts) -> dict[str, Any]:
    """Return the columns of a block of lines. Raises BadRow."""
    data = np.frombuffer(PAD + block + PAD, np.uint8)
    words = np.ndarray((len(data) - 7,), WORD, data, strides=(1,))
    fields = len(header)
    places = separators(data, QUOTE in block)
    if (
        len(places) % fields
        or (data[places[fields - 1 :: fields]] != NEWLINE).any()
        or (len(places) != fields * np.count_nonzero(data[places] == NEWLINE))
    ):
        places = whole_lines(data, places, fields)
    ends = np.ascontiguousarray(places.reshape(-1, fields).T)
    columns = {}
    for name in READ:
        if name not in header:
            columns[name] = np.full(ends.shape[1], 0 if name in TEXTS else UNKNOWN)
            continue
        number = header.index(name)
        before = ends[number - 1] if number else np.concatenate([[len(PAD) - 1], ends[-1, :-1]])
        its_starts = before + 1
        its_ends = ends[number]
        if number == fields - 1:
            its_ends = its_ends - (data[its_ends - 1] == RETURN)
        if name in TEXTS:
            columns[name] = texts.numbers(data, words, its_starts, its_ends)
        else:
            columns[name] = numbers(name, data, words, its_starts, its_ends)
    if not columns["dest"].all():
        raise BadRow(int((columns["dest"] == 0).argmax()), "dest is empty")
    columns["responder"][columns["latency"] < 0] = 0
    return {name: narrow(values) for name, values in columns.items()}


def narrow(values: Any) -> Any:
    """Return integers in 32 bits if they fit: half of what goes to another process."""
    return values.astype(np.int32) if values.max(initial=0) < 1 << 31 else values


def separators(data: Any, has_quotes: bool) -> Any:
    """Return the places of commas and newlines that are not in quotes."""
    newlines = np.count_nonzero(data <= NEWLINE)
    if np.count_nonzero(data < COMMA) == newlines and not np.count_nonzero(data < NEWLINE):
        return np.flatnonzero(data <= COMMA)  # no other character is below: 15 times as fast as to look for two
    are_separators = (data == COMMA) | (data == NEWLINE)
    if has_quotes:
        are_separators &= ~np.bitwise_xor.accumulate(data == QUOTE)
    return np.flatnonzero(are_separators)


def whole_lines(data: Any, places: Any, fields: int) -> Any:
    """Return the places of separators without those of empty lines. Raises BadRow for lines of other lengths."""
    newlines = np.flatnonzero(data[places] == NEWLINE)
    found = np.diff(newlines, prepend=-1)
    begins = np.concatenate([[len(PAD)], places[newlines[:-1]] + 1])
    are_empty = (found == 1) & (places[newlines] - begins <= (data[begins] == RETURN))
    are_bad = (found != fields) & ~are_empty
    if are_bad.any() or not len(newlines) or newlines[-1] != len(places) - 1:
        row = int(are_bad.argmax()) if are_bad.any() else len(newlines)
        said = f"has {found[row]} fields in place of {fields}" if are_bad.any() else "has a quote that does not end"
        raise BadRow(row, f"the row {said}")
    return np.delete(places, newlines[are_empty])


def open_regular(path: str) -> BinaryIO:
    """Open a regular file to read. Raises OSError for any other one: a named pipe would wait for a writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "Is a directory" if stat.S_ISDIR(mode) else "not a regular file", path)
    return open(fd, "rb")


def read_header(path: str, file: BinaryIO) -> list[str]:
    """Return the names of the columns. Raises Failure."""
    line = file.readline(LINE_MAX)
    if not line.endswith(b"\n"):
        raise Failure(f"'{path}': there is no whole line in it yet")
    header = next(csv.reader([line.decode("utf-8-sig", "replace").strip("\r\n")]), [])
    header = [name.strip() for name in header]
    absent = [name for name in REQUIRED if name not in header]
    if absent:
        raise Failure(f"'{path}' is not from elfprobe: there is no column {', '.join(absent)}")
    return header


def part_bounds(path: str, file: BinaryIO) -> list[int]:
    """Return the places in the file at which parts of about PART bytes begin, and the end of the last part.

    The first begins at the file's position. Each is the beginning of a line. A last line without its newline is
    left out: it is being written. Raises Failure.
    """
    bounds = [file.tell()]
    size = os.fstat(file.fileno()).st_size
    tail_from = max(size - LINE_MAX, bounds[0])
    end = tail_from + os.pread(file.fileno(), size - tail_from, tail_from).rfind(b"\n") + 1
    while end - bounds[-1] > 1.5 * PART:
        file.seek(bounds[-1] + PART)
        if not file.readline(LINE_MAX).endswith(b"\n"):
            raise Failure(f"'{path}' is not as elfprobe writes it: a line has more than {LINE_MAX} bytes")
        bounds.append(file.tell())
    return [*bounds, end]


def read_part(file: BinaryIO, header: Sequence[str], texts: Texts, begin: int, end: int) -> dict[str, Any]:
    """Return the columns of the lines between two of part_bounds(). Raises BadRow."""
    parts: list[dict[str, Any]] = []
    rows, rest = 0, b""
    while begin < end:
        read = os.pread(file.fileno(), min(BLOCK, end - begin), begin)
        if not read:
            break  # the file was cut off meanwhile
        begin += len(read)
        block, newline, rest = (rest + read).rpartition(b"\n")
        if newline:
            try:
                parts.append(parse(block + newline, header, texts))
            except BadRow as bad:
                raise BadRow(rows + bad.row, str(bad)) from bad
            rows += len(parts[-1]["sendtime"])
    parts = parts or [{name: np.zeros(0, int) for name in READ}]
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in READ}


def read_parts(
    file: BinaryIO, header: Sequence[str], bounds: Sequence[int], numbers: Iterable[int]
) -> Iterator[Part]:
    """Yield the parts with these numbers. It ends with the first part that has a bad row."""
    texts, sent = Texts(), 0
    for number in numbers:
        if len(texts.names) > TEXTS_MAX:
            texts, sent = Texts(), 0
        try:
            columns = read_part(file, header, texts, bounds[number], bounds[number + 1])
        except BadRow as bad:
            yield Part({}, 0, [], (bad.row, str(bad)))
            return
        part = Part(columns, sent, texts.names[sent:], None)
        del columns
        yield part
        del part  # otherwise it takes memory until the next one is there
        sent = len(texts.names)


def send_parts(pipe: Any, *arguments: Any) -> None:
    """Read parts in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it is interrupted, too
    with contextlib.suppress(BrokenPipeError):
        for part in read_parts(*arguments):
            pipe.send(part)
            del part


@contextlib.contextmanager
def part_readers(
    file: BinaryIO, header: Sequence[str], bounds: Sequence[int]
) -> Iterator[list[Callable[[], Part]]]:
    """Yield functions that return the next part, to be called in turn.

    Each of them belongs to a process of its own, if there are several parts.
    """
    count = len(bounds) - 1
    if count == 1:
        yield [read_parts(file, header, bounds, [0]).__next__]
        return
    import multiprocessing  # takes long

    fork = multiprocessing.get_context("fork")
    processes, pipes = [], []
    try:
        for number in range(READERS):
            receiver, sender = fork.Pipe(False)
            process = fork.Process(
                target=send_parts, args=(sender, file, header, bounds, range(number, count, READERS)), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        yield [pipe.recv for pipe in pipes]
    finally:
        for process, pipe in zip(processes, pipes):
            pipe.close()
            process.kill()
            process.join()


@dataclasses.dataclass
class Survey:
    """Some rows of a file, from its beginning to its end: all of them if it is small."""

    path: str
    batch: Batch
    size: int  # bytes of whole lines
    share: float  # of these bytes that were read

    @property
    def span(self) -> tuple[int, int] | None:
        """Return when the first and the last probe left, None if there is none."""
        sent = self.batch["sendtime"]
        return (int(sent.min()), int(sent.max())) if len(sent) else None


def survey(path: str) -> Survey:
    """Read some rows of a file. Raises Failure."""
    texts = Texts()
    try:
        with open_regular(path) as file:
            header = read_header(path, file)
            bounds = part_bounds(path, file)
            begin, end = bounds[0], bounds[-1]
            size = end - begin
            if size <= SURVEY_PIECE * SURVEY_PIECES:
                pieces = [(begin, end)]
            else:
                pieces = [(begin, begin + SURVEY_PIECE)]
                for number in range(1, SURVEY_PIECES):
                    file.seek(begin + (size - SURVEY_PIECE) * number // (SURVEY_PIECES - 1))
                    file.readline(LINE_MAX)
                    pieces.append((file.tell(), min(file.tell() + SURVEY_PIECE, end)))
            parts = []
            for first, last in pieces:
                try:
                    parts.append(read_part(file, header, texts, first, last))
                except BadRow:
                    if len(pieces) == 1:
                        raise  # reading the whole file will tell the number of the bad line
    except OSError as err:
        raise Failure(f"cannot read '{path}': {err.strerror or err}") from err
    except BadRow as bad:
        raise Failure(f"'{path}' is not as elfprobe writes it: {bad} in line {bad.row + 2}") from bad
    found = {name: [part[name] for part in parts] or [np.zeros(0, int)] for name in READ}
    columns = {name: np.concatenate(its).astype(np.int64) for name, its in found.items()}
    return Survey(path, Batch(texts.names, columns), size, min(SURVEY_PIECE * len(pieces) / max(size, 1), 1.0))


def read_batches(path: str, texts: Texts, tell: Callable[[int], None] = lambda _: None) -> Iterator[Batch]:
    """Yield the rows of a file, as far as it is written now. Raises Failure.

    tell is called with the number of bytes that have been read since the last time.
    """
    lines = 1
    try:
        with open_regular(path) as file:
            header = read_header(path, file)
            bounds = part_bounds(path, file)
            with part_readers(file, header, bounds) as readers:
                seen: list[list[str]] = [[] for _ in readers]  # the names of each reader
                for number in range(len(bounds) - 1):
                    which = number % len(readers)
                    columns, known, names, bad = readers[which]()
                    if bad:
                        raise BadRow(*bad)
                    if len(texts.names) > TEXTS_MAX:
                        texts.clear()
                    seen[which][known:] = names
                    its_number = np.array([texts.number(name) for name in seen[which]])
                    columns.update({name: its_number[columns[name]] for name in TEXTS})
                    lines += len(columns["sendtime"])
                    yield Batch(texts.names, {name: columns.pop(name).astype(np.int64) for name in READ})
                    tell(bounds[number + 1] - bounds[number])
    except EOFError:
        raise Failure(f"cannot read '{path}': a process that read it was killed") from None
    except OSError as err:
        raise Failure(f"cannot read '{path}': {err.strerror or err}") from err
    except BadRow as bad:
        raise Failure(f"'{path}' is not as elfprobe writes it: {bad} in line {lines + bad.row + 1}") from bad
