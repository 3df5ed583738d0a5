"""Read IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist): two zero bytes, type, rank, sizes, values."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST_CONTENT = 2**30
_CHUNK = 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_LARGEST_RANK = 4
_TYPE_NAMES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


class IdxContent(NamedTuple):
    """What one IDX file holds: its values, and the SHA-256 (hex) of the whole decompressed file."""

    array: NDArray[np.uint8]
    sha256: str


def read_idx(path: str | Path, *, maximum_bytes: int = LARGEST_CONTENT) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, plain or (name ending in `.gz`) compressed.

    Args:
        path: The file.
        maximum_bytes: The largest decompressed size that is accepted, so that a damaged or hostile header cannot
            fill the memory. Never more than the size promised by the header, plus one byte, is decompressed.

    Returns:
        A writable uint8 array of the shape in the file's header, for instance (60000, 28, 28).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not exactly one IDX array of unsigned bytes: wrong magic, type or rank, truncated,
            followed by more bytes, or not the gzip file that its name promises.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        >>> read_idx(path)
        array([7, 2, 1], dtype=uint8)
    """
    return read_idx_content(path, maximum_bytes=maximum_bytes).array


def read_idx_content(path: str | Path, *, maximum_bytes: int = LARGEST_CONTENT) -> IdxContent:
    """Read an IDX file as `read_idx` does, and compute the SHA-256 of its decompressed bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As `read_idx`.
    """
    path = Path(path)
    with _open_content(path) as stream:
        header, shape = _read_header(stream, path)
        size = math.prod(shape)
        expected = len(header) + size
        if expected > maximum_bytes:
            raise ValueError(
                f"{path}: expected an IDX file of at most {maximum_bytes:,} bytes, found a header that promises "
                f"{expected:,} bytes (shape {shape}); this is another file, or a damaged one"
            )
        body = _read_at_most(stream, size + 1)
    if len(body) < size:
        raise ValueError(
            f"{path}: expected {expected:,} bytes for shape {shape}, found {len(header) + len(body):,}; "
            "the file is truncated: get it again"
        )
    if len(body) > size:
        raise ValueError(
            f"{path}: expected {expected:,} bytes for shape {shape}, found more; "
            "bytes follow the end of the array: get the file again"
        )
    checksum = hashlib.sha256(header)
    checksum.update(body)
    return IdxContent(np.frombuffer(body, dtype=np.uint8).reshape(shape), checksum.hexdigest())


def hash_content(path: str | Path, *, maximum_bytes: int = LARGEST_CONTENT) -> str | None:
    """Compute the SHA-256 (hex) of a file's decompressed bytes in constant memory.

    Returns:
        The checksum, or None for a file that cannot be read to its end or is longer than `maximum_bytes`.

    Raises:
        FileNotFoundError: There is no such file.
    """
    checksum = hashlib.sha256()
    remaining = maximum_bytes
    try:
        with _open_content(Path(path)) as stream:
            while chunk := stream.read(min(_CHUNK, remaining + 1)):
                remaining -= len(chunk)
                if remaining < 0:
                    return None
                checksum.update(chunk)
    except ValueError:
        return None
    return checksum.hexdigest()


@contextmanager
def _open_content(path: Path) -> Iterator[BinaryIO]:
    """Open the decompressed bytes of a file; what gzip finds wrong becomes a ValueError that names the file."""
    with path.open("rb") as file:
        if path.suffix != ".gz":
            yield file
            return
        start = file.read(len(_GZIP_MAGIC))
        file.seek(0)
        if start != _GZIP_MAGIC:
            advice = "it may be decompressed already: take .gz off its name" if start == b"\0\0" else "get it again"
            raise ValueError(
                f"{path}: expected a gzip file (first bytes {_GZIP_MAGIC.hex()}), "
                f"found first bytes {start.hex() or 'none, the file is empty'}; {advice}"
            )
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream  # type: ignore[misc]  # GzipFile reads like a BinaryIO but is not declared as one
        except EOFError as error:
            raise ValueError(
                f"{path}: expected a complete gzip file, found one that ends too early; it is truncated: get it again"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected a sound gzip file, found damage ({error}); get it again") from error


def _read_header(stream: BinaryIO, path: Path) -> tuple[bytes, tuple[int, ...]]:
    """Read magic number and sizes; return the header's bytes and the shape."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        advice = "it is compressed: add .gz to its name" if magic[:2] == _GZIP_MAGIC else "this is not an IDX file"
        raise ValueError(
            f"{path}: expected an IDX file (first bytes 0000), "
            f"found first bytes {magic.hex() or 'none, the file is empty'}; {advice}"
        )
    kind, rank = magic[2], magic[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path}: expected IDX values of type 0x08 (uint8), found type 0x{kind:02x} "
            f"({_TYPE_NAMES.get(kind, 'unknown')}); only unsigned bytes can be read"
        )
    if not 1 <= rank <= _LARGEST_RANK:
        raise ValueError(f"{path}: expected 1 to {_LARGEST_RANK} dimensions in the IDX header, found {rank}")
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise ValueError(
            f"{path}: expected an IDX header of {4 + 4 * rank} bytes, found a file of {4 + len(sizes)}; "
            "the file is truncated: get it again"
        )
    return magic + sizes, tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * rank, 4))


def _read_at_most(stream: BinaryIO, limit: int) -> bytearray:
    """Read up to `limit` bytes in chunks: a header's promise alone must not allocate memory."""
    body = bytearray()
    while len(body) < limit and (chunk := stream.read(min(_CHUNK, limit - len(body)))):
        body += chunk
    return body
