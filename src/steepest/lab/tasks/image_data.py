"""Labelled images from CIFAR's python batches, from folders of image files, and scikit-learn's digits."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LabError
from .digits import load

HELD_OUT = 0.1
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}


@dataclass(frozen=True)
class Labelled:
    """Pixels, uint8 of shape (count, channels, size, size), and labels, int64 of shape (count,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Labelled:
        """Return the images with these indices."""
        return Labelled(self.pixels[index], self.labels[index])

    def to(self, device: str | torch.device) -> Labelled:
        """Return the images on a device."""
        return Labelled(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """Training, validation and test images."""

    source: str
    classes: int
    train: Labelled
    validation: Labelled
    test: Labelled

    @property
    def fingerprint(self) -> str:
        """Return a digest of all pixels and labels in their order."""
        parts = (self.train, self.validation, self.test)
        tensors = [tensor.numpy().tobytes() for part in parts for tensor in (part.pixels, part.labels)]
        return hashlib.sha256(b"".join(tensors)).hexdigest()[:16]


def stratified(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split indices at random into (rest, chosen), with about `fraction` of each class chosen, at least one.

    Example:
        >>> rest, chosen = stratified(torch.tensor([0, 1] * 10), 0.2)
        >>> len(rest), (chosen % 2).tolist()
        (16, [0, 1, 0, 1])
    """
    generator = torch.Generator().manual_seed(0)
    selected = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        selected[members[order[: max(1, round(fraction * len(members)))]]] = True
    return (~selected).nonzero().squeeze(1), selected.nonzero().squeeze(1)


def digits(size: int) -> ImageData:
    """Enlarge the digits of the digits task, split as there."""

    def enlarged(images: Tensor, labels: Tensor) -> Labelled:
        pixels = F.interpolate(255 * images, (size, size), mode="bilinear")
        return Labelled(pixels.round().to(torch.uint8), labels)

    return ImageData("scikit-learn's digits", 10, *(enlarged(*part) for part in load()))


def load_images(path: Path, size: int) -> ImageData:
    """Read CIFAR-10's or CIFAR-100's python batches, or a folder of images with a subfolder for each class.

    A stratified tenth of the training data, chosen with a fixed seed, is validation data.

    Args:
        path: A folder with `data_batch_1` … and `test_batch` (CIFAR-10), or `train` and `test` (CIFAR-100,
            of which the 100 fine labels are used), or `train/CLASS/…` with `test/CLASS/…` or `val/CLASS/…`
            (with both, `val` is validation data), or `CLASS/…` alone, of which a tenth of each
            class, chosen by hashes of the files' names, is test data.
        size: Height and width of the images. Image files are scaled and cropped at the center; CIFAR has 32.

    Raises:
        LabError: `path` holds none of these, or a file is malformed.
    """
    if not path.is_dir():
        raise LabError(
            f"{path} is not a folder: give that of CIFAR's Python batches, or one with images by class"
        )
    for inner in ("cifar-10-batches-py", "cifar-100-python"):
        if (path / inner).is_dir():
            path = path / inner
    batches = sorted(path.glob("data_batch_*"))
    if batches:
        return _cifar(path, batches, path / "test_batch", size)
    if (path / "train").is_file():
        return _cifar(path, [path / "train"], path / "test", size)
    return _folder(path, size)


def _held_out(source: str, classes: int, train: Labelled, test: Labelled) -> ImageData:
    counts = train.labels.bincount(minlength=classes)
    if counts.min() < 2:
        raise LabError(f"{source}: class {int(counts.argmin())} has fewer than 2 training images")
    rest, validation = stratified(train.labels, HELD_OUT)
    return ImageData(source, classes, train.take(rest), train.take(validation), test)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand for `codecs.encode`, with which pickles of protocol 2 hold bytes: any other codec is refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it needs the codec {encoding}")
    return text.encode("latin1")


class _CifarUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings, bytes, numbers and numpy arrays, and refuses everything else."""

    known: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.core.numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],
        "_codecs.encode": _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 has renamed its core.
        if (found := self.known.get(f"{module}.{name}".replace("._core.", ".core."))) is None:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, which CIFAR's files do not")
        return found


def _cifar(path: Path, train: list[Path], test: Path, size: int) -> ImageData:
    if size != 32:
        raise LabError(f"CIFAR's images have 32×32 pixels, got size={size}")
    parts = [_cifar_batch(file) for file in train]
    images = Labelled(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))
    return _held_out(str(path), 1 + int(images.labels.max()), images, _cifar_batch(test))


def _cifar_batch(file: Path) -> Labelled:
    try:
        with file.open("rb") as stream:
            content = _CifarUnpickler(stream, encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        labels = torch.tensor(batch["fine_labels" if "fine_labels" in batch else "labels"])
        pixels = torch.tensor(np.asarray(batch["data"])).view(len(labels), 3, 32, 32)
    except FileNotFoundError:
        raise LabError(f"there is no {file}") from None
    except KeyError as error:
        raise LabError(f"{file} is not a CIFAR batch: it has no {error}") from error
    # A malformed pickle may raise anything.
    except Exception as error:
        raise LabError(f"{file} is not a CIFAR batch: {error}") from error
    return Labelled(pixels, labels)


def _folder(path: Path, size: int) -> ImageData:
    train = _by_class(path / "train" if (path / "train").is_dir() else path)
    if not train:
        raise LabError(
            f"{path} has no images: expected CIFAR's data_batch_1 and test_batch, or train and test, "
            f"or subfolders by class with files ending in {', '.join(sorted(_SUFFIXES))}"
        )
    names = sorted(train)
    other = {split: _by_class(path / split) for split in ("test", "val")}
    if (path / "train").is_dir():
        test = other["test"] or other["val"]
        if not test:
            raise LabError(f"{path} has train/ but no images in test/ or val/")
    else:
        test = {}
        for name, files in train.items():
            files.sort(key=lambda file: hashlib.sha256(f"{file.parent.name}/{file.name}".encode()).digest())
            count = max(1, round(HELD_OUT * len(files)))
            test[name], train[name] = files[:count], files[count:]
    training, tested = _read(train, names, size), _read(test, names, size)
    if other["test"] and other["val"]:
        return ImageData(str(path), len(names), training, _read(other["val"], names, size), tested)
    return _held_out(str(path), len(names), training, tested)


def _by_class(path: Path) -> dict[str, list[Path]]:
    """Return the image files of each subfolder that has any."""
    folders = sorted(path.iterdir()) if path.is_dir() else []
    found = {
        folder.name: sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
        for folder in folders
        if folder.is_dir()
    }
    return {name: files for name, files in found.items() if files}


def _read(files: dict[str, list[Path]], names: list[str], size: int) -> Labelled:
    from PIL import Image, ImageOps

    pixels, labels = [], []
    for name in sorted(files):
        if name not in names:
            raise LabError(f"{files[name][0].parent} is a class that the training images do not have")
        for file in files[name]:
            try:
                with Image.open(file) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), (size, size))
            except (OSError, SyntaxError, ValueError) as error:
                raise LabError(f"cannot read the image {file}: {error}") from error
            pixels.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
            labels.append(names.index(name))
    if not labels:
        raise LabError(f"there are too few images: the split leaves none of classes {', '.join(names)}")
    return Labelled(torch.stack(pixels), torch.tensor(labels))
