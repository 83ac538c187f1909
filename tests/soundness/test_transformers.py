"""Tiny models of transformers: training, options of the library, generation with caches and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.soundness.common import EVAL, LARGE, Run, Situation, adapt, params, randomize, seed
from tests.soundness.oracle import assert_close, check

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the library about itself


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=37, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=37, n_positions=32, bos_token_id=1, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=37,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def draw_tokens() -> tuple[Any, ...]:
    return (torch.randint(1, 37, (2, 6)),)


def draw_longer() -> tuple[Any, ...]:
    return (torch.randint(1, 37, (3, 9)),)


def get_loss(model: Any, tokens: Tensor) -> Any:
    result = model(tokens, labels=tokens)
    return result.loss, result.logits


def get_class_loss(model: Any, tokens: Tensor) -> Any:
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    result = model(tokens, attention_mask=mask, labels=torch.tensor([0] * len(tokens)), output_hidden_states=True)
    return result.loss, result.logits, result.hidden_states


def checkpoint(reentrant: bool) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    return change


def without_cache(model: Any) -> None:
    model.config.use_cache = False


def get_logits_and_cache(model: Any, tokens: Tensor) -> Any:
    result = model(tokens)
    return result.logits, result.past_key_values is None


def of(name: str, build: Callable[[], Any], call: Callable[..., Any] = get_loss, **options: Any) -> Situation:
    options = {"args": draw_tokens, "later": draw_longer, "runs": (EVAL, LARGE), "shows_in": (), **options}
    return Situation(name=name, build=build, call=call, options={"sites": "all-linear"}, **options)


TABLE = [
    of("llama", llama),
    of("gpt2", gpt2),
    of("bert", bert, get_class_loss),
    of("llama-checkpointed", llama, change=checkpoint(False)),
    of("gpt2-checkpointed", gpt2, change=checkpoint(False)),
    of("llama-reentrant", llama, change=checkpoint(True)),
    of("llama-eager-attention", llama, change=lambda m: m.set_attn_implementation("eager")),
    of("bert-eager-attention", bert, get_class_loss, change=lambda m: m.set_attn_implementation("eager")),
    of("gpt2-dropout", gpt2, change=lambda m: setattr(m.transformer.drop, "p", 0.5)),
    of("llama-without-cache", llama, get_logits_and_cache, change=without_cache),
    of("llama-body", llama, lambda m, tokens: m.model(tokens).last_hidden_state),
    of("gpt2-block", gpt2, lambda m, tokens: m.transformer.h[0](m.transformer.wte(tokens))),
]


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_transformers(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without-cache": {"use_cache": False},
    "sampled": {"do_sample": True, "top_k": 9, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "static-cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(build, options, id=f"{build.__name__}-{name}", marks=pytest.mark.slow if is_slow else [])
        for build, slow in ((llama, ("without-cache",)), (gpt2, ("beams", "static-cache")))
        for name, options in GENERATION.items()
        for is_slow in [name in slow]
    ],
)
def test_generation_is_that_of_the_folded_model(build: Callable[[], Any], options: dict[str, Any]) -> None:
    seed(1)
    model = build().eval()
    tokens = torch.randint(1, 37, (2, 6))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # padded on the left
    tokens[0, :3] = 0
    adapted: Any = adapt(model, () if options else (tokens,), sites="all-linear")
    randomize(adapted, 1.0)
    folded: Any = adapted.fold()
    call = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, **options}
    found = []
    for one in (adapted, adapted.module, folded, model):
        seed(5)
        found.append(one.generate(tokens, **call))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[2], found[3])
    with adapted.disable_adapters():
        seed(5)
        assert torch.equal(adapted.generate(tokens, **call), found[3])
    logits = [one(tokens, attention_mask=mask).logits for one in (adapted, folded)]
    assert_close(*logits)


def test_weights_are_tied_again() -> None:
    seed(1)
    model = gpt2().eval()
    tokens = torch.randint(0, 37, (2, 6))
    adapted: Any = adapt(model, (tokens,))
    expected = adapted.fold()(tokens).logits
    assert_close(adapted(tokens).logits, expected)
    adapted.tie_weights()
    assert_close(adapted(tokens).logits, expected)
    assert_close(adapted.fold()(tokens).logits, expected)
