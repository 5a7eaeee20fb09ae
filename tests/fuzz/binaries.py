"""Hostile files of NumPy, torch and llama.cpp: archives, pickles and binary headers."""

import io
import random
import struct
import zipfile
from typing import Any

import numpy as np
import torch

from .case import NUMBERS, Case, damage, hostile_name, pick, value_of_another_kind

__all__ = ["gguf_case", "npy_case", "npz_case", "torch_case"]

_NUMPY = ("f4", "f2", "f8", "i1", "i8", "u2", "b1", "c8", ">f4", ">i2", "O", "V2", "U3", "M8[s]", "f16", "S4", "")


def npy_bytes(rng: random.Random) -> bytes:
    """An .npy file that is right, or wrong in its header."""
    shape: Any = tuple(rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randrange(4)))
    descr: Any = rng.choice(_NUMPY[:10])
    fortran: Any = rng.random() < 0.3
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(descr).itemsize
    if rng.random() < 0.5:
        what = rng.randrange(5)
        if what == 0:
            shape = tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(5)))
        elif what == 1:
            shape = value_of_another_kind(rng)
        elif what == 2:
            descr = rng.choice((*_NUMPY, value_of_another_kind(rng), [("a", "f4")], "<f4, <f4"))
        elif what == 3:
            fortran = value_of_another_kind(rng)
        else:
            nbytes = max(0, nbytes + rng.choice((-8, -1, 1, 8)))
    text = repr({"descr": f"<{descr}" if descr in _NUMPY[:8] else descr, "fortran_order": fortran, "shape": shape})
    if rng.random() < 0.15:
        text = rng.choice(
            (
                "(" * 500 + ")" * 500,
                "{" * 90,
                "__import__('os').system('true')",
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)*9**9}",
                "9" * 5000,
                "-" * 4000 + "1",
                text[:-1],
                text + ",",
                text.replace("shape", "shape': (1,), 'shape"),
                "[" + text * 3,
            )
        )
    raw = text.encode("latin-1", "replace") + b" " * rng.choice((0, 3, 20)) + b"\n"
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (0, 0)))
    length = rng.choice(NUMBERS) if rng.random() < 0.05 else len(raw)
    size = 2 if version[0] == 1 else 4
    head = b"\x93NUMPY" + bytes(version) + (length % 256**size).to_bytes(size, "little")
    return head + raw + rng.randbytes(nbytes)


def npy_case(rng: random.Random) -> Case:
    """One array, or a pickle under the name of one."""
    content = npy_bytes(rng)
    if rng.random() < 0.3:
        content = damage(rng, content)
    if rng.random() < 0.05:
        content = pickle_bytes(rng)
    return Case("npy", "w.npy", {"w.npy": content})


