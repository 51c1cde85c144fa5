"""The Triton kernel in its interpreter, against float64, and compiled for devices that need not be there."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import steepest.linalg
from steepest.linalg import gram, newton_schulz, preferred_symmetric_kernel, symmetric_product
from steepest.linalg.symmetric import mirrored_product

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is there for Linux alone"
)
NAME = "steepest.linalg.triton_symmetric"
# Of the largest |entry|. The interpreter cuts a float32 off to make it bfloat16, where a device rounds.
CLOSE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# What a block may have of shared memory on the least of the devices that are served.
SMALLEST_SHARED = 99 * 1024


@pytest.fixture
def kernel(monkeypatch):
    """The kernel's file, imported anew so that its kernel is interpreted, and preferred."""
    before = importlib.import_module(NAME)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, NAME, before)
    del sys.modules[NAME]
    interpreted = importlib.import_module(NAME)
    preferred_symmetric_kernel("triton")
    yield interpreted
    preferred_symmetric_kernel("default")
    monkeypatch.undo()
    steepest.linalg.triton_symmetric = before


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def far_from(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@needs_triton
@pytest.mark.parametrize(
    ("rows", "inner", "batch", "dtype"),
    [
        *((*size, (), dtype) for size in [(1, 1), (16, 32), (33, 7), (70, 40)] for dtype in CLOSE),
        # A stack is one launch of the same program, whatever its dtype.
        *((*size, batch, torch.bfloat16) for size in [(1, 1), (33, 7)] for batch in [(3,), (2, 2)]),
    ],
    ids=str,
)
def test_it_is_the_product_in_float64_and_exactly_symmetric(kernel, rows, inner, batch, dtype):
    """One tile and several, whole ones and ragged ones, with an addend that is not symmetric above."""
    tiles = kernel.Tiles(16, 16, 4, 2)
    x, added = randn(*batch, rows, inner, dtype=dtype), randn(*batch, rows, rows, dtype=dtype, seed=1)
    bare = x.double() @ x.double().mT
    lower = added.double().tril()
    expected = 0.5 * (lower + lower.tril(-1).mT) - 2.0 * bare
    for found, right in (
        (kernel.mirrored(x, x.mT, tiles=tiles), bare),
        (kernel.mirrored(x, x.mT, alpha=-2.0, tiles=tiles), -2.0 * bare),
        (kernel.mirrored(x, x.mT, added=added, alpha=-2.0, beta=0.5, tiles=tiles), expected),
        (kernel.mirrored(x, x.mT, added=added * torch.nan, beta=0.0, tiles=tiles), bare),
    ):
        assert found.dtype == dtype
        assert torch.equal(found, found.mT)
        assert far_from(found, right) < CLOSE[dtype]


@needs_triton
def test_any_layout_gives_the_same_bits(kernel):
    tiles = kernel.Tiles(16, 16, 4, 2)
    x = randn(2, 40, 24)
    gappy = torch.empty(2, 80, 48)[:, ::2, ::2].copy_(x)
    expected = kernel.mirrored(x, x.mT, added=x @ x.mT, tiles=tiles)
    for left in (x, x.mT.contiguous().mT, gappy, torch.stack([x, x], 1)[:, 0]):
        for right in (x.mT, x.mT.contiguous(), gappy.mT):
            for added in (x @ x.mT, (x @ x.mT).mT.contiguous().mT):
                assert torch.equal(kernel.mirrored(left, right, added=added, tiles=tiles), expected)
    same = x[:1].expand(3, -1, -1)
    assert torch.equal(
        kernel.mirrored(same, same.mT, tiles=tiles)[2], kernel.mirrored(x, x.mT, tiles=tiles)[0]
    )


@needs_triton
def test_each_tile_is_found_by_its_number(kernel):
    """Of 5 × 5 tiles and more, each computed once: a sum over one column counts what is written."""
    for across in (5, 23):
        x = torch.arange(16.0 * across)[:, None]
        found = kernel.mirrored(x, x.mT, tiles=kernel.Tiles(16, 16, 4, 2))
        assert torch.equal(found, x @ x.mT)


@needs_triton
def test_nothing_to_sum_and_nothing_to_write(kernel):
    assert kernel.mirrored(torch.zeros(0, 4), torch.zeros(4, 0)).shape == (0, 0)
    assert torch.equal(kernel.mirrored(torch.zeros(5, 0), torch.zeros(0, 5)), torch.zeros(5, 5))
    x = randn(2, 40, 10)
    x[0, 3, 3] = torch.nan
    found = kernel.mirrored(x, x.mT)
    assert found[0].isnan().any()
    assert found[1].isfinite().all()


@needs_triton
@pytest.mark.parametrize("rows", [100, 150], ids=["too small", "served"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_public_products_go_through_it(kernel, monkeypatch, rows, dtype):
    calls = []
    through = kernel.mirrored
    monkeypatch.setattr(kernel, "mirrored", lambda *a, **k: calls.append(1) or through(*a, **k))
    x = randn(2, rows, 20, dtype=dtype) / 20
    r = gram(x)
    assert far_from(r, x.double() @ x.double().mT) < CLOSE[dtype]
    found = symmetric_product(r, r, added=r, alpha=-0.5)
    assert torch.equal(found, found.mT)
    assert far_from(found, r.double() - 0.5 * r.double() @ r.double()) < CLOSE[dtype]
    assert len(calls) == (2 if rows > 128 else 0)


@needs_triton
def test_a_newton_schulz_iteration_through_it_is_the_one_without(kernel):
    x = randn(2, 130, 200)
    found = newton_schulz(x, "jordan", form="gram", dtype=torch.float32)
    preferred_symmetric_kernel("default")
    assert far_from(found, newton_schulz(x.double(), "jordan", form="plain")) < 1e-4


@needs_triton
def test_what_it_does_not_serve_goes_on_as_ever(kernel):
    x = randn(2, 200, 30)
    assert kernel.serves(x, x.mT, None)
    added = torch.zeros(2, 200, 200)
    for operands in (
        (x.double(), x.double().mT, None),
        (x, x.mT.bfloat16(), None),
        (x, x.mT, added.bfloat16()),
        (x, x.mT[:1], None),
        (x, x.mT[:, :29], None),
        (x, x.mT, added[0]),
        (x, x.mT, added[:, :1]),
        (x.to("meta"), x.mT.to("meta"), None),
    ):
        assert not kernel.serves(*operands)

    def of(each):
        return mirrored_product(each, each.mT)

    expected = 2 * (x.double() @ x.double().mT)
    assert far_from(torch.func.jvp(of, (x,), (x,))[1], expected) < 1e-6
    x.requires_grad_()
    backward = torch.autograd.grad(of(x).sum(), x)[0]
    assert far_from(backward, 2 * x.double().sum(-2, keepdim=True).expand(x.shape)) < 1e-5


@needs_triton
def test_compiled_code_has_the_plain_product(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "mirrored", lambda *a, **k: pytest.fail("a kernel in a graph"))
    x = randn(150, 20)
    found = torch.compile(lambda x: mirrored_product(x, x.mT), backend="eager")(x)
    assert far_from(found, x.double() @ x.double().mT) < 1e-6


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_devices_without_bfloat16_products_are_not_served(monkeypatch, capability, served):
    module = importlib.import_module(NAME)
    monkeypatch.setattr(module, "AVAILABLE", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module._runs_on(torch.device("cuda", 1)) is served
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's, whose devices are called cuda too
    assert not module._runs_on(torch.device("cuda", 1))


@needs_triton
def test_float32_is_multiplied_as_torch_is_told_to():
    module = importlib.import_module(NAME)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert module.tiles_of(torch.float32)[1] == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert module.tiles_of(torch.float32)[1] == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_choice_is_refused_by_name_and_stays(monkeypatch):
    with pytest.raises(ValueError, match="'default' or 'triton', got 'cublas'"):
        preferred_symmetric_kernel("cublas")
    monkeypatch.setattr(importlib.import_module(NAME), "AVAILABLE", False)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        preferred_symmetric_kernel("triton")
    assert preferred_symmetric_kernel() == "default"


def compiled(module, capability, dtype, precision, tiles, *, adds):
    """The kernel for operands laid out as X and Xᵀ are, made for a device that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = module.lower_tiles.arg_names
    constants = dict.fromkeys(("x_inner", "y_inner", "added_column"), 1) | {
        "ADDS": adds,
        "WIDENS": False,
        "PRECISION": precision,
        "SIZE": tiles.size,
        "DEEP": tiles.deep,
    }
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(("x", "y", "added", "out"), f"*{dtype}")
    kinds |= {"alpha": "fp32", "beta": "fp32"} | dict.fromkeys(constants, "constexpr")
    whole = [name for name in names if name not in {*constants, "alpha", "beta", "tiles"}]
    source = ASTSource(
        module.lower_tiles,
        kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "adds"),
    [(80, "bf16", True), (86, "fp32", True), (90, "bf16", False), (90, "tf32", True), (120, "fp16", True)],
)
def test_it_compiles_for_devices_and_fits_into_their_shared_memory(
    capability, dtype, adds, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = importlib.import_module(NAME)
    tiles = {"tf32": module._TF32, "fp32": module._FLOAT32}.get(dtype, module._HALF)
    precision = "tf32" if dtype == "tf32" else "ieee"
    made = compiled(module, capability, {"tf32": "fp32"}.get(dtype, dtype), precision, tiles, adds=adds)
    assert 0 < made.metadata.shared <= SMALLEST_SHARED
    tensor_cores = ("wgmma" if capability == 90 else "mma.sync") in made.asm["ptx"]
    assert tensor_cores == (dtype != "fp32")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("rows", "inner"), [(129, 5), (768, 2304), (1000, 333)])
def test_on_a_device(rows, inner, dtype):
    x = randn(2, rows, inner, dtype=dtype).cuda() / inner**0.5
    preferred_symmetric_kernel("triton")
    try:
        for one in (x, x.mT.contiguous().mT):
            r = gram(one)
            z = symmetric_product(r, r, added=r, alpha=-0.5)
            assert torch.equal(r, r.mT)
            assert torch.equal(z, symmetric_product(r, r, added=r, alpha=-0.5))
            assert far_from(r, x.double() @ x.double().mT) < 5 * CLOSE[dtype]
            assert far_from(z, r.double() - 0.5 * r.double() @ r.double()) < 5 * CLOSE[dtype]
    finally:
        preferred_symmetric_kernel("default")
