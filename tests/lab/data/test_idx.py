"""IDX files: what is read, and that everything else is refused with a message that names file, expected and found."""

import gzip
import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.lab.data.idx import hash_content, read_idx, read_idx_content

VALUES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
HEADER = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4])
CONTENT = HEADER + VALUES.tobytes()


def write(folder: Path, content: bytes, name: str = "images-idx3-ubyte") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def write_gzip(folder: Path, content: bytes) -> Path:
    return write(folder, gzip.compress(content, mtime=0), "images-idx3-ubyte.gz")


def test_reads_plain_and_compressed_alike(tmp_path: Path) -> None:
    for path in (write(tmp_path, CONTENT), write_gzip(tmp_path, CONTENT)):
        array = read_idx(path)
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, VALUES)
        array[0, 0, 0] = 9  # torch.from_numpy wants memory that can be written


def test_checksum_is_of_the_decompressed_bytes(tmp_path: Path) -> None:
    expected = hashlib.sha256(CONTENT).hexdigest()
    for path in (write(tmp_path, CONTENT), write_gzip(tmp_path, CONTENT)):
        assert read_idx_content(path).sha256 == expected
        assert hash_content(path) == expected


def test_reads_several_gzip_members_and_an_empty_array(tmp_path: Path) -> None:
    members = gzip.compress(CONTENT[:20], mtime=0) + gzip.compress(CONTENT[20:], mtime=0)
    np.testing.assert_array_equal(read_idx(write(tmp_path, members, "a.gz")), VALUES)
    assert read_idx(write(tmp_path, bytes([0, 0, 8, 1, 0, 0, 0, 0]))).shape == (0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first bytes 0000.*empty"),
        (CONTENT[:3], "first bytes 0000.*found first bytes 000008"),
        (b"\1" + CONTENT[1:], "found first bytes 01000803.*not an IDX file"),
        (gzip.compress(CONTENT, mtime=0), r"found first bytes 1f8b.*add \.gz"),
        (b"\0\0\x0d" + CONTENT[3:], r"type 0x08 \(uint8\), found type 0x0d \(float32\)"),
        (b"\0\0\x42" + CONTENT[3:], r"found type 0x42 \(unknown\)"),
        (b"\0\0\x08\0", "1 to 4 dimensions.*found 0"),
        (b"\0\0\x08\xff" + bytes(4 * 255), "1 to 4 dimensions.*found 255"),
        (CONTENT[:9], "header of 16 bytes, found a file of 9"),
        (CONTENT[:-1], "expected 40 bytes.*found 39.*truncated"),
        (CONTENT[:16], "expected 40 bytes.*found 16.*truncated"),
        (CONTENT + b"\0", "expected 40 bytes.*found more"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "at most 1,073,741,824 bytes, found a header"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_refuses_content_that_is_not_one_array(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as plain:
        read_idx(path)
    assert str(path) in str(plain.value)
    if content[:2] != b"\x1f\x8b":
        path = write_gzip(tmp_path, content)
        with pytest.raises(ValueError, match=message) as compressed:
            read_idx(path)
        assert str(path) in str(compressed.value)


@pytest.mark.parametrize("kept", [10, 12, 20, -9, -8, -1])
def test_refuses_a_truncated_gzip_file(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path, gzip.compress(CONTENT, mtime=0)[:kept], "images.gz")
    with pytest.raises(ValueError, match="complete gzip file") as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert hash_content(path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (CONTENT, r"decompressed already: take \.gz off"),
        (b"<html>not found</html>", "expected a gzip file.*found first bytes 3c68"),
        (gzip.compress(CONTENT, mtime=0)[:-5] + b"\xff" + gzip.compress(CONTENT, mtime=0)[-4:], "found damage"),
        (gzip.compress(CONTENT, mtime=0)[:10] + b"\xff" * 20, "found damage"),
        (gzip.compress(CONTENT, mtime=0) + b"trailing", "found damage"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_refuses_what_is_not_a_sound_gzip_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content, "images.gz")
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert hash_content(path) is None


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    header = bytes([0, 0, 8, 1, 0, 0, 0, 5])
    bomb = write(tmp_path, gzip.compress(header + bytes(2**26)), "bomb.gz")
    boast = write_gzip(tmp_path, bytes([0, 0, 8, 1, 0x3F, 0, 0, 0]) + bytes(4))  # 1 GiB promised, 4 bytes there
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected 13 bytes.*found more"):
            read_idx(bomb)
        with pytest.raises(ValueError, match="truncated"):
            read_idx(boast)
        assert hash_content(bomb, maximum_bytes=2**20) is None
        assert hash_content(bomb) is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**24


def test_the_largest_size_is_the_callers_choice(tmp_path: Path) -> None:
    path = write(tmp_path, CONTENT)
    assert read_idx(path, maximum_bytes=40).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="at most 39 bytes"):
        read_idx(path, maximum_bytes=39)
    assert hash_content(path, maximum_bytes=40) is not None
    assert hash_content(path, maximum_bytes=39) is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_idx(tmp_path / "nowhere")


@settings(deadline=None, max_examples=150)
@given(garbage=st.binary(max_size=64), prefix=st.sampled_from([b"", b"\0\0\x08", HEADER, b"\x1f\x8b\x08\0"]))
def test_any_bytes_give_their_array_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, prefix: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = prefix + garbage
    for path in (write(folder, content, "raw"), write(folder, content, "raw.gz"), write_gzip(folder, content)):
        try:
            array = read_idx(path)
        except ValueError as error:
            message = str(error)
        else:
            message = str(path)
            unpacked = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            assert unpacked[4 + 4 * array.ndim :] == array.tobytes()
            assert unpacked[:4] == bytes([0, 0, 8, array.ndim])
        assert str(path) in message


@settings(deadline=None, max_examples=100)
@given(kept=st.integers(0, len(gzip.compress(CONTENT, mtime=0)) - 1))
def test_no_part_of_a_file_is_ever_read_as_a_whole(tmp_path_factory: pytest.TempPathFactory, kept: int) -> None:
    folder = tmp_path_factory.mktemp("part")
    with pytest.raises(ValueError, match="expected"):
        read_idx(write(folder, gzip.compress(CONTENT, mtime=0)[:kept], "part.gz"))
    if kept < len(CONTENT):
        with pytest.raises(ValueError, match="expected"):
            read_idx(write(folder, CONTENT[:kept]))
