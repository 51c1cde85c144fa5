"""The images task: files of CIFAR's format, folders, splits, augmentation."""

from __future__ import annotations

import math
import os
import pickle
import struct
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steepest.lab import LabError
from steepest.lab.tasks.image_data import load_images, stratified
from steepest.lab.tasks.images import channel_statistics, crop_and_flip, images_task

RANDOM = np.random.default_rng(0)


def write_batch(file: Path, labels: list[int], key: str = "labels", protocol: int = 2) -> np.ndarray:
    """Write a batch in CIFAR's format, whose keys are bytes when read as bytes."""
    data = RANDOM.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    file.write_bytes(pickle.dumps({b"data": data, key.encode(): labels}, protocol))
    return data


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """Pickle as Python 2 did, with byte strings where Python 3 has text: so CIFAR is published."""
    raw = data.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(" + b"".join(b"M" + struct.pack("<H", n) for n in data.shape) + b"t" + dtype + b"\x89"
    state += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    ints = b"".join(b"K" + bytes([label]) for label in labels)
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels](" + ints + b"eu."


@pytest.fixture
def cifar10(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    labels = [0] * 2 + [1, 2] * 10
    data = [write_batch(tmp_path / f"data_batch_{n}", labels, protocol=n) for n in (2, 3, 5)]
    return tmp_path, [*data, write_batch(tmp_path / "test_batch", [0, 1, 2, 2])]


def test_cifar_10_is_read_split_and_normalized(cifar10):
    path, data = cifar10
    images = load_images(path, 32)
    assert torch.equal(images.test.pixels, torch.from_numpy(data[3]).view(4, 3, 32, 32))
    assert images.test.labels.tolist() == [0, 1, 2, 2]
    assert images.train.labels.bincount().tolist() == [5, 27, 27]
    assert images.validation.labels.bincount().tolist() == [1, 3, 3]
    # Training and validation data together are the batches' images, each once.
    together = torch.cat((images.train.pixels, images.validation.pixels)).flatten(1)
    everything = torch.from_numpy(np.concatenate(data[:3]))
    assert {bytes(row.tolist()) for row in together} == {bytes(row.tolist()) for row in everything}
    assert len(together) == len(everything) == 66
    task = images_task(path, batch=59, channels=2, augment=False)
    shown = torch.cat([x for x, _ in task.batches(0)])
    torch.testing.assert_close(shown.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(shown.std((0, 2, 3), correction=0), torch.ones(3))
    assert task.config["data_fingerprint"] == images_task(path, batch=5).config["data_fingerprint"]


def test_cifar_100_has_its_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    write_batch(folder / "train", [4, 3, 2, 1, 0] * 20, "fine_labels", 4)
    write_batch(folder / "test", [3, 4], "fine_labels", 4)
    images = load_images(tmp_path, 32)
    assert (images.classes, len(images.train), len(images.validation)) == (5, 90, 10)
    assert images.test.labels.tolist() == [3, 4]


def test_a_batch_pickled_by_python_2_is_read(tmp_path):
    data = RANDOM.integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(python2_batch(data, [0, 1, 0, 1]))
    images = load_images(tmp_path, 32)
    assert torch.equal(images.test.pixels.flatten(1), torch.from_numpy(data))
    assert images.test.labels.tolist() == [0, 1, 0, 1]


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_foreign_pickle_runs_no_code(tmp_path, cifar10, protocol):
    path, _ = cifar10
    mark = tmp_path / "ran"
    (path / "data_batch_3").write_bytes(pickle.dumps({"data": Touch(f"touch {mark}")}, protocol))
    with pytest.raises(LabError, match=r"data_batch_3 is not a CIFAR batch: it needs (posix|nt)\.system"):
        load_images(path, 32)
    assert not mark.exists()


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (pickle.dumps([1, 2]), "not a CIFAR batch"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R.", "it needs the codec zlib"),
        (pickle.dumps({"data": PIXELS}), "it has no 'labels'"),
        (pickle.dumps({"data": PIXELS, "labels": [1]}), "invalid for input of size 6144"),
        (pickle.dumps({"data": PIXELS[:, :-1], "labels": [1, 2]}), "invalid for input of size 6142"),
    ],
)
def test_a_malformed_batch_is_named(cifar10, content, message):
    file = cifar10[0] / "test_batch"
    file.write_bytes(content)
    with pytest.raises(LabError, match=f"test_batch.*{message}"):
        load_images(cifar10[0], 32)
    file.unlink()
    with pytest.raises(LabError, match=r"there is no .*test_batch"):
        load_images(cifar10[0], 32)


def write_images(folder: Path, count: int, value: int, first: int = 0) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(first, first + count):
        # Twice as wide as high: only the center is kept, which has one color.
        pixels = np.full((8, 16, 3), 255, np.uint8)
        pixels[:, 4:12] = value + number
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_a_folder_with_training_and_test_images(tmp_path):
    for label, value in (("cat", 0), ("dog", 100)):
        write_images(tmp_path / "train" / label, 20, value)
        write_images(tmp_path / "val" / label, 3, value, 20)
    images = load_images(tmp_path, 8)
    assert images.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test.pixels[:, 0, 4, 4].tolist() == [20, 21, 22, 120, 121, 122]
    assert images.validation.labels.tolist() == [0, 0, 1, 1]
    assert len(images.train) == 36
    write_images(tmp_path / "test" / "dog", 2, 100, 30)
    images = load_images(tmp_path, 8)
    assert images.test.pixels[:, 0, 4, 4].tolist() == [130, 131]
    assert images.validation.pixels[:, 0, 4, 4].tolist() == [20, 21, 22, 120, 121, 122]
    write_images(tmp_path / "test" / "cow", 1, 1)
    with pytest.raises(LabError, match="cow is a class that the training images do not have"):
        load_images(tmp_path, 8)


def test_a_folder_without_a_split_is_split_by_its_files_names(tmp_path):
    write_images(tmp_path / "cat", 20, 0)
    write_images(tmp_path / "dog", 30, 100)
    images = load_images(tmp_path, 8)
    assert images.test.labels.tolist() == [0] * 2 + [1] * 3
    seen = [part.pixels[:, 0, 4, 4].tolist() for part in (images.train, images.validation, images.test)]
    assert sorted(chain(*seen)) == [*range(20), *range(100, 130)]
    # A new image does not move others into the test data's place.
    (tmp_path / "dog" / "99.png").write_bytes((tmp_path / "dog" / "7.png").read_bytes())
    assert len({*load_images(tmp_path, 8).test.pixels[:, 0, 4, 4].tolist()} - {*seen[2]}) <= 1
    assert images_task(tmp_path, size=8, batch=16, channels=2).config["train_images"] == 41


def test_bad_folders_are_rejected(tmp_path):
    with pytest.raises(LabError, match="is not a folder"):
        load_images(tmp_path / "nowhere", 32)
    with pytest.raises(LabError, match="has no images: expected CIFAR"):
        load_images(tmp_path, 32)
    write_images(tmp_path / "train" / "cat", 5, 0)
    with pytest.raises(LabError, match="no images in test/ or val/"):
        load_images(tmp_path, 32)
    write_images(tmp_path / "test" / "cat", 1, 0)
    (tmp_path / "test" / "cat" / "0.png").write_text("no image")
    with pytest.raises(LabError, match=r"cannot read the image .*0\.png"):
        load_images(tmp_path, 32)


def test_a_stratified_split_is_disjoint_complete_and_fixed():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[torch.randperm(153)]
    rest, chosen = stratified(labels, 0.1)
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(153))
    assert labels[chosen].bincount().tolist() == [10, 5, 1]
    assert torch.equal(chosen, stratified(labels, 0.1)[1])


def test_a_crop_is_a_slice_of_the_padded_image():
    images = torch.arange(1, 61, dtype=torch.uint8).view(3, 1, 4, 5).expand(3, 2, 4, 5).contiguous()
    images[:, 1] += 100
    padded = nn.functional.pad(images, [2] * 4)
    places = set()
    for seed in range(100):
        cropped = crop_and_flip(images, torch.Generator().manual_seed(seed), padding=2, flip=True)
        for number in range(3):
            slices = {
                (top, left, flipped): piece.flip(2) if flipped else piece
                for top in range(5)
                for left in range(5)
                for piece in [padded[number, :, top : top + 4, left : left + 5]]
                for flipped in (False, True)
            }
            (place,) = (where for where, piece in slices.items() if torch.equal(cropped[number], piece))
            places.add(place)
    assert len(places) == 50
    center = crop_and_flip(images, torch.Generator(), padding=0, flip=False)
    assert torch.equal(center, images)
    draw = partial(crop_and_flip, images, padding=2, flip=True)
    assert torch.equal(draw(torch.Generator().manual_seed(5)), draw(torch.Generator().manual_seed(5)))


def test_statistics_are_those_of_the_pixels():
    pixels = torch.from_numpy(RANDOM.integers(0, 256, (7, 3, 4, 4), dtype=np.uint8))
    pixels[:, 2] = 9
    mean, std = channel_statistics(pixels)
    torch.testing.assert_close(mean.flatten(), pixels.float().mean((0, 2, 3)))
    expected = pixels.double().std((0, 2, 3), correction=0).float()
    torch.testing.assert_close(std.flatten()[:2], expected[:2])
    assert std[2] == 1


def test_digits_are_the_data_by_default():
    pytest.importorskip("sklearn")
    task = images_task(augment=False)
    batches = list(task.batches(0))
    pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    class Nearest(nn.Module):
        def forward(self, images):
            nearest = torch.cdist(images.flatten(1), pixels.flatten(1)).argmin(1)
            return nn.functional.one_hot(labels[nearest], 10).float()

    for split in ("validation", "test"):
        assert task.config[f"{split}_images"] == 359
        # Nearest neighbors classify digits well, if held-out pixels, labels and scale are those of training.
        assert 95 < task.evaluate(Nearest(), split)["accuracy"] < 100
        constant = task.evaluate(lambda images: torch.eye(10)[0].log().expand(len(images), -1).exp(), split)
        assert constant["accuracy"] == pytest.approx(10, abs=0.5)
        hit, miss = -math.log(math.e / (math.e + 9)), -math.log(1 / (math.e + 9))
        share = constant["accuracy"] / 100
        assert constant["loss"] == pytest.approx(share * hit + (1 - share) * miss)
    assert [metric.name for metric in task.metrics] == list(constant)
    # An epoch shows each digit once, in the seed's order.
    assert len(labels) == 1079 // 32 * 32
    assert torch.equal(batches[0][0], next(iter(task.batches(0)))[0])
    assert not torch.equal(batches[0][1], next(iter(task.batches(1)))[1])


@pytest.mark.parametrize("model", ["resnet18", "vit_s16"])
def test_models_fit_the_data(model, cifar10):
    pytest.importorskip("sklearn")
    sizes = {"channels": 2} if model == "resnet18" else {"width": 8, "depth": 1, "heads": 2}
    for data in (None, cifar10[0]):
        task = images_task(data, model=model, batch=2, **sizes)
        batch = next(iter(task.batches(0)))
        assert batch[0].shape == (2, 1 if data is None else 3, 32, 32)
        assert task.loss(task.make(0), batch).isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vgg"}, "'resnet18' or 'vit_s16'"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"model": "vit_s16", "channels": 8}, "channels=8 is not a size of vit_s16, which has patch, width"),
        ({"width": 8}, "width=8 is not a size of resnet18"),
        ({"model": "vit_s16", "heads": 5}, "not a multiple of heads 5"),
        ({"batch": 2000}, "fewer than a batch of 2000"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(arguments, message):
    pytest.importorskip("sklearn")
    with pytest.raises(LabError, match=message):
        images_task(**arguments)
