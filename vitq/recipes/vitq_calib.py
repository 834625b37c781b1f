"""vitq_calib: what pays among the published calibration methods, in one recipe. Our own.

Each part is somebody's, and differs from the original where the recipe that is named says so:

- channel scales behind LayerNorms, folded into them and the weights (`repq_vit`: ICCV 2023);
- logarithms to a searched base after softmax and, shifted and up to 6 bits, after GELU (`adalog`: ECCV 2024); beyond,
  two ranges there (`ptq4vit`: arXiv 2111.12293);
- every scale and base by the squared error of the product it is used in (`liu2021`: arXiv 2106.14156, `ptq4vit`: arXiv
  2111.12293), in two rounds over the operands;
- codes of weights column by column, each making up for those before (`gptq`: ICLR 2023), and then the bias
  (`bias_correction`: arXiv 1906.04721), linear by linear on what the quantized model before gives. For both, tokens
  count by their gradients (calibrate/importance.py; the idea is GuidedQuant's, arXiv 2505.07004): a class token is one
  in two hundred.

One setting for all models and widths, chosen on DeiT-Tiny and split `ablate` (results/ablation.csv): 300 photos, rows
paired with the whole recipe. In one draw of calibration photos, each part lowers the divergence from the float model at
w4a4 and w3a3, in nats of 0.34 and 1.86 that are left, with 95 % intervals: the search of scales by 0.18 [0.13, 0.24]
and 1.29 [1.16, 1.42]; the logarithm after GELU instead of uniform steps by 0.21 [0.16, 0.25] and 0.68 [0.59, 0.78],
instead of twin ranges by 0.07 [0.04, 0.10] and 0.36 [0.28, 0.45]; that after softmax instead of log sqrt 2 by -0.03
[-0.07, 0.00] and 0.79 [0.68, 0.91], instead of log 2 by 0.01 [-0.02, 0.04] and 0.08 [0.01, 0.15]; columns by 0.03
[0.00, 0.06] and 0.53 [0.44, 0.61]; weighing tokens by 0.04 [0.01, 0.08] and 0.73 [0.64, 0.82]. Biases show nothing:
-0.02 [-0.06, 0.01] and 0.09 [-0.01, 0.18]. In top-1 the search gains 8.7 [4.0, 13.3] and 27.7 [21.7, 33.7] points. At
w8a8 the divergence is 0.0035; with the logarithm after GELU it is higher by 0.0045 [0.0034, 0.0056], with uniform
steps behind softmax by 0.0018 [0.0012, 0.0024]. At w6a6 it is 0.0238; two ranges after GELU raise it by 0.0053 [0.0018,
0.0089].

The CIFAR-10 probe (a linear head on the same model, 1,000 test images, w4a4, one draw; results/cifar10_probe.csv)
agrees: 71.7 % of 77.4 in float, and in points less without the search 6.3 [3.5, 9.2], without columns 3.8 [1.2, 6.4],
with uniform steps after GELU 3.3 [0.6, 6.0], with twin ranges there 2.5 [-0.1, 5.2], without weighing tokens 1.6 [-0.9,
4.2], with log 2 after softmax 1.4 [-1.0, 3.8]; log sqrt 2 there and gradients in the search are level.

Two rounds of 32 ranges instead of one of 16 lower the divergence at w3a3 by 0.13 [0.04, 0.22], 0.20 [0.11, 0.29] and
0.10 [0.03, 0.18] in three draws, and change it at w4a4 by 0.03 [0.00, 0.07], -0.03 [-0.06, 0.00] and -0.01 [-0.04,
0.02].

What is left out: balancing channels (`balance`: -0.01 [-0.05, 0.02] and 0.10 [0.01, 0.19]), gradients in the search of
scales (`objective="hessian"`: -0.04 [-0.07, 0.00] and 0.09 [0.00, 0.18], for half as many float forwards again), and
weights that make up for quantized inputs (`absorb=0.3`: in three draws -0.04, 0.00 and -0.01 at w4a4, -0.22, 0.05 and
-0.05 at w3a3, two of these six beyond their interval; for two or three float forwards more).
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import behind_gelu, channels_behind_norms, uniform_but

LOG_BITS = 6  # beyond, steps of a logarithm are coarser where values are large than those of two ranges


@recipe
def vitq_calib(
    weight_bits: int,
    act_bits: int,
    softmax: str = "adaptive_log",
    gelu: str = "auto",
    balance: bool = False,
    objective: str = "mse",
    rounds: int = 2,
    steps: int = 32,
    columns: bool = True,
    absorb: float = 0.0,
    biases: bool = True,
    weighted: bool = True,
) -> Recipe:
    """Folded channels, searched logarithms, scales by products, weights that make up for one another.

    Args:
        softmax: format of attention probabilities: adaptive_log, or another for one scale, such as log2.
        gelu: format behind GELU: adaptive_log, or another for one scale, such as uniform or twin_gelu; auto is
            adaptive_log up to 6 bits and twin_gelu beyond.
        balance: instead of folding the channel scales behind norms as repq_vit does, balance these channels, and those
            behind attention, against the weights (`uq_vit`: NormQuant, AAAI 2026).
        objective: how scales are judged (calibrate/objective.py).
        rounds: over the operands of each product; 0 leaves scales as the first fit chose them.
        steps: ranges that are tried for each operand.
        columns: choose codes of weights column by column.
        absorb: before that, weights make up for what quantizing their inputs loses (`erq`: arXiv 2407.06794, Aqer): the
            ridge; 0 for not at all.
        biases: correct the biases.
        weighted: for codes of weights and for biases, tokens count by their gradients.
    """
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix")
    balanced = PassSpec.of("balance_channels", rows=128, method="minmax", flow="parallel")
    search = PassSpec.of("fit_products", objective=objective, rounds=max(rounds, 1), steps=steps)
    columns_and_biases = PassSpec.of("round_columns", weighted=weighted, biases=biases, absorb=absorb)
    per_channel = Format("uniform", act_bits, "channel")
    searched = "adaptive_log"
    if gelu == "auto":
        gelu = searched if act_bits <= LOG_BITS else "twin_gelu"
    after_gelu = Format.of(gelu, act_bits, shifted=True) if gelu == searched else Format(gelu, act_bits)
    return Recipe(
        name="vitq_calib",
        paper="our own; parts from RepQ-ViT (ICCV 2023), AdaLog (ECCV 2024) and GPTQ (ICLR 2023)",
        formats=uniform_but(
            weight_bits,
            act_bits,
            channels_behind_norms(act_bits),
            *((Rule(per_channel, roles=(roles.PROJ_IN,)),) if balance else ()),
            *behind_gelu(after_gelu),
            Rule(Format(softmax, act_bits), roles=(roles.SOFTMAX_OUT,)),
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
