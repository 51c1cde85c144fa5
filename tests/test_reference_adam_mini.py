"""Adam-mini follows its equations step by step, and AdamW where the two are one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from loops import for_each
from steepest import AdamMini, AdamW
from steepest.views import transposed

STEPS = 12


def gradients(shape, steps=STEPS):
    """Gradients whose elements differ by four orders of magnitude."""
    scale = np.logspace(-2, 2, num=int(np.prod(shape))).reshape(shape)
    return [scale * np.random.default_rng(t).standard_normal(shape) for t in range(steps)]


def reference(p, labels, grads, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Return parameters and v after all steps, in float64; elements with one label share a v."""
    m, v = np.zeros_like(p), np.zeros(labels.max() + 1)
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        mean = np.array([(g[labels == b] ** 2).mean() for b in range(len(v))])
        v = betas[1] * v + (1 - betas[1]) * mean
        denominator = np.sqrt(v / (1 - betas[1] ** t))[labels] + eps
        p = p - lr * weight_decay * p - lr * (m / (1 - betas[0] ** t)) / denominator
    return p, v


def label(shape, *sections):
    """Label the elements of a matrix whose rows fall into blocks of these sizes."""
    rows = np.repeat(np.arange(len(sections)), sections)
    return np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape)


def train(param, grads, make):
    optimizer = make([("w", param)])
    for g in grads:
        param.grad = torch.tensor(g).to(param.dtype)
        optimizer.step()
    return optimizer


ROWS = [1] * 6
CASES = [
    ((6, 5), {}, label((6, 5), *ROWS)),
    ((6, 5), {"blocks": "tensor"}, label((6, 5), 6)),
    ((6, 5), {"blocks": ((2, 3),)}, label((6, 5), 3, 3)),
    ((6, 5), {"blocks": [(2, 2), (2, 1)]}, label((6, 5), 2, 2, 1, 1)),
    ((6, 5), {"bucket_bytes": 100}, label((6, 5), *ROWS)),
    ((6, 5), {"views": {"w": transposed()}}, np.broadcast_to(np.arange(5), (6, 5))),
    ((4, 3, 2), {}, label((4, 3, 2), 4)),
    ((1, 4, 3), {}, np.repeat(np.arange(4), 3).reshape(1, 4, 3)),
    ((7,), {}, label((7,), 7)),
    ((), {}, np.array(0)),
]


@for_each(("shape", "options", "labels"), CASES)
@for_each("more", [{}, {"betas": (0.5, 0.95), "eps": 1e-2, "weight_decay": 0.1}])
def test_it_follows_the_equations(shape, options, labels, more):
    start, grads = np.random.default_rng(99).standard_normal(shape), gradients(shape)
    param = nn.Parameter(torch.tensor(start))
    optimizer = train(param, grads, lambda params: AdamMini(params, lr=0.03, **options, **more))
    expected, v = reference(start, labels, grads, 0.03, **more)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(optimizer.state[param]["block_rms"].numpy() ** 2, v, rtol=1e-12)


