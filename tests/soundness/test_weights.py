"""Weights used in functions, shared, computed, of other dtypes, and with other forms of adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import adapter_compiler as ac
from passes.planning.rules import AdapterRule
from tests.soundness.common import EVAL, LARGE, WATCHED, WIDTH, WITH_EXAMPLE, Run, Situation, make, params
from tests.soundness.oracle import check


class Product(torch.autograd.Function):
    """A product with its own backward, as in libraries of fused layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x, None


class NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight) + weight.sum()


def raw(expression: Callable[[Tensor, Any], Any]) -> Callable[[], nn.Module]:
    """A model that computes this with x and one raw parameter."""
    return make(lambda net, x: expression(torch.tanh(net.first(x)), net.raw))


def loop_over_columns(x: Tensor, w: Any) -> Any:
    return sum(torch.outer(x[:, i], w[i]) for i in range(WIDTH))


def rescale_in_forward(net: Any, x: Tensor) -> Any:
    """As in RWKV, which halves the weights of late layers once, at the first inference call."""
    if not net.training and net.flag:
        with torch.no_grad():
            net.first.weight.div_(2)
            net.second.weight.mul_(0.5)
        net.flag = False
    return net.second(torch.relu(net.first(x)))


def normalized_weight(net: Any, x: Tensor) -> Any:
    return F.linear(F.normalize(x), F.normalize(net.first.weight)) * 3


def masked_weight(net: Any, x: Tensor) -> Any:
    return F.linear(x, net.first.weight * torch.tril(torch.ones(WIDTH, WIDTH)), net.first.bias)


def stacked_weights(net: Any, x: Tensor) -> Any:
    weights = torch.stack([net.first.weight, net.second.weight, net.raw])
    return torch.einsum("bi,loi->lbo", x, weights)


def concatenated_weights(net: Any, x: Tensor) -> Any:
    return F.linear(x, torch.cat([net.first.weight, net.second.weight]), torch.cat([net.first.bias, net.second.bias]))


def regularized(net: Any, x: Tensor) -> Any:
    penalty = sum(w.square().sum() + w.norm(1) for w in (net.first.weight, net.second.weight))
    return net.second(net.first(x)), penalty


def tied_head(net: Any, x: Tensor) -> Any:
    return F.linear(torch.tanh(net.first(x)), net.first.weight.t())


def weights_by_the_list(net: Any, x: Tensor) -> Any:
    for weight in [net.first.weight, net.second.weight]:
        x = x @ weight.t()
    return x


def weight_as_argument(net: Any, x: Tensor, weight: Tensor) -> Any:
    return net.first(x) @ weight


