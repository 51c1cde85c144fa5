"""The compiled sign of a float32 equals torch's for every kind of number."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.compile import cache, inductor
from steepest.compile import sign as definition
from steepest.compile.available import compiler_available
from steepest.compile.sign import sign


def all_kinds() -> torch.Tensor:
    """All signs and exponents with several mantissas: zeros, NaN, infinities, denormals."""
    head = torch.arange(1 << 16, dtype=torch.int64) << 16
    bits = torch.cat([head, head + 1, head + 0x7FFF, head + 0xFFFF])
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def test_it_equals_torchs_for_all_kinds_of_numbers():
    x = all_kinds()
    assert x.isnan().any()
    assert torch.equal(sign(x).view(torch.int32), x.sign().view(torch.int32))


@pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler")
def test_compiled_steps_use_it_and_equal_eager_ones():
    x = all_kinds()
    finite = torch.where(x.isfinite(), x, 1.0)
    stepped = []
    for compile_ in (False, True):
        weight = torch.nn.Parameter(finite.clone())
        optimizer = steepest.SignGSD([weight], lr=0.5, weight_decay=0.0, compile=compile_)
        weight.grad = x.flip(0).clone()
        with torch._inductor.config.patch(force_disable_caches=True):
            optimizer.step()
        stepped.append(weight.detach())
    assert torch.equal(stepped[0], stepped[1])


@pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler")
def test_code_is_taken_from_the_disk_where_inductor_keeps_it(monkeypatch):
    """It keeps nothing that was made with what it cannot name, such as a table of decompositions."""
    from torch._dynamo.utils import counters

    for _ in range(2):
        monkeypatch.setattr(cache, "_made", {})
        before = counters["inductor"]["fxgraph_cache_hit"]
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        steepest.SignGSD([weight], lr=0.5, weight_decay=0.0, compile=True).step()
        assert weight.tolist() == [0.5] * 3
    assert counters["inductor"]["fxgraph_cache_hit"] == before + 1


@pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler")
def test_inductor_is_given_it_and_keeps_nothing_of_another_definition(monkeypatch):
    """With another decomposition in its place, compiled code changes, though the disk has the first one's."""

    def signs_of_three():
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: torch.sign(x) + 1, backend=inductor.inductor)
        return compiled(torch.full((64,), 3.0)).unique().tolist()

    assert signs_of_three() == [2.0]
    monkeypatch.setattr(definition, "sign", lambda x: x + x)
    assert signs_of_three() == [7.0]
    monkeypatch.undo()
    assert signs_of_three() == [2.0]
    monkeypatch.setattr(definition, "sign", lambda x: x + x + x)
    assert signs_of_three() == [10.0]
    monkeypatch.setattr(definition, "sign", lambda x: x * 2.0)
    assert signs_of_three() == [7.0]
    monkeypatch.setattr(definition, "sign", lambda x: x * 4.0)  # another constant
    assert signs_of_three() == [13.0]
