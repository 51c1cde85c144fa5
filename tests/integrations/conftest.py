"""Frameworks that never reach for a network, and torchvision beside a torch of another build."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}

# Kept, since the operators live as long as it does.
_operators = None


def pytest_collection_finish() -> None:
    """Declare the operators without which torchvision cannot be imported.

    Its wheel on PyPI is made for CUDA, so beside a torch for the CPU its library does not load, and
    transformers and timm cannot import it. No test here calls the operators.
    """
    global _operators
    spec = find_spec("torchvision")
    if spec is None or _operators is not None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except (OSError, RuntimeError):
        _operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def seed():
    """Set torch's generator, which models are drawn from."""
    torch.manual_seed(0)
