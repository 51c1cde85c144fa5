"""Write the notes and warnings of explain(): facts that no row shows, and likely mistakes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from steepest.autotuning import autotune
from steepest.explain.rows import BY_NAME, Reasons, Row, starred
from steepest.rule import Group, find_rule

__all__ = ["find_notes", "find_warnings"]

_QKV = re.compile(r"qkv|query_key_value|c_attn", re.IGNORECASE)
# Most models with this name store query, key and value of one head after those of the other.
_BY_HEAD = re.compile(r"query_key_value", re.IGNORECASE)
_GATE_UP = re.compile(r"gate_up|gate_and_up|w1_?w?3|w1_?w?2$", re.IGNORECASE)


def find_notes(rows: Sequence[Row], main: str, reasons: Reasons) -> list[str]:
    """Note tied, frozen and left-out tensors, guessed outputs, autotune's choices, and what has no effect."""
    notes = [
        *(
            f"{row.name} is also {', '.join(row.aliases)}: stepped once, under its first name"
            for row in rows
            if row.aliases
        ),
        *reasons.guesses,
    ]
    frozen = [row for row in rows if row.frozen]
    if frozen:
        notes.append(
            f"{len(frozen)} frozen tensors ({sum(row.parameters for row in frozen):,} parameters) are not "
            "stepped and have no state; unfrozen, they train with the rule shown"
        )
    if reasons.left_out:
        shown = ", ".join(reasons.left_out[:3]) + (", ..." if len(reasons.left_out) > 3 else "")
        notes.append(
            f"{len(reasons.left_out)} frozen tensors are left out because they can never train: {shown}"
        )
    ways: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.way is not None and autotune() != "off":
            ways.setdefault(row.way, {})["×".join(map(str, row.shape))] = None
    notes += [f"autotune chose {way!r} for matrices of {', '.join(shapes)}" for way, shapes in ways.items()]
    if reasons.fallback not in (None, main) and not find_rule(main).hidden_only:
        notes.append(f"the fallback {reasons.fallback!r} is not used: {main!r} takes every tensor")
    undecayed = any(row.weight_decay == 0 and row.kind in ("norm", "bias", "gain") for row in rows)
    if undecayed and any(row.weight_decay > 0 for row in rows):
        notes.append("norms, biases and gains have no weight decay; decay_vectors=True gives it to them")
    return notes


def find_warnings(groups: Sequence[Group], rows: Sequence[Row], main: str, reasons: Reasons) -> list[str]:
    """Warn of likely mistakes; tensors whose names differ only in numbers share one warning."""
    warnings = []
    training = [row for row in rows if not row.frozen]
    if training and find_rule(main).hidden_only and not any(row.rule == main for row in training):
        frozen = sum(row.rule == main for row in rows)
        but = f" but {frozen} frozen tensor{'s' * (frozen > 1)}" if frozen else ""
        warnings.append(
            f"nothing goes to {main!r}{but}: no trainable tensor is a matrix of a hidden layer. Assign some "
            f"with overrides={{...: {main!r}}}"
        )
    warnings += reasons.ambiguities
    # A view from the user says what the matrix is. A view that build() found only says how it is stored.
    told = {name for group in groups for name in (group.get("views") or {})} - set(reasons.known_views)
    by_name = {starred(row.name): text for row in training if (text := _ambiguity(row, main, told, reasons))}
    return warnings + list(by_name.values())


def _ambiguity(row: Row, main: str, told: set[str], reasons: Reasons) -> str | None:
    """Return the warning for a tensor that may be misjudged; None if it is unambiguous."""
    name = starred(row.name)
    if find_rule(row.rule).hidden_only:
        if sum(size > 1 for size in row.shape) <= 1:
            return f"{name} {row.shape} is a vector stored as a matrix, and {row.rule!r} is for matrices"
        whole = row.view is None or row.view[0] == "whole"
        if len(row.shape) == 2 and whole and row.name not in told:
            fused = _looks_fused(
                name,
                row.shape,
                stored_transposed=row.view is not None,
                own_layout=row.name in reasons.own_layouts,
            )
            if fused is not None:
                return f"{name} {row.shape} {fused}"
    guessed = row.why.endswith(BY_NAME) and row.kind != "override"
    if not (row.kind == "unknown" or guessed) or not find_rule(main).hidden_only:
        return None
    taken = f"is treated as a {row.kind}, {BY_NAME}" if guessed else "belongs to an unknown module"
    condition, answer = "it is the matrix of a hidden layer", repr(main)
    if len(row.shape) > 2:
        condition = "it is a stack of matrices"
        answer = f"{{'rule': {main!r}, 'view': 'batch'}}"
    override = f"overrides={{{name!r}: {answer}}}"
    return f"{name} {row.shape} {taken}, and goes to {row.rule!r}. If {condition}, pass {override}"


def _looks_fused(
    name: str, shape: tuple[int, ...], *, stored_transposed: bool, own_layout: bool
) -> str | None:
    """Return the warning for a matrix that may be several, with the view to set; None if it seems whole."""
    out, into = shape[::-1] if stored_transposed else shape
    called = _QKV.search(name) is not None
    what, blocks = "query, key and value" if called else "three matrices", "..."
    if out == 3 * into:
        blocks = f"{into}, {into}, {into}"
    elif called and into == 3 * out:
        # A QKV projection has more outputs than inputs, so this one is stored as [in, out].
        blocks, stored_transposed = f"{out}, {out}, {out}", True
    elif not called:
        if not _GATE_UP.search(name) or out % 2 != 0:
            return None
        what, blocks = "two projections", f"{out // 2}, {out // 2}"
    if own_layout and not _BY_HEAD.search(name):
        return (
            f"may be {what} in one, in an order that depends on its class. If so, pass "
            f"views={{{name!r}: VIEW}} with a view of steepest.views that splits it as its forward() does; "
            f"if it is one matrix, pass {'transposed()' if stored_transposed else 'None'} there to confirm"
        )
    if _BY_HEAD.search(name):
        return (
            f"may be {what} in one, head by head. If so, pass views={{{name!r}: interleaved(HEADS, "
            "rows(SIZE, SIZE, SIZE))}, or rows(QUERIES, SIZE, SIZE) in it where several heads share a key; "
            "if it is one matrix, pass None there to confirm"
        )
    view, whole = f"rows({blocks})", "None"
    if stored_transposed:
        view, whole = f"transposed(columns({blocks}))", "transposed()"
    return (
        f"may be {what} in one. If so, pass views={{{name!r}: {view}}}; "
        f"if it is one matrix, pass {whole} there to confirm"
    )
