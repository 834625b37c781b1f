"""Models by name, their records and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitq.core.errors import ArtifactError, CheckpointError, InputError, MissingExtraError, UnknownNameError
from vitq.data import families, families_hf, hub
from vitq.data.preprocess import Preprocess
from vitq.data.source import build_model, check_finite, load_model

TINY = "vit_tiny_patch16_224"


def tiny_hf(folder: Path, **changes: object) -> Path:
    """A folder as save_pretrained leaves it, with a one-block ViT of 5 classes."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'hf')")
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 5,
    }
    config = transformers.ViTConfig(**settings | changes)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_timm_model_is_built_again_from_its_json_record() -> None:
    loaded = load_model(f"{TINY}.augreg_in21k_ft_in1k", pretrained=False, num_classes=7)
    assert loaded.num_classes == 7
    assert not loaded.model.training
    assert loaded.preprocess is not None
    assert loaded.preprocess.mean == (0.5, 0.5, 0.5)
    again = build_model(json.loads(json.dumps(loaded.source)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in loaded.model.state_dict().items()
    }


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_model({"kind": "timm", "name": TINY, "num_classes": 3})
    assert torch.equal(before, torch.get_rng_state())


def test_a_torchvision_model_gets_the_preset_of_its_default_weights() -> None:
    loaded = load_model("torchvision:swin_t", pretrained=False, num_classes=3)
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert loaded.preprocess is not None
    assert (loaded.preprocess.interpolation, loaded.preprocess.input_size) == ("bicubic", (3, 224, 224))
    assert build_model(json.loads(json.dumps(loaded.source)))(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_hugging_face_folder_needs_no_hub_to_load_or_to_build_again(tmp_path: Path) -> None:
    loaded = load_model(f"hf:{tiny_hf(tmp_path / 'my vit')}")
    assert loaded.num_classes == 5
    assert loaded.preprocess == Preprocess.from_image_size(32)
    text = json.dumps(loaded.source)
    assert str(tmp_path) not in text, "the record must not name folders of this machine"
    again = build_model(json.loads(text))
    again.load_state_dict(loaded.model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(x).logits, loaded.model(x).logits)


def test_a_hugging_face_repository_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'hf')")
    folder = tiny_hf(tmp_path)
    config = transformers.ViTConfig.from_pretrained(folder)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"lack 2 tensor.*classifier"):
        load_model(f"hf:{folder}")


def test_a_zoo_model_and_a_function_of_a_file_load(tmp_path: Path) -> None:
    assert load_model("zoo:seeded_swin").num_classes == 10
    file = tmp_path / "my model.py"
    file.write_text("import torch\ndef net():\n    return torch.nn.Linear(4, 2)\n")
    loaded = load_model(f"{file}:net")
    assert loaded.preprocess is None
    source = json.loads(json.dumps(loaded.source))
    with pytest.raises(ArtifactError, match="--trust-code"):
        build_model(source)
    assert build_model(source, trust_code=True)(torch.zeros(1, 4)).shape == (1, 2)
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(ArtifactError, match="not the file it was"):
        build_model(source, trust_code=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def net():\n    return 3\n", "returned a int"),
        ("def net():\n    raise KeyError('no')\n", "KeyError"),
        ("def other():\n    pass\n", "unknown function"),
        ("def net(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_gives_no_module_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.py").write_text(text)
    with pytest.raises(InputError, match=message):
        load_model(f"{tmp_path / 'm.py'}:net")


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("deit_tiny_patch16_223", "deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224.fb_in2k", "fb_in1k"),
        ("deit_tny", "deit_tiny_patch16_224"),
        ("torchvision:vit_b_17", "vit_b_16"),
        ("zoo:seeded_vitt", "seeded_vit"),
        ("torchvison:vit_b_16", "torchvision"),
        ("qqqqqqqq", "deit_tiny"),
    ],
)
def test_an_unknown_name_comes_with_near_misses(spec: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near) as caught:
        load_model(spec, pretrained=False)
    assert len(str(caught.value)) < 500


def test_a_file_without_function_and_a_missing_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="function"):
        load_model("model.py")
    with pytest.raises(InputError, match="no file"):
        load_model(f"{tmp_path}/none.py:f")
    with pytest.raises(InputError, match="looks like a folder"):
        load_model("hf:./no_such_folder")


