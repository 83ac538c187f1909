"""Re-diagonalising changes no output; re-aligning takes up the gradient that the adapter missed. LoRA+ groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.gradients import find_weight_gradients
from adapter_compiler.realign import measure_alignment

X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randn(20, 7, generator=torch.Generator().manual_seed(1)).double()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def adapt(kind: str = "svd", rank: int = 3, **options: object) -> ac.AdaptedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7)).double()
    return ac.compile_with_adapters(model, (X,), config=ac.AdapterConfig(rank=rank, alpha=rank, kind=kind, **options))  # type: ignore[arg-type]


@torch.no_grad()
def disturb(adapted: ac.AdaptedModel) -> None:
    for parameter in adapted.trainable_parameters():
        parameter.normal_()


@pytest.mark.parametrize("kind", ["svd", "dora-svd"])
def test_rediagonalising_keeps_the_function_and_makes_lambda_the_singular_values(kind: str) -> None:
    adapted = adapt(kind)
    disturb(adapted)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters())
    loss(adapted, (X, Y)).backward()
    optimizer.step()
    with torch.no_grad():
        adapted.adapters.get_parameter("0.weight.lam")[1] = 0
    untouched = adapted.adapters.get_parameter("0.weight.P")[:, 1].clone()
    expected = adapted(X)
    assert ac.rediagonalise(adapted, optimizer) == ["0.weight", "2.weight"]
    torch.testing.assert_close(adapted(X), expected, rtol=1e-10, atol=1e-10)
    for adapter in adapted.plan:
        p = adapted.adapters.parameters_of(adapter)
        live = p["lam"] != 0
        eye = torch.eye(int(live.sum())).double()
        torch.testing.assert_close(p["P"][:, live].mT @ p["P"][:, live], eye)
        torch.testing.assert_close(p["Q"][live] @ p["Q"][live].mT, eye)
        sigma = torch.linalg.svdvals(adapter.form.delta(p, 1.0).detach())[: len(eye)]
        torch.testing.assert_close(p["lam"][live].detach(), sigma)
        assert p["lam"] not in optimizer.state
    assert torch.equal(adapted.adapters.get_parameter("0.weight.P")[:, 1], untouched)


def test_a_realigner_takes_up_the_gradient_that_was_missed() -> None:
    adapted = adapt()
    disturb(adapted)
    with torch.no_grad():
        for site in ("0.weight", "2.weight"):
            adapted.adapters.get_parameter(f"{site}.lam")[1:] = 0
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    realigner = ac.Realigner(adapted, optimizer, realign_every=2, batches=[(X, Y)], loss=loss, threshold=2.0)
    before = adapted(X)
    optimizer.step()
    assert realigner.alignment == {}
    optimizer.step()
    torch.testing.assert_close(adapted(X), before, rtol=1e-10, atol=1e-10)
    assert realigner.alignment.keys() == {"0.weight", "2.weight"}
    loss(adapted, (X, Y)).backward()
    for adapter, gradient in find_weight_gradients(adapted, [(X, Y)], loss, with_adapters=True):
        p = adapted.adapters.parameters_of(adapter)
        P, Q = p["P"].detach(), p["Q"].detach()
        torch.testing.assert_close(P.mT @ P, torch.eye(3).double())
        outside = gradient - P[:, :1] @ (P[:, :1].mT @ gradient)
        outside = outside - outside @ Q[:1].mT @ Q[:1]
        expected = torch.linalg.svdvals(outside)[:2]
        assert p["lam"].grad is not None
        torch.testing.assert_close(p["lam"].grad[1:].abs(), expected)
        assert measure_alignment(P, Q, gradient) > realigner.alignment[adapter.site.name]


def test_an_alignment_above_the_threshold_is_left_alone() -> None:
    adapted = adapt()
    disturb(adapted)
    with torch.no_grad():
        adapted.adapters.get_parameter("0.weight.lam")[1:] = 0
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    realigner = ac.Realigner(adapted, optimizer, realign_every=1, batches=[(X, Y)], loss=loss, threshold=0.0)
    assert realigner.realign() == []
    realigner.detach()
    optimizer.step()
    assert realigner.step == 0


def test_what_cannot_work_says_so() -> None:
    adapted = adapt()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    with pytest.raises(ConfigError, match=r"realign_every=0\): expected an integer of at least 1"):
        ac.Realigner(adapted, optimizer, realign_every=0)
    with pytest.raises(ConfigError, match="one of batches and loss"):
        ac.Realigner(adapted, optimizer, realign_every=1, loss=loss)
    lora = adapt("lora")
    with pytest.raises(ConfigError, match="no adapter has a λ"):
        ac.Realigner(lora, torch.optim.SGD(lora.trainable_parameters(), lr=0.1), realign_every=1)
    with pytest.raises(ConfigError, match=r"lora_plus_ratio=0.5\): expected a number of at least 1"):
        adapted.parameter_groups(1e-3, lora_plus_ratio=0.5)


@pytest.mark.parametrize("kind", ["lora", "svd", "dora", "dora-svd"])
def test_the_left_factor_learns_faster(kind: str) -> None:
    adapted = adapt(kind, exclude="2", trainable="2", init="pissa")
    groups = adapted.parameter_groups(1e-3, lora_plus_ratio=16, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in adapted.trainable_parameters())
    names = {id(p): name.rpartition(".")[2] for name, p in adapted.named_parameters()}
    found = {
        group["name"]: (group["lr"], group["weight_decay"], {names[id(p)] for p in group["params"]}) for group in groups
    }
    left, right = ("P", "Q") if "svd" in kind else ("B", "A")
    plain = {"bias"} | ({"lam"} if "svd" in kind else set()) | ({"magnitude"} if "dora" in kind else set())
    assert found == {
        "left": (0.016, 0.1, {left}),
        "right": (0.001, 0.1, {right, "weight"}),
        "without decay": (0.001, 0.0, plain),
    }
    torch.optim.AdamW(groups)
