"""Steps with one-byte averages and split masters: exact where they must be, and the same in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from loops import for_each
from peak_memory import highest
from steepest.compile.available import compiler_available
from steepest.engine import chunks
from steepest.engine import compiled as compiled_passes
from steepest.formats.master import join

needs_compiler = pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler")
STOCHASTIC = {"state_dtype": "int8", "master": "split8", "rounding": "stochastic"}
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"state_dtype": "int8"},
    "split8, stochastic": STOCHASTIC,
    "split16": {"state_dtype": "int8", "master": "split16"},
}
METHODS = ["decoupled", "independent", "untied", "l2", "palm", "sign", "cautious"]


def _params(dtype: torch.dtype = torch.bfloat16, *, turned: bool = False) -> list[nn.Parameter]:
    made = []
    for seed, shape in enumerate([(96, 128), (48, 96), (70,), (64, 4, 4, 4)]):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        if turned and value.dim() == 2:
            value = value.t().contiguous().t()
        elif turned and value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        made.append(nn.Parameter(value))
    return made


def _set_gradients(params: list[nn.Parameter], step: int, *, factor: float = 1.0) -> None:
    for number, param in enumerate(params):
        draw = torch.Generator().manual_seed(100 * step + number)
        grad = factor * torch.randn(param.shape, generator=draw)
        param.grad = torch.empty_like(param).copy_(grad.to(torch.bfloat16))


def _run(name: str, params: list[nn.Parameter], steps: int = 4, **options: Any) -> steepest.Optimizer:
    if name in ("muon", "hyperball"):
        params = [param for param in params if param.dim() > 1]
    optimizer = steepest.create(name, params, lr=0.01, **options)
    for step in range(steps):
        _set_gradients(params, step)
        optimizer.step()
    return optimizer


def _equal(one: steepest.Optimizer, other: steepest.Optimizer) -> bool:
    pairs = [
        (a, b)
        for g, h in zip(one.param_groups, other.param_groups, strict=True)
        for a, b in zip(g["params"], h["params"], strict=True)
    ]
    return all(
        torch.equal(a, b)
        and one.state[a].keys() == other.state[b].keys()
        and all(torch.equal(one.state[a][key], other.state[b][key]) for key in one.state[a])
        for a, b in pairs
    )


# -- masters


def _masters(optimizer: steepest.Optimizer) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    return [join(param.detach(), optimizer.state[param]["correction"]) for param in params]


@for_each("method", METHODS)
@for_each("name", ["signgsd", "signum", "lion", "simba", "sgd", "sgd_sai", "adamw"])
def test_32_bits_of_a_bfloat16_parameter_are_the_float32_run(name, method):
    options = {"weight_decay_method": method, "weight_decay": 0.1, "state_dtype": torch.float32}
    half = _run(name, _params(), **options, master="split16")
    params = [nn.Parameter(param.detach().float()) for param in _params()]
    whole = steepest.create(name, params, lr=0.01, **options)
    for step in range(4):
        _set_gradients(params, step)
        whole.step()
    assert all(map(torch.equal, _masters(half), params))
    assert all(p.dtype == torch.bfloat16 for p in half.param_groups[0]["params"])


@pytest.mark.parametrize("name", ["muon", "hyperball"])
def test_matrix_rules_move_the_master_too(name):
    options = {"state_dtype": torch.float32, "ns_dtype": torch.float32}
    half = _run(name, _params(), **options, master="split16")
    params = [nn.Parameter(param.detach().float()) for param in _params() if param.dim() > 1]
    whole = steepest.create(name, params, lr=0.01, **options)
    for step in range(4):
        _set_gradients(params, step)
        whole.step()
    for master, param in zip(_masters(half), params, strict=True):
        assert torch.allclose(master, param, rtol=1e-5, atol=1e-7)
        # bfloat16 alone would be off by a thousand times as much
        assert not torch.allclose(master.bfloat16().float(), param, rtol=1e-5, atol=1e-7)


def test_24_bits_keep_small_updates_on_average_and_all_32_exactly():
    """2,000 updates of 1e-6·p; nearest rounding to 24 bits loses them, as documented."""
    moved = {}
    for words, options in {
        "stochastic": {"master": "split8", "rounding": "stochastic"},
        "nearest": {"master": "split8"},
        "split16": {"master": "split16"},
        "float32": {},
    }.items():
        dtype = torch.float32 if words == "float32" else torch.bfloat16
        weight = nn.Parameter(torch.full((512,), 1.5, dtype=dtype))
        optimizer = steepest.SGD([weight], lr=1e-6, momentum=0.0, weight_decay=0.0, **options)
        weight.grad = torch.full_like(weight, -1.5)
        for _ in range(2000):
            optimizer.step()
        correction = optimizer.state[weight].get("correction")
        master = weight.detach() if correction is None else join(weight.detach(), correction)
        moved[words] = float((master.double() - 1.5).mean() / (2000 * 1.5e-6))
    assert moved["stochastic"] == pytest.approx(1, abs=0.1)
    assert moved["split16"] == moved["float32"] == pytest.approx(1, abs=0.05)
    assert moved["nearest"] == 0


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_a_step_of_length_0_changes_no_bit_of_the_master(options):
    params = _params()
    optimizer = _run("adamw", params, **options)
    before = [param.clone() for param in params]
    old = [optimizer.state[param].get("correction", torch.zeros(1)).clone() for param in params]
    optimizer.param_groups[0]["lr"] = 0.0
    _set_gradients(params, 9)
    optimizer.step()
    assert all(map(torch.equal, before, params))
    new = [optimizer.state[param].get("correction", torch.zeros(1)) for param in params]
    assert all(map(torch.equal, old, new))


# -- averages


def test_without_gradients_nothing_moves_for_ever():
    params = [nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))]
    optimizer = steepest.AdamW(params, lr=0.1, weight_decay=0.0, state_dtype="int8")
    draw = torch.Generator().manual_seed(0)
    params[1].grad = torch.randn(64, 64, generator=draw)
    optimizer.step()
    params[1].grad.zero_()
    params[0].grad = torch.zeros(64, 64)
    for _ in range(2000):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(64, 64))
    assert params[1].isfinite().all()
    assert all(entry.isfinite().all() for entry in optimizer.state[params[1]].values())


@pytest.mark.parametrize("name", ["lion", "signum", "muon"])
@pytest.mark.parametrize("power", [-27, 27])
def test_steps_do_not_depend_on_the_gradients_size(name, power):
    runs = []
    for factor in (1.0, 2.0**power):
        weight = nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
        optimizer = steepest.create(name, [weight], lr=0.01, state_dtype="int8")
        for step in range(5):
            _set_gradients([weight], step, factor=factor)
            optimizer.step()
        runs.append((weight, optimizer.state[weight]["momentum_buffer" if name != "lion" else "exp_avg"]))
    (one, codes), (other, same) = runs
    assert torch.equal(codes, same)
    assert torch.equal(one, other) or (name == "muon" and torch.allclose(one, other, atol=1e-6))


# -- every mode is the same step


@needs_compiler
@pytest.mark.parametrize(("name", "words"), [("ademamix", "int8"), ("muon", "split16")])
def test_compiled_is_eager(name, words, monkeypatch):
    """In several pieces, too. Few formats, as each has to be compiled; tests/formats has others."""
    monkeypatch.setattr(compiled_passes, "_PIECE_ON_CPU", 4096)
    options = FORMATS[words]
    eager, compiled = (_run(name, _params()[:1], compile=wish, **options) for wish in (False, True))
    assert _equal(eager, compiled)


@needs_compiler
def test_compiled_steps_with_a_master_need_no_temporary_of_a_tensors_size():
    weight = nn.Parameter(torch.zeros(1 << 10, 1 << 11, dtype=torch.bfloat16))
    lion = steepest.Lion([weight], lr=0.01, compile=True, master="split16")
    weight.grad = torch.ones_like(weight)
    lion.step()
    assert highest(lion.step) <= 1 << 20


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["lion", "adamw", "muon"])
def test_chunks_of_any_length_are_the_same_step(name, options, monkeypatch):
    whole = _run(name, _params(), compile=False, **options)
    monkeypatch.setattr(chunks, "chunk_length", lambda *args, **kwargs: 256)
    assert _equal(whole, _run(name, _params(), compile=False, **options))


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_strides_of_parameters_do_not_matter(name, options):
    dense, turned = _run(name, _params(), **options), _run(name, _params(turned=True), **options)
    assert _equal(dense, turned)
    (first, *_) = turned.param_groups[0]["params"]
    assert not first.is_contiguous()
    average = turned.state[first]["exp_avg"]
    assert average.is_contiguous()


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_a_skipped_step_leaves_codes_scales_and_corrections(options):
    params = _params()
    optimizer = _run("adamw", params, nonfinite="skip", **options)
    before = {(p, key): value.clone() for p in params for key, value in optimizer.state[p].items()}
    values = [param.clone() for param in params]
    _set_gradients(params, 5)
    params[0].grad[0, 0] = float("nan")  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, values, params))
    assert all(torch.equal(optimizer.state[p][key], value) for (p, key), value in before.items())


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_in_backward_it_is_the_ordinary_step(options):
    def trained(released: bool) -> steepest.Optimizer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).bfloat16()
        optimizer = steepest.AdamW(model.named_parameters(), lr=0.01, **options)
        if released:
            steepest.release_gradients(model, optimizer)
        for step in range(3):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    assert _equal(trained(False), trained(True))


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_a_fused_parameter_steps_as_its_blocks_do(options):
    fused = nn.Parameter(_params()[0].detach())
    whole = steepest.Muon([("w", fused)], lr=0.01, views={"w": steepest.views.rows(32, 64)}, **options)
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split([32, 64])]
    apart = steepest.Muon(parts, lr=0.01, **options)
    for step in range(3):
        _set_gradients([fused], step)
        assert fused.grad is not None
        for part, grad in zip(parts, fused.grad.split([32, 64]), strict=True):
            part.grad = grad.clone()
        whole.step()
        apart.step()
    if "rounding" in options:  # noise is a parameter's own
        assert torch.allclose(fused.float(), torch.cat(parts).float(), rtol=0.01, atol=1e-3)
        return
    assert torch.equal(fused, torch.cat(parts))
    for name in ("momentum_buffer", "momentum_buffer_scale"):
        assert torch.equal(whole.state[fused][name], torch.cat([apart.state[part][name] for part in parts]))


# -- options


def test_state_goes_on_in_its_format_when_the_option_changes():
    params = _params(torch.float32)
    optimizer = _run("adamw", params, state_dtype="int8")
    optimizer.param_groups[0]["state_dtype"] = None
    _set_gradients(params, 7)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8
    floats = _run("adamw", params, state_dtype=None)
    floats.param_groups[0]["state_dtype"] = "int8"
    _set_gradients(params, 7)
    floats.step()
    assert floats.state[params[0]]["exp_avg"].dtype == torch.float32
