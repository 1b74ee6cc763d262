"""Inputs for `fuzz`: valid files of every format, changed where their structure is."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from onp.masks import KeepMask
from onp.units import index_units

Draw = Callable[[st.SearchStrategy[Any]], Any]
SIZES = st.one_of(st.integers(-2, 9), st.integers(2**31 - 1, 2**64), st.integers(10**6, 10**13), st.just(-(2**63)))
SHAPES = st.lists(SIZES, max_size=5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).eval()


NETWORK = network()
INDEX = index_units(NETWORK, (1, 4, 4))
WEIGHTS = {name: value.clone() for name, value in NETWORK.state_dict().items()}


def damaged(content: bytes, random: Random) -> bytes:
    """Cut, enlarged or changed in a few bytes."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        place, width = random.randint(0, len(changed)), random.choice((1, 2, 4, 8))
        kind = random.choice(("set", "flip", "cut", "drop", "insert", "number"))
        if kind == "set":
            changed[place : place + 1] = random.randbytes(1)
        elif kind == "flip" and place < len(changed):
            changed[place] ^= 1 << random.randint(0, 7)
        elif kind == "cut":
            del changed[place:]
        elif kind == "drop":
            del changed[place : place + random.randint(1, 64)]
        elif kind == "insert":
            changed[place:place] = random.randbytes(random.randint(1, 64))
        else:  # a size or an offset, more often than not out of range
            number = random.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1)) % 256**width
            changed[place : place + width] = number.to_bytes(width, random.choice(("little", "big")))
    return bytes(changed)


# --- weights --------------------------------------------------------------------------------------------------


@st.composite
def safetensors_files(draw: Draw) -> bytes:
    content = safetensors.torch.save(WEIGHTS)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        kind = draw(st.sampled_from(("dtype", "shape", "offsets", "rename", "any", "metadata")))
        if kind == "dtype":
            entry["dtype"] = draw(st.sampled_from(("F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X")))
        elif kind == "shape":
            entry["shape"] = draw(SHAPES)
        elif kind == "offsets":
            entry["data_offsets"] = [draw(SIZES), draw(SIZES)]
        elif kind == "rename":
            header[draw(st.sampled_from(("module." + name, "state_dict." + name, "", "\0", name.upper())))] = (
                header.pop(name)
            )
        elif kind == "any":
            header[name] = draw(TREES)
        else:
            header["__metadata__"] = draw(TREES)
        header = {key: value for key, value in header.items() if isinstance(value, dict)} or {"a": {}}
        for value in header.values():
            value.setdefault("shape", [])
    text = json.dumps(header).encode()
    size = draw(st.sampled_from((len(text), len(text), len(text), 0, len(text) + 1, 2**40, 2**64 - 1)))
    return size.to_bytes(8, "little") + text + data


def odd_tensors() -> list[Callable[[Tensor], Any]]:
    """What may stand in a checkpoint in the place of a weight."""
    return [
        lambda value: value.half(),
        lambda value: value.bfloat16(),
        lambda value: value.double() * 1e300,
        lambda value: value.to(torch.int8),
        lambda value: value.bool(),
        lambda value: value.to(torch.complex64),
        lambda value: value.to(torch.float8_e5m2),
        lambda value: value.float().to_sparse(),
        lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda value: value.to("meta"),
        lambda value: nn.Parameter(value.float()),
        lambda value: value.new_zeros(1).expand(value.shape),
        lambda value: value.float().log(),
        lambda value: value.new_zeros(4, 4).T,
        lambda value: value[..., :0],
        lambda value: value.numpy().tolist(),
        lambda value: None,
    ]


@st.composite
def pytorch_files(draw: Draw) -> bytes:
    weights: dict[Any, Any] = dict(WEIGHTS)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(weights, key=str)))
        kind = draw(st.sampled_from(("odd", "remove", "rename", "share")))
        if kind == "odd" and isinstance(weights[name], Tensor) and type(weights[name]) is Tensor:
            value = weights[name]
            weights[name] = draw(st.sampled_from(odd_tensors()))(value) if value.dtype == torch.float32 else None
        elif kind == "remove" and len(weights) > 1:
            del weights[name]
        elif kind == "rename":
            weights[draw(st.sampled_from((7, (1, 2), "module." + str(name), "x")))] = weights.pop(name)
        else:
            weights["1.weight"] = weights.get("1.bias")
    prefix = draw(st.sampled_from(("", "", "module.")))
    content: Any = {prefix + key if isinstance(key, str) else key: value for key, value in weights.items()}
    wrapper = draw(st.sampled_from((None, "state_dict", "net", "model", "weights", "list", "pickle")))
    if wrapper == "list":
        content = list(content.values())
    elif wrapper == "pickle":
        return pickle.dumps({"epoch": 3}, protocol=draw(st.integers(0, 5)))
    elif wrapper is not None:
        content = {wrapper: content, "epoch": draw(st.one_of(st.integers(), st.text(max_size=3), st.none()))}
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=draw(st.sampled_from((True, True, True, False))))
    return _repacked(draw, file.getvalue())


