"""What hypothesis draws from: rules with options, shapes, dtypes, layouts; and how a drawn case is run."""

import math
from dataclasses import dataclass, field, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from steepest import create, list_optimizers
from steepest.linalg import newton_schulz
from steepest.rule import find_rule
from steepest.rules.orthogonalized import OrthogonalizedRule

RULES = list_optimizers()
ANY_ORDER = [name for name in RULES if find_rule(name).scope != "matrix"]  # blind to a tensor's shape
POLAR = [name for name in RULES if isinstance(find_rule(name), OrthogonalizedRule)]  # take no vectors
REAL_ONLY = [name for name in RULES if find_rule(name).scope == "matrix"]
METHODS = ["decoupled", "independent", "l2", "palm", "sign", "cautious"]
LOW = (torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64, *LOW)
STEPS = 3

# The same examples in every run.
bounded = settings(derandomize=True, deadline=None, database=None, max_examples=128)

STACKS = {"bucket_bytes": st.sampled_from([1, 1 << 28])}
MUON = {"nesterov": st.booleans(), "view": st.sampled_from(["flatten", "batch"]), **STACKS}
PSGD = {
    "whiten": st.sampled_from(["momentum", "gradient"]),
    "max_size_dense": st.sampled_from([0, 3, 16384]),
    "max_skew_dense": st.sampled_from([1.0, math.inf]),
    "update_probability": st.sampled_from([1.0, 0.5]),
    "update_flat_steps": st.integers(0, 2),
    "update_decay_steps": st.just(0),
    **STACKS,
}

OWN = {
    "adamw": {"betas": st.sampled_from([(0.9, 0.999), (0.5, 0.0)]), "amsgrad": st.booleans()},
    "ademamix": {"t_alpha_beta3": st.sampled_from([None, 1, 2, 100])},
    "lion": {"betas": st.sampled_from([(0.9, 0.99), (0.0, 0.5)])},
    "sgd": {"momentum": st.sampled_from([0.0, 0.9]), "dampening": st.sampled_from([0.0, 0.5])},
    "sgd_sai": {
        "momentum": st.sampled_from([0.0, 0.9]),
        "scale": st.sampled_from(["gsnr", "sqrt_numel", "none"]),
        "warmup_batches": st.integers(1, 3),
        "relative_eps": st.booleans(),
    },
    "signgsd": {},
    "signum": {"momentum": st.sampled_from([0.0, 0.9])},
    "simba": {
        "window_size": st.integers(1, 20),
        "threshold": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "counter_dtype": st.sampled_from([torch.int8, torch.int16]),
        "memory": st.sampled_from(["counts", "momentum"]),
        "choice": st.sampled_from(["threshold", "lion", "memory"]),
    },
    "simba_leaky": {"leak": st.sampled_from([0.01, 0.3, 1.0])},
    "orthogonalized": {
        "use_nesterov": st.booleans(),
        "view": st.sampled_from(["flatten", "batch"]),
        "scaled_orthogonalize_fn": st.just(newton_schulz),
    },
    **dict.fromkeys(("muon", "normuon", "polargrad", "scion"), MUON),
    "hyperball": {**MUON, "radius": st.sampled_from([None, 2.0])},
    "soap": {
        "precondition_frequency": st.integers(1, 3),
        "max_precond_dim": st.sampled_from([0, 3, 10000]),
        **STACKS,
    },
    "quad": PSGD,
    "procrustes": PSGD,
}


def draws(name: str) -> bool:
    """Whether a rule draws noise of its own, so that a parameter's place and steps matter."""
    rule = find_rule(name)
    return not (rule.takes | rule.transform_takes).isdisjoint({"noise", "key"})


