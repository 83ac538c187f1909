"""torch's layers other than nn.Linear, in all their variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.soundness.common import (
    CHECKPOINT,
    EVAL,
    LARGE,
    WATCHED,
    WIDTH,
    Run,
    Situation,
    adapt,
    params,
    plain_call,
    put,
    seed,
)
from tests.soundness.oracle import Oracle, assert_close, check

LENGTHS = [5, 3, 2]


class Around(nn.Module):
    """A layer between two linear layers, called by a given function."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any] = lambda layer, *x: layer(*x)) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, WIDTH)
        self.call = call

    def forward(self, *args: Any) -> Any:
        x, *others = args
        y = self.call(self.layer, torch.tanh(self.before(x)) if x.is_floating_point() else x, *others)
        if isinstance(y, Tensor) and y.shape[-1] == WIDTH:
            return self.after(y)
        return y


def image(*spatial: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, *spatial, WIDTH),)


def channels_first(layer: Any, x: Tensor) -> Any:
    return layer(x.movedim(-1, 1)).movedim(1, -1)


def channels_last(layer: Any, x: Tensor) -> Any:
    return layer(x.movedim(-1, 1).contiguous(memory_format=torch.channels_last)).movedim(1, -1)


def without_batch(layer: Any, x: Tensor) -> Any:
    return layer(x[0].movedim(-1, 0))


def sequence() -> tuple[Any, ...]:
    return (torch.randn(3, 5, WIDTH),)


def longer_sequence() -> tuple[Any, ...]:
    return (torch.randn(2, 7, WIDTH),)


def tokens() -> tuple[Any, ...]:
    return (torch.tensor([[1, 2, 0, 4], [3, 3, 5, 0]]),)


def bags() -> tuple[Any, ...]:
    return torch.tensor([1, 2, 4, 5, 4, 3, 2, 6]), torch.tensor([0, 3, 3])


def of_layer(name: str, make: Callable[[], nn.Module], call: Any = None, **options: Any) -> Situation:
    calling = () if call is None else (call,)
    return Situation(name=name, build=lambda: Around(make(), *calling), **{"runs": (EVAL, WATCHED), **options})


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "conv1d": (lambda: nn.Conv1d(WIDTH, WIDTH, 3), (6,)),
    "conv1d-same": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding="same"), (6,)),
    "conv1d-same-even": (lambda: nn.Conv1d(WIDTH, WIDTH, 4, padding="same", dilation=2), (6,)),
    "conv1d-valid": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding="valid"), (6,)),
    "conv1d-reflect": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=2, padding_mode="reflect"), (6,)),
    "conv1d-circular": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"), (6,)),
    "conv1d-groups": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, groups=4), (6,)),
    "conv1d-depthwise": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False), (6,)),
    "conv1d-stride": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, stride=2, dilation=2), (9,)),
    "conv2d": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), (4, 5)),
    "conv2d-pointwise": (lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=False), (4, 5)),
    "conv2d-mixed": (lambda: nn.Conv2d(WIDTH, WIDTH, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (5, 4)),
    "conv2d-replicate": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=(1, 2), padding_mode="replicate"), (4, 5)),
    "conv2d-same": (lambda: nn.Conv2d(WIDTH, WIDTH, (2, 3), padding="same"), (4, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=2, padding=1), (4, 5)),
    "conv3d": (lambda: nn.Conv3d(WIDTH, WIDTH, 2, padding=1), (3, 2, 3)),
    "conv3d-same": (lambda: nn.Conv3d(WIDTH, WIDTH, (1, 2, 3), padding="same"), (3, 2, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 3, stride=2), (5,)),
    "transposed2d": (lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, stride=2, output_padding=1, padding=1), (3, 4)),
    "transposed2d-groups": (lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, groups=4, dilation=2), (3, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(WIDTH, WIDTH, 2), (2, 2, 3)),
}

EMBEDDINGS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(7, WIDTH),
    "embedding-padding": lambda: nn.Embedding(7, WIDTH, padding_idx=0),
    "embedding-negative-padding": lambda: nn.Embedding(7, WIDTH, padding_idx=-3),
    "embedding-sparse": lambda: nn.Embedding(7, WIDTH, sparse=True),
    "embedding-by-frequency": lambda: nn.Embedding(7, WIDTH, scale_grad_by_freq=True),
}

BAGS: dict[str, Callable[[], nn.Module]] = {
    "bag-mean": lambda: nn.EmbeddingBag(7, WIDTH),
    "bag-sum": lambda: nn.EmbeddingBag(7, WIDTH, mode="sum", padding_idx=4),
    "bag-max": lambda: nn.EmbeddingBag(7, WIDTH, mode="max"),
    "bag-sparse": lambda: nn.EmbeddingBag(7, WIDTH, mode="sum", sparse=True),
}

RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "lstm-two-layers": lambda: nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True),
    "lstm-bidirectional": lambda: nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True),
    "lstm-projected": lambda: nn.LSTM(WIDTH, 5, proj_size=4, batch_first=True),
    "lstm-without-bias": lambda: nn.LSTM(WIDTH, WIDTH, bias=False, batch_first=True),
    "lstm-dropout": lambda: nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.4, batch_first=True),
    "gru": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    "gru-bidirectional": lambda: nn.GRU(WIDTH, WIDTH, num_layers=2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(WIDTH, WIDTH, batch_first=True),
    "rnn-relu": lambda: nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True),
}

CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm-cell": lambda: nn.LSTMCell(WIDTH, WIDTH),
    "gru-cell": lambda: nn.GRUCell(WIDTH, WIDTH),
    "rnn-cell": lambda: nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu"),
}


def run_recurrent(layer: Any, x: Tensor) -> Any:
    output, state = layer(x)
    return output, state, layer(x[:, :2], state)[0]


def run_packed(layer: Any, x: Tensor) -> Any:
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True)
    output, state = layer(packed)
    assert isinstance(output, PackedSequence)
    return pad_packed_sequence(output, batch_first=True)[0], state


def run_cell(layer: Any, x: Tensor) -> Any:
    state = None
    for step in x.unbind(1):
        state = layer(step, state)
    return state


def self_attention(layer: Any, x: Tensor) -> Any:
    return layer(x, x, x)


def cross_attention(layer: Any, x: Tensor) -> Any:
    return layer(x[:, :2], x * 2, x * 2)


def attention_without_weights(layer: Any, x: Tensor) -> Any:
    return layer(x, x, x, need_weights=False)


def masked_attention(layer: Any, x: Tensor) -> Any:
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[0, -2:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).isinf()
    return layer(x, x, x, key_padding_mask=mask, attn_mask=causal, average_attn_weights=False)


def other_dimensions(layer: Any, x: Tensor) -> Any:
    return layer(x, x[..., :6], x[..., 2:7])


def lone_attention(layer: Any, x: Tensor) -> Any:
    return layer(x[0], x[0], x[0])


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(WIDTH, 2, **{"batch_first": True, **options})


ATTENTION: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "attention": (attention(), self_attention),
    "attention-without-weights": (attention(), attention_without_weights),
    "attention-cross": (attention(), cross_attention),
    "attention-masked": (attention(), masked_attention),
    "attention-sequence-first": (attention(batch_first=False), self_attention),
    "attention-of-one": (attention(), lone_attention),
    "attention-dropout": (attention(dropout=0.4), self_attention),
    "attention-without-bias": (attention(bias=False), self_attention),
    "attention-other-dimensions": (attention(kdim=6, vdim=5), other_dimensions),
    "attention-bias-kv": (attention(add_bias_kv=True), self_attention),
    "attention-zero": (attention(add_zero_attn=True), masked_attention),
}


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 12, **{"batch_first": True, "dropout": 0.1, **options})


def padded(encoder: Any, x: Tensor) -> Any:
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[0, -2:] = mask[1, -1:] = True
    return encoder(x, src_key_padding_mask=mask)


def decode(decoder: Any, x: Tensor) -> Any:
    causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return decoder(x, x * 2, tgt_mask=causal, tgt_is_causal=True)


def translate(transformer: Any, x: Tensor) -> Any:
    return transformer(x, x[:, :3] + 1)


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any] | None]] = {
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), None),
    "encoder-padded": (lambda: nn.TransformerEncoder(encoder_layer(), 2), padded),
    "encoder-gelu": (lambda: nn.TransformerEncoder(encoder_layer(activation="gelu"), 2), padded),
    "encoder-norm-first": (
        lambda: nn.TransformerEncoder(encoder_layer(norm_first=True), 2, enable_nested_tensor=False), padded,
    ),
    "encoder-not-nested": (lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False), padded),
    "encoder-layer": (encoder_layer, padded),
    "decoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 12, batch_first=True), 2), decode),
    "transformer": (lambda: nn.Transformer(WIDTH, 2, 1, 1, 12, batch_first=True), translate),
}  # fmt: skip


def load_into(model: Any) -> None:
    seed(23)
    state = {key: torch.randn(value.shape) / 3 for key, value in model.layer.state_dict().items()}
    model.layer.load_state_dict(state)


def matrix(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape) / 3)


