"""Arguments for the architectures of the zoo: (batch, length) → the keyword arguments of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[int, int], dict[str, Any]]

VOCABULARY = 64
IMAGE_TOKEN = 63
LABELS = 2
SIDE = 32
SAMPLES_PER_STEP = 16


def leave_out(inputs: Inputs, *names: str) -> Inputs:
    """The same inputs without the named ones."""

    def remaining(batch: int, length: int) -> dict[str, Any]:
        return {name: value for name, value in inputs(batch, length).items() if name not in names}

    return functools.wraps(inputs)(remaining)


def make_tokens(batch: int, length: int) -> Tensor:
    """Token ids, int64 (batch, length); 0, 1 and 2 are left to padding, start and end, the last to images."""
    return torch.randint(3, IMAGE_TOKEN, (batch, length))


def make_mask(batch: int, length: int) -> Tensor:
    """A padding mask, int64 (batch, length): the last row is padded at its end."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - length // 4 :] = 0
    return mask


def make_classes(*shape: int) -> Tensor:
    """Class labels, int64 (*shape)."""
    return torch.randint(0, LABELS, shape)


def make_boxes(batch: int, length: int) -> Tensor:
    """Where each token stands on the page, int64 (batch, length, 4): left, top, right, bottom."""
    corners = torch.randint(0, 400, (batch, length, 2))
    return torch.cat([corners, corners + 100], dim=-1)


def make_images(batch: int, *, side: int = SIDE) -> Tensor:
    """Images, float32 (batch, 3, side, side)."""
    return torch.randn(batch, 3, side, side)


