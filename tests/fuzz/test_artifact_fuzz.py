"""Thousands of damaged and forged artifacts: each gives one VitqError or the identical model, and never runs code.

VITQ_FUZZ=50000 tries that many. Every mutation follows from its number, which a failure names.

Damage (no digest is made right) must be noticed, or change nothing. Forgery (all digests are right) cannot be noticed
in general; it may change numbers, but it gives one VitqError or a model that runs, too.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.artifact import schema
from vitq.core.errors import ArtifactError, VitqError
from vitq.core.memory import peak_rss_mb

MUTATIONS = int(os.environ.get("VITQ_FUZZ", "3000"))
SECONDS = 20  # for one load: a hang, not a slow machine
MEGABYTES = 300  # more than before: a tiny model takes next to nothing
LONGEST = 3000  # characters of a message

Files = dict[str, bytes]


class Tiny(nn.Module):
    """A norm whose linear has no bias (a rewrite adds one), and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 7, bias=False), nn.Linear(7, 5)
        self.register_buffer("offset", torch.full((5,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.norm(self.stem(x))))) + self.offset  # type: ignore[no-any-return]


X = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@dataclass
class Saved:
    """The bytes of two artifacts of one architecture, what they compute, and the file that a payload would make."""

    files: Files
    other: Files
    expected: list[Tensor]
    ran: Path
    folder: Path
    refused: int = 0
    messages: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    base = tmp_path_factory.mktemp("fuzz")
    found: list[Files] = []
    expected = []
    for bits in ("w4a4", "w8a3"):
        torch.manual_seed(3)
        qmodel = vitq.quantize(Tiny().eval(), "repq_vit", bits, X)
        qmodel.source = {"kind": "zoo", "spec": "zoo:seeded_vit", "name": "seeded_vit", "num_classes": 10}
        vitq.save(qmodel, base / bits, metrics={"top1": 50.0, "note": "größe"})
        found.append({f.name: f.read_bytes() for f in (base / bits).iterdir()})
        expected.append(run(qmodel))
    return Saved(*found, expected, base / "ran", base / "mutated")


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    out = model(X)
    assert isinstance(out, Tensor)
    return out


def write(saved: Saved, files: Files) -> None:
    shutil.rmtree(saved.folder, ignore_errors=True)
    saved.folder.mkdir()
    for name, data in files.items():
        (saved.folder / name).write_bytes(data)


