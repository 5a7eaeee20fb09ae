"""Where the bytes of a remote read go."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odewei.loaders.remote_file import RemoteFile, RemoteStream, cut
from odewei.loaders.remote_path import RemotePath, as_place
from odewei.loaders.remote_transport import Target
from odewei.loaders.retries import TransientError


@given(lengths=st.lists(st.integers(0, 9)), start=st.integers(0, 30), count=st.integers(0, 30))
def test_cut_gives_the_bytes_between(lengths: list[int], start: int, count: int) -> None:
    """Of buffers that follow each other, the same memory that slicing them as one would give."""
    whole = bytearray(range(sum(lengths)))
    buffers, at = [], 0
    for length in lengths:
        buffers.append(memoryview(whole)[at : at + length])
        at += length
    parts = cut(buffers, start, start + count)
    assert b"".join(parts) == whole[start : start + count]
    for part in parts:
        assert len(part)
        part[:] = bytes(len(part))
    assert not any(whole[start : start + count])


@given(lengths=st.lists(st.integers(0, 9)), pieces=st.lists(st.integers(0, 9)))
def test_a_target_is_filled_in_turn(lengths: list[int], pieces: list[int]) -> None:
    """Whatever comes at a time goes where it belongs; more than there is room for is refused whole."""
    buffers = [bytearray(length) for length in lengths]
    target = Target([memoryview(buffer) for buffer in buffers])
    sent = b""
    for number, length in enumerate(pieces):
        piece = bytes([number + 1]) * length
        if len(sent) + length > sum(lengths):
            with pytest.raises(TransientError, match="more bytes"):
                target.put(piece)
            continue
        target.put(piece)
        sent += piece
    assert b"".join(buffers)[: len(sent)] == sent
    assert not any(b"".join(buffers)[len(sent) :])
    assert (target.done, target.left) == (len(sent), sum(lengths) - len(sent))


def test_a_target_may_begin_anew() -> None:
    """A server that only sends whole files starts from the front again; after closing there is no front."""
    buffer = bytearray(4)
    target = Target([memoryview(buffer)[:1], memoryview(buffer)[1:]])
    target.put(b"xyz")
    target.rewind()
    assert (target.done, target.left) == (0, 4)
    target.put(b"abcd")
    assert (buffer, target.left) == (b"abcd", 0)
    target.close()
    target.rewind()
    with pytest.raises(TransientError):
        target.put(b"x")
    assert buffer == b"abcd"


def test_nothing_is_written_after_closing() -> None:
    """Whoever gave the memory may use it for something else then, and bytes that come late do no harm."""
    buffer = bytearray(4)
    target = Target([memoryview(buffer)])
    target.put(b"ab")
    target.close()
    with pytest.raises(TransientError):
        target.put(b"c")
    assert buffer == b"ab\0\0"


class Fake(RemoteFile):
    """Ten bytes, and a note of what was asked for."""

    asked: list[tuple[int, int]]

    def fetch(self, buffers: list[memoryview], offset: int, needed: int) -> None:  # type: ignore[override]
        self.asked.append((offset, needed))
        buffers[0][:needed] = bytes(range(offset, offset + needed))


def fake() -> Fake:
    path = as_place("memory://x")
    assert isinstance(path, RemotePath)
    file = Fake(path, 10, 0, 0)
    object.__setattr__(file, "asked", [])
    return file


def test_a_stream_is_one_of_bytes() -> None:
    """It seeks and reads as a file does, up to its end and not before its start."""
    stream = RemoteStream(fake())
    assert stream.readable()
    assert stream.seekable()
    assert stream.read(3) == b"\0\1\2"
    assert (stream.seek(-2, io.SEEK_END), stream.read(5), stream.read(5)) == (8, b"\x08\x09", b"")
    assert (stream.seek(20), stream.read(1), stream.read()) == (20, b"", b"")
    assert (stream.seek(4), stream.seek(1, io.SEEK_CUR), stream.read(1)) == (4, 5, b"\5")
    with pytest.raises(ValueError, match="before the file"):
        stream.seek(-1)


def test_all_that_remains_is_one_request() -> None:
    """A server without ranges gives a whole file, and nothing else."""
    file = fake()
    assert io.BufferedReader(RemoteStream(file), 4).read() == bytes(range(10))
    assert file.asked == [(0, 10)]


@pytest.mark.parametrize(
    ("url", "name", "parent", "below"),
    [
        ("https://h/a/m.bin", "m.bin", "https://h/a", "https://h/a/m.bin/x%20y"),
        ("HTTPS://h/a%20b/?k=1", "a b", "https://h?k=1", "https://h/a%20b/x%20y?k=1"),
        ("s3://bucket/a/m.bin", "m.bin", "s3://bucket/a", "s3://bucket/a/m.bin/x y"),
        ("s3://bucket", "bucket", "s3://", "s3://bucket/x y"),
    ],
)
def test_parts_of_a_url(url: str, name: str, parent: str, below: str) -> None:
    """Names are those of files, and folders keep the query."""
    path = as_place(url)
    assert isinstance(path, RemotePath)
    assert (path.name, path.parent.url, (path / "x y").url) == (name, parent, below)
    assert (path.parent.remote, path == as_place(url)) == (path.remote, True)
