"""Eager code, compiled code and any cut into chunks give the same bits."""

import math

import pytest
import torch

from steepest.compile.inductor import inductor
from steepest.formats.int8 import decode_nonnegative, decode_signed, encode_nonnegative, encode_signed
from steepest.formats.master import join, part

SIZES = [3, 257, 1000]


def average_step(grad, codes, scale, squares, square_scale, u):
    """An AdamW-like update of both averages, in place."""
    m, v = decode_signed(codes, scale), decode_nonnegative(squares, square_scale)
    m *= 0.9
    m += 0.1 * grad
    v *= 0.999
    v += 0.001 * (grad * grad)
    new = (*encode_signed(m), *encode_nonnegative(v, u))
    for old, value in zip((codes, scale, squares, square_scale), new, strict=True):
        old.copy_(value)


def master_step(param, correction, halves, wide, update, bits):
    """An update of bfloat16 weights with 24 bits, and of float16 ones with 32."""
    for p, kept, noise in ((param, correction, bits), (halves, wide, None)):
        new = part(join(p, kept) + update, p.dtype, kept.dtype, noise)
        p.copy_(new[0])
        kept.copy_(new[1])


def averages(k):
    """Gradients and states among which are blocks of zeros, subnormals, NaN and infinities."""
    generator = torch.Generator().manual_seed(k)
    grad, m, v, spread = torch.randn(4, k, 64, generator=generator)
    grad *= torch.exp(3 * spread)
    grad[::7, 5] = 0
    grad[k // 2], m[k // 2], v[k // 2] = 0, 1e-42, 0
    grad[k // 3, 4], grad[k // 5, 9] = math.nan, math.inf
    u = torch.rand(k, 64, generator=generator)
    return [grad, *encode_signed(m), *encode_nonnegative(v.square(), None), u]


def weights(k):
    """float32 bit patterns of all exponents, and updates of the same sizes and smaller ones."""
    generator = torch.Generator().manual_seed(k)
    bits = torch.randint(-(2**31), 2**31, (k, 64), generator=generator).to(torch.int32)
    value = bits.view(torch.float32)
    near = torch.randn(k, 64, generator=generator) * 2.0 ** torch.randint(
        -26, 16, (k, 1), generator=generator
    )
    update = near * torch.tensor([0.0, 1e-6, 1.0, 1e6]).repeat(16)
    noise = torch.randint(0, 2**32, (k, 64), generator=generator)
    return [*part(value, torch.bfloat16, torch.int8), *part(near, torch.float16, torch.int16), update, noise]


def as_bits(tensors):
    """The tensors' bits, any NaN the same."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [torch.where(t.isnan(), torch.nan, t).view(integers[t.itemsize]) for t in tensors]


def results(step, tensors):
    tensors = [t.clone() for t in tensors]
    step(*tensors)
    return as_bits(tensors)


def check(step, make, other):
    for k in SIZES:
        assert all(map(torch.equal, results(step, make(k)), results(other, make(k))))


def in_chunks(step):
    def run(*tensors):
        cut = 2 + len(tensors[0]) // 3
        for rows in zip(*(t.split(cut) for t in tensors), strict=True):
            step(*rows)

    return run


def compiled(step, tensors):
    """Compiled code, and the list of its graphs, of which there must be one."""
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return inductor(graph, examples)

    for t in tensors:
        torch._dynamo.mark_dynamic(t, 0)
    made = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    made(*tensors)
    return made, graphs


@pytest.mark.parametrize(("step", "make"), [(master_step, weights), (average_step, averages)])
def test_chunks(step, make):
    check(step, make, in_chunks(step))


@pytest.mark.parametrize(("step", "make"), [(master_step, weights), (average_step, averages)])
def test_compiled_once_for_all_sizes(step, make):
    made, graphs = compiled(step, make(4096))
    check(step, make, made)
    assert len(graphs) == 1


def test_bits_refuse_a_last_place():
    def other(grad, *states):
        average_step(torch.nextafter(grad, torch.ones(())), *states)

    with pytest.raises(AssertionError):
        check(average_step, averages, other)


def test_bits_refuse_noise_that_depends_on_the_chunk():
    def other(param, correction, halves, wide, update, bits):
        master_step(param, correction, halves, wide, update, bits.flip(0))

    with pytest.raises(AssertionError):
        check(master_step, weights, in_chunks(other))