def npz_case(rng: random.Random) -> Case:
    """An archive of arrays: stored, deflated, bombs, lies in its directory."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for _ in range(rng.randrange(4)):
            kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
            name = hostile_name(rng).encode("utf-8", "ignore").decode().replace("\0", "") + rng.choice(("", ".npy"))
            if name in archive.namelist():
                continue
            content = npy_bytes(rng) if rng.random() < 0.85 else pickle_bytes(rng)
            if rng.random() < 0.05:  # a bomb: it says what it holds, or less, or more
                count = rng.choice((10, 100_000, 1_000_000))
                claimed = rng.choice((count, count * 1000, 2**40))
                content = _npy("<f4", (claimed,)) + bytes(4 * count)
                kind = zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name), content, kind)
        if rng.random() < 0.3 and archive.filelist:
            member = rng.choice(archive.filelist)
            field = rng.choice(("file_size", "compress_size", "header_offset", "CRC", "flag_bits", "compress_type"))
            most = 2 ** {"flag_bits": 16, "compress_type": 16, "CRC": 32}.get(field, 63)
            wrong = rng.choice((*NUMBERS, member.file_size + 1, 0, 1, rng.choice(archive.filelist).header_offset))
            setattr(member, field, abs(wrong) % most)
            archive._didModify = True  # type: ignore[attr-defined]
        try:
            archive.close()
        except (struct.error, zipfile.LargeZipFile, NotImplementedError, ValueError):
            archive.fp = None  # what cannot even be written is left as it is
    content = stream.getvalue()
    if rng.random() < 0.3:
        content = damage(rng, content)
    return Case("npz", "w.npz", {"w.npz": content})


def _npy(descr: str, shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


_GLOBALS = (
    *("os system", "posix system", "builtins exec", "builtins eval", "builtins getattr", "subprocess Popen"),
    *("builtins bytearray", "torch Tensor", "torch FloatTensor", "torch.storage UntypedStorage", "torch FloatStorage"),
    *("collections OrderedDict", "collections Counter", "torch Size", "torch device", "_codecs encode", "builtins set"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor"),
    *("torch._utils _rebuild_qtensor", "torch._utils _rebuild_meta_tensor_no_storage", "torch.nn.parameter Parameter"),
    *(
        "torch._utils _rebuild_wrapper_subclass",
        "torch._utils _rebuild_nested_tensor",
        "torch._tensor _rebuild_from_type_v2",
    ),
    *(
        "torch.sparse FloatTensor",
        "torch.cuda FloatTensor",
        "torch.storage TypedStorage",
        "torch float32",
        "nosuch thing",
    ),
    *(
        "torch._utils _rebuild_device_tensor_from_numpy",
        "torch.jit load",
        "torch.serialization _get_layout",
        "builtins complex",
    ),
)


_BY_NUMBER = ("builtins bytearray", "torch Tensor", "torch.storage UntypedStorage", "torch HalfTensor")


def pickle_bytes(rng: random.Random) -> bytes:
    """A pickle that no Pickler wrote: calls, numbers, and stacks out of order."""
    found = [b"\x80\x02"]
    for _ in range(rng.randint(1, 25)):
        found.append(
            pick(
                rng,
                (4, lambda: b"c" + rng.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"),
                (3, lambda: b"J" + struct.pack("<i", rng.choice((0, 1, 5, -1, 2**31 - 1, 2**28, -(2**31))))),
                (1, lambda: b"\x8a\x08" + struct.pack("<q", rng.choice((2**33, 2**40, 2**62, -1)))),
                (2, lambda: b"X" + struct.pack("<I", rng.choice((1, 1, 1, 2**32 - 1, 2**31))) + b"a"),
                (3, lambda: bytes([rng.choice(b"(tR\x85\x86\x87)]}\x8fNs\x81bQae0ul\x88\x89K\x01h\x00q\x00")])),
                (3, lambda: b"\x85R"),  # a call with one argument
                (1, lambda: b"r" + struct.pack("<I", rng.choice((0, 2**31, 2**32 - 1)))),
                (1, lambda: b"j" + struct.pack("<I", rng.choice((0, 1, 2**32 - 1)))),
            )
        )
    if rng.random() < 0.4:  # one call and a mapping, so that some of it is reached
        name = rng.choice(rng.choice((_GLOBALS, _BY_NUMBER))).replace(" ", "\n").encode()
        count = b"\x8a\x08" + struct.pack("<q", rng.choice((2**20, 2**28, 2**33, 2**40)))
        return b"\x80\x02}X\x01\x00\x00\x00wc" + name + b"\n" + count + rng.choice((b"\x85R", b"\x85\x81")) + b"s."
    return b"".join(found) + b"."


def torch_case(rng: random.Random) -> Case:
    """A file of torch.save that is right, has another pickle, or lies in its directory."""
    base = torch.arange(24, dtype=torch.float32)
    tensors: dict[Any, Any] = {"a": base, "b": base[3:9].view(2, 3), "c": torch.ones(2, 3, dtype=torch.bfloat16).t()}
    tensors["d"] = torch.zeros(5, dtype=rng.choice((torch.int8, torch.uint16, torch.float8_e5m2, torch.complex64)))
    if rng.random() < 0.2:
        tensors[rng.choice((3, "x"))] = value_of_another_kind(rng)
    stream = io.BytesIO()
    torch.save(tensors, stream)
    content = stream.getvalue()
    what = rng.random()
    if what < 0.45:
        content = _with_pickle(rng, content)
    elif what < 0.85:
        content = damage(rng, content, most=3)
    if what > 0.95:
        content = pickle_bytes(rng)
    return Case("torch", "w.pt", {"w.pt": content})


def _with_pickle(rng: random.Random, content: bytes) -> bytes:
    """The archive with another pickle, or the same with some of its numbers changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith("data.pkl"):
                data = pickle_bytes(rng) if rng.random() < 0.5 else _with_numbers(rng, data)
            if member.filename.endswith("byteorder") and rng.random() < 0.1:
                data = rng.choice((b"big", b"", b"\xff", b"little "))
            new.writestr(zipfile.ZipInfo(member.filename), data)
    return out.getvalue()


