"""save_checkpoint and load_checkpoint: all of it comes back, or nothing changes."""

from __future__ import annotations

import copy
import errno
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import steepest

Made = tuple[torch.nn.Module, steepest.Optimizer, torch.optim.lr_scheduler.LRScheduler]


def _make(seed: int = 0, rule: str = "adamw") -> Made:
    """A model, an optimizer and a scheduler after a step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    optimizer = steepest.create(rule, model.named_parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    _train(model, optimizer, scheduler)
    return model, optimizer, scheduler


def _train(model: torch.nn.Module, optimizer: Any, scheduler: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    scheduler.step()


def _all(made: Made) -> Any:
    return copy.deepcopy([each.state_dict() for each in made])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _save(path: Path, made: Made, **extra: Any) -> None:
    model, optimizer, scheduler = made
    steepest.save_checkpoint(path, model=model, optimizer=optimizer, extra={"scheduler": scheduler, **extra})


def _load(path: Path, made: Made) -> dict[str, Any]:
    model, optimizer, scheduler = made
    return steepest.load_checkpoint(path, model=model, optimizer=optimizer, extra={"scheduler": scheduler})


def test_training_goes_on_from_all_of_it(tmp_path: Path):
    made, again = _make(), _make(seed=1)
    plain = {"step": 7, "best": (0.5, torch.float16), "order": torch.randperm(5), "names": ["a", None]}
    _save(tmp_path / "run.pt", made, **plain)
    _train(*made)  # draws the batch and the dropout
    drawn = torch.rand(3), random.random()
    _train(*again)
    assert _equal(_load(tmp_path / "run.pt", again), plain)
    _train(*again)
    assert _equal(_all(made), _all(again))
    assert _equal((torch.rand(3), random.random()), drawn)


def test_without_an_optimizer_the_generators_are_left_alone(tmp_path: Path):
    made, other = _make(), _make(seed=1)
    _save(tmp_path / "run.pt", made)
    before = torch.get_rng_state()
    found = steepest.load_checkpoint(tmp_path / "run.pt", model=other[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert _equal(other[0].state_dict(), made[0].state_dict())
    assert found == {"scheduler": made[2].state_dict()}, "a state dict that no object took is returned"


def test_state_dicts_may_be_given_in_place_of_objects(tmp_path: Path):
    made, other = _make(), _make(seed=1)
    model, optimizer, scheduler = made
    steepest.save_checkpoint(
        tmp_path / "run.pt",
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        extra={"scheduler": scheduler.state_dict()},
    )
    _load(tmp_path / "run.pt", other)
    assert _equal(_all(made), _all(other))


def _steps(path: Path, count: int) -> list[bytes]:
    """Save this often; return each file's bytes."""
    saved = []
    for step in range(count):
        steepest.save_checkpoint(path, model=torch.nn.Linear(30, 2), extra={"step": step})
        saved.append(path.read_bytes())
    return saved


def test_the_last_two_are_kept(tmp_path: Path):
    saved = _steps(tmp_path / "run.pt", 3)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]
    assert (tmp_path / "run.pt").read_bytes() == saved[2]
    assert (tmp_path / "run.pt.previous").read_bytes() == saved[1]


def test_a_missing_file_gives_way_to_the_one_before_it(tmp_path: Path):
    _steps(tmp_path / "run.pt", 2)
    (tmp_path / "run.pt").unlink()
    with pytest.warns(UserWarning, match=r"run.pt does not exist: loading run.pt.previous"):
        assert steepest.load_checkpoint(tmp_path / "run.pt") == {"step": 0}


def test_any_truncation_and_any_flipped_bit_is_found_or_harms_nothing(tmp_path: Path):
    path, chance = tmp_path / "run.pt", random.Random(0)
    _, whole = _steps(path, 2)
    expected = torch.load(path, weights_only=True)["model"]
    cut = [whole[:length] for length in [0, 1, *range(100, len(whole), 211), len(whole) - 1]]
    flipped = []
    for _ in range(200):
        copied = bytearray(whole)
        copied[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        flipped.append(bytes(copied))
    found = []
    for damaged in [*cut, *flipped]:
        path.write_bytes(damaged)
        model = torch.nn.Linear(30, 2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step = steepest.load_checkpoint(path, model=model)["step"]
        found.append(step == 0)
        assert len(said) == (step == 0)
        assert all("damaged" in str(each.message) for each in said)
        if step == 1:  # a bit that means nothing, such as one of the padding between two tensors
            assert _equal(model.state_dict(), expected)
    assert all(found[: len(cut)])
    assert sum(found) > 0.8 * len(found)


def test_two_damaged_files_are_both_named(tmp_path: Path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"no zip")
    with pytest.raises(
        ValueError, match=r"run.pt is truncated or damaged \(.*\), and there is no run.pt.prev"
    ):
        steepest.load_checkpoint(path)
    (tmp_path / "run.pt.previous").write_bytes(b"")
    with pytest.raises(ValueError, match=r"run.pt is truncated .*, and run.pt.previous is truncated"):
        steepest.load_checkpoint(path)


def test_no_file_at_all(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"run.pt does not exist, and there is no run.pt.previous"):
        steepest.load_checkpoint(tmp_path / "run.pt")


def test_a_damaged_file_does_not_take_the_place_of_the_last_good_one(tmp_path: Path):
    path = tmp_path / "run.pt"
    saved = _steps(path, 2)
    path.write_bytes(saved[1][:500])
    steepest.save_checkpoint(path, extra={"step": 2})
    assert (tmp_path / "run.pt.previous").read_bytes() == saved[0]
    assert steepest.load_checkpoint(path) == {"step": 2}


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path):
    others = ["run.pt.notes.tmp", "other.pt.01234567.tmp", "run.pt.01234567.tmp2"]
    for name in ["run.pt.01234567.tmp", *others]:
        (tmp_path / name).write_bytes(b"half")
    steepest.save_checkpoint(tmp_path / "run.pt", extra={"step": 0})
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["run.pt", *others])


