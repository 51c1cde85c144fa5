"""Small models of the kinds that people train; golden.py says what each of their tensors is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu, softmax

__all__ = [
    "GPT",
    "LSTM",
    "MLP",
    "MODELS",
    "BasicBlock",
    "Llama",
    "LoRA",
    "MoE",
    "ResNet",
    "SASRec",
    "ViT",
    "WeightNormed",
]


class Block(nn.Module):
    """A pre-norm block with a fused QKV projection; the ViT's has LayerScale."""

    def __init__(self, width: int, *, layer_scale: bool = False) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        if layer_scale:
            self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
        x = x + self.proj(scaled_dot_product_attention(q, k, v))
        update = self.down(silu(self.up(self.ln_2(x))))
        return x + (update * self.gamma if hasattr(self, "gamma") else update)


class GPT(nn.Module):
    """Token and position embeddings, two blocks, and a head tied to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.wpe = nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.ln_f = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self) -> Tensor:
        x = self.wte(torch.arange(6)) + self.wpe(torch.arange(6))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LlamaLayer(nn.Module):
    """Grouped-query attention (4 query heads, 2 key heads of 2) and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
        self.k_proj = nn.Linear(8, 4, bias=False)
        self.v_proj = nn.Linear(8, 4, bias=False)
        self.o_proj = nn.Linear(8, 8, bias=False)
        self.gate_proj = nn.Linear(8, 20, bias=False)
        self.up_proj = nn.Linear(8, 20, bias=False)
        self.down_proj = nn.Linear(20, 8, bias=False)
        self.input_layernorm = LlamaRMSNorm(8)
        self.post_attention_layernorm = LlamaRMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, 2)).transpose(-2, -3) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = scaled_dot_product_attention(q, k.repeat(2, 1, 1), v.repeat(2, 1, 1))
        x = x + self.o_proj(attended.transpose(-2, -3).flatten(-2))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """RMSNorm, SwiGLU, grouped-query attention, an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([LlamaLayer(), LlamaLayer()])
        self.norm = LlamaRMSNorm(8)
        self.lm_head = nn.Linear(8, 20, bias=False)

    def forward(self) -> Tensor:
        x = self.embed_tokens(torch.arange(6))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class BasicBlock(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Conv2d(into, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)).relu()


class ResNet(nn.Module):
    """Convolutions, BatchNorm, and ``fc``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self) -> Tensor:
        x = self.layer1(self.bn1(self.conv1(torch.randn(2, 3, 5, 5))).relu())
        return self.fc(x.mean((-1, -2)))


class ViT(nn.Module):
    """A patch convolution, class token, learned positions, LayerScale, and ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.patch_embed = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.ModuleList([Block(8, layer_scale=True), Block(8, layer_scale=True)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)

    def forward(self) -> Tensor:
        x = self.patch_embed(torch.randn(2, 3, 4, 4)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(2, -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(8, 8, 1)
        self.conv2 = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.transpose(1, 2)).relu()).transpose(1, 2)


class SASRec(nn.Module):
    """Sequential recommendation: the item embedding scores the items too, and there is no head module."""

    def __init__(self) -> None:
        super().__init__()
        self.item_emb = nn.Embedding(30, 8, padding_idx=0)
        self.pos_emb = nn.Embedding(6, 8)
        self.attention_layernorms = nn.ModuleList([nn.LayerNorm(8)])
        self.attention_layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])
        self.forward_layers = nn.ModuleList([FeedForward()])
        self.last_layernorm = nn.LayerNorm(8)

    def forward(self) -> Tensor:
        x = (self.item_emb(torch.arange(1, 7)) + self.pos_emb(torch.arange(6))).unsqueeze(0)
        for norm, attention, forward in zip(
            self.attention_layernorms, self.attention_layers, self.forward_layers, strict=True
        ):
            y = norm(x)
            x = forward(x + attention(y, y, y, need_weights=False)[0])
        return self.last_layernorm(x) @ self.item_emb.weight.T


class Experts(nn.Module):
    """Three experts in two tensors, [expert, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.randn(3, 16, 8) / 3)
        self.up_bias = nn.Parameter(torch.zeros(3, 16))
        self.down = nn.Parameter(torch.randn(3, 8, 16) / 4)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        hidden = torch.einsum("eoi,ti->teo", self.up, x) + self.up_bias
        return torch.einsum("eio,teo,te->ti", self.down, silu(hidden), weight)


class MoELayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.experts(y, softmax(self.router(y), -1))


class MoE(nn.Module):
    """Experts as 3-D tensors, behind a router."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([MoELayer()])
        self.output_projection = nn.Linear(8, 20)

    def forward(self) -> Tensor:
        x = self.embed(torch.arange(6))
        for layer in self.layers:
            x = layer(x)
        return self.output_projection(x)


class LoRALinear(nn.Module):
    """A frozen linear layer and a low-rank product next to it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


class LoRA(nn.Module):
    """A linear layer that is fine-tuned through LoRA, and one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = LoRALinear(nn.Linear(8, 8), 2)
        self.dense = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 4)

    def forward(self) -> Tensor:
        return self.classifier(self.dense(self.wrapped(torch.randn(3, 8))).relu())


class LSTM(nn.Module):
    """Two recurrent layers, one with a projection, one a GRU, over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, proj_size=4)
        self.gru = nn.GRU(4, 8)
        self.out = nn.Linear(8, 20)

    def forward(self) -> Tensor:
        return self.out(self.gru(self.lstm(self.embed(torch.arange(6)))[0])[0])


class WeightNormed(nn.Module):
    """Every way of torch to compute a weight from something else."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations = nn.utils.parametrizations
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.rotation = parametrizations.orthogonal(nn.Linear(8, 8))
        self.older = nn.utils.weight_norm(nn.Linear(8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self) -> Tensor:
        x = self.older(self.rotation(self.spectral(self.normed(torch.randn(3, 8)))))
        return self.last(x)


class MLP(nn.Sequential):
    """Linear layers and nothing else; a last one with a single output would be a vector."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self) -> Tensor:
        return super().forward(torch.randn(4, 6))


MODELS: dict[str, type[nn.Module]] = {
    "gpt": GPT,
    "llama": Llama,
    "resnet": ResNet,
    "vit": ViT,
    "sasrec": SASRec,
    "moe": MoE,
    "lora": LoRA,
    "lstm": LSTM,
    "weight_normed": WeightNormed,
    "mlp": MLP,
}
