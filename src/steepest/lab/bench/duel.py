"""One family on one model's tensors: contestants made, looked into, timed in turns, and written down."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch.optim import Optimizer

from ..clock import now
from ..footprint import state_bytes
from .entry import GRAPH, Entry, Scope
from .families import Family
from .limits import AXPY, COPY, axpy, axpy_bytes, copy, copy_bytes, least_bytes
from .material import Material
from .observe import Observed, capture, captured, observe
from .products import Product, flops_of
from .results import Row
from .room import need, packed, planned_state_bytes
from .section import Setting
from .shapes import ShapeList, Tensor
from .turns import Times, Turn, reason, take_turns

# Some measure in their first step and move only in the second.
_FIRST_STEPS = 2
# And by then they have measured all, so that a graph may repeat what they do.
_STEPS_TO_CAPTURE = 5


class NoStep(Exception):
    """What it calls a step is none."""


class EagerOnly(Exception):
    """It was told to compile and did not."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer that has taken its first steps; `act` is one more, as its entry says.

    Whether it `repeats`: its steps leave the gradients, so that the next may follow at once.
    """

    entry: Entry
    optimizer: Optimizer
    act: Callable[[], object]
    repeats: bool
    observed: Observed
    scope: Scope

    @property
    def products(self) -> dict[Product, int]:
        """The matrix products that limit its step."""
        return self.observed.products


def duel(
    family: Family,
    shapes: ShapeList,
    setting: Setting,
    tick: Callable[[float], None] = lambda share: None,
    *,
    untimed: str = "",
) -> list[Row]:
    """A row for every entry of the family, measured or not, and one for axpy; the first pack's.

    With ``untimed``, which says why, nothing is measured and all is planned.
    """
    tensors = family.tensors(shapes, setting.blocks)
    material_bytes = 2 * setting.dtype.itemsize * sum(tensor.numel for tensor in tensors)
    needs = {entry.key: need(entry, tensors, setting.dtype) for entry in family.entries}
    packs, left = packed(family.entries, needs, setting.memory - material_bytes)
    if untimed:
        packs, left = [], list(family.entries)
    rows: list[Row] = []
    if packs:
        material = Material.of(tensors, setting.device, setting.dtype)
        for number, pack in enumerate(packs):
            known = {row["key"] for row in rows}
            found = _measured(family, pack, tensors, material, setting, _part(tick, number, len(packs)))
            rows += [row for row in found if row["key"] not in known]
    for entry in left:
        short = material_bytes + needs[entry.key]
        planned = planned_state_bytes(entry, tensors, setting.dtype) if entry.ours else None
        said = f"needs {short / 2**30:.1f} GiB, the limit is {setting.memory / 2**30:.1f} GiB"
        rows.append({**_named(entry), "status": "planned", "reason": untimed or said, "state_bytes": planned})
    count = sum(tensor.numel for tensor in tensors)
    common = {
        "model": shapes.name,
        "family": family.name,
        "scope": family.scope,
        "tensors": len(tensors),
        "parameters": count,
    }
    return [{**common, **row, **_per_parameter(row, count)} for row in rows]


def _part(tick: Callable[[float], None], number: int, packs: int) -> Callable[[float], None]:
    return lambda share: tick((number + share) / packs)


def _named(entry: Entry) -> Row:
    return {"key": entry.key, "label": entry.label, "source": entry.source, "how": entry.how, "reason": ""}


def _per_parameter(row: Row, count: int) -> Row:
    state, temporary = row.get("state_bytes"), row.get("least_bytes")
    return {
        "state_per_parameter": None if state is None else state / count,
        "least_per_parameter": None if temporary is None else temporary / count,
    }


def _measured(
    family: Family,
    pack: Sequence[Entry],
    tensors: Sequence[Tensor],
    material: Material,
    setting: Setting,
    tick: Callable[[float], None],
) -> list[Row]:
    device = setting.device
    contestants: list[Contestant] = []
    rows: list[Row] = []
    for entry in pack:
        try:
            contestants.append(_prepared(entry, family, material, device))
        except Exception as error:
            rows.append(_missing(entry, error))
    rehearsals = {
        product: product.rehearse(device)
        for product in dict.fromkeys(p for one in contestants for p in one.products)
    }
    queued = device.type != "cpu"
    turns = [Turn(AXPY, lambda: axpy(material), queued=queued)]
    if family.scope == "element":
        turns.append(Turn(COPY, lambda: copy(material), queued=queued))
    turns += [Turn(str(product), act, queued=queued) for product, act in rehearsals.items()]
    turns += [
        Turn(one.entry.key, one.act, material.lend_gradients, queued=queued and one.repeats)
        for one in contestants
    ]
    if contestants:
        total = setting.rounds + 2
        times = take_turns(turns, setting.rounds, lambda: now(device), lambda done: tick(done / total))
        rows = [_axpy_row(times, material), *_rows(contestants, times, material, setting), *rows]
    for one in contestants:
        if device.type == "cuda":
            row = next(row for row in rows if row["key"] == one.entry.key)
            # Of ours another row is the graph.
            row["graph"] = "" if one.entry.ours else capture(_whole(one, material), device)
    return rows


def _whole(one: Contestant, material: Material) -> Callable[[], object]:
    """A step with its gradients: of one that takes them away, the next would do nothing, in a graph too."""

    def step() -> None:
        material.lend_gradients()
        one.optimizer.step()

    return step


def _missing(entry: Entry, error: Exception) -> Row:
    status, why = "failed", reason(error)
    if isinstance(error, ModuleNotFoundError):
        status, why = "not installed", f"{error.name} is not installed"
    elif isinstance(error, EagerOnly):
        status, why = "eager only", str(error)
    return {**_named(entry), "status": status, "reason": why}


def _prepared(entry: Entry, family: Family, material: Material, device: torch.device) -> Contestant:
    """Make it, take its first steps, and see that they are steps.

    Raises:
        NoStep: its first steps, or a replay, moved nothing, or made parameters infinite.
        EagerOnly: it was told to compile and did not.
        Exception: whatever the optimizer raises.
    """
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        optimizer = entry.make(material.params)
        if entry.ours and entry.how == "compiled" and family.scope == "matrix":
            # Known beforehand, and its steps are slow.
            raise EagerOnly(f"{entry.rule} runs eagerly even with compile=True")
        before = material.sample()
        for _ in range(_STEPS_TO_CAPTURE if entry.how == GRAPH else _FIRST_STEPS):
            material.lend_gradients()
            optimizer.step()
        after = material.sample()
        if torch.equal(before, after):
            raise NoStep("its first steps moved nothing")
        if not bool(after.isfinite().all()):
            raise NoStep("its first steps made parameters infinite or NaN")
        material.lend_gradients()
        observed = observe(optimizer.step, device, products=family.scope == "matrix")
        if entry.ours and entry.how == "compiled" and not observed.compiled:
            told = [str(w.message) for w in said if "compil" in str(w.message)]
            raise EagerOnly(told[0] if told else f"{entry.rule} runs eagerly even with compile=True")
        act: Callable[[], object] = optimizer.step
        if entry.how == GRAPH:
            act = captured(optimizer.step, device)
            before = material.sample()
            replayed = observe(act, device)
            if torch.equal(before, material.sample()):
                raise NoStep("a replay moved nothing")
            # What a graph allocates is in a pool of its own, and none of it when it is replayed.
            observed = replace(
                observed, temporary_bytes=None, launches=replayed.launches, device_ms=replayed.device_ms
            )
    return Contestant(entry, optimizer, act, material.has_gradients(), observed, family.scope)


def _axpy_row(times: Times, material: Material) -> Row:
    spent = times.median_ms(AXPY)
    moved = axpy_bytes(material)
    said = f"{moved / spent / 1e6:.1f} GB/s"
    if COPY in times.seconds:
        said += f"; copy {copy_bytes(material) / times.median_ms(COPY) / 1e6:.1f}"
    return {
        "key": AXPY,
        "label": "axpy",
        "source": "p + a·g",
        "how": "foreach",
        "status": "ok",
        "reason": said,
        "step_ms": spent,
        "quartiles_ms": times.quartiles_ms(AXPY),
        "rounds": len(times.seconds[AXPY]),
        "least_bytes": moved,
        "limit_ms": spent,
        "of_limit": 1.0,
        "of_copy": _of_copy(times, AXPY, moved, material),
        "copy_ms": times.median_ms(COPY) if COPY in times.seconds else None,
        "state_bytes": 0,
    }


def _rows(contestants: Sequence[Contestant], times: Times, material: Material, setting: Setting) -> list[Row]:
    alive = [one for one in contestants if one.entry.key in times.seconds]
    rows = []
    for one in contestants:
        entry, key = one.entry, one.entry.key
        if one not in alive:
            rows.append({**_named(entry), "status": "failed", "reason": times.failed[key]})
            continue
        lead = next((o for o in alive if o.entry.ours and o.entry.rule == entry.rule), alive[0])
        held = state_bytes(one.optimizer)
        # A peer of the same equation may keep more state than it needs: the least is ours.
        needed = held if entry.ours else state_bytes(lead.optimizer)
        least = least_bytes(material.nbytes, material.nbytes, needed)
        flops = flops_of(one.products)
        seen = bool(one.products) and all(str(product) in times.seconds for product in one.products)
        limited = one.scope == "element" or seen
        products = one.products if limited else {}
        limits, by_products = _limits(times, products, least / axpy_bytes(material))
        shares = [limit / took for limit, took in zip(limits, times.seconds[key], strict=True)]
        rows.append(
            {
                **_named(entry),
                "status": "ok",
                "step_ms": times.median_ms(key),
                "quartiles_ms": times.quartiles_ms(key),
                "rounds": len(times.seconds[key]),
                "times_ours": None if one is lead else times.ratio(key, lead.entry.key),
                "limited_by": ("products" if by_products else "bytes") if limited else None,
                "least_bytes": least,
                "flops": flops or None,
                "product_flops_per_second": flops / median(limits) if by_products else None,
                "limit_ms": 1e3 * median(limits) if limited else None,
                "of_limit": median(shares) if limited else None,
                "of_copy": _of_copy(times, key, least, material),
                "temporary_bytes": one.observed.temporary_bytes,
                "state_bytes": held,
                "launches": one.observed.launches,
                "device_ms": one.observed.device_ms,
                "products": {str(p): count for p, count in one.products.items()} or None,
            }
        )
    return rows


def _of_copy(times: Times, key: str, nbytes: int, material: Material) -> float | None:
    """At what share of copy's rate so many bytes were moved; None where copy took no turns."""
    return times.ratio(COPY, key) * nbytes / copy_bytes(material) if COPY in times.seconds else None


def _limits(times: Times, products: Mapping[Product, int], axpys: float) -> tuple[list[float], bool]:
    """(seconds that a step needs at least, round by round; whether its products say so, or its bytes)."""
    by_bytes = [axpys * spent for spent in times.seconds[AXPY]]
    by_products = [0.0] * len(by_bytes)
    for product, count in products.items():
        spent = times.seconds[str(product)]
        by_products = [total + count * each for total, each in zip(by_products, spent, strict=True)]
    if sum(by_products) > sum(by_bytes):
        return by_products, True
    return by_bytes, False
