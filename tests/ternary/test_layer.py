"""TernaryLinear and BinaryLinear against a dense linear layer with the same weights, in float64."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loops import for_each
from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear, chunks
from steepest.ternary.linear_op import ternary_linear

from .models import accumulators, has_votes

KINDS = [TernaryLinear, BinaryLinear]
SCALES = ["row", "tensor", "group"]
SHAPES = [(1, 1), (3, 2), (4, 4), (5, 7), (13, 9), (64, 33), (130, 6)]


def layer_of(columns, rows, scale="row", *, kind=TernaryLinear, bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = kind(columns, rows, bias, scale, group_size=5, dtype=dtype)
    with torch.no_grad():
        # Scales of both signs, none like another.
        layer.scale.copy_(torch.randn(layer.scale.shape))
    return layer


def dense_weight(layer):
    """s∘T with the scales in the graph: written here once more, element by element."""
    values = layer.unpack().to(layer.scale.dtype)
    rows = []
    for row in range(layer.out_features):
        scales = [
            layer.scale[0]
            if layer.scale.shape == (1,)
            else layer.scale[row]
            if layer.scale.dim() == 1
            else layer.scale[row, column // layer.group_size]
            for column in range(layer.in_features)
        ]
        rows.append(torch.stack(scales) * values[row])
    return torch.stack(rows)


@for_each("attached", [False, True])
@for_each("scale", SCALES)
@for_each("kind", KINDS)
@for_each(("columns", "rows"), SHAPES)
def test_outputs_and_gradients_are_those_of_the_dense_weight(columns, rows, kind, scale, attached):
    layer = layer_of(columns, rows, scale, kind=kind)
    flip = TernaryFlip(layer) if attached else None
    x = torch.randn(3, 2, columns, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(3, 2, rows, dtype=torch.float64)
    found = torch.autograd.grad(layer(x), [x, layer.scale, layer.bias], pull)
    expected_y = F.linear(x, dense_weight(layer), layer.bias)
    expected = torch.autograd.grad(expected_y, [x, layer.scale, layer.bias], pull)
    torch.testing.assert_close(layer(x), expected_y, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert flip is None or has_votes(flip)


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_change_nothing(kind, scale, votes, monkeypatch):
    def run():
        layer = layer_of(24, 11, scale, kind=kind)
        flip = TernaryFlip(layer, votes=votes)
        torch.manual_seed(1)
        x = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        return y, x.grad, layer.scale.grad, flip.targets.buffers[""].pending

    whole = run()
    for limit in ("", "_THICK", "_WHOLE"):
        monkeypatch.setattr(chunks, f"{limit}_BLOCK_ON_CPU", 2 * 24)
    monkeypatch.setattr(chunks, "_CHUNK_ON_CPU", 7)
    assert len(chunks.row_blocks(11, 24, torch.device("cpu"), 6, whole=True)) == 6
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_blocks_are_as_thick_as_their_inputs_and_whole_where_a_cut_costs_a_pass():
    cpu = torch.device("cpu")
    for inputs, rows in ((0, 512), (512, 512), (600, 600), (4000, 1024)):
        assert chunks.row_blocks(4096, 1024, cpu, inputs)[0] == slice(0, rows)
    assert chunks.row_blocks(4096, 1024, cpu, whole=True) == [slice(0, 4096)]
    assert chunks.row_blocks(4097, 1024, cpu, whole=True)[0] == slice(0, 512)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_gradcheck(kind):
    layer = layer_of(6, 3, "group", kind=kind)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, scale: ternary_linear(x, layer.packed, scale, 6, 5, None, kind.bits), (x, layer.scale)
    )


@pytest.mark.parametrize(
    ("kind", "scale"), [*((TernaryLinear, scale) for scale in SCALES), (BinaryLinear, "row")]
)
def test_the_operator_passes_opcheck(kind, scale):
    layer = layer_of(6, 3, scale, kind=kind, dtype=torch.float32)
    x = torch.randn(2, 4, 6, requires_grad=True)
    torch.library.opcheck(ternary_linear, (x, layer.packed, layer.scale, 6, 5, None, kind.bits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_initial_weights_are_rounded_and_keep_their_energy(kind, scale):
    linear = nn.Linear(23, 8)
    linear.weight.data[0, 0] = linear.weight.data[7, 22] = 0.0
    layer = kind.from_linear(linear, scale, group_size=5)
    weight, dense, values = linear.weight.double(), layer.dense().double(), layer.unpack()
    extents = {
        "row": [(row, slice(None)) for row in range(8)],
        "tensor": [(slice(None), slice(None))],
        "group": [(row, slice(at, at + 5)) for row in range(8) for at in range(0, 23, 5)],
    }[scale]
    for extent in extents:
        part = weight[extent]
        expected = (
            1.0 - 2.0 * (part < 0)
            if kind is BinaryLinear
            else (part / part.abs().mean()).round().clamp(-1, 1)
        )
        assert torch.equal(values[extent].double(), expected)
        # The energy of the weights is the outputs' variance, for inputs that are alike.
        torch.testing.assert_close(dense[extent].square().sum(), part.square().sum(), rtol=1e-5, atol=0)
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_layer_is_a_fresh_linear_layer_rounded(kind):
    torch.manual_seed(3)
    layer = kind(20, 30)
    torch.manual_seed(3)
    expected = kind.from_linear(nn.Linear(20, 30))
    assert torch.equal(layer.packed, expected.packed)
    assert torch.equal(layer.scale, expected.scale)
    assert torch.equal(layer.bias, expected.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_keep_the_variance_of_a_dense_layers(kind):
    torch.manual_seed(0)
    linear, x = nn.Linear(512, 512, bias=False), torch.randn(256, 512)
    ratio = kind.from_linear(linear)(x).var() / linear(x).var()
    assert abs(ratio.item() - 1) < 0.02


@pytest.mark.parametrize("scale", SCALES)
def test_ternary_weights_of_zero_can_still_learn(scale):
    linear = nn.Linear(6, 4)
    nn.init.zeros_(linear.weight)
    layer = TernaryLinear.from_linear(linear, scale)
    assert not layer.unpack().any()
    assert bool((layer.scale > 0).all())
    assert layer.scale.isfinite().all()


@pytest.mark.parametrize("scale", SCALES)
def test_binary_weights_of_zero_give_zero_and_can_still_learn(scale):
    # There is no 0 among them, so their scale is 0: it moves first, and then they can.
    linear = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(linear.weight)
    layer = BinaryLinear.from_linear(linear, scale)
    flip = TernaryFlip(layer, 1)
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    assert not layer(x).any()
    before = layer.unpack()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        (layer(x) - y).square().mean().backward()
        for each in (optimizer, flip):
            each.step()
            each.zero_grad()
    assert layer(x).any()
    assert not torch.equal(layer.unpack(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near_to_the_dense_layers(kind, dtype):
    layer = layer_of(64, 16, kind=kind, dtype=dtype)
    x = torch.randn(8, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, layer.dense(), layer.bias), rtol=0.03, atol=0.1)
    y.sum().backward()
    assert x.grad.dtype == layer.scale.grad.dtype == dtype


def test_autocast_computes_in_its_dtype_and_gives_float32_gradients():
    layer = layer_of(64, 16, dtype=torch.float32)
    flip = TernaryFlip(layer)
    x = torch.randn(32, 64, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.15)
    flip.zero_grad()
    y.float().square().sum().backward()
    assert layer.scale.grad.dtype == x.grad.dtype == torch.float32
    rounded = flip.targets.buffers[""].pending.clone()
    flip.zero_grad()
    exact.square().sum().backward()
    # bfloat16 can turn the sign of small gradients only.
    assert (rounded == flip.targets.buffers[""].pending).float().mean() > 0.97


def test_autocast_leaves_float64_alone():
    layer = layer_of(64, 16)
    x = torch.randn(8, 64, dtype=torch.float64)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_through_a_file_and_fit_another_layer(kind):
    layer = layer_of(13, 5, "group", kind=kind)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    sealed = {"checksum"} if kind is BinaryLinear else set()
    assert set(state) == {"packed", "scale", "bias", "votes", "_extra_state"} | sealed
    other = layer_of(13, 5, "group", kind=kind, seed=9)
    other.load_state_dict(state)
    x = torch.randn(3, 13, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_saved_before_there_were_votes_or_binary_layers_load(assign):
    layer, other = TernaryLinear(13, 5), TernaryLinear(13, 5, device="meta" if assign else "cpu")
    state = layer.state_dict()
    del state["votes"]
    state["_extra_state"] = torch.tensor([13, 5, 0])
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.packed, layer.packed)
    assert other.votes.tolist() == [0.0]
    assert other.votes.requires_grad
    with pytest.raises(RuntimeError, match=r"\[13, 5, 0, 2\], but this layer has \[13, 5, 0, 1\]"):
        BinaryLinear(13, 5).load_state_dict(state)


@pytest.mark.parametrize(("kind", "other"), [KINDS, KINDS[::-1]])
def test_weights_of_the_other_kind_are_refused_even_where_bytes_are_as_many(kind, other):
    layer = kind(4, 5)
    before = layer.packed.clone()
    with pytest.raises(RuntimeError, match=r"but this layer has \[4, 5, 0, "):
        layer.load_state_dict(other(4, 5).state_dict())
    assert torch.equal(layer.packed, before)


def stray_filling(state):
    state["0.packed"][0, -1] |= 0b11_00_00_00


def stray_code(state):
    state["0.packed"][0, 0] = 0b10


def floats(state):
    state["0.packed"] = state["0.packed"].float()


@pytest.mark.parametrize(
    ("columns", "group_size", "change", "says"),
    [
        (14, 5, None, r"\[13, 5, 5, 2\], but this layer has \[14, 5, 5, 2\]"),
        (13, 6, None, r"\[13, 5, 5, 2\], but this layer has \[13, 5, 6, 2\]"),
        (13, 5, stray_filling, "packed holds numbers beyond the 13"),
        (13, 5, stray_code, "packed holds the code 10"),
        (13, 5, floats, "got torch.float32"),
    ],
)
def test_weights_that_are_not_the_layers_are_refused(columns, group_size, change, says):
    state = nn.Sequential(TernaryLinear(13, 5, scale="group", group_size=5)).state_dict()
    if change is not None:
        change(state)
    model = nn.Sequential(TernaryLinear(columns, 5, scale="group", group_size=group_size))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"ternary layer '0': .*{says}"):
            model.load_state_dict(state, strict=strict)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_leaves_the_packed_weights_alone(kind):
    layer = layer_of(13, 5, kind=kind, dtype=torch.float32)
    before = layer.packed.clone()
    layer.to(torch.bfloat16)
    assert layer.packed.dtype == torch.uint8
    assert torch.equal(layer.packed, before)
    assert layer.scale.dtype == torch.bfloat16


def test_one_number_stands_for_the_weights_among_the_parameters_and_a_copy_is_its_own():
    layer = layer_of(13, 5)
    assert [name for name, _ in layer.named_parameters()] == ["scale", "bias", "votes"]
    assert layer.votes.tolist() == [0.0]
    twin = copy.deepcopy(layer)
    twin.set_ternary(torch.zeros(5, 13))
    assert layer.unpack().any()


@pytest.mark.parametrize("nonfinite", ["ignore", "skip", "raise"])
@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_the_gradient_of_votes_says_whether_that_of_the_weights_is_finite(bad, nonfinite):
    layer = layer_of(3, 2, dtype=torch.float32)
    layer(torch.tensor([[1.0, bad, 1.0]])).sum().backward()
    # Nobody asks.
    assert layer.votes.grad.tolist() == [0.0]
    flip = TernaryFlip(layer, nonfinite=nonfinite)
    layer.zero_grad()
    layer(torch.tensor([[1.0, bad, 1.0]])).sum().backward()
    found = layer.votes.grad.item()
    assert math.isnan(found) if nonfinite != "ignore" and bad != 1 else found == 0
    # As any gradient, it adds up.
    layer(torch.ones(1, 3)).sum().backward()
    assert math.isnan(layer.votes.grad.item()) == math.isnan(found)
    assert has_votes(flip)


def test_a_model_freezes_its_weights_as_all_parameters():
    model = nn.Sequential(layer_of(3, 2), nn.Linear(2, 2, dtype=torch.float64))
    flip = TernaryFlip(model, 1)
    model.requires_grad_(False)
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert model[0].votes.grad is None
    assert not has_votes(flip)
    model.requires_grad_(True)
    model(x).sum().backward()
    assert has_votes(flip)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_layer_is_given_back(kind):
    layer = layer_of(13, 5, kind=kind, dtype=torch.float32)
    x = torch.randn(4, 13)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))


def test_on_the_meta_device_a_layer_has_shapes_and_no_numbers():
    layer = TernaryLinear(10, 4, scale="group", group_size=3, device="meta")
    assert layer.packed.shape == (4, 3)
    assert layer.scale.shape == (4, 4)
    assert layer(torch.empty(2, 10, device="meta")).shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"in_features": 0}, "in_features must be an integer ≥ 1, got 0"),
        ({"out_features": 2.0}, "out_features must be an integer ≥ 1, got 2.0"),
        ({"scale": "column"}, "'column'"),
        ({"scale": "group", "group_size": 0}, "group_size must be an integer ≥ 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        TernaryLinear(**{"in_features": 4, "out_features": 4, **arguments})


def test_wrong_inputs_and_wrong_weights_are_refused():
    layer = layer_of(4, 3)
    with pytest.raises(ValueError, match=r"TernaryLinear\(4, 3\) .*got inputs of shape \(2, 5\)"):
        layer(torch.zeros(2, 5))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"takes floating-point inputs .*{dtype}"):
            layer(torch.ones(2, 4, dtype=dtype))
    with pytest.raises(ValueError, match=r"inputs of shape \(\)"):
        layer(torch.ones(()))
    before = layer.packed.clone()
    for wrong in (torch.zeros(3, 5), torch.full((3, 4), 0.5)):
        with pytest.raises(ValueError, match="T "):
            layer.set_ternary(wrong)
    assert torch.equal(layer.packed, before)


def test_binary_weights_are_set_from_signs_only():
    layer = BinaryLinear(9, 3)
    values = 2 * torch.randint(0, 2, (3, 9)) - 1
    layer.set_ternary(values)
    assert torch.equal(layer.unpack(), values.to(torch.int8))
    values[1, 1] = 0
    before = layer.packed.clone()
    with pytest.raises(ValueError, match="T must hold −1 and 1 only"):
        layer.set_ternary(values)
    assert torch.equal(layer.packed, before)
    other = BinaryLinear(9, 3)
    other.load_base3(layer.to_base3())
    assert torch.equal(other.packed, layer.packed)


def test_empty_batches_pass_and_vote_for_nothing():
    layer = layer_of(4, 3)
    flip = TernaryFlip(layer, zero_pull=1.0)
    before = layer.packed.clone()
    x = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 4)
    assert not layer.scale.grad.any()
    # Not even the pull toward zero, which comes with votes, acts.
    assert not has_votes(flip)
    flip.step()
    assert not accumulators(flip)[""].any()
    assert torch.equal(layer.packed, before)


def test_bytes_are_two_bits_a_weight_or_one():
    layer = TernaryLinear(1024, 256)
    assert layer.packed.nbytes * 4 == BinaryLinear(1024, 256).packed.nbytes * 8 == 1024 * 256
    assert math.isclose(layer.to_base3().numel() * 8 / (1024 * 256), 1.6, rel_tol=1e-4)


def test_a_single_scale_saved_without_dimensions_loads():
    layer, other = layer_of(5, 3, "tensor"), layer_of(5, 3, "tensor", seed=1)
    saved = layer.state_dict()
    saved["scale"] = saved["scale"].view(())
    other.load_state_dict(saved)
    assert torch.equal(other.scale, layer.scale)
    assert layer.scale.shape == (1,)
