"""What a file says of its inputs: names of open dimensions, numbers for all others, and nothing that is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import adapter_compiler as ac
from adapter_compiler.onnx import verify_onnx


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(100, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = torch.tanh(self.mix(self.embed(input_ids))) * attention_mask.unsqueeze(-1)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class OnlyLoss(Tagger):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits = self.head(self.mix(self.embed(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Pair(nn.Module):
    """Two sequences of one length in the example, which may have others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        y: Tensor = self.embed(decoder_input_ids) + self.embed(input_ids).mean(1, keepdim=True)
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 8, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.cell(x, (h, c))


IDS = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones(4, 9)}
LABELS = IDS % 5

DECLARED: dict[str, tuple[nn.Module, dict[str, Tensor], dict[str, list[int | str]]]] = {
    "text": (Tagger(), TEXT, {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}),
    "features": (nn.Sequential(nn.Linear(6, 3)), {"input": torch.randn(7, 6)}, {"input": ["batch", 6]}),
    "series": (nn.Sequential(nn.Linear(6, 3)), {"input": torch.randn(2, 30, 6)}, {"input": ["batch", "sequence", 6]}),
    "flattened image": (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        {"input": torch.randn(3, 8, 8)},
        {"input": ["batch", 8, 8]},
    ),
    "image": (
        nn.Sequential(nn.Conv2d(3, 4, 3)),
        {"input": torch.randn(2, 3, 9, 8)},
        {"input": ["batch", 3, "height", "width"]},
    ),
    "signal": (nn.Sequential(nn.Conv1d(3, 4, 3)), {"input": torch.randn(2, 3, 9)}, {"input": ["batch", 3, "length"]}),
    "pair": (
        Pair(),
        {"input_ids": IDS, "decoder_input_ids": IDS},
        {"input_ids": ["batch", "sequence"], "decoder_input_ids": ["batch", "decoder_input_ids_sequence"]},
    ),
    "recurrent": (
        Recurrent(),
        {"x": torch.randn(3, 5, 6), "h": torch.randn(1, 3, 8), "c": torch.randn(1, 3, 8)},
        {"x": ["batch", 5, 6], "h": [1, "batch", 8], "c": [1, "batch", 8]},
    ),
}


@pytest.mark.parametrize("name", DECLARED)
def test_dimensions_have_names_or_numbers(name: str, tmp_path: Path) -> None:
    model, example, expected = DECLARED[name]
    report = ac.export_onnx(model.eval(), tmp_path / "model.onnx", example_kwargs=example)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert {value.name: value.shape for value in session.get_inputs()} == expected
    assert {key: list(sizes) for key, sizes in report.sizes.items()} == expected
    opened = {key: tuple(i for i, size in enumerate(one) if isinstance(size, str)) for key, one in expected.items()}
    assert report.dynamic_axes == opened
    (output, *_) = session.get_outputs()
    assert output.shape[0] == "batch"
    text = str(report)
    assert "all dimensions" not in text
    assert all(f"input {key}: {' × '.join(map(str, sizes))}" in text for key, sizes in expected.items())


def test_another_number_of_features_is_refused_at_the_input(tmp_path: Path) -> None:
    model, example, _ = DECLARED["features"]
    ac.export_onnx(model.eval(), tmp_path / "model.onnx", example_kwargs=example)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    with pytest.raises(Exception, match="Got invalid dimensions for input: input"):
        session.run(None, {"input": numpy.zeros((7, 5), numpy.float32)})


@pytest.mark.parametrize("adapters", ["merged", "runtime"])
def test_labels_and_the_loss_are_left_out(adapters: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = {**TEXT, "labels": LABELS, "weight": torch.ones(3)}
    adapted = ac.compile_with_adapters(Tagger().eval(), example_kwargs=example, config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.normal_(0, 0.3)
    path = tmp_path / "model.onnx"
    report = ac.export_onnx(adapted, path, example_kwargs=example, adapters=adapters)
    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"] == list(report.inputs)
    assert [value.name for value in session.get_outputs()] == ["logits"] == list(report.outputs)
    assert report.left_out == ("labels", "weight", "loss")
    checked = verify_onnx(path, adapted, example_kwargs=example)
    assert {error.output for error in (*checked.errors, *report.errors)} == {"logits"}
    feeds = {name: tensor.numpy() for name, tensor in TEXT.items()}
    (logits,) = session.run(None, feeds)
    with torch.no_grad():
        model = adapted.fold() if adapters == "merged" else adapted.copy_base()
        torch.testing.assert_close(torch.from_numpy(logits), model.eval()(**TEXT)["logits"], rtol=1e-5, atol=1e-5)


def test_a_model_that_gives_nothing_but_a_loss_keeps_it(tmp_path: Path) -> None:
    example = {"input_ids": IDS, "labels": LABELS}
    report = ac.export_onnx(OnlyLoss().eval(), tmp_path / "model.onnx", example_kwargs=example)
    assert report.inputs == ("input_ids", "labels")
    assert report.left_out == ()
    assert report.sizes["labels"] == ("batch", "sequence")


def test_dimensions_that_only_vary_together_have_one_name(tmp_path: Path) -> None:
    """The exporter has a symbol of its own for the batch of a mask of ones, which the model ignores."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)).eval()
    example = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    report = ac.export_onnx(model, tmp_path / "model.onnx", example_kwargs=example)
    assert report.sizes == dict.fromkeys(("input_ids", "attention_mask"), ("batch", "sequence"))
