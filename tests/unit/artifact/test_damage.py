"""Whatever is wrong with an artifact, loading gives one ArtifactError, or the identical model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.artifact import schema
from vitq.cli.console import Say
from vitq.cli.inspect import inspect_artifact
from vitq.core.errors import ArtifactError

from .conftest import (
    TINY_IN,
    Tiny,
    edit_config,
    edit_tensors,
    outputs,
    quantized,
    refusal,
    source_of,
    tiny,
    tiny_qmodel,
)

ROUNDS = 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "tiny"
    vitq.save(tiny_qmodel(), out, metrics={"top1": 50.0})
    return out


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


# -- whole files ---------------------------------------------------------------------------------------------


def test_places_that_are_no_artifact(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "not an artifact" in refusal(tmp_path / "empty")
    assert "is a file" in refusal(folder / schema.CONFIG)
    (tmp_path / "empty" / schema.CONFIG).write_text('{"model_type": "vit"}')
    assert "not written by vitq" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / schema.CONFIG).write_text("[1, 2]")
    assert "not written by vitq" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("name", [schema.CONFIG, schema.TENSORS])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder, model=tiny())


def test_the_card_is_not_needed(folder: Path) -> None:
    (folder / schema.CARD).unlink()
    vitq.load(folder, model=tiny())


@pytest.mark.parametrize("name", [schema.CONFIG, schema.TENSORS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file(folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    assert "damaged" in refusal(folder, model=tiny())


def test_files_of_two_artifacts_are_told_apart(folder: Path, tmp_path: Path) -> None:
    vitq.save(tiny_qmodel("w4a8"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / schema.TENSORS, folder / schema.TENSORS)
    assert "digest" in refusal(folder, model=tiny())
    edit_config(folder, lambda d: d.update(tensors_sha256=schema.sha256_of(folder / schema.TENSORS)))
    assert "another config.json" in refusal(folder, model=tiny())


def test_a_model_without_a_name_must_be_given(folder: Path) -> None:
    assert "model=" in refusal(folder)


# -- config.json ---------------------------------------------------------------------------------------------


def test_an_edited_value_is_noticed(folder: Path) -> None:
    edit_config(folder, lambda d: d["metrics"].update(top1=99.9), sign=False)
    assert "edited" in refusal(folder, model=tiny())


@pytest.mark.parametrize("version", [2, 10**9])
def test_a_newer_schema_is_refused_by_name(folder: Path, version: int) -> None:
    edit_config(folder, lambda d: d.update(schema_version=version, brand_new_field=1))
    message = refusal(folder, model=tiny())
    assert f"schema version {version}" in message
    assert "upgrade vitq" in message


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.5, True])
def test_a_schema_version_that_cannot_be(folder: Path, version: object) -> None:
    edit_config(folder, lambda d: d.update(schema_version=version))
    assert "schema version" in refusal(folder, model=tiny())


def test_unknown_and_missing_fields_are_named(folder: Path) -> None:
    edit_config(folder, lambda d: d.update(colour="red"))
    assert "colour" in refusal(folder, model=tiny())
    edit_config(folder, lambda d: (d.pop("colour"), d.pop("graph")))
    assert "graph" in refusal(folder, model=tiny())


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, '{"format": "vitq"', "null"])
def test_a_config_that_is_no_json(folder: Path, text: str) -> None:
    (folder / schema.CONFIG).write_text(text)
    assert schema.CONFIG in refusal(folder, model=tiny())
    (folder / schema.CONFIG).write_bytes(b"\xff\xfe\x00")
    assert schema.CONFIG in refusal(folder, model=tiny())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: next(iter(d["formats"].values())).update(bits=5),
        lambda d: d["plan"].update(bits="w8a8"),
        lambda d: d["rewrites"].clear(),
        lambda d: d.update(source=source_of("seeded_vit")),
        lambda d: d.update(preprocess={"mean": 1}),
        lambda d: d["example"].update(tensor=[1, 5, 6]),
        lambda d: d["packed"].popitem(),
    ],
)
def test_what_decides_the_numbers_is_bound_to_the_tensors(folder: Path, change: Callable[[Any], Any]) -> None:
    edit_config(folder, change)
    assert "another config.json" in refusal(folder, model=tiny())


# -- model.safetensors, with every digest made right ----------------------------------------------------------


def names(prefix: str) -> Callable[[dict[str, Tensor]], list[str]]:
    return lambda tensors: sorted(name for name in tensors if name.startswith(prefix))


@pytest.mark.parametrize("prefix", ["codes/", "site/", "state/", "rewrite/"])
def test_a_missing_tensor_is_refused(folder: Path, prefix: str) -> None:
    edit_tensors(folder, lambda t: t.pop(names(prefix)(t)[0]))
    refusal(folder, model=tiny())
    if prefix != "state/":
        refusal(folder, float_model=tiny())


@pytest.mark.parametrize("name", ["codes/fc9:linear0.weight", "site/fc1:linear0.input/extra", "state/fc9.weight", "x",
                                  "rewrite/7/ratio"])  # fmt: skip
def test_an_extra_tensor_is_refused(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(3)}))
    assert name.removeprefix("state/") in refusal(folder, model=tiny())


@pytest.mark.parametrize("prefix", ["codes/", "site/", "state/"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2, 2)])
def test_a_tensor_of_another_shape_is_refused(folder: Path, prefix: str, shape: tuple[int, ...]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in names(prefix)(tensors) if tensors[n].shape != shape and tensors[n].numel() > 1)
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)

    edit_tensors(folder, change)
    refusal(folder, model=tiny())


def test_scales_that_are_not_finite_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t[n].fill_(torch.nan) for n in names("site/")(t) if n.endswith("scale")])
    assert "finite" in refusal(folder, model=tiny())


def test_tensors_without_metadata_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / schema.TENSORS), folder / schema.TENSORS)
    edit_config(folder, lambda d: d.update(tensors_sha256=schema.sha256_of(folder / schema.TENSORS)))
    assert "another config.json" in refusal(folder, model=tiny())


# -- models that do not fit ----------------------------------------------------------------------------------


def test_another_architecture_shows_the_difference(folder: Path) -> None:
    class Longer(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.fc3 = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(super().forward(x))  # type: ignore[no-any-return]

    message = refusal(folder, model=Longer())
    assert "fc3:linear0.input" in message
    assert "rename=" in message
    wider = tiny()
    wider.fc1, wider.fc2 = nn.Linear(6, 9, bias=False), nn.Linear(9, 5)
    assert "7x6" in (message := refusal(folder, model=wider))
    assert "9x6" in message


def test_a_named_source_that_is_another_model_is_refused(tmp_path: Path) -> None:
    qmodel = quantized("seeded_vit")
    qmodel.source = source_of("seeded_swin")
    vitq.save(qmodel, tmp_path / "o")
    assert "blocks.0" in refusal(tmp_path / "o")


@pytest.mark.parametrize(
    "source",
    [
        {}, {"kind": "zoo"}, {"kind": "zoo", "name": "gone"}, {"kind": "zoo", "name": 5}, {"kind": ["zoo"]},
        {"kind": "timm", "name": 7, "num_classes": 10}, {"kind": "timm", "name": "vit_nothing", "num_classes": 10},
        {"kind": "torchvision", "name": "vit_b_16", "num_classes": "x"}, {"kind": "hf", "name": "x", "config": 3},
        {"kind": "file", "path": "x.py", "function": "build"},
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_built_is_refused(source: dict[str, Any], tmp_path: Path) -> None:
    qmodel = tiny_qmodel()
    qmodel.source = source
    vitq.save(qmodel, tmp_path / "o")
    refusal(tmp_path / "o")
    vitq.load(tmp_path / "o", model=tiny())


def test_code_named_in_a_file_is_not_run_without_trust(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    qmodel = tiny_qmodel()
    qmodel.source = {"kind": "file", "spec": "evil.py:build", "path": f"{tmp_path}/evil.py", "function": "build"}
    vitq.save(qmodel, tmp_path / "o")
    assert "trust_code=True" in refusal(tmp_path / "o")


def test_nothing_is_pickled_and_no_pickle_is_read(folder: Path, tmp_path: Path) -> None:
    assert sorted(f.name for f in folder.iterdir()) == sorted([schema.CARD, schema.CONFIG, schema.TENSORS])
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    torch.save(Evil(), folder / schema.TENSORS)
    edit_config(folder, lambda d: d.update(tensors_sha256=schema.sha256_of(folder / schema.TENSORS)))
    assert "cannot be read" in refusal(folder, model=tiny())
    assert not ran.exists()


def test_a_float_model_with_other_weights_is_refused(folder: Path) -> None:
    vitq.load(folder, float_model=tiny())
    other = tiny()
    with torch.no_grad():
        other.get_parameter("fc2.weight").mul_(-1)
    assert "fc2.weight" in refusal(folder, float_model=other)
    other = tiny()
    with torch.no_grad():
        other.get_parameter("fc2.bias").add_(1)
    assert "fc2.bias" in refusal(folder, float_model=other)


def test_a_quantized_model_is_no_architecture(folder: Path) -> None:
    assert "quantized already" in refusal(folder, model=tiny_qmodel())
    assert "quantized already" in refusal(folder, float_model=tiny_qmodel())


# -- random damage -------------------------------------------------------------------------------------------


def flip(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice([schema.CONFIG, schema.TENSORS])
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def cut(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice([schema.CONFIG, schema.TENSORS])
    data = path.read_bytes()
    start = draw.randrange(len(data))
    path.write_bytes(data[:start] + data[start + draw.randrange(1, 200) :] if draw.random() < 0.5 else data[:start])


def change_json(folder: Path, draw: random.Random) -> None:
    """One value anywhere in config.json, and the digest made right."""
    data: dict[str, Any] = json.loads((folder / schema.CONFIG).read_text())
    data.pop("digest")
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(data)
    node, key = draw.choice(spots)
    if draw.random() < 0.3:
        del node[key]
    else:
        node[key] = draw.choice([None, 0, -1, 3, 2**40, 10**30, 0.5, "", "x", [], {}, [None], {"a": 1}, True, "\ud800"])
    (folder / schema.CONFIG).write_text(json.dumps(data | {"digest": schema._digest(data)}))


def flip_signed(folder: Path, draw: random.Random) -> None:
    """Flip bits in the header of the tensors, and make the digest right."""
    path = folder / schema.TENSORS
    data = bytearray(path.read_bytes())
    data[draw.randrange(int.from_bytes(data[:8], "little") + 8)] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    edit_config(folder, lambda d: d.update(tensors_sha256=schema.sha256_of(path)))


@pytest.mark.parametrize("damage", [flip, cut, change_json, flip_signed])
def test_random_damage_gives_one_error_or_the_identical_model(
    saved: Path, tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    expected = outputs(vitq.load(saved, model=tiny()), TINY_IN)
    refused = 0
    for number in range(ROUNDS // 4):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damage(folder, random.Random(number))
        with suppress(ArtifactError):
            inspect_artifact(folder, Say())
        try:
            again = vitq.load(folder, model=tiny())
        except ArtifactError:
            refused += 1
            continue
        found = outputs(again, TINY_IN)
        if damage is flip_signed and not torch.equal(found, expected):
            # A forged name or place of a tensor that fits as well; everything but the numbers was checked.
            assert found.shape == expected.shape
            continue
        assert torch.equal(found, expected), number
    assert refused > ROUNDS // 16
