"""Checkpoints of other optimizers: recognize whose they are, and translate state that means the same here.

The table is :data:`SOURCES`. An entry names the keys by which a checkpoint is recognized, the rules that can
go on from it, and two pure functions that put its groups and its state into this library's words. An entry
without rules only gives a refusal its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.rule import Group, find_rule

__all__ = ["SOURCES", "TORCH_KEYS", "Source", "recognize"]

State = Mapping[str, Any]

# Group keys of torch's own optimizers and schedulers that are no hyper-parameters of a rule.
TORCH_KEYS = frozenset(
    {
        "capturable",
        "decoupled_weight_decay",
        "differentiable",
        "foreach",
        "fused",
        "initial_lr",
        "max_lr",
        "max_momentum",
        "base_momentum",
        "min_lr",
        "param_names",
        "params",
    }
)


def _same_group(theirs: Group, ours: Group) -> dict[str, Any]:
    return dict(theirs)


def _same_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    return dict(state)


@dataclass(frozen=True)
class Source:
    """An optimizer elsewhere whose checkpoints are recognized.

    Args:
        name: the optimizer's name, for messages.
        group: keys that its param groups have.
        state: keys that the state of each of its parameters has.
        alone: whether its groups have no keys besides these, torch's, and a subclass's own options.
        rules: rules here for which the state means the same.
        group_here: (its group, the group here) -> its group in this library's words.
        state_here: (its state, the parameter, the group that will be loaded) -> the rule's state. Raises
            ``ValueError`` with a reason where this state cannot mean the same.
    """

    name: str
    group: frozenset[str] = frozenset()
    state: frozenset[str] = frozenset()
    alone: bool = False
    rules: frozenset[str] = frozenset()
    group_here: Callable[[Group, Group], dict[str, Any]] = _same_group
    state_here: Callable[[State, Tensor, Group], dict[str, Any]] = _same_state

    def matches(self, group: Group, states: Sequence[State], ours: Group) -> bool:
        """Whether a group, with the states of its parameters, looks like this optimizer's."""
        if not self.group <= group.keys() or not (self.group or states):
            return False
        if not all(self.state <= state.keys() for state in states):
            return False
        if not self.alone:
            return True
        own_options = ours.keys() - find_rule(ours["rule"]).defaults().keys()
        return group.keys() <= self.group | TORCH_KEYS | own_options


def recognize(group: Group, states: Sequence[State], ours: Group) -> Source | None:
    """Return the first source that a group of a checkpoint looks like; None if it looks like none.

    >>> muon = torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))])
    >>> recognize(muon.param_groups[0], [], {"rule": "lion"}).name
    'torch.optim.Muon'
    """
    return next((source for source in SOURCES if source.matches(group, states, ours)), None)


def _without(group: Group, *names: str) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in names}


def _renamed(values: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in values.items()}


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# -- sgd_sai


def _sgd_sai_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    """Say that G was measured. With one that is 0 or not finite the original never moves: measure it anew."""
    gsnr = torch.as_tensor(state["gsnr"]).detach().to("cpu", _precise(param).to_real())
    sound = bool(gsnr.isfinite() & (gsnr > 0))
    measured = torch.tensor(float(sound), dtype=torch.float32, device="cpu")
    return {**state, "gsnr": gsnr if sound else torch.zeros_like(gsnr), "measured": measured}


# -- Simba


def _simba_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    """Rename the counters. In a run that was resumed there, torch's load_state_dict made floats of them."""
    counts, window = state["sign_counts"].detach(), group["window_size"]
    if counts.is_floating_point() and not torch.equal(counts, counts.round()):
        raise ValueError("its counters are not whole numbers")
    # Not the maximum of |s|, which wraps for the lowest integer.
    if counts.numel() > 0 and max(float(counts.max()), -float(counts.min())) > window:
        raise ValueError(f"a counter is beyond its window of {window}")
    return {**_without(state, "sign_counts"), "counts": counts.to(group["counter_dtype"])}


