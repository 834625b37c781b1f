"""What an export asks of a runtime: to run a file, and to say what it multiplies in whole numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from vitq.core.errors import ExportError, MissingExtraError

Products = dict[str, dict[str, int]]


class Session(Protocol):
    """A model in a runtime on the CPU, with as many threads as torch has.

    Attributes:
        inputs: their names, in order.
    """

    inputs: list[str]

    def run(self, feeds: dict[str, Any]) -> dict[str, Tensor]:
        """All outputs by name.

        Raises:
            ExportError: the runtime cannot run the model.
        """


class Runtime(Protocol):
    """One runtime.

    Attributes:
        name: as people call it.
        extra: of vitq, which installs what is needed.
        packages: what is imported.
    """

    name: str
    extra: str
    packages: tuple[str, ...]

    def session(self, data: bytes | str, *, plain: bool = False) -> Session:
        """Load a file.

        Args:
            data: its bytes, or its path.
            plain: leave the graph as it is.

        Raises:
            ExportError: the runtime cannot load it.
        """

    def count_products(self, data: bytes | str, batch: Any) -> Products:
        """Matrix products of the graph that is run: what it calls them -> how many, in `whole` numbers and in `float`.

        Args:
            batch: one input, for a runtime that chooses kernels when it knows shapes.
        """


def runtime_named(name: str) -> Runtime:
    """The runtime of a profile, `ort` or `openvino`; its packages are not imported yet."""
    if name == "openvino":
        from vitq.export.runtime_openvino import OpenVino

        return OpenVino()
    from vitq.export.runtime_ort import OnnxRuntime

    return OnnxRuntime()


def need_packages(runtime: Runtime) -> None:
    """Refuse to begin without the packages of a runtime's extra.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    import importlib

    for name in runtime.packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError(name, runtime.extra, f"exporting for {runtime.name}") from error


@contextmanager
def told_by(runtime: str) -> Iterator[None]:
    """Errors of a runtime, of which there are many kinds and no common one, as one line."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # OpenVINO begins with where in its sources it failed, and marks what failed with dashes.
        told = [line for line in lines if not line.startswith(("Exception from", "Check '"))] or lines
        line = next((line for line in told if line.startswith("-- ")), told[0]).removeprefix("-- ")
        raise ExportError(f"{runtime} cannot run the exported model: {line}") from error


def feeds_of(session_inputs: Sequence[str], batch: Any) -> dict[str, Any]:
    """What to feed for one input of the model: its tensors, in order, to the inputs that are the model's own."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return {name: tensor.cpu().numpy() for name, tensor in zip(session_inputs, tensors, strict=False)}
