"""Hostile safetensors files, indexes and lists of sums: what is wrong with them is in their text."""

import json
import random
import struct
from typing import Any

from odewei.loaders.tensors import DTYPES

from .case import NUMBERS, Case, damage, hostile_name, pick, value_of_another_kind

__all__ = ["index_case", "right_safetensors", "safetensors_case", "shards_case", "sums_case"]

DTYPE_NAMES = (*sorted(DTYPES), "F6_E2M3", "F6_E3M2", "F128", "f32", "", "U8 ")
RAW = (
    *(b"[", b'{"a":', b"[[],{}", b'{"a":1}', b"null", b"true", b"-1", b"1e999", b"NaN", b'"', b'"\\ud800"', b"\xff"),
    *(
        b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',
        b'{"dtype":"U8","dtype":"U8"}',
        b'"\\u0000"',
        b"\xef\xbb\xbf",
    ),
)


def right_safetensors(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A right header, and how many bytes its data have."""
    header: dict[str, Any] = {}
    if rng.random() < 0.4:
        header["__metadata__"] = {hostile_text(rng): hostile_text(rng) for _ in range(rng.randrange(3))}
    begin = 0
    for _ in range(rng.choices((0, 1, 2, 3, 6), (1, 4, 4, 3, 1))[0]):
        dtype = rng.choice(sorted(DTYPES))
        shape = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
        if dtype == "F4":
            shape = [*shape, rng.choice((2, 4, 6))]
        nbytes = DTYPES[dtype].itemsize
        for size in shape:
            nbytes *= size
        nbytes //= 2 if dtype == "F4" else 1
        name = hostile_text(rng)
        if name not in header and name != "__metadata__":
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}
            begin += nbytes
    names = list(header)
    rng.shuffle(names)
    return {name: header[name] for name in names}, begin


def hostile_text(rng: random.Random) -> str:
    """A hostile name that is text."""
    return hostile_name(rng).encode("utf-8", "ignore").decode()


def safetensors_case(rng: random.Random) -> Case:
    """From right to unrecognisable."""
    header, nbytes = right_safetensors(rng)
    data_nbytes = nbytes
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
        data_nbytes = max(0, data_nbytes + _spoil_header(rng, header))
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5, separators=rng.choice(((",", ":"), (", ", ": "))))
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        raw = _spoil_text(rng, raw)
    if rng.random() < 0.1:
        raw += rng.choice((b" ", b"\n\t ", b"\0", b"{}", b"x"))
    length = rng.choice(NUMBERS) % 2**64 if rng.random() < 0.07 else len(raw)
    content = struct.pack("<Q", length) + raw + rng.randbytes(data_nbytes)
    if rng.random() < 0.2:
        content = damage(rng, content)
        if rng.random() < 0.5 and len(content) >= 8:  # else nearly all damage ends in a wrong length
            content = struct.pack("<Q", max(len(content) - 8 - data_nbytes, 0)) + content[8:]
    return Case("safetensors", "model.safetensors", {"model.safetensors": content})


def _spoil_header(rng: random.Random, header: dict[str, Any]) -> int:
    """Change one thing; returns how many bytes the data should grow by."""
    entries = [entry for name, entry in header.items() if isinstance(entry, dict) and "dtype" in entry]
    if not entries or rng.random() < 0.1:
        header[hostile_name(rng)] = value_of_another_kind(rng)
        return 0
    entry = rng.choice(entries)
    key = rng.choice(("dtype", "shape", "shape", "data_offsets", "data_offsets"))
    what = rng.randrange(8)
    if what == 0:
        entry[key] = value_of_another_kind(rng)
    elif what == 1:
        entry["dtype"] = rng.choice(DTYPE_NAMES)
    elif what == 2:
        entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
    elif what == 3 and isinstance(entry.get(key), list) and entry[key]:
        entry[key][rng.randrange(len(entry[key]))] = value_of_another_kind(rng)
    elif what == 4:
        entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
    elif what == 5 and _is_span(entry.get("data_offsets")):  # a gap, an overlap
        step = rng.choice((-8, -1, 1, 8))
        entry["data_offsets"] = [offset + step for offset in entry["data_offsets"]]
        return rng.choice((0, step))
    elif what == 6:
        if rng.random() < 0.5:
            entry.pop(key, None)
        else:
            entry[hostile_name(rng)] = value_of_another_kind(rng)
    else:
        return rng.choice((-9, -1, 1, 9))
    return 0


def _is_span(found: object) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(type(offset) is int for offset in found)


def _spoil_text(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw) + 1)
    return pick(
        rng,
        (3, lambda: raw[:at] + rng.choice(RAW) + raw[at:]),
        (
            1,
            lambda: (
                raw[:at] + rng.choice((b"[", b'{"a":', b" ", b"9", b"\\", b'"')) * rng.choice((10, 2000)) + raw[at:]
            ),
        ),
        (2, lambda: raw[:-1] + b"," + raw[1:] if len(raw) > 2 else raw),  # every name twice
        (1, lambda: raw.replace(b'"dtype"', b'"dtype":"U8","dtype"', 1)),
        (1, lambda: raw.replace(b"{", b"{\x00", 1)),
        (1, lambda: b'{"a":' * 3000 + raw + b"}" * 3000),
    )


def index_case(rng: random.Random) -> Case:
    """An index beside two whole shards, a link to a whole one outside, and names that lead everywhere."""
    shards = ("one.safetensors", "sub/two.safetensors", "link.safetensors")
    files = {"one.safetensors": _shard("a"), "sub/two.safetensors": _shard("b"), "../outside.safetensors": _shard("c")}
    mapping: dict[str, Any] = {"a": shards[0], "b": shards[1], "c": shards[2]}
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(("a", "b", "c", hostile_name(rng)))
        mapping[name] = pick(
            rng,
            (2, lambda: value_of_another_kind(rng)),
            (2, lambda: hostile_name(rng)),
            (4, lambda: _leading_out(rng)),
            (1, lambda: rng.choice(shards)),
        )
    index: dict[str, Any] = {"metadata": {"total_size": rng.choice(NUMBERS)}, "weight_map": mapping}
    if rng.random() < 0.1:
        index[rng.choice(("metadata", "weight_map", hostile_name(rng)))] = value_of_another_kind(rng)
    raw = json.dumps(index, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        raw = _spoil_text(rng, raw)
    if rng.random() < 0.1:
        raw = damage(rng, raw)
    start = "model.safetensors.index.json"
    return Case("index", start, {**files, start: raw}, (("link.safetensors", "../outside.safetensors"),))


def _leading_out(rng: random.Random) -> str:
    outside = "outside.safetensors"
    return rng.choice(
        (
            *(f"../{outside}", f"sub/../../{outside}", f"./../{outside}", f"..\\{outside}", f"sub\\..\\..\\{outside}"),
            *(
                f"/{outside}",
                "/etc/passwd",
                "/dev/zero",
                "//etc/passwd",
                "C:/w",
                "C:w",
                "\\\\host\\share\\w",
                "file:///w",
            ),
            *(
                ".",
                "..",
                "./",
                "sub",
                "sub/",
                "",
                "~/w",
                "one.safetensors/",
                "one.safetensors/x",
                "sub/./two.safetensors",
            ),
            *(
                "a\0.safetensors",
                "\0",
                "x" * 5000,
                "one.safetensors\n",
                "ONE.safetensors",
                "one.safetensors ",
                "%2e%2e/w",
            ),
        )
    )


def _shard(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"123"


def shards_case(rng: random.Random) -> Case:
    """Shards without an index: whole, lacking, numbered wrongly, of two sets, with names that repeat."""
    count = rng.choice((1, 2, 2, 3, 3))
    files: dict[str, bytes] = {}
    for number in range(1, count + 1):
        content = _shard("abc"[number - 1])
        if rng.random() < 0.2:
            content = rng.choice((_shard("a"), b"", damage(rng, content), b"<!DOCTYPE html>", content[:-1]))
        files[f"model-{number:05}-of-{count:05}.safetensors"] = content
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = rng.choice(list(files))
        number = rng.choice((0, 1, count, count + 1, 99999))
        other = rng.choice(
            (f"model-{number:05}-of-{count:05}.safetensors", f"model-1-of-{count}.safetensors", "config.json")
        )
        if rng.random() < 0.5:
            files[other] = files.pop(name)
        else:
            files[other] = _shard(rng.choice("abcd"))
    if rng.random() < 0.1:
        files["model-00001-of-99999999.safetensors"] = _shard("d")
    return Case("shards", rng.choice(list(files)), files)


def sums_case(rng: random.Random) -> Case:
    """A whole file beside a list of sums that may be anything."""
    line = b"%s  %s\n" % (bytes(rng.choices(b"0123456789abcdef", k=64)), hostile_name(rng).encode("utf-8", "replace"))
    right = b"f" * 64 + b"  model.safetensors\n"
    text = pick(
        rng,
        (2, lambda: line * rng.randrange(3) + right),
        (2, lambda: damage(rng, line + right)),
        (1, lambda: rng.randbytes(rng.randrange(100))),
        (1, lambda: b"\\" + line),
        (1, lambda: b"\n" * 5 + b"#\n" + b"0" * 5000),
    )
    return Case("sums", "model.safetensors", {"model.safetensors": _shard("a"), "SHA256SUMS": text})
