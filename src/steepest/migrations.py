"""Checkpoints of other optimizers: recognize their source, and translate state that means the same here.

:data:`SOURCES` is the table. A source without rules only serves to name it in error messages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.rule import Group, find_rule

__all__ = ["SOURCES", "TORCH_KEYS", "Source", "recognize"]

State = Mapping[str, Any]

# Group keys of torch's optimizers and schedulers, and of monitors, that are no rule's hyper-parameters.
_TORCH = (
    "params param_names name initial_lr min_lr max_lr base_momentum max_momentum capturable differentiable "
    "foreach fused decoupled_weight_decay"
)
TORCH_KEYS = frozenset(_TORCH.split())


@dataclass(frozen=True)
class Source:
    """Another library's optimizer whose checkpoints are recognized. Spaces separate several keys.

    Args:
        name: the optimizer's name, for messages.
        group: keys that its param groups have.
        state: keys that the state of each of its parameters has.
        rules: rules here for which the state means the same.
        peer: the class here that loads its checkpoints, for messages.
        alone: whether its groups have no keys besides these, lr, weight_decay, torch's, and a subclass's own.
        group_here: its group -> the options that have other names here.
        state_here: (its state, the parameter, the group that will be loaded) -> the rule's state. Both raise
            ``ValueError`` with a reason if the checkpoint cannot mean the same.
    """

    name: str
    group: str = ""
    state: str = ""
    rules: str = ""
    peer: str = ""
    alone: bool = False
    group_here: Callable[[Group], dict[str, Any]] = lambda theirs: {}
    state_here: Callable[[State, Tensor, Group], dict[str, Any]] = lambda state, param, group: dict(state)

    def matches(self, group: Group, states: Sequence[State], ours: Group) -> bool:
        """Return whether a group, with the states of its parameters, looks like this optimizer's."""
        keys = set(self.group.split())
        if not keys <= group.keys() or not (keys or states):
            return False
        if not all(state.keys() >= set(self.state.split()) for state in states):
            return False
        own_options = ours.keys() - find_rule(ours["rule"]).defaults().keys()
        return not self.alone or group.keys() <= keys | TORCH_KEYS | own_options | {"lr", "weight_decay"}

    def translated(self, theirs: Group, ours: Group) -> dict[str, Any]:
        """Return a group in this library's format, without the source's options that have no meaning here."""
        own = {*self.group.split(), "do_init"} - ours.keys()
        here = _without(theirs, own) | self.group_here(theirs)
        if momentum := [theirs[name] for name in ("momentum", "momentum_beta") if name in theirs]:
            here["momentum" if "momentum" in find_rule(ours["rule"]).hyper else "momentum_beta"] = momentum[0]
        return here


def recognize(group: Group, states: Sequence[State], ours: Group) -> Source | None:
    """Return the first source that matches a checkpoint's group, or None."""
    return next((source for source in SOURCES if source.matches(group, states, ours)), None)


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _sgd_sai_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    """Mark G as measured, unless it is 0 or not finite, with which the original never moves."""
    gsnr = torch.as_tensor(state["gsnr"]).detach().to("cpu", _precise(param).to_real())
    sound = bool(gsnr.isfinite() & (gsnr > 0))
    measured = torch.tensor(float(sound), dtype=torch.float32, device="cpu")
    return {**state, "gsnr": gsnr if sound else torch.zeros_like(gsnr), "measured": measured}


def _simba_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    """Rename the counters, which are floats if torch's load_state_dict has loaded them before."""
    counts, window = state["sign_counts"].detach(), group["window_size"]
    if counts.is_floating_point() and not torch.equal(counts, counts.round()):
        raise ValueError("its counters are not whole numbers")
    # Not max(|s|): abs() wraps for the lowest integer.
    if counts.numel() > 0 and max(float(counts.max()), -float(counts.min())) > window:
        raise ValueError(f"a counter is beyond its window of {window}")
    return {**_without(state, ["sign_counts"]), "counts": counts.to(group["counter_dtype"])}


def _torch_muon_group(theirs: Group) -> dict[str, Any]:
    """Translate the options but for eps, which guards a norm that cannot underflow here."""
    triple = tuple(float(number) for number in theirs["ns_coefficients"])
    return {
        "coefficients": "jordan" if triple == (3.4445, -4.7750, 2.0315) else [triple],
        "scale": theirs["adjust_lr_fn"] or "original",
    }


def _refused(reason: str) -> Callable[[Group], dict[str, Any]]:
    def refuse(theirs: Group) -> dict[str, Any]:
        raise ValueError(reason)

    return refuse


def _signum_group(theirs: Group) -> dict[str, Any]:
    """Refuse options that would change the step; the bias correction changes no sign."""
    for option in ("nesterov", "use_shape_scaling"):
        if theirs[option]:
            raise ValueError(f"it was made with {option}=True, which Signum here does not support")
    return {}


def _signum_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    return {**_without(state, ["step", "exp_avg"]), "momentum_buffer": state["exp_avg"]}


