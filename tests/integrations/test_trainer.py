"""Hugging Face's Trainer, which clips between backward and step unless it is told not to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steepest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}


def trained(directory: Path, *, max_grad_norm: float, micro_batches: int = 1, **clip: Any) -> list[str]:
    torch.manual_seed(0)
    model = Regression()
    data = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(8)]
    optimizer = steepest.Lion(model.parameters(), lr=1e-3)
    options = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=4,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=micro_batches,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, options, train_dataset=data, optimizers=(optimizer, None))
    with warnings.catch_warnings(record=True) as caught, steepest.release_gradients(model, optimizer, **clip):
        warnings.simplefilter("always")
        trainer.train()
    return [str(each.message) for each in caught if "release_gradients" in str(each.message)]


def test_a_trainer_that_clips_is_warned_of_once(tmp_path: Path):
    (warning,) = trained(tmp_path, max_grad_norm=1.0)
    assert "pass clip_norm=" in warning
    assert "max_grad_norm=0 in Hugging Face's Trainer" in warning


def test_a_trainer_that_only_logs_the_norm_is_told_that_it_does(tmp_path: Path):
    (warning,) = trained(tmp_path, max_grad_norm=0.0)
    assert "With max_grad_norm=0 that Trainer still reads the norm to log it" in warning


def test_accumulation_is_refused_with_the_trainers_own_option(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"stepped already.*gradient_accumulation_steps=1"):
        trained(tmp_path, max_grad_norm=0.0, micro_batches=2, clip_norm=1.0)


def test_a_release_that_clips_needs_no_warning(tmp_path: Path):
    assert trained(tmp_path, max_grad_norm=0.0, clip_norm=1.0) == []
