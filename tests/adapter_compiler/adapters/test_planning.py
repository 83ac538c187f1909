"""Rules and plans end to end: ranks by rule, a plan made without weights and used with them, the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import SiteError
from adapter_compiler.report.model_map import map_model
from adapter_compiler.report.model_picture import draw_model


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(query, key, value))
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Transformer(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.top = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.top(x)
        return result


def make_tokens() -> Tensor:
    return torch.randint(0, 16, (2, 5))


def test_ranks_and_scales_by_rule(tmp_path: Path) -> None:
    rules = (
        ac.AdapterRule(role="attention.*", rank=4, alpha=8.0, expect=6),
        ac.AdapterRule(depth=0, rank=2),
        ac.AdapterRule(role="head", exclude=True),
    )
    config = ac.AdapterConfig(rank=6, alpha=3.0, rules=rules)
    adapted = ac.compile_with_adapters(Transformer().eval(), (make_tokens(),), config=config)
    planned = {a.site.name.removesuffix(".weight"): (a.rank, a.scale) for a in adapted.plan}
    assert {planned[f"blocks.{i}.{part}"] for i in range(3) for part in ("qkv", "out")} == {(4, 2.0)}
    assert (planned["blocks.0.up"], planned["blocks.2.up"], "top" in planned) == ((2, 1.5), (6, 0.5), False)
    assert [block.title for block in map_model(adapted)][1:3] == ["blocks.0", "blocks.1–2 (2 equal blocks)"]
    assert "blocks.1–2 (2 equal blocks)" in draw_model(adapted, tmp_path / "model.svg").read_text(encoding="utf-8")


def test_a_plan_made_without_weights_works_with_them() -> None:
    config = ac.AdapterConfig(rank=4, rules=(ac.AdapterRule(role="attention.*", rank=2),))
    with torch.device("meta"):
        shapes = Transformer().eval()
    on_meta = ac.compile_with_adapters(shapes, (make_tokens(),), config=config)
    assert all(tensor.is_meta for tensor in (*on_meta.parameters(), *on_meta.buffers()))
    model, tokens = Transformer().eval(), make_tokens()
    plan = ac.AdapterPlan.from_json(on_meta.plan.to_json())
    assert plan == ac.compile_with_adapters(model, (tokens,), config=config).plan
    adapted = ac.compile_with_adapters(model, (tokens,), plan=plan)
    torch.testing.assert_close(adapted(tokens), model(tokens))
    with pytest.raises(SiteError, match=r"blocks\.2\.qkv\.weight, which Transformer does not have"):
        ac.compile_with_adapters(Transformer(depth=2), plan=plan)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ac.AdapterRule(role="router"), "applies to no weight"),
        (ac.AdapterRule(role="feed_forward.up", expect=24), "applies to 3 weights, expected 24"),
    ],
)
def test_rules_that_match_nothing_are_errors(rule: ac.AdapterRule, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        ac.compile_with_adapters(Transformer().eval(), (make_tokens(),), config=ac.AdapterConfig(rules=(rule,)))