USES: dict[str, Callable[[Tensor, Any], Any]] = {
    "matmul": lambda x, w: x @ w,
    "matmul-reversed": lambda x, w: (w @ x.T).T,
    "matmul-transposed": lambda x, w: x @ w.T,
    "matmul-both": lambda x, w: torch.tanh(x @ w) @ w.mT,
    "mm": lambda x, w: torch.mm(x, w),
    "mv": lambda x, w: torch.mv(w, x[0]),
    "addmm": lambda x, w: torch.addmm(x, x, w, beta=0.5, alpha=2),
    "addmm-bias": lambda x, w: torch.addmm(x[0], x, w),
    "addmm-first": lambda x, w: torch.addmm(x.T, w, x.T),
    "baddbmm": lambda x, w: torch.baddbmm(x[None], x[None], w[None]),
    "bmm-expanded": lambda x, w: torch.bmm(x[None].repeat(2, 1, 1), w.expand(2, -1, -1)),
    "linear": lambda x, w: F.linear(x, w),
    "linear-keywords": lambda x, w: F.linear(input=x, weight=w, bias=None),
    "linear-bias-of-weight": lambda x, w: F.linear(x, w, w[0]),
    "linear-of-weight": lambda x, w: F.linear(w, x),
    "linear-with-itself": lambda x, w: x @ F.linear(w, w),
    "square": lambda x, w: x @ (w @ w),
    "column": lambda x, w: x @ w[:, 2],
    "rows": lambda x, w: F.linear(x, w[2:5]),
    "columns": lambda x, w: x[:, ::2] @ w[::2],
    "single": lambda x, w: x * w[1, 2],
    "chunk": lambda x, w: torch.cat([x @ part for part in w.chunk(3, 1)], 1),
    "split": lambda x, w: torch.cat([F.linear(x, part) for part in w.split([3, 5])], 1),
    "unbind": lambda x, w: torch.stack([x @ row for row in w.unbind()], 1),
    "iterated": lambda x, w: torch.stack([x @ row for row in w], 1),
    "columns-in-a-loop": loop_over_columns,
    "gathered": lambda x, w: x @ w[torch.tensor([0, 0, 3])].T,
    "index-select": lambda x, w: x @ torch.index_select(w, 1, torch.tensor([1, 4])),
    "masked-select": lambda x, w: x.sum() * w[w > 0],
    "einsum": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "einsum-of-three": lambda x, w: torch.einsum("bi,ij,bj->b", x, w, x),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([1], [0])),
    "reshaped": lambda x, w: x.view(-1, 2, 1, 4) @ w.view(2, 4, -1),
    "permuted": lambda x, w: x @ w.permute(1, 0).contiguous(),
    "flattened": lambda x, w: x @ w.flatten().unflatten(0, (WIDTH, WIDTH)),
    "squeezed": lambda x, w: x @ w.unsqueeze(0).squeeze(0),
    "cast": lambda x, w: (x.double() @ w.double()).float(),
    "type-as": lambda x, w: x @ w.type_as(x).to(x.device),
    "clone": lambda x, w: x @ w.clone(),
    "detached": lambda x, w: x @ w.detach() + x @ w,
    "data": lambda x, w: x @ w.data + x @ w,
    "scaled": lambda x, w: x @ (w / w.norm(dim=0, keepdim=True)),
    "exponential": lambda x, w: x @ torch.exp(-w.abs()),
    "softmax": lambda x, w: x @ w.softmax(0),
    "where": lambda x, w: x @ torch.where(w > 0, w, 0.1 * w),
    "in-place-on-a-clone": lambda x, w: x @ w.clone().mul_(2),
    "dropout": lambda x, w: x @ F.dropout(w, 0.5),
    "inverse": lambda x, w: x @ torch.linalg.inv(w + 5 * torch.eye(WIDTH)),
    "matrix-exponential": lambda x, w: x @ torch.matrix_exp(w - w.T),
    "lookup": lambda x, w: x[:1] + F.embedding(torch.tensor([1, 5, 1]), w),
    "embedding-bag": lambda x, w: F.embedding_bag(torch.tensor([[1, 5], [0, 2], [3, 3]]), w) * x,
    "bilinear": lambda x, w: F.bilinear(x, x, w.expand(4, -1, -1)),
    "convolution": lambda x, w: F.conv1d(x[None].mT, w[..., None]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], (x @ w)[None], w[None, : len(x)]),
    "cdist": lambda x, w: torch.cdist(x, w),
    "cosine": lambda x, w: F.cosine_similarity(x[:, None], w[None], dim=-1),
    "function": lambda x, w: Product.apply(x, w, None),  # type: ignore[no-untyped-call]
    "function-of-transpose": lambda x, w: Product.apply(x, w.T, x[0].detach()),  # type: ignore[no-untyped-call]
    "function-new-style": lambda x, w: NewStyle.apply(x, w),  # type: ignore[no-untyped-call]
    "numpy": lambda x, w: x @ w + torch.from_numpy(w.detach().numpy().copy()).sum(),
    "kron": lambda x, w: torch.kron(x[:1], w)[:2],
    "vmap": lambda x, w: torch.vmap(lambda row: row @ w)(x),
    "new-like": lambda x, w: x @ w + torch.ones_like(w).sum() + w.new_zeros(3).sum() + torch.zeros_like(w)[0],
    "kwargs": lambda x, w: torch.matmul(input=x, other=w),
    "out": lambda x, w: torch.matmul(x.detach(), w.detach(), out=torch.empty(len(x), WIDTH)),
    "linear-three-dimensions": lambda x, w: F.linear(x[None, :, None], w),
    "repeat": lambda x, w: x @ w.repeat(1, 2),
    "scatter": lambda x, w: torch.zeros(len(x), WIDTH).index_add(1, torch.arange(WIDTH), x @ w),
    "cumulative": lambda x, w: x @ w.cumsum(0),
    "requires-grad": lambda x, w: (x @ w) * (2 if w.requires_grad else 1),
}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rescaled-in-forward": rescale_in_forward,
    "normalized": normalized_weight,
    "masked": masked_weight,
    "stacked": stacked_weights,
    "concatenated": concatenated_weights,
    "regularized": regularized,
    "tied-by-transpose": tied_head,
    "weights-in-a-list": weights_by_the_list,
}


