"""Hostile pickles in files of torch.save, new and old: instructions of every protocol, bombs, and ids that lead out."""

import io
import pickle
import pickletools
import random
import struct
import zipfile

import torch

from .case import NUMBERS, Case, damage, hostile_name, pick

__all__ = ["archive_of", "pickle_case"]

_OPCODES = [opcode for opcode in pickletools.opcodes if opcode.code != "."]
_KEYS = ("0", "1", "2", "../0", "/etc/passwd", "data/0", "0/../0", "", "00", "\0", "version", "data.pkl", "×")
_STORAGES = ("FloatStorage", "HalfStorage", "ByteStorage", "BoolStorage", "QInt8Storage", "Storage", "Tensor")
_FUNCTIONS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_qtensor")


def pickle_case(rng: random.Random) -> Case:
    """A file of torch.save with a pickle that no Pickler wrote."""
    data = pick(
        rng,
        (4, lambda: _of_tensors(rng)),
        (3, lambda: _instructions(rng)),
        (2, lambda: _bomb(rng)),
        (2, lambda: damage(rng, _of_tensors(rng), most=2)),
        (1, lambda: pickle.dumps({hostile_text(rng): rng.choice(NUMBERS)}, rng.randrange(6))),
    )
    if rng.random() < 0.3:
        return Case("pickle", "w.pt", {"w.pt": _legacy(rng, data)})
    return Case("pickle", "w.pt", {"w.pt": archive_of(data)})


