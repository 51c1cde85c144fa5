"""Shape, strides and pieces do not matter: every layout steps as its contiguous twin does, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from loops import for_each
from steepest.engine import chunks
from steepest.engine.layout import Row, chunks_of

from .cases import CASES, RULES, Case, able, by_id, reach, spread
from .training import gradient, identical, steps, train


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _every_other(t: Tensor) -> Tensor:
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def _channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last)


def _offset(t: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=t.dtype, device=t.device), t.reshape(-1)])[1:].view(t.shape)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((4, 3), _transposed),
    "transposed 3d": ((2, 4, 3), _transposed),
    "every other column": ((4, 3), _every_other),
    "channels_last": ((2, 3, 4, 2), _channels_last),
    "at an offset": ((4, 3), _offset),
}

OPTIONS: dict[str, Any] = {"weight_decay": 0.125, "rounding": "stochastic", "nonfinite": "skip"}


@for_each(
    ("case", "dtype", "layout", "which"),
    spread(
        CASES,
        [torch.float32, torch.bfloat16],
        LAYOUTS,
        ["parameter", "gradient", "both"],
        alike=reach,
    ),
)
def test_strides_do_not_matter(case: Case, dtype: torch.dtype, layout: str, which: str):
    shape, lay_out = LAYOUTS[layout]
    (twin,) = case.params(dtype, shapes=[shape])
    param = Parameter(lay_out(twin.detach().clone()) if which != "gradient" else twin.detach().clone())
    strides = param.stride()
    optimizer, other = case.make([param], **OPTIONS), case.make([twin], **OPTIONS)
    for step in range(3):
        twin.grad = gradient(twin, 0, step)
        param.grad = lay_out(twin.grad.clone()) if which != "parameter" else twin.grad.clone()
        optimizer.step()
        other.step()
    assert param.stride() == strides
    assert identical([param], [twin])
    assert identical(optimizer.state_dict()["state"], other.state_dict()["state"])


@for_each("case", CASES)
def test_a_strided_parameter_s_checkpoint_resumes(case: Case):
    params, twins = (
        [Parameter(_transposed(p.detach()))] for p in case.params(shapes=[(4, 3), (4, 3)])[:1] * 2
    )
    optimizer, straight = case.make(params), case.make(twins)
    steps(optimizer, params, range(2))
    again = case.make(params)
    again.load_state_dict(optimizer.state_dict())
    steps(again, params, range(2, 4))
    assert identical(params, [train(straight, twins, 4)[0]])


@for_each("case", CASES)
def test_memory_next_to_a_strided_parameter_is_not_written(case: Case):
    storage = torch.arange(24.0).view(4, 6)
    param = Parameter(storage[:, ::2])
    train(case.make([param]), [param])
    assert torch.equal(storage[:, 1::2], torch.arange(24.0).view(4, 6)[:, 1::2])
    assert not torch.equal(storage[:, ::2], torch.arange(24.0).view(4, 6)[:, ::2])


@for_each("case", able(CASES, "vectors"))
def test_a_scalar_steps_as_a_vector_of_one(case: Case):
    scalar, vector = (case.params(torch.bfloat16, shapes=[shape]) for shape in ((), (1,)))
    a = train(case.make(scalar, **OPTIONS), scalar)
    b = train(case.make(vector, **OPTIONS), vector)
    assert identical(a[0].view(1), b[0])


@for_each("case", CASES)
def test_a_matrix_steps_as_the_vector_of_its_elements(case: Case):
    """Rules that see a tensor as a whole or element by element know nothing of its shape."""
    if case.rule.scope == "matrix":
        return
    matrix, vector = (case.params(torch.bfloat16, shapes=[shape]) for shape in ((4, 3), (12,)))
    a = train(case.make(matrix, **OPTIONS), matrix)
    b = train(case.make(vector, **OPTIONS), vector)
    assert identical(a[0].view(12), b[0])


@for_each(("case", "nonfinite"), spread(CASES, ["ignore", "skip", "raise"], alike=reach))
def test_an_empty_parameter_is_stepped_and_harms_nobody(case: Case, nonfinite: str):
    options = {**OPTIONS, "nonfinite": nonfinite}
    shapes = [(4, 3), (0,), (3, 0, 2)]
    params, twins = case.params(shapes=shapes), case.params(shapes=shapes[:1])
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    assert identical(train(optimizer, params)[:1], train(twin, twins))
    assert [p.shape for p in params] == [torch.Size(case.shape(shape)) for shape in shapes]
    again = case.make(params, **options)
    again.load_state_dict(optimizer.state_dict())


@for_each("case", CASES)
def test_only_empty_parameters(case: Case):
    params = case.params(shapes=[(0,), (2, 0)])
    train(case.make(params, **OPTIONS), params)


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    spread(RULES, [torch.float32, torch.bfloat16], ["contiguous", "transposed", "channels_last"]),
    ids=str,
)
def test_pieces_make_the_whole(case: Case, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch):
    """Large tensors are stepped piece by piece; here the pieces are of seven elements."""
    shape, lay_out = LAYOUTS.get(layout, ((5, 3, 2, 2), lambda t: t))

    def run() -> list[Tensor]:
        params = [Parameter(lay_out(p.detach())) for p in case.params(dtype, shapes=[shape])]
        return train(case.make(params, **OPTIONS), params)

    whole = run()
    monkeypatch.setattr(chunks, "SMALL", 6)
    monkeypatch.setattr(chunks, "chunk_length", lambda *given, **options: 7)
    assert identical(run(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.rule.scope == "matrix"], ids=by_id)
def test_stacks_make_the_loop(case: Case, dtype: torch.dtype):
    """Equal shapes are stepped together, as many as ``bucket_bytes`` allows; here also one by one."""
    shapes = [(4, 3), (5, 3), (4, 3), (4, 3), (5, 3)]

    def run(bucket_bytes: int) -> tuple[list[Tensor], Any]:
        params = case.params(dtype, shapes=shapes)
        optimizer = case.make(params, **{**OPTIONS, "bucket_bytes": bucket_bytes})
        return train(optimizer, params), optimizer.state_dict()["state"]

    together = run(1 << 28)
    assert identical(run(1), together)
    assert identical(run(4 * 3 * 4 * 8 * 2), together), "two at a time"


@for_each("ordered", [False, True])
@for_each("limit", [1, 7, 100, 299, 300])
@for_each("alike", [True, False])
def test_tensors_are_cut_small_whatever_their_strides(ordered: bool, limit: int, alike: bool):
    """Or a wide transposed matrix would be stepped whole, with temporaries of its size."""
    transposed = torch.arange(300.0).view(2, 50, 3).transpose(0, 2)
    tensors = [transposed, transposed.clone() if alike else transposed.contiguous()]
    cut = list(chunks_of(Row(tensors, {}), limit, ordered=ordered))
    assert max(param.numel() for (param, _), _ in cut) <= limit
    assert all(param.equal(other) for (param, other), _ in cut)
    assert torch.cat([param.reshape(-1) for (param, _), _ in cut]).sort().values.equal(torch.arange(300.0))
    if ordered:
        places = torch.cat([extent.places(param.shape).reshape(-1) for (param, _), extent in cut])
        assert torch.cat([param.reshape(-1) for (param, _), _ in cut]).equal(transposed.flatten()[places])


@pytest.mark.parametrize(
    ("shapes", "begins", "overlap"),
    [
        ([(10,), (10,)], [0, 0], True),
        ([(10,), (4, 5)], [0, 0], True),
        ([(10,), (9000,)], [0, 5], True),
        ([(9000,), (10,)], [0, 5], True),
        ([(10,), (10,), (10,)], [20, 0, 12], True),
        ([(10,), (4, 5)], [0, 10], False),
        ([(4, 5), (10,), (0,)], [10, 0, 3], False),
    ],
    ids=str,
)
def test_parameters_in_the_same_memory_are_refused(
    shapes: list[tuple[int, ...]], begins: list[int], overlap: bool
):
    memory = torch.linspace(1, 2, 9010)
    params = [
        (f"p{number}", Parameter(memory[begin : begin + math.prod(shape)].view(shape)))
        for number, (shape, begin) in enumerate(zip(shapes, begins, strict=True))
    ]
    first, *others = params
    optimizer = Case("sgd").make([first])
    if not overlap:
        Case("sgd").make(params)
        optimizer.add_param_group({"params": others})
        return
    with pytest.raises(ValueError, match="share memory: give the optimizer one of them"):
        Case("sgd").make(params)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": others})
    assert len(optimizer.param_groups) == 1


def test_interleaved_and_repeated_parameters_share_no_memory():
    """Columns of one matrix have gaps; the same tensor twice in a group is torch's own warning."""
    memory = torch.ones(4, 6)
    left, right = Parameter(memory[:, :3]), Parameter(memory[:, 3:])
    train(Case("sgd").make([left, right]), [left, right], 1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        Case("sgd").make([left, left])