def _quad_torch_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    """Name the factors by their sides, with a scale of 1, since none is factored out there."""
    factors, bounds = list(state["Q"]), list(state["L"])
    if len(factors) not in (1, 2) or len(factors) != len(bounds):
        raise ValueError(f"it has {len(factors)} factors Q and {len(bounds)} bounds L")
    here: dict[str, Any] = {
        "momentum_buffer": state["momentum_buffer"],
        "step": torch.as_tensor(state["step"]).detach().to("cpu", torch.float64),
        "scale": torch.ones((), dtype=_precise(factors[0]), device=factors[0].device),
    }
    for side, q, bound in zip(
        ("",) if len(factors) == 1 else ("_left", "_right"), factors, bounds, strict=True
    ):
        if q.dim() < 2:
            q = q.reshape(-1).to(_precise(q))
        elif not torch.equal(q, q.mT):
            # Checkpoints do not name the rule, but QUAD's Q are bitwise symmetric.
            if group["rule"] == "quad":
                raise ValueError("a Q is not symmetric, so it is Procrustes' and not QUAD's")
            if not group["literal"]:
                raise ValueError("its P is Q Q, and here QᵀQ unless this optimizer is made with literal=True")
        here[f"Q{side}"] = q
        if q.dim() == 2 and group["update_probability"] < 1:
            here[f"P{side}"] = q @ q
        here[f"L{side}"] = torch.as_tensor(bound).detach().reshape(()).to(_precise(q))
    return here


_AVERAGED = "orthogonalized muon polargrad scion hyperball"

SOURCES: tuple[Source, ...] = (
    Source(
        "sgd_sai.SGD_sai",
        "momentum eps",
        "gsnr",
        "sgd_sai",
        peer="SGDSaI",
        alone=True,
        state_here=_sgd_sai_state,
    ),
    Source(
        "the original Simba",
        "window_size threshold",
        "sign_counts",
        "simba",
        peer="Simba",
        state_here=_simba_state,
    ),
    Source(
        "torch.optim.Muon",
        "ns_coefficients adjust_lr_fn eps",
        "momentum_buffer",
        "muon",
        peer="Muon",
        group_here=_torch_muon_group,
    ),
    Source(
        "quad_torch",
        "lr_style max_size_dense max_skew_dense preconditioner_lr noise_scale",
        "step momentum_buffer merged_shape Q L diag",
        "quad procrustes",
        state_here=_quad_torch_state,
    ),
    Source(
        "Emerging-Optimizers' Muown",
        state="momentum_buffer m_g v_g v_norm",
        rules=_AVERAGED,
        group_here=_refused("it trains directions and norms apart"),
    ),
    Source("Emerging-Optimizers", "momentum_beta", "momentum_buffer", _AVERAGED, alone=True),
    Source(
        "Emerging-Optimizers or Keller Jordan's Muon",
        "momentum",
        "momentum_buffer",
        _AVERAGED + " signum",
        alone=True,
    ),
    Source("Keller Jordan's MuonWithAuxAdam", "use_muon momentum", "momentum_buffer", "muon", alone=True),
    Source(
        "Keller Jordan's MuonWithAuxAdam", "use_muon betas eps", "exp_avg exp_avg_sq", "adamw", alone=True
    ),
    Source(
        "Emerging-Optimizers' Signum",
        "correct_bias nesterov use_shape_scaling",
        "exp_avg step",
        "signum",
        peer="Signum",
        group_here=_signum_group,
        state_here=_signum_state,
    ),
    # Listed so that errors can name them; some load because their names are the same here.
    Source("torch.optim.SGD", group="momentum dampening nesterov", peer="SGD"),
    Source("torch.optim.Adam or AdamW", group="betas eps amsgrad", peer="AdamW"),
    Source("torch.optim.NAdam", group="betas eps momentum_decay"),
    Source("torch.optim.Adamax", group="betas eps", state="exp_avg exp_inf"),
    Source(
        "torch.optim.RAdam",
        group="betas eps foreach differentiable",
        rules="adamw",
        group_here=_refused("its first steps have no second moment, and all are rescaled"),
    ),
    Source("torch.optim.Adagrad", group="lr_decay initial_accumulator_value"),
    Source("torch.optim.RMSprop", group="alpha centered momentum"),
    Source("torch.optim.Adadelta", group="rho eps"),
    Source("torch.optim.ASGD", group="lambd alpha t0"),
    Source("torch.optim.Rprop", group="etas step_sizes"),
    Source("torch.optim.Adafactor", group="beta2_decay"),
    Source("torch.optim.LBFGS", group="history_size line_search_fn"),
    Source("Emerging-Optimizers' PSGDPro", group="precond_lr min_precond_lr beta_lip"),
    Source("Emerging-Optimizers' AdaptiveMuon", group="lr momentum weight_decay beta2 eps"),
    Source("Emerging-Optimizers' SimplifiedAdEMAMix", group="betas eps num_beta_fast_warmup_steps"),
    Source("SOAP", group="precondition_frequency"),
    Source("Emerging-Optimizers' LaProp", group="betas eps correct_bias"),
    Source("an older Muon of Keller Jordan's", group="momentum nesterov ns_steps"),
    Source("bitsandbytes", state="state1"),
)