def try_to_load(saved: Saved, case: str, *, forged: bool) -> None:
    """Load what is in the folder; anything but one VitqError or a fitting model fails."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as errors they would be taken for refusals
            found = run(vitq.load(saved.folder, model=Tiny()))
    except VitqError as error:
        message = str(error)
        assert 20 < len(message) < LONGEST, (case, len(message), message[:300])
        assert "\n" not in message, (case, message)
        saved.refused += 1
        saved.messages.add(message.replace(str(saved.folder), "")[:40])
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
    else:
        if forged:
            assert found.shape == saved.expected[0].shape, case
        else:
            assert any(torch.equal(found, expected) for expected in saved.expected), f"{case}: other outputs"
    assert time.monotonic() - start < SECONDS, f"{case}: too slow"
    assert not saved.ran.exists(), f"{case}: code ran"


# -- putting digests right -----------------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def signed(files: Files, config: Any = None, *, bind: bool = True) -> Files:
    """The files with every digest made right; `config` in the place of what config.json holds."""
    data = json.loads(files[schema.CONFIG]) if config is None else config
    data.pop("digest", None)
    tensors = files[schema.TENSORS]
    if bind and set(schema.BINDING) <= set(data):
        try:
            header, body = header_of(tensors)
            header["__metadata__"] = {schema.BOUND: schema._digest({name: data[name] for name in schema.BINDING})}
            tensors = with_header(header, body)
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass  # the header is what was damaged
    if "tensors_sha256" in data:
        data["tensors_sha256"] = __import__("hashlib").sha256(tensors).hexdigest()
    text = json.dumps(data | {"digest": schema._digest(data)})
    return files | {schema.TENSORS: tensors, schema.CONFIG: text.encode()}


# -- damage --------------------------------------------------------------------------------------------------

Mutation = Callable[[Saved, random.Random], Files]


def one_of(draw: random.Random) -> str:
    return draw.choice([schema.CONFIG, schema.TENSORS])


def changed(saved: Saved, draw: random.Random, change: Callable[[bytes], bytes]) -> Files:
    name = one_of(draw)
    return saved.files | {name: change(saved.files[name])}


def flipped(data: bytes, draw: random.Random, limit: int | None = None) -> bytes:
    array = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 16])):
        array[draw.randrange(limit or len(array))] ^= 1 << draw.randrange(8)
    return bytes(array)


def flip(saved: Saved, draw: random.Random) -> Files:
    return changed(saved, draw, lambda data: flipped(data, draw))


def truncate(saved: Saved, draw: random.Random) -> Files:
    return changed(saved, draw, lambda data: data[: draw.randrange(len(data))])


def cut_out(saved: Saved, draw: random.Random) -> Files:
    def cut(data: bytes) -> bytes:
        start = draw.randrange(len(data))
        return data[:start] + data[start + draw.choice([1, 2, 8, 200]) :]

    return changed(saved, draw, cut)


def insert(saved: Saved, draw: random.Random) -> Files:
    def put_in(data: bytes) -> bytes:
        start, more = draw.randrange(len(data) + 1), draw.choice([b"\0", b" ", b"\n", b"[" * 5000, draw.randbytes(20)])
        return data[:start] + draw.choice([more, data[start : start + 50]]) + data[start:]

    return changed(saved, draw, put_in)


def swap_files(saved: Saved, draw: random.Random) -> Files:
    """Files renamed, exchanged, left out, or of another artifact."""
    names = [schema.CONFIG, schema.TENSORS, schema.CARD]
    source = [draw.choice([saved.files, saved.other])[draw.choice(names)] for _ in names]
    files = dict(zip(names, source, strict=True))
    if draw.random() < 0.3:
        files["renamed.bin"] = files.pop(draw.choice(names))
    return files


def spell_otherwise(saved: Saved, draw: random.Random) -> Files:
    """config.json that means the same: other spaces, another order, keys that come twice."""
    data = json.loads(saved.files[schema.CONFIG])
    keys = list(data)
    draw.shuffle(keys)
    text = json.dumps({k: data[k] for k in keys}, indent=draw.choice([None, 0, 3]), ensure_ascii=draw.random() < 0.5)
    key = draw.choice(keys)
    twice = json.dumps({key: draw.choice([None, 1, data[key]])})[:-1] + ", "
    return saved.files | {schema.CONFIG: (twice + text[1:] if draw.random() < 0.5 else text).encode()}


# -- forgery -------------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 17, 2**31, 2**63, 10**30, -(2**70), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "../../escape", "/etc/passwd", "..", "state/../x", "a\0b", "\ud800", "é" * 300, "__class__", "fc1.weight",
    "load",
    "float32", "int8", "complex64", "uniform", "log2", "w4a4", [], {}, [None], {"a": 1}, [[]], [-1, 4, 6], [2**40, 6],
    [1, 40_000, 40_000], [1] * 70, {"tensor": [1, 4, 2**33], "dtype": "float32"}, {"list": [{"value": 1}] * 50},
]  # fmt: skip


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found = []
    for key in node if isinstance(node, dict) else range(len(node)):
        found.append((node, key))
        if isinstance(node[key], (dict, list)):
            found += places(node[key])
    return found


def nested(depth: int, draw: random.Random) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def forge_config(saved: Saved, draw: random.Random) -> Files:
    data = json.loads(saved.files[schema.CONFIG])
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        node, key = draw.choice(places(data))
        kind = draw.random()
        if kind < 0.15:
            del node[key]
        elif kind < 0.25 and isinstance(node, dict):
            node[draw.choice(["new", "../x", "", "fc1:linear0.input", "e\u0301"])] = node.pop(key)
        elif kind < 0.35:
            other, name = draw.choice(places(json.loads(saved.other[schema.CONFIG])))
            node[key] = other[name]
        elif kind < 0.4:
            node[key] = nested(draw.choice([50, 300]), draw)
        else:
            node[key] = draw.choice(NASTY)
    return signed(saved.files, data)


def forge_tensors(saved: Saved, draw: random.Random) -> Files:
    """Tensors swapped, renamed, left out, of other values, sizes and types."""
    header, body = header_of(saved.files[schema.TENSORS])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw.choice([1, 1, 3])):
        a, b = draw.choice(names), draw.choice(names)
        if a not in header or b not in header:
            continue
        kind = draw.randrange(6)
        if kind == 0:
            header[a], header[b] = header[b], header[a]
        elif kind == 1:
            header[draw.choice(["x", "state/../../x", "codes/", "site/", b + "2", "rewrite/-1/ratio"])] = header.pop(a)
        elif kind == 2:
            header[a]["dtype"] = draw.choice(["F32", "F16", "BF16", "U8", "I64", "BOOL", "F64", "F8_E4M3", "C64", 7])
        elif kind == 3:
            header[a]["shape"] = draw.choice([[], [0], [-1], [2**40, 2**40], [6], [6, 6], [1, 6], "x", [0.5], [2**63]])
        elif kind == 4:
            odd = [[0, 0], [0, 4], [4, 0], [-1, 3], [0, 2**63], [0]]
            header[a]["data_offsets"] = draw.choice([*odd, header[b]["data_offsets"]])
        else:
            start, end = header[a]["data_offsets"]
            body = body[:start] + draw.randbytes(end - start) + body[end:]
    return signed(saved.files | {schema.TENSORS: with_header(header, body)})


def forge_header(saved: Saved, draw: random.Random) -> Files:
    """Headers that no writer of safetensors makes, and bits flipped in one that one made."""
    data = saved.files[schema.TENSORS]
    size = int.from_bytes(data[:8], "little") + 8
    header, body = header_of(data)
    foreign: list[bytes] = [
        flipped(data, draw, size),
        draw.choice([0, 1, size, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:],
        with_header(b"{" * draw.choice([3, 5000]), body),
        with_header(b'{"a": 1, "a": 2}', body),
        with_header(b"[]", body),
        with_header(b"\xff\xfe", body),
        with_header(header | {"__metadata__": draw.choice([{"vitq_config": 3}, [], None, {"a": {}}, "x"])}, body),
        with_header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64 - 1]}}, b""),
        with_header({}, b""),
        data + draw.randbytes(9),
    ]
    return signed(saved.files | {schema.TENSORS: draw.choice(foreign)}, bind=False)


def forge_pickle(saved: Saved, draw: random.Random) -> Files:
    """A pickle, in each form in which torch writes them, in the place of either file."""
    buffer = io.BytesIO()
    payload = Payload(saved.ran)
    kind = draw.randrange(4)
    if kind == 0:
        buffer.write(pickle.dumps(payload, protocol=draw.choice([0, 2, 4])))
    else:
        torch.save({"state_dict": payload}, buffer, _use_new_zipfile_serialization=kind > 1)
    data = buffer.getvalue()
    if kind == 3:  # a header that fits, and the pickle as tensor data
        data = with_header({"a": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}, data)
    if draw.random() < 0.3:
        return saved.files | {schema.CONFIG: data}
    return signed(saved.files | {schema.TENSORS: data}, bind=kind == 3)


DAMAGE: tuple[Mutation, ...] = (flip, truncate, cut_out, insert, swap_files, spell_otherwise)
FORGERY: tuple[Mutation, ...] = (*[forge_config] * 3, *[forge_tensors] * 2, forge_header, forge_pickle)


@pytest.mark.parametrize(("kinds", "forged"), [(DAMAGE, False), (FORGERY, True)], ids=["damage", "forgery"])
def test_every_mutation_gives_one_error_or_a_fitting_model(
    saved: Saved, kinds: tuple[Mutation, ...], forged: bool
) -> None:
    write(saved, saved.files)
    try_to_load(saved, "unchanged", forged=False)
    saved.refused, before = 0, peak_rss_mb()
    count = MUTATIONS // 2
    for number in range(count):
        draw = random.Random(number)
        mutate = kinds[number % len(kinds)]
        write(saved, mutate(saved, draw))
        try_to_load(saved, f"{mutate.__name__} {number}", forged=forged)
    assert saved.refused > 0.4 * count, "mutations that change nothing prove nothing"
    assert len(saved.messages) > 5
    assert peak_rss_mb() - before < MEGABYTES


def test_the_payload_would_run_if_it_were_unpickled(saved: Saved) -> None:
    """So that the mutation above proves something."""
    pickle.loads(pickle.dumps(Payload(saved.ran)))
    assert saved.ran.exists()
    saved.ran.unlink()


def test_what_is_no_regular_file_is_refused(saved: Saved) -> None:
    for name in (schema.CONFIG, schema.TENSORS):
        for make in (
            Path.mkdir,
            os.mkfifo,
            lambda path: path.symlink_to("/dev/zero"),
            lambda path: path.symlink_to(path),
        ):
            write(saved, saved.files)
            (saved.folder / name).unlink()
            make(saved.folder / name)  # type: ignore[operator]
            with pytest.raises(ArtifactError, match=name):
                vitq.load(saved.folder, model=Tiny())
