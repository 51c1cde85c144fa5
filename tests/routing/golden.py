"""What every tensor of the zoo is, written by hand: name -> (rule, view, kind)."""

from __future__ import annotations

__all__ = ["GOLDEN"]

Entry = tuple[str, object, str]

NORM: Entry = ("adamw", None, "norm")
BIAS: Entry = ("adamw", None, "bias")
GAIN: Entry = ("adamw", None, "gain")
OUTPUT: Entry = ("adamw", None, "output")
EMBEDDING: Entry = ("adamw", None, "embedding")
LINEAR: Entry = ("muon", None, "linear")
CONV: Entry = ("muon", "flatten", "conv")


def _each(count: int, prefix: str, table: dict[str, Entry]) -> dict[str, Entry]:
    return {f"{prefix}.{index}.{name}": entry for index in range(count) for name, entry in table.items()}


BLOCK: dict[str, Entry] = {
    "ln_1.weight": NORM,
    "ln_1.bias": NORM,
    "qkv.weight": LINEAR,
    "qkv.bias": BIAS,
    "proj.weight": LINEAR,
    "proj.bias": BIAS,
    "ln_2.weight": NORM,
    "ln_2.bias": NORM,
    "up.weight": LINEAR,
    "up.bias": BIAS,
    "down.weight": LINEAR,
    "down.bias": BIAS,
}

GOLDEN: dict[str, dict[str, Entry]] = {
    "gpt": {
        "wte.weight": EMBEDDING,
        "wpe.weight": EMBEDDING,
        **_each(2, "blocks", BLOCK),
        "ln_f.weight": NORM,
        "ln_f.bias": NORM,
    },
    "llama": {
        "embed_tokens.weight": EMBEDDING,
        **_each(
            2,
            "layers",
            {
                "q_proj.weight": LINEAR,
                "k_proj.weight": LINEAR,
                "v_proj.weight": LINEAR,
                "o_proj.weight": LINEAR,
                "gate_proj.weight": LINEAR,
                "up_proj.weight": LINEAR,
                "down_proj.weight": LINEAR,
                "input_layernorm.weight": NORM,
                "post_attention_layernorm.weight": NORM,
            },
        ),
        "norm.weight": NORM,
        "lm_head.weight": OUTPUT,
    },
    "resnet": {
        "conv1.weight": CONV,
        "bn1.weight": NORM,
        "bn1.bias": NORM,
        **_each(
            2,
            "layer1",
            {
                "conv1.weight": CONV,
                "bn1.weight": NORM,
                "bn1.bias": NORM,
                "conv2.weight": CONV,
                "bn2.weight": NORM,
                "bn2.bias": NORM,
                "downsample.weight": CONV,
            },
        ),
        "fc.weight": OUTPUT,
        "fc.bias": BIAS,
    },
    "vit": {
        "cls_token": GAIN,
        "pos_embed": ("adamw", None, "table"),
        "patch_embed.weight": CONV,
        "patch_embed.bias": BIAS,
        **_each(2, "blocks", {**BLOCK, "gamma": GAIN}),
        "norm.weight": NORM,
        "norm.bias": NORM,
        "head.weight": OUTPUT,
        "head.bias": BIAS,
    },
    "sasrec": {
        "item_emb.weight": EMBEDDING,
        "pos_emb.weight": EMBEDDING,
        "attention_layernorms.0.weight": NORM,
        "attention_layernorms.0.bias": NORM,
        "attention_layers.0.in_proj_weight": ("muon", ("rows", (8, 8, 8)), "attention"),
        "attention_layers.0.in_proj_bias": BIAS,
        "attention_layers.0.out_proj.weight": LINEAR,
        "attention_layers.0.out_proj.bias": BIAS,
        "forward_layers.0.conv1.weight": CONV,
        "forward_layers.0.conv1.bias": BIAS,
        "forward_layers.0.conv2.weight": CONV,
        "forward_layers.0.conv2.bias": BIAS,
        "last_layernorm.weight": NORM,
        "last_layernorm.bias": NORM,
    },
    "moe": {
        "embed.weight": EMBEDDING,
        "layers.0.norm.weight": NORM,
        "layers.0.router.weight": LINEAR,
        "layers.0.experts.up": ("muon", "batch", "experts"),
        "layers.0.experts.up_bias": BIAS,
        "layers.0.experts.down": ("muon", "batch", "experts"),
        "output_projection.weight": OUTPUT,
        "output_projection.bias": BIAS,
    },
    "lora": {
        "wrapped.lora_A": ("adamw", None, "lora"),
        "wrapped.lora_B": ("adamw", None, "lora"),
        "wrapped.base.weight": LINEAR,
        "wrapped.base.bias": BIAS,
        "dense.weight": LINEAR,
        "dense.bias": BIAS,
        "classifier.weight": OUTPUT,
        "classifier.bias": BIAS,
    },
    "lstm": {
        "embed.weight": EMBEDDING,
        "lstm.weight_ih_l0": ("muon", ("rows", (8, 8, 8, 8)), "recurrent"),
        "lstm.weight_hh_l0": ("muon", ("rows", (8, 8, 8, 8)), "recurrent"),
        "lstm.bias_ih_l0": BIAS,
        "lstm.bias_hh_l0": BIAS,
        "lstm.weight_hr_l0": ("muon", None, "recurrent"),
        "gru.weight_ih_l0": ("muon", ("rows", (8, 8, 8)), "recurrent"),
        "gru.weight_hh_l0": ("muon", ("rows", (8, 8, 8)), "recurrent"),
        "gru.bias_ih_l0": BIAS,
        "gru.bias_hh_l0": BIAS,
        "out.weight": OUTPUT,
        "out.bias": BIAS,
    },
    "weight_normed": {
        "normed.bias": BIAS,
        "normed.parametrizations.weight.original0": GAIN,
        "normed.parametrizations.weight.original1": LINEAR,
        "spectral.bias": BIAS,
        "spectral.parametrizations.weight.original": LINEAR,
        "rotation.bias": BIAS,
        "rotation.parametrizations.weight.original": ("adamw", None, "factor"),
        "older.bias": BIAS,
        "older.weight_g": GAIN,
        "older.weight_v": LINEAR,
        "last.weight": OUTPUT,
        "last.bias": BIAS,
    },
    "mlp": {
        "0.weight": LINEAR,
        "0.bias": BIAS,
        "1.weight": GAIN,
        "2.weight": LINEAR,
        "2.bias": BIAS,
        "4.weight": OUTPUT,
        "4.bias": BIAS,
    },
}
