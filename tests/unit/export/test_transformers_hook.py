"""Who imports what first, and who forgets to: in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .hf_models import quantized

LOAD = """
import torch
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
from transformers import AutoModelForImageClassification
with torch.no_grad():
    logits = AutoModelForImageClassification.from_pretrained({folder!r})(x).logits
import vitq
with torch.no_grad():
    assert torch.equal(logits, vitq.load({folder!r})(x).logits)
print("the same")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("hf") / "vit"
    quantized("vit", "repq_vit").save_pretrained(out)
    return str(out)


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize(
    "first",
    [
        "import vitq",
        "import transformers, vitq",
        "import transformers.modeling_utils, transformers.quantizers.auto, vitq",
        "from vitq import load, quantize",
        "import vitq.artifact",  # any part of it
    ],
)
def test_the_order_of_imports_does_not_matter(first: str, folder: str, tmp_path: Path) -> None:
    done = run(first + LOAD.format(folder=folder), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same"


@pytest.mark.parametrize("name", ["AutoModelForImageClassification", "AutoModel"])
def test_without_vitq_it_is_an_error_that_names_it_and_not_random_numbers(
    name: str, folder: str, tmp_path: Path
) -> None:
    done = run(f"from transformers import {name}\n{name}.from_pretrained({folder!r})", tmp_path)
    assert done.returncode != 0
    assert "Unknown quantization type, got vitq" in done.stderr
    assert "import_vitq_before_from_pretrained" in done.stderr


def test_nothing_is_left_behind_and_reloading_changes_nothing(tmp_path: Path) -> None:
    code = """
import sys, importlib, vitq
import vitq.export.transformers_hook as hook
waiting = [f for f in sys.meta_path if isinstance(f, hook._Waiting)]
assert len(waiting) == 1 and "transformers" not in sys.modules
hook.install()
assert sum(isinstance(f, hook._Waiting) for f in sys.meta_path) == 1
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found
assert not any(isinstance(f, hook._Waiting) for f in sys.meta_path)
kind = found["vitq"]
hook.install()
assert found["vitq"] is kind
import pickle, transformers.quantizers.auto as auto
assert auto.__spec__.name == "transformers.quantizers.auto"
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_import_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "auto.py").write_text(
        "import os\nif 'BROKEN' in os.environ: raise RuntimeError('broken')\nfine = True\n"
    )
    code = """
import os, sys
sys.path.insert(0, os.getcwd())
import vitq
os.environ["BROKEN"] = "1"
try:
    import transformers.quantizers.auto
except RuntimeError:
    del os.environ["BROKEN"]
import transformers.quantizers.auto as auto
assert auto.fine  # one without quantizers, as older versions are: left alone
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_python_without_transformers_does_not_notice(tmp_path: Path) -> None:
    code = """
import sys, importlib.abc
class No(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, No())
import torch, vitq
from vitq.data.zoo import build_zoo, seeded_images
from vitq.core.errors import MissingExtraError
qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax", "w8a8", seeded_images(2))
try:
    qmodel.save_pretrained("out")
except MissingExtraError as error:
    assert "vitq[hf]" in str(error)
else:
    raise AssertionError("saved")
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
