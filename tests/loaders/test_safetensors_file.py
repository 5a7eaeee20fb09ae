"""safetensors files: the suite, hostile headers (trap 33), and agreement with the reference implementation."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from odewei.loaders import SafetensorsLoader, WeightInfo
from odewei.loaders.safetensors_file import read_header
from odewei.loaders.tensors import DTYPES

from .conformance import LoaderConformance, assert_same, random_tensor, read_bytes, safetensors_bytes


class TestSafetensorsLoader(LoaderConformance):
    """The suite."""

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> SafetensorsLoader:
        path = folder / "model.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
        return SafetensorsLoader(path, **options)


def entry(dtype: object = "F32", shape: object = (1,), begin: object = 0, end: object = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(**changes: object) -> bytes:
    """A file with one four-byte tensor ``a``, its entry changed."""
    return safetensors_bytes({"a": {**entry(), **changes}}, b"1234")


TWICE = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'

CORRUPT = {
    "empty file": (b"", "truncated.*at least 8 bytes, it has 0"),
    "seven bytes": (b"\0" * 7, "truncated.*it has 7"),
    "no header": (b"\0" * 8, "begin with"),
    "truncated header": (one()[:30], "truncated within its header: expected [0-9]+ bytes or more, it has 30"),
    "truncated data": (one()[:-1], "truncated: expected [0-9]+ bytes, it has [0-9]+"),
    "longer than its tensors": (one() + b"x", "its tensors end at"),
    "lying length, huge": (safetensors_bytes({"a": entry()}, b"1234", length=2**63), "claims 9223372036854775808"),
    "lying length, maximal": (safetensors_bytes({}, length=2**64 - 1), "claims 18446744073709551615"),
    "lying length, just too large": (safetensors_bytes({}, length=100_000_001), "allows 100000000"),
    "lying length, allowed": (safetensors_bytes({}, length=100_000_000), "truncated within its header"),
    "lying length, short": (safetensors_bytes({"a": entry()}, b"1234", length=10), "JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff":1}'), "UTF-8"),
    "half a surrogate pair": (safetensors_bytes('{"\\ud800":' + json.dumps(entry()) + "}", b"1234"), "UTF-8"),
    "half a surrogate pair in metadata": (safetensors_bytes('{"__metadata__":{"a":"\\udc00"}}'), "UTF-8"),
    "not JSON": (safetensors_bytes("{nonsense}"), "JSON"),
    "JSON twice": (safetensors_bytes("{}{}"), "JSON"),
    "byte order mark": (safetensors_bytes(b"\xef\xbb\xbf{}"), "begin with"),
    "blanks before it": (safetensors_bytes(" {}"), "begin with"),
    "an array": (safetensors_bytes("[]"), "begin with"),
    "zeros after it": (safetensors_bytes("{}\0\0"), "JSON"),
    "nested without end": (safetensors_bytes('{"a":' * 100_000), "JSON"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (safetensors_bytes({"__metadata__": []}), "__metadata__"),
    "name twice": (safetensors_bytes(f"{{{TWICE},{TWICE}}}", b"1"), "'a' occurs twice"),
    "key twice": (safetensors_bytes('{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' occurs twice"),
    "unknown dtype": (one(dtype="F33"), "F33"),
    "dtype a number": (one(dtype=32), "32"),
    "no dtype": (safetensors_bytes({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "described by"),
    "more than the format has": (one(stride=[1]), "described by"),
    "entry a number": (safetensors_bytes({"a": 1}), "described by 1"),
    "shape a number": (one(shape=1), "shape is 1"),
    "negative size": (one(shape=[-1]), "shape is"),
    "minus zero": (safetensors_bytes('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "shape is"),
    "fractional size": (one(shape=[1.0]), "shape is"),
    "true for a size": (one(shape=[True]), "shape is"),
    "NaN for a size": (one(shape=[float("nan")]), "shape is"),
    "shape of text": (one(shape=["1"]), "shape is"),
    "size beyond 64 bits": (one(shape=[2**64]), "shape is"),
    "size of a million digits": (safetensors_bytes('{"a":{"shape":[' + "9" * 1_000_000 + "]}}"), "longer than"),
    "product overflows": (one(shape=[2**32, 2**32]), "more elements than can be counted"),
    "product overflows to the right size": (one(shape=[2**62, 4, 1]), "more elements than can be counted"),
    "bytes overflow": (one(shape=[2**62]), "more elements than can be counted"),
    "overflow after a zero": (one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "more elements"),
    "overflow hidden by a zero": (one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "more elements"),
    "fewer bytes than the shape": (one(shape=[2]), "takes 8 bytes, but its data_offsets hold 4"),
    "offsets backwards": (one(data_offsets=[4, 0]), "data_offsets is"),
    "offsets negative": (one(data_offsets=[-4, 0]), "data_offsets is"),
    "one offset": (one(data_offsets=[4]), "data_offsets is"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "data_offsets is"),
    "offsets null": (one(data_offsets=None), "data_offsets is None"),
    "gap at the beginning": (
        safetensors_bytes({"a": entry(begin=4, end=8)}, b"12345678"),
        "gap of 4 bytes after the h",
    ),
    "gap between": (
        safetensors_bytes({"a": entry(), "b": entry(begin=5, end=9)}, b"123456789"),
        "gap of 1 bytes after 'a'.*'b'",
    ),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry(begin=2, end=6)}, b"123456"), "overlaps 'a'.*'b'"),
    "two tensors in one place": (safetensors_bytes({"a": entry(), "b": entry()}, b"1234"), "overlaps"),
    "out of the file": (safetensors_bytes({"a": entry(shape=[2**40], end=2**42)}, b"1234"), "truncated: expected 4398"),
}


@pytest.mark.parametrize("case", sorted(CORRUPT))
def test_a_file_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    """The refusal says what is wrong, names the file, and has a cure; the reference is no stricter."""
    content, problem = CORRUPT[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=rf"(?s){problem}") as caught:
        SafetensorsLoader(path).weights()
    assert caught.value.file == str(path)
    assert "ownload the file again" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_lengths_are_believed_only_as_far_as_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claimed header of 100 MB in a file of 10 bytes is refused before anything of that size is read."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(safetensors_bytes({}, length=100_000_000))
    asked: list[int] = []

    class Watched:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def fileno(self) -> int:
            return int(self.stream.fileno())

        def read(self, count: int) -> bytes:
            asked.append(count)
            return bytes(self.stream.read(count))

    monkeypatch.setattr("builtins.open", lambda path, mode: Watched(os.fdopen(os.open(path, os.O_RDONLY), mode)))
    with pytest.raises(CorruptCheckpointError):
        read_header(path)
    assert asked == [8]


def test_dtypes_that_cannot_be_read_name_the_weight(tmp_path: Path) -> None:
    """A sub-byte dtype is refused with weight, file and dtype, as unsupported and not as corrupt."""
    path = tmp_path / "f6.safetensors"
    path.write_bytes(safetensors_bytes({"fine": entry(), "packed": entry("F6_E2M3", [4], 4, 7)}, b"1234567"))
    with pytest.raises(CheckpointError, match="F6_E2M3") as caught:
        read_header(path)
    assert (caught.value.weight, caught.value.file) == ("packed", str(path))
    assert not isinstance(caught.value, CorruptCheckpointError)


def test_two_elements_in_a_byte_are_read_as_torch_has_them(tmp_path: Path) -> None:
    """F4 comes out with the dtype and shape in which the reference reads it, and saves it."""
    path = tmp_path / "f4.safetensors"
    expected = {f"w{i}": random_tensor(DTYPES["F4"], shape, i) for i, shape in enumerate([(6,), (2, 3), (4, 1), (0,)])}
    save_file(expected, path)
    with safetensors.safe_open(path, "pt") as reference:
        for name, found in SafetensorsLoader(path)("module", list(expected)).items():
            assert_same(found, expected[name])
            assert_same(found, reference.get_tensor(name))


@pytest.mark.parametrize(("shape", "nbytes"), [((3,), 2), ((3,), 1), ((), 1), ((), 0), ((2, 3), 2)])
def test_half_bytes_at_the_end_are_corrupt(shape: tuple[int, ...], nbytes: int, tmp_path: Path) -> None:
    """An F4 tensor of no whole number of bytes, or of another number, is refused as by the reference."""
    content = safetensors_bytes({"a": entry("F4", shape, 0, nbytes)}, bytes(nbytes))
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="takes"):
        read_header(tmp_path / "f")
    assert accepted_by_reference(content) is None


def test_rows_that_end_within_a_byte_are_refused(tmp_path: Path) -> None:
    """What the format allows and no tensor can be is unsupported, not corrupt."""
    (tmp_path / "f").write_bytes(safetensors_bytes({"a": entry("F4", (2, 3), 0, 3)}, b"123"))
    with pytest.raises(CheckpointError, match=r"within a byte.*'a'.*U8") as caught:
        read_header(tmp_path / "f")
    assert not isinstance(caught.value, CorruptCheckpointError)


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    """Null or no metadata, odd names, spaces after the header, any order of entries, unaligned data: all fine."""
    header = json.dumps(
        {
            "__metadata__": None,
            "": entry(begin=1, end=5),
            "a/../b\n": entry("U8", [1], 0, 1),
            "é😀": entry("U8", [0], 5, 5),
        }
    )
    path = tmp_path / "odd.safetensors"
    path.write_bytes(safetensors_bytes(header + " \n", b"x1234"))
    loader = SafetensorsLoader(path)
    assert list(loader.weights()) == ["a/../b\n", "", "é😀"]
    assert read_bytes(loader, loader.weights()[""]) == b"1234"


def test_a_missing_file_is_said_at_once(tmp_path: Path) -> None:
    """The constructor refuses a path where nothing is."""
    with pytest.raises(CheckpointNotFoundError, match=r"no\.safetensors"):
        SafetensorsLoader(tmp_path / "no.safetensors")


def test_weights_beyond_four_gigabytes_are_read(tmp_path: Path) -> None:
    """Offsets and lengths of more than 32 bits work (trap 29); the file here is sparse."""
    big = 5 * 2**30
    path = tmp_path / "big.safetensors"
    header = {"big": entry("U8", [5, 2**30], 0, big), "after": entry(begin=big, end=big + 4)}
    content = safetensors_bytes(header)
    path.write_bytes(content)
    with open(path, "r+b") as stream:
        stream.seek(len(content) + big)
        stream.write(b"1234")
    loader = SafetensorsLoader(path)
    assert loader.weights()["big"].nbytes == big
    assert read_bytes(loader, loader.weights()["after"]) == b"1234"


def test_a_hundred_thousand_tiny_tensors(tmp_path: Path) -> None:
    """Many small weights are found, each in its place (trap 29)."""
    count = 100_000
    header = {f"layer.{i}.scale": entry("I16", [], 2 * i, 2 * i + 2) for i in range(count)}
    path = tmp_path / "many.safetensors"
    path.write_bytes(safetensors_bytes(header, b"".join((i % 2**15).to_bytes(2, "little") for i in range(count))))
    loader = SafetensorsLoader(path)
    assert len(loader.weights()) == count
    assert loader("module", ["layer.31999.scale"])["layer.31999.scale"].item() == 31999


def accepted_by_reference(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the reference implementation finds in a file, or None if it refuses it."""
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


