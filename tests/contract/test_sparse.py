"""A sparse gradient steps as its dense twin does, and stays sparse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Embedding, Parameter

from loops import for_each

from .cases import CASES, RULES, Case, reach, spread
from .training import gradient, identical, snapshot, train

MAKE_SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda t: t.to_sparse(),
    "hybrid coo": lambda t: t.to_sparse(1),
}


def _some_rows(t: Tensor, step: int) -> Tensor:
    kept = torch.zeros_like(t)
    for row in (2, step % t.shape[0]):
        kept[row] = t[row]
    return kept


@for_each(("case", "dtype", "kind"), spread(CASES, [torch.float32, torch.bfloat16], MAKE_SPARSE, alike=reach))
def test_sparse_gradients_equal_dense_ones(case: Case, dtype: torch.dtype, kind: str):
    options = {"weight_decay": 0.125, "nonfinite": "skip"}
    (param,), (twin,) = case.params(dtype, shapes=[(4, 3)]), case.params(dtype, shapes=[(4, 3)])
    optimizer, other = case.make([param], **options), case.make([twin], **options)
    for step in range(4):
        twin.grad = _some_rows(gradient(twin, 0, step), step)
        param.grad = MAKE_SPARSE[kind](twin.grad)
        layout = param.grad.layout
        optimizer.step()
        other.step()
        assert param.grad.layout == layout
        assert identical(param.grad.to_dense(), twin.grad)
    assert identical([param], [twin])
    assert identical(optimizer.state_dict()["state"], other.state_dict()["state"])


@for_each("case", CASES)
def test_repeated_indices_add_up(case: Case):
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 2, 0], [1, 0, 1]]), torch.tensor([1.0, -3.0, 0.5]), (4, 3)
    )
    (param,), (twin,) = case.params(shapes=[(4, 3)]), case.params(shapes=[(4, 3)])
    param.grad, twin.grad = sparse, torch.zeros(4, 3)
    twin.grad[0, 1], twin.grad[2, 0] = 1.5, -3.0
    assert not param.grad.is_coalesced()
    for optimizer in (case.make([param]), case.make([twin])):
        optimizer.step()
    assert identical([param], [twin])


@for_each("case", CASES)
def test_an_embedding_with_sparse_gradients_trains_as_a_dense_one(case: Case):
    def run(sparse: bool) -> list[Tensor]:
        table = Embedding(5, 3, sparse=sparse)
        table.weight = Parameter(case.params(shapes=[(5, 3)])[0].detach())
        optimizer = case.make(table.parameters())
        for step in range(3):
            optimizer.zero_grad()
            table(torch.tensor([step, 4, step])).pow(2).sum().backward()
            optimizer.step()
        return [table.weight.detach()]

    assert identical(run(sparse=True), run(sparse=False))


@for_each("case", CASES)
def test_dense_and_sparse_gradients_in_one_group(case: Case):
    params, twins = case.params(shapes=[(4, 3), (4, 3)]), case.params(shapes=[(4, 3), (4, 3)])
    optimizer, twin = case.make(params), case.make(twins)
    for step in range(2):
        for index in range(2):
            twins[index].grad = gradient(twins[index], index, step)
            params[index].grad = twins[index].grad.to_sparse() if index == 0 else twins[index].grad.clone()
        optimizer.step()
        twin.step()
    assert identical(params, twins)


@for_each("rule", RULES)
def test_a_nonfinite_value_in_a_sparse_gradient_is_seen(rule: Case):
    (param,) = rule.params(shapes=[(4, 3)])
    optimizer = rule.make([("table", param)], nonfinite="raise")
    train(optimizer, [param], 1)
    bad = torch.zeros(4, 3)
    bad[1, 1] = torch.inf
    param.grad = bad.to_sparse()
    before = snapshot(optimizer, [param])
    with pytest.raises(FloatingPointError, match="'table'"):
        optimizer.step()
    assert identical(snapshot(optimizer, [param]), before)
