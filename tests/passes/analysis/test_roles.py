"""Roles are found from the dataflow: on modules with meaningless names, and compared with names that tell the role."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_compiler.model.capture.weight_use_analysis import analyze_weight_uses
from passes.analysis.roles import ROLES, find_roles
from passes.analysis.weight_uses import find_parameter_aliases, find_weight_uses
from passes.base import CaptureError
from passes.capture.calls import split_call
from passes.capture.capture import capture_call
from tests.zoo import entries
from tests.zoo.role_checks import score_roles


def roles_of(module: nn.Module, *args: Tensor) -> dict[str, str]:
    """Roles by the name of the weight without its last part."""
    graph = capture_call(module.eval(), split_call(args, {})).graph_module
    found = find_roles(find_weight_uses(graph, find_parameter_aliases(module)))
    assert set(found.values()) <= set(ROLES)
    return {name.removesuffix(".weight"): role for name, role in found.items()}


class Letters(nn.Module):
    """Linear layers named by letters, around a residual stream of width 8."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, (fan_in, out) in shapes.items():
            self.add_module(name, nn.Linear(fan_in, out))
        self.norm = nn.LayerNorm(8)

    def apply_to(self, name: str, x: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(name)(x)
        return result


def rotate(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None]
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return x * angle.cos() + half * angle.sin()


class Attends(Letters):
    def __init__(self, written: str) -> None:
        super().__init__(a=(8, 8), b=(8, 8), c=(8, 8), d=(8, 8), e=(8, 3))
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        heads = [self.apply_to(name, h).unflatten(-1, (2, -1)).transpose(1, 2) for name in "abc"]
        attended = self.attend(rotate(heads[2]), rotate(heads[1]), heads[0])
        x = x + self.apply_to("d", attended.transpose(1, 2).flatten(2))
        return self.apply_to("e", self.norm(x).mean(1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.written == "sdpa":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if self.written == "einsum":
            scores = torch.einsum("bhjd,bhid->bhij", key, query) / math.sqrt(query.shape[-1])
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return F.dropout(scores.masked_fill(~mask, -1e9).softmax(-1), 0.1, self.training) @ value


@pytest.mark.parametrize("written", ["sdpa", "matmul", "einsum"])
def test_attention_in_every_notation(written: str) -> None:
    expected = {"a": "attention.value", "b": "attention.key", "c": "attention.query", "d": "attention.output"}
    assert roles_of(Attends(written), torch.randn(2, 5, 8)) == {**expected, "e": "head"}


class Latent(Letters):
    """Keys and values from one narrow projection, as in DeepSeek's attention."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        key, value = self.apply_to("b", F.layer_norm(self.apply_to("a", h), (4,))).chunk(2, dim=-1)
        return x + self.apply_to("d", F.scaled_dot_product_attention(self.apply_to("c", h), key, value))


def test_a_projection_in_two_steps_has_one_role() -> None:
    found = roles_of(Latent(a=(8, 4), b=(4, 16), c=(8, 8), d=(8, 8)), torch.randn(2, 5, 8))
    assert found == {"a": "attention.kv", "b": "attention.kv", "c": "attention.query", "d": "attention.output"}


def test_the_packed_weight_of_torchs_own_attention() -> None:
    found = roles_of(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8))
    assert list(found.values()) == ["attention.qkv", "attention.output", "feed_forward.up", "feed_forward.down"]


class Feeds(Letters):
    def __init__(self, kind: str) -> None:
        super().__init__(a=(8, 12), b=(8, 12), c=(12, 8), d=(8, 24), e=(8, 3))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.apply_to("c", self.widen(self.norm(x)))
        return self.apply_to("e", self.norm(x))

    def widen(self, h: Tensor) -> Tensor:
        if self.kind == "packed":
            left, right = self.apply_to("d", h).chunk(2, dim=-1)
            return left * F.gelu(right)
        up = self.apply_to("a", h)
        if self.kind == "gated":
            return F.silu(up) * self.apply_to("b", h)
        if self.kind == "written out":
            return 0.5 * up * (1 + torch.tanh(0.8 * (up + 0.04 * up.pow(3))))
        return F.relu(up).square()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gated", {"a": "gate", "b": "up", "c": "down"}),
        ("packed", {"d": "gate_up", "c": "down"}),
        ("written out", {"a": "up", "c": "down"}),
        ("squared", {"a": "up", "c": "down"}),
    ],
)
def test_feed_forward(kind: str, expected: dict[str, str]) -> None:
    found = roles_of(Feeds(kind), torch.randn(2, 5, 8))
    assert found == {**{name: f"feed_forward.{part}" for name, part in expected.items()}, "e": "head"}


class Sees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Conv2d(3, 8, 4, stride=4)
        self.t = nn.Parameter(torch.randn(1, 4, 8))
        self.q = nn.Conv1d(8, 8, 3, padding=1)
        self.r = nn.LSTM(8, 8, batch_first=True)
        self.s = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.p(images).flatten(2).transpose(1, 2) + self.t
        x = x + self.q(x.transpose(1, 2)).transpose(1, 2)
        result: Tensor = self.s(self.r(x)[0][:, -1])
        return result


def test_convolutions_tables_and_recurrences() -> None:
    assert roles_of(Sees(), torch.randn(2, 3, 8, 8)) == {
        "t": "embedding",
        "p": "patch_embedding",
        "q": "convolution",
        "r.weight_ih_l0": "recurrent",
        "r.weight_hh_l0": "recurrent",
        "s": "head",
    }


#: One model for each kind of attention and feed-forward network; benchmarks/role_accuracy.py has all models.
_MEASURED = ["bert", "gpt2", "llama", "gemma2", "phi3", "t5", "vit", "clip", "bart", "mixtral", "deepseek-v3", "mpt"]


class Tokens(Letters):
    """Overlapping patches become tokens, with a resized position embedding; keys come from a shorter sequence."""

    def __init__(self) -> None:
        super().__init__(q=(8, 8), k=(8, 8), v=(8, 8), o=(8, 8))
        self.stem, self.fewer = nn.Conv2d(3, 8, 7, stride=4, padding=3), nn.Conv2d(8, 8, 2, stride=2)
        self.again = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.places = nn.Parameter(torch.randn(1, 8, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        image = self.block(self.stem(x))
        return self.block(self.again(image)).mean((2, 3))

    def block(self, image: Tensor) -> Tensor:
        size = image.shape[-2:]
        places = F.interpolate(self.places, size=size, mode="bilinear")
        x = image.flatten(2).transpose(1, 2) + places.flatten(2).transpose(1, 2)
        kept = self.norm(self.fewer(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2))
        query, key, value = (self.apply_to(name, y) for name, y in (("q", x), ("k", kept), ("v", kept)))
        x = x + self.apply_to("o", F.scaled_dot_product_attention(query, key, value))
        result: Tensor = x.transpose(1, 2).unflatten(2, size)
        return result


def test_overlapping_patches_and_resized_position_embeddings() -> None:
    roles = roles_of(Tokens(), torch.randn(2, 3, 64, 64))
    convolutions = {"stem": "patch_embedding", "again": "patch_embedding", "fewer": "convolution"}
    attending = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.output"}
    assert roles == {**convolutions, **attending, "places": "embedding"}


class Correlates(Letters):
    """Autocorrelation as in Autoformer: the correlation of two series at each delay, by Fourier transforms."""

    def forward(self, x: Tensor) -> Tensor:
        query, key = (torch.fft.rfft(self.apply_to(name, x), dim=1) for name in "ab")
        weights = torch.fft.irfft(query * torch.conj(key), dim=1).mean(-1, keepdim=True).softmax(1)
        result: Tensor = x + weights * self.apply_to("c", x)
        return result


def test_queries_and_keys_of_a_correlation() -> None:
    roles = roles_of(Correlates(a=(8, 8), b=(8, 8), c=(8, 8)), torch.randn(2, 6, 8))
    assert (roles["a"], roles["b"]) == ("attention.query", "attention.key")


@pytest.mark.parametrize("name", [_MEASURED[0], *(pytest.param(n, marks=pytest.mark.slow) for n in _MEASURED[1:])])
def test_roles_are_those_that_names_give(name: str) -> None:
    (entry,) = entries(names=[name])
    score = score_roles(entry)
    assert score.known >= 8
    assert score.wrong == {}


def test_roles_are_found_in_submodules_with_hooks() -> None:
    model = Attends("sdpa").eval()
    model.get_submodule("c").register_forward_hook(lambda *_: None)
    found = find_roles(analyze_weight_uses(model, (torch.randn(2, 5, 8),), {}))
    assert [found[f"{name}.weight"] for name in "abcde"] == [
        "attention.value",
        "attention.key",
        "attention.query",
        "attention.output",
        "head",
    ]


class Wrapped:
    """An argument with a tensor that pytree does not find."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_calls_with_tensors_inside_objects_are_recorded() -> None:
    class Unwraps(Letters):
        def forward(self, wrapped: Wrapped) -> Tensor:
            return self.apply_to("b", F.gelu(self.apply_to("a", wrapped.x)))

    model = Unwraps(a=(8, 16), b=(16, 8)).eval()
    roles = find_roles(analyze_weight_uses(model, (Wrapped(torch.randn(2, 8)),), {}))
    assert roles == {"a.weight": "head", "b.weight": "head"}


def test_unrecordable_calls_are_observed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise CaptureError("not to be recorded")

    monkeypatch.setattr("adapter_compiler.model.capture.weight_use_analysis.record_example", refuse)
    model = Letters(a=(8, 16), b=(16, 8)).eval()
    model.forward = lambda x: model.apply_to("b", F.gelu(model.apply_to("a", x)))
    with caplog.at_level(logging.INFO, logger="adapter_compiler.model.capture.weight_use_analysis"):
        uses = analyze_weight_uses(model, (torch.randn(2, 8),), {})
    assert "not to be recorded" in caplog.text
    assert find_roles(uses) == {"a.weight": "linear", "b.weight": "linear"}