def accepted_by_us(path: Path, content: bytes) -> dict[str, WeightInfo] | None:
    path.write_bytes(content)
    try:
        return read_header(path)
    except CheckpointError:
        return None


def assert_never_laxer(path: Path, content: bytes) -> bool:
    """What we accept, the reference accepts and finds the same in. Returns whether both agree."""
    ours, reference = accepted_by_us(path, content), accepted_by_reference(content)
    if ours is not None:
        assert reference is not None
        assert ours.keys() == reference.keys()
        for name, (dtype, shape, data) in reference.items():
            info = ours[name]
            assert info.span is not None
            pairs = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
            assert (info.dtype, info.shape) == (DTYPES[dtype], pairs)
            assert content[info.span.offset : info.span.offset + info.span.nbytes] == data
    return (ours is None) == (reference is None)


SETTINGS = settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A right header and the length of its data."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    begin = 0
    for name in draw(
        st.lists(st.text(max_size=4).filter(lambda name: name != "__metadata__"), max_size=4, unique=True)
    ):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), min_size=dtype == "F4", max_size=3))
        end = begin + ITEMSIZES[dtype]
        for size in shape:
            end = begin + (end - begin) * size
        if dtype == "F4":
            shape[-1] *= 2
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    keys = draw(st.permutations(sorted(header)))
    return {key: header[key] for key in keys}, begin


NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**40]),
    st.sampled_from([1.0, 0.0, -0.0, 1e300, True, False, None, "1", [], {}]),
)
MUTATIONS = st.one_of(
    st.tuples(st.just("shape"), st.lists(NUMBERS, max_size=3)),
    st.tuples(st.just("data_offsets"), st.lists(NUMBERS, min_size=1, max_size=3)),
    st.tuples(st.just("dtype"), st.one_of(st.sampled_from([*sorted(DTYPES), "F128", "f32", ""]), NUMBERS)),
    st.tuples(st.sampled_from(["shape", "data_offsets", "dtype"]), NUMBERS),
)


@SETTINGS
@given(made=headers(), data=st.randoms(use_true_random=False))
def test_right_files_are_accepted(tmp_path: Path, made: tuple[dict[str, Any], int], data: Any) -> None:
    """Every file that follows the format is accepted, and the same is found in it as by the reference."""
    header, nbytes = made
    content = safetensors_bytes(header, data.randbytes(nbytes))
    assert accepted_by_us(tmp_path / "f", content) is not None
    assert assert_never_laxer(tmp_path / "f", content)


@SETTINGS
@given(made=headers(), mutation=MUTATIONS, which=st.integers(0, 3), extra=st.sampled_from([0, 0, 0, 1, -1]))
def test_wrong_values_are_judged_as_by_the_reference(
    tmp_path: Path, made: tuple[dict[str, Any], int], mutation: tuple[str, Any], which: int, extra: int
) -> None:
    """A header with one wrong value is accepted when the reference does, except sizes that torch cannot hold."""
    header, nbytes = copy.deepcopy(made)
    names = [name for name in header if name != "__metadata__"]
    if names:
        header[names[which % len(names)]][mutation[0]] = mutation[1]
    content = safetensors_bytes(header, b"\0" * max(nbytes + extra, 0))
    agree = assert_never_laxer(tmp_path / "f", content)
    half = any(entry["dtype"] == "F4" for name, entry in header.items() if name in names)  # which torch cannot hold
    assert agree or half or any(isinstance(size, int) and size >= 2**31 for size in mutation[1])


