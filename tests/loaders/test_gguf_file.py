"""GGUF files: the suite over plain tensors, hostile headers (trap 33), and agreement with the package ``gguf``."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders import GgufLoader, WeightInfo, gguf_stored, open_checkpoint
from odewei.loaders.gguf_file import PLAIN, QUANTISED

from .conformance import LoaderConformance, assert_same, bits, random_tensor, read_bytes

Entry = tuple[str, tuple[int, ...], int, bytes]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_bytes(entries: list[Entry], metadata: tuple[bytes, ...] = (), *, alignment: int = 32) -> bytes:
    """A file of these tensors: name, shape as torch has it, type, data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)) + b"".join(metadata)
    data = b""
    for name, shape, kind, content in entries:
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % alignment)
    return header + bytes(-len(header) % alignment) + data


DTYPES = {str(dtype): dtype for dtype in PLAIN.values()}
METADATA = (
    text("general.name") + struct.pack("<I", 8) + text("a model"),
    text("x.f") + struct.pack("<If", 6, 1.5),
    text("x.numbers") + struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3),
    text("x.texts") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
    text("x.nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ2B", 0, 2, 1, 2),
)


class TestGgufLoader(LoaderConformance):
    """The suite over tensors that are not quantised."""

    dtypes = DTYPES

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> GgufLoader:
        kinds = {dtype: kind for kind, dtype in PLAIN.items()}
        entries = [(name, tuple(t.shape), kinds[t.dtype], bits(t)) for name, t in tensors.items()]
        (folder / "model.gguf").write_bytes(gguf_bytes(entries, METADATA))
        return GgufLoader(folder / "model.gguf", **options)


@pytest.mark.parametrize("kind", sorted(QUANTISED))
def test_quantised_tensors_are_dequantised_as_by_the_package(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random blocks come the bits that the package gives for all of them at once, whatever the piece."""
    gguf = pytest.importorskip("gguf")
    name, block, nbytes = QUANTISED[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (block, nbytes)
    assert gguf.GGMLQuantizationType[name].value == kind
    blocks = np.random.default_rng(kind).integers(0, 256, (6 * 3, nbytes), np.uint8)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([("w", (6, 3 * block), kind, blocks.tobytes())]))
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks.reshape(6, -1), gguf.GGMLQuantizationType[name])
    for piece in (nbytes, 4 * nbytes + 1, 1 << 18):
        monkeypatch.setattr(gguf_stored, "_PIECE_NBYTES", piece)
        loader = open_checkpoint(path)
        assert loader.weights()["w"].span is None
        assert_same(loader("module", ["w"])["w"], torch.from_numpy(expected))
    cast = GgufLoader(path, dtype=torch.float16)("module", ["w"])["w"]
    assert_same(cast, torch.from_numpy(expected).half())


def test_files_of_the_package_are_read(tmp_path: Path) -> None:
    """What gguf.GGUFWriter writes is found with its names, shapes and values; its reader finds the same in ours."""
    gguf = pytest.importorskip("gguf")
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.arange(64, dtype=np.float16).reshape(2, 32)}
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    quantised = gguf.quantize(np.ones((3, 64), np.float32), q8_0)
    writer.add_tensor("q", quantised, raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path)("module", ["a", "b", "q"])
    for name, array in tensors.items():
        assert_same(found[name], torch.from_numpy(array))
    assert_same(found["q"], torch.from_numpy(gguf.dequantize(quantised, q8_0)))
    (tmp_path / "o.gguf").write_bytes(gguf_bytes([("a", (2, 3), 0, tensors["a"].tobytes())]))
    (read,) = gguf.GGUFReader(tmp_path / "o.gguf").tensors
    assert (read.name, read.data.tolist()) == ("a", tensors["a"].tolist())


def test_without_the_package_quantised_files_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes with the headers; plain tensors need no package."""
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([("w", (32,), 8, bytes(34))]))
    with pytest.raises(CheckpointError, match=r"gguf is not installed.*odewei\[gguf\]"):
        GgufLoader(path).weights()
    path.write_bytes(gguf_bytes([("w", (1,), 0, bytes(4))]))
    assert GgufLoader(path).weights().keys() == {"w"}


