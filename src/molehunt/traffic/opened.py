"""Opens a file of traffic by what it holds, not by its name: packed or plain, in any Unicode encoding, also a stream.

A stream (`-` for standard input, a FIFO, `/dev/stdin`) is read once from its start, and only as far as rows are asked for.
"""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.extras import install_command

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STDIN = "-"
"""Name of standard input."""
ZSTD_PIECE = 1024
"""Number of packed bytes that are unpacked at a time: zstd can turn each of them into 32 kB."""
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
"""First bytes of packed files."""
REFUSED = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"SQLite format 3": "a database: export its rows as JSON lines",
    b"%PDF": "a PDF",
    b"GGUF": "a model",
    b"PAR1": "a parquet file, which cannot be read as a stream: give the file itself, unpacked",
    b"\x80\x04": "a pickle, which is a program: write it as JSON lines",
}
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@runtime_checkable
class Readable(Protocol):
    """The one method of a stream that is used here: some bytes, and none only at its end."""

    def read1(self, size: int, /) -> bytes: ...


@dataclass(eq=False)
class OpenedText:
    """A file that is being read, as UTF-8 without a mark at its start."""

    name: str
    """Its name, fit for a terminal."""
    data: io.BufferedReader
    """The unpacked text. Its offsets count from the first byte after a byte order mark only where it was recoded."""
    stored: io.BufferedReader
    """The file as it is stored, whose position tells how far reading has come."""
    size: int | None
    """Bytes of the stored file; None for a stream."""
    path: Path

    @property
    def seeks(self) -> bool:
        """Whether `data` can be moved to an offset without reading up to it."""
        return self.data is self.stored and self.size is not None

    def ahead(self, lines: int, most: int) -> bytes:
        """The bytes up to the end of so many lines that are not blank, at most `most` bytes; the text stays at its start."""
        head, left = b"", lines
        while left and len(head) < most and (line := self.data.readline(most - len(head))):
            head += line
            left -= bool(line.strip())
        if self.seeks:
            self.data.seek(0)
        else:
            self.data = behind(head, self.data)
        return head


@contextmanager
def opened(path: Path) -> Generator[OpenedText, None, None]:
    """Open a file or stream of text.

    Raises:
        UsageError: there is no such file, or a package that unpacks it is missing.
        InvalidInput: the file is broken, or of a kind that holds no text (inside the block, too).
    """
    name = name_of(path)
    with _stored(path) as stored:
        size = path.stat().st_size if str(path) != STDIN and path.is_file() else None
        head, raw = _peeked(stored, 16)
        kind = next((REFUSED[magic] for magic in REFUSED if head.startswith(magic)), None)
        if kind is not None:
            raise InvalidInput(f"{name} is {kind}.")
        packing = packing_of(head)
        try:
            head, data = (head, raw) if packing is None else _peeked(_unpacked(raw, packing, name), 4)
            encoding = _encoding(head)
            if encoding != "utf-8":
                data = _recoded(data, encoding, name)
            elif packing is None and size is not None:
                stored.seek(0)
                data = stored
            yield OpenedText(name, data, stored, size, path)
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if packing is None and not isinstance(error, EOFError):
                raise InvalidInput(f"{name} cannot be read: {printable(str(error))}") from error
            raise InvalidInput(f"{name} is cut off or no {packing} file: {printable(str(error))}") from error


def name_of(path: Path) -> str:
    """What messages call a file."""
    return "standard input" if str(path) == STDIN else printable(path.name)


def is_readable(path: Path) -> bool:
    """Whether this is a file or a stream."""
    return str(path) == STDIN or path.is_file() or path.is_fifo()


def packing_of(head: bytes) -> str | None:
    """How a file with these first bytes is packed."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def _stored(path: Path) -> Generator[io.BufferedReader, None, None]:
    if str(path) == STDIN:
        yield cast("io.BufferedReader", sys.stdin.buffer)
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidInput(f"{name_of(path)} cannot be opened: {printable(str(error.strerror))}") from None
    with file:
        yield file


class _Pieces(io.RawIOBase):
    """A stream made of pieces of any size; an empty piece ends it."""

    def __init__(self, more: Callable[[int], bytes]) -> None:
        self._more, self._left = more, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        self._left = self._left or self._more(len(view))
        found, self._left = self._left[: len(view)], self._left[len(view) :]
        view[: len(found)] = found
        return len(found)


def behind(head: bytes, rest: Readable) -> io.BufferedReader:
    """A stream whose first bytes were read already, from its start."""
    pieces = iter((head,) if head else ())
    return io.BufferedReader(_Pieces(lambda n: next(pieces, None) or rest.read1(n)))


def _recoded(source: Readable, encoding: str, name: str) -> io.BufferedReader:
    """Text of another encoding as UTF-8, without its mark."""
    decoder = codecs.getincrementaldecoder(encoding)()
    begun = False

    def more(n: int) -> bytes:
        nonlocal begun
        while True:
            part = source.read1(n)
            try:
                text = decoder.decode(part, final=not part)
            except UnicodeDecodeError:
                raise InvalidInput(f"{name} begins as {encoding.upper()} text and does not go on as such") from None
            text, begun = text if begun else text.removeprefix("\ufeff"), begun or bool(text)
            if text or not part:
                return text.encode()

    return io.BufferedReader(_Pieces(more))


def _peeked(stream: Readable, n: int) -> tuple[bytes, io.BufferedReader]:
    """The first bytes of a stream, and the stream from its start."""
    head = b""
    while len(head) < n and b"\n" not in head and (part := stream.read1(n - len(head))):
        head += part  # a slow stream may hold one short line for long
    return head, behind(head, stream)


def _encoding(head: bytes) -> str:
    """The encoding that these first bytes are in: by their mark, or by where zeros stand in two ASCII characters."""
    marked = next((name for mark, name in BOMS if head.startswith(mark)), None)
    if marked is not None or len(head) < 4:
        return marked or "utf-8"
    zeros = "".join("0" if byte == 0 else "x" for byte in head[:4])
    known = {"x0x0": "utf-16-le", "0x0x": "utf-16-be", "x000": "utf-32-le", "000x": "utf-32-be"}
    return known.get(zeros, "utf-8")


def _unpacked(raw: io.BufferedReader, packing: str, name: str) -> Readable:
    if packing == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if packing == "bzip2":
        return bz2.BZ2File(raw)
    if packing == "xz":
        return lzma.LZMAFile(raw)
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(
            f"{name} is packed with zstd, and reading that needs an extra: {install_command('zst')}, or unpack the file"
        ) from None
    pieces = _zstd_pieces(raw, cast("Any", zstandard))
    return io.BufferedReader(_Pieces(lambda n: next(pieces, b"")))


def _zstd_pieces(raw: io.BufferedReader, zstandard: Any) -> Iterator[bytes]:
    """The pieces of all frames that are not empty. Raises EOFError where the last frame is cut off."""
    frame: Any = None
    while part := raw.read1(ZSTD_PIECE):
        while part:
            frame = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj() if frame is None else frame
            try:
                found: bytes = frame.decompress(part)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            part = b""
            if frame.eof:
                part, frame = frame.unused_data, None
            if found:
                yield found
    if frame is not None:
        raise EOFError("it ends inside a frame")
