# SPDX-License-Identifier: GPL-3.0-only
"""The files of a run: CSV, log and report. They replace no file of others, and appear when they are complete.

A file has a lock, flock(2), while it is written. It never loses its name to another run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import time
from typing import Iterable, Iterator, NamedTuple, Protocol, Sequence

from elf.rows import HEADER
from elf.usage import Failure

log = logging.getLogger("elfprobe")

FILE_EXTENSIONS = ".csv", ".json", ".log"  # behind FILEBASE
LOCK_TRIES, LOCK_EVERY = 500, 0.01  # to lock the folder of the CSV; s between two tries


@contextlib.contextmanager
def no_other_in_folder_of(path: str, tries: int = LOCK_TRIES) -> Iterator[None]:
    """Keep other runs from choosing names and renaming files in the path's folder, inside the block.

    If the folder cannot be locked, or another run (a stopped one, say) keeps it locked for seconds, go on without.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            for _ in range(tries):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(LOCK_EVERY)
        yield


def next_free_base(base: str, *extensions: str) -> str:
    """Return the base with a number behind it: the lowest one that no file with any of these extensions has."""
    number = 1
    while any(os.path.lexists(f"{base}.{number}{extension}") for extension in extensions):
        number += 1
    return f"{base}.{number}"


def next_free_name(path: str) -> str:
    """Return the path with the lowest free number before its extension."""
    base, extension = os.path.splitext(path)
    return next_free_base(base, extension) + extension