# -- Muon and the orthogonalized family

_JORDAN = (3.4445, -4.7750, 2.0315)


def _torch_muon_group(theirs: Group, ours: Group) -> dict[str, Any]:
    """Rename the options; leave out eps, since the norm that it keeps from 0 does not underflow here."""
    triple = tuple(float(number) for number in theirs["ns_coefficients"])
    return _without(theirs, "ns_coefficients", "eps", "adjust_lr_fn") | {
        "coefficients": "jordan" if triple == _JORDAN else [triple],
        "scale": theirs["adjust_lr_fn"] or "original",
    }


def _family_group(theirs: Group, ours: Group) -> dict[str, Any]:
    """Call the momentum by the name that the rule here has for it."""
    ours_name = "momentum_beta" if "momentum_beta" in find_rule(ours["rule"]).hyper else "momentum"
    theirs_name = "momentum_beta" if "momentum_beta" in theirs else "momentum"
    return _renamed(_without(theirs, "use_muon"), theirs_name, ours_name)


def _without_use_muon(theirs: Group, ours: Group) -> dict[str, Any]:
    return _without(theirs, "use_muon")


# -- Signum


def _signum_group(theirs: Group, ours: Group) -> dict[str, Any]:
    """Leave out the bias correction, which changes no sign; refuse what would change the step."""
    for option in ("nesterov", "use_shape_scaling"):
        if theirs[option]:
            raise ValueError(f"it was made with {option}=True, which Signum here does not have")
    return _without(theirs, "correct_bias", "nesterov", "use_shape_scaling")


def _signum_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    return _renamed(_without(state, "step"), "exp_avg", "momentum_buffer")


# -- PSGD


def _quad_torch_group(theirs: Group, ours: Group) -> dict[str, Any]:
    return _without(theirs, "do_init")


def _quad_torch_state(state: State, param: Tensor, group: Group) -> dict[str, Any]:
    """Name the factors by their sides; they are whole there, so that with a scale of 1 P is the same."""
    factors, bounds = list(state["Q"]), list(state["L"])
    if len(factors) not in (1, 2) or len(factors) != len(bounds):
        raise ValueError(f"it has {len(factors)} factors Q and {len(bounds)} bounds L")
    here: dict[str, Any] = {
        "momentum_buffer": state["momentum_buffer"],
        "step": torch.as_tensor(state["step"]).detach().to("cpu", torch.float32),
        "scale": torch.ones((), dtype=_precise(factors[0]), device=factors[0].device),
    }
    for side, q, bound in zip(
        ("",) if len(factors) == 1 else ("_left", "_right"), factors, bounds, strict=True
    ):
        if q.dim() < 2:
            q = q.reshape(-1).to(_precise(q))
        elif not torch.equal(q, q.mT):
            _check_asymmetric(group)
        here[f"Q{side}"] = q
        if q.dim() == 2 and group["update_probability"] < 1:
            here[f"P{side}"] = q @ q
        here[f"L{side}"] = torch.as_tensor(bound).detach().reshape(()).to(_precise(q))
    return here


def _check_asymmetric(group: Group) -> None:
    """Refuse a Q of Procrustes' where P would be made of it in another way than there.

    A checkpoint does not say whether it is QUAD's, whose Q are symmetric to the bit.
    """
    if group["rule"] == "quad":
        raise ValueError("a Q is not symmetric, so it is Procrustes' and not QUAD's")
    if not group["literal"]:
        raise ValueError("its P is Q Q, and here QᵀQ unless this optimizer is made with literal=True")


def _keys(words: str) -> frozenset[str]:
    return frozenset(words.split())


_AVERAGED = _keys("orthogonalized muon polargrad scion hyperball")

