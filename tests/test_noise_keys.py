"""Which parameter draws which noise: it follows the name, so it does not depend on the other parameters."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steepest
from steepest.random import bits32, derive_key, stochastic_round, tensor_word

NAMES = ["embed.weight", "layers.0.weight", "layers.1.weight", "head.weight"]
SHAPES = [(9, 4), (6, 5), (6, 5), (7,)]
STOCHASTIC: dict[str, Any] = {"rounding": "stochastic", "seed": 3}
RULES: dict[str, dict[str, Any]] = {
    "lion": {},
    "lion, counted on the device": {"capturable": True, "compile": False},
    "simba_leaky": {},
    "muon": {"compile": False, "bucket_bytes": 1},
}


def word_of(name: str) -> int:
    """The documented word, unsigned."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def trained(case: str, names: list[str], renamed: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Three steps of the parameters of these names."""
    params = {}
    for at, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True)):
        if name in names:
            start = torch.randn(shape, generator=torch.Generator().manual_seed(at))
            params[name] = Parameter(start.bfloat16())
    named = [((renamed or {}).get(name, name), params[name]) for name in names]
    options = {"lr": 0.05, **STOCHASTIC, **RULES[case]}
    if case == "muon":  # the vector is not its
        named = [(name, param) for name, param in named if param.dim() == 2]
    optimizer = steepest.create(case.partition(",")[0], named, **options)
    for step in range(3):
        for name, param in params.items():
            generator = torch.Generator().manual_seed(100 * step + NAMES.index(name))
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("case", RULES)
def test_a_pipeline_stage_draws_what_one_optimizer_of_all_parameters_draws(case: str):
    every = trained(case, NAMES)
    for stage in (NAMES[:2], NAMES[2:], NAMES[::-1]):
        assert all(torch.equal(param, every[name]) for name, param in trained(case, stage).items())


def test_the_order_of_unnamed_parameters_matters():
    """The negative control: their noise follows the number."""
    params = [Parameter(torch.ones(64).bfloat16()) for _ in range(2)]
    for param in params:
        param.grad = torch.full_like(param, 1.0)
        steepest.SignGSD([param], lr=2.0**-10, weight_decay=0.0, **STOCHASTIC).step()
    assert torch.equal(*params)
    for param in params:
        param.data.fill_(1)
    steepest.SignGSD(params, lr=2.0**-10, weight_decay=0.0, **STOCHASTIC).step()
    assert not torch.equal(*params)


def drawn(params: list[Any], on_device: bool = False) -> None:
    options: dict[str, Any] = {"capturable": True, "compile": False} if on_device else {}
    optimizer = steepest.SGD(params, lr=0.1, momentum=0.0, **STOCHASTIC, **options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def rounded(word: int) -> torch.Tensor:
    bits = bits32(derive_key(3, word, 1), torch.arange(64), stream=7)
    return stochastic_round(torch.full((64,), 0.9), torch.bfloat16, bits)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("layer.weight", "layer.weight"),
        ("module.module.layer.weight", "layer.weight"),
        ("_orig_mod.layer._checkpoint_wrapped_module.weight", "layer.weight"),
        ("submodule.weight", "submodule.weight"),
        ("layer.module", "layer.module"),
        ("größe", "größe"),
    ],
)
def test_the_word_is_a_hash_of_the_name_without_wrappers(name: str, plain: str, on_device: bool):
    param = Parameter(torch.ones(64).bfloat16())
    drawn([(name, param)], on_device)
    assert torch.equal(param, rounded(word_of(plain)))
    assert tensor_word(name) % 2**64 == word_of(plain)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_unnamed_parameters_are_keyed_by_their_number(on_device: bool):
    params = [Parameter(torch.ones(64).bfloat16()) for _ in range(4)]
    drawn([{"params": params[:1]}, {"params": params[1:]}], on_device)
    for ordinal, param in enumerate(params):
        assert torch.equal(param, rounded(ordinal))


def test_parameters_of_one_name_draw_apart():
    """As those of two models in one optimizer, in one group or in two; torch takes them."""
    params = [Parameter(torch.ones(64).bfloat16()) for _ in range(4)]
    named = [("weight", param) for param in params[:2]]
    drawn([{"params": named}, {"params": [("module.weight", params[2])]}, {"params": [("bias", params[3])]}])
    assert torch.equal(params[0], rounded(word_of("weight")))
    assert torch.equal(params[3], rounded(word_of("bias")))
    assert len({tuple(param.tolist()) for param in params}) == 4


def test_names_that_arrive_with_a_checkpoint_or_leave_with_a_group_are_noticed():
    params = [Parameter(torch.ones(64).bfloat16()) for _ in range(2)]
    optimizer = steepest.SGD([("a", params[0])], lr=0.1, momentum=0.0, **STOCHASTIC)
    optimizer.add_param_group({"params": [("b", params[1])]})
    start = optimizer.state_dict()

    def step() -> None:
        for param in params:
            param.data.fill_(1)
            param.grad = torch.ones_like(param)
        optimizer.step()

    step()
    assert torch.equal(params[1], rounded(word_of("b")))
    start["param_groups"][1]["param_names"] = ["c"]
    optimizer.load_state_dict(start)
    step()
    assert torch.equal(params[1], rounded(word_of("c")))
    del optimizer.param_groups[0]
    optimizer.param_groups[0]["param_names"][0] = "d"
    optimizer.state.clear()
    step()
    assert torch.equal(params[1], rounded(word_of("d")))
