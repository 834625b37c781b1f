"""Makes the quantizer known to transformers, whichever of the two is imported first, and imports nothing by itself.

transformers finds quantizers in a dictionary of one of its modules and has no plug-ins. If that module is loaded, the
quantizer is put there at once. Otherwise a finder waits for it to be imported, lets the usual machinery load it, and
puts the quantizer there right after. The finder looks at one name, and goes when that has come.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODULE = "transformers.quantizers.auto"


def install() -> None:
    """Register now, or when transformers is imported."""
    if MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        usual = loader.exec_module

        def load(module: ModuleType) -> None:
            try:
                usual(module)
            except BaseException:
                install()  # it may be imported again
                raise
            _register()

        loader.exec_module = load
        return spec


def _register() -> None:
    try:
        from transformers.quantizers.auto import (
            AUTO_QUANTIZER_MAPPING,
            register_quantization_config,
            register_quantizer,
        )
    except ImportError:  # older than 5, which the extra `hf` excludes; whoever uses it otherwise must not notice
        return
    from vitq.artifact.wrapped import METHOD
    from vitq.export.hf_quantizer import VitqConfig, VitqHfQuantizer

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(VitqConfig)
        register_quantizer(METHOD)(VitqHfQuantizer)