def text(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens."""
    return {"input_ids": make_tokens(batch, length), "attention_mask": make_mask(batch, length)}


def text_with_class(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens and one class each."""
    return text(batch, length) | {"labels": make_classes(batch)}


def text_with_classes(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens and a class for every token."""
    return text(batch, length) | {"labels": make_classes(batch, length)}


def text_with_span(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens with the start and the end of an answer."""
    start = torch.randint(0, length // 2, (batch,))
    return text(batch, length) | {"start_positions": start, "end_positions": start + 1}


def text_to_continue(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens that are their own labels: causal or masked language modeling."""
    inputs = text(batch, length)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def text_to_text(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens and a shorter text to generate from them."""
    return text(batch, length) | {"labels": make_tokens(batch, length // 2 + 1)}


def text_to_given_text(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens, a shorter text to generate from them, and that text as the decoder reads it."""
    inputs = text_to_text(batch, length)
    return inputs | {"decoder_input_ids": inputs["labels"].roll(1, dims=1)}


def bytes_with_class(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens as the Perceiver names them, and one class each."""
    inputs = text_with_class(batch, length)
    return {"inputs": inputs.pop("input_ids"), **inputs}


def boxed_text_with_class(batch: int, length: int) -> dict[str, Any]:
    """Padded tokens with their places on the page, and one class each."""
    return text_with_class(batch, length) | {"bbox": make_boxes(batch, length)}


def document_with_class(batch: int, length: int) -> dict[str, Any]:
    """The tokens of a page, their places, its picture, and one class each."""
    return boxed_text_with_class(batch, length) | {"pixel_values": make_images(batch, side=16)}


def image(batch: int, length: int) -> dict[str, Any]:
    """Images alone."""
    return {"pixel_values": make_images(batch)}


def image_with_class(batch: int, length: int) -> dict[str, Any]:
    """Images and one class each."""
    return image(batch, length) | {"labels": make_classes(batch)}


def image_with_map(batch: int, length: int) -> dict[str, Any]:
    """Images and a class for every pixel."""
    return image(batch, length) | {"labels": make_classes(batch, SIDE, SIDE)}


def video_with_class(batch: int, length: int) -> dict[str, Any]:
    """Clips of two frames, float32 (batch, 2, 3, 16, 16), and one class each."""
    return {"pixel_values": torch.randn(batch, 2, 3, 16, 16), "labels": make_classes(batch)}


def image_and_text(batch: int, length: int) -> dict[str, Any]:
    """Matching images and texts, and a flag that asks for the contrastive loss."""
    return text(batch, length) | image(batch, length) | {"return_loss": True}


def captioned_image(batch: int, length: int) -> dict[str, Any]:
    """Images and the text to generate from each."""
    return text_to_continue(batch, length) | image(batch, length)


def image_with_answers(batch: int, length: int) -> dict[str, Any]:
    """A question about each image, and a score for every possible answer."""
    return text(batch, length) | image(batch, length) | {"labels": torch.rand(batch, LABELS)}


def image_in_text(batch: int, length: int) -> dict[str, Any]:
    """Texts to continue in which sixteen tokens stand for the patches of an image."""
    inputs = text_to_continue(batch, length)
    patches = torch.full((batch, 16), IMAGE_TOKEN)
    return {
        "input_ids": torch.cat([patches, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(patches), inputs["attention_mask"]], dim=1),
        "labels": torch.cat([torch.full_like(patches, -100), inputs["labels"]], dim=1),
        "pixel_values": make_images(batch),
    }


def regions_with_scores(batch: int, length: int) -> dict[str, Any]:
    """A question about the regions of an image, and a score for every possible answer."""
    return text(batch, length) | {
        "visual_embeds": torch.randn(batch, 3, 12),
        "visual_attention_mask": torch.ones(batch, 3, dtype=torch.int64),
        "labels": torch.rand(batch, LABELS),
    }


def placed_regions_with_class(batch: int, length: int) -> dict[str, Any]:
    """A question about the regions of an image with their places, and one class each."""
    return text_with_class(batch, length) | {
        "visual_feats": torch.randn(batch, 3, 12),
        "visual_pos": torch.rand(batch, 3, 4),
    }


def sound_with_class(batch: int, length: int) -> dict[str, Any]:
    """Sound, float32 (batch, samples), and one class each."""
    return {"input_values": torch.randn(batch, (length + 1) * SAMPLES_PER_STEP), "labels": make_classes(batch)}


def sound_to_text(batch: int, length: int) -> dict[str, Any]:
    """Sound and its transcript, shorter than the sound has frames."""
    return sound_with_class(batch, length) | {"labels": make_tokens(batch, length // 4)}


def spectrogram_with_class(batch: int, length: int) -> dict[str, Any]:
    """Spectrograms of fixed size, float32 (batch, 24, 16), and one class each."""
    return {"input_values": torch.randn(batch, 24, 16), "labels": make_classes(batch)}


def spectrogram_to_text(batch: int, length: int) -> dict[str, Any]:
    """Spectrograms of fixed size, float32 (batch, 16, 40), and their transcripts."""
    return {"input_features": torch.randn(batch, 16, 40), "labels": make_tokens(batch, length)}


def frames_to_text(batch: int, length: int) -> dict[str, Any]:
    """Spectrograms, float32 (batch, 4 × length, 16), padded, and their transcripts."""
    return {
        "input_features": torch.randn(batch, 4 * length, 16),
        "attention_mask": make_mask(batch, 4 * length),
        "labels": make_tokens(batch, length),
    }


def series_to_forecast(batch: int, length: int) -> dict[str, Any]:
    """Series of 18 steps with gaps, two clock features a step, and the 4 steps that follow."""
    return {
        "past_values": torch.rand(batch, 18) + 1,
        "past_time_features": torch.randn(batch, 18, 2),
        "past_observed_mask": (torch.rand(batch, 18) > 0.1).float(),
        "future_values": torch.rand(batch, 4) + 1,
        "future_time_features": torch.randn(batch, 4, 2),
    }


def patches_to_forecast(batch: int, length: int) -> dict[str, Any]:
    """Series of 32 steps in 3 channels, and the 8 steps that follow."""
    return {"past_values": torch.randn(batch, 32, 3), "future_values": torch.randn(batch, 8, 3)}
