"""`import vitq` imports torch and little else; heavy packages wait for the function that needs them."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"timm", "torchvision", "transformers", "datasets", "onnx", "onnxscript", "onnxruntime", "openvino"}
HEAVY |= {"matplotlib", "jinja2", "PIL", "scipy", "pyarrow", "typer", "rich", "ray", "accelerate", "pydantic"}
PROBE = """
import json, sys
import torch
before = set(sys.modules)
import vitq
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_vitq_loads_no_heavy_package() -> None:
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    loaded = {name.partition(".")[0] for name in json.loads(answer.stdout.splitlines()[-1])}
    assert not loaded & HEAVY, (
        f"`import vitq` loads {', '.join(sorted(loaded & HEAVY))}; import it inside the function "
        f"that needs it; `python -X importtime -c 'import vitq'` shows who does it."
    )
