"""Sharded parameters (DTensor, as FSDP2 makes of them) get the same scores, masks and regularizer as plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.training.budget.stepping.finite_gradients import FiniteGradients
from adapter_compiler.training.scoring.metrics import MagnitudeMetric, SensitivityMetric
from adapter_compiler.training.scoring.regularizer import add_regularizer_gradient
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers
from tests.adapter_compiler.training.buffers import make_parameters

SHAPES = ((5, 4, 3), (6, 2, 2), (5, 4, 3))


def shard(adapter_parameters: AdapterParameters, mesh: DeviceMesh) -> AdapterParameters:
    """Do what ``fully_shard`` does to parameters: replace them by DTensors sharded by the first dimension."""
    for (site, name), parameter in adapter_parameters.keyed_parameters.items():
        sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
        assert parameter.grad is not None
        sharded.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
        adapter_parameters.get_submodule(site).register_parameter(name, sharded)
    return adapter_parameters


def full(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


@pytest.mark.filterwarnings("ignore")  # torch warns about its own process group
@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_sharded_is_plain(mesh: DeviceMesh, semantics: str) -> None:
    torch.manual_seed(0)
    plain_parameters = make_parameters(SHAPES)
    torch.manual_seed(0)
    adapter_parameters = shard(make_parameters(SHAPES), mesh)
    assert adapter_parameters.flat is None
    results = []
    for triplets in (TripletBuffers(plain_parameters), TripletBuffers(adapter_parameters)):
        gradients = triplets.gather_gradients()
        FiniteGradients(nn.Module()).check(triplets, gradients, 1)
        metric = SensitivityMetric(triplets, 0.85, 0.6)
        metric.update(triplets, gradients)
        add_regularizer_gradient(triplets, gradients, 0.1, semantics)
        triplets.scatter_gradients(gradients)
        found = [full(p.grad) for p in triplets.parameters.values()]
        results.append([metric.scores(triplets), MagnitudeMetric().scores(triplets), *found])
    torch.testing.assert_close(results[1], results[0])
