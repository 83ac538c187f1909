"""compile_with_adapters: what it leaves alone, what it shares, what trains."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import SiteError


class Net(nn.Module):
    """Every way of writing a linear layer, with dropout and batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.raw = nn.Parameter(torch.randn(8, 5) / 3)
        self.packed = nn.Parameter(torch.randn(10, 5) / 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x)).relu()) @ self.raw
        left, right = self.packed.chunk(2)
        x = F.linear(x, left) * torch.sigmoid(F.linear(x, right))
        y: Tensor = self.head(x)
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    torch.manual_seed(7)
    y: Tensor = model(x)
    return y


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_start_gives_the_models_outputs_and_buffers_bit_for_bit(net: Net, training: bool) -> None:
    net.train(training)
    adapted = ac.compile_with_adapters(net, (X,))
    reference = copy.deepcopy(net)
    for _ in range(3):
        assert torch.equal(run(adapted), run(reference))
    for name, buffer in reference.named_buffers():
        assert torch.equal(adapted.module.get_buffer(name), buffer)
    assert adapted.training is training


def test_only_adapters_and_what_the_config_names_require_grad(net: Net) -> None:
    adapted = ac.compile_with_adapters(net, (X,), config=ac.AdapterConfig(trainable=("head", "norm.bias")))
    trains = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trains == {
        *(f"adapters.{site}.{p}" for site in ("raw", "packed", "first.weight") for p in ("P", "lam", "Q")),
        *("module.head.weight", "module.head.bias", "module.norm.bias"),
    }
    assert {id(p) for p in adapted.trainable_parameters()} == {id(p) for p in adapted.parameters() if p.requires_grad}
    assert {site.name for site in adapted.sites} == {"raw", "packed", "first.weight"}
    assert "trained fully" in adapted.rejected["head.weight"]


def test_training_reaches_every_adapter_and_the_head_only(net: Net) -> None:
    adapted = ac.compile_with_adapters(net, (X,), config=ac.AdapterConfig(trainable="head", rank=3))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.5)
    for _ in range(2):
        run(adapted).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in adapted.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [list(module._forward_hooks.values()) for module in model.modules()],
        "attributes": sorted(vars(model)),
    }


def assert_same(left: dict[str, object], right: dict[str, object]) -> None:
    assert left.keys() == right.keys()
    for key in left.keys() - {"values"}:
        assert left[key] == right[key], key
    torch.testing.assert_close(left["values"], right["values"], rtol=0, atol=0)


def count_calls(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """A forward hook."""


def test_the_model_handed_in_is_left_as_it_was(net: Net) -> None:
    net.first.weight.requires_grad_(False)
    net.norm.eval()
    net.head.register_forward_hook(count_calls)
    before = snapshot(net)
    adapted = ac.compile_with_adapters(net, (X,), config=ac.AdapterConfig(trainable="head"))
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.5)
    adapted.train()
    for _ in range(2):
        run(adapted).square().sum().backward()
        optimizer.step()
    adapted.fold()
    assert_same(snapshot(net), before)
    assert all(p.grad is None for p in net.parameters())


def test_weights_share_storage_and_buffers_do_not(net: Net) -> None:
    adapted = ac.compile_with_adapters(net, (X,), config=ac.AdapterConfig(trainable="head"))
    for name, parameter in net.named_parameters():
        own = adapted.base_weight(name)
        assert own is not parameter
        assert (own.data_ptr() == parameter.data_ptr()) is not name.startswith("head.")
    for name, buffer in net.named_buffers():
        assert adapted.module.get_buffer(name).data_ptr() != buffer.data_ptr()


def test_inplace_adapts_the_model_itself(net: Net) -> None:
    adapted = ac.compile_with_adapters(net, (X,), config=ac.AdapterConfig(inplace=True, trainable="head"))
    assert adapted.module is net
    assert not adapted.base_weight("first.weight").requires_grad
    assert net.head.weight.requires_grad
    assert all(p.requires_grad for p in adapted.fold().parameters())


