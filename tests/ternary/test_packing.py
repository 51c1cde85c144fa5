"""Packed ternary and binary numbers against the layout written out digit by digit."""

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from loops import for_each
from steepest.compile import available
from steepest.compile.available import compiler_available, warn_no_compiler
from steepest.ternary import from_base3, pack, to_base3, unpack
from steepest.ternary.packing import check_packed, count_zeros, packed_width

SIZES = [*range(1, 18), 31, 32, 33, 127, 257]


def ternary(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_unpacking_undoes_packing_at_every_size(size, bits, device):
    values = numbers(bits, 5, size).to(device)
    packed = pack(values, bits=bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, packed_width(size, bits)) == (5, math.ceil(size * bits / 8))
    assert torch.equal(unpack(packed, size, bits=bits), values)
    assert torch.equal(unpack(packed, size, torch.bfloat16, bits=bits), values.to(torch.bfloat16))
    assert int(count_zeros(packed, size, bits)) == int((values == 0).sum())


@for_each("bits", [1, 2])
@for_each("size", SIZES)
def test_the_layout_is_the_documented_one(size, bits):
    values = numbers(bits, 1, size, seed=1)[0].tolist()
    width = math.ceil(size * bits / 8)
    expected = [0] * width
    codes = {1: 0, -1: 1} if bits == 1 else {0: 0b00, 1: 0b01, -1: 0b11}
    for place, value in enumerate(values):
        expected[place % width] |= codes[value] << (bits * (place // width))
    assert pack(torch.tensor([values], dtype=torch.int8), bits=bits)[0].tolist() == expected


def numbers(bits, *shape, seed=0):
    return ternary(*shape, seed=seed) if bits == 2 else binary(*shape, seed=seed)


def binary(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1


@for_each("size", SIZES)
def test_base_3_is_the_digits_plus_one(size):
    values = ternary(size, seed=2)
    digits = [int(value) + 1 for value in values] + [0] * (-size % 5)
    if size % 5:
        digits[size:] = [0] * (-size % 5)
    expected = [sum(d * 3**k for k, d in enumerate(digits[i : i + 5])) for i in range(0, len(digits), 5)]
    code = to_base3(values)
    assert code.tolist() == expected
    assert torch.equal(from_base3(code, (size,)), values)


def test_every_byte_of_base_3_is_five_digits():
    code = torch.arange(243, dtype=torch.uint8)
    values = from_base3(code, (243, 5))
    assert len({tuple(row) for row in values.tolist()}) == 243
    assert torch.equal(to_base3(values), code)


@pytest.mark.parametrize(
    ("code", "shape", "says"),
    [
        (torch.zeros(2, dtype=torch.uint8), (5,), "1 bytes"),
        (torch.zeros(1), (5,), "float32"),
        (torch.full((1,), 243, dtype=torch.uint8), (5,), "243"),
    ],
)
def test_invalid_base_3_is_refused(code, shape, says):
    with pytest.raises(ValueError, match=says):
        from_base3(code, shape)


@pytest.mark.parametrize("value", [2, 0.5, 257.0, float("nan")])
def test_other_numbers_than_ternary_are_refused(value):
    with pytest.raises(ValueError, match="−1, 0 and 1"):
        to_base3(torch.tensor([0, value]))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 3), (0, 5), (2, 3, 0)])
def test_empty_tensors_keep_their_shapes(shape):
    for bits in (1, 2):
        values = numbers(bits, *shape)
        packed = pack(values, bits=bits)
        assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
        assert unpack(packed, shape[-1], bits=bits).shape == shape
    assert from_base3(to_base3(values), shape).shape == shape


def test_leading_dimensions_are_kept_and_strides_do_not_matter():
    for bits in (1, 2):
        values = numbers(bits, 6, 4, 3).transpose(0, 2)
        assert torch.equal(unpack(pack(values, bits=bits), 6, bits=bits), values)


@pytest.mark.parametrize("bits", [0, 3, 8, None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be 1"):
        pack(torch.zeros(4, dtype=torch.int8), bits=bits)
    with pytest.raises(ValueError, match="bits must be 1"):
        unpack(torch.zeros(1, dtype=torch.uint8), 4, bits=bits)


@pytest.mark.parametrize(
    "values", [torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.zeros((), dtype=torch.int8)]
)
def test_only_int8_is_packed(values):
    with pytest.raises(ValueError, match=f"takes int8 .*got {values.dtype}"):
        pack(values)


@pytest.mark.parametrize(
    ("packed", "count", "says"),
    [
        (torch.zeros(3, 2, dtype=torch.uint8), 9, r"9 ternary numbers are 3 bytes .* shape \(3, 2\)"),
        (torch.zeros(3, 2, dtype=torch.uint8), 4, "4 ternary numbers are 1 bytes"),
        (torch.zeros(3, 2, dtype=torch.int8), 8, "got torch.int8"),
        (torch.zeros((), dtype=torch.uint8), 1, r"shape \(\)"),
        (torch.zeros(0, dtype=torch.uint8), -1, "at least 0, got -1"),
    ],
)
def test_wrong_packed_layouts_are_refused(packed, count, says):
    with pytest.raises(ValueError, match=says):
        unpack(packed, count)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 13, 14])
def test_every_wrong_pair_of_bits_is_found(size):
    good = pack(ternary(2, size, seed=4))
    check_packed("it", good, size)
    width = packed_width(size)
    for place in range(4 * width):
        for code in (0b01, 0b10, 0b11):
            bad = good.clone()
            at, shift = place % width, 2 * (place // width)
            bad[1, at] = (int(bad[1, at]) & ~(3 << shift)) | (code << shift)
            if place < size and code != 0b10:
                check_packed("it", bad, size)
                continue
            with pytest.raises(
                ValueError, match="it holds the code 10" if code == 0b10 else "it holds numbers beyond"
            ):
                check_packed("it", bad, size)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 15, 17])
