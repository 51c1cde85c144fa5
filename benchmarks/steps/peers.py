"""Other packages' optimizers with the same hyper-parameters as steepest's, imported when constructed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .case import LR, WEIGHT_DECAY, Case, Params

_COMMON: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
_MAX_DENSE_SIZE = 1 << 14


def _peer(
    rule: str, package: str, name: str, how: str = "default", state_copies: float = 1.0, **options: Any
) -> Case:
    def make(params: Params) -> Optimizer:
        module = importlib.import_module(package)
        optimizer: Optimizer = getattr(module, name)(_unnamed(params), **{**_COMMON, **options})
        return optimizer

    return Case(rule, name, package, how, make, state_copies)


def _unnamed(params: Params) -> list[nn.Parameter]:
    # Not every package accepts (name, tensor) pairs.
    return [param for _, param in params]


def _heavyball(rule: str, name: str, **options: Any) -> Case:
    def make(params: Params) -> Optimizer:
        package = importlib.import_module("heavyball")
        if params[0][1].device.type == "cpu":
            # heavyball's default mode tries several kernels per product for a minute; on a CPU it ends
            # with the one that this mode uses immediately.
            setattr(importlib.import_module("heavyball.utils"), "compile_mode", "default")  # noqa: B010
        optimizer: Optimizer = getattr(package, name)(_unnamed(params), **{**_COMMON, **options})
        return optimizer

    return Case(rule, name, "heavyball", "compiled", make, 1.0)


def _muon_of_pytorch_optimizer() -> Case:
    def make(params: Params) -> Optimizer:
        package = importlib.import_module("pytorch_optimizer")
        groups = [{"params": _unnamed(params), "use_muon": True}]
        optimizer: Optimizer = package.Muon(groups, **_COMMON)
        return optimizer

    return Case("muon", "Muon", "pytorch_optimizer", "default", make, 1.0)


def _torch_muon() -> Case:
    def make(params: Params) -> Optimizer:
        return torch.optim.Muon(_unnamed(params), **_COMMON, adjust_lr_fn="match_rms_adamw")

    return Case("muon", "Muon", "torch", "default", make, 1.0)


def _psgd(structure: str) -> list[Case]:
    """Create the PSGD peers with the same structure of dense and diagonal factors as steepest's."""
    mode = {"dense/dense": None, "dense/diagonal": "smart_one_diag"}[structure]
    sizes: dict[str, Any] = {"max_size_triangular": _MAX_DENSE_SIZE, "memory_save_mode": mode}
    skew = {"dense/dense": float("inf"), "dense/diagonal": 1.0}[structure]
    return [
        _heavyball("procrustes", "PSGDPRO", preconditioner_update_probability=1.0, **sizes),
        _heavyball("procrustes", "PSGDKron", preconditioner_update_probability=1.0, **sizes),
        _peer("procrustes", "pytorch_optimizer", "Kron", pre_conditioner_update_probability=1.0, **sizes),
        _peer("quad", "quad_torch", "QUAD", max_size_dense=_MAX_DENSE_SIZE, max_skew_dense=skew),
    ]


PEERS: dict[str, list[Case]] = {
    "signgsd": [_peer("signgsd", "pytorch_optimizer", "SignSGD", state_copies=0.0, momentum=0.0)],
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
        _peer("adamw", "optimi", "AdamW", state_copies=2.0),
    ],
    "sgd_sai": [
        _peer("sgd_sai", "sgd_sai", "SGD_sai"),
        _peer("sgd_sai", "pytorch_optimizer", "SGDSaI"),
    ],
    "muon": [_torch_muon(), _muon_of_pytorch_optimizer(), _heavyball("muon", "Muon")],
    "psgd dense/diagonal": _psgd("dense/diagonal"),
    "psgd dense/dense": _psgd("dense/dense"),
}
"""Peers by the name of their group."""

REDUNDANT = frozenset({("psgd dense/dense", "PSGDKron")})
"""(group, label) of peers that compile for half a minute although another group already measures them."""