Change = tuple[Callable[[], nn.Module], Callable[..., Any], Callable[[], tuple[Any, ...]], Callable[[Any], object]]
CHANGED: dict[str, Change] = {
    "lstm-weight": (RECURRENT["lstm"], run_recurrent, sequence, put("layer.weight_ih_l0", matrix(4 * WIDTH, WIDTH))),
    "lstm-loaded": (RECURRENT["lstm-bidirectional"], run_recurrent, sequence, load_into),
    "gru-loaded": (RECURRENT["gru"], run_recurrent, sequence, load_into),
    "rnn-weight": (RECURRENT["rnn"], run_recurrent, sequence, put("layer.weight_hh_l0", matrix(WIDTH, WIDTH))),
    "cell-weight": (CELLS["gru-cell"], run_cell, sequence, put("layer.weight_hh", matrix(3 * WIDTH, WIDTH))),
    "attention-weight": (attention(), self_attention, sequence, put("layer.in_proj_weight", matrix(3 * WIDTH, WIDTH))),
    "attention-loaded": (attention(kdim=6, vdim=5), other_dimensions, sequence, load_into),
    "encoder-loaded": (lambda: encoder_layer(dropout=0.0), padded, sequence, load_into),
    "embedding-weight": (EMBEDDINGS["embedding"], plain_call, tokens, put("layer.weight", matrix(7, WIDTH))),
    "conv-weight": (CONVOLUTIONS["conv1d"][0], channels_first, image(6), put("layer.weight", matrix(WIDTH, WIDTH, 3))),
    "transposed-loaded": (CONVOLUTIONS["transposed1d"][0], channels_first, image(6), load_into),
    "bag-loaded": (BAGS["bag-mean"], plain_call, bags, load_into),
}

TABLE = [
    *(of_layer(n, make, channels_first, args=image(*size)) for n, (make, size) in CONVOLUTIONS.items()),
    of_layer("conv2d-channels-last", lambda: nn.Conv2d(WIDTH, WIDTH, 3), channels_last, args=image(4, 5)),
    of_layer("conv1d-without-batch", lambda: nn.Conv1d(WIDTH, WIDTH, 3), without_batch, args=image(5)),
    of_layer("conv-padding-changed", lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), channels_first, args=image(6),
             change=lambda m: setattr(m.layer, "padding", (2,))),
    of_layer("conv-mode-changed", lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), channels_first, args=image(4, 4),
             change=lambda m: setattr(m.layer, "padding_mode", "circular")),
    *(of_layer(n, make, args=tokens) for n, make in EMBEDDINGS.items()),
    of_layer("embedding-padding-changed", EMBEDDINGS["embedding"], args=tokens, shows_in=(),
             change=lambda m: setattr(m.layer, "padding_idx", 3)),
    *(of_layer(n, make, args=bags) for n, make in BAGS.items()),
    *(of_layer(n, make, run_recurrent, args=sequence, later=longer_sequence) for n, make in RECURRENT.items()),
    *(of_layer(f"{n}-packed", make, run_packed, args=sequence) for n, make in RECURRENT.items()),
    *(of_layer(n, make, run_cell, args=sequence) for n, make in CELLS.items()),
    *(of_layer(n, make, call, args=sequence, later=longer_sequence) for n, (make, call) in ATTENTION.items()),
    *(of_layer(n, make, call, args=sequence, runs=(EVAL, WATCHED, CHECKPOINT, LARGE))
      for n, (make, call) in TRANSFORMERS.items()),
    *(of_layer(f"{n}-no-grad", make, call, args=sequence, later_around=torch.no_grad, shows_in=(), runs=(EVAL,))
      for n, (make, call) in {**ATTENTION, **TRANSFORMERS}.items()),
    *(of_layer(f"{n}-inference-mode", make, call, runs=(EVAL,), args=sequence,
               later_around=torch.inference_mode, shows_in=())
      for n, (make, call) in TRANSFORMERS.items()),
    *(of_layer(f"{n}-changed", make, call, args=args, change=change, rebased=True)
      for n, (make, call, args, change) in CHANGED.items()),
    of_layer("bilinear", lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH), lambda layer, x: layer(x, x * 2)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel", "ignore:.*nested_tensor")
@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_layers(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_an_embedding_that_renormalizes_its_weight(norm_type: float) -> None:
    seed(1)
    model = nn.Sequential(nn.Embedding(7, WIDTH, max_norm=1.0, norm_type=norm_type), nn.Linear(WIDTH, WIDTH)).eval()
    adapted = adapt(model, tokens())
    oracle = Oracle(adapted, model)
    for _ in range(2):
        assert_close(adapted(*tokens()), oracle.model(*tokens()))
    adapted(*tokens()).square().sum().backward()
    assert all(p.grad is not None for p in adapted.adapters.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_places_are_zero_where_they_are_in_eager() -> None:
    seed(1)
    model = Around(nn.TransformerEncoder(encoder_layer(), 2), padded).eval()
    model.register_module("after", nn.Identity())
    (x,) = sequence()
    adapted = adapt(model, (x,))
    with torch.no_grad():
        found, expected = adapted(x), Oracle(adapted, model).model.requires_grad_(False)(x)
    assert bool((expected[0, -2:] == 0).all())
    assert_close(found, expected)
    assert_close(adapted.fold()(x).detach(), Oracle(adapted, model).model(x).detach())
