"""Which weights flip where more reach the threshold than may flip, against a sort of all of them."""

import pytest
import torch

from peak_memory import highest
from steepest.compile.available import compiler_available
from steepest.random import bits32
from steepest.ternary import chunks, pack, top_k, unpack
from steepest.ternary.top_k import flip_top_k

KEY = (1, 2)


def sorted_flips(values, a, threshold, at_most, bits):
    """By |a|, then the tie-breaker, then the index: (T, a, flips)."""
    values, a = values.clone(), a.clone()
    flat, counters = values.view(-1), a.view(-1)
    ties = bits32(KEY, torch.arange(a.numel()), top_k._TIES).tolist()
    sizes = counters.to(torch.int64).abs().tolist()
    ranked = sorted(range(a.numel()), key=lambda i: (-sizes[i], -ties[i]))
    first = [i for i in ranked if sizes[i] >= threshold][:at_most]
    before = values.clone()
    signs = counters[first].sign().to(torch.int8)
    flat[first] = signs if bits == 1 else (flat[first] + signs).clamp(-1, 1)
    counters[first] = 0
    return values, a, int((values != before).sum())


def check(values, a, threshold, at_most, compiled=False, bits=2):
    packed, left = pack(values, bits=bits), a.clone()
    reached = int((a.to(torch.int64).abs() >= threshold).sum())
    options = {"bits": bits, "threshold": threshold, "reached": reached, "at_most": at_most}
    flips = flip_top_k(packed, left, **options, key=KEY, compiled=compiled)
    expected = sorted_flips(values, a, threshold, at_most, bits)
    assert torch.equal(unpack(packed, values.shape[1], bits=bits), expected[0])
    assert torch.equal(packed, pack(expected[0], bits=bits))
    assert torch.equal(left, expected[1])
    assert int(flips) == expected[2]


def drawn(rows, columns, levels, dtype, bits=2):
    generator = torch.Generator().manual_seed(levels)
    limit = torch.iinfo(dtype).max
    a = limit - torch.randint(0, levels, (rows, columns), generator=generator)
    a *= 2 * torch.randint(0, 2, a.shape, generator=generator) - 1
    a[:, ::3] = 3
    values = torch.randint(-1, 2, a.shape, generator=generator, dtype=torch.int8)
    return (values if bits == 2 else 2 * (values > 0).to(torch.int8) - 1), a.to(dtype)


@pytest.mark.parametrize("kept", [1, 16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("levels", [1, 3, 100])
@pytest.mark.parametrize("bits", [1, 2])
def test_the_first_of_a_sort_flip(dtype, levels, kept, bits, monkeypatch):
    # Candidates are two thirds of all: with 1 they are kept, with 16 looked for every time.
    monkeypatch.setattr(top_k, "_KEPT", kept)
    values, a = drawn(40, 50, levels, dtype, bits)
    candidates = int((a != 3).sum())
    for at_most in (0, 1, 7, 500, candidates - 1, candidates, a.numel()):
        check(values, a, 4, at_most, bits=bits)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 5), (1, 31), (9, 33), (2, 64)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_rows_and_chunks_of_any_length(shape, dtype, bits, monkeypatch):
    values, a = drawn(*shape, 2, dtype, bits)
    a[0, 0] = -torch.iinfo(dtype).max
    for chunk in (1 << 18, 7, 1):
        monkeypatch.setattr(chunks, "_CHUNK_ON_CPU", chunk)
        for at_most in (1, 3, max(a.numel() // 3, 1)):
            check(values, a, 1, at_most, bits=bits)


def test_equal_tie_breakers_are_cut_too(monkeypatch):
    values, a = drawn(40, 50, 1, torch.int8)
    for bits in (1, 3, 16):
        monkeypatch.setattr(top_k, "_TIE_BITS", bits)
        check(values, a, 4, 77)


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
def test_compiled_noise_is_the_same():
    for rows in (40, 3):
        check(*drawn(rows, 50, 1, torch.int8), 4, 17, compiled=True)


def peak_bytes(a):
    packed, reached = torch.zeros(a.shape[0], a.shape[1] // 4, dtype=torch.uint8), int((a >= 4).sum())
    return highest(
        lambda: flip_top_k(packed, a, threshold=4, reached=reached, at_most=2000, key=KEY, compiled=False)
    )


def test_choosing_among_all_takes_chunks_only():
    a = torch.full((8192, 1024), 9, dtype=torch.int8)
    # A chunk is an eighth of the layer; all of it are ties here, of some ten int64 each.
    assert chunks.row_chunks(a.numel(), 1, a.device, chunks.LARGE)[0] == slice(0, a.numel() // 8)
    assert 0 < peak_bytes(a) < 12 * a.numel()


def test_choosing_among_kept_indices_takes_them_twice_at_most(monkeypatch):
    a = torch.zeros(8192, 1024, dtype=torch.int8)
    a.view(-1)[::16] = 9
    monkeypatch.setattr(chunks, "_CHUNK_ON_CPU", 1 << 15)
    kept = a.numel() // 16 * 8
    assert kept < peak_bytes(a) < 2.4 * kept
