"""The update in 64-bit words against the same update of plain integers, exhaustively for int8."""

import warnings

import pytest
import torch

from loops import for_each
from peak_memory import highest
from steepest.compile import available, cache
from steepest.compile.available import compiler_available, wants_compiling, warn_no_compiler
from steepest.ternary import TernaryFlip, TernaryLinear, pack, planes, unpack
from steepest.ternary.planes import run_pass

EDGES = [0, 1, 2, 5, 63, 64, 126, 127]


def expected_of(values, a, v, threshold, limit, cancel, flips, bits):
    """The update by masks of int64, as documented: (T, a, count)."""
    values, a, v = (tensor.to(torch.int64) for tensor in (values, a, v))
    total = (a + v).clamp(-limit, limit)
    if cancel:
        total = torch.where(values * total > 0, 0, total)
    reached = total.abs() >= threshold
    if not flips:
        return values, total, int(reached.sum())
    target = total.sign() if bits == 1 else (values + total.sign()).clamp(-1, 1)
    moved = torch.where(reached, target, values)
    return moved, torch.where(reached, 0, total), int((moved != values).sum())


def run(kind, values, a, v, threshold, cancel, compiled=False, bits=2):
    packed, a = pack(values, bits=bits), a.clone()
    given = {"threshold": threshold, "cancel": cancel, "compiled": compiled, "bits": bits}
    count = run_pass(kind, packed, a, v.clone(), **given)
    return unpack(packed, values.shape[1], bits=bits), a, int(count)


def levels(bits):
    return torch.tensor([-1, 1] if bits == 1 else [-1, 0, 1], dtype=torch.int8)


def drawn(rows, columns, generator, bits=2):
    known = levels(bits)
    return known[torch.randint(0, len(known), (rows, columns), generator=generator)]


def check(kind, values, a, v, threshold, cancel, compiled=False, bits=2):
    limit = torch.iinfo(a.dtype).max
    found = run(kind, values, a, v, threshold, cancel, compiled, bits)
    expected = expected_of(values, a, v, threshold, limit, cancel, kind == "flip", bits)
    assert torch.equal(found[0], expected[0].to(torch.int8))
    assert torch.equal(found[1], expected[1].to(a.dtype))
    assert found[2] == expected[2]


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("kind", ["flip", "accumulate"])
def test_every_byte_of_counter_and_vote(kind, cancel, bits):
    numbers = torch.arange(-127, 128, dtype=torch.int8)
    a, v = (each.reshape(1, -1) for each in torch.meshgrid(numbers, numbers, indexing="ij"))
    a, v = (each.expand(len(levels(bits)), -1).contiguous() for each in (a, v))
    values = levels(bits)[:, None].expand(a.shape).contiguous()
    for threshold in (1, 2, 24, 126, 127):
        check(kind, values, a, v, threshold, cancel, bits=bits)


@for_each("bits", [1, 2])
@for_each("cancel", [False, True])
@for_each("kind", ["flip", "accumulate"])
@for_each(
    ("counters", "votes"), [(torch.int16, torch.int8), (torch.int16, torch.int16), (torch.int8, torch.int16)]
)
def test_int16_at_the_edges_and_at_random(kind, cancel, counters, votes, bits):
    generator = torch.Generator().manual_seed(0)

    def numbers(dtype):
        limit = torch.iinfo(dtype).max
        near = [*EDGES, 128, 255, 256, limit - 128, limit - 127, limit - 1, limit]
        sides = [sign * n for n in near if n <= limit for sign in (1, -1)]
        drawn = torch.randint(-limit, limit + 1, (40,), generator=generator).tolist()
        return torch.tensor([*sides, *drawn])

    grid = torch.meshgrid(numbers(counters), numbers(votes), indexing="ij")
    a, v = (each.reshape(1, -1).expand(len(levels(bits)), -1) for each in grid)
    a, v = a.to(counters).contiguous(), v.to(votes).contiguous()
    values = levels(bits)[:, None].expand(a.shape).contiguous()
    for threshold in (1, 24, 127, *([128, 32767] if counters == torch.int16 else [])):
        check(kind, values, a, v, threshold, cancel, bits=bits)


