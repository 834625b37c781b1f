"""vitq_calib: what pays among the published calibration methods, in one recipe. Our own.

Each part is somebody's, and differs from the original where the recipe that is named says so:

- channel scales behind LayerNorms, folded into them and the weights (`repq_vit`: ICCV 2023);
- logarithms to a searched base after softmax and, shifted, after GELU (`adalog`: ECCV 2024);
- every scale and base by the squared error of the product it is used in (`liu2021`: arXiv 2106.14156, `ptq4vit`: arXiv
  2111.12293), in one round over the products;
- codes of weights column by column, each making up for those before (`gptq`: ICLR 2023), and then the bias
  (`bias_correction`: arXiv 1906.04721), linear by linear on what the quantized model before gives. For both, tokens
  count by their gradients (calibrate/importance.py; the idea is GuidedQuant's, arXiv 2505.07004): a class token is one
  in two hundred.

One setting for all models and widths, chosen on DeiT-Tiny and split `ablate` (results/ablation.csv). There, with 300
photos and one calibration draw, each part of it as it was then gained in top-1 at w4a4 and w3a3, in points with 95 %
intervals: the search of scales 7.0 [2.7, 11.3] and 23.0 [17.7, 28.7]; the logarithm after GELU instead of uniform steps
7.0 [3.0, 11.3] and 14.0 [9.0, 19.0]; that after softmax instead of log sqrt 2 1.0 [-2.7, 4.7] and 12.7 [7.3, 18.0],
instead of log 2 nothing that shows; columns 2.7 [-1.0, 6.3] and 7.3 [1.7, 13.0]; biases 1.7 [-2.3, 5.7] and 6.3 [0.7,
11.7]; weighing tokens 4.0 [-0.3, 8.3] and 7.7 [2.0, 13.3]. Two parts that were in it then came out, as in three draws
they did not gain or lost: balancing channels (`balance`), and gradients in the search of scales
(`objective="hessian"`). Gradients have only half of all weight since then (docs/decisions/products.md), and lose no
longer: on two draws at w3a3 (150 photos) the divergence is 0.12 and 0.10 lower with them, and so is top-1, by 2.0 and
0.7 points, for seven to ten more float forwards, which take it beyond 30.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def vitq_calib(
    weight_bits: int,
    act_bits: int,
    softmax: str = "adaptive_log",
    gelu: str = "adaptive_log",
    balance: bool = False,
    objective: str = "mse",
    rounds: int = 1,
    steps: int = 16,
    columns: bool = True,
    biases: bool = True,
    weighted: bool = True,
) -> Recipe:
    """Folded channels, searched logarithms, scales by products, weights that make up for one another.

    Args:
        softmax: format of attention probabilities: adaptive_log, or another for one scale, such as log2.
        gelu: format behind GELU: adaptive_log, or another for one scale, such as uniform or twin_gelu.
        balance: instead of folding the channel scales behind norms as repq_vit does, balance these channels, and those
            behind attention, against the weights (`uq_vit`: NormQuant, AAAI 2026).
        objective: how scales are judged (calibrate/objective.py).
        rounds: over the operands of each product; 0 leaves scales as the first fit chose them.
        steps: ranges that are tried for each operand.
        columns: choose codes of weights column by column.
        biases: correct the biases.
        weighted: for codes of weights and for biases, tokens count by their gradients.
    """
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix")
    balanced = PassSpec.of("balance_channels", rows=128, method="minmax", flow="parallel")
    search = PassSpec.of("fit_products", objective=objective, rounds=max(rounds, 1), steps=steps)
    columns_and_biases = PassSpec.of("round_columns", weighted=weighted, biases=biases)
    folded = (roles.QKV_IN, roles.FC1_IN, roles.MERGE_IN)
    per_channel = Format("uniform", act_bits, "channel")
    searched = "adaptive_log"
    after_gelu = Format.of(gelu, act_bits, shifted=True) if gelu == searched else Format(gelu, act_bits)
    return Recipe(
        name="vitq_calib",
        paper="our own; parts from RepQ-ViT (ICCV 2023), AdaLog (ECCV 2024) and GPTQ (ICLR 2023)",
        formats=(
            Rule(Format("uniform", act_bits)),
            Rule(per_channel, roles=folded, after_norm=True),
            *((Rule(per_channel, roles=(roles.PROJ_IN,)),) if balance else ()),
            *(Rule(after_gelu, (roles.FC2_IN,), producer=name) for name in ("gelu", "quick_gelu")),
            Rule(Format(softmax, act_bits), roles=(roles.SOFTMAX_OUT,)),
            Rule(Format("uniform", 8), roles=(roles.PATCH_IN, roles.CONV_IN)),
            Rule(Format("uniform", weight_bits, "channel"), roles=(roles.WEIGHT,)),
        ),
        passes=(
            PassSpec.of("fit") if balance else fit,
            balanced if balance else PassSpec.of("fold_norm_scale"),
            fit,
            *((search,) if rounds else ()),
            *((columns_and_biases,) if columns else ()),
            *((PassSpec.of("correct_bias", weighted=weighted),) if biases and not columns else ()),
            *((PassSpec.of("fold_input_shift"),) if gelu == searched else ()),
        ),
    )
