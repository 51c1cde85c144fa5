"""PEFT: LoRA adapters over ternary and binary layers."""

from __future__ import annotations

from typing import Any, TypeVar

from steepest.integrations.failed_import import failed_import

try:
    from peft import LoraConfig
    from peft.tuners.lora import Linear
except ImportError as error:
    raise failed_import(__name__, ["peft>=0.17"], error) from error

from torch import nn

from steepest.ternary import TernaryLinear

__all__ = ["TernaryLora", "adapt_ternary"]

Config = TypeVar("Config", bound=LoraConfig)


def adapt_ternary(config: Config) -> Config:
    """Let a ``LoraConfig`` put adapters over ternary and binary layers; return it.

    PEFT does not save this with an adapter, so a config that is read again needs it again.

    Raises:
        ValueError: ``target_modules="all-linear"``, with which PEFT finds none of these layers.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = nn.Sequential(TernaryLinear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> adapted = get_peft_model(model, adapt_ternary(LoraConfig(r=2, target_modules=["0"])))
    >>> [name for name, p in adapted.named_parameters() if p.requires_grad]
    ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']
    """
    if str(config.target_modules).lower() == "all-linear":
        raise ValueError(
            "target_modules='all-linear' finds nn.Linear only, and would leave out ternary and binary "
            "layers: name the modules, such as target_modules=['q_proj', 'v_proj']"
        )
    config._register_custom_module({TernaryLinear: TernaryLora})
    return config


class TernaryLora(Linear):  # type: ignore[misc]
    r"""LoRA over a layer of packed weights, which stay as they are.

    .. math:: y = x\,(s \circ T)^\top + b + \tfrac{\alpha}{r}\, x A^\top B^\top

    PEFT makes these for a config that :func:`adapt_ternary` has been given. Dropout, rsLoRA, several
    adapters and mixed batches work as over ``nn.Linear``.

    Raises:
        ValueError: a variant (DoRA and others) or an initialization (PiSSA, OLoRA, LoftQ and others) that
            needs the float weights; from ``merge``, since ternary weights cannot hold the sum.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Return plain LoRA alone: the variants compute with the float weights."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, TernaryLinear)
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **more: Any) -> None:
        """Add an adapter, beside the layer and in its dtype."""
        if config.init_lora_weights not in (True, False, "gaussian", "eva"):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} starts from the float weights, which a "
                f"{type(self.get_base_layer()).__name__} does not have: use True, False, 'gaussian' or 'eva'"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **more)
        # PEFT takes device and dtype from a ``weight``.
        base: Any = self.get_base_layer()
        for factors in (self.lora_A, self.lora_B):
            factors[adapter_name].to(base.packed.device, base.scale.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: raises ``ValueError`` and changes nothing in this layer."""
        bits = self.get_base_layer().bits
        raise ValueError(
            f"adapters cannot be merged into weights of {bits} bit{'s' * (bits > 1)}: −1, 0 and 1 times a "
            "scale cannot hold s∘T + (α/r)·BA. Save the adapter and load it over the ternary model, or call "
            "steepest.ternary.densify(model) before you add adapters"
        )

    def unmerge(self) -> None:
        """Do nothing: nothing was merged."""
