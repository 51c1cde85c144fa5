"""Frameworks that never reach for a network, and torchvision beside a torch of another build."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"


def declared_operators() -> torch.library.Library | None:
    """Declare the operators without which torchvision cannot be imported, if its own are missing.

    Its wheel on PyPI is made for CUDA, so beside a torch for the CPU its library does not load, and
    transformers and timm cannot import it. No test here calls the operators.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators
    return None


# Before any file of tests is imported, and kept, since the operators live as long as it does.
OPERATORS = declared_operators()
