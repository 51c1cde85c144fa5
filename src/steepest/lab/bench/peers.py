"""Other packages' optimizers, with the same hyper-parameters as ours; imported when they are made."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .entry import LR, WEIGHT_DECAY, Entry, Params

_COMMON: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
_LARGEST_DENSE = 1 << 14


def _peer(
    rule: str, package: str, name: str, how: str = "default", copies: float = 1.0, **given: Any
) -> Entry:
    def make(params: Params) -> Optimizer:
        module = importlib.import_module(package)
        made: Optimizer = getattr(module, name)(_plain(params), **{**_COMMON, **given})
        return made

    return Entry(rule, name, package, how, make, copies)


def _plain(params: Params) -> list[nn.Parameter]:
    # Not every package takes (name, tensor) pairs.
    return [param for _, param in params]


def _heavyball(rule: str, name: str, **given: Any) -> Entry:
    def make(params: Params) -> Optimizer:
        package = importlib.import_module("heavyball")
        if params[0][1].device.type == "cpu":
            # Its own default tries several kernels for each product, a minute's work, and on a CPU
            # it ends with the one that this takes at once.
            setattr(importlib.import_module("heavyball.utils"), "compile_mode", "default")  # noqa: B010
        made: Optimizer = getattr(package, name)(_plain(params), **{**_COMMON, **given})
        return made

    return Entry(rule, name, "heavyball", "compiled", make, 1.0)


def _muon_of_pytorch_optimizer() -> Entry:
    def make(params: Params) -> Optimizer:
        package = importlib.import_module("pytorch_optimizer")
        made: Optimizer = package.Muon([{"params": _plain(params), "use_muon": True}], **_COMMON)
        return made

    return Entry("muon", "Muon", "pytorch_optimizer", "default", make, 1.0)


def _torch_muon() -> Entry:
    def make(params: Params) -> Optimizer:
        return torch.optim.Muon(_plain(params), **_COMMON, adjust_lr_fn="match_rms_adamw")

    return Entry("muon", "Muon", "torch", "default", make, 1.0)


def _psgd(structure: str) -> list[Entry]:
    """`structure`: what these packages call the same choice of dense and diagonal factors as ours."""
    mode = {"dense/dense": None, "dense/diagonal": "smart_one_diag"}[structure]
    sizes: dict[str, Any] = {"max_size_triangular": _LARGEST_DENSE, "memory_save_mode": mode}
    skew = {"dense/dense": float("inf"), "dense/diagonal": 1.0}[structure]
    return [
        _heavyball("procrustes", "PSGDPRO", preconditioner_update_probability=1.0, **sizes),
        _heavyball("procrustes", "PSGDKron", preconditioner_update_probability=1.0, **sizes),
        _peer("procrustes", "pytorch_optimizer", "Kron", pre_conditioner_update_probability=1.0, **sizes),
        _peer("quad", "quad_torch", "QUAD", max_size_dense=_LARGEST_DENSE, max_skew_dense=skew),
    ]


PEERS: dict[str, list[Entry]] = {
    "signgsd": [_peer("signgsd", "pytorch_optimizer", "SignSGD", copies=0.0, momentum=0.0)],
    "signum": [_peer("signum", "pytorch_optimizer", "SignSGD", momentum=0.9)],
    "sgd": [
        _peer("sgd", "torch.optim", "SGD", "fused", momentum=0.9, fused=True),
        _peer("sgd", "torch.optim", "SGD", "foreach", momentum=0.9, foreach=True),
        _peer("sgd", "optimi", "SGD", momentum=0.9),
    ],
    "lion": [
        _peer("lion", "lion_pytorch", "Lion"),
        _peer("lion", "pytorch_optimizer", "Lion"),
        _peer("lion", "optimi", "Lion"),
    ],
    "adamw": [
        _peer("adamw", "torch.optim", "AdamW", "fused", 2.0, fused=True),
        _peer("adamw", "torch.optim", "AdamW", "foreach", 2.0, foreach=True),
        _peer("adamw", "optimi", "AdamW", copies=2.0),
    ],
    "sgd_sai": [
        _peer("sgd_sai", "sgd_sai", "SGD_sai"),
        _peer("sgd_sai", "pytorch_optimizer", "SGDSaI"),
    ],
    "muon": [_torch_muon(), _muon_of_pytorch_optimizer(), _heavyball("muon", "Muon")],
    "psgd dense/diagonal": _psgd("dense/diagonal"),
    "psgd dense/dense": _psgd("dense/dense"),
}
"""By the family that they are measured in."""

REPEATED = frozenset({("psgd dense/dense", "PSGDKron")})
"""(family, label) of those that compile for half a minute to show what another of the family shows."""
