"""Test symmetric products by blocks against plain ones, below and above the size at which blocks start."""

from __future__ import annotations

import re

import pytest
import torch

from loops import for_each
from steepest.linalg import gram, symmetric_product

SIZES = [1, 5, 383, 384, 400, 769]


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@for_each("batch", [(), (3,), (2, 2)])
@for_each("rows", SIZES)
def test_gram_equals_the_plain_product(rows, batch):
    x = randn(*batch, rows, 7)
    for operand in (x, randn(*batch, 7, rows).mT, x.contiguous().expand(x.shape)):
        assert torch.allclose(gram(operand), operand @ operand.mT, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [512, 600, 769])
def test_large_results_are_exactly_symmetric(rows, dtype):
    x = randn(2, rows, 300, dtype=dtype)
    assert torch.equal(gram(x), gram(x).mT)


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("rows", SIZES)
def test_symmetric_product(rows, dims, alpha):
    """In (I + αS) Q (I + αS), the first product is not symmetric but the second is."""
    batch = (2,) * (dims - 2)
    q, s = (x + x.mT for x in (randn(*batch, rows, rows), randn(*batch, rows, rows) / rows))
    first = q + alpha * (s @ q)
    expected = first + alpha * (first @ s)
    found = symmetric_product(first, s, added=first, alpha=alpha)
    assert torch.equal(found, found.mT)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-11)
    alone = symmetric_product(q, q, alpha=alpha)
    assert torch.allclose(alone, alpha * (q @ q), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    x = randn(2, 300, 20, dtype=torch.float32).to(dtype)
    assert gram(x).dtype == dtype
    assert torch.allclose(gram(x).float(), x.float() @ x.float().mT, atol=0.5)


def test_nan_and_zero():
    x = randn(2, 400, 10)
    x[0, 3, 3] = float("nan")
    assert gram(x)[0].isnan().any()
    assert gram(x)[1].isfinite().all()
    assert torch.equal(gram(torch.zeros(400, 4)), torch.zeros(400, 400))
    assert gram(torch.zeros(0, 4)).shape == (0, 0)
    assert torch.equal(gram(torch.zeros(400, 0)), torch.zeros(400, 400))


def test_invalid_operands_name_the_function():
    with pytest.raises(ValueError, match="gram needs matrices"):
        gram(torch.ones(3))
    with pytest.raises(TypeError, match="symmetric_product needs"):
        symmetric_product(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2))


@for_each("rows", [4, 400])
@for_each(
    ("left", "right", "sum_", "said"),
    [
        ("n,20", "20,n+50", None, "y"),
        ("n,20", "20,n-1", None, "y"),
        ("n,20", "21,n", None, "y"),
        ("2,n,20", "20,n", None, "y"),
        ("2,n,20", "3,20,n", None, "y"),
        ("n,20", "20,n", "n,n+1", "added"),
        ("n,20", "20,n", "1,n", "added"),
        ("2,n,20", "2,20,n", "n,n", "added"),
        ("n,20", "20,n", "2,n,n", "added"),
    ],
)
def test_mismatched_shapes_are_refused(left, right, sum_, said, rows):
    def shaped(text):
        return torch.ones([eval(dim, {"n": rows}) for dim in text.split(",")])

    x, y, added = shaped(left), shaped(right), None if sum_ is None else shaped(sum_)
    wrong = y if said == "y" else added
    got = re.escape(str(tuple(wrong.shape)))
    with pytest.raises(ValueError, match=f"symmetric_product needs {said} of shape .*, got {got}"):
        symmetric_product(x, y, added=added)