def _with_numbers(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for at in rng.sample(range(len(found)), min(len(found), rng.randint(1, 4))):
        if found[at : at + 1] == b"K" and at + 1 < len(found):
            found[at : at + 2] = b"J" + struct.pack("<i", rng.choice((0, -1, 2**31 - 1, 1000)))
        else:
            places = [place for place in range(len(found) - 1) if found[place : place + 1] == b"K"]
            if places:
                place = rng.choice(places)
                found[place : place + 2] = rng.choice(
                    (
                        b"J" + struct.pack("<i", rng.choice((-1, 0, 1, 7, 2**31 - 1, -(2**31)))),
                        b"\x8a\x08" + struct.pack("<q", rng.choice((2**40, 2**62, -(2**62)))),
                        b"K" + bytes([rng.randrange(256)]),
                        b"\x88",
                        b"N",
                        b"G" + struct.pack(">d", 1.5),
                    )
                )
    return bytes(found)


_GGML = {0: ("<f4", 1, 4), 1: ("<f2", 1, 2), 24: ("i1", 1, 1), 8: ("Q8_0", 32, 34), 2: ("Q4_0", 32, 18)}


def gguf_case(rng: random.Random) -> Case:
    """A GGUF file with wrong counts, lengths, kinds, offsets or sizes; or a right one."""
    tensors, data = [], 0
    for number in range(rng.randrange(4)):
        kind = rng.choice(list(_GGML))
        _, block, nbytes = _GGML[kind]
        shape = [rng.choice((1, 2, 3)) * block, *(rng.choice((1, 2)) for _ in range(rng.randrange(3)))]
        name = hostile_name(rng) if rng.random() < 0.3 else f"w{number}"
        tensors.append([name.encode("utf-8", "surrogatepass"), shape, kind, data])
        count = 1
        for size in shape:
            count *= size
        data += -(-(count // block * nbytes) // 32) * 32
    wrong = rng.random() < 0.7
    if wrong and tensors:
        tensor = rng.choice(tensors)
        what = rng.randrange(6)
        if what == 0:
            tensor[1] = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 4, 5, 9)))]
        elif what == 1:
            tensor[2] = rng.choice((*range(45), 2**32 - 1))
        elif what == 2:
            tensor[3] = rng.choice((*NUMBERS, 0, 32, 64))
        elif what == 3:
            tensor[0] = rng.choice((b"\xff", b"", tensors[0][0]))
        elif what == 4:
            data = max(0, data - rng.choice((1, 32)))
    out = io.BytesIO()
    version = rng.choice((3, 3, 3, 2, 1, 4, 0, 3 << 24)) if wrong else 3
    counts = [len(tensors), 0]
    entries = [_entry(rng, wrong) for _ in range(rng.randrange(4))]
    counts[1] = len(entries)
    if wrong and rng.random() < 0.2:
        counts[rng.randrange(2)] = rng.choice(NUMBERS)
    out.write(b"GGUF" + struct.pack("<I", version) + b"".join(struct.pack("<Q", count % 2**64) for count in counts))
    for entry in entries:
        out.write(entry)
    for name, shape, kind, offset in tensors:
        length = rng.choice(NUMBERS) % 2**64 if wrong and rng.random() < 0.05 else len(name)
        out.write(struct.pack("<Q", length) + name + struct.pack("<I", len(shape)))
        out.write(b"".join(struct.pack("<Q", size % 2**64) for size in shape))
        out.write(struct.pack("<IQ", kind, offset % 2**64))
    out.write(bytes(-out.tell() % 32) + rng.randbytes(data))
    content = out.getvalue()
    if wrong and rng.random() < 0.3:
        content = damage(rng, content)
    return Case("gguf", "w.gguf", {"w.gguf": content})


def _entry(rng: random.Random, wrong: bool) -> bytes:
    """A piece of metadata."""
    key = rng.choice((b"general.alignment", b"general.architecture", b"split.count", b"a", b"b.c"))
    head = struct.pack("<Q", len(key)) + key
    if not wrong:
        key = b"fine" + bytes([rng.randrange(97, 123)])
        return struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 2) + b"hi"
    number = rng.choice(NUMBERS) % 2**64
    return head + pick(
        rng,
        (3, lambda: struct.pack("<II", 4, rng.choice((32, 1, 64, 0, 3, 2**31)))),
        (2, lambda: struct.pack("<IQ", 8, rng.choice((2, number))) + b"hi"),
        (2, lambda: struct.pack("<IIQ", 9, rng.choice((4, 8, 9, 0, 99)), rng.choice((1, number))) + b"\0" * 12),
        (
            1,
            lambda: (
                struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * rng.choice((3, 5, 200)) + struct.pack("<IQ", 0, 0)
            ),
        ),
        (1, lambda: struct.pack("<I", rng.choice((99, 2**32 - 1)))),
        (1, lambda: struct.pack("<Id", 12, float("nan"))),
    )
