"""The options every optimizer takes, with one meaning everywhere."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

import torch

from steepest.hyper import Hyper, choice, flag, floating_dtype, integer

__all__ = ["COMMON_OPTIONS", "CommonOptions", "Nonfinite", "Rounding", "WeightDecayMethod"]

WeightDecayMethod: TypeAlias = Literal["decoupled", "independent", "l2", "palm", "sign", "cautious"]
Rounding: TypeAlias = Literal["nearest", "stochastic"]
Nonfinite: TypeAlias = Literal["ignore", "skip", "raise"]


class CommonOptions(TypedDict, total=False):
    """Keyword-only options of every optimizer here; each may also be set per param group.

    - ``weight_decay_method``: how λ = ``weight_decay`` acts, η being the learning rate:

      - ``"decoupled"``: p ← p − η·λ·p
      - ``"independent"``: p ← p − λ·p·(η / η₀), η₀ the learning rate the group was made with
      - ``"l2"``: g ← g + λ·p, into a copy, never into ``p.grad``; what a rule measures over whole
        tensors (SGDSaI's scale, SimbaLeaky's rms) is that of the gradient alone
      - ``"palm"``: p ← p − λ·η²·p
      - ``"sign"``: p moves by η·λ toward 0 and stops there
      - ``"cautious"``: decoupled, only where direction·p ≥ 0
    - ``state_dtype``: dtype of momentum and kin; None means as the parameter. An average in bfloat16
      stops growing where its increments fall below half a unit in the last place: at 0.8 of the mean
      with β = 0.99, at a quarter with β = 0.999. Take float32 for slow averages such as AdamW's second.
    - ``rounding``: how a result is rounded into a bfloat16 or float16 parameter: to ``"nearest"``, or
      ``"stochastic"``, up or down with a probability that makes the expectation exact.
    - ``state_device``: None keeps state with its parameter. ``"cpu"`` keeps it in the host's memory and
      takes the step there, for parameters on an accelerator: an element or tensor rule computes on the
      CPU, with copies of parameter and gradient that come and go while it computes. Matrix rules refuse
      it: their products belong on the accelerator. A parameter on the CPU is stepped as ever.
    - ``nonfinite``: what an infinite or NaN gradient does: ``"ignore"`` computes with it, ``"skip"``
      leaves parameters, state and step counts as they were and counts in ``optimizer.skipped_steps``
      (no host sync on an accelerator), ``"raise"`` raises ``FloatingPointError`` with the parameter's
      name (this waits for the device).
    - ``maximize``: ascend instead of descend.
    - ``compile``: True and False are orders; None compiles where it pays: 2²² elements or more, and a
      compiler. What is compiled depends on the rule, its options and the dtypes, not on the model: the
      first step of a rule takes four to six seconds on a new machine, two from torch's cache.
      Matrix rules run eagerly in any case, since their time is in matmuls.
    - ``capturable``: keep step counts on the parameters' device, and make every number of a step there, so
      that the step can be captured in a CUDA graph and replayed (docs/cuda_graphs.md). Elsewhere it is
      slower.
    - ``seed``: key of the noise of stochastic rounding and stochastic rules. The noise is a function of
      (seed, step, element): it resumes exactly, and the global generator is never touched.
    """

    weight_decay_method: WeightDecayMethod
    state_dtype: torch.dtype | None
    state_device: Literal["cpu"] | None
    rounding: Rounding
    nonfinite: Nonfinite
    maximize: bool
    compile: bool | None
    capturable: bool
    seed: int


COMMON_OPTIONS: dict[str, Hyper] = {
    "weight_decay_method": choice("decoupled", "decoupled", "independent", "l2", "palm", "sign", "cautious"),
    "state_dtype": floating_dtype(),
    "state_device": choice(None, None, "cpu"),
    "rounding": choice("nearest", "nearest", "stochastic"),
    "nonfinite": choice("ignore", "ignore", "skip", "raise"),
    "maximize": flag(False),
    "compile": choice(None, None, True, False),
    "capturable": flag(False),
    "seed": integer(0, low=0, high=2**64 - 1),
}