@SETTINGS
@given(
    made=headers(),
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, 255)),
        min_size=1,
        max_size=3,
    ),
    repair_length=st.booleans(),
)
@example(made=({}, 0), edits=[(8, "insert", 0x20)], repair_length=True)
def test_mutilated_files_are_never_judged_laxer(
    tmp_path: Path, made: tuple[dict[str, Any], int], edits: list[tuple[int, str, int]], repair_length: bool
) -> None:
    """Whatever bytes are changed: what the reference refuses is refused."""
    header, nbytes = made
    content = bytearray(safetensors_bytes(header, b"\0" * nbytes))
    for at, what, byte in edits:
        at %= len(content) + 1
        if what == "set":
            content[at : at + 1] = bytes([byte])
        elif what == "insert":
            content[at:at] = bytes([byte])
        elif what == "delete":
            del content[at : at + 1]
        else:
            del content[max(at, 8) :]
        if not content:
            break
    if repair_length and len(content) >= 8:
        content[:8] = max(len(content) - 8 - nbytes, 0).to_bytes(8, "little")
    assert_never_laxer(tmp_path / "f", bytes(content))


def test_agrees_with_the_reference_on_a_real_file(tmp_path: Path) -> None:
    """Tensors read here are those that the reference reads, name for name."""
    tensors = {f"w{i}": random_tensor(dtype, (3, i)) for i, dtype in enumerate(DTYPES.values())}
    save_file(tensors, tmp_path / "f.safetensors")
    loader = SafetensorsLoader(tmp_path / "f.safetensors")
    with safetensors.safe_open(tmp_path / "f.safetensors", "pt") as reference:
        assert set(reference.keys()) == loader.weights().keys()
        for name, found in loader("module", list(tensors)).items():
            assert_same(found, reference.get_tensor(name))
