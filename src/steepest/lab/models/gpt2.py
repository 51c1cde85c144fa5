"""The parameters of GPT-2 (Radford et al. 2019) as modules, without a forward pass, to time steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2."""

    title: str
    width: int
    depth: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024


SIZES = {
    "125m": GPT2Config("GPT-2 125M", 768, 12, 12),
    "350m": GPT2Config("GPT-2 350M", 1024, 24, 16),
    "774m": GPT2Config("GPT-2 774M", 1280, 36, 20),
    "1.5b": GPT2Config("GPT-2 1.5B", 1600, 48, 25),
}


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)


class GPT2(nn.Module):
    """The modules and names of GPT-2; linear layers are stored [out, in], the output is tied.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = GPT2(SIZES["125m"])
        >>> sum(parameter.numel() for parameter in model.parameters())
        124439808
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        width = config.width
        self.wte = nn.Embedding(config.vocabulary, width)
        self.wpe = nn.Embedding(config.context, width)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "attn": _Attention(width, config.heads),
                    "ln_2": nn.LayerNorm(width),
                    "mlp": nn.ModuleDict(
                        {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
                    ),
                }
            )
            for _ in range(config.depth)
        )
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, config.vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