SOURCES: tuple[Source, ...] = (
    Source(
        "sgd_sai.SGD_sai",
        group=_keys("lr momentum eps weight_decay"),
        state=_keys("gsnr"),
        alone=True,
        rules=_keys("sgd_sai"),
        state_here=_sgd_sai_state,
    ),
    Source(
        "the original Simba",
        group=_keys("lr window_size threshold weight_decay"),
        state=_keys("sign_counts"),
        rules=_keys("simba"),
        state_here=_simba_state,
    ),
    Source(
        "torch.optim.Muon",
        group=_keys("lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn"),
        state=_keys("momentum_buffer"),
        rules=_keys("muon"),
        group_here=_torch_muon_group,
    ),
    Source(
        "quad_torch",
        group=_keys("lr lr_style max_size_dense max_skew_dense preconditioner_lr noise_scale"),
        state=_keys("step momentum_buffer merged_shape Q L diag"),
        rules=_keys("quad procrustes"),
        group_here=_quad_torch_group,
        state_here=_quad_torch_state,
    ),
    Source(
        "Emerging-Optimizers, with momentum_beta",
        group=_keys("lr momentum_beta weight_decay"),
        state=_keys("momentum_buffer"),
        alone=True,
        rules=_AVERAGED,
        group_here=_family_group,
    ),
    Source(
        "Emerging-Optimizers or Keller Jordan's Muon",
        group=_keys("lr momentum weight_decay"),
        state=_keys("momentum_buffer"),
        alone=True,
        rules=_AVERAGED | {"signum"},
        group_here=_family_group,
    ),
    Source(
        "Keller Jordan's MuonWithAuxAdam",
        group=_keys("use_muon lr momentum weight_decay"),
        state=_keys("momentum_buffer"),
        alone=True,
        rules=_keys("muon"),
        group_here=_family_group,
    ),
    Source(
        "Keller Jordan's MuonWithAuxAdam",
        group=_keys("use_muon lr betas eps weight_decay"),
        state=_keys("exp_avg exp_avg_sq step"),
        alone=True,
        rules=_keys("adamw"),
        group_here=_without_use_muon,
    ),
    Source(
        "Emerging-Optimizers' Signum",
        group=_keys("lr momentum weight_decay correct_bias nesterov use_shape_scaling"),
        state=_keys("exp_avg step"),
        rules=_keys("signum"),
        group_here=_signum_group,
        state_here=_signum_state,
    ),
    # Recognized so that a refusal can name them, or read by their own names, which are the same here.
    Source("torch.optim.SGD", group=_keys("momentum dampening nesterov")),
    Source("torch.optim.Adam or AdamW", group=_keys("betas eps amsgrad")),
    Source("torch.optim.NAdam", group=_keys("betas eps momentum_decay")),
    Source("torch.optim.Adagrad", group=_keys("lr_decay initial_accumulator_value")),
    Source("torch.optim.RMSprop", group=_keys("alpha centered momentum")),
    Source("torch.optim.Adadelta", group=_keys("rho eps")),
    Source("torch.optim.Adamax", group=_keys("betas eps"), state=_keys("exp_avg exp_inf")),
    Source("torch.optim.ASGD", group=_keys("lambd alpha t0")),
    Source("torch.optim.Rprop", group=_keys("etas step_sizes")),
    Source("torch.optim.Adafactor", group=_keys("beta2_decay")),
    Source("torch.optim.LBFGS", group=_keys("history_size line_search_fn")),
    Source("Emerging-Optimizers' PSGDPro", group=_keys("precond_lr min_precond_lr beta_lip")),
    Source("Emerging-Optimizers' AdaptiveMuon", group=_keys("lr momentum weight_decay beta2 eps")),
    Source("Emerging-Optimizers' Muown", state=_keys("momentum_buffer m_g v_g v_norm")),
    Source("Emerging-Optimizers' SimplifiedAdEMAMix", group=_keys("betas eps num_beta_fast_warmup_steps")),
    Source("SOAP", group=_keys("precondition_frequency")),
    Source("Emerging-Optimizers' LaProp", group=_keys("betas eps correct_bias")),
    Source("an older Muon of Keller Jordan's", group=_keys("momentum nesterov ns_steps")),
    Source("bitsandbytes", state=_keys("state1")),
)
