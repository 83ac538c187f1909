"""Mixtures of experts: the papers' formulas, peft's X-LoRA, every way to run and keep them, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError, ConfigError, SiteError

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return result


class Blocks(nn.Module):
    """Two blocks and a head, [..., 16] to [..., 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


class Bare(nn.Module):
    """The three ways of writing a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.usual = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x @ self.left), self.usual) @ self.right.T


def adapt(
    model: nn.Module,
    x: Any = X,
    *,
    kind: str = "lora",
    rank: int = 8,
    sites: Any = "all-linear",
    exclude: Any = (),
    **options: Any,
) -> ac.AdaptedModel:
    torch.manual_seed(1)
    mixture = ac.Mixture(**{"experts": 4, **options})
    return ac.compile_with_adapters(
        model,
        (x,),
        config=ac.AdapterConfig(kind=kind, rank=rank, alpha=8.0, sites=sites, exclude=exclude, mixture=mixture),
    )


@torch.no_grad()
def disturb(adapted: ac.AdaptedModel) -> ac.AdaptedModel:
    for parameter in adapted.adapters.parameters():
        parameter.normal_(std=0.4)
    return adapted


def make(cls: type[nn.Module] = Blocks) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def gates_of(x: Tensor, router: Tensor, top_k: int | None, per: str) -> Tensor:
    """The gates [..., k] by the definitions, in a loop over tokens."""
    rows = x.flatten(1, -2).mean(1, keepdim=True).expand_as(x) if per == "example" else x
    found = []
    for row in rows.reshape(-1, rows.shape[-1]):
        p = torch.exp(router @ row) / torch.exp(router @ row).sum()
        if top_k is not None:
            keep = sorted(range(len(p)), key=lambda i: -float(p[i].detach()))[:top_k]
            p = torch.stack([p[i] if i in keep else 0 * p[i] for i in range(len(p))])
            p = p if top_k == 1 else p / p.sum()
        found.append(p)
    return torch.stack(found).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("per", ["token", "example"])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_outputs_and_gradients_are_those_of_the_formula(kind: str, top_k: int | None, per: str) -> None:
    layer, x = nn.Linear(16, 12).double(), X.double()
    adapted = disturb(adapt(nn.Sequential(layer), x, kind=kind, top_k=top_k, per=per))
    parameters = adapted.adapters.named_parameters()
    own = {name.rpartition(".")[2]: nn.Parameter(p.detach().clone()) for name, p in parameters}
    left, right = (own["B"], own["A"]) if kind == "lora" else (own["P"] * own["lam"], own["Q"])
    gates = gates_of(x, own["router"], top_k, per)
    experts = [left[:, 2 * i : 2 * i + 2] @ right[2 * i : 2 * i + 2] for i in range(4)]
    expected = layer(x) + sum(gates[..., i : i + 1] * (x @ e.T) for i, e in enumerate(experts))  # alpha / rank = 1
    torch.testing.assert_close(adapted(x), expected)
    adapted(x).square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in adapted.adapters.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name.rpartition(".")[2]].grad)


@pytest.mark.parametrize("top_k", [None, 2])
def test_an_x_lora_layer_of_peft_gives_the_same(top_k: int | None) -> None:
    from peft import LoraConfig, XLoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.xlora.layer import XLoraLinearLayer

    base = nn.Linear(16, 12).double()
    x = X.double()
    adapted = disturb(adapt(nn.Sequential(base), x))
    own = {name.rpartition(".")[2]: p.detach() for name, p in adapted.adapters.named_parameters()}
    target = LoraLinear(base, "e0", config=LoraConfig(r=2, lora_alpha=2), r=2, lora_alpha=2)
    for i in range(4):
        target.update_layer(f"e{i}", r=2, lora_alpha=2, config=LoraConfig(r=2, lora_alpha=2))
        target.lora_A[f"e{i}"].weight.data = own["A"][2 * i : 2 * i + 2]
        target.lora_B[f"e{i}"].weight.data = own["B"][:, 2 * i : 2 * i + 2]
    target.set_adapter([f"e{i}" for i in range(4)])
    owner: Any = SimpleNamespace(disabled=False)
    layer = XLoraLinearLayer(owner, target, target.forward, 0, XLoraConfig(hidden_size=16, adapters={"e0": ""}))
    gates = gates_of(x, own["router"], top_k, "token")
    chosen = disturb(adapt(nn.Sequential(base), x, top_k=top_k))
    with torch.no_grad():
        for one, other in zip(chosen.adapters.parameters(), adapted.adapters.parameters(), strict=True):
            one.copy_(other)
    torch.testing.assert_close(chosen(x), layer.forward(x, scalings=gates.unsqueeze(2)))


@pytest.mark.parametrize("router", ["site", "block", "shared"])
def test_a_router_is_shared_as_the_option_says(router: str) -> None:
    adapted = adapt(make(), router=router)
    assert torch.equal(adapted(X), adapted.copy_base()(X))  # ΔW = 0 at the start
    own = [name for name, _ in adapted.adapters.named_parameters() if name.endswith("router")]
    assert len(own) == {"site": 5, "block": 3, "shared": 1}[router]
    disturb(adapted)
    seen: dict[str, Tensor] = {}

    def note(site: str, x: Tensor, weight: Tensor, probabilities: Tensor, chosen: Tensor) -> None:
        seen[site] = probabilities

    adapted.record_routing(note)
    found = adapted(X)
    assert len(seen) == len(own)
    x = X  # the same in plain PyTorch, with the gates that were recorded
    values = {name: p.detach() for name, p in adapted.adapters.named_parameters()}
    names = [name.removesuffix(".A") for name in values if name.endswith(".A")]
    leaders = {"site": names, "block": [names[0], names[0], names[2], names[2], names[4]], "shared": [names[0]] * 5}

    def update(site: str, x: Tensor) -> Tensor:
        gates = seen[dict(zip(names, leaders[router], strict=True))[site]]
        A, B = values[f"{site}.A"], values[f"{site}.B"]
        each = A.shape[0] // 4
        hidden = (x @ A.T) * gates.repeat_interleave(each, -1)
        update: Tensor = adapted.plan.by_weight[site][0].scale * hidden @ B.T
        return update

    base: Any = adapted.copy_base()
    for i, layer in enumerate(base.layers):
        normal = layer.norm(x)
        up = torch.tanh(layer.up(normal) + update(f"layers.{i}.up.weight", normal))
        x = x + layer.down(up) + update(f"layers.{i}.down.weight", up)
    torch.testing.assert_close(found, base.head(x) + update("head.weight", x))


@pytest.mark.parametrize("router", ["site", "shared"])
def test_a_file_has_the_routers_and_is_right_at_other_sizes(router: str, tmp_path: Path) -> None:
    import onnxruntime

    adapted = disturb(adapt(make(), router=router, top_k=2)).eval()
    report = ac.export_onnx(adapted, tmp_path / "m.onnx", (X,))
    assert report.max_abs_error < 1e-4
    assert report.sizes["x"] == ("batch", "sequence", 16)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    other = torch.randn(2, 9, 16)
    (found,) = session.run(None, {"x": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), adapted(other).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted(other), adapted.copy_base()(other), atol=1e-2)


def test_bare_parameters_are_right_in_calls_and_in_files(tmp_path: Path) -> None:
    model: Any = make(Bare)
    adapted = disturb(adapt(model)).eval()
    own = {name: p.detach() for name, p in adapted.adapters.named_parameters()}

    def update(name: str, x: Tensor) -> Tensor:
        gates = gates_of(x, own[f"{name}.router"], None, "token").repeat_interleave(2, -1)
        return ((x @ own[f"{name}.A"].T) * gates) @ own[f"{name}.B"].T

    hidden = torch.tanh(X @ model.left + update("left", X))
    hidden = F.linear(hidden, model.usual) + update("usual", hidden)
    torch.testing.assert_close(adapted(X), hidden @ model.right.T + update("right", hidden))
    assert ac.export_onnx(adapted, tmp_path / "m.onnx", (X,)).max_abs_error < 1e-5


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_fixed_gates_make_an_adapter_that_folds(kind: str) -> None:
    adapted = disturb(adapt(make(), kind=kind))
    uniform = copy.deepcopy(adapted)
    with torch.no_grad():
        for name, parameter in uniform.adapters.named_parameters():
            if name.endswith("router"):
                parameter.zero_()
    expected = uniform(X)
    uniform.fix_routing([0.25] * 4, name="mean")
    uniform.use("mean")
    torch.testing.assert_close(uniform(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(uniform.fold()(X), expected, rtol=1e-4, atol=1e-4)
    adapted.fix_routing([0.0, 1.0, 0.0, 0.0], name="one")
    adapted.fix_routing({a.site.name: [0.0, 1.0, 0.0, 0.0] for a in adapted.plan}, name="again")
    experts = {a.site.name: adapted.adapters.parameters_of(a) for a in adapted.plan}
    adapted.use("again")
    found = adapted(X)
    adapted.use("one")
    assert torch.equal(adapted(X), found)
    folded = adapted.fold()
    torch.testing.assert_close(folded(X), found, rtol=1e-4, atol=1e-4)
    for adapter in adapted.plan:
        assert adapter.form.name == kind
        own, second = experts[adapter.site.name], slice(adapter.rank // 4, adapter.rank // 2)
        left, right = (own["B"], own["A"]) if kind == "lora" else (own["P"] * own["lam"], own["Q"])
        expected = adapted.base_weight(adapter.site.name) + adapter.scale * left[:, second] @ right[second]
        torch.testing.assert_close(folded.get_parameter(adapter.site.name), expected, rtol=1e-5, atol=1e-6)
    adapted.combine({"one": 0.5}, name="half")


@pytest.mark.parametrize("router", ["site", "shared"])
def test_saved_loaded_copied_compiled_and_checkpointed_models_are_equal(router: str, tmp_path: Path) -> None:
    adapted = disturb(adapt(make(), router=router, per="example"))
    adapted.save(tmp_path)
    assert torch.equal(ac.load(make(), tmp_path)(X), adapted(X))
    assert torch.equal(copy.deepcopy(adapted)(X), adapted(X))
    assert ac.AdapterPlan.from_json(adapted.plan.to_json()) == adapted.plan
    other = adapt(make(), router=router, per="example")
    other.load_adapter("again", tmp_path)
    other.use("again")
    assert torch.equal(other(X), adapted(X))
    torch.manual_seed(1)
    config = ac.AdapterConfig(
        kind="lora", rank=8, alpha=8.0, checkpoint=True, mixture=ac.Mixture(router=router, per="example")
    )
    checkpointed = ac.compile_with_adapters(make(), (X,), config=config)
    checkpointed.adapters.load_state_dict(adapted.adapters.state_dict())
    for model in (adapted.train(), checkpointed.train()):
        model(X).square().mean().backward()
    for one, two in zip(adapted.adapters.parameters(), checkpointed.adapters.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = adapted.eval()(X)
        adapted.compile(backend="eager")
        torch.testing.assert_close(adapted(X), expected)


def test_weights_in_attention_have_routers_of_their_own(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    adapted = disturb(adapt(nn.Sequential(layer))).eval()
    expected = adapted(X).detach()
    with torch.no_grad():  # here torch would take its fused path
        torch.testing.assert_close(adapted(X), expected)
    assert ac.export_onnx(adapted, tmp_path / "m.onnx", (X,)).max_abs_error < 1e-5
    refused: tuple[dict[str, Any], ...] = ({"router": "shared"}, {"per": "example"})
    for options in refused:
        with pytest.raises(SiteError, match=r"in_proj_weight .* swaps examples and tokens"):
            adapt(nn.Sequential(layer), **options)


def test_a_gpt2_routes_by_token_only_because_its_layers_join_examples_and_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    adapted = disturb(adapt(model, tokens, router="block", exclude="lm_head*"))
    together = adapted(tokens).logits
    torch.testing.assert_close(together[:1], adapted(tokens[:1]).logits, rtol=1e-4, atol=1e-4)
    with_cache = adapted.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_cache, adapted.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))
    with pytest.raises(SiteError, match=r"c_attn\.weight .*joins examples and tokens"):
        adapt(model, tokens, per="example", exclude="lm_head*")


class Tied(nn.Module):
    """A table that is also the last matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.inner(self.table(tokens)))
        return result