def is_being_written(path: str) -> bool:
    """Return whether a run writes this file now."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as err:
        return isinstance(err, BlockingIOError)
    finally:
        os.close(file)
    return False


def encoded(lines: str) -> bytes:
    return lines.encode(errors="backslashreplace")


class OutputFile:
    """A new file that the user who called sudo owns. It has a temporary name until publish(), and is locked."""

    def __init__(self, path: str, option: str = "-f/--filebase") -> None:
        """Create the file. option is the one that a message names. Raises Failure."""
        self.path = path
        self._option = option
        self.lines_lost = 0  # that could not be written
        self._temporary = os.path.join(os.path.dirname(path), f".elfprobe-{secrets.token_hex(8)}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        with self._errors():
            self.fd = os.open(self._temporary, flags, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if "SUDO_UID" in os.environ and os.geteuid() == 0:
            with contextlib.suppress(OSError, ValueError):
                os.fchown(self.fd, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", "-1")))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise Failure(f"argument {self._option}: cannot write '{self.path}': {err.strerror}") from err

    def publish(self, tries: int = LOCK_TRIES) -> str:
        """Give the file its name. Return the new name of the file that had it, empty if none had. Raises Failure.

        If a run writes the file that has the name, this one takes another name. Before this call no existing file
        is touched, so a start that fails has nothing to undo.
        """
        renamed = ""
        with self._errors(), no_other_in_folder_of(self.path, tries):
            if os.path.lexists(self.path):
                free = next_free_name(self.path)
                if is_being_written(self.path):
                    self.path = free
                else:
                    renamed = free
                    os.rename(self.path, renamed)
            self._take_name()
        return renamed

    def publish_after(self, former: OutputFile) -> str:
        """Do as publish(), with the name of a file of this run that ends. If that fails, the former one goes on."""
        with contextlib.suppress(OSError):
            fcntl.flock(former.fd, fcntl.LOCK_UN)
        try:
            return self.publish(tries=1)
        except BaseException:
            with contextlib.suppress(OSError):
                fcntl.flock(former.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise

    def _take_name(self) -> None:
        """Give the file its name, which must be free."""
        try:
            os.link(self._temporary, self.path)  # unlike os.rename(), never replaces a file
            os.unlink(self._temporary)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.rename(self._temporary, self.path)
        self._temporary = ""

    def replace(self, former: OutputFile) -> None:
        """Take the place of the file's former version. Raises Failure.

        If somebody has given its name to another file, that one stays, and this one gets the next free name.
        """
        self.path = former.path
        with self._errors(), no_other_in_folder_of(self.path, tries=1):
            if not os.path.lexists(self.path):
                self._take_name()
            elif os.path.samestat(os.fstat(former.fd), os.lstat(self.path)):
                os.rename(self._temporary, self.path)
                self._temporary = ""
            else:
                self.path = next_free_name(self.path)
                self._take_name()

    def overwrite(self, content: bytes) -> None:
        """Write the whole file, and give it its name. What had the name is gone, or for a link is not followed.
        Raises Failure."""
        with self._errors():
            with open(self.fd, "wb", closefd=False) as file:
                file.write(content)
            os.rename(self._temporary, self.path)
        self._temporary = ""

    def write_lines(self, lines: str) -> None:
        """Append whole lines. If the disk takes only a part, the last, broken line is removed. Raises Failure."""
        self.write_data(encoded(lines))

    def write_data(self, data: bytes, is_text: bool = True) -> None:
        """Append whole lines, or other data: if the disk takes only a part of that, nothing is left of it.
        Raises Failure."""
        start = os.fstat(self.fd).st_size
        try:
            written = os.write(self.fd, data)
            while written < len(data):
                written += os.write(self.fd, data[written:])
        except OSError as err:
            kept = data.rfind(b"\n", 0, os.fstat(self.fd).st_size - start) + 1 if is_text else 0
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, start + kept)
            if is_text:
                self.lines_lost += data.count(b"\n", kept)
            raise Failure(f"cannot write '{self.path}': {err.strerror}") from err

    def close(self) -> None:
        """Close the file. Remove it if it is not published."""
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
        os.close(self.fd)


class Publishable(Protocol):
    """A file as OutputFile, or several."""

    @property
    def path(self) -> str: ...

    def publish(self) -> str: ...


class RowFiles:
    """FILEBASE.csv, and, if each may have only so many bytes, FILEBASE.2.csv and so on, each with a header."""

    def __init__(self, filebase: str, limit: int | None = None) -> None:
        """Begin the first file, under a temporary name until publish(). Raises Failure."""
        self.filebase = filebase
        self._limit = limit or 1 << 63
        self.paths: list[str] = []
        self.written = 0  # bytes of rows
        self._lost = 0  # rows that could not be written, but for those of the newest file
        self._file = self._begin()

    @property
    def path(self) -> str:
        """The name of the newest file."""
        return self._file.path

    def publish(self) -> str:
        """As OutputFile.publish()."""
        renamed = self._file.publish()
        self.paths[-1] = self._file.path
        self.filebase = os.path.splitext(self._file.path)[0]  # another run may have begun to write the one before
        return renamed

    def _begin(self) -> OutputFile:
        number = len(self.paths) + 1
        file = OutputFile(f"{self.filebase}.{number}.csv" if self.paths else f"{self.filebase}.csv")
        try:
            file.write_lines(HEADER)
            if self.paths:
                path, renamed = file.path, file.publish(tries=1)
                log_renamed(path, renamed)
                if renamed:  # it may be one of this run that reopen() renamed
                    self.paths = [renamed if each == path else each for each in self.paths]
        except BaseException:
            file.close()
            raise
        self.paths.append(file.path)
        self._size = len(HEADER)
        return file

    def reopen(self) -> str:
        """End the newest file, and begin another one with its name. Raises Failure; then the newest one goes on.

        Return the new name of the file that ends, empty if somebody has renamed it before.
        """
        file = OutputFile(self.path)
        try:
            file.write_lines(HEADER)
            renamed = file.publish_after(self._file)
        except BaseException:
            file.close()
            raise
        self.paths[-1:] = [renamed, file.path] if renamed else [file.path]
        self._size = len(HEADER)
        self._replace(file)
        return renamed

    def _replace(self, file: OutputFile) -> None:
        self._file.close()
        self._lost += self._file.lines_lost
        self._file = file

    @property
    def lines_lost(self) -> int:
        """How many rows could not be written."""
        return self._lost + self._file.lines_lost

    def write_lines(self, rows: str) -> None:
        """Append whole rows. Raises Failure."""
        data = encoded(rows)
        while data:
            end = 0
            try:
                end = self._make_room(data)
                self._file.write_data(data[:end])
            except Failure:
                self._lost += data.count(b"\n", end)
                raise
            self._size += end
            self.written += end
            data = data[end:]

    def _make_room(self, data: bytes) -> int:
        """Return how much of the data, whole rows, goes to this file, or to a new one if this is full."""
        if self._size + len(data) <= self._limit:
            return len(data)
        end = data.rfind(b"\n", 0, max(self._limit - self._size, 0)) + 1
        if end:
            return end
        new = self._begin()
        self._replace(new)
        log.info("%s is full: rows go to %s from now on", self.paths[-2], new.path)
        return data.index(b"\n") + 1

    def close(self) -> None:
        """Close the newest file."""
        self._file.close()


class DiskUse:
    """What the rows of a run take, and whether the disk has room for them."""

    def __init__(self, path: str, what: str) -> None:
        """what is written, in words."""
        self._folder = os.path.dirname(path) or "."
        self._what = what
        self._before = time.monotonic(), 0, 0, 0  # time, bytes, rows, hops at the last look
        self._is_told = False
        self._is_short = False

    def look(self, written: int, rows: int, hops: int) -> str:
        """Return what is to be said now; empty: nothing. written: bytes so far.

        The estimate is made once: when no hop has been found since the last look, so that the rate, which may
        grow with each hop, is known.
        """
        now = time.monotonic()
        then, bytes_before, rows_before, hops_before = self._before
        self._before = now, written, rows, hops
        rate = (written - bytes_before) / (now - then)  # bytes per second
        if not rate or hops != hops_before:
            return ""
        try:
            status = os.statvfs(self._folder)
        except OSError:  # removed meanwhile
            return ""
        free = status.f_bavail * status.f_frsize
        is_short, before = free < rate * 3600, self._is_short
        self._is_short = is_short or before and free < 2 * rate * 3600
        if is_short and not before:
            self._is_told = True
            left = f"only {size_text(free)} are free, which is enough for {free / rate / 60:.0f} minutes"
            return f"the disk will soon be full: {left} at {size_text(86400 * rate)} a day"
        if self._is_told:
            return ""
        self._is_told = True
        per_second = (rows - rows_before) / (now - then)
        at = f"{per_second:.0f} probes/s to {hops} hops"
        return (
            f"{self._what} take {size_text(86400 * rate)} a day at this rate ({at}), and {size_text(free)} are free"
        )


def size_text(size: float) -> str:
    """Return a number of bytes as text."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"


