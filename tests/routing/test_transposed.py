"""Weights that are stored [in, out] step as the same model's that are stored [out, in]."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import steepest
from steepest.views import columns, rows, transposed

# Those that tell outputs from inputs, and the others of the family.
RULES: dict[str, dict[str, Any]] = {
    "muon": {"method": "svd", "scale": "original"},
    "normuon": {"method": "svd"},
    "scion": {"method": "svd"},
    "hyperball": {"method": "svd"},
    "polargrad": {"method": "svd"},
    # Their noise goes by an element's place in memory and by the parameter's number, which differ.
    "quad": {"noise_scale": 0.0, "norm": "exact"},
    "procrustes": {"noise_scale": 0.0, "norm": "exact"},
}
every_rule = pytest.mark.parametrize("rule", RULES)


class Conv1D(nn.Module):
    """What Hugging Face's GPT-2 has for linear layers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Body(nn.Module):
    """Hidden layers, and an output of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.lm_head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def train(model: nn.Module, rule: str, inputs: Tensor, steps: int = 4, **options: Any) -> steepest.Optimizer:
    optimizer = steepest.build(model, rule, lr=0.05, fallback={"rule": "sgd"}, **RULES[rule], **options)
    for step in range(steps):
        optimizer.zero_grad()
        (model(inputs) - 0.1 * step).square().sum().backward()
        optimizer.step()
    return optimizer


def filled(param: Tensor, seed: int) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 3


def twins(stored: list[nn.Module], plain: list[nn.Module]) -> tuple[Body, Body]:
    """Two models of the same weights in float64: the first has them with dimensions 0 and 1 swapped."""
    models = Body(*stored).double(), Body(*plain).double()
    models[1].load_state_dict({**models[1].state_dict(), **models[0].lm_head.state_dict(prefix="lm_head.")})
    for index, (ours, theirs) in enumerate(zip(models[0].layers, models[1].layers, strict=True)):
        theirs.weight.data = filled(theirs.weight, index)
        ours.weight.data = swapped(theirs)
        theirs.bias.data = filled(theirs.bias, 10 + index)
        ours.bias.data = theirs.bias.data.clone()
    return models


def swapped(layer: nn.Module) -> Tensor:
    """A linear layer's or convolution's weight as the transposed kind of layer stores it."""
    groups = getattr(layer, "groups", 1)
    return torch.cat([each.transpose(0, 1) for each in layer.weight.detach().chunk(groups)]).contiguous()


@every_rule
def test_conv1d_steps_as_linear_does(rule: str):
    sizes = [(6, 10), (10, 4), (4, 4)]
    stored, plain = twins([Conv1D(out, into) for into, out in sizes], [nn.Linear(*size) for size in sizes])
    inputs = filled(torch.empty(5, 6), 99)
    views = {row.name: row.view for row in train(stored, rule, inputs).explain().rows}
    train(plain, rule, inputs)
    assert views["layers.0.weight"] == transposed()
    for ours, theirs in zip(stored.layers, plain.layers, strict=True):
        assert torch.allclose(ours.weight, theirs.weight.T, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(ours.weight.T, filled(theirs.weight, 0), atol=1e-3)


@pytest.mark.parametrize("rule", ["muon", "normuon", "scion"])
def test_none_takes_the_weight_as_it_is_stored(rule: str):
    """So the view above is what makes them equal."""
    stored, plain = twins([Conv1D(10, 6)], [nn.Linear(6, 10)])
    inputs = filled(torch.empty(5, 6), 99)
    rows_ = train(stored, rule, inputs, views={"layers.*.weight": None}).explain().rows
    assert {row.view for row in rows_} == {None}
    train(plain, rule, inputs)
    assert not torch.allclose(stored.layers[0].weight, plain.layers[0].weight.T, atol=1e-3)


@every_rule
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_steps_as_its_out_in_equivalent(rule: str, groups: int, dims: int):
    """The equivalent: a layer that keeps [out, in/groups, ...] and swaps it as it computes."""
    convolve = getattr(functional, f"conv_transpose{dims}d")

    class Equivalent(getattr(nn, f"Conv{dims}d")):
        def forward(self, x: Tensor) -> Tensor:
            swap = torch.cat([each.transpose(0, 1) for each in self.weight.chunk(self.groups)])
            return convolve(x, swap, self.bias, groups=self.groups)

    kind = getattr(nn, f"ConvTranspose{dims}d")
    stored, plain = twins([kind(6, 4, 3, groups=groups)], [Equivalent(6, 4, 3, groups=groups)])
    inputs = filled(torch.empty(2, 6, *[2] * dims), 99)
    views = {row.name: row.view for row in train(stored, rule, inputs).explain().rows}
    train(plain, rule, inputs)
    assert views["layers.0.weight"] == transposed(None if groups == 1 else rows(3, 3))
    assert torch.allclose(stored.layers[0].weight, swapped(plain.layers[0]), rtol=1e-9, atol=1e-11)


@every_rule
def test_gpt2s_fused_projection_steps_as_three_linear_layers(rule: str):
    class Fused(Body):
        def forward(self, x: Tensor) -> Tensor:
            return sum(each.tanh() for each in self.layers[0](x).chunk(3, dim=-1))

    class Apart(Body):
        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x).tanh() for layer in self.layers)

    apart = Apart(*[nn.Linear(5, 5) for _ in range(3)]).double()
    fused = Fused(Conv1D(15, 5)).double()
    for index, layer in enumerate(apart.layers):
        layer.weight.data, layer.bias.data = filled(layer.weight, index), filled(layer.bias, index)
    fused.layers[0].weight.data = torch.cat([each.weight.detach().T for each in apart.layers], dim=1)
    fused.layers[0].bias.data = torch.cat([each.bias.detach() for each in apart.layers])
    for layer in (*fused.layers, *apart.layers):
        layer.bias.requires_grad_(False)  # PSGD would see one long vector
    inputs = filled(torch.empty(7, 5), 99)
    train(fused, rule, inputs, views={"layers.0.weight": transposed(columns(5, 5, 5))})
    train(apart, rule, inputs)
    whole = torch.cat([each.weight.T for each in apart.layers], dim=1)
    assert torch.allclose(fused.layers[0].weight, whole, rtol=1e-9, atol=1e-11)


def test_scions_step_has_the_length_that_it_should():
    """ρ·√(out/in) times lr in the spectral norm, for a layer of 16 inputs and 64 outputs."""
    model = Body(Conv1D(64, 16))
    weight = model.layers[0].weight
    weight.data = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    before = weight.detach().clone()
    optimizer = steepest.build(model, "scion", lr=0.5, radius=1.0, weight_decay=0.0, method="svd")
    weight.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    length = torch.linalg.matrix_norm(before - weight.detach(), ord=2) / 0.5
    assert float(length) == pytest.approx(2.0, rel=1e-4)


def test_normuons_second_moment_has_a_number_for_each_output():
    model = Body(Conv1D(64, 16))
    optimizer = train(model, "normuon", torch.ones(3, 16), steps=1)
    state = optimizer.state[model.layers[0].weight]
    assert [tuple(state[name].shape) for name in state if name.startswith("second_momentum")] == [(64, 1)]


# -- experts


class Experts(nn.Module):
    """Experts, stored [experts, out, in] or [experts, in, out]."""

    def __init__(self, *, stored: bool) -> None:
        super().__init__()
        self.num_experts = 3
        sizes = [(3, 10, 4), (3, 4, 5)]
        one, two = (torch.empty(e, i, o) if stored else torch.empty(e, o, i) for e, o, i in sizes)
        self.gate_up_proj, self.down_proj = nn.Parameter(one), nn.Parameter(two)


class GptOssExperts(Experts):
    """Of Hugging Face's class name, which is enough to know the layout."""