@pytest.mark.parametrize(("kind", "name"), [(16, "IQ2_XXS"), (9, "Q8_1"), (4, "number 4"), (99, "number 99")])
def test_other_quantisations_are_refused_by_name(kind: int, name: str, tmp_path: Path) -> None:
    """The error names type, weight, file and what is read, and does not call the file corrupt."""
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([("fine", (1,), 0, bytes(4)), ("w", (256,), kind, bytes(999))]))
    with pytest.raises(CheckpointError, match=rf"type {name}; odewei does not.*'w'.*Q4_K") as caught:
        GgufLoader(tmp_path / "m.gguf").weights()
    assert not isinstance(caught.value, CorruptCheckpointError)


ONE = [("w", (2,), 0, b"12345678")]
ALIGNMENT = text("general.alignment") + struct.pack("<II", 4, 64)
CORRUPT = {
    "empty": (b"", "no GGUF file"),
    "magic": (b"GGML" + gguf_bytes(ONE)[4:], "no GGUF file"),
    "cut": (gguf_bytes(ONE)[:40], "truncated"),
    "cut in the magic": (b"GGUF\3", "truncated"),
    "cut data": (gguf_bytes([("w", (9,), 0, bytes(36))])[:-40], "it is truncated.*'w'"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "claims 1152921504606846976 tensors"),
    "much metadata": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "entries of metadata"),
    "long name": (gguf_bytes(ONE).replace(text("w"), struct.pack("<Q", 2**40) + b"w"), "name of 1099511627776"),
    "long text": (gguf_bytes(ONE, (text("k") + struct.pack("<IQ", 8, 2**60),)), "truncated"),
    "long array": (gguf_bytes(ONE, (text("k") + struct.pack("<IIQ", 9, 4, 2**60),)), "truncated"),
    "deep array": (gguf_bytes(ONE, (text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,)), "nested"),
    "odd kind": (gguf_bytes(ONE, (text("k") + struct.pack("<I", 77),)), "kind 77"),
    "alignment": (gguf_bytes(ONE, (ALIGNMENT[:-4] + struct.pack("<I", 3),)), "alignment is 3"),
    "no text": (gguf_bytes(ONE).replace(text("w"), text("w")[:-1] + b"\xff"), "no text"),
    "dimensions": (gguf_bytes([("w", (1,) * 9, 0, bytes(4))]), "9 dimensions"),
    "overflow": (gguf_bytes([("w", (2**40, 2**40), 0, b"")]), "more elements"),
    "exabytes": (gguf_bytes([("w", (2**55,), 0, b"")]), "it is truncated"),
    "same name": (gguf_bytes(ONE * 2), "same name"),
    "odd offset": (gguf_bytes([("a", (1,), 0, bytes(4)), ("w", (1,), 0, bytes(4))], alignment=4), "multiple of 32"),
    "half a block": (gguf_bytes([("w", (2, 48), 8, bytes(102))]), "no whole blocks"),
}


@pytest.mark.parametrize("case", sorted(CORRUPT))
def test_a_file_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    """The refusal says what is wrong, names the file, and has a cure."""
    content, problem = CORRUPT[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=problem) as caught:
        GgufLoader(tmp_path / "m.gguf").weights()
    assert caught.value.file == str(tmp_path / "m.gguf")
    assert caught.value.cure


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (gguf_bytes(ONE, (text("split.count") + struct.pack("<IH", 2, 3),)), "one of 3 files.*merge"),
    ],
)
def test_what_is_whole_but_not_read_is_said(content: bytes, problem: str, tmp_path: Path) -> None:
    """Other versions and byte orders, and parts of a split checkpoint, are refused with what to do."""
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        GgufLoader(tmp_path / "m.gguf").weights()
    assert not isinstance(caught.value, CorruptCheckpointError)


