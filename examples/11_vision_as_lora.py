"""Vision as LoRA: a language model that knows text only learns to read digits, and its text stays bit for bit the same.

    python examples/11_vision_as_lora.py

A tiny causal language model has learned to count in words. It gets scikit-learn's handwritten digits as further tokens
in front of the text: a linear layer that trains fully turns the patches of an image into embeddings, and adapters on
all linear layers act on these tokens only, by a mask among the inputs. After the training the model names the digit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "count", "image")
COUNT, IMAGE = 10, 11
WIDTH, PATCHES, STEPS = 48, 4, 400


class Block(nn.Module):
    """Causal attention and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width]."""
        normal = self.norms[0](x)
        heads = (layer(normal).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class LanguageModel(nn.Module):
    """Words, and images in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.positions = nn.Embedding(24, WIDTH)
        self.patches = nn.Linear(64 // PATCHES, WIDTH)  # new: the light embedding of images
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(WORDS))

    def forward(self, words: Tensor, images: Tensor | None = None, image_mask: Tensor | None = None) -> Tensor:
        """Logits [batch, tokens, words], of words [batch, n] after the patches of images [batch, 8, 8] if given.

        ``image_mask`` [batch, tokens] says which tokens are patches; only the adapters read it.
        """
        x = self.words(words)
        if images is not None:
            cut = images.unflatten(2, (2, 4)).unflatten(1, (2, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
            x = torch.cat([self.patches(cut), x], 1)
        x = x + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def draw_text(count: int) -> Tensor:
    """Rows such as "count three four five six"."""
    start = torch.randint(10, (count, 1))
    return torch.cat([torch.full((count, 1), COUNT), (start + torch.arange(6)) % 10], 1)


def main() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        text = draw_text(32)
        F.cross_entropy(model(text)[:, 1:-1].flatten(0, 1), text[:, 2:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    pixels, labels = load_digits(return_X_y=True)
    images, names = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(names))
    train, test = order[:1200], order[1200:]

    def ask(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The word "image" after an image, and the mask of the patches."""
        words = torch.full((len(rows), 1), IMAGE)
        return words, images[rows], (torch.arange(PATCHES + 1) < PATCHES).expand(len(rows), -1)

    config = ac.AdapterConfig(kind="lora", rank=16, sites="blocks.*", trainable="patches.*", token_mask="image_mask")
    adapted = ac.compile_with_adapters(model, ask(train[:2]), config=config)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=5e-3)
    for _ in range(STEPS):
        rows = train[torch.randint(len(train), (32,))]
        F.cross_entropy(adapted(*ask(rows))[:, -1], names[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()

    adapted.eval()
    with torch.no_grad():
        right = (adapted(*ask(test))[:, -1].argmax(-1) == names[test]).float().mean()
        text = draw_text(64)
        is_same = torch.equal(adapted(text), model(text))
        first = WORDS[int(adapted(*ask(test[:1]))[0, -1].argmax())]
    with tempfile.TemporaryDirectory() as folder:
        report = ac.export_onnx(adapted, Path(folder) / "vision.onnx", ask(test[:3]))
    say = Console(highlight=False).print
    say(f"the model names {right:.1%} of the held-out digits; the first, a {int(names[test[0]])}, is called {first!r}")
    say(f"text without images is the same bit for bit: {is_same}")
    say(f"largest error of the file, which takes words, images and mask, on onnxruntime: {report.max_abs_error:.1e}")
    assert right > 0.7, "the model should read digits"
    assert is_same, "text must not change"
    assert report.max_abs_error < 1e-3, "the file should be right"


if __name__ == "__main__":
    main()
