"""On every family: which channels can change their basis, and that nothing but rounding changes when they do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
from families import Family
from families_hf import FURTHER as FURTHER_HF
from families_hf import PINNED as PINNED_HF
from families_timm import FURTHER as FURTHER_TIMM
from families_timm import PINNED as PINNED_TIMM
from families_unseen import UNSEEN

from vitq.core.batches import first_of
from vitq.graph.channels import find_channels
from vitq.passes.reparam.rotate import rewrite_of

FAMILIES = [*PINNED_TIMM, *PINNED_HF, *FURTHER_TIMM, *FURTHER_HF, *UNSEEN]
# Streams, scores and values that are found; a family that is not here has none.
FOUND = {
    "timm_vit": (1, 2, 2), "timm_deit": (1, 2, 2), "timm_deit_distilled": (1, 2, 2), "timm_swin": (1, 4, 4),
    "torchvision_vit": (1, 2, 2), "torchvision_swin": (1, 4, 4), "hf_vit_sdpa": (1, 2, 2),
    "hf_vit_eager": (1, 2, 2), "hf_swin": (1, 4, 4), "dinov2": (1, 2, 2), "dinov3": (1, 0, 2), "cait": (1, 4, 4),
    "xcit": (0, 2, 2), "pit": (0, 4, 4), "tiny_vit": (0, 4, 4), "maxvit": (1, 4, 4), "hiera": (1, 1, 4),
    "tnt": (0, 4, 4), "crossvit": (0, 5, 5), "siglip": (2, 3, 3), "transformer_encoder": (0, 2, 2),
    "hf_dinov2": (1, 2, 2), "segformer": (1, 2, 2), "clip_vision": (0, 2, 2), "clip": (0, 4, 4),
    "clip_zero_shot": (0, 4, 4), "siglip_vision": (0, 2, 2), "siglip_two_towers": (0, 4, 4), "yolos": (0, 2, 2),
    "detr": (0, 6, 6), "deit3": (1, 2, 2), "convit": (1, 2, 2), "visformer": (0, 3, 3), "mvitv2": (1, 0, 0),
    "gcvit": (0, 4, 5), "davit": (0, 2, 2), "twins_svt": (1, 4, 4), "nest": (1, 4, 4), "volo": (2, 6, 6),
    "swin_s3": (1, 4, 4), "fastvit": (0, 3, 3), "vit_relpos": (1, 2, 2), "flexivit": (1, 2, 2),
    "naflexvit": (1, 2, 2), "samvit": (2, 0, 2), "maxvit_rmlp": (1, 4, 4), "coatnet_rmlp": (3, 2, 2),
    "pvt_v2": (3, 5, 5), "mobilevit": (3, 9, 9), "efficientformer": (0, 2, 2), "aimv2": (0, 2, 2),
    "hf_vit_mae": (0, 3, 3), "hf_beit": (1, 2, 2), "hf_data2vec": (1, 2, 2), "hf_dpt": (1, 4, 4),
    "hf_glpn": (3, 4, 4), "hf_mask2former": (2, 5, 5), "hf_rt_detr": (0, 3, 3), "hf_upernet_swin": (1, 5, 5),
    "hf_pvt": (1, 2, 2), "hf_mobilevit": (3, 9, 9),
    "hf_swinv2": (0, 0, 4), "hf_dinov3": (0, 0, 2), "hf_timm_wrapper": (1, 2, 2), "hf_deit": (1, 2, 2),
    "hf_ijepa": (1, 2, 2), "hf_vitdet": (0, 0, 2), "hf_depth_anything": (1, 4, 4), "hf_owlvit_vision": (0, 2, 2),
    "hf_hiera": (1, 1, 4), "torchvision_maxvit": (1, 0, 0),
}  # fmt: skip
# What they compute in float32 whatever the type of the model (a resampled position embedding).
SINGLE = {"naflexvit"}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_all_that_is_found_can_be_rotated_and_the_output_stays(family: Family) -> None:
    model = family.build().double()
    batch = pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, family.batch()
    )
    expected = family.run(model, batch)
    found = find_channels(model, lambda m: family.forward_fn(m, first_of(batch)))
    assert (len(found.streams), len(found.scores), len(found.values)) == FOUND.get(family.name, (0, 0, 0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for number, one in enumerate((*found.scores, *found.values, *found.streams)):
        rewrite, names = rewrite_of(one, seed=number)
        rewrite.prepare(model)
        rewrite.apply(model)
        assert any(name not in before or not torch.equal(before[name], model.get_parameter(name)) for name in names)
    tolerance = 1e-6 if family.name in SINGLE else 1e-10
    for exact, got in zip(expected, family.run(model, batch), strict=True):
        assert (got - exact).abs().max() <= tolerance * exact.abs().max()