@dataclass(frozen=True)
class Case:
    """An optimizer by name, with options, and where its parameters' and gradients' values come from."""

    name: str
    options: dict
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    seed: int
    layouts: list[str] = field(default_factory=list)

    @property
    def noisy(self) -> bool:
        return draws(self.name) or (self.options.get("rounding") == "stochastic" and self.dtype in LOW)

    def make(self, params, **more):
        return create(self.name, params, **{"compile": False, **self.options, **more})

    def begins(self) -> list[Tensor]:
        """The parameters' values at the start."""
        return [self._draw(shape, 0, i) for i, shape in enumerate(self.shapes)]

    def gradients(self, step: int) -> list[Tensor]:
        """The gradients of one step, a fifth of their elements zero."""
        made = []
        for i, shape in enumerate(self.shapes):
            g = self._draw(shape, step + 1, i)
            made.append(torch.where(self._draw(shape, step + 1, i).real.abs() < 0.25, 0, g).to(self.dtype))
        return made

    def _draw(self, shape, step, i) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + step * 101 + i)
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(self.dtype)

    def but(self, **changed) -> "Case":
        return replace(self, **changed)


shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    st.integers(1, 70).map(lambda n: (n,)),
)
matrices = st.lists(st.integers(0, 6), min_size=2, max_size=4).map(tuple)
lines = st.integers(1, 200).map(lambda n: (n,))
layouts = st.sampled_from(["contiguous", "transposed", "stepped", "channels_last", "offset", "reversed dims"])


@st.composite
def cases(draw, names=RULES, dtypes=REAL, methods=METHODS, rounding=True, tensors=4, shape=shapes):
    name = draw(st.sampled_from(names))
    options = {key: draw(value) for key, value in OWN.get(name, {}).items()}
    if name == "sgd" and options["momentum"] and not options["dampening"]:
        options["nesterov"] = draw(st.booleans())
    options["lr"] = draw(st.sampled_from([0.0, 1e-3, 0.1]))
    options["weight_decay"] = draw(st.sampled_from([0.0] if name == "hyperball" else [0.0, 0.1]))
    options["weight_decay_method"] = draw(st.sampled_from(methods))
    options["maximize"] = draw(st.booleans())
    if name == "signgsd" and options["weight_decay_method"] == "sign":
        options["decay_overshoot"] = draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))
    if dtype in LOW:
        options["state_dtype"] = draw(st.sampled_from([None, torch.float32]))
        if rounding:
            options["rounding"] = draw(st.sampled_from(["nearest", "stochastic"]))
    count = draw(st.integers(1, tensors))
    if name in POLAR:
        shape = matrices
    return Case(
        name,
        options,
        [draw(shape) for _ in range(count)],
        dtype,
        draw(st.integers(0, 1000)),
        [draw(layouts) for _ in range(2 * count)],
    )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another place of memory: other strides, or not at a storage's beginning."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "reversed dims" and values.dim() >= 2:
        order = tuple(reversed(range(values.dim())))
        return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if layout == "channels_last" and values.dim() == 4:
        return values.clone(memory_format=torch.channels_last)
    if layout == "stepped" and values.dim() >= 1:
        room = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), math.nan, dtype=values.dtype)
        return room[..., 1::2].copy_(values)
    room = torch.full((values.numel() + 3,), math.nan, dtype=values.dtype)
    start = 1 if layout == "offset" else 0
    return room[start : start + values.numel()].view(values.shape).copy_(values)


def parameters(values) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value) for value in values]


def same(ours: Tensor, other: Tensor) -> bool:
    """Equal to the last bit; NaN equals NaN, and −0 equals 0."""
    return ours.dtype == other.dtype and torch.allclose(ours, other, rtol=0, atol=0, equal_nan=True)


def assert_same(params, others, optimizer, twin) -> None:
    """Equal parameters and equal state, bit for bit."""
    for param, other in zip(params, others, strict=True):
        assert same(param.detach(), other.detach())
        state, expected = optimizer.state.get(param, {}), twin.state.get(other, {})
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert same(state[name], value), name


def run(case: Case, params, optimizer, change=lambda g: g) -> None:
    """All steps of a case, its gradients changed as told."""
    for step in range(STEPS):
        for param, gradient in zip(params, case.gradients(step), strict=True):
            param.grad = change(gradient)
        optimizer.step()
