"""A file that computes something else is noticed, and the site is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vitq.core.errors import ExportError
from vitq.export import onnx as export_module
from vitq.export.compare import FAR, AtSite, Steps
from vitq.export.forced import shown_values
from vitq.export.onnx import export_onnx
from vitq.export.parity import predictions
from vitq.quantizers.log import Log2Quantizer
from vitq.quantizers.twin_uniform import TwinSoftmaxQuantizer

from .conftest import Small

QKV, PROJ, FC2 = "blocks.0.attn.qkv:linear0.input", "blocks.0.attn.proj:linear0.input", "blocks.0.mlp.fc2:linear0.input"
SOFTMAX, FC1_WEIGHT = "blocks.0.attn:sdpa0.softmax", "blocks.0.mlp.fc1:linear0.weight"


def broken(data: bytes, name: str, change: Callable[[Any], Any]) -> bytes:
    """The file with one initializer changed."""
    import onnx

    model = onnx.load_from_string(data)
    (found,) = (i for i in model.graph.initializer if i.name == name)
    array = onnx.numpy_helper.to_array(found)
    found.CopyFrom(onnx.helper.make_tensor(name, found.data_type, array.shape, change(array.copy()).flatten().tolist()))
    return model.SerializeToString()


def test_the_file_as_it_is_holds(either: Small) -> None:
    parity = either.check(either.data)
    assert all(site.holds for site in parity.sites)
    assert (parity.images, parity.data) == (8, "these")
    activations = [s for s in either.qmodel.sites() if not either.qmodel.quantizers[s].baked]
    assert sorted(site.site for site in parity.sites) == sorted(site.id for site in activations), "every site"
    assert parity.sites[0].site == "patch_embed.proj:conv0.input", "in the order of execution"
    assert sum(site.codes for site in parity.sites) == 8 * sum(torch.Size(s.shape).numel() for s in activations)


@pytest.mark.parametrize("site", [QKV, PROJ, FC2])
@pytest.mark.parametrize("factor", [1.02, 0.5])
def test_a_changed_scale_names_its_site(either: Small, site: str, factor: float) -> None:
    data = broken(either.data, f"{site}/scale", lambda scale: scale * np.float32(factor))
    with pytest.raises(ExportError, match=f"first at {site}"):
        either.check(data)


def test_a_changed_zero_point_names_its_site(either: Small) -> None:
    data = broken(either.data, f"{FC2}/zero_point", lambda zero_point: zero_point + 1)
    with pytest.raises(ExportError, match=f"first at {FC2}"):
        either.check(data)


def test_a_changed_threshold_names_its_site(either: Small) -> None:
    data = broken(either.data, f"{SOFTMAX}/thresholds", lambda x: x * np.float32(1.05))
    with pytest.raises(ExportError, match=f"first at {SOFTMAX}"):
        either.check(data)


def test_a_level_that_is_none_names_its_site(either: Small) -> None:
    data = broken(either.data, f"{SOFTMAX}/levels", lambda x: x * np.float32(1.0001))
    with pytest.raises(ExportError, match=rf"first at {SOFTMAX}.*more than there are levels"):
        either.check(data)


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_a_changed_weight_is_named(either: Small, part: str) -> None:
    def change(x: Any) -> Any:
        x.flat[0] = x.flat[0] * 2 if part == "scale" else (0 if x.flat[0] else 1)
        return x

    with pytest.raises(ExportError, match=f"weight at {FC1_WEIGHT}"):
        either.check(broken(either.data, f"{FC1_WEIGHT}/{part}", change))


def test_a_changed_bias_shows_at_the_next_site(either: Small) -> None:
    data = broken(either.data, "blocks.0.mlp.fc1.bias", lambda bias: bias + 0.2)
    with pytest.raises(ExportError, match=f"first at {FC2}"):
        either.check(data)


def test_a_change_behind_the_last_site_shows_in_the_output(either: Small) -> None:
    data = broken(either.data, "head.bias", lambda bias: bias + 0.01)
    with pytest.raises(ExportError, match=r"output .* behind the last site, head:linear0.input"):
        either.check(data)


def test_a_failed_export_leaves_the_old_file(small: Small, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, *rest: Any) -> None:
        lower(model, *rest)
        import onnx_ir

        value = model.graph.initializers[f"{QKV}/scale"]
        value.const_value = onnx_ir.tensor(value.const_value.numpy() * np.float32(1.1), name=value.name)

    lower = export_module.lower_marks
    monkeypatch.setattr(export_module, "lower_marks", wrong)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=QKV):
        export_onnx(small.qmodel, path, data=small.images)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_file_that_does_not_run_is_one_line(either: Small) -> None:
    import onnx

    model = onnx.load_from_string(either.data)
    model.graph.node[-1].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=f"{either.made.runtime} cannot run"):
        either.check(model.SerializeToString())


def test_every_mark_of_a_site_says_whose_it_is(small: Small) -> None:
    import onnx

    shown = shown_values(onnx.load_from_string(small.data))
    assert {value.site for value in shown} == {site.id for site in small.qmodel.sites()}


def test_steps_count_levels_that_can_be_reached() -> None:
    quantizer = TwinSoftmaxQuantizer(3)
    quantizer.set_params({"scale": torch.tensor(0.3), "shift": torch.tensor(1.0)})
    x = torch.linspace(0, 1, 2001)[None]
    values = quantizer.quantized(x)
    levels = values.unique()
    at = AtSite(quantizer, None, levels[:-1][None])
    assert Steps().apart(at, levels[1:][None]).unique().tolist() == [1], (
        "neighbours are one step apart, codes unused or not"
    )
    assert Steps().apart(at, levels[:-1][None] + 1e-3).unique().tolist() == [FAR]


def test_descending_codes_are_steps_apart_as_well() -> None:
    quantizer = Log2Quantizer(4)
    quantizer.set_params({"scale": torch.tensor(1.0)})
    at = AtSite(quantizer, None, torch.tensor([1.0, 0.5, 2.0**-14, 0.0]))
    assert Steps().apart(at, torch.tensor([0.5, 0.5, 0.0, 0.25])).tolist() == [1, 0, 1, 13]


def test_predictions_are_taken_along_the_classes() -> None:
    assert predictions(torch.tensor([[0.0, 2.0], [3.0, 1.0]])).tolist() == [1, 0]
    assert predictions({"logits": torch.zeros(2, 3, 4, 4)}).shape == (32,)
