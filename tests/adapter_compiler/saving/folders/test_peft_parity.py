"""From the same start, every kind trains as in peft, step for step, and each initializer gives peft's directions.

Where peft differs from a paper (LoRA-GA's scaling, EVA's centered inputs), its own start is taken over for the
trajectory, and what both must share is compared beside it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.adapters.initializers.eva import IncrementalSvd

RANK, ALPHA, STEPS = 4, 6, 25
LAYERS = ("first", "second", "third")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 14)
        self.second = nn.Linear(14, 12, bias=False)
        self.third = nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.tanh(self.second(torch.relu(self.first(x)))))
        return y


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 10, generator=generator), torch.randn(32, 9, generator=generator)) for _ in range(count)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def wrap(net: nn.Module, prepare: Callable[[nn.Module, Any], None] | None = None, **options: Any) -> Any:
    """The model under peft; its types say too little."""
    config = peft.LoraConfig(target_modules=list(LAYERS), r=RANK, lora_alpha=ALPHA, **options)
    own = copy.deepcopy(net)
    if prepare is not None:
        prepare(own, config)
    return peft.get_peft_model(own, config)


def adapt(net: nn.Module, **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(rank=RANK, alpha=ALPHA, **{"kind": "lora", **options})
    return ac.compile_with_adapters(net, (make_batches()[0][0],), config=config)


def their_parameters(theirs: Any, layer: str) -> dict[str, nn.Parameter]:
    module = theirs.base_model.model.get_submodule(layer)
    found = {"A": module.lora_A["default"].weight, "B": module.lora_B["default"].weight}
    if "default" in module.lora_magnitude_vector:
        found["magnitude"] = module.lora_magnitude_vector["default"].weight
    return found


@torch.no_grad()
def take_over(ours: ac.AdaptedModel, theirs: Any) -> None:
    """Start from peft's A and B, and where the form keeps its start, from there."""
    for (site, name), parameter in ours.adapters.keyed_parameters.items():
        source = their_parameters(theirs, site.removesuffix(".weight"))
        name = name.removesuffix("_start")
        if name != "magnitude":
            parameter.copy_(source[name])


def assert_trains_alike(ours: ac.AdaptedModel, theirs: Any, *, plus: float = 1.0) -> None:
    batches = make_batches()
    torch.testing.assert_close(ours(batches[0][0]), theirs(batches[0][0]), rtol=1e-5, atol=1e-5)
    parts = [their_parameters(theirs, layer) for layer in LAYERS]
    groups = [
        {"params": [p["B"] for p in parts], "lr": 0.01 * plus},
        {"params": [v for p in parts for name, v in p.items() if name != "B"], "lr": 0.01},
    ]
    optimizers = [torch.optim.AdamW(groups, weight_decay=0.0)]
    optimizers.append(torch.optim.AdamW(ours.parameter_groups(0.01, lora_plus_ratio=plus)))
    for step in range(STEPS):
        for model in (theirs, ours):
            loss(model, batches[step % len(batches)]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (site, name), parameter in ours.adapters.keyed_parameters.items():
        if not name.endswith("_start"):
            expected = their_parameters(theirs, site.removesuffix(".weight"))[name]
            torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-5, msg=f"{site}.{name}")
    torch.testing.assert_close(ours(batches[0][0]), theirs(batches[0][0]), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload().state_dict()
    torch.testing.assert_close(dict(ours.fold().state_dict()), dict(merged), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_lora_rslora_and_dora(options: dict[str, Any]) -> None:
    net = Net()
    theirs = wrap(net, **options)
    ours = adapt(net, **options)
    take_over(ours, theirs)
    assert_trains_alike(ours, theirs)


def test_lora_plus() -> None:
    net = Net()
    theirs = wrap(net)
    ours = adapt(net)
    take_over(ours, theirs)
    assert_trains_alike(ours, theirs, plus=8.0)


@pytest.mark.parametrize("dora", [False, True])
def test_pissa(dora: bool) -> None:
    net = Net()
    theirs = wrap(net, init_lora_weights="pissa", use_dora=dora)
    ours = adapt(net, init_lora_weights="pissa", use_dora=dora)
    for layer in LAYERS:
        p = their_parameters(theirs, layer)
        mine = {name: ours.adapters.get_parameter(f"{layer}.weight.{name}") for name in ("A", "B")}
        torch.testing.assert_close(mine["B"] @ mine["A"], p["B"] @ p["A"], rtol=1e-5, atol=1e-5)
    take_over(ours, theirs)  # signs of singular vectors are free
    assert_trains_alike(ours, theirs)


def test_randomized_pissa_is_near_the_exact_one() -> None:
    net = Net()
    exact, fast = adapt(net, init="pissa"), adapt(net, init="pissa_niter_16")
    for adapter in exact.plan:
        best, near = (
            float(adapter.form.core.delta(m.adapters.parameters_of(adapter), adapter.scale).detach().norm())
            for m in (exact, fast)
        )
        assert 0.99 * best < near < 1.0001 * best


def test_eva() -> None:
    """peft follows the mean of the inputs, the paper does not; centered, ours gives peft's directions."""
    net = Net()
    batches = make_batches(1)  # peft goes round until the directions stay
    config = peft.EvaConfig(rho=1.0, tau=0.99)
    theirs = wrap(net, init_lora_weights="eva", eva_config=config)
    peft.initialize_lora_eva_weights(
        theirs, [batch[0] for batch in batches], forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    centered = IncrementalSvd(RANK, centered=True)
    for batch in batches:
        centered.add(batch[0])
    components = their_parameters(theirs, "first")["A"].detach()
    torch.testing.assert_close((components @ centered.components.mT).abs(), torch.eye(RANK), rtol=1e-2, atol=2e-2)
    ours = adapt(net)
    ac.initialize_adapters(ours, "eva", batches, loss)
    assert all(not ours.adapters.get_parameter(f"{layer}.weight.B").any() for layer in LAYERS)
    take_over(ours, theirs)
    assert_trains_alike(ours, theirs)


def test_lora_ga() -> None:
    """Both span the same singular vectors of the gradient; peft scales B alone, and by the singular values too."""
    net = Net()
    batches = make_batches()

    def prepare(model: nn.Module, config: Any) -> None:
        def run() -> None:
            for batch in batches:
                loss(model, batch).backward()

        preprocess_loraga(model, config, run)

    theirs = wrap(net, prepare, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    ours = adapt(net)
    report = ac.initialize_adapters(ours, "lora_ga", batches, loss)
    assert set(report.sites) == {f"{layer}.weight" for layer in LAYERS}
    for layer in LAYERS:
        p = their_parameters(theirs, layer)
        mine = {name: ours.adapters.get_parameter(f"{layer}.weight.{name}").detach() for name in ("A", "B")}
        for name, across in (("A", False), ("B", True)):
            pairs = [F.normalize(v.detach().mT if across else v.detach(), dim=1) for v in (p[name], mine[name])]
            torch.testing.assert_close((pairs[0] * pairs[1]).sum(1).abs(), torch.ones(RANK), rtol=1e-2, atol=1e-2)
    take_over(ours, theirs)
    assert_trains_alike(ours, theirs)
