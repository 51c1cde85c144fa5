"""Which layers become ternary, which do not and why."""

import pytest
import torch
from torch import nn

from steepest.ternary import BinaryLinear, TernaryLinear, densify, ternarize


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_hidden_layers_become_ternary_and_the_tied_head_stays():
    model = Tied()
    done = ternarize(model)
    assert dict(done.replaced) == {"up": (8, 4), "down": (4, 8)}
    assert "tied to embedding.weight" in done.kept["head"]
    assert isinstance(model.up, TernaryLinear)
    assert model.head.weight is model.embedding.weight
    assert done.weights == 64
    assert "64 weights are ternary" in str(done)


def test_a_head_of_its_own_stays_unless_it_is_named():
    def made():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    model = made()
    assert set(ternarize(model).replaced) == {"0"}
    assert type(model[2]) is nn.Linear
    model = made()
    assert set(ternarize(model, include="*").replaced) == {"0", "2"}
    model = made()
    assert set(ternarize(model, include=["0", "2"], exclude="2").replaced) == {"0"}


def test_a_shared_layer_is_replaced_once_and_everywhere():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer), nn.Linear(4, 2))
    assert set(ternarize(model).replaced) == {"0"}
    assert isinstance(model[0], TernaryLinear)
    assert model[2][0] is model[0]


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def hooked_backward():
    layer = nn.Linear(4, 4)
    layer.register_full_backward_pre_hook(lambda *_: None)
    return layer


def hooked_weight():
    layer = nn.Linear(4, 4)
    layer.weight.register_hook(lambda grad: None)
    return layer


def hooked_after():
    layer = nn.Linear(4, 4)
    layer.bias.register_post_accumulate_grad_hook(lambda param: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "name", "why"),
    [
        (lambda: nn.MultiheadAttention(4, 2), "0.out_proj", "NonDynamicallyQuantizableLinear"),
        (lambda: nn.TransformerEncoderLayer(4, 2), "0.linear1", "TransformerEncoderLayer reads"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "0", "ParametrizedLinear"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "0", "computed from other parameters"),
        (hooked, "0", "hooks"),
        (hooked_backward, "0", "hooks"),
        (hooked_weight, "0", "hooks"),
        (hooked_after, "0", "hooks"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_cannot_be_replaced_say_why(layer, name, why):
    model = nn.Sequential(layer(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert why in ternarize(model).kept[name]
    model = nn.Sequential(layer(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=f"{name}.*cannot be replaced: .*nothing was changed"):
        ternarize(model, include=[name, "1"])
    assert type(model[1]) is nn.Linear


def test_globs_that_match_nothing_and_models_with_nothing_are_refused():
    with pytest.raises(ValueError, match=r"include: 'upp' matches no linear layer .*did you mean 'up'"):
        ternarize(Tied(), include="upp")
    with pytest.raises(ValueError, match=r"exclude: 'x\.\*' matches no linear layer"):
        ternarize(Tied(), exclude="x.*")
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        ternarize(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(ValueError, match="from_linear"):
        ternarize(nn.Linear(2, 2))


def test_binary_layers_on_request():
    model = Tied()
    linear = model.up
    done = ternarize(model, bits=1)
    assert type(model.up) is type(model.down) is BinaryLinear
    assert torch.equal(model.up.unpack(), torch.where(linear.weight < 0, -1, 1))
    assert str(done).splitlines()[0].split() == ["up", "8×4,", "binary"]
    assert "64 weights are binary" in str(done)
    with pytest.raises(ValueError, match=r"bits must be 1 \(binary\) or 2 \(ternary\), got 3"):
        ternarize(Tied(), bits=3)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("scale", ["row", "tensor", "group"])
def test_there_and_back(scale, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    ternarize(model, scale=scale, group_size=5, bits=bits)
    assert not model[0].training
    x = torch.randn(5, 12)
    before = model(x)
    assert densify(model) == ["0", "2"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", [TernaryLinear, BinaryLinear])
def test_dtype_device_and_freezing_are_the_linear_layers(kind):
    linear = nn.Linear(6, 4, dtype=torch.bfloat16)
    linear.weight.requires_grad_(False)
    layer = kind.from_linear(linear)
    assert layer.scale.dtype == layer.bias.dtype == torch.bfloat16
    assert not layer.scale.requires_grad
    assert not layer.votes.requires_grad
    assert layer.bias.requires_grad
    assert [p.requires_grad for p in layer.to_linear().parameters()] == [False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_replaced(bad):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight.data[1, 2] = bad
    with pytest.raises(ValueError, match="weight of '2' has infinite or NaN elements; nothing was changed"):
        ternarize(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="infinite or NaN"):
        TernaryLinear.from_linear(model[2])
    assert set(ternarize(model, exclude="2").replaced) == {"0"}
