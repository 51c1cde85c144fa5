"""Counters and weights in words of 64 bits against the update of plain integers, in all cases there are."""

import warnings

import pytest
import torch

from steepest.compile import available, cache
from steepest.compile.available import compiler_available, wants_compiling, warn_no_compiler
from steepest.ternary import TernaryFlip, TernaryLinear, pack, planes, unpack
from steepest.ternary.planes import run_pass

EDGES = [0, 1, 2, 5, 63, 64, 126, 127]


def law(values, a, v, threshold, limit, cancel, flips):
    """The update by masks of int64, as it is written in the documentation: (T, a, how many)."""
    values, a, v = (tensor.to(torch.int64) for tensor in (values, a, v))
    total = (a + v).clamp(-limit, limit)
    if cancel:
        total = torch.where(values * total > 0, 0, total)
    reached = total.abs() >= threshold
    if not flips:
        return values, total, int(reached.sum())
    moved = torch.where(reached, (values + total.sign()).clamp(-1, 1), values)
    return moved, torch.where(reached, 0, total), int((moved != values).sum())


def run(kind, values, a, v, threshold, cancel, compiled=False):
    packed, a = pack(values), a.clone()
    given = {"threshold": threshold, "cancel": cancel, "compiled": compiled}
    count = run_pass(kind, packed, a, v.clone(), **given)
    return unpack(packed, values.shape[1]), a, int(count)


def check(kind, values, a, v, threshold, cancel, compiled=False):
    limit = torch.iinfo(a.dtype).max
    found = run(kind, values, a, v, threshold, cancel, compiled)
    expected = law(values, a, v, threshold, limit, cancel, kind == "flip")
    assert torch.equal(found[0], expected[0].to(torch.int8))
    assert torch.equal(found[1], expected[1].to(a.dtype))
    assert found[2] == expected[2]


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("kind", ["flip", "collect"])
def test_every_byte_of_counter_and_vote(kind, cancel):
    numbers = torch.arange(-127, 128, dtype=torch.int8)
    a, v = (each.reshape(1, -1) for each in torch.meshgrid(numbers, numbers, indexing="ij"))
    a, v = (each.expand(3, -1).contiguous() for each in (a, v))
    values = torch.tensor([-1, 0, 1], dtype=torch.int8)[:, None].expand(a.shape).contiguous()
    for threshold in (1, 2, 24, 126, 127):
        check(kind, values, a, v, threshold, cancel)


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("kind", ["flip", "collect"])
@pytest.mark.parametrize(
    ("counters", "votes"),
    [(torch.int16, torch.int8), (torch.int16, torch.int16), (torch.int8, torch.int16)],
)
def test_shorts_at_the_edges_and_at_random(kind, cancel, counters, votes):
    generator = torch.Generator().manual_seed(0)

    def numbers(dtype):
        limit = torch.iinfo(dtype).max
        near = [*EDGES, 128, 255, 256, limit - 128, limit - 127, limit - 1, limit]
        sides = [sign * n for n in near if n <= limit for sign in (1, -1)]
        drawn = torch.randint(-limit, limit + 1, (40,), generator=generator).tolist()
        return torch.tensor([*sides, *drawn])

    grid = torch.meshgrid(numbers(counters), numbers(votes), indexing="ij")
    a, v = (each.reshape(1, -1).expand(3, -1) for each in grid)
    a, v = a.to(counters).contiguous(), v.to(votes).contiguous()
    values = torch.tensor([-1, 0, 1], dtype=torch.int8)[:, None].expand(a.shape).contiguous()
    for threshold in (1, 24, 127, *([128, 32767] if counters == torch.int16 else [])):
        check(kind, values, a, v, threshold, cancel)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 15, 16, 31, 32, 33, 64, 96, 100])
def test_rows_of_any_length(dtype, columns):
    generator = torch.Generator().manual_seed(columns)
    values = torch.randint(-1, 2, (7, columns), generator=generator, dtype=torch.int8)
    a = torch.randint(-20, 21, (7, columns), generator=generator).to(dtype)
    v = torch.randint(-20, 21, (7, columns), generator=generator, dtype=torch.int8)
    for kind in ("flip", "collect"):
        check(kind, values, a, v, 9, cancel=True)


