"""How the work is divided does not matter: tensors together or alone, in groups, in pieces, in shards."""

from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.engine import chunks
from steepest.rule import find_rule
from strategies import RULES, STEPS, assert_same, bounded, cases, lines, parameters, run, same

ELEMENT = tuple(name for name in RULES if find_rule(name).scope == "element")


@bounded
@given(cases())
def test_each_parameter_steps_as_if_alone(case):
    params, twins = parameters(case.begins()), parameters(case.begins())
    optimizer = case.make(params)
    run(case, params, optimizer)
    # The others stay in the optimizer, for the noise is keyed by a parameter's place, but have no gradient.
    twin = case.make(twins)
    for alone in range(len(twins)):
        for step in range(STEPS):
            for i, (other, gradient) in enumerate(zip(twins, case.gradients(step), strict=True)):
                other.grad = gradient if i == alone else None
            twin.step()
    assert_same(params, twins, optimizer, twin)


@bounded
@given(cases(rounding=False))
def test_an_optimizer_for_each_is_one_for_all(case):
    params, twins = parameters(case.begins()), parameters(case.begins())
    if case.noisy:
        return
    optimizer = case.make(params)
    run(case, params, optimizer)
    for i, other in enumerate(twins):
        twin = case.make([other])
        for step in range(STEPS):
            other.grad = case.gradients(step)[i]
            twin.step()
        assert_same(params[i : i + 1], [other], optimizer, twin)


@bounded
@given(cases(), st.data())
def test_groups_do_not_matter(case, data):
    params, twins = parameters(case.begins()), parameters(case.begins())
    cut = data.draw(st.integers(0, len(params)))
    optimizer = case.make(params)
    twin = case.make([{"params": part} for part in (twins[:cut], twins[cut:]) if part])
    run(case, params, optimizer)
    run(case, twins, twin)
    assert_same(params, twins, optimizer, twin)


@bounded
@given(cases(), st.integers(1, 40))
def test_the_size_of_pieces_does_not_matter(case, limit):
    def stepped(size):
        with (
            mock.patch.object(chunks, "chunk_length", return_value=size),
            mock.patch.object(chunks, "SMALL", min(size, chunks.SMALL) - 1),
        ):
            params = parameters(
                v.transpose(0, -1).contiguous().transpose(0, -1) if v.dim() > 2 else v for v in case.begins()
            )
            optimizer = case.make(params)
            run(case, params, optimizer)
        return params, optimizer

    (params, optimizer), (twins, twin) = stepped(limit), stepped(1 << 18)
    assert_same(params, twins, optimizer, twin)


@bounded
@given(cases(names=ELEMENT, rounding=False, tensors=1, shape=lines), st.data())
def test_shards_of_an_element_rule_are_the_whole(case, data):
    (count,) = case.shapes[0]
    cuts = data.draw(st.lists(st.integers(0, count), max_size=6).map(sorted))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    whole = parameters(case.begins())
    shards = parameters(s.clone() for s in case.begins()[0].split(sizes))
    optimizer, twin = case.make(whole), case.make(shards)
    for step in range(STEPS):
        gradient = case.gradients(step)[0]
        whole[0].grad = gradient
        for shard, part in zip(shards, gradient.split(sizes), strict=True):
            shard.grad = part.clone()
        optimizer.step()
        twin.step()
    assert same(torch.cat([s.detach() for s in shards]), whole[0].detach())
    for name, value in optimizer.state.get(whole[0], {}).items():
        if value.dim() > 0:
            assert same(torch.cat([twin.state[s][name] for s in shards if s.numel()]), value)
