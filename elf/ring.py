# SPDX-License-Identifier: GPL-3.0-only
"""Events of BPF programs, many at once: read from the memory that the kernel shares for a ring buffer.

The layout is that of the kernel's Documentation/bpf/ringbuf.rst: a page with the reader's position, one with the
writer's, and the events, mapped twice in a row, so that none is broken. An event begins with its size.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Iterator, NamedTuple

HEADER = struct.Struct("=II")  # in front of an event: its size with the flags below, and its page
BUSY, DISCARDED = 1 << 31, 1 << 30  # linux/bpf.h: BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT


def framed_size(size: int) -> int:
    """Return the bytes from an event of this size to the next one."""
    return (HEADER.size + size + 7) & ~7


def framed(layout: str) -> str:
    """Return the struct module's format for what Events.data repeats, from the format of an event."""
    size = struct.calcsize(layout)
    return f"={HEADER.size}x{layout[1:]}{framed_size(size) - HEADER.size - size}x"


class Events(NamedTuple):
    """Events of one size, one behind the other, each with a HEADER in front and padding behind it."""

    size: int
    data: bytes

    def __len__(self) -> int:
        return len(self.data) // framed_size(self.size)

    def frames(self) -> Iterator[bytes]:
        """Yield each event with its header and its padding."""
        return (
            self.data[at : at + framed_size(self.size)] for at in range(0, len(self.data), framed_size(self.size))
        )

    def each(self) -> Iterator[bytes]:
        """Yield each event."""
        return (frame[HEADER.size : HEADER.size + self.size] for frame in self.frames())

    @classmethod
    def of_perf_buffer(cls, data: bytes) -> Events:
        """Return an event of a perf buffer, which appends 4 bytes. The sizes of our events are multiples of 8."""
        size = len(data) & ~7
        return cls(size, HEADER.pack(size, 0) + data[:size])


class Ring:
    """A ring buffer as its reader sees it."""

    def __init__(self, fd: int, size: int) -> None:
        """fd: descriptor of the map. size: bytes of events that it holds. Raises OSError."""
        self.fd = fd
        self._mask = size - 1
        self._ours = mmap.mmap(fd, mmap.PAGESIZE)
        self._theirs = mmap.mmap(fd, mmap.PAGESIZE + 2 * size, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._read = memoryview(self._ours).cast("L")
        self._written = memoryview(self._theirs)[: mmap.PAGESIZE].cast("L")
        self._data = memoryview(self._theirs)[mmap.PAGESIZE :]
        self._sizes = self._data.cast("I")

    def take(self) -> Iterator[Events]:
        """Yield the events that are there now, in their order, and free their room."""
        at, end = self._read[0], self._written[0]
        fence()
        while at < end:
            start = at & self._mask
            size, count = self._alike(start, start + end - at)
            if size & BUSY:
                break
            fence()
            after = start + count * framed_size(size & ~DISCARDED)
            data = bytes(self._data[start:after])
            fence()
            at += after - start
            self._read[0] = at
            if not size & DISCARDED:
                yield Events(size, data)

    def _alike(self, start: int, end: int) -> tuple[int, int]:
        """Return the size of the event at start, with its flags, and how many of this size follow one another."""
        size, count, ahead = self._sizes[start // 4], 1, 1
        stride = framed_size(size & ~DISCARDED) // 4
        while not size & BUSY:
            first = start // 4 + count * stride
            sizes = self._sizes[first : min(first + ahead * stride, end // 4) : stride].tolist()
            if sizes.count(size) < ahead:  # the others are of another size, or not there yet
                return size, count + next((n for n, other in enumerate(sizes) if other != size), len(sizes))
            count, ahead = count + ahead, 2 * ahead
        return size, count

    def close(self) -> None:
        """Unmap the memory."""
        for view in self._read, self._written, self._sizes, self._data:
            view.release()
        self._ours.close()
        self._theirs.close()


def fence() -> None:
    """Have the processor finish what it reads and writes before it goes on: entering the kernel does that."""
    os.getppid()
