"""Interception: the model stays what it was, and every product of the trace is reached, and no other."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

from vitq.core.errors import InputError, TraceError
from vitq.core.qmodel import QuantModel
from vitq.graph import integer
from vitq.graph.insert import QuantizedOwner, detach
from vitq.graph.trace import trace

Plain = Callable[..., QuantModel]
Make = Callable[[Callable[..., Any]], Any]


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


# -- the model stays the user's --------------------------------------------------------------------------


def test_tree_names_classes_and_attributes_stay(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(vit, images)
    assert [n for n, _ in qmodel.model.named_modules()] == [n for n, _ in vit.named_modules()]
    assert list(qmodel.model.state_dict()) == list(vit.state_dict())
    for (_, mine), (_, theirs) in zip(qmodel.model.named_modules(), vit.named_modules(), strict=True):
        assert isinstance(mine, type(theirs))
        assert type(mine).__name__ == type(theirs).__name__
    assert qmodel.num_classes == vit.num_classes
    assert str(qmodel.model) == str(vit)


def test_the_configuration_of_a_hugging_face_model_is_reached(images: Tensor, plain: Plain) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    qmodel = plain(transformers.ViTForImageClassification(config).eval(), images)
    assert qmodel.config is qmodel.model.config
    assert qmodel.config.hidden_size == 32
    with torch.no_grad():
        plainly = qmodel(images)
        states = qmodel(images, output_hidden_states=True, return_dict=True)
    assert len(states.hidden_states) == 3
    assert torch.equal(states.logits, plainly.logits)
    detach(qmodel.model)
    run(qmodel.model, images)


def test_the_model_given_is_not_changed(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    before, weights = run(vit, images), copy.deepcopy(vit.state_dict())
    classes = [type(m) for m in vit.modules()]
    plain(vit, images, bits=3, freeze=True)
    assert [type(m) for m in vit.modules()] == classes
    assert not any("forward" in m.__dict__ for m in vit.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert all(torch.equal(w, vit.state_dict()[n]) for n, w in weights.items())
    assert torch.equal(run(vit, images), before)


def test_detach_gives_every_module_its_class_back(swin: nn.Module, images: Tensor, plain: Plain) -> None:
    expected = run(swin, images)
    model = plain(swin, images, bits=3).model
    assert not torch.equal(run(model, images), expected)
    detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in swin.modules()]
    assert not any(name.startswith("_vitq") for m in model.modules() for name in m.__dict__)
    assert torch.equal(run(model, images), expected)
    assert trace(model, images[:1]).signature() == trace(swin, images[:1]).signature()


def test_deepcopy_is_identical_and_independent(swin: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(swin, images, bits=4)
    expected = run(qmodel, images)
    other = copy.deepcopy(qmodel)
    assert torch.equal(run(other, images), expected)
    for site in other.sites():
        other.quantizers[site].scale.mul_(3)  # type: ignore[attr-defined]
    assert not torch.equal(run(other, images), expected)
    other.set_state("off")
    assert torch.equal(run(qmodel, images), expected)
    assert torch.equal(run(other, images), run(swin, images))


def test_scales_go_through_a_state_dict(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(vit, images, bits=4)
    other = plain(vit, images * 3, bits=4)
    assert not torch.equal(run(other, images), run(qmodel, images))
    other.load_state_dict(qmodel.state_dict())
    assert torch.equal(run(other, images), run(qmodel, images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes_keep_theirs(
    dtype: torch.dtype, swin: nn.Module, images: Tensor, plain: Plain, sqnr: Callable[[Tensor, Tensor], float]
) -> None:
    model, x = swin.to(dtype), images.to(dtype)
    expected = run(model, x)
    qmodel = plain(model, x)
    out = run(qmodel, x)
    assert out.dtype == dtype
    assert sqnr(expected, out) > (60 if dtype == torch.float64 else 25)
    qmodel.set_state("off")
    assert torch.equal(run(qmodel, x), expected)


def test_a_quantized_model_can_be_moved_to_float64(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(vit, images, bits=8)
    expected = run(qmodel, images)
    out = run(qmodel.to(torch.float64), images.double())
    assert out.dtype == torch.float64
    assert float((out - expected).abs().max()) < 0.2 * float(expected.abs().max())


def test_autocast_runs_the_products_in_low_precision(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(vit, images, bits=8)
    expected = run(vit, images)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(qmodel, images)
    assert out.dtype == torch.bfloat16
    assert float((out - expected).abs().max()) < 0.2 * float(expected.abs().max())


def test_gradients_reach_the_weights(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(vit, images, bits=8)
    qmodel.set_state("off")
    qmodel(images).square().sum().backward()
    vit(images).square().sum().backward()
    for (name, mine), theirs in zip(qmodel.model.named_parameters(), vit.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3)


# -- hooks and patches of the user -----------------------------------------------------------------------


def test_hooks_of_the_user_survive_and_see_the_same_calls(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    seen: list[str] = []
    vit.get_submodule("blocks.0.attn").register_forward_hook(lambda m, a, out: seen.append("after"))
    vit.get_submodule("blocks.1").register_forward_pre_hook(lambda m, a: seen.append("before"))
    qmodel = plain(vit, images)
    seen.clear()
    run(qmodel, images)
    assert seen == ["after", "before"]


@pytest.mark.parametrize("kind", ["before", "after"])
def test_products_in_a_hook_of_the_user_belong_to_the_module_around(
    kind: str, tokens: Tensor, plain: Plain, small: Make
) -> None:
    model = small(lambda m, x: m.o(m.q(x)))
    matrix = torch.randn(32, 32) / 6
    if kind == "before":
        model.q.register_forward_pre_hook(lambda m, a: (a[0] @ matrix,))
    else:
        model.q.register_forward_hook(lambda m, a, out: out @ matrix)
    qmodel = plain(model, tokens)
    assert {c.id for c in qmodel.graph.calls} == {"q:linear0", "o:linear0", ":matmul0"}
    qmodel.set_state("off")
    assert torch.equal(run(qmodel, tokens), run(model, tokens))


def test_a_forward_patched_onto_an_instance_is_the_one_that_runs(
    tokens: Tensor, plain: Plain, small: Make, sqnr: Callable[[Tensor, Tensor], float]
) -> None:
    model = small(lambda m, x: m.o(m.q(x)))

    def doubled(self: nn.Linear, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias) + x @ self.weight

    model.q.forward = types.MethodType(doubled, model.q)
    expected = run(model, tokens)
    qmodel = plain(model, tokens)
    assert {c.id for c in qmodel.graph.calls} == {"q:linear0", "q:matmul0", "o:linear0"}
    assert sqnr(expected, run(qmodel, tokens)) > 60
    assert torch.equal(run(copy.deepcopy(qmodel), tokens), run(qmodel, tokens))
    detach(qmodel.model)
    assert qmodel.model.q.forward.__func__ is doubled
    assert torch.equal(run(qmodel.model, tokens), expected)
    assert model.q.forward.__func__ is doubled


def test_a_forward_called_by_its_name_is_reached(tokens: Tensor, plain: Plain, small: Make) -> None:
    model = small(lambda m, x: m.o.forward(m.q(x)) + m.o(x))
    qmodel = plain(model, tokens, bits=3)
    assert {c.id for c in qmodel.graph.calls} == {"q:linear0", "o:linear0"}
    qmodel.set_state("off")
    assert torch.equal(run(qmodel, tokens), run(model, tokens))


def test_computed_weights_of_a_parametrization_are_quantized(tokens: Tensor, plain: Plain, small: Make) -> None:
    model = small(lambda m, x: m.q(x))
    nn.utils.parametrizations.weight_norm(model.q)
    expected = run(model, tokens)
    qmodel = plain(model, tokens, bits=3)
    assert qmodel.graph.sites["q:linear0.weight"].param is None
    out = run(qmodel, tokens)
    qmodel.set_state("off", [qmodel.graph.sites["q:linear0.weight"]])
    assert not torch.equal(run(qmodel, tokens), out)
    qmodel.set_state("off")
    assert torch.equal(run(qmodel, tokens), expected)


# -- another way than traced -----------------------------------------------------------------------------


def test_a_product_that_was_not_traced_is_an_error(tokens: Tensor, plain: Plain, small: Make) -> None:
    model = small(lambda m, x, more=False: (m.o(x) @ m.p) if not more else (m.o(x) @ m.p) @ m.p.t())
    qmodel = plain(model, tokens)
    run(qmodel, tokens)
    with pytest.raises(TraceError, match=r"matmul number 1.*did not make while it was traced"):
        run(qmodel, tokens, more=True)


def test_another_kind_of_attention_than_traced_is_an_error(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(vit, images)
    qmodel.model.get_submodule("blocks.1.attn").fused_attn = False
    with pytest.raises(TraceError, match=r"blocks\.1\.attn made a call \(matmul number 0\)"):
        run(qmodel, images)


def test_self_attention_used_as_cross_attention_is_an_error(plain: Plain, small: Make, tokens: Tensor) -> None:
    model = small(lambda m, x, y=None: m.attention(x, x if y is None else y, x if y is None else y)[0])
    model.attention = nn.MultiheadAttention(32, 4, batch_first=True)
    model.eval()
    qmodel = plain(model, tokens)
    with pytest.raises(TraceError, match=r"operand '[qk]_input' that it did not have"):
        run(qmodel, tokens, tokens.flip(0))


def test_excluded_operands_stay_float_without_an_error(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    everything = plain(vit, images, bits=3)
    qmodel = plain(vit, images, bits=3, exclude=["role=SOFTMAX_OUT", "blocks.0"])
    assert not any("blocks.0" in s or s.endswith("softmax") for s in qmodel.quantizers)
    assert not torch.equal(run(qmodel, images), run(everything, images))


# -- inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dict", "tuple", "forward_fn", "batches"])
def test_models_are_called_as_the_user_calls_them(
    kind: str, tokens: Tensor, plain: Plain, small: Make, sqnr: Callable[[Tensor, Tensor], float]
) -> None:
    model = small(lambda m, x, scale=None: m.o(F.gelu(m.q(x) * (1 if scale is None else scale))))
    scale = torch.rand(2, 16, 1) + 0.5
    expected = run(model, tokens, scale)
    given: dict[str, tuple[Any, dict[str, Any]]] = {
        "dict": ({"x": tokens, "scale": scale}, {}),
        "tuple": ((tokens, scale), {}),
        "batches": ([{"x": tokens[i : i + 1], "scale": scale[i : i + 1]} for i in range(2)], {}),
        "forward_fn": (
            {"pixels": tokens, "extra": {"scale": scale}},
            {"forward_fn": lambda m, b: m(b["pixels"], scale=b["extra"]["scale"])},
        ),
    }
    data, kwargs = given[kind]
    qmodel = plain(model, data, **kwargs)
    assert {c.id for c in qmodel.graph.calls} == {"q:linear0", "o:linear0"}
    assert sqnr(expected, run(qmodel, tokens, scale)) > 60


def test_inputs_that_forward_fn_makes_count_as_inputs(small: Make) -> None:
    model = small(lambda m, x: m.o(m.q(x)))
    graph = trace(model, ["no", "tensors"], lambda m, batch: m(torch.ones(len(batch), 4, 32)))
    assert not any(c.reason for c in graph.calls)


def test_a_model_without_products_is_refused(plain: Plain, small: Make, tokens: Tensor) -> None:
    model = small(lambda m, x: x.softmax(-1))
    assert trace(model, tokens).calls == ()
    with pytest.raises(InputError, match="computes no matrix product"):
        plain(model, tokens)


def test_an_example_that_does_not_fit_says_what_was_given(vit: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"VisionTransformer does not run on the example \(1, 3, 20, 20\) float32"):
        trace(vit, torch.zeros(1, 3, 20, 20))
    assert not any("forward" in m.__dict__ for m in vit.modules())


def test_a_list_of_images_is_one_input_and_a_classifier_says_so(vit: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"a classifier takes torch\.stack\(images\)"):
        trace(vit, [torch.zeros(3, 16, 16), torch.zeros(3, 16, 16)])


# -- export and compile ----------------------------------------------------------------------------------


SHALLOW: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=10),
    # Two blocks: the second has shifted, masked windows.
    "swin": lambda: SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=10
    ),
    "mha": lambda: TorchvisionViT(32, 8, 1, 2, 32, 64, num_classes=10),
}
# torch gives this warning for every mode that a forward enters.
MODE_WARNING = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")


@MODE_WARNING
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("which", SHALLOW)
def test_export_with_a_dynamic_batch_gives_identical_outputs(which: str, strict: bool, plain: Plain) -> None:
    model = SHALLOW[which]().eval()
    images = torch.randn(3, 3, *((16, 16) if which == "swin" else (32, 32)))
    qmodel = plain(model, images, bits=4, freeze=True).requires_grad_(False)
    program = torch.export.export(
        qmodel, (images,), dynamic_shapes={"args": ({0: torch.export.Dim("batch", min=2, max=64)},)}, strict=strict
    ).module()
    for batch in (images, images.repeat(3, 1, 1, 1)[:7]):
        assert torch.equal(run(program, batch), run(qmodel, batch))


@pytest.mark.parametrize("which", SHALLOW)
def test_compile_of_the_full_graph_gives_identical_outputs(
    which: str, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer, "_AVAILABLE", False)  # those agree to float precision only: test_integer.py
    model = SHALLOW[which]().eval()
    images = torch.randn(3, 3, *((16, 16) if which == "swin" else (32, 32)))
    qmodel = plain(model, images, bits=4, freeze=True).requires_grad_(False)
    expected = run(qmodel, images)
    torch._dynamo.reset()
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, images), expected)


@MODE_WARNING
def test_export_goes_through_masks_and_unsupported_calls(plain: Plain, small: Make, tokens: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        mask = torch.ones(16, 16, dtype=torch.bool).tril()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return m.o(out) + torch.einsum("bnc,cd,ed->bne", x, m.p, m.p)

    qmodel = plain(small(forward), tokens, freeze=True).requires_grad_(False)
    expected = run(qmodel, tokens)
    assert [c.reason for c in qmodel.graph.calls if c.op == "einsum"] == ["unsupported"]
    for strict in (False, True):
        program = torch.export.export(qmodel, (tokens,), strict=strict)
        torch.testing.assert_close(run(program.module(), tokens), expected, atol=1e-6, rtol=1e-6)


# -- frozen ----------------------------------------------------------------------------------------------


def test_freezing_changes_nothing_where_weights_are_tied_or_used_elsewhere(
    plain: Plain, small: Make, tokens: Tensor
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        tied = F.linear(m.q(x), m.q.weight) @ m.q.weight
        looked_up = F.embedding(torch.tensor([0, 1]), m.k.weight)
        return m.k(tied) + looked_up.sum(0)

    qmodel = plain(small(forward), tokens, bits=3)
    assert qmodel.graph.sites["k:linear0.weight"].param is None  # its values are read as they are, too
    weights = [s for s in qmodel.sites("WEIGHT") if s.param == "q.weight"]
    assert [s.id for s in weights] == ["q:linear0.weight"]
    before = run(qmodel, tokens)
    assert torch.equal(run(qmodel.freeze(), tokens), before)


def test_owners_hold_their_quantizers_beside_the_module_tree(vit: nn.Module, images: Tensor, plain: Plain) -> None:
    qmodel = plain(vit, images)
    owners = {n for n, m in qmodel.model.named_modules() if isinstance(m, QuantizedOwner)}
    assert owners == {c.owner for c in qmodel.graph.calls}
    assert not any("quantiz" in n for n, _ in qmodel.model.named_parameters())
