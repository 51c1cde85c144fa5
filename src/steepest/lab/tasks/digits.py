"""The digits task: classify scikit-learn's 1,797 handwritten digits (8×8 pixels)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LabError
from ..models.digits import DigitConvNet, digit_mlp
from ..records import Metric
from .task import Split, Task

Model = Literal["mlp", "convnet"]
Labelled = tuple[Tensor, Tensor]

_HELD_OUT = 0.2


def digits_task(
    model: Model = "mlp", *, batch: int = 64, device: str | torch.device = "cpu"
) -> Task[Labelled]:
    """Create a task that trains a perceptron or a small convolutional network on handwritten digits.

    The metrics are the cross-entropy in nats and the accuracy in percent, each on a stratified fifth of the
    data. The cross-entropy is the primary one, because the accuracy of good models differs by single digits.

    Args:
        model: "mlp" (4,810 parameters) or "convnet" (6,090).
        batch: Images per step. Each epoch drops an incomplete last batch.

    Raises:
        LabError: the model's name is unknown.
    """
    models: dict[str, Callable[[], nn.Module]] = {"mlp": digit_mlp, "convnet": DigitConvNet}
    if model not in models:
        raise LabError(f"model must be 'mlp' or 'convnet', got {model!r}")
    (images, labels), validation, test = load(device)
    held_out = {"validation": validation, "test": test}

    def batches(seed: int) -> Iterator[Labelled]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
        for chosen in torch.split(order, batch):
            if len(chosen) == batch:
                yield images[chosen], labels[chosen]

    def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
        inputs, targets = held_out[split]
        logits = model(inputs)
        correct: Tensor = logits.argmax(1) == targets
        return {
            "cross-entropy": F.cross_entropy(logits, targets).item(),
            "accuracy": 100 * correct.double().mean().item(),
        }

    return Task(
        name="digits",
        make=lambda seed: models[model]().to(device),
        batches=batches,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        evaluate=evaluate,
        metrics=(
            Metric(name="cross-entropy", unit="nats"),
            Metric(name="accuracy", unit="%", lower_is_better=False),
        ),
        config={
            "model": model,
            "batch": batch,
            "train_images": len(images),
            "validation_images": len(validation[0]),
            "test_images": len(test[0]),
        },
    )


def load(device: str | torch.device = "cpu") -> tuple[Labelled, Labelled, Labelled]:
    """Load the digits as (train, validation, test), each (images, labels).

    Images are float32 of shape (count, 1, 8, 8), scaled to [0, 1]; labels are int64 of shape (count,).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).to(device).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).to(device).long()
    # The split is fixed: every trial is evaluated on the same digits.
    rest = range(len(labels))
    held_out = []
    for _ in range(2):
        rest, chosen = train_test_split(
            rest, test_size=round(_HELD_OUT * len(labels)), stratify=data.target[rest], random_state=0
        )
        held_out.append((images[chosen], labels[chosen]))
    return (images[rest], labels[rest]), held_out[1], held_out[0]