def test_without_an_example_the_first_call_binds_the_sites(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.spare = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

    adapted = ac.compile_with_adapters(WithSpare())
    names = [site.name for site in adapted.sites]
    assert names == ["net.first.weight", "net.head.weight", "spare.weight"]
    assert len(adapted.trainable_parameters()) == 9
    assert adapted.report().unused == ()
    with caplog.at_level(logging.WARNING, logger="adapter_compiler"):
        run(adapted).sum().backward()
    assert "no adapter trains at spare.weight" in caplog.text
    assert adapted.report().unused == ("spare.weight",)
    assert "not used by the first call: spare.weight" in str(adapted.report())
    caplog.clear()
    run(adapted)
    assert "no adapter trains" not in caplog.text


def test_rank_is_cut_to_what_fits_and_the_scale_is_not() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
    adapted = ac.compile_with_adapters(model, (torch.randn(4, 20),), config=ac.AdapterConfig(rank=8, alpha=4))
    assert [adapter.rank for adapter in adapted.plan] == [8, 3]
    assert {adapter.scale for adapter in adapted.plan} == {0.5}


def test_triplets_start_as_lora_does_in_orthonormal_directions() -> None:
    p = dict(ac.compile_with_adapters(nn.Linear(20, 30), config=ac.AdapterConfig(rank=8)).adapters.named_parameters())
    assert not p["weight.P"].any()
    assert (p["weight.lam"] == 1).all()
    torch.testing.assert_close(p["weight.Q"] @ p["weight.Q"].T, torch.eye(8))


def test_triplets_can_start_as_lora_does_exactly() -> None:
    torch.manual_seed(0)
    triplets, product = (
        dict(
            ac.compile_with_adapters(
                nn.Linear(20, 30), config=ac.AdapterConfig(kind=kind, init="kaiming")
            ).adapters.named_parameters()
        )
        for kind in ("svd", "lora")
    )
    assert not triplets["weight.P"].any()
    assert (triplets["weight.lam"] == 1).all()
    bound = 1 / math.sqrt(20)
    for factor in (triplets["weight.Q"], product["weight.A"]):
        assert 0.9 * bound < float(factor.detach().abs().max()) <= bound


def test_the_gaussian_start_is_the_papers() -> None:
    torch.manual_seed(0)
    config = ac.AdapterConfig(rank=32, init="gaussian", init_std=0.02)
    adapted = ac.compile_with_adapters(nn.Linear(200, 200), config=config)
    p = dict(adapted.adapters.named_parameters())
    assert not p["weight.lam"].any()
    for name in ("weight.P", "weight.Q"):
        assert float(p[name].detach().std()) == pytest.approx(0.02, rel=0.05)
        assert abs(float(p[name].detach().mean())) < 0.002


def test_half_precision_weights_get_float32_adapters_unless_told_otherwise() -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    assert {p.dtype for p in ac.compile_with_adapters(model).adapters.parameters()} == {torch.float32}
    config = ac.AdapterConfig(dtype=torch.float64)
    assert {p.dtype for p in ac.compile_with_adapters(model, config=config).adapters.parameters()} == {torch.float64}


def test_the_report_reads_as_text_and_as_plain_data(net: Net) -> None:
    adapted = ac.compile_with_adapters(net, (X,))
    report = adapted.report()
    assert {row.name: row.live for row in report.sites} == {
        "raw": 5,
        "packed": 5,
        "first.weight": 6,
        "head.weight": 3,
    }
    assert report.trainable_parameters == sum(p.numel() for p in adapted.adapters.parameters())
    assert report.total_parameters == sum(p.numel() for p in net.parameters())
    assert report.to_dict()["trainable_share"] == report.trainable_share
    assert "4 adapted weights" in str(report)


class Tied(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.body(self.embed(tokens))))
        return result


def test_a_tied_weight_has_one_adapter_or_on_request_two_weights() -> None:
    model, tokens = Tied(), torch.randint(0, 11, (2, 5))
    both = ac.compile_with_adapters(model, (tokens,), config=ac.AdapterConfig(sites="*"))
    assert [site.name for site in both.sites] == ["embed.weight", "body.weight"]
    untied = ac.compile_with_adapters(model, (tokens,), config=ac.AdapterConfig(untie="head.weight"))
    assert [site.name for site in untied.sites] == ["body.weight", "head.weight"]
    assert untied.base_weight("head.weight").data_ptr() == model.embed.weight.data_ptr()
    torch.testing.assert_close(untied(tokens), model(tokens))
    with torch.no_grad():
        untied.adapters.get_parameter("head.weight.P").fill_(1.0)
    folded = untied.fold()
    assert torch.equal(folded.get_parameter("embed.weight"), model.embed.weight)
    assert not torch.equal(folded.get_parameter("head.weight"), model.embed.weight)
    torch.testing.assert_close(folded(tokens), untied(tokens), rtol=1e-5, atol=1e-5)
    assert model.head.weight is model.embed.weight


def test_an_untied_weight_can_be_trained_fully_alone() -> None:
    model, tokens = Tied(), torch.randint(0, 11, (2, 5))
    config = ac.AdapterConfig(untie="head", trainable="head")
    adapted = ac.compile_with_adapters(model, (tokens,), config=config)
    assert [name for name, p in adapted.module.named_parameters() if p.requires_grad] == ["head.weight"]
    with pytest.raises(SiteError, match=r"untie='body' matches no further name of a tied .* there are: head.weight"):
        ac.compile_with_adapters(model, (tokens,), config=ac.AdapterConfig(untie="body"))