def test_with_blocks_of_one_element_it_is_adamw():
    start, grads = np.ones((9, 1)), gradients((9, 1))
    ours, theirs = (nn.Parameter(torch.tensor(start)) for _ in range(2))
    train(ours, grads, lambda params: AdamMini(params, lr=0.03, weight_decay=0.1))
    train(theirs, grads, lambda params: AdamW(params, lr=0.03, weight_decay=0.1))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_where_gradients_are_alike_in_each_block_it_is_adamw():
    signs = np.sign(np.random.default_rng(0).standard_normal((STEPS, 6, 5)))
    grads = list(signs * gradients((STEPS, 6, 1), steps=1)[0])
    ours, theirs = (nn.Parameter(torch.ones(6, 5, dtype=torch.float64)) for _ in range(2))
    train(ours, grads, lambda params: AdamMini(params, lr=0.03))
    train(theirs, grads, lambda params: AdamW(params, lr=0.03, weight_decay=0.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_matrix_that_is_cut_into_rows_takes_the_same_step():
    """Also with noise for each element, and with averages in one byte."""
    options = {"rounding": "stochastic", "state_dtype": "int8", "seed": 4}
    found = []
    for bucket_bytes in (1 << 28, 64 * 4 * 2 * 5):
        param = nn.Parameter(torch.linspace(-1, 1, 65 * 64).view(65, 64).bfloat16())
        train(
            param,
            gradients((65, 64), 3),
            lambda params, size=bucket_bytes: AdamMini(params, bucket_bytes=size, **options),
        )
        found.append(param.detach())
    assert torch.equal(*found)


def test_a_zero_gradient_moves_nothing_without_eps():
    param = nn.Parameter(torch.ones(3, 2))
    train(param, [np.zeros((3, 2))], lambda params: AdamMini(params, eps=0.0))
    assert torch.equal(param.detach(), torch.ones(3, 2))


class Attention(nn.Module):
    """Separate projections, with grouped keys and values, under Llama's names."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 3
        self.q_proj = nn.Linear(12, 12, bias=False)
        self.k_proj = nn.Linear(12, 6, bias=False)
        self.v_proj = nn.Linear(12, 6, bias=False)
        self.o_proj = nn.Linear(12, 12, bias=False)


class Fused(nn.Module):
    """The same, fused; ``name`` is that of the projection."""

    def __init__(self, name="qkv", rows=24, **heads):
        super().__init__()
        for attribute, count in heads.items():
            setattr(self, attribute, count)
        self.add_module(name, nn.Linear(12, rows, bias=False))
        self.proj = nn.Linear(12, 12)


def blocks(model):
    """Return the option ``blocks`` of each parameter by name."""
    model = nn.ModuleDict({"attention": model, "head": nn.Linear(12, 2, bias=False)})
    groups = steepest.build(model, "adam_mini").param_groups
    return {
        name.removeprefix("attention."): group["blocks"] for group in groups for name in group["param_names"]
    }


def test_build_gives_queries_and_keys_their_heads():
    found = blocks(Attention())
    assert found["q_proj.weight"] == ((4, 3),)
    assert found["k_proj.weight"] == ((2, 3),)
    assert {found[name] for name in ("v_proj.weight", "o_proj.weight", "head.weight")} == {"rows"}


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        (Fused(num_heads=4, num_key_value_heads=2), "qkv.weight", ((6, 3), (6, 1))),
        (Fused("c_attn", rows=36, n_head=4), "c_attn.weight", ((8, 3), (12, 1))),
        (nn.MultiheadAttention(12, 4), "in_proj_weight", ((8, 3), (12, 1))),
        (nn.MultiheadAttention(12, 4, kdim=5, vdim=7), "k_proj_weight", ((4, 3),)),
        (nn.MultiheadAttention(12, 4, kdim=5, vdim=7), "v_proj_weight", "rows"),
        # Heads that are unknown or do not fit, and rows that are interleaved.
        (Fused(rows=36), "qkv.weight", "rows"),
        (Fused(rows=35, num_heads=4), "qkv.weight", "rows"),
        (Fused("query_key_value", rows=36, num_heads=4), "query_key_value.weight", "rows"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_build_finds_heads_in_fused_projections(model, name, expected):
    assert blocks(model)[name] == expected


def test_a_fused_projection_moves_as_its_parts_do():
    parts, fused = Attention(), Fused(num_heads=4, num_key_value_heads=2)
    parts = nn.ModuleDict({"q_proj": parts.q_proj, "k_proj": parts.k_proj, "v_proj": parts.v_proj})
    parts.num_heads, parts.num_key_value_heads = 4, 2
    weights = [layer.weight for layer in parts.values()]
    fused.qkv.weight.data = torch.cat([weight.data for weight in weights])
    optimizers = [
        steepest.build(nn.ModuleList([model, nn.Linear(2, 2)]), "adam_mini", lr=0.03)
        for model in (parts, fused)
    ]
    for g in gradients((24, 12), 3):
        fused.qkv.weight.grad = torch.tensor(g).float()
        for weight, grad in zip(weights, torch.tensor(g).float().split([12, 6, 6]), strict=True):
            weight.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.qkv.weight, torch.cat(weights), rtol=1e-6, atol=1e-7)


class Conv1D(nn.Module):
    """Hugging Face's linear layer, whose weight is stored as [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.ones(nx, nf))


def test_a_fused_projection_that_is_stored_transposed_has_the_same_blocks():
    plain, stored = Fused("c_attn", rows=36, num_heads=4), Fused("c_attn", rows=36, num_heads=4)
    plain.c_attn.weight.data.fill_(1.0)
    stored.c_attn = Conv1D(36, 12)
    weights = [plain.c_attn.weight, stored.c_attn.weight]
    for model, weight, turned in zip((plain, stored), weights, (False, True), strict=True):
        optimizer = steepest.build(nn.ModuleList([model, nn.Linear(2, 2)]), "adam_mini", lr=0.03)
        for g in gradients((36, 12), 3):
            weight.grad = torch.tensor(g.T if turned else g).float()
            optimizer.step()
        assert optimizer.state[weight]["block_rms"].shape == (8 + 12,)
    torch.testing.assert_close(weights[0], weights[1].T, rtol=1e-6, atol=1e-7)


def test_given_blocks_and_views_hold():
    model = nn.ModuleList([Attention(), nn.Linear(2, 2)])
    groups = steepest.build(model, "adam_mini", blocks="tensor").param_groups
    assert {group["blocks"] for group in groups} == {"tensor"}
    cut = steepest.build(model, "adam_mini", views={"*.q_proj.weight": steepest.views.rows(6, 6)})
    (group,) = [group for group in cut.param_groups if "0.q_proj.weight" in group["param_names"]]
    assert group["blocks"] == "rows"


def test_state_has_a_number_for_each_block_and_the_plan_knows():
    model = nn.ModuleList([Attention(), nn.LayerNorm(12), nn.Linear(12, 2, bias=False)])
    optimizer = steepest.build(model, "adam_mini")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    numel = sum(param.numel() for param in model.parameters())
    count = 4 + 2 + 6 + 12 + 1 + 1 + 2  # q, k, v, o, the norm's two, the output
    assert optimizer.state_bytes() == 4 * (numel + count) + 8 * 7
    assert steepest.plan(model, "adam_mini").state_bytes == optimizer.state_bytes()


@pytest.mark.parametrize("wrong", [((2, 2),), ((7, 1),)])
def test_blocks_that_do_not_fit_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"'w'.*covers [47] rows of a matrix of shape \(6, 5\)"):
        AdamMini([("w", nn.Parameter(torch.ones(6, 5)))], blocks=wrong)
    with pytest.raises(ValueError, match="blocks must be 'rows', 'tensor', or pairs"):
        AdamMini([nn.Parameter(torch.ones(6, 5))], blocks=((2, 0),))