class ReadsWeight(nn.Module):
    """A layer whose weight is also read as values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + torch.einsum("oi,...i->...o", self.layer.weight, x)
        return result


class OtherTokens(nn.Module):
    """A second layer that gets the tokens in another order of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).transpose(0, 1)).transpose(0, 1)
        return result


class BothWays(nn.Module):
    """One matrix that is used in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w) @ self.w


def test_a_weight_that_another_operator_uses_is_refused_by_name() -> None:
    tokens = torch.tensor([[1, 2]])
    assert {s.name for s in adapt(make(Tied), tokens).sites} == {"inner.weight"}
    with pytest.raises(SiteError, match=r"table\.weight .*expected a matrix that is used by matrix products only"):
        adapt(make(Tied), tokens, sites="*")
    config = ac.AdapterConfig(kind="lora", rank=8, sites="*", mixture=ac.Mixture())
    without_example = ac.compile_with_adapters(make(ReadsWeight), config=config)
    with pytest.raises(SiteError, match=r"site layer\.weight .*only matrix products x Wᵀ"):
        without_example(X)
    with pytest.raises(SiteError, match=r"site w .*only matrix products x Wᵀ"):
        adapt(make(BothWays))(X)
    with pytest.raises(SiteError, match=r"site second\.weight has an input .*the gates of first\.weight are for"):
        adapt(make(OtherTokens), router="shared")(X)
    with pytest.raises(SiteError, match=r"layers\.1\.up\.weight takes its gates from layers\.0\.up\.weight"):
        adapt(make(), router="shared").module.get_submodule("layers.1")(X)


def test_what_needs_a_matrix_is_refused_by_name(tmp_path: Path) -> None:
    adapted = adapt(make(), kind="svd")
    optimizer = torch.optim.AdamW(adapted.trainable_parameters())
    batches, loss = [X], (lambda model, x: model(x).square().mean())
    with pytest.raises(SiteError, match=r"layers\.0\.up\.weight .*fix_routing"):
        adapted.fold()
    with pytest.raises(SiteError, match="depends on the call"):
        adapted.capture(X)
    with pytest.raises(ConfigError, match=r"expected a form that adds one matrix to the weight"):
        ac.export_onnx(adapted, tmp_path / "m.onnx", (X,), adapters="runtime")
    with pytest.raises(ConfigError, match=r"whose update depends on the call.*fix_routing"):
        adapted.combine({"default": 1.0}, name="sum")
    with pytest.raises(SiteError, match="depends on the call"):
        adapted.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Realigner: site"):
        ac.Realigner(adapted, optimizer, realign_every=1)
    with pytest.raises(ConfigError, match="initialize_adapters: site"):
        ac.initialize_adapters(adapted, "lora_ga", batches, loss)
    with pytest.raises(ConfigError, match="allocate_ranks: site"):
        ac.allocate_ranks(adapted, "gradient", batches, loss)
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=9, compact=True)
    with pytest.raises(BudgetError, match=r"the 4 experts of layers\.0\.up\.weight"):
        ac.RankBudget(adapted, optimizer, schedule)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"experts": 1}, r"Mixture\(experts=1\)"),
        ({"top_k": 4}, r"Mixture\(top_k=4\): expected less than experts=4"),
        ({"per": "batch"}, r"Mixture\(per='batch'\)"),
        ({"router": "layer"}, r"Mixture\(router='layer'\)"),
        ({"rank": 6}, r"AdapterConfig\(rank=6\) .* as in rank=8"),
        ({"kind": "dora"}, r"kind='dora', mixture=.* expected one of 'svd', 'lora'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], parts: str) -> None:
    with pytest.raises(ConfigError, match=parts):
        adapt(make(), **options)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected a start at ΔW = 0"):
        ac.AdapterConfig(rank=8, init="pissa", mixture=ac.Mixture())
    with pytest.raises(ConfigError, match=r"expected a Mixture or None"):
        ac.AdapterConfig(mixture=4)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"site 0\.weight: its rank is 3 .* expected at least 1 for each of 4 experts"):
        adapt(nn.Sequential(nn.Linear(16, 3)))
    with pytest.raises(SiteError, match="found no repeated blocks"):
        adapt(make(Bare), router="block")
    adapted = adapt(make())
    with pytest.raises(ConfigError, match=r"gates of the router at layers\.0\.up\.weight are \[1\.0\]"):
        adapted.fix_routing([1.0], name="one")
    plain = ac.compile_with_adapters(make(), (X,))
    with pytest.raises(ConfigError, match="'default' is no mixture and has no mask"):
        plain.fix_routing([1.0], name="one")
    text = adapt(make(), router="shared").plan.to_json().replace('"lora-experts4"', '"lora"')
    with pytest.raises(SiteError, match=r"takes the gates of layers\.0\.up\.weight, which has no mixture"):
        ac.AdapterPlan.from_json(text)