class Tied(nn.Module):
    """One parameter under several names."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed, self.head = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 5, bias=False)
        self.middle, self.copy = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.list = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 3 for _ in range(2)])
        self.dict = nn.ParameterDict({"one": torch.randn(WIDTH, WIDTH) / 3})
        if way == "head":
            self.head.weight = self.embed.weight
        if way == "two-names":
            self.again = self.list[0]
            self.copy.weight = self.middle.weight
        if way == "module":
            self.copy = self.middle

    def forward(self, x: Tensor) -> Any:
        x = x + self.embed(torch.arange(len(x)) % 5)
        x = torch.tanh(self.copy(self.middle(x)))
        for weight in self.list:
            x = x @ weight
        x = x @ self.dict["one"]
        if self.way == "two-names":
            x = x + x @ self.again.T
        return self.head(x)


def tied(way: str) -> Callable[[], nn.Module]:
    return lambda: Tied(way)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def parametrized(function: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(WIDTH, WIDTH)
        function(layer)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), layer)

    return build


def old_weight_norm(layer: nn.Module) -> None:
    with torch.no_grad():  # otherwise the computed weight has a history and cannot be deep-copied
        torch.nn.utils.weight_norm(layer)


def of_dtype(dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: make(regularized)().to(dtype)


def draw_as(dtype: torch.dtype) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(3, WIDTH).to(dtype),)


class Fused(nn.Module):
    """Query, key and value from one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed) + F.linear(x, self.qkv.weight[:WIDTH]) + x @ self.qkv.weight[-WIDTH:].T


SPLIT = (AdapterRule(name="qkv.weight", split=3),)
PARTS = (AdapterRule(name="qkv.weight", split=(WIDTH, 2 * WIDTH), rank=3),)
FORMS = ("lora", "dora", "dora-svd")

IN_ALL_FORMS = (
    "matmul", "matmul-both", "linear", "rows", "addmm-bias", "einsum", "lookup", "convolution", "function",
)  # fmt: skip
PARAMETRIZATIONS: dict[str, Callable[[nn.Module], object]] = {
    "weight-norm": parametrizations.weight_norm,
    "spectral-norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "symmetric": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    "old-weight-norm": old_weight_norm,
    "old-spectral-norm": torch.nn.utils.spectral_norm,
}
DTYPES = {torch.float64: (1e-9, 1e-10), torch.bfloat16: (4e-2, 4e-2), torch.float16: (1e-2, 1e-2)}

TABLE = [
    *(Situation(name=f"raw-{name}", build=raw(use), runs=(EVAL, LARGE)) for name, use in USES.items()),
    *(
        Situation(name=f"{form}-{name}", build=raw(USES[name]), runs=(WATCHED,), options={"kind": form})
        for form in FORMS
        for name in IN_ALL_FORMS
    ),
    *(Situation(name=name, build=make(f)) for name, f in FUNCTIONS.items()),
    *(
        Situation(name=f"{form}-{name}", build=make(f), runs=(WATCHED, LARGE), options={"kind": form})
        for form in FORMS
        for name, f in FUNCTIONS.items()
        if "rescaled" not in name
    ),
    *(
        Situation(name=f"tied-{way}", build=tied(way), runs=WITH_EXAMPLE)
        for way in ("head", "two-names", "module", "not")
    ),
    *(
        Situation(name=f"parametrized-{name}", build=parametrized(f), runs=WITH_EXAMPLE, options={"regions": "0"})
        for name, f in PARAMETRIZATIONS.items()
    ),
    *(
        Situation(name=f"dtype-{dtype}", build=of_dtype(dtype), args=draw_as(dtype), tolerance=tolerance)
        for dtype, tolerance in DTYPES.items()
    ),
    *(
        Situation(name=f"rows-{name}-{kind}", build=Fused, options={"rules": rules, "kind": kind})
        for name, rules in {"equal": SPLIT, "parts": PARTS}.items()
        for kind in ("svd", "lora")
    ),
    Situation(name="float32-adapters-of-float64", build=of_dtype(torch.float64), args=draw_as(torch.float64),
              options={"dtype": torch.float32}),
    *(
        Situation(name=f"rescaled-under-{mode.__name__}", build=make(rescale_in_forward), around=mode)
        for mode in (torch.no_grad, torch.inference_mode)
    ),
    Situation(name="not-fused", build=make(regularized), options={"fused": False}),
    Situation(name="of-rank-one", build=make(regularized), options={"rank": 1}),
    Situation(name="rank-of-the-whole", build=make(regularized), options={"rank": 64}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_weights(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("run", [EVAL, LARGE], ids=lambda run: run.name)
def test_a_scripted_function_takes_an_inner_weight(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    function = torch.jit.script(scripted)
    situation = Situation(name="scripted", build=make(lambda net, x: function(net.first(x), net.second.weight)))
    check(situation, run, monkeypatch)


def test_isinstance() -> None:
    net: Any = make(regularized)()
    module: Any = ac.compile_with_adapters(net).module
    weight = module.first.weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, Tensor)
    assert weight.requires_grad
