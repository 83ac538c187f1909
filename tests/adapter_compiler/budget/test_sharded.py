"""Sharded parameters (DTensor, as FSDP2 makes of them) get the same scores, masks and regulariser as plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adapter_compiler.budget.bank import TripletBank
from adapter_compiler.budget.checks import assert_finite
from adapter_compiler.budget.metrics import MagnitudeMetric, SensitivityMetric
from adapter_compiler.budget.regulariser import add_regulariser_gradient
from adapter_compiler.store import AdapterStore
from tests.adapter_compiler.budget.banks import make_store

SHAPES = ((5, 4, 3), (6, 2, 2), (5, 4, 3))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(store: AdapterStore, mesh: DeviceMesh) -> AdapterStore:
    """What ``fully_shard`` does to parameters: DTensors, sharded by their first dimension, take their places."""
    for (site, name), parameter in store.keyed_parameters.items():
        sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
        assert parameter.grad is not None
        sharded.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
        store.get_submodule(site).register_parameter(name, sharded)
    return store


def full(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


@pytest.mark.filterwarnings("ignore")  # torch warns about its own process group in many ways
@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_sharded_is_plain(mesh: DeviceMesh, semantics: str) -> None:
    torch.manual_seed(0)
    plain_store = make_store(SHAPES)
    torch.manual_seed(0)
    store = shard(make_store(SHAPES), mesh)
    assert store.flat is None
    results = []
    for bank in (TripletBank(plain_store), TripletBank(store)):
        gradients = bank.gather_gradients()
        assert_finite(bank, gradients, 1)
        metric = SensitivityMetric(bank, 0.85, 0.6)
        metric.update(bank, gradients)
        add_regulariser_gradient(bank, gradients, 0.1, semantics)
        bank.scatter_gradients(gradients)
        found = [full(p.grad) for p in bank.parameters.values()]
        results.append([metric.scores(bank), MagnitudeMetric().scores(bank), *found])
    torch.testing.assert_close(results[1], results[0])
