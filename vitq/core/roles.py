"""What a quantized tensor is for. An open set: a trace may give further names, recipes select by predicate."""

from __future__ import annotations

WEIGHT = "WEIGHT"  # parameter operand of a linear, convolution or matmul
PATCH_IN = "PATCH_IN"  # the image (or what no matrix product has touched yet) entering the patch embedding
QKV_IN = "QKV_IN"  # input of a projection whose output is a query, key or value
QUERY = "QUERY"
KEY = "KEY"
SCORES = "SCORES"  # attention logits, before softmax; a site where a product mixes them over heads
SOFTMAX_OUT = "SOFTMAX_OUT"
SOFTMAX_MIX = "SOFTMAX_MIX"  # probabilities mixed over heads (talking heads): they may be negative
VALUE = "VALUE"
PROJ_IN = "PROJ_IN"  # attention output entering a linear
FC1_IN = "FC1_IN"  # input of a linear that feeds an activation function
FC2_IN = "FC2_IN"  # output of an activation function entering a linear; the site's producer names it
MERGE_IN = "MERGE_IN"  # several tokens side by side entering a linear (Swin merging), normalised or not (SwinV2)
NORM_IN = "NORM_IN"
RESIDUAL = "RESIDUAL"
HEAD_IN = "HEAD_IN"  # input of the last linear before the model's output
LOGITS = "LOGITS"
CONV_IN = "CONV_IN"  # input of a convolution that is not the first
OTHER_IN = "OTHER_IN"

MEANING = {
    WEIGHT: "parameter of a linear, convolution or matmul",
    PATCH_IN: "image entering the patch embedding",
    QKV_IN: "input of a query/key/value projection",
    QUERY: "query operand of the score product",
    KEY: "key operand of the score product",
    SCORES: "attention logits before softmax",
    SOFTMAX_OUT: "attention probabilities",
    SOFTMAX_MIX: "attention probabilities mixed over heads",
    VALUE: "value operand",
    PROJ_IN: "attention output entering its projection",
    FC1_IN: "input of a linear that feeds an activation function",
    FC2_IN: "activation function's output entering a linear",
    MERGE_IN: "merged tokens entering a linear",
    NORM_IN: "input of a LayerNorm",
    RESIDUAL: "residual stream",
    HEAD_IN: "input of the classifier",
    LOGITS: "model output",
    CONV_IN: "input of a later convolution",
    OTHER_IN: "any other matrix operand",
}

ACTIVATIONS = tuple(role for role in MEANING if role != WEIGHT)
