"""vitq makes Vision Transformers low-bit, for real.

qmodel = vitq.quantize(model, "repq_vit", bits="w4a4", data=images)
vitq.save(qmodel, "out/")
qmodel = vitq.load("out/")
vitq.export_onnx(qmodel, "model.onnx")
vitq.export_to(qmodel, "hf", "folder/")
"""

from vitq.artifact import load as load
from vitq.artifact import save as save
from vitq.core.errors import VitqError as VitqError
from vitq.core.format import Format as Format
from vitq.core.qmodel import QuantModel as QuantModel
from vitq.core.recipe import Modifier as Modifier
from vitq.core.recipe import PassSpec as PassSpec
from vitq.core.recipe import Recipe as Recipe
from vitq.core.recipe import Rule as Rule
from vitq.core.recipe import modifier as modifier
from vitq.core.recipe import recipe as recipe
from vitq.core.target import export_to as export_to
from vitq.core.training import Training as Training
from vitq.core.version import __version__ as __version__
from vitq.export import export_onnx as export_onnx
from vitq.export import export_openvino as export_openvino
from vitq.export import transformers_hook as _transformers_hook
from vitq.pipeline import quantize as quantize

_transformers_hook.install()
