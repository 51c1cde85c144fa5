"""Train ternary and binary weights by votes: TernaryFlip."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest.compile.available import wants_compiling
from steepest.random import derive_key
from steepest.ternary.flipping import flip_layer
from steepest.ternary.layer import TernaryLinear
from steepest.ternary.options import OPTIONS, checked, threshold_at
from steepest.ternary.packing import count_zeros
from steepest.ternary.ranks import Group, all_reduce, rank_and_world_size
from steepest.ternary.stats import FlipStats, LayerStats
from steepest.ternary.vote_buffer import Outward, VoteBuffer, VoteKind, narrowest, noise_id
from steepest.ternary.votes import LARGEST_VOTE

__all__ = ["TernaryFlip", "ternary_layers"]


class TernaryFlip:
    r"""Train the ternary and binary weights of a model by votes, beside an optimizer for its parameters.

    In backward, every pass through a :class:`TernaryLinear` or :class:`BinaryLinear` votes on each of its
    weights T, by the gradient dT. At :meth:`step`, the sum v of the votes is added to a small integer
    accumulator a, and where that reaches the threshold the weight moves:

    .. math::
        v &= -\mathrm{sign}(dT) \quad\text{or}\quad
            v = -\mathrm{round}_s\bigl(\mathrm{clip}(dT/\mathrm{rms}(dT), -7, 7)\bigr) \\
        a &\leftarrow \mathrm{clamp}(a + v, -M, M) \\
        |a| \ge \tau_t:\quad T &\leftarrow \mathrm{clamp}(T + \mathrm{sign}(a), -1, 1)
            \quad\text{(binary: } T \leftarrow \mathrm{sign}(a)\text{)}, \quad a \leftarrow 0

    M is 127 or 32767. rms(dT) is the layer's, so that neither kind of vote depends on the scale of the
    loss. round_s rounds up or down at random with the exact expectation, by noise keyed by (seed, layer,
    step, pass, weight): it resumes exactly, and the global generator is never used. Elements of dT
    that are not finite do not vote; by magnitude, their whole layer does not vote in that pass.

    Call :meth:`step` and :meth:`zero_grad` beside the optimizer's; or let :func:`steepest.build` make one
    optimizer that does both.

    State: a, 1 byte a weight (int8) or 2 (int16): with the packed weights 1.25 or 2.25 bytes (ternary),
    1.125 or 2.125 (binary). Between backward and step the votes take 1 byte more, where a gradient would
    take 4; more than 127 passes by sign in a step, or 18 by magnitude, over all ranks, take 2.

    Args:
        model: has at least one :class:`TernaryLinear` or :class:`BinaryLinear`. A layer belongs to the last
            trainer made for it. One whose ``trainable`` is False stays as it is; it keeps its accumulator,
            so that it can be unfrozen.
        threshold: τ > 0, at most M. Votes by magnitude are larger, so τ should be too.
        votes: ``"sign"`` or ``"magnitude"``.
        accumulator: ``torch.int8`` or ``torch.int16``.
        schedule: τ_t after t steps: ``"constant"``, τ; ``"annealed"``, τ/(1 − t/total_steps)^power,
            under which flips cease: none happens once τ_t is above M, with int8 and τ = 16 in the last
            13 % of the steps; or a function of t, which checkpoints do not hold.
        total_steps: T of the annealed schedule.
        power: of the annealed schedule. 1 doubles τ by the middle of the training, which is early where
            training is short; a smaller one leaves more flips to the later steps.
        outward: what becomes of votes that would move a weight beyond its bound (for binary weights: votes
            for the sign that they have). ``"drop"``: they do not count. ``"cancel"``: they cancel inward
            votes, as far as there are any, so that a weight leaves its bound by majority and not by noise.
        zero_pull: λ in [0, 1]: in every step each weight gets one vote toward 0 with this probability.
            For models without binary weights only.
        max_flip_fraction: at most this fraction of a layer flips in a step: the largest \|a\| first, ties
            at random. Above 0 it is one weight at least; below 1 every step costs a host sync.
        nonfinite: what an infinite or NaN dT does: ``"ignore"``: as above. ``"skip"``: weights, a and
            step stay as they were, the votes are dropped, and :attr:`skipped_steps` counts. ``"raise"``:
            ``FloatingPointError`` with the layer's name; nothing changes. The last two cost a host sync.
        compile: run flips, and the rounding of votes by magnitude, compiled: one graph for all layers. None:
            from 2**22 weights on, where there is a compiler; True warns if there is none.
        seed: of the noise, which is also keyed by the layers' names: two trainers of one seed draw the
            same for layers of one name.
        process_group: the data-parallel ranks. Their votes are summed before they are added to a, as int8
            where the sum fits, so that N ranks do exactly what one process does with N times the passes.
            None: all processes, where ``torch.distributed`` is initialized; False: this one alone.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no ternary or binary layers; one on the meta device; a value out of range;
            ``"annealed"`` without ``total_steps``; ``zero_pull`` with a binary layer.

    Source: our own. Kin: Helwegen et al. 2019 (Bop) flips binary weights where an average of the gradient
    passes a threshold.

    >>> model = nn.Sequential(TernaryLinear(8, 16), nn.ReLU(), TernaryLinear(16, 2))
    >>> flip = TernaryFlip(model, threshold=2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> for _ in range(3):
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     for each in (optimizer, flip):
    ...         each.step()
    ...         each.zero_grad()
    >>> stats = flip.stats()
    >>> stats.step, stats.weights, stats.flips > 0, flip.state_bytes()
    (3, 160, True, 168)
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 24.0,
        votes: VoteKind = "sign",
        *,
        accumulator: torch.dtype = torch.int8,
        schedule: Literal["constant", "annealed"] | Callable[[int], float] = "constant",
        total_steps: int | None = None,
        power: float = 1.0,
        outward: Outward = "cancel",
        zero_pull: float = 0.0,
        max_flip_fraction: float = 1.0,
        nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
        compile: bool | None = None,
        seed: int = 0,
        process_group: Group = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"TernaryFlip takes a torch.nn.Module, got {type(model).__name__}")
        self._custom = schedule if callable(schedule) else None
        #: The options, by name. They may be changed between steps and are checked before use.
        self.options = checked(
            "TernaryFlip",
            {
                "threshold": threshold,
                "votes": votes,
                "accumulator": accumulator,
                "schedule": "custom" if callable(schedule) else schedule,
                "total_steps": total_steps,
                "power": power,
                "outward": outward,
                "zero_pull": zero_pull,
                "max_flip_fraction": max_flip_fraction,
                "nonfinite": nonfinite,
                "compile": compile,
                "seed": seed,
            },
        )
        self.layers = ternary_layers(model)
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no ternary layers: steepest.ternary.ternarize(model) makes some"
            )
        self._check_pull(self.options)
        for name, layer in self.layers.items():
            if layer.packed.is_meta:
                raise ValueError(f"layer {name!r} is on the meta device: materialize the model first")
        self.process_group = process_group
        self.skipped_steps = 0
        #: Steps taken, 0-dim int64 on the CPU.
        self.taken = torch.zeros((), dtype=torch.int64, device="cpu")
        #: a of every layer, by its name.
        self.accumulators = {
            name: torch.zeros(
                layer.out_features, layer.in_features, dtype=accumulator, device=layer.packed.device
            )
            for name, layer in self.layers.items()
        }
        self._next_threshold = math.inf
        # The largest possible sum of a weight's votes over all ranks.
        self._largest: dict[str, int] = {}
        self._flips: dict[str, Tensor] = {}
        self._total_flips: dict[str, Tensor] = {}
        self._vote_buffers: dict[str, VoteBuffer] = {}
        self._attach()

    # -- the step

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self) -> None:
        """Count the votes and flip; layers without votes stay as they are.

        Raises:
            FloatingPointError: a gradient that was not finite, with ``nonfinite="raise"``.
            RuntimeError: a layer has gone to another trainer.
            TypeError, ValueError: :attr:`options` were changed to invalid values, or the schedule returned
                no threshold. In all cases nothing was changed.
        """
        if self.prepare():
            self.take()
        else:
            self.skipped_steps += 1

    @torch.no_grad()
    def prepare(self, finite: bool = True) -> bool:
        """Decide whether to take the step, the same on all ranks; if not, drop the votes.

        Nothing else changes: after an error the step may be tried again.

        Args:
            finite: False if this rank has to skip the step for another reason than its votes.
        """
        self.check_owner()
        self._check_options()
        # Called once a step, before anything moves: a schedule given as a function may count or raise.
        self._next_threshold = self._threshold()
        nonfinite = self.options["nonfinite"]
        buffers = self._vote_buffers
        checks = nonfinite != "ignore"
        bad = [name for name, b in buffers.items() if checks and b.finite is not None and not b.finite]
        # The largest sum rather than the number of passes: a rank without votes does not know their kind.
        rows = [[b.passes * LARGEST_VOTE[b.kind], name in bad] for name, b in buffers.items()]
        if self._world_size() > 1:
            device = next(iter(self.layers.values())).packed.device
            table = torch.tensor([*rows, [0, not finite]], dtype=torch.int64, device=device)
            *rows, (_, unfit) = all_reduce(self.process_group, table).tolist()
            finite = unfit == 0
        self._largest = {name: largest for name, (largest, _) in zip(buffers, rows, strict=True)}
        bad = [name for name, (_, wrong) in zip(buffers, rows, strict=True) if wrong]
        if bad and nonfinite == "raise":
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise FloatingPointError(
                f"the gradient of ternary layer {bad[0]!r}{more} has infinite or NaN elements; nothing was "
                "changed. Use nonfinite='skip' to skip such steps."
            )
        if bad or not finite:
            self.zero_grad()
            return False
        return True

    @torch.no_grad()
    def take(self) -> None:
        """Sum the ranks' votes and flip, layer by layer, after :meth:`prepare` returned True."""
        limit = torch.iinfo(self.options["accumulator"]).max
        threshold = self._next_threshold
        step = int(self.taken)
        self._flips = {}
        for name, layer in self.layers.items():
            vote_buffer = self._vote_buffers[name]
            votes = self._votes(name)
            # Frees memory for the next layer; and if a later layer fails, these votes are not counted twice.
            vote_buffer.clear()
            if votes is None or not layer.trainable:
                continue
            flips = flip_layer(
                layer.packed,
                self._accumulator(name),
                votes,
                bits=layer.bits,
                threshold=limit + 1 if threshold > limit else math.ceil(threshold),
                outward=self.options["outward"],
                zero_pull=self.options["zero_pull"],
                at_most=self._at_most(layer),
                key=derive_key(self.options["seed"], vote_buffer.noise_id, step),
                compiled=vote_buffer.is_compiled(layer.packed.device),
            )
            self._flips[name] = flips
            self._total_flips[name] = self._total_flips.get(name, 0) + flips
        self.taken += 1
        self.zero_grad()

    def _votes(self, name: str) -> Tensor | None:
        """Sum all ranks' votes for a layer, with room for a pull toward zero; None if nobody voted."""
        vote_buffer, layer, largest = self._vote_buffers[name], self.layers[name], self._largest[name]
        if largest == 0:
            return None
        dtype = narrowest(largest + (self.options["zero_pull"] > 0))
        mine = vote_buffer.pending
        if mine is None:
            shape = (layer.out_features, layer.in_features)
            mine = torch.zeros(shape, dtype=dtype, device=layer.packed.device)
        mine = mine.to(layer.packed.device, dtype)
        return all_reduce(self.process_group, mine) if self._world_size() > 1 else mine

    def check_owner(self) -> None:
        """Raise ``RuntimeError`` if a layer has gone to another trainer."""
        for name, layer in self.layers.items():
            if not layer.votes_in(self._vote_buffers[name]):
                raise RuntimeError(
                    f"the ternary layer {name!r} belongs to another TernaryFlip, made later for its model; "
                    "nothing was changed"
                )

    def _check_options(self) -> None:
        """Raise if options were changed to invalid values since the last step."""
        options = checked("TernaryFlip", self.options)
        self._check_pull(options)
        saved = next(iter(self.accumulators.values())).dtype
        if options["accumulator"] != saved:
            raise ValueError(
                f"TernaryFlip: accumulator was {saved} when the accumulators were made and cannot become "
                f"{options['accumulator']}; nothing was changed"
            )
        if options["schedule"] == "custom" and self._custom is None:
            raise ValueError("TernaryFlip: schedule='custom' needs the function: make it with schedule=...")

    def _check_pull(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for a pull toward zero of weights that are never 0."""
        binary = next((name for name, layer in self.layers.items() if layer.bits == 1), None)
        if options["zero_pull"] > 0 and binary is not None:
            raise ValueError(
                f"TernaryFlip: zero_pull is for ternary weights, and layer {binary!r} is binary; make a "
                "TernaryFlip of its own for the ternary part of the model"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop votes that no step has counted. The argument is ignored, and there for uniform callers."""
        for vote_buffer in self._vote_buffers.values():
            vote_buffer.clear()
            vote_buffer.step = int(self.taken)

    @property
    def has_votes(self) -> bool:
        """Whether any layer of any rank may have votes for the next step."""
        return self._world_size() > 1 or any(b.passes > 0 for b in self._vote_buffers.values())

    @property
    def unused(self) -> bool:
        """Whether no step has been taken and, as :meth:`prepare` found out, no rank has voted."""
        return int(self.taken) == 0 and not any(self._largest.values())

    # -- what the user watches

    def threshold(self) -> float:
        """Return τ of the next step."""
        return self._threshold()

    @torch.no_grad()
    def stats(self) -> FlipStats:
        """Return flips of the last step and the fraction of zeros, in all and by layer; a host sync."""
        names = list(self.layers)
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        counts = [
            torch.stack(
                [
                    self._flips.get(name, zero).to(layer.packed.device),
                    self._total_flips.get(name, zero).to(layer.packed.device),
                    count_zeros(layer.packed, layer.in_features, layer.bits),
                ]
            )
            for name, layer in self.layers.items()
        ]
        table = torch.stack([each.to(counts[0].device) for each in counts]).tolist()
        sizes = [layer.in_features * layer.out_features for layer in self.layers.values()]
        layers = tuple(
            LayerStats(name, size, flips, zeros / size)
            for name, size, (flips, _, zeros) in zip(names, sizes, table, strict=True)
        )
        flips, total, zeros = (sum(column) for column in zip(*table, strict=True))
        return FlipStats(
            step=int(self.taken),
            threshold=self._threshold(),
            weights=sum(sizes),
            flips=flips,
            total_flips=total,
            zeros=zeros / sum(sizes),
            layers=layers,
        )

    def state_bytes(self) -> int:
        """Count the bytes of accumulators and step count; votes are not state."""
        return sum(a.numel() * a.element_size() for a in (*self.accumulators.values(), self.taken))

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return steps, options and accumulators; T is in the model's. A schedule's function is not saved."""
        return {
            "step": int(self.taken),
            "options": dict(self.options),
            "accumulators": dict(self.accumulators),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; tensors are copied, votes of an unfinished step dropped.

        Raises:
            ValueError: other layers or shapes than this trainer's, options that it cannot use, or a missing
                entry; nothing was loaded.
            RuntimeError: a layer has gone to another trainer; nothing was loaded.
        """
        self.check_owner()
        for key in ("step", "options", "accumulators"):
            if key not in state_dict:
                raise ValueError(f"the state dict of TernaryFlip has no {key!r}; nothing was loaded")
        options = self.check_options(state_dict["options"])
        saved = state_dict["accumulators"]
        if not isinstance(saved, Mapping):
            raise ValueError(
                f"the state dict's accumulators of TernaryFlip are a {type(saved).__name__}, not a dict; "
                "nothing was loaded"
            )
        if strange := sorted(map(str, saved.keys() ^ self.layers.keys())):
            raise ValueError(
                f"the state dict was saved for other ternary layers: {', '.join(map(repr, strange[:3]))}; "
                "nothing was loaded"
            )
        for name in self.layers:
            self.check_accumulator(name, saved[name], options)
        step = self.check_step(state_dict["step"])
        self.restore({name: saved[name].clone() for name in saved}, step, options)

    def check_options(self, saved: Any) -> dict[str, Any]:
        """Check loaded options; raise ``ValueError`` if they are invalid or this trainer cannot use them."""
        if not isinstance(saved, Mapping):
            raise ValueError(
                f"the state dict's options of TernaryFlip are a {type(saved).__name__}, not a dict; nothing "
                "was loaded"
            )
        missing = [name for name in OPTIONS if name not in saved]
        if missing:
            raise ValueError(
                f"the state dict's options of TernaryFlip have no {missing[0]!r}; nothing was loaded"
            )
        try:
            options = checked("the state dict's TernaryFlip", saved)
            self._check_pull(options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}; nothing was loaded") from None
        if options["schedule"] == "custom" and self._custom is None:
            raise ValueError(
                "the state dict was saved with a schedule given as a function, which it does not hold: make "
                "the TernaryFlip with schedule=...; nothing was loaded"
            )
        return options

    def check_step(self, saved: Any) -> int:
        """Check a loaded step count; raise ``ValueError`` if it is invalid."""
        whole = isinstance(saved, int) or (isinstance(saved, Tensor) and saved.numel() == 1)
        if not whole or isinstance(saved, bool) or saved != int(saved) or saved < 0:
            raise ValueError(
                f"the state dict's step must be an integer ≥ 0, got {saved!r}; nothing was loaded"
            )
        return int(saved)

    def check_accumulator(self, name: str, saved: Any, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless a loaded accumulator fits its layer."""
        layer = self.layers[name]
        if not isinstance(saved, Tensor):
            raise ValueError(
                f"the accumulator of ternary layer {name!r} in the state dict is a {type(saved).__name__}, "
                "not a tensor; nothing was loaded"
            )
        shape = (layer.out_features, layer.in_features)
        if tuple(saved.shape) != shape or saved.dtype != options["accumulator"]:
            raise ValueError(
                f"the accumulator of ternary layer {name!r} is {saved.dtype} of shape {tuple(saved.shape)} "
                f"in the state dict, expected {options['accumulator']} of shape {shape}; nothing was loaded"
            )

    def restore(self, accumulators: dict[str, Tensor], step: int, options: dict[str, Any]) -> None:
        """Continue from checked values, which become this trainer's own."""
        self.options = options
        # Contiguous, since counters are read as words where they lie in memory.
        self.accumulators = {
            name: accumulators[name].to(layer.packed.device).contiguous()
            for name, layer in self.layers.items()
        }
        self.taken.fill_(step)
        self._flips, self._total_flips = {}, {}
        self._attach()

    # -- internals

    def _world_size(self) -> int:
        return rank_and_world_size(self.process_group)[1]

    def _threshold(self) -> float:
        return threshold_at(self.options, self._custom, int(self.taken))

    def _at_most(self, layer: TernaryLinear) -> int | None:
        """Return how many weights of a layer may flip in a step; None for no limit."""
        fraction: float = self.options["max_flip_fraction"]
        if fraction == 1:
            return None
        # At least one, or a small layer would never move.
        return max(int(fraction * layer.in_features * layer.out_features), 1) if fraction > 0 else 0

    def _accumulator(self, name: str) -> Tensor:
        """Return a layer's accumulator, moved to where its weights are now."""
        device = self.layers[name].packed.device
        if self.accumulators[name].device != device:
            self.accumulators[name] = self.accumulators[name].to(device)
        return self.accumulators[name]

    def _attach(self) -> None:
        """Give every layer a new vote buffer, by the present options."""
        total = sum(layer.in_features * layer.out_features for layer in self.layers.values())
        # Warns now if there is no compiler.
        wants_compiling(self.options["compile"], total, next(iter(self.layers.values())).packed.device)
        for name, layer in self.layers.items():
            self._vote_buffers[name] = VoteBuffer(
                self.options,
                noise_id(name),
                weights=total,
                step=int(self.taken),
                group=self.process_group,
            )
            layer.attach(self._vote_buffers[name])

    def __getstate__(self) -> dict[str, Any]:
        """Copy the votes, not the buffers that hold them. Process groups cannot be copied."""
        votes = {name: (b.pending, b.passes, b.finite) for name, b in self._vote_buffers.items()}
        group = False if self.process_group is False else None
        return {**self.__dict__, "_vote_buffers": votes, "process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        votes = state["_vote_buffers"]
        self.__dict__.update(state)
        self._vote_buffers = {}
        self._attach()
        for name, (pending, passes, finite) in votes.items():
            buffer = self._vote_buffers[name]
            buffer.pending, buffer.passes, buffer.finite = pending, passes, finite


def ternary_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    """Find a model's ternary and binary layers, by their names without torch.compile's and DDP's prefixes."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            break
        model = inner
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, TernaryLinear)
    }