def test_parts_of_larger_tensors_are_passed_over_alike():
    # Rows that begin anywhere in memory, and rows with others between them.
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-1, 2, (6, 64), generator=generator, dtype=torch.int8)
    a, v = (torch.randint(-9, 10, (6, 64), generator=generator, dtype=torch.int8) for _ in range(2))
    expected = run("flip", values, a, v, 4, cancel=True)
    shifted = [
        torch.zeros(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape).copy_(t) for t in (pack(values), a, v)
    ]
    apart = [torch.zeros(12, t.shape[1], dtype=t.dtype)[::2].copy_(t) for t in (pack(values), a, v)]
    for packed, counters, votes in (shifted, apart):
        count = run_pass("flip", packed, counters, votes, threshold=4, cancel=True, compiled=False)
        assert torch.equal(unpack(packed, 64), expected[0])
        assert torch.equal(counters, expected[1])
        assert int(count) == expected[2]


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_one_graph_serves_all_sizes_and_thresholds(dtype):
    from torch._dynamo.utils import counters

    generator = torch.Generator().manual_seed(0)
    made = 0
    for index, (rows, columns) in enumerate([(9, 128), (64, 256), (3, 64), (5, 1000), (2, 33), (700, 96)]):
        values = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
        a = torch.randint(-20, 21, (rows, columns), generator=generator).to(dtype)
        v = torch.randint(-9, 10, (rows, columns), generator=generator, dtype=torch.int8)
        check("flip", values, a, v, 3 + index, cancel=True, compiled=True)
        made = made or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == made > 0


def test_where_compiling_fails_the_step_is_taken_eagerly_and_said_once(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no room for caches\nand more")

    monkeypatch.setattr(cache, "_made", {})
    monkeypatch.setattr(cache, "_broken", set())
    monkeypatch.setattr(torch, "compile", broken)
    torch.manual_seed(0)
    values = torch.randint(-1, 2, (9, 64), dtype=torch.int8)
    a, v = (torch.randint(-9, 10, (9, 64), dtype=torch.int8) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="^steepest moves ternary weights .*: no room for caches$"):
        check("flip", values, a, v, 4, cancel=True, compiled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("flip", values, a, v, 4, cancel=True, compiled=True)


@pytest.mark.parametrize(
    ("option", "weights", "there", "wants"),
    [
        (None, 1 << 22, True, True),
        (None, (1 << 22) - 1, True, False),
        (None, 1 << 22, False, False),
        (False, 1 << 30, True, False),
        (True, 1, True, True),
    ],
)
def test_what_is_compiled(option, weights, there, wants, monkeypatch):
    monkeypatch.setattr(available, "compiler_available", lambda kind: there)
    assert wants_compiling(option, weights, torch.device("cpu")) == wants


def test_without_a_compiler_the_wish_for_one_is_answered(monkeypatch):
    warn_no_compiler.cache_clear()
    monkeypatch.setattr(available, "compiler_available", lambda kind: False)
    with pytest.warns(RuntimeWarning, match="no compiler for 'cpu'"):
        trainer = TernaryFlip(TernaryLinear(8, 8), compile=True)
    warn_no_compiler.cache_clear()
    assert not trainer._vote_buffers[""].is_compiled(torch.device("cpu"))


def test_a_layers_pass_eager_makes_pieces_alone():
    # What a pass over a layer needs besides is a few pieces' worth, whatever the layer's size.
    a = torch.zeros(4096, 1024, dtype=torch.int8)
    packed, v = pack(a), torch.ones_like(a)
    with torch.profiler.profile(profile_memory=True) as found:
        run_pass("flip", packed, a, v, threshold=2, cancel=True, compiled=False)
    held = largest = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    assert planes.row_pieces(4096, 1024, a.device)[0] == slice(0, 256)
    assert 0 < largest < a.numel()
