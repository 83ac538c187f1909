"""Options for kinds, scalings and starts, under our names and PEFT's, and the errors for values that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, SiteError


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("svd", "alpha/r", None)),
        ({"use_dora": True}, ("dora", "alpha/r", None)),
        ({"kind": "svd", "use_dora": True}, ("dora-svd", "alpha/r", None)),
        ({"kind": "lora", "use_dora": False, "use_rslora": True}, ("lora", "rslora", None)),
        ({"kind": "lora", "init_lora_weights": True}, ("lora", "alpha/r", "kaiming")),
        ({"init_r": 6, "init_lora_weights": True}, ("svd", "alpha/r", "gaussian")),
        ({"kind": "lora", "init_lora_weights": "pissa_niter_4"}, ("lora", "alpha/r", "pissa_niter_4")),
    ],
)
def test_options_of_peft_are_understood(options: dict[str, Any], expected: tuple[str, str, str | None]) -> None:
    config = ac.AdapterConfig(**options)
    assert (config.kind, config.scaling, config.init) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "loha"}, r"kind='loha'\): expected one of 'svd', 'lora', 'dora', 'dora-svd'"),
        ({"scaling": "sqrt"}, r"scaling='sqrt'\): expected one of 'alpha/r', 'rslora'"),
        ({"init": "zeros"}, r"init='zeros'\): expected one of 'gaussian', 'kaiming', 'orthogonal', 'pissa'"),
        ({"init": "pissa_niter_x"}, "init='pissa_niter_x'"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"init_lora_weights": True, "init": "pissa"}, "give init or init_lora_weights"),
        ({"use_rslora": True, "scaling": "alpha/r"}, "use_rslora=True and scaling='alpha/r', which contradict"),
        ({"use_dora": "yes"}, r"use_dora='yes'\): expected True or False"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ac.AdapterConfig(**options)


def test_rules_choose_the_kind() -> None:
    with pytest.raises(SiteError, match=r"AdapterRule\(kind='loha'\): expected one of svd, lora"):
        ac.AdapterRule(kind="loha")
    with pytest.raises(SiteError, match="no kind, no rank and no alpha together with it"):
        ac.AdapterRule(kind="lora", exclude=True)


def test_the_scale_follows_the_rank_of_a_rule() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rules = (ac.AdapterRule(name="1.weight", rank=4),)
    config = ac.AdapterConfig(rank=1, alpha=6, scaling="rslora", rules=rules)
    adapted = ac.compile_with_adapters(model, config=config)
    assert config.scale == 6
    assert [adapter.scale for adapter in adapted.plan] == [6, 3]


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal", "pissa", "pissa_niter_2"])
@pytest.mark.parametrize("kind", ["svd", "lora", "dora", "dora-svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_start_of_every_kind_leaves_the_weight_as_it_is(kind: str, init: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).to(dtype)
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=3, kind=kind, init=init))
    torch.testing.assert_close(adapted.fold().state_dict(), model.state_dict(), rtol=1e-6, atol=1e-7)
    directions = [p for name, p in adapted.adapters.named_parameters() if name.endswith((".A", ".Q"))]
    assert len(directions) == 2
    assert all(bool(p.detach().any()) for p in directions)


def test_half_precision_adapters_start_in_orthonormal_directions() -> None:
    """There is no QR decomposition in half precision."""
    torch.manual_seed(0)
    config = ac.AdapterConfig(rank=4, dtype=torch.bfloat16)
    adapted = ac.compile_with_adapters(nn.Linear(32, 24).to(torch.bfloat16), config=config)
    Q = adapted.adapters.get_parameter("weight.Q").detach().float()
    torch.testing.assert_close(Q @ Q.T, torch.eye(4), rtol=0, atol=0.01)


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal", "pissa"])
@pytest.mark.parametrize("kind", ["svd", "lora", "dora"])
def test_a_model_without_memory_is_planned(kind: str, init: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=3, kind=kind, init=init))
    assert ac.AdapterPlan.from_json(adapted.plan.to_json()) == adapted.plan
