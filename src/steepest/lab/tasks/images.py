"""The images task: ResNet-18 or a vision transformer on CIFAR, on a folder of images, or on digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LabError
from ..models.resnet import ResNet18
from ..models.vit import ViT
from ..records import Metric
from .image_data import digits, load_images
from .task import Split, Task

Batch = tuple[Tensor, Tensor]

_EPOCHS = 50
_CHUNK = 512


def images_task(
    data: Path | None = None,
    *,
    model: Literal["resnet18", "vit_s16"] = "resnet18",
    size: int = 32,
    batch: int | None = None,
    augment: bool = True,
    channels: int | None = None,
    patch: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    device: str | torch.device = "cpu",
) -> Task[Batch]:
    """Create a task that classifies images.

    Training images are padded by an eighth of their size (4 at 32×32), cropped at random, and flipped
    half of the time, unless they are digits; all are normalized with the training data's mean and
    standard deviation of each channel. Accuracy is the primary metric, because it is what the published
    comparisons on these data show; the loss is returned beside it.

    Args:
        data: CIFAR's python batches or a folder of images, see `load_images`. By default scikit-learn's
            digits, enlarged, with smaller models.
        model: "resnet18", or "vit_s16", the vision transformer with ViT-S/16's sizes.
        size: Height and width of the images. ResNet-18 has ImageNet's stem above 64.
        batch: Images per step; by default 128 (digits: 32). Each epoch drops an incomplete last batch.
        augment: Whether training images are cropped and flipped at random.
        channels: ResNet-18's channels in its first stage; by default 64 (digits: 4).
        patch, width, depth, heads: The transformer's sizes; by default 384, 12 and 6 with patches of 4 up to
            size 64, and of 16 above (digits: 8, 64, 3 and 4).
        device: It also holds the data, a byte a value.

    Returns:
        The task: 1000 steps on digits, otherwise 50 epochs, but at least 1000 steps.

    Raises:
        LabError: the data cannot be read, are fewer than a batch, or do not fit the model; or a size is
            not that of the chosen model, or not positive.
    """
    small = data is None
    if model == "resnet18":
        sizes = {"channels": 4 if small else 64}
    elif model != "vit_s16":
        raise LabError(f"model must be 'resnet18' or 'vit_s16', got {model!r}")
    elif small:
        sizes = {"patch": 8, "width": 64, "depth": 3, "heads": 4}
    else:
        sizes = {"patch": 4 if size <= 64 else 16, "width": 384, "depth": 12, "heads": 6}
    batch = (32 if small else 128) if batch is None else batch
    given = {"channels": channels, "patch": patch, "width": width, "depth": depth, "heads": heads}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in {"size": size, "batch": batch, **chosen}.items():
        if value < 1:
            raise LabError(f"{name} must be at least 1, got {value}")
        if name in chosen and name not in sizes:
            raise LabError(f"{name}={value} is not a size of {model}, which has {', '.join(sizes)}")
    sizes |= chosen

    images = digits(size) if data is None else load_images(Path(data), size)
    train = images.train.to(device)
    held_out = {"validation": images.validation.to(device), "test": images.test.to(device)}
    if len(train) < batch:
        raise LabError(f"{images.source}: {len(train)} training images are fewer than a batch of {batch}")
    mean, std = channel_statistics(train.pixels)
    image_channels = train.pixels.shape[1]

    def make(seed: int) -> nn.Module:
        if model == "vit_s16":
            return ViT(images.classes, size=size, image_channels=image_channels, **sizes).to(device)
        stem: Literal["cifar", "imagenet"] = "cifar" if size <= 64 else "imagenet"
        return ResNet18(images.classes, image_channels=image_channels, stem=stem, **sizes).to(device)

    def normalized(pixels: Tensor) -> Tensor:
        return (pixels.float() - mean) / std

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train), generator=generator)
        for index in order.to(device)[: len(order) // batch * batch].view(-1, batch):
            pixels = train.pixels[index]
            if augment:
                pixels = crop_and_flip(pixels, generator, padding=size // 8, flip=not small)
            yield normalized(pixels), train.labels[index]

    def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
        part = held_out[split]
        sums = torch.zeros(2, device=device)
        for pixels, labels in zip(
            torch.split(part.pixels, _CHUNK), torch.split(part.labels, _CHUNK), strict=True
        ):
            logits = model(normalized(pixels)).float()
            correct = (logits.argmax(1) == labels).float().sum()
            sums += torch.stack((correct, F.cross_entropy(logits, labels, reduction="sum")))
        hits, nats = sums.tolist()
        return {"accuracy": 100 * hits / len(part), "loss": nats / len(part)}

    make(0)  # sizes that do not fit together are refused here
    return Task(
        name="images",
        make=make,
        batches=batches,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        evaluate=evaluate,
        metrics=(
            Metric(name="accuracy", unit="%", lower_is_better=False),
            Metric(name="loss", unit="nats"),
        ),
        steps=1000 if small else max(1000, _EPOCHS * (len(train) // batch)),
        config={
            "data": images.source,
            "data_fingerprint": images.fingerprint,
            "train_images": len(images.train),
            "validation_images": len(images.validation),
            "test_images": len(images.test),
            "model": model,
            **sizes,
            "size": size,
            "batch": batch,
            "augment": augment,
        },
    )


def channel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and standard deviation, of shape (channels, 1, 1); 1 where that is 0."""
    levels = torch.arange(256, dtype=torch.float64, device=pixels.device)
    # From histograms, because the pixels of CIFAR take 1.2 GB as float64.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)])
    shares = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = shares @ levels
    std = ((levels - mean.unsqueeze(1)).square() * shares).sum(1).sqrt()
    std[std == 0] = 1
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def crop_and_flip(images: Tensor, generator: torch.Generator, *, padding: int, flip: bool) -> Tensor:
    """Pad with zeros, crop each image at a random place to its size, and mirror about half of them if `flip`.

    `images` have the shape (batch, channels, height, width) and lie on any device; `generator` is on the CPU.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, [padding] * 4)
    each = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]