def log_renamed(path: str, name: str) -> None:
    """Log what has become of a file that had a path before."""
    if name:
        log.info("the %s that was there is now %s", path, name)


class ReplacedFile:
    """A file whose content is replaced as a whole, so that whoever reads it finds a whole one."""

    def __init__(self, path: str, pieces: Iterable[str]) -> None:
        """Write the first content, under a temporary name until publish(). Raises Failure."""
        self._file = written(path, pieces)
        self._next: OutputFile | None = None
        self._pieces: Iterator[str] = iter(())

    @property
    def path(self) -> str:
        return self._file.path

    def publish(self) -> str:
        """As OutputFile.publish()."""
        return self._file.publish()

    def begin(self, pieces: Iterator[str]) -> None:
        """Begin to replace the content, unless that is still going on. Raises Failure."""
        if not self._next:
            self._next, self._pieces = OutputFile(self.path), pieces

    def go_on(self, seconds: float) -> None:
        """Write for so long. When everything is written, it replaces the former content. Raises Failure."""
        if not self._next:
            return
        try:
            until, text, is_whole = time.monotonic() + seconds, [], True
            for piece in self._pieces:
                text.append(piece)
                if time.monotonic() > until:
                    is_whole = False
                    break
            self._next.write_lines("".join(text))
            if is_whole:
                self._replace()
        except BaseException:
            self._drop()
            raise

    def finish(self, pieces: Iterable[str]) -> None:
        """Replace the content for the last time. Raises Failure."""
        self._drop()
        self._next = written(self.path, pieces)
        self._replace()

    def _replace(self) -> None:
        assert self._next
        before = self.path
        self._next.replace(self._file)
        self._file.close()
        self._file, self._next = self._next, None
        if self.path != before:
            log.warning("another file is %s now, so that of this run is %s", before, self.path)

    def _drop(self) -> None:
        if self._next:
            self._next.close()
            self._next = None

    def close(self) -> None:
        """Close the file, and remove what is not complete."""
        self._drop()
        self._file.close()


