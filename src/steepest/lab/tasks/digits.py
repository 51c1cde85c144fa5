"""The digits task: classify scikit-learn's 1,797 handwritten digits (8×8 pixels); percent accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.digits import DigitConvNet, digit_mlp
from ..task import Task

Model = Literal["mlp", "convnet"]
Labelled = tuple[Tensor, Tensor]

_TEST_FRACTION = 0.2
# The split is fixed: every trial is evaluated on the same test digits.
_SPLIT_SEED = 0


def digits_task(
    model: Model = "mlp", *, batch: int = 64, device: str | torch.device = "cpu"
) -> Task[Labelled]:
    """Create a task that trains a perceptron or a small convolutional network on handwritten digits.

    Args:
        model: "mlp" (4,810 parameters) or "convnet" (6,090).
        batch: Images per step. Each epoch drops an incomplete last batch.
        device: The training device.

    Returns:
        The task; its metric is the accuracy in percent on a stratified fifth of the data.

    Raises:
        ValueError: the model's name is unknown.
    """
    if model not in ("mlp", "convnet"):
        raise ValueError(f"model must be 'mlp' or 'convnet', got {model!r}")
    (images, labels), (test_images, test_labels) = load(device)

    def make(seed: int) -> nn.Module:
        return (digit_mlp() if model == "mlp" else DigitConvNet()).to(device)

    def batches(seed: int) -> Iterator[Labelled]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
        for chosen in torch.split(order, batch):
            if len(chosen) == batch:
                yield images[chosen], labels[chosen]

    def loss(model: nn.Module, batch: Labelled) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(model: nn.Module) -> float:
        correct: Tensor = model(test_images).argmax(1) == test_labels
        return 100 * correct.double().mean().item()

    return Task(
        name="digits",
        make=make,
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        metric="test accuracy",
        unit="%",
        lower_is_better=False,
        config={
            "model": model,
            "batch": batch,
            "train_images": len(images),
            "test_images": len(test_images),
        },
    )


def load(device: str | torch.device = "cpu") -> tuple[Labelled, Labelled]:
    """Load the digits as (train, test), each (images, labels).

    Images are float32 of shape (count, 1, 8, 8), scaled to [0, 1]; labels are int64 of shape (count,).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    split = train_test_split(
        data.images, data.target, test_size=_TEST_FRACTION, stratify=data.target, random_state=_SPLIT_SEED
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part).to(device) for part in split)
    return _labelled(train_x, train_y), _labelled(test_x, test_y)


def _labelled(pixels: Tensor, labels: Tensor) -> Labelled:
    return (pixels.float() / 16).unsqueeze(1), labels.long()
