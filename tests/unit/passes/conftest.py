"""Checks that tests of several passes share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from vitq.core.qmodel import QuantModel
from vitq.core.rewrite import REWRITES


@pytest.fixture
def assert_replays() -> Callable[[nn.Module, QuantModel], None]:
    """Fails unless the rewrites of a quantized model, replayed on the float one, give the same parameters."""

    def check(model: nn.Module, qmodel: QuantModel) -> None:
        again = copy.deepcopy(model)
        for rewrite in qmodel.rewrites:
            replayed = REWRITES[rewrite.name](rewrite.args, rewrite.tensors)
            replayed.prepare(again)
            replayed.apply(again)
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in qmodel.model.named_parameters()]
        assert all(torch.equal(p, qmodel.model.get_parameter(n)) for n, p in again.named_parameters())

    return check