def archive_of(data: bytes) -> bytes:
    """A file of torch.save with this pickle and three storages."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("w/data.pkl"), data)
        for key in range(3):
            archive.writestr(zipfile.ZipInfo(f"w/data/{key}"), struct.pack("<6f", *range(6)))
        archive.writestr(zipfile.ZipInfo("w/version"), b"3\n")
    return out.getvalue()


def hostile_text(rng: random.Random) -> str:
    """A hostile name that is text."""
    return hostile_name(rng).encode("utf-8", "ignore").decode()


def _of_tensors(rng: random.Random) -> bytes:
    """A mapping of tensors, right or nearly."""
    found = [b"\x80\x02", rng.choice((b"}", b"}", b"ccollections\nOrderedDict\n)R")), b"("]
    for number in range(rng.randrange(4)):
        found += [_text(rng.choice((f"w{number}", f"w{number}", hostile_text(rng)))), _tensor(rng)]
    found.append(b"u")
    if rng.random() < 0.2:
        found = [b"}", _text(rng.choice(("state_dict", "params"))), *found, b"s"]
    return b"".join(found) + b"."


def _tensor(rng: random.Random) -> bytes:
    kind = rng.choice(_STORAGES[:4] if rng.random() < 0.9 else _STORAGES)
    count = rng.choice((6, 6, 6, 12, 24, rng.choice(NUMBERS)))
    identity = [
        _text("storage"),
        b"ctorch\n%s\n" % kind.encode(),
        _text(rng.choice(_KEYS[: 3 if rng.random() < 0.8 else 13])),
    ]
    identity += [_text("cpu"), _number(count)] + [b"N"] * (rng.random() < 0.1)
    if rng.random() < 0.05:
        identity[rng.randrange(len(identity))] = rng.choice((b"N", b")", b"]", b"K\x01", b"\x88"))
    storage = b"(" + b"".join(identity) + b"tQ"
    shape = rng.choice(((6,), (2, 3), (3, 2), (), (0, 4), (1, 6), (2**40, 0), (rng.choice(NUMBERS),)))
    stride = rng.choice(((1,), (3, 1), (1, 3), (0,), (0, 0), (), (2**62, 1), (-1,)))
    if rng.random() < 0.6:
        stride = (
            tuple(torch.empty(shape, device="meta").stride()) if all(0 <= size < 2**20 for size in shape) else stride
        )
    function = rng.choice(_FUNCTIONS[1:2] * 4 + _FUNCTIONS)
    offset = rng.choice((0, 0, 0, 1, 3, rng.choice(NUMBERS)))
    made = b"ctorch._utils\n%s\n(" % function.encode() + storage + _number(offset) + _tuple(shape) + _tuple(stride)
    rest = (
        b"\x89" + rng.choice((b"N", b"ccollections\nOrderedDict\n)R", b"}")) if function != "_rebuild_tensor" else b""
    )
    rest += b"ctorch\nfloat16\n" * function.endswith("_v3")
    made += rest + b"tR"
    if rng.random() < 0.2:
        made = b"ctorch._utils\n_rebuild_parameter\n" + made + b"\x88N\x87R"
    return made


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(number: int) -> bytes:
    nbytes = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([nbytes]) + number.to_bytes(nbytes, "little", signed=True)


def _tuple(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def _instructions(rng: random.Random) -> bytes:
    """Any instructions, with arguments that may be theirs."""
    found = [b"\x80" + bytes([rng.randrange(6)]), b"}(" * rng.randrange(3)]
    for _ in range(rng.randint(1, 40)):
        opcode = rng.choice(_OPCODES)
        found.append(opcode.code.encode("latin-1"))
        if opcode.arg is None:
            continue
        size = opcode.arg.n
        if size == pickletools.UP_TO_NEWLINE:
            found.append(rng.choice((b"os\n", b"1\n", b"'a'\n", b"9" * 200 + b"\n", b"\n", b"nan\n", b"\\u12\n")))
            found.append(b"system\n" * (opcode.name in ("GLOBAL", "INST")))
        elif size >= 0:
            found.append(
                rng.randbytes(size) if rng.random() < 0.3 else bytes([rng.randrange(4), *bytes(size - 1)][:size])
            )
        else:
            width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(size, 4)
            length = rng.choice((0, 1, 3, rng.choice(NUMBERS))) % 256**width
            found.append(length.to_bytes(width, "little") + b"abc"[: min(length, 3)])
    return b"".join(found) + b"."


def _bomb(rng: random.Random) -> bytes:
    """Much of little: nesting, doubling by the memo, keys that collide, endless lists."""
    count = rng.choice((10, 1000, 10_000))
    doubled = b"".join(b"h%ch%c\x86q%c" % (number, number, number + 1) for number in range(min(count, 250)))
    same = b"".join(b"\x8a\x0c" + (n * (2**61 - 1)).to_bytes(12, "little") + b"N" for n in range(1, min(count, 3000)))
    deep = b"N" + rng.choice((b"\x85", b"]\x94a", b"\x85\x94")) * count
    return rng.choice(
        (
            b"N\x86q\x00" + doubled + b".",
            b")q\x00" + doubled + b"}" + b"h\x05K\x01s.",
            b"}(" + same + b"u.",
            deep + b".",
            b"}" + b"N" + b"\x85" * count + b"K\x01s.",
            b"]q\x00" + b"h\x00a" * count + b".",
            b"}q\x00" + _text("a") + b"h\x00s" * 1 + b".",
            b"(" * count + b"." * rng.randrange(2),
            b"X" + struct.pack("<I", count) + b"\xf0\x9f\x98\x80" + b"a" * (count - 4) + b".",
        )
    )


def _legacy(rng: random.Random, data: bytes) -> bytes:
    """The same objects as torch wrote them before 1.6."""
    first = (pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    keys = rng.choice((["0", "1", "2"], ["0"], ["2", "0", "1"], ["0", "0"], [0, 1], "012", []))
    counts = [rng.choice((6, 6, 6, 3, rng.choice(NUMBERS))) for _ in keys]
    storages = b"".join((count % 2**64).to_bytes(8, "little") + struct.pack("<6f", *range(6)) for count in counts)
    content = b"".join(first) + data + pickle.dumps(keys, 2) + storages
    return damage(rng, content, most=2) if rng.random() < 0.2 else content
