"""JSON read a pair at a time: the same as the standard library finds, in bounded memory."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odewei.errors import CorruptCheckpointError
from odewei.loaders.checkpoint_index import read_index
from odewei.loaders.json_pairs import MAX_NAME_NBYTES, JsonText
from odewei.loaders.safetensors_file import read_header

from .conformance import safetensors_bytes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SPACES = st.text(alphabet=" \t\n\r", max_size=3)


def read(text: bytes, most_nbytes: int = 1 << 20) -> dict[str, object]:
    """All of an object."""
    found = JsonText(text)
    pairs = {name: found.value(most_nbytes) for name in found.pairs()}
    found.end()
    return pairs


@settings(max_examples=300, deadline=None, database=None)
@given(expected=st.dictionaries(st.text(max_size=8), VALUES, max_size=4), escaped=st.booleans(), space=SPACES)
def test_finds_what_the_standard_library_finds(expected: dict[str, object], escaped: bool, space: str) -> None:
    """Any object, however it is spelled, comes out as it went in; its strings can be passed over too."""
    text = json.dumps(expected, ensure_ascii=escaped, separators=(f"{space},{space}", f":{space}"))
    raw = f"{space}{text}{space}".encode("utf-8", "surrogatepass")
    assert read(raw) == expected
    flat = JsonText(raw)
    assert {name: flat.flat_object(1 << 20) for name in flat.pairs()} == expected
    if all(isinstance(value, str) for value in expected.values()):
        passed = JsonText(raw)
        passed.skip_texts()
        passed.end()


@settings(max_examples=500, deadline=None, database=None)
@given(
    text=st.dictionaries(st.text(max_size=4), VALUES, max_size=3).map(json.dumps),
    edits=st.lists(st.tuples(st.integers(0, 60), st.sampled_from(' "\\{}[],:0u\x00\x1fé')), min_size=1, max_size=3),
)
def test_accepts_nothing_that_the_standard_library_refuses(text: str, edits: list[tuple[int, str]]) -> None:
    """Whatever is changed in a text: what is read of it, the standard library reads as the same."""
    for at, letter in edits:
        text = text[:at] + letter + text[at + 1 :]
    try:
        found = read(text.encode())
    except ValueError:
        return
    assert json.loads(text) == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a":1}{}', "more after its end"),
        (b'{"a":1,}', "a string is missing"),
        (b'{"a" 1}', "':' is missing"),
        (b'{"a":1 "b":2}', "'}' is missing"),
        (b'{"a":[1', "does not end"),
        (b'{"a":}', "a value is missing"),
        (b'{"a":"\\ud800"}', "UTF-8"),
        (b'{"a":"\x01"}', "broken"),
        (b'{"a":"\\x"}', "broken"),
        (b'{"a":1\x00\x00\x00}', "Extra data|Expecting"),
        (b'{"\xff":1}', "utf-8"),
        (b'{"a":{"b":1,"b":2}}', "'b' occurs twice"),
        (b'{"' + b"n" * MAX_NAME_NBYTES + b'":1}', "a name is longer than"),
        (b'{"a":[' + b"1," * 1000 + b"1]}", "a value is longer than 1000 bytes"),
    ],
)
def test_what_is_not_json_is_a_value_error(text: bytes, problem: str) -> None:
    """Each refusal says what is wrong and where."""
    with pytest.raises(ValueError, match=problem):
        read(text, 1000)


NBYTES = 5_000_000
HOSTILE: dict[str, tuple[bytes, bytes]] = {
    "open lists": (b'{"a":', b"["),
    "lists": (b'{"a":[', b"[],"),
    "pairs": (b'{"__metadata__":{', b'"a":"b",'),
    "escapes": (b'{"__metadata__":{"a":"', b"\\u00e9"),
    "a name": (b'{"', b"ab\\n"),
    "sizes": (b'{"a":{"dtype":"U8","shape":[', b"9999,"),
    "one name": (b"{", b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'),
    "a wide letter": ('{"é😀":['.encode(), b"1,"),
}


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that Python had at most, more than before, in a call that raises CorruptCheckpointError."""
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_hostile_header_takes_no_memory_beside_the_file(what: str, tmp_path: Path) -> None:
    """5 MB of what json.loads would make a hundred of are refused in 8 MiB beside the file; an index in 40."""
    head, unit = HOSTILE[what]
    header = head + unit * ((NBYTES - len(head)) // len(unit))
    (tmp_path / "f").write_bytes(safetensors_bytes(header))
    assert peak_of(lambda: read_header(tmp_path / "f")) < NBYTES + (8 << 20)
    (tmp_path / "i").write_bytes(header)
    assert peak_of(lambda: read_index(tmp_path / "i", tmp_path)) < NBYTES + (40 << 20)
