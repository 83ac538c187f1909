"""A joint start shares Q over tasks, follows each task's gradient, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError

Batch = tuple[Tensor, Tensor]


def make(kind: str, rank: int = 3) -> ac.AdaptedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 9)).double()
    adapted = ac.compile_with_adapters(
        model, (torch.randn(2, 10).double(),), config=ac.AdapterConfig(kind=kind, rank=rank)
    )
    adapted.add_adapter("second")
    return adapted


def batches(seed: int) -> list[Batch]:
    torch.manual_seed(seed)
    return [(torch.randn(16, 10).double(), torch.randn(16, 9).double()) for _ in range(2)]


TASKS = {"default": batches(1), "second": batches(2)}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def find_gradients(base: nn.Module, name: str) -> Tensor:
    """Of the first weight, by autograd on the plain model."""
    weight = base.get_parameter("0.weight").requires_grad_()
    value = torch.stack([loss(base, batch) for batch in TASKS[name]]).mean()
    (gradient,) = torch.autograd.grad(value, weight)
    return gradient


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_the_right_factor_is_that_of_the_stacked_gradients(kind: str) -> None:
    adapted = make(kind)
    x = torch.randn(5, 10).double()
    base = adapted.copy_base()
    report = ac.initialize_jointly(adapted, TASKS, loss)
    assert adapted.active_adapter == "default"
    G = {name: find_gradients(base, name) for name in TASKS}
    stacked = torch.cat([g / g.norm() for g in G.values()])
    _, values, V = torch.linalg.svd(stacked)
    torch.testing.assert_close(torch.tensor(report.values["0.weight"]).double(), values[:3], rtol=1e-5, atol=1e-6)
    for name, g in G.items():
        adapted.use(name)
        assert torch.equal(adapted(x), base(x))
        own = {k: p.detach() for k, p in adapted.adapters.parameters_of(adapted.plan.by_weight["0.weight"][0]).items()}
        Q = own["Q"] if kind == "svd" else own["A"]
        torch.testing.assert_close(Q.T @ Q, V[:3].T @ V[:3])  # the same space
        share = 1 - float((g @ V[:3].T).square().sum() / g.square().sum())
        assert report.left_over[name]["0.weight"] == pytest.approx(share)
        if kind == "lora":
            assert not own["B"].any()
            continue
        P = own["P"]
        torch.testing.assert_close(P.T @ P, torch.eye(3).double())
        sizes = torch.linalg.svdvals(g @ Q.T)
        torch.testing.assert_close(torch.trace(P.T @ g @ Q.T), sizes.sum())  # the nearest orthonormal columns
    assert "outside of the shared directions" in str(report)


def test_a_first_step_follows_both_gradients_further_than_from_random_directions() -> None:
    """With LoRA and B = 0, a step of gradient descent changes W by -lr s² G Aᵀ A."""

    def gain(is_joint: bool) -> list[float]:
        adapted = make("lora")
        if is_joint:
            ac.initialize_jointly(adapted, TASKS, loss)
        found = []
        for name, own in TASKS.items():
            adapted.use(name)
            with torch.no_grad():
                for key, parameter in adapted.adapters.named_parameters():
                    if key.endswith(".A"):  # the same size of A, so that only its directions differ
                        parameter.mul_(3**0.5 / parameter.norm())
            optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-3)
            before = torch.stack([loss(adapted, batch) for batch in own]).mean()
            before.backward()
            optimizer.step()
            found.append(float(before.detach()) - sum(float(loss(adapted, batch).detach()) for batch in own) / len(own))
        return found

    joint, drawn = gain(True), gain(False)
    assert all(one > 1.3 * other for one, other in zip(joint, drawn, strict=True)), (joint, drawn)


def test_what_cannot_start_together_is_refused() -> None:
    adapted = make("svd")
    with pytest.raises(ConfigError, match="expected batches of two adapters or more"):
        ac.initialize_jointly(adapted, {"default": batches(1)}, loss)
    with pytest.raises(ConfigError, match="there is no adapter 'third'"):
        ac.initialize_jointly(adapted, {**TASKS, "third": batches(1)}, loss)
    with pytest.raises(ConfigError, match="batches is empty"):
        ac.initialize_jointly(adapted, {"default": [], "second": batches(1)}, loss)
    adapted.add_adapter("third", config=ac.AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match=r"site 0\.weight has default: 'svd' of rank 3, third: 'svd' of rank 2"):
        ac.initialize_jointly(adapted, {"default": batches(1), "third": batches(1)}, loss)
    with pytest.raises(ConfigError, match=r"the form 'dora', expected 'svd' or 'lora'"):
        ac.initialize_jointly(make("dora"), TASKS, loss)
