"""Refuse models whose parameters are unmaterialized, flattened or partitioned."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parameter import is_lazy

from steepest.routing.tensors import Routed

__all__ = ["refuse_unsupported"]


def refuse_unsupported(model: nn.Module, tensors: list[Routed]) -> None:
    """Raise ``ValueError``, with the parameter's name and the reason, if routing would be a guess.

    The optimizer itself refuses what none of its rules take: DTensors, integers, sparse storage.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapped = () if fsdp is None else (fsdp.FullyShardedDataParallel,)
    for tensor in tensors:
        who = f"parameter {tensor.name!r}"
        if is_lazy(tensor.param):
            raise ValueError(f"{who} has no shape yet: run the model once, then build the optimizer")
        if tensor.param.is_meta:
            raise ValueError(
                f"{who} is on the meta device: materialize the model first. That makes new parameters, and "
                "the optimizer would keep the old ones"
            )
        if hasattr(tensor.param, "ds_id") or hasattr(tensor.param, "ds_tensor"):
            raise ValueError(
                f"{who} is partitioned by DeepSpeed ZeRO: this rank has a flat shard without the tensor's "
                "shape. build() needs whole tensors; ZeRO 3 works with element rules only: "
                "steepest.create('lion', model.parameters())"
            )
        if getattr(tensor.param, "_is_flat_param", False):
            raise ValueError(
                f"{who} is a FlatParameter: FSDP1 has flattened a module's tensors into one vector, and "
                "matrices, norms and embeddings cannot be told apart in it. An element rule can step it: "
                "steepest.create('lion', model.parameters())"
            )
    for path, module in model.named_modules():
        if isinstance(module, wrapped):
            first = next((t.name for t in tensors if t.name.startswith(path)), path)
            raise ValueError(
                f"parameter {first!r} belongs to a module sharded by FSDP1, whose parameters are 1-D shards "
                "even with use_orig_params=True. An element rule can step them: "
                "steepest.create('lion', model.parameters())"
            )