@for_each("bits", [1, 2])
@for_each("dtype", [torch.int8, torch.int16])
@for_each("columns", [1, 2, 3, 5, 8, 15, 16, 31, 32, 33, 64, 96, 100])
def test_rows_of_any_length(dtype, columns, bits):
    generator = torch.Generator().manual_seed(columns)
    values = drawn(7, columns, generator, bits)
    a = torch.randint(-20, 21, (7, columns), generator=generator).to(dtype)
    v = torch.randint(-20, 21, (7, columns), generator=generator, dtype=torch.int8)
    for kind in ("flip", "accumulate"):
        check(kind, values, a, v, 9, cancel=True, bits=bits)


@pytest.mark.parametrize("bits", [1, 2])
def test_unaligned_and_strided_rows(bits):
    generator = torch.Generator().manual_seed(0)
    values = drawn(6, 64, generator, bits)
    a, v = (torch.randint(-9, 10, (6, 64), generator=generator, dtype=torch.int8) for _ in range(2))
    expected = run("flip", values, a, v, 4, cancel=True, bits=bits)
    tensors = (pack(values, bits=bits), a, v)
    shifted = [torch.zeros(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape).copy_(t) for t in tensors]
    apart = [torch.zeros(12, t.shape[1], dtype=t.dtype)[::2].copy_(t) for t in tensors]
    options = {"bits": bits, "threshold": 4, "cancel": True, "compiled": False}
    for packed, counters, votes in (shifted, apart):
        count = run_pass("flip", packed, counters, votes, **options)
        assert torch.equal(unpack(packed, 64, bits=bits), expected[0])
        assert torch.equal(counters, expected[1])
        assert int(count) == expected[2]


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
@pytest.mark.parametrize(("dtype", "bits"), [(torch.int8, 2), (torch.int16, 2), (torch.int8, 1)])
def test_one_graph_serves_all_sizes_and_thresholds(dtype, bits):
    from torch._dynamo.utils import counters

    generator = torch.Generator().manual_seed(0)
    made = 0
    for index, (rows, columns) in enumerate([(9, 128), (64, 256), (3, 64), (5, 1000), (2, 33), (700, 96)]):
        values = drawn(rows, columns, generator, bits)
        a = torch.randint(-20, 21, (rows, columns), generator=generator).to(dtype)
        v = torch.randint(-9, 10, (rows, columns), generator=generator, dtype=torch.int8)
        check("flip", values, a, v, 3 + index, cancel=True, compiled=True, bits=bits)
        made = made or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == made > 0


def test_a_failed_compilation_falls_back_to_eager_and_warns_once(monkeypatch):
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


def test_compile_true_warns_without_a_compiler(monkeypatch):
    warn_no_compiler.cache_clear()
    monkeypatch.setattr(available, "compiler_available", lambda kind: False)
    with pytest.warns(RuntimeWarning, match="no compiler for 'cpu'"):
        trainer = TernaryFlip(TernaryLinear(8, 8), compile=True)
    warn_no_compiler.cache_clear()
    assert not trainer.targets.buffers[""].is_compiled(torch.device("cpu"))


def test_an_eager_pass_allocates_chunks_only():
    # A few chunks' worth of temporaries, whatever the layer's size.
    a = torch.zeros(4096, 1024, dtype=torch.int8)
    packed, v = pack(a), torch.ones_like(a)
    largest = highest(lambda: run_pass("flip", packed, a, v, threshold=2, cancel=True, compiled=False))
    assert planes.row_chunks(4096, 1024, a.device)[0] == slice(0, 256)
    assert 0 < largest < a.numel()