def test_weights_that_cannot_be_fetched_suggest_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(hub, "_reachable", lambda host, port: False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="--checkpoint"):
        load_model("vit_tiny_patch16_224")
    assert constants.HF_HUB_OFFLINE is False
    pytest.importorskip("transformers", reason="needs transformers (extra 'hf')")
    with pytest.raises(InputError, match=r"configuration.*--checkpoint"):
        load_model("hf:vitq-tests/no-such-model")


def test_a_failing_torchvision_download_suggests_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def fail(*_: object, **__: object) -> None:
        raise OSError("name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(InputError, match="--checkpoint"):
        load_model("torchvision:vit_b_16")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"vitq\[hf\]"):
        load_model("hf:some/model")


def test_contradicting_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both"):
        load_model(TINY, tmp_path / "x.pth", pretrained=True)
    with pytest.raises(InputError, match="num_classes is 0"):
        load_model(TINY, num_classes=0)
    with pytest.raises(InputError, match="10 classes"):
        load_model("zoo:seeded_vit", num_classes=11)
    with pytest.raises(CheckpointError, match="1000 classes, asked for 7"):
        load_model(TINY, num_classes=7)
    with pytest.raises(CheckpointError, match="1000 classes, asked for 7"):
        load_model("torchvision:vit_b_16", num_classes=7)


@pytest.mark.parametrize(
    "source", [{}, {"kind": "pickle"}, {"kind": "timm"}, {"kind": "zoo", "name": "gone"}, {"kind": "file"}]
)
def test_an_unusable_record_is_an_artifact_error(source: dict[str, str]) -> None:
    with pytest.raises(ArtifactError, match="model="):
        build_model(source)


def test_non_finite_weights_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"2 tensor\(s\): b, c"):
        check_finite({"a": torch.zeros(2), "b": torch.tensor([math.nan]), "c": torch.tensor([1, math.inf]).half()})
    check_finite({"a": torch.arange(3)})


def test_fail_fast_leaves_a_reachable_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "_reachable", lambda host, port: True)
    with hub.fail_fast():
        assert constants.HF_HUB_OFFLINE is False


def test_an_unreachable_host_is_found_out_quickly() -> None:
    assert not hub._reachable("no-such-host.invalid", 443)


def test_specs_split_into_kind_and_name() -> None:
    assert families.parse("hf:a/b") == ("hf", "a/b")
    assert families.parse("dir/m.py:f") == ("file", "dir/m.py:f")
    assert families.parse("C:/dir/m.py:f") == ("file", "C:/dir/m.py:f")
    assert families.parse("deit_tiny_patch16_224.fb_in1k")[0] == "timm"
    assert families_hf.Built is families.Built


@pytest.mark.real
def test_the_shared_deit_loads_and_records_its_file(shared: Path) -> None:
    file = shared / "models" / "deit_tiny_patch16_224.safetensors"
    loaded = load_model("deit_tiny_patch16_224", file)
    assert loaded.source["checkpoint"]["file"] == file.name
    assert len(loaded.source["checkpoint"]["sha256"]) == 64
    assert str(shared) not in json.dumps(loaded.source)
    assert loaded.preprocess is not None
    assert loaded.preprocess.crop_pct == 0.9
    with pytest.raises(CheckpointError, match=r"1000 classes.*built for 10"):
        load_model("deit_tiny_patch16_224", file, num_classes=10)


def test_a_checkpoint_loads_into_a_hugging_face_folder(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "a")
    state = load_model(f"hf:{folder}").model.state_dict()
    save_file({f"module.{k}": v + 1 for k, v in state.items()}, tmp_path / "w.safetensors")
    loaded = load_model(f"hf:{folder}", tmp_path / "w.safetensors")
    assert torch.equal(loaded.model.state_dict()["classifier.bias"], state["classifier.bias"] + 1)


def test_a_damaged_hugging_face_folder_says_what_it_needs(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path)
    (folder / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(InputError, match=r"weights in the folder .*config\.json and model\.safetensors"):
        load_model(f"hf:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="configuration in the folder"):
        load_model(f"hf:{folder}")


def test_a_processor_file_gives_the_preprocessing(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.1, 0.2, 0.3]}))
    loaded = load_model(f"hf:{folder}")
    assert loaded.preprocess is not None
    assert loaded.preprocess.mean == (0.1, 0.2, 0.3)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"do_resize": False}))
    assert load_model(f"hf:{folder}").preprocess is None
