"""The data: the handwritten digits that are part of scikit-learn, and the changed task."""

from __future__ import annotations

import dataclasses

import torch

from adapter_compiler.errors import MissingDependencyError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledImages:
    """Images and their labels.

    Attributes:
        images: [n, 8, 8], values from 0 to 1.
        labels: [n], values from 0 to 9.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(seed: int) -> tuple[LabeledImages, LabeledImages]:
    """The 1,797 digits in random order: two thirds for training, then one third for testing.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo reads its images from scikit-learn, which cannot be imported ({error}); install it with: "
            "pip install 'adapter-compiler[demo]'"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    everything = LabeledImages(
        images=torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 8, 8) / 16,
        labels=torch.as_tensor(labels, dtype=torch.int64),
    )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    cut = 2 * len(everything) // 3
    return _take(everything, order[:cut]), _take(everything, order[cut:])


def rotate_and_invert(digits: LabeledImages) -> LabeledImages:
    """The changed task: the same digits rotated by 90° to the left, black on white instead of white on black."""
    return LabeledImages(images=1 - torch.rot90(digits.images, 1, (1, 2)), labels=digits.labels)


def _take(digits: LabeledImages, rows: torch.Tensor) -> LabeledImages:
    return LabeledImages(images=digits.images[rows], labels=digits.labels[rows])
