"""Parametrized weights are adapted as computed, and folded through right_inverse or without parametrization."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")

WRAPPERS: dict[str, Callable[..., nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal by Householder": lambda m: parametrizations.orthogonal(m, orthogonal_map="householder"),
    "former weight_norm": nn.utils.weight_norm,
    "former spectral_norm": nn.utils.spectral_norm,
}
INVERTIBLE = ("weight_norm", "former weight_norm")


class Net(nn.Module):
    def __init__(self, wrap: Callable[..., nn.Module] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        if wrap is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.first = wrap(self.first)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


def draw(adapted: ac.AdaptedModel) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)


def adapt(net: nn.Module, example: Any = (X,), **options: Any) -> ac.AdaptedModel:
    adapted = ac.compile_with_adapters(net, example, config=ac.AdapterConfig(rank=3, alpha=3, **options))
    draw(adapted)
    return adapted


def expect(net: Net, adapted: ac.AdaptedModel) -> Tensor:
    """The result with ΔW added by hand to what eager PyTorch computes as the weight."""
    net.eval()
    net(X)  # the former functions compute the weight in a call
    weights = [net.first.weight.detach(), net.second.weight.detach()]
    for index, adapter in enumerate(adapted.plan):
        P, lam, Q = (adapted.adapters.parameters_of(adapter)[name].detach() for name in ("P", "lam", "Q"))
        weights[index] = weights[index] + adapter.scale * P @ torch.diag(lam) @ Q
    return F.linear(torch.tanh(F.linear(X, weights[0], net.first.bias)), weights[1], net.second.bias)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("has_example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_computed_weight_is_adapted(name: str, has_example: bool, mode: str) -> None:
    net = Net(WRAPPERS[name]).train(mode == "train")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    adapted = adapt(net, (X,) if has_example else ())
    assert [site.name for site in adapted.sites] == ["first.weight", "second.weight"]
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=f"{key} of the user's model has changed")
    torch.testing.assert_close(adapted(X), expect(Net(WRAPPERS[name]), adapted))
    adapted(X).square().mean().backward()
    assert all(p.grad is not None for p in adapted.trainable_parameters())
    removed = adapted.fold(parametrized="remove")
    assert type(removed.get_submodule("first")) is nn.Linear
    assert removed.state_dict().keys() == Net(None).state_dict().keys()
    torch.testing.assert_close(removed(X), adapted(X))
    assert removed.get_parameter("first.weight").requires_grad
    assert not removed.get_submodule("first")._forward_pre_hooks


@pytest.mark.parametrize("name", INVERTIBLE)
def test_right_inverse_keeps_the_users_keys(name: str) -> None:
    net = Net(WRAPPERS[name])
    net.get_parameter("second.bias").requires_grad_(False)
    adapted = adapt(net)
    models = [adapted, copy.deepcopy(adapted)]
    if name.startswith("former"):  # the present one leaves a hook that cannot be pickled, with and without adapters
        models.append(pickle.loads(pickle.dumps(adapted)))
    for model in models:
        folded = model.fold()
        assert folded.state_dict().keys() == net.state_dict().keys()
        assert type(folded.get_submodule("first")).__name__ == type(net.first).__name__
        torch.testing.assert_close(folded(X), adapted(X))
        flags = {key: parameter.requires_grad for key, parameter in folded.named_parameters()}
        assert flags == {key: parameter.requires_grad for key, parameter in net.named_parameters()}
        fresh = Net(WRAPPERS[name])
        fresh.load_state_dict(folded.state_dict())
        torch.testing.assert_close(fresh(X), adapted(X))
    assert adapted.fold_report is not None
    assert 0 <= adapted.fold_report.rounding_error["first.weight"] < 1e-6
    optimizer = torch.optim.SGD(folded.parameters(), lr=0.1)
    folded(X).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(folded(X), adapted(X))


@pytest.mark.parametrize("name", sorted(WRAPPERS.keys() - set(INVERTIBLE)))
def test_what_has_no_right_inverse_is_said(name: str) -> None:
    adapted = adapt(Net(WRAPPERS[name]))
    with pytest.raises(ConfigError, match=r"first\.weight cannot be computed by \w+ after the merge.*'remove'"):
        adapted.fold()
    adapted(X)
    assert adapted.merge_and_unload(parametrized="remove")(X).shape == (5, 4)
    with pytest.raises(ConfigError, match=r"fold\(parametrized='keep'\): expected 'right_inverse' or 'remove'"):
        adapted.fold(parametrized="keep")


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def make_square(*steps: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    for step in steps:
        parametrize.register_parametrization(layer, "weight", step)
    return nn.Sequential(layer)


def test_chains_of_the_users_own(caplog: pytest.LogCaptureFixture) -> None:
    net = make_square(Doubled(), Doubled())
    adapted = adapt(net)
    assert "0.weight is adapted as Doubled, Doubled computes it now" in caplog.text
    folded = adapted.fold()
    assert folded.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(folded(X), adapted(X))
    symmetric = adapt(make_square(Symmetric()))
    with pytest.raises(ConfigError, match=r"0\.weight cannot be computed by Symmetric"):
        symmetric.fold()
    torch.testing.assert_close(symmetric.fold(parametrized="remove")(X), symmetric(X))


def test_what_is_random_is_left_to_the_module() -> None:
    net = make_square(Dropped()).append(nn.Linear(6, 2))
    adapted = adapt(net)
    assert [site.name for site in adapted.sites] == ["1.weight"]
    assert parametrize.is_parametrized(adapted.get_submodule("module.0"))


def test_what_is_not_adapted_keeps_its_parametrization() -> None:
    net = Net(parametrizations.spectral_norm)
    adapted = adapt(net, exclude="first.*")
    assert adapted.rejected["first.weight"] == "excluded (exclude='first.*')"
    folded = adapted.fold()
    assert folded.state_dict().keys() == net.state_dict().keys()
    assert parametrize.is_parametrized(folded.get_submodule("first"))
    trained = adapt(net, trainable="first.parametrizations.*")
    assert [site.name for site in trained.sites] == ["second.weight"]
    assert len([p for n, p in trained.named_parameters() if "parametrizations" in n and p.requires_grad]) == 1


def test_a_convolution_and_a_recurrent_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.convolution = parametrizations.weight_norm(nn.Conv1d(3, 6, 3, padding=1))
            self.recurrent = parametrizations.weight_norm(nn.LSTM(6, 4), "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.recurrent(self.convolution(x).permute(2, 0, 1))[0]
            return result

    x, net = torch.randn(2, 3, 7), Both()
    adapted = adapt(net, (x,), sites="*.weight*")
    assert {"convolution.weight", "recurrent.weight_hh_l0"} <= {site.name for site in adapted.sites}
    for how in ("right_inverse", "remove"):
        torch.testing.assert_close(adapted.fold(parametrized=how)(x), adapted(x))
    assert adapted.fold().state_dict().keys() == net.state_dict().keys()


def test_it_is_saved_loaded_exported_and_given_to_peft(tmp_path: Any) -> None:
    adapted = adapt(Net(parametrizations.weight_norm))
    adapted.save(tmp_path / "own")
    torch.testing.assert_close(ac.load(Net(parametrizations.weight_norm), tmp_path / "own")(X), adapted(X))
    assert ac.load(Net(None), tmp_path / "own").plan == adapted.plan
    peft = pytest.importorskip("peft")
    adapted.save_pretrained(tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(Net(parametrizations.weight_norm), tmp_path / "peft")
    torch.testing.assert_close(theirs(X), adapted(X))
    report = ac.export_onnx(adapt(Net(parametrizations.spectral_norm)), tmp_path / "m.onnx", (X,))
    assert report.max_abs_error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_within_their_rounding(dtype: torch.dtype) -> None:
    adapted = adapt(Net(parametrizations.weight_norm).to(dtype), (X.to(dtype),))
    found, expected = adapted.fold()(X.to(dtype)), adapted(X.to(dtype))
    torch.testing.assert_close(found, expected, rtol=5e-2 if dtype is torch.bfloat16 else 1e-9, atol=5e-2)
