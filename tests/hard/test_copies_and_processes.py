"""Copies of a quantized model, in this process and in others; DistributedDataParallel around it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core.qmodel import QuantModel
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace

CALIB, UNSEEN = seeded_images(8), seeded_images(4, seed=1)

# One of two processes: DDP around a model in training, on its own half of the images.
WORKER = """
import os
import sys
import torch
import torch.distributed as dist
import vitq
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vitq.data.zoo import build_zoo, seeded_images

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
images = seeded_images(8)


def both(tensor):
    found = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(found, tensor.contiguous())
    return found


frozen = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", images)
expected = frozen(images)
mine = DistributedDataParallel(frozen)(images)
assert torch.equal(mine, expected), "the wrapper changes nothing"

qmodel = vitq.quantize(build_zoo("seeded_vit"), "minmax", "w4a4", images, freeze=False)
for quantizer in qmodel.quantizers.values():
    quantizer.learn()
alone = dict(qmodel.named_parameters())
qmodel(images[:4]).square().mean().backward()
first = {name: p.grad.clone() for name, p in alone.items() if p.grad is not None}
qmodel.zero_grad()
qmodel(images[4:]).square().mean().backward()
second = {name: p.grad.clone() for name, p in alone.items() if p.grad is not None}
qmodel.zero_grad()

wrapped = DistributedDataParallel(qmodel)
wrapped(images[4 * rank : 4 * rank + 4]).square().mean().backward()
learned = [name for name in first if name.startswith("quantizers.")]
assert learned and len(learned) < len(first)
for name, parameter in alone.items():
    a, b = both(parameter.grad)
    assert torch.equal(a, b), f"{name}: gradients differ between the processes"
    torch.testing.assert_close(a, (first[name] + second[name]) / 2, rtol=1e-3, atol=1e-5)
torch.optim.SGD(wrapped.parameters(), lr=1e-4).step()
for name, parameter in alone.items():
    a, b = both(parameter.data)
    assert torch.equal(a, b), f"{name}: parameters differ after a step"
dist.barrier()
dist.destroy_process_group()
print("done", rank, flush=True)
os._exit(0)  # at the end of the interpreter, threads of the process group now and then abort
"""


def test_ddp_runs_the_model_and_shares_its_gradients(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKER, str(rank), str(tmp_path / "meeting")],
                         stdout=pipe, stderr=pipe, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank, worker in enumerate(workers):
            out, err = worker.communicate(timeout=240)
            assert worker.returncode == 0, err[-2000:]
            assert f"done {rank}" in out
    finally:
        for worker in workers:
            worker.kill()


def pickled(qmodel: QuantModel) -> QuantModel:
    again = pickle.loads(pickle.dumps(qmodel))
    assert isinstance(again, QuantModel)
    return again


def saved_whole(qmodel: QuantModel) -> QuantModel:
    file = io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)  # what the test itself has written
    assert isinstance(again, QuantModel)
    return again


def twice(qmodel: QuantModel) -> QuantModel:
    return pickled(copy.deepcopy(pickled(qmodel)))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole, twice])
@pytest.mark.parametrize("freeze", [True, False])
def test_a_copy_computes_the_same_and_shares_nothing(
    copied: Callable[[QuantModel], QuantModel], freeze: bool, tmp_path: Path
) -> None:
    qmodel = vitq.quantize(build_zoo("seeded_swin"), "repq_vit", "w4a4", CALIB, freeze=freeze)
    twin = copied(qmodel)
    with torch.no_grad():
        expected = qmodel(UNSEEN)
        assert torch.equal(twin(UNSEEN), expected)
        assert (twin.plan, twin.formats, twin.frozen) == (qmodel.plan, qmodel.formats, qmodel.frozen)
        for parameter in (*twin.model.parameters(), *twin.quantizers.buffers()):
            parameter.mul_(1.1)
        assert not torch.equal(twin(UNSEEN), expected)
        assert torch.equal(qmodel(UNSEEN), expected)
    assert {type(m).__name__ for m in twin.model.modules()} == {type(m).__name__ for m in qmodel.model.modules()}
    if freeze:
        vitq.save(copied(qmodel), tmp_path / "o")
        assert torch.equal(vitq.load(tmp_path / "o", model=build_zoo("seeded_swin"))(UNSEEN), expected)


def test_a_copy_is_read_by_another_process(tmp_path: Path) -> None:
    """There no model has been quantized yet, so the owners' classes must be made again."""
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", CALIB)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((qmodel, UNSEEN, qmodel(UNSEEN).detach())))
    code = (
        "import pickle, sys, torch; qmodel, x, y = pickle.load(open(sys.argv[1], 'rb')); "
        "assert torch.equal(qmodel(x), y); pickle.dumps(qmodel); print('same')"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pkl")],
                           capture_output=True, text=True, check=False, timeout=240)  # fmt: skip
    assert found.stdout == "same\n", found.stderr[-2000:]


def test_a_traced_model_is_copied_as_if_nothing_had_happened() -> None:
    model = build_zoo("seeded_swin")
    expected = model(UNSEEN)
    trace(model, CALIB[:1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(UNSEEN), expected)
        assert trace(twin, CALIB[:1]).signature() == trace(model, CALIB[:1]).signature()


def test_a_model_that_says_how_it_is_pickled_is_asked() -> None:
    class_state: list[str] = []

    class Talkative(nn.Linear):
        def __getstate__(self) -> dict[str, object]:
            class_state.append("asked")
            return dict(self.__dict__)

    qmodel = vitq.quantize(nn.Sequential(Talkative(6, 6)), "minmax", "w8a8", torch.randn(4, 6))
    x: Tensor = torch.randn(3, 6)
    assert torch.equal(copy.deepcopy(qmodel)(x), qmodel(x))
    assert class_state
