"""Awkward sequence models: torch's own attention and recurrences, loops, shared layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.zoo.awkward_base import (
    HIDDEN,
    TOKENS,
    WIDTH,
    describe_awkward,
    make_weight,
    rows,
    sequences,
    signals,
    tokens,
    two_sequences,
)


class PackedAttention(nn.Module):
    """One Linear makes queries, keys and values together, which are then split."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with its packed in_proj_weight, and its weights in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with other widths of keys and values, length before batch, no weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=HIDDEN, vdim=HIDDEN, add_bias_kv=False)
        self.widen = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        memory = self.widen(memory).transpose(0, 1)
        mixed, _ = self.attention(x.transpose(0, 1), memory, memory, need_weights=False)
        return mixed.transpose(0, 1)


class PaddedEncoder(nn.Module):
    """nn.TransformerEncoder under a padding mask: its fast path in eval mode zeroes the padded steps."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=HIDDEN, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)

    def forward(self, x: Tensor, *, padding: Tensor) -> Any:
        return self.encoder(x, src_key_padding_mask=padding)


class CausalDecoder(nn.Module):
    """nn.TransformerDecoder with a causal mask made in forward."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, 2, dim_feedforward=HIDDEN, norm_first=True, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=2)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers feeds a GRU; the last states are outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.gru = nn.GRU(16, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        steps, (hidden, cell) = self.lstm(x)
        steps, last = self.gru(steps)
        return steps, hidden, cell, last


class CellLoop(nn.Module):
    """An LSTMCell and a GRUCell in a Python loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(WIDTH, HIDDEN), nn.GRUCell(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, cell = x.new_zeros(2, x.shape[0], HIDDEN).unbind(0)
        state, states = x.new_zeros(x.shape[0], WIDTH), []
        for step in x.unbind(1):
            hidden, cell = self.lstm(step, (hidden, cell))
            state = self.gru(hidden, state)
            states.append(state)
        return torch.stack(states, dim=1)


class RawRecurrence(nn.Module):
    """A recurrence from raw Parameters: one weight is used once for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.recur = make_weight(WIDTH, HIDDEN), make_weight(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        entered = x @ self.enter
        state = torch.zeros_like(entered[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(entered[:, t] + state @ self.recur)
        return state


class PackedSequence(nn.Module):
    """An LSTM over sequences packed by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, HIDDEN, batch_first=True), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        steps, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(steps)


class SharedLayers(nn.Module):
    """One block, registered three times over, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH), nn.LayerNorm(WIDTH))
        self.blocks = nn.ModuleList([block] * 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class CalledTwice(nn.Module):
    """One layer is called on two inputs of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        x, memory = self.project(x).relu(), self.project(memory).tanh()
        return self.head((x @ memory.transpose(1, 2)).softmax(-1) @ memory)


class GrownTable(nn.Module):
    """The table of positions is a plain attribute that grows on demand in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.positions = torch.zeros(0, WIDTH)

    def forward(self, ids: Tensor) -> Any:
        length = ids.shape[1]
        if self.positions.shape[0] < length:
            self.positions = torch.outer(torch.arange(length), torch.linspace(0.0, 1.0, WIDTH)).sin()
        return self.mix(self.embed(ids) + self.positions[:length])


class WaveNet(nn.Module):
    """Dilated gated convolutions with residual and skip paths, padded on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=2**i) for i in range(3)])
        self.skips = nn.ModuleList([nn.Conv1d(WIDTH, HIDDEN, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for index, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            mixed = F.glu(gate(F.pad(x, (2**index, 0))), dim=1)
            x, skipped = x + mixed, [*skipped, skip(mixed)]
        return torch.stack(skipped).sum(0).relu()


class BackcastStack(nn.Module):
    """N-BEATS: every block explains a part of the series away and adds to the forecast."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU()) for _ in range(3)])
        self.back = nn.ModuleList([nn.Linear(HIDDEN, WIDTH) for _ in range(3)])
        self.ahead = nn.ModuleList([nn.Linear(HIDDEN, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        forecast = x.new_zeros(x.shape[0], 8)
        for block, back, ahead in zip(self.blocks, self.back, self.ahead, strict=True):
            hidden = block(x)
            x, forecast = x - back(hidden), forecast + ahead(hidden)
        return forecast


class ChainTagger(nn.Module):
    """A linear-chain CRF: a transition matrix inside logsumexp, step after step."""

    def __init__(self) -> None:
        super().__init__()
        self.emit, self.transition = nn.Linear(WIDTH, 8), make_weight(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.emit(x)
        state = scores[:, 0]
        for t in range(1, x.shape[1]):
            state = torch.logsumexp(state.unsqueeze(2) + self.transition, dim=1) + scores[:, t]
        return state.logsumexp(1)


def padding(batch: int, length: int) -> dict[str, Any]:
    """Which steps are padding, bool (batch, length): the end of the last row."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[-1, -2:] = True
    return {"padding": mask}


def sequences_and_lengths(batch: int, length: int) -> tuple[Any, ...]:
    """Sequences, and the length of each; one has them all."""
    return torch.randn(batch, length, WIDTH), length - torch.arange(batch)


SEQUENCES = (
    describe_awkward("packed-qkv", PackedAttention, sequences, "packed-qkv"),
    describe_awkward("self-attention", SelfAttention, sequences, "packed-qkv"),
    describe_awkward("cross-attention", CrossAttention, two_sequences),
    describe_awkward("padded-encoder", PaddedEncoder, sequences, "packed-qkv", "mode", inputs=padding),
    describe_awkward("causal-decoder", CausalDecoder, two_sequences, "packed-qkv"),
    describe_awkward("recurrent", Recurrent, sequences, "recurrent"),
    describe_awkward("cell-loop", CellLoop, sequences, "recurrent", "python-loop"),
    describe_awkward("raw-recurrence", RawRecurrence, sequences, "recurrent", "python-loop"),
    describe_awkward("packed-sequence", PackedSequence, sequences_and_lengths, "recurrent", "data-dependent"),
    describe_awkward("shared-layers", SharedLayers, sequences, "shared-layers"),
    describe_awkward("called-twice", CalledTwice, two_sequences, "shared-layers"),
    describe_awkward("grown-table", GrownTable, tokens, "python-state"),
    describe_awkward("wavenet", WaveNet, signals, "convolution"),
    describe_awkward("backcast-stack", BackcastStack, rows),
    describe_awkward("chain-tagger", ChainTagger, sequences, "python-loop"),
)