def _within_itself() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["itself"] = made
    return made


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: None, r"extra\['mine'\] is not plain data .*lambda"),
        (object(), r"extra\['mine'\] is not plain data .*object"),
        ({"deep": [random.Random(0)]}, r"extra\['mine'\] is not plain data .*Random"),
        (_within_itself(), r"extra\['mine'\] is not plain data .*: it contains itself"),
    ],
    ids=["lambda", "object", "nested", "within itself"],
)
def test_what_could_not_be_loaded_is_not_saved(value: Any, words: str, tmp_path: Path):
    path = tmp_path / "run.pt"
    (saved,) = _steps(path, 1)
    with pytest.raises(ValueError, match=words):
        steepest.save_checkpoint(path, extra={"step": 1, "mine": value})
    assert [path.read_bytes(), len(list(tmp_path.iterdir()))] == [saved, 1]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.pt"
    (saved,) = _steps(path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        steepest.save_checkpoint(path, extra={"step": 1})
    assert [path.read_bytes(), len(list(tmp_path.iterdir()))] == [saved, 1]


def test_checksums_are_written_even_if_torch_is_told_not_to(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        steepest.save_checkpoint(tmp_path / "run.pt", extra={"step": 1})
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert steepest.load_checkpoint(tmp_path / "run.pt") == {"step": 1}


def test_a_directory_is_no_path(tmp_path: Path):
    with pytest.raises(IsADirectoryError, match="writes a file"):
        steepest.save_checkpoint(tmp_path, extra={})


def test_shards_are_refused_by_name(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = torch.nn.Linear(2, 2)
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"model\['weight'\] is a DTensor.*torch.distributed.checkpoint"):
            steepest.save_checkpoint(tmp_path / "run.pt", model=model)
        with pytest.raises(ValueError, match=r"extra\['ema'\]\['weight'\] is a DTensor"):
            steepest.save_checkpoint(tmp_path / "run.pt", extra={"ema": model.state_dict()})
    finally:
        dist.destroy_process_group()
    assert not list(tmp_path.iterdir())


def _without(model: torch.nn.Module, name: str) -> dict[str, Any]:
    return {key: value for key, value in model.state_dict().items() if key != name}


def _content(how: str, made: Made) -> dict[str, Any]:
    """Arguments of save_checkpoint for a checkpoint that does not fit what ``_make`` makes."""
    model, optimizer, scheduler = made
    fits = {"model": model, "optimizer": optimizer, "extra": {"scheduler": scheduler}}
    state = model.state_dict()
    changes: dict[str, dict[str, Any]] = {
        "missing tensor": {"model": _without(model, "0.bias")},
        "extra tensor": {"model": {**state, "0.scale": torch.ones(3)}},
        "shape": {"model": {**state, "0.weight": torch.ones(3, 5)}},
        "dtype": {"model": {**state, "0.weight": state["0.weight"].bfloat16()}},
        "rule": {"optimizer": _make(rule="lion")[1]},
        "state shape": {"optimizer": _changed_state(optimizer, exp_avg=torch.ones(7))},
        "unknown state": {"optimizer": _changed_state(optimizer, other=torch.ones(3, 4))},
        "groups": {"optimizer": {"state": {}, "param_groups": []}},
        "no optimizer": {"optimizer": None},
        "no scheduler": {"extra": {}},
        "scheduler": {"extra": {"scheduler": 3}},
    }
    return {**fits, **changes[how]}


def _changed_state(optimizer: steepest.Optimizer, **entries: Any) -> dict[str, Any]:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(entries)
    return saved


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing tensor", r"model: .*Missing key\(s\).*0\.bias"),
        ("extra tensor", r"model: .*Unexpected key\(s\).*0\.scale"),
        ("shape", r"model: .*size mismatch for 0\.weight"),
        ("dtype", r"model: '0\.weight' is torch\.bfloat16 there and torch\.float32 here"),
        ("rule", r"optimizer: group 0 .*'lion'.*'adamw'"),
        ("state shape", r"optimizer: state 'exp_avg' of parameter '0\.weight' has shape \(7,\)"),
        ("unknown state", r"optimizer: the state of parameter '0\.weight' has 'other'"),
        ("groups", r"optimizer: loaded state dict has a different number of parameter groups"),
        ("no optimizer", r"has no optimizer; it has model, extra\['scheduler'\]"),
        ("no scheduler", r"has no extra\['scheduler'\]; it has model, optimizer"),
        ("scheduler", r"extra\['scheduler'\]: 'int' object is not iterable"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(how: str, words: str, tmp_path: Path):
    made, other = _make(), _make(seed=1)
    steepest.save_checkpoint(tmp_path / "run.pt", **_content(how, other))
    before, generator = _all(made), torch.get_rng_state()
    twin = copy.deepcopy(made[0]), copy.deepcopy(made[1].state_dict())
    with pytest.raises(ValueError, match=rf"(?s)run\.pt.*{words}.*[Nn]othing was loaded"):
        _load(tmp_path / "run.pt", made)
    assert _equal(_all(made), before)
    assert torch.equal(torch.get_rng_state(), generator)
    # It also steps on as if nothing had been tried.
    fresh = steepest.create("adamw", twin[0].named_parameters(), lr=0.01)
    fresh.load_state_dict(twin[1])
    for model, optimizer in ((made[0], made[1]), (twin[0], fresh)):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert _equal(made[0].state_dict(), twin[0].state_dict())
    assert _equal(made[1].state_dict()["state"], fresh.state_dict()["state"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"format": "steepest.save_checkpoint", "version": 2},
            "has version 2; this version of steepest knows 1",
        ),
        ({"model": {}}, "is not a checkpoint of steepest.save_checkpoint: load it with torch.load"),
        ([1, 2], "is not a checkpoint of steepest.save_checkpoint"),
        ({"format": "steepest.save_checkpoint", "extra": {}}, "is not a checkpoint of steepest.save"),
        ({"format": "steepest.save_checkpoint", "version": 1}, "is not a checkpoint of steepest.save"),
    ],
)
def test_other_files_are_refused(content: Any, words: str, tmp_path: Path):
    """Though there is a good one before it: the user has named this one."""
    _steps(tmp_path / "run.pt", 2)
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=words):
        steepest.load_checkpoint(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"extra": {"step": 0}}, r"extra\['step'\] is of type int, which has no load_state_dict\(\)"),
        ({"model": {}}, r"model is of type dict, which has no load_state_dict\(\)"),
        ({"extra": [1]}, "extra must be a dict .* got a list"),
    ],
)
def test_what_cannot_take_a_state_is_refused_before_the_file_is_read(
    given: dict[str, Any], words: str, tmp_path: Path
):
    with pytest.raises(TypeError, match=words):
        steepest.load_checkpoint(tmp_path / "none.pt", **given)