class Says(Experts):
    """Newer ones of Hugging Face say it."""

    def __init__(self, *, stored: bool) -> None:
        super().__init__(stored=stored)
        self.is_transposed = stored


def stepped(model: nn.Module, rule: str, *, swap: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    """The experts' weights after three steps, as [experts, out, in]."""
    experts = model.layers[0]
    for index, param in enumerate((experts.gate_up_proj, experts.down_proj)):
        shape = param.shape if not swap else param.mT.shape
        value = filled(torch.empty(shape), index)
        param.data = value.mT.contiguous() if swap else value
    optimizer = steepest.build(model, rule, lr=0.05, **options)
    for step in range(3):
        for index, param in enumerate((experts.gate_up_proj, experts.down_proj)):
            grad = filled(torch.empty(param.mT.shape if swap else param.shape), 10 * step + index)
            param.grad = grad.mT.contiguous() if swap else grad
        optimizer.step()
    weights = {name: param.detach() for name, param in experts.named_parameters()}
    return {name: weight.mT if swap else weight for name, weight in weights.items()}


@every_rule
@pytest.mark.parametrize("kind", [GptOssExperts, Says])
def test_experts_that_are_stored_transposed_step_as_others_do(kind: type[Experts], rule: str):
    ours = stepped(Body(kind(stored=True)), rule, swap=True, options=RULES[rule])
    theirs = stepped(Body(Experts(stored=False)), rule, swap=False, options=RULES[rule])
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-11)