def written(path: str, pieces: Iterable[str]) -> OutputFile:
    """Return a new file with this content. Raises Failure."""
    file = OutputFile(path)
    try:
        file.write_lines("".join(pieces))
    except BaseException:
        file.close()
        raise
    return file


class FileLog(logging.Handler):
    """Logs to an OutputFile, once there is one; until then it keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self._early: list[str] = []
        self._file: OutputFile | None = None

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        if self._file is None:
            self._early.append(line)
        else:
            with contextlib.suppress(Failure):  # a log that cannot be written must not end a measurement
                self._file.write_lines(line)

    def begin(self, file: OutputFile) -> None:
        """Write the lines so far, and from now on each line, to a file."""
        with contextlib.suppress(Failure):
            file.write_lines("".join(self._early))
        self._file = file

    @property
    def path(self) -> str:
        return self._file.path if self._file else ""

    def reopen(self) -> str:
        """As RowFiles.reopen()."""
        if not self._file:
            return ""
        file = OutputFile(self._file.path)
        try:
            renamed = file.publish_after(self._file)
        except BaseException:
            file.close()
            raise
        with self.lock or contextlib.nullcontext():  # other threads log, too
            former, self._file = self._file, file
        former.close()
        return renamed

    def end(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


class Files(NamedTuple):
    """The files of a run."""

    csv: RowFiles
    json: ReplacedFile
    log: FileLog | None

    def reopen(self) -> None:
        """Begin a new CSV and a new log with the names that they had. The report is a new file each time anyway.

        A file that nobody has renamed is renamed. Raises Failure.
        """
        for file in (self.csv, self.log):
            if file:
                renamed = file.reopen()
                log.info("%s is opened anew", file.path)
                log_renamed(file.path, renamed)


@contextlib.contextmanager
def output_files(
    filebase: str, file_log: FileLog | None, report: Iterable[str], limit: int | None, others: Sequence[Publishable]
) -> Iterator[Files]:
    """Create the log with the lines so far, the CSV with its header, and the report. Raises Failure.

    Yield the files. All get their names when all are complete. Until then, files of earlier runs
    keep theirs. If another run writes one of those, all get the next number that is free. limit: bytes of a CSV.
    others are further files that get their names then.
    """
    with contextlib.ExitStack() as stack:
        if any(is_being_written(filebase + extension) for extension in FILE_EXTENSIONS):
            taken, filebase = filebase, next_free_base(filebase, *FILE_EXTENSIONS)
            log.info("another run writes %s.csv: the files of this one are %s.*", taken, filebase)
        csv = RowFiles(filebase, limit)
        stack.callback(csv.close)
        json = ReplacedFile(filebase + ".json", report)
        stack.callback(json.close)
        files: list[Publishable] = [csv, json, *others]
        if file_log:
            file = OutputFile(filebase + ".log")
            stack.callback(file_log.end)
            files.append(file)
            with file_log.lock or contextlib.nullcontext():  # other threads log, too
                file_log.begin(file)
            stack.callback(logging.getLogger().removeHandler, file_log)
        renamed = [(file.path, file.publish()) for file in reversed(files)]
        for path, name in renamed:
            log_renamed(path, name)
        yield Files(csv, json, file_log)