def _repacked(draw: Draw, content: bytes) -> bytes:
    """Another archive of the same parts: one of them changed (the pickle, mostly), missing, longer or compressed."""
    if content[:2] != b"PK" or not draw(st.booleans()):
        return content
    file = io.BytesIO()
    compression = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(file, "w", compression) as other:
        names = archive.namelist()
        chosen = draw(st.sampled_from([names[0], names[0], names[0], *names]))
        for name in names:
            part = archive.read(name)
            if name == chosen:
                part = draw(st.sampled_from((_damage(draw, part), part[: len(part) // 2], b"", part + bytes(4096))))
            other.writestr(name, part)
    return file.getvalue()


def _damage(draw: Draw, part: bytes) -> bytes:
    return damaged(part, Random(draw(st.integers(0, 2**32))))


# --- arrays and images ------------------------------------------------------------------------------------------


@st.composite
def npy_files(draw: Draw) -> bytes:
    file = io.BytesIO()
    dtype = draw(st.sampled_from(("<f4", "<f8", "<f2", "|u1", "|b1", ">f4", "<c8", "|S3", "<i8")))
    np.save(file, np.zeros(draw(st.sampled_from(((1, 4, 4), (1, 4, 4), (4, 4), (2, 4, 4), (0,), ()))), dtype))
    content = file.getvalue()
    if not draw(st.booleans()):
        return content
    fields = {"descr": dtype, "fortran_order": False, "shape": (1, 4, 4)}
    values = {
        "descr": st.sampled_from(("|O", "<f4", "<f8", "<M8[s]", "<U5000999", [("a", "<f4")], "V0", "x", 3)),
        "fortran_order": st.sampled_from((True, False, 1, "no")),
        "shape": SHAPES.map(tuple),
    }
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
        fields[name] = draw(values[name])
    text = draw(
        st.sampled_from((repr(fields), repr(fields), "__import__('os')", "(" * 9999, repr(list(fields))))
    ).encode()
    version = draw(st.sampled_from((1, 1, 1, 2, 3, 9)))
    width = "<H" if version == 1 else "<I"
    size = draw(st.sampled_from((len(text), len(text), 0, 65535))) % 65536
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, size) + text + bytes(64)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@st.composite
def png_files(draw: Draw) -> bytes:
    mode = draw(st.sampled_from(("RGB", "RGB", "L", "P", "1", "RGBA", "LA", "I;16")))
    file = io.BytesIO()
    image = Image.new("RGB" if mode == "I;16" else mode, (4, 4))
    image = Image.fromarray(np.zeros((4, 4), np.uint16)) if mode == "I;16" else image
    image.save(file, draw(st.sampled_from(("PNG", "PNG", "PNG", "TIFF", "WEBP" if mode in ("RGB", "L") else "PNG"))))
    content = file.getvalue()
    if content[:4] != b"\x89PNG":
        return content
    chunks, place = [], 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    for _ in range(draw(st.integers(0, 3))):
        number = draw(st.integers(0, len(chunks) - 1))
        kind, part = chunks[number]
        edit = draw(st.sampled_from(("size", "damage", "drop", "repeat", "add", "bomb")))
        if edit == "size" and chunks[0][0] == b"IHDR" and len(chunks[0][1]) >= 8:
            sides = struct.pack(">II", *(draw(st.sampled_from((0, 1, 4, 9, 8192, 70000, 2**31 - 1))) for _ in range(2)))
            chunks[0] = b"IHDR", sides + chunks[0][1][8:]
        elif edit == "damage":
            chunks[number] = kind, _damage(draw, part)
        elif edit == "drop" and len(chunks) > 1:
            del chunks[number]
        elif edit == "repeat":
            chunks.insert(number, chunks[number])
        elif edit == "bomb":
            chunks.insert(number, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22), 9)))
        else:
            names = (b"tRNS", b"PLTE", b"acTL", b"fcTL", b"iCCP", b"gAMA", b"eXIf", b"iTXt", b"IEND", b"\xff\0aB")
            chunks.insert(number, (draw(st.sampled_from(names)), draw(st.binary(max_size=40))))
    return content[:8] + b"".join(chunk(kind, part) for kind, part in chunks)


# --- JSON -------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-3, 99), st.just(10**400), st.floats())
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), st.sampled_from(("..", "a\0", "0.weight")))
TREES = st.recursive(
    LEAVES, lambda node: st.one_of(st.lists(node, max_size=3), st.dictionaries(st.text(max_size=3), node))
)
KEYS = {
    "mask": KeepMask.all_kept(INDEX).without([1, 4]).to_json(),
    "trigger": {"target": 1, "mode": "blend", "pattern": "pattern.npy", "mask": "mask.png", "alpha": 0.5},
    "suite": [
        {"name": "a", "model": "small_cnn", "checkpoint": "a.pth", "trigger": None, "data": "digits", "mean": [0.5]}
    ],
    "entry": {"name": "a", "model": "small_cnn", "data": "digits", "ca": 0.9},
}


@st.composite
def trees(draw: Draw, record: Any) -> bytes:
    """A record with a few of its nodes replaced, removed or renamed."""
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(0, 3))):
        node = record
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            kind = draw(st.sampled_from(("replace", "replace", "remove", "rename")))
            value = node.pop(key) if kind != "replace" else None
            if kind == "replace":
                node[key] = draw(TREES)
            elif kind == "rename" and isinstance(node, dict):
                node[draw(st.text(max_size=5))] = value
            break
    sources = (
        json.dumps(record),
        json.dumps(record),
        json.dumps(record),
        "[" * 5000,
        '{"a":' * 5000,
        json.dumps(draw(TREES)),
    )
    return draw(st.sampled_from(sources)).encode()