def test_every_stray_bit_beyond_binary_numbers_is_found(size):
    good = pack(binary(2, size, seed=4), bits=1)
    width = packed_width(size, 1)
    for place in range(8 * width):
        bad = good.clone()
        bad[1, place % width] ^= 1 << (place // width)
        if place < size:
            check_packed("it", bad, size, bits=1)
            continue
        with pytest.raises(ValueError, match="it holds numbers beyond"):
            check_packed("it", bad, size, bits=1)


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
@pytest.mark.parametrize(("threads", "bits"), [(1, 2), (2, 2), (1, 1)])
def test_compiled_packing_is_the_same_for_all_sizes_by_one_graph(threads, bits):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = set()
        # Of words, but too few; of no whole words; of whole words, but with a gap at the end.
        others = [(1, 64), (5, 32), (4, 0), (0, 64), (64,), (9, 33), (5, 68), (5, 63)]
        for shape in [(3, 64 * 2 // bits), (700, 192), (2, 5, 1024), *others]:
            values = numbers(bits, *shape, seed=shape[-1])
            shifted = torch.zeros(values.numel() + 3, dtype=torch.int8)[3:].view(shape).copy_(values)
            packed = pack(values, bits=bits)
            for given in (values, shifted, values.flip(0).flip(0)):
                assert torch.equal(pack(given, bits=bits, compile=True), packed)
            tight = torch.zeros(packed.numel() + 3, dtype=torch.uint8)[3:].view(packed.shape).copy_(packed)
            for given in (packed, tight):
                for dtype in (torch.int8, torch.bfloat16):
                    found = unpack(given, shape[-1], dtype, bits=bits, compile=True)
                    assert torch.equal(found, values.to(dtype))
                    assert found.is_contiguous()
                    assert found.dtype == dtype
            made |= {counters["stats"]["unique_graphs"]}
    finally:
        torch.set_num_threads(before)
    assert len(made) == 1


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
def test_compiled_packing_may_be_traced_faked_and_switched_off():
    values = ternary(4, 64)

    @torch.compile(fullgraph=True)
    def around(values):
        return unpack(pack(values, compile=True), 64, compile=True) * 2

    assert torch.equal(around(values), values * 2)
    with FakeTensorMode():
        faked = pack(torch.empty(4, 64, dtype=torch.int8), compile=True)
        assert unpack(faked, 64, compile=True).shape == (4, 64)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack(pack(values, compile=True), 64, compile=True), values)


def test_compiled_packing_without_a_compiler_is_eager_and_says_so(monkeypatch):
    warn_no_compiler.cache_clear()
    monkeypatch.setattr(available, "compiler_available", lambda kind: False)
    values = ternary(4, 64)
    with pytest.warns(RuntimeWarning, match="no compiler for 'cpu'"):
        assert torch.equal(pack(values, compile=True), pack(values))
    warn_no_compiler.cache_clear()