def test_an_extra_that_is_no_dict_is_not_saved(tmp_path: Path):
    with pytest.raises(TypeError, match=r"extra must be a dict .* got a list"):
        steepest.save_checkpoint(tmp_path / "run.pt", extra=[1])  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


class _Refuses:
    """An object that takes no state, not even its own."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("first" if state else "again")


def test_an_object_that_refuses_its_own_state_too_does_not_hide_why(tmp_path: Path):
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = copy.deepcopy(other.state_dict())
    steepest.save_checkpoint(tmp_path / "run.pt", model=model, extra={"sampler": {"at": 3}})
    words = r"'first'; nothing was loaded, but extra\['sampler'\] could not be restored and may be changed"
    with pytest.raises(ValueError, match=words):
        steepest.load_checkpoint(tmp_path / "run.pt", model=other, extra={"sampler": _Refuses()})
    assert _equal(other.state_dict(), before)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")
def test_a_symbolic_link_stays_one(tmp_path: Path):
    real, link = tmp_path / "disk" / "run.pt", tmp_path / "latest.pt"
    real.parent.mkdir()
    link.symlink_to(real)
    for step in range(2):
        steepest.save_checkpoint(link, extra={"step": step})
    assert sorted(each.name for each in real.parent.iterdir()) == ["run.pt", "run.pt.previous"]
    assert [each.name for each in tmp_path.iterdir() if not each.is_dir()] == ["latest.pt"]
    assert link.is_symlink()
    real.unlink()
    with pytest.warns(UserWarning, match="loading run.pt.previous"):
        assert steepest.load_checkpoint(link) == {"step": 0}