def test_which_experts_are_known_to_be_stored_transposed():
    def view(experts: nn.Module, **options: Any) -> set[Any]:
        optimizer = steepest.build(Body(experts), "muon", **options)
        return {row.view for row in optimizer.explain().rows if row.kind in ("experts", "override")}

    assert view(GptOssExperts(stored=True)) == {transposed()}
    assert view(Says(stored=True)) == {transposed()}
    assert view(Says(stored=False)) == {"batch"}
    assert view(Experts(stored=True)) == {"batch"}
    newer = GptOssExperts(stored=False)
    newer.is_transposed = False
    assert view(newer) == {"batch"}
    # Seen as [experts, rest] there is no telling which dimensions to swap.
    assert view(GptOssExperts(stored=True), overrides={"*_proj": {"view": "flatten"}}) == {"flatten"}


# -- what else a view must not disturb


def test_a_rule_that_sees_no_matrices_has_no_view():
    optimizer = steepest.build(Body(Conv1D(6, 4), nn.ConvTranspose2d(4, 4, 3)), "lion")
    assert all("views" not in group for group in optimizer.param_groups)
    assert not any("view" in row.why for row in optimizer.explain().rows)


def test_an_output_layer_that_an_override_makes_hidden_is_seen_rightly():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "lm_head": Conv1D(6, 4)})
    for overrides, expected in (({}, ("adamw", None)), ({"lm_head.weight": "muon"}, ("muon", transposed()))):
        rows_ = steepest.build(model, "muon", overrides=overrides).explain().rows
        assert {(row.rule, row.view) for row in rows_ if row.name == "lm_head.weight"} == {expected}


def test_a_transposed_weight_resumes_exactly():
    inputs = filled(torch.empty(5, 6), 99)
    stored, _ = twins([Conv1D(10, 6)], [nn.Linear(6, 10)])
    optimizer = train(stored, "normuon", inputs)
    again = copy.deepcopy(stored)
    other = steepest.build(again, "normuon", lr=0.05, fallback={"rule": "sgd"}, **RULES["normuon"])
    other.load_state_dict(optimizer.state_dict())
    for model, each in ((stored, optimizer), (again, other)):
        each.zero_grad()
        model(inputs).square().sum().backward()
        each.step()
    for ours, theirs in zip(stored.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