def test_the_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    """Data begin at a multiple of what the metadata say."""
    tensors = [(name, (3,), 0, bits(random_tensor(torch.float32, (3,), seed))) for seed, name in enumerate("ab")]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(tensors, (ALIGNMENT,), alignment=64))
    loader = GgufLoader(tmp_path / "m.gguf")
    for name, _, _, content in tensors:
        assert read_bytes(loader, loader.weights()[name]) == content


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutilated_files_are_refused_or_read_within_the_file(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    """Whatever bytes are changed: a CheckpointError with file and cure, or weights whose bytes lie within the file."""
    content = bytearray(gguf_bytes([*ONE, ("v", (2, 2), 1, b"12345678")], METADATA))
    for at, byte in edits:
        content[at % len(content)] = byte
    (tmp_path / "m.gguf").write_bytes(content)
    refused = None
    infos: list[WeightInfo] = []
    try:
        infos = list(GgufLoader(tmp_path / "m.gguf").weights().values())
    except CheckpointError as error:
        refused = error
    assert refused is None or (refused.file and refused.cure)
    for info in infos:
        assert info.span is not None
        assert 0 < info.span.offset <= info.span.offset + info.span.nbytes <= len(content)


def heads(architecture: str, **counts: object) -> tuple[bytes, ...]:
    """Metadata: the architecture, and numbers of heads, one or one a layer."""
    found = [text("general.architecture") + struct.pack("<I", 8) + text(architecture)]
    for key, count in counts.items():
        name = text(f"{architecture}.attention.{key}")
        if isinstance(count, tuple):
            found.append(name + struct.pack(f"<IIQ{len(count)}I", 9, 4, len(count), *count))
        else:
            found.append(name + struct.pack("<II", 4, count))
    return tuple(found)


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What the conversion of llama.cpp does to queries and keys."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def entry(name: str, tensor: torch.Tensor) -> Entry:
    kinds = {dtype: kind for kind, dtype in PLAIN.items()}
    return name, tuple(tensor.shape), kinds[tensor.dtype], bits(tensor)


@pytest.mark.parametrize("piece", [1, 100, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "granite", "qwen2", "llama4"])
def test_rows_are_put_back_where_the_conversion_has_turned_them(
    architecture: str, dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and their biases, by their heads; nothing else, no other architecture, and not if unwanted."""
    monkeypatch.setattr(gguf_stored, "_PIECE_NBYTES", piece)
    names = [f"blk.{n}.attn_{what}" for n in (0, 11) for what in ("q.weight", "k.weight", "v.weight", "q.bias")]
    names += ["attn_q.weight", "blk.0.attn_q_norm.weight", "v.blk.0.attn_q.weight"]
    tensors = {
        name: random_tensor(dtype, (24,) if name.endswith("bias") else (24, 5), seed) for seed, name in enumerate(names)
    }
    turned = {name: tensor for name, tensor in tensors.items() if name.startswith("blk") and name[-8:-7] != "v"}
    turned = (
        {name: turned[name] for name in turned if "norm" not in name} if architecture in ("llama", "granite") else {}
    )
    in_file = {
        name: interleaved(tensor, 2 if "attn_k" in name else 6) if name in turned else tensor
        for name, tensor in tensors.items()
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(
        gguf_bytes([entry(*item) for item in in_file.items()], heads(architecture, head_count=6, head_count_kv=2))
    )
    loader = open_checkpoint(path)
    for name, found in loader("module", names).items():
        assert_same(found, tensors[name])
        assert (loader.weights()[name].span is None) == (name in turned)
    for name, found in GgufLoader(path, turn_rows=False)("module", names).items():
        assert_same(found, in_file[name])


def test_heads_may_differ_between_layers(tmp_path: Path) -> None:
    """An array has a number for each layer; keys have as many heads as queries where nothing else is said."""
    tensors = {
        f"blk.{n}.attn_{what}.weight": random_tensor(torch.float32, (24, 2), n) for n in range(3) for what in "qk"
    }
    counts = (6, 2, 3)
    entries = [entry(name, interleaved(tensor, counts[int(name[4])])) for name, tensor in tensors.items()]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(entries, heads("granitehybrid", head_count=counts)))
    for name, found in GgufLoader(path)("module", list(tensors)).items():
        assert_same(found, tensors[name])


@pytest.mark.parametrize("piece", [1, 1 << 18])
def test_quantised_rows_are_put_back_too(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row with its blocks."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(gguf_stored, "_PIECE_NBYTES", piece)
    blocks = np.random.default_rng(0).integers(0, 120, (12, 2 * 34), np.uint8)
    expected = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    in_file = interleaved(torch.from_numpy(blocks), 3).numpy().tobytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([("blk.0.attn_k.weight", (12, 64), 8, in_file)], heads("llama", head_count=3)))
    assert_same(GgufLoader(path)("module", ["blk.0.attn_k.weight"])["blk.0.attn_k.weight"], expected)


UNTOLD = {
    "no heads": heads("llama"),
    "no heads at all": heads("llama", head_count=0),
    "too many heads": heads("llama", head_count=5),
    "odd heads": heads("llama", head_count=8),
    "too few layers": heads("llama", head_count=(2, 2)),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_rows_that_cannot_be_put_back_are_refused(case: str, tmp_path: Path) -> None:
    """Rather than handed out in an order that nobody knows; the error says how to have them all the same."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([entry("blk.7.attn_q.weight", torch.ones(24, 2))], UNTOLD[case]))
    with pytest.raises(CorruptCheckpointError, match=r"order of the tensor's rows.*blk\.7.*turn_rows=False"):
        GgufLoader(path).weights()
    assert GgufLoader(path, turn_rows=False).weights().keys() == {"blk.7.attn_q.weight"}


@pytest.mark.parametrize(("architecture", "warns"), [("internlm2", True), ("llama", False), ("qwen2", False)])
def test_rows_in_an_order_of_their_own_are_warned_of(
    architecture: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the conversion to GGUF has turned rows another way, results would be wrong in silence."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([entry("blk.0.attn_q.weight", torch.ones(4, 2))], heads(architecture, head_count=2)))
    GgufLoader(path).weights()
    assert ("attn_q and attn_k" in caplog.text) == warns


def test_metadata_about_heads_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """A million layers, and texts for numbers."""
    key = text("llama.attention.head_count")
    for values in (struct.pack("<IIQ", 9, 4, 1_000_000), struct.pack("<IIQ", 9, 8, 1) + text("x")):
        (tmp_path / "m.gguf").write_bytes(gguf_bytes(ONE, (key + values,)))
        with pytest.raises(CorruptCheckpointError, match="heads of attention"):
            GgufLoader(tmp_path / "m.gguf").weights()


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """A small file cannot have weights of any size by having many of them in one place."""
    place = struct.pack("<I2Q", 1, 32, 0)[:12] + struct.pack("<IQ", 0, 0)
    tensors = b"".join(struct.pack("<Q", 1) + name + place for name in (b"a", b"b"))
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + tensors
    (tmp_path / "m.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(128))
    with pytest.raises(CorruptCheckpointError, match=r"overlaps 'a'.*'b'"):
        GgufLoader(tmp_path / "m.gguf").weights()


def test_metadata_with_a_name_twice_are_refused(tmp_path: Path) -> None:
    """Which of two alignments counts is nobody's guess; llama.cpp refuses them too."""
    entry = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 32)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry * 2 + bytes(32))
    with pytest.raises(CorruptCheckpointError, match=r"'general\.alignment' twice"):
        GgufLoader(tmp_path / "m.gguf").weights()
