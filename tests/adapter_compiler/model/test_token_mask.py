"""Adapters that act on the tokens of a mask: exact there, absent elsewhere, in every way a model is run and kept."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, SiteError

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


class Model(nn.Module):
    """Two layers that mix no tokens, [batch, tokens, 8] to [batch, tokens, 4], and a mask that only adapters read."""

    def __init__(self, *, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.bare, self.is_checkpointed = (
            nn.Linear(8, 8),
            nn.Parameter(torch.randn(8, 4) / 3),
            is_checkpointed,
        )

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        if self.is_checkpointed:
            y: Tensor = checkpoint(self.run, x, use_reentrant=False)
            return y
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.bare

    def predict(self, x: Tensor, chosen: Tensor) -> Tensor:
        """A method that calls the model itself."""
        result: Tensor = self(x, chosen=chosen).argmax(-1)
        return result


def adapt(model: nn.Module | None = None, *, kind: str = "lora", **options: Any) -> ac.AdaptedModel:
    torch.manual_seed(0)
    model = Model() if model is None else model
    config = ac.AdapterConfig(kind=kind, rank=2, token_mask="chosen", **options)
    adapted = ac.compile_with_adapters(model, (X, MASK), config=config)
    assert torch.equal(adapted(X, MASK), adapted.copy_base()(X, MASK))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(std=0.5)
    return adapted


def always_on(adapted: ac.AdaptedModel) -> nn.Module:
    """The folded model of the adapters without a mask."""
    other = copy.deepcopy(adapted)
    other.fix_routing([1.0], name="all")
    other.use("all")
    return other.fold()


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_chosen_tokens_have_the_folded_weights_and_others_those_of_the_base(kind: str) -> None:
    adapted = adapt(kind=kind)
    base, folded = adapted.copy_base(), always_on(adapted)
    found = adapted(X, MASK)
    assert torch.equal(found[~MASK], base(X)[~MASK])  # bit for bit
    torch.testing.assert_close(found[MASK], folded(X)[MASK], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(folded(X), base(X), atol=1e-2)
    for other in (adapted(X), adapted(X, None), adapted(X, chosen=torch.zeros_like(MASK))):
        assert torch.equal(other, base(X))
    torch.testing.assert_close(adapted(X, MASK.float() * 1), found)
    assert torch.equal(adapted.predict(X, MASK), found.argmax(-1))
    assert torch.equal(adapted.module(X, MASK), found)


def test_gradients_are_those_of_a_sum_over_the_chosen_tokens() -> None:
    adapted = adapt()
    adapted(X, MASK).square().sum().backward()
    own = {name: p.detach().clone().requires_grad_() for name, p in adapted.adapters.named_parameters()}
    scale, base = adapted.plan.adapters[0].scale, adapted.copy_base()
    chosen = MASK.unsqueeze(-1)

    def update(name: str, x: Tensor) -> Tensor:
        return chosen * (scale * (x @ own[f"{name}.A"].T) @ own[f"{name}.B"].T)

    first: Any = base.get_submodule("first")
    hidden = torch.tanh(first(X) + update("first.weight", X))
    (hidden @ base.get_parameter("bare") + update("bare", hidden)).square().sum().backward()
    for name, parameter in adapted.adapters.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-4, atol=1e-3)


def test_it_is_saved_loaded_copied_exported_and_checkpointed(tmp_path: Path) -> None:
    import onnxruntime

    adapted = adapt().eval()
    expected = adapted(X, MASK)
    adapted.save(tmp_path / "saved")
    torch.manual_seed(0)
    assert torch.equal(ac.load(Model(), tmp_path / "saved")(X, MASK), expected)
    assert torch.equal(copy.deepcopy(adapted)(X, MASK), expected)
    assert ac.export_onnx(adapted, tmp_path / "m.onnx", (X, MASK)).max_abs_error < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x, mask = torch.randn(2, 7, 8), torch.rand(2, 7) < 0.5
    (found,) = session.run(None, {"x": x.numpy(), "chosen": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), adapted(x, mask).detach(), rtol=1e-4, atol=1e-4)
    other = adapt(checkpoint=True).train()
    other.adapters.load_state_dict(adapted.adapters.state_dict())
    for model in (other, adapted.train()):
        model(X, MASK).square().sum().backward()
    for one, two in zip(other.adapters.parameters(), adapted.adapters.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


def test_threads_have_masks_of_their_own() -> None:
    adapted = adapt().eval()
    masks = [MASK, ~MASK, torch.ones_like(MASK), torch.zeros_like(MASK)]
    expected = [adapted(X, mask) for mask in masks]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(30):
            if not torch.equal(adapted(X, masks[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_would_be_silently_wrong_is_refused() -> None:
    adapted = adapt()
    with pytest.raises(
        SiteError, match=r"site first\.weight .* the mask 'chosen' has the shape \(3, 4\); expected \(3, 5\)"
    ):
        adapted(X, MASK[:, :4])
    with pytest.raises(ConfigError, match="the mask 'chosen' is a list"):
        adapted(X, [1, 0])
    with pytest.raises(SiteError, match="depends on the call"):
        adapted.fold()
    torch.manual_seed(0)
    own = adapt(Model(is_checkpointed=True)).train()
    loss = own(X, MASK).sum()
    with pytest.raises(SiteError, match=r"runs again in a backward.*AdapterConfig\(checkpoint=True\)"):
        loss.backward()
    with pytest.raises(SiteError, match=r"in an nn\.MultiheadAttention"):
        ac.compile_with_adapters(_Attention(), config=ac.AdapterConfig(kind="lora", token_mask="chosen"))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        result: Tensor = self.attention(x, x, x)[0]
        return result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_mask": "x y"}, "token_mask='x y'.: expected the name of an argument"),
        ({"token_mask": "other"}, "token_mask='other' is no argument of Model.forward; expected one of 'x', 'chosen'"),
        ({"token_mask": "chosen", "kind": "dora"}, "kind='dora', token_mask='chosen'.: expected one of 'svd', 'lora'"),
        ({"token_mask": "chosen", "init": "pissa"}, "expected a start at ΔW = 0"),
        ({"token_mask": "chosen", "mixture": ac.Mixture()}, "expected one of them; leave the other out"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ac.compile_with_adapters(Model(), (X, MASK), config=ac.AdapterConfig(**{"kind": "lora", **options}))
