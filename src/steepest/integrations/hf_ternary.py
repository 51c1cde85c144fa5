"""Ternary and binary layers in Hugging Face checkpoints, as a registered quantization method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from steepest.ternary import BinaryLinear, TernaryLinear, ternarize
from steepest.ternary.layer import Scale
from steepest.ternary.packing import Bits

__all__ = ["METHOD", "TernaryConfig", "TernaryQuantizer", "record_ternary"]

METHOD = "steepest_ternary"  # the ``quant_method`` in config.json


@register_quantization_config(METHOD)
class TernaryConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Make a model's hidden linear layers ternary or binary as ``from_pretrained`` loads it.

    A model that is saved afterwards has this in its ``config.json``, with ``layers``, and loads as it was.

    Args:
        include, exclude, scale, group_size, bits: as of :func:`steepest.ternary.ternarize`.
        layers: of a saved model, the form of its layers and their names; :func:`record_ternary` writes it.
        quant_method: as Hugging Face writes it; always ``"steepest_ternary"``.

    Raises:
        ValueError: another ``quant_method``.

    >>> TernaryConfig(bits=1).to_dict()["quant_method"]
    'steepest_ternary'
    """

    def __init__(
        self,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        scale: Scale = "row",
        group_size: int = 128,
        bits: Bits = 2,
        layers: list[dict[str, Any]] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"TernaryConfig: quant_method must be {METHOD!r}, got {quant_method!r}")
        self.quant_method = METHOD
        self.include = include if include is None or isinstance(include, str) else list(include)
        self.exclude = exclude if isinstance(exclude, str) else list(exclude)
        self.scale, self.group_size, self.bits = scale, group_size, bits
        self.layers = layers


@register_quantizer(METHOD)
class TernaryQuantizer(HfQuantizer):  # type: ignore[misc]
    """Put packed layers where a checkpoint has them, or round a float model's once it is loaded."""

    quantization_config: TernaryConfig

    def is_serializable(self) -> bool:
        """Return True: packed weights are ordinary buffers."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: ``TernaryFlip`` or ``build`` trains the layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Return True, so that ``Trainer`` accepts the model without adapters."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        """Bring the record up to date before it is saved: layers may have been converted since."""
        if forms := _forms(model):
            self.quantization_config.layers = forms
        else:
            self.remove_quantization_config(model)
        return None, {}

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> None:
        if not self.pre_quantized:
            return
        for form in self.quantization_config.layers or []:
            for name in form["names"]:
                _place(model, name, form)

    def _process_model_after_weight_loading(self, model: nn.Module, **given: Any) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            made = {"scale": config.scale, "group_size": config.group_size, "bits": config.bits}
            ternarize(model, config.include, config.exclude, **made)  # type: ignore[arg-type]
            config.layers = _forms(model)
        for name, layer in _layers(model).items():
            layer.__dict__.pop("weight", None)  # see _stand_in
            if not getattr(layer.checksum, "_is_hf_initialized", False):
                layer.seal()  # saved before there were checksums
            try:
                layer.verify_packed(layer.packed, layer.checksum)
            except ValueError as error:
                raise ValueError(f"ternary layer {name!r}: {error}") from None
        return model


def record_ternary(model: PreTrainedModel) -> TernaryConfig:
    """Write which layers are ternary into a model's config, so that ``save_pretrained`` keeps them.

    Call it after :func:`steepest.ternary.ternarize`. ``from_pretrained`` then returns the same layers with
    the same bits. :class:`~steepest.integrations.transformers.SteepestCallback` calls it too.

    Raises:
        TypeError: not a model of transformers.
        ValueError: no ternary layers; the model is quantized by another method.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"record_ternary() takes a model of transformers, got {type(model).__name__}")
    forms = _forms(model)
    if not forms:
        raise ValueError(
            f"{type(model).__name__} has no ternary layers: steepest.ternary.ternarize(model) makes some"
        )
    other = getattr(model, "hf_quantizer", None)
    if other is not None and not isinstance(other, TernaryQuantizer):
        raise ValueError(f"the model is already quantized by {other.quantization_config.quant_method!r}")
    config = TernaryConfig(layers=forms)
    model.hf_quantizer = TernaryQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    model.hf_quantizer.postprocess_model(model)
    return config


def _layers(model: nn.Module) -> dict[str, TernaryLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TernaryLinear)}


def _forms(model: nn.Module) -> list[dict[str, Any]]:
    """Return the names of the layers by their form, as JSON can hold it."""
    forms: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in _layers(model).items():
        # One row's scale and a single one have the same shape, and mean the same.
        scale = "group" if layer.scale.dim() == 2 else "row" if len(layer.scale) > 1 else "tensor"
        form = layer.bits, scale, layer.group_size if scale == "group" else None, layer.bias is not None
        forms.setdefault((*form, layer.in_features, layer.out_features), []).append(name)
    keys = ("bits", "scale", "group_size", "bias", "in_features", "out_features")
    return [{**dict(zip(keys, form, strict=True)), "names": names} for form, names in forms.items()]


def _place(model: nn.Module, name: str, form: dict[str, Any]) -> None:
    """Put an empty layer of this form in place of the dense one, on its device."""
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"config.json lists a ternary layer {name!r}, which the model lacks") from None
    if isinstance(dense, TernaryLinear):
        return
    kind = BinaryLinear if form["bits"] == 1 else TernaryLinear
    sizes = form["in_features"], form["out_features"], form["bias"], form["scale"], form["group_size"] or 128
    like = next(dense.parameters())
    layer = kind(*sizes, device=like.device, dtype=like.dtype)
    object.__setattr__(layer, "weight", _stand_in(layer))
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _stand_in(layer: TernaryLinear) -> Tensor:
    """Return a tensor without data, for the ``_init_weights`` of models that write to ``child.weight``.

    transformers initializes what a checkpoint lacks module by module, and a module without parameters of its
    own is always among them: GPT-2's attention draws ``c_proj.weight``. The mark makes the draw pass over it.
    """
    made = torch.empty(layer.out_features, layer.in_features, dtype=layer.scale.dtype, device="meta")
    made._is_hf_initialized = True  # type: ignore[attr-defined]
    return made
