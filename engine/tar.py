"""Tar files of strangers, read where they lie: positions of plain files, by bounded reads, nothing unpacked.

A shard is plain ustar as `encoding.tar_member` writes it (POSIX.1-1988); whatever else a tar can hold is refused. Tars
of other writers may have folders and long names; what is no plain file in them is passed over.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from synthkd.engine.errors import SynthkdError
from synthkd.engine.untrusted import open_plain

BLOCK = 512  # bytes of a header, and what members are padded to
MAX_MEMBER = 64 * 2**20  # bytes
RECORD = 10240  # bytes that writers fill a tar up to
_NEAR, _FAR = 2**18, 2**13  # bytes read ahead where members are small, and where they are passed over
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_OCTAL = re.compile(rb"[ 0]*[0-7]{0,11}[ \0]*")
_MAX_EXTENSION = 2**16  # bytes of a pax header or a long name
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([A-Za-z0-9_.]+)=")


class Member(NamedTuple):
    """A plain file of a tar: where its bytes start and how many there are."""

    name: str
    offset: int
    size: int


class Window:
    """Bytes of a file by position, read ahead; `ahead` says how many at least."""

    def __init__(self, descriptor: int) -> None:
        """descriptor: of an open file, which stays the caller's."""
        self._descriptor, self._start, self._data, self.ahead = descriptor, 0, b"", _NEAR
        self.length = os.fstat(descriptor).st_size

    def take(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, fewer at the end of the file."""
        at = offset - self._start
        if at < 0 or at + count > len(self._data):
            self._start, at = offset, 0
            self._data = os.pread(self._descriptor, max(count, self.ahead), offset)
        return self._data[at : at + count]


class _Header(NamedTuple):
    """The fields of a header that say what follows it."""

    name: bytes
    prefix: bytes
    kind: bytes
    size: int
    plain: bool  # nothing but a name of ustar's first field


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes) -> int:
    if not _OCTAL.fullmatch(field):
        raise ValueError("not a tar header")
    return int(field.strip(b"\0 ") or b"0", 8)


def _size(field: bytes, foreign: bool) -> int:
    """Octal digits; of foreign tars also GNU's binary numbers, for files above 8 GiB."""
    return int.from_bytes(field[1:], "big") if foreign and field[0] == 0x80 else _octal(field)


def _header(block: bytes, foreign: bool) -> _Header:
    """Raises ValueError for what is no header."""
    total, size = _octal(block[148:156]), _size(block[124:136], foreign)
    if total != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise ValueError("a tar header does not match its checksum")
    posix = block[257:263] == b"ustar\0"  # GNU tar keeps times where POSIX has the prefix
    plain = block[257:262] == b"ustar" and not block[157] and not block[345:].strip(b"\0")
    return _Header(_text(block[:100]), _text(block[345:500]) if posix else b"", block[156:157], size, plain)


def _walk(path: Path, window: Window, foreign: bool) -> Iterator[tuple[_Header, int]]:
    """Headers of a tar and the offset of what follows each, up to its end mark."""
    offset, last, again = 0, "the first member", f"run `synthkd verify {path.parent}`"
    while True:
        block = window.take(offset, BLOCK)
        if len(block) < BLOCK or not block.strip(b"\0"):
            _check_end(path, window, offset, last, foreign)
            return
        try:
            header = _header(block, foreign)
        except ValueError as error:
            raise SynthkdError(f"{path}: damaged after {last} ({error}); {again}") from error
        start, name = offset + BLOCK, header.name.decode("utf-8", "replace")
        if not foreign:
            _check_plain(path, header, name)
        last = name if name.isprintable() else ascii(name)
        if start + header.size > window.length:
            raise SynthkdError(f"{path}: truncated inside {last[:100]}; {again}")
        yield header, start
        offset = start + -(-header.size // BLOCK) * BLOCK


def _check_plain(path: Path, header: _Header, name: str) -> None:
    plain = header.kind in b"\x000" and header.plain
    named = _NAME.fullmatch(header.name) is not None and b".." not in header.name
    if not plain or not named or header.size > MAX_MEMBER:
        raise SynthkdError(f"{path}: member {name[:80]!r} is not a plain file of a sample")


def _check_end(path: Path, window: Window, offset: int, last: str, foreign: bool) -> None:
    """Two blocks of zeros end a tar, and fill its last record; nothing may hide behind them."""
    again = f"run `synthkd verify {path.parent}`"
    if offset == 0:
        raise SynthkdError(f"{path}: damaged after {last} (no tar header); {again}")
    if foreign:
        return
    tail = window.take(offset, RECORD + BLOCK + 1)
    if len(tail) < 2 * BLOCK:
        raise SynthkdError(f"{path}: truncated after {last} (the end mark is missing); {again}")
    if len(tail) > RECORD + BLOCK or tail.strip(b"\0"):
        raise SynthkdError(f"{path}: holds more bytes after its end mark; {again}")


def scan(path: Path, window: Window) -> Iterator[Member]:
    """Members of a shard, in order; raises SynthkdError where it is damaged or holds anything but plain files."""
    for header, start in _walk(path, window, foreign=False):
        window.ahead = _NEAR if header.size < _NEAR // 8 else _FAR
        yield Member(header.name.decode(), start, header.size)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of a shard's members, in order; one of them is in memory at a time. See `scan`."""
    try:
        descriptor = open_plain(path, path.parent)
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        window = Window(descriptor)
        for member in scan(path, window):
            data = window.take(member.offset, member.size)
            if len(data) < member.size:  # it became shorter while we read
                raise SynthkdError(f"{path}: truncated inside {member.name}; run `synthkd verify {path.parent}`")
            yield member.name, data
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be read ({error.strerror}); run `synthkd verify {path.parent}`") from error
    finally:
        os.close(descriptor)


def foreign_members(path: Path) -> Iterator[Member]:
    """Plain files of a tar that another program wrote, in order; nothing is read but headers.

    Taken: names with folders (ustar, V7), pax paths and GNU long names of up to 64 KiB. Passed over: folders, links,
    devices, sparse files, names that cannot be printed. Raises SynthkdError for what is no tar or is cut off.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        window = Window(descriptor)
        window.ahead = _FAR
        yield from _foreign(path, window)
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


def _foreign(path: Path, window: Window) -> Iterator[Member]:
    said: dict[str, bytes] = {}  # what the headers before a member say of it
    for header, start in _walk(path, window, foreign=True):
        if header.kind in b"xLKg":
            if header.size > _MAX_EXTENSION:
                raise SynthkdError(f"{path}: an extended header of {header.size} bytes; expected at most 64 KiB")
            said |= _extension(header.kind, window.take(start, header.size))
            continue
        told, said = said, {}
        if told.get("size", b"%d" % header.size) != b"%d" % header.size:
            raise SynthkdError(f"{path}: {header.name!r:.80} has two sizes; expected members below 8 GiB")
        if header.kind not in b"\x0007" or "sparse" in told:
            continue
        name = _foreign_name(header, told)
        if name.isprintable() and not name.endswith("/"):
            yield Member(name, start, header.size)


def _foreign_name(header: _Header, told: dict[str, bytes]) -> str:
    plain = b"/".join(part for part in (header.prefix, header.name) if part)
    return told.get("path", plain).decode("utf-8", "replace")


def _extension(kind: bytes, data: bytes) -> dict[str, bytes]:
    """What a pax header or GNU long name says of the next member: path, size, sparse."""
    if kind == b"L":
        return {"path": _text(data)}
    found: dict[str, bytes] = {}
    while kind == b"x" and (match := _PAX_RECORD.match(data)):
        length = int(match[1])
        if length <= match.end() or length > len(data):
            break
        key, value = match[2].decode(), data[match.end() : length - 1]
        found |= {key: value} if key in ("path", "size") else {"sparse": b""} if key.startswith("GNU.sparse") else {}
        data = data[length:]
    return found
