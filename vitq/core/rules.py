"""Rules that recipes share: which formats go where."""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import Rule

BEHIND_NORMS = (roles.QKV_IN, roles.FC1_IN, roles.MERGE_IN)
GELUS = ("gelu", "quick_gelu")


def uniform_but(weight_bits: int, act_bits: int, *others: Rule) -> tuple[Rule, ...]:
    """Uniform steps everywhere, but for other rules; 8 bits where images and maps enter convolutions.

    Activations have one scale for each tensor, weights one for each output channel.
    """
    return (
        Rule(Format("uniform", act_bits)),
        *others,
        Rule(Format("uniform", 8), roles=(roles.PATCH_IN, roles.CONV_IN)),
        Rule(Format("uniform", weight_bits, "channel"), roles=(roles.WEIGHT,)),
    )


def channels_behind_norms(act_bits: int) -> Rule:
    """A uniform scale for each channel behind LayerNorms, which take these scales up (pass fold_norm_scale)."""
    return Rule(Format("uniform", act_bits, "channel"), roles=BEHIND_NORMS, after_norm=True)


def behind_gelu(format: Format) -> tuple[Rule, ...]:
    """A format for what GELU makes."""
    return tuple(Rule(format, roles=(roles.FC2_IN,), producer=name) for name in GELUS)
