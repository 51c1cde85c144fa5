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


# -- what is no nn.Linear


class Conv1D(nn.Module):
    """What Hugging Face's GPT-2 has for linear layers."""

    def __init__(self, nf: int, nx: int, bias: bool = True):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf)) if bias else None

    def forward(self, x):
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_conv1d_becomes_what_its_linear_twin_becomes(bits, bias):
    ours, theirs = Conv1D(6, 4, bias), nn.Linear(4, 6, bias)
    theirs.weight.data = ours.weight.detach().T.clone()
    if bias:
        theirs.bias.data = ours.bias.detach().clone()
    ours.weight.requires_grad_(False)
    theirs.weight.requires_grad_(False)
    models = [nn.Sequential(each, nn.ReLU(), nn.Linear(6, 2)).eval() for each in (ours, theirs)]
    for model in models:
        assert dict(ternarize(model, bits=bits).replaced) == {"0": (6, 4)}
    one, other = (model[0] for model in models)
    assert torch.equal(one.unpack(), other.unpack())
    assert torch.equal(one.scale, other.scale)
    assert one.votes.requires_grad is other.votes.requires_grad is False
    assert not one.training
    x = torch.randn(3, 4)
    assert torch.equal(one(x), other(x))


def test_a_tied_or_hooked_conv1d_stays():
    model = nn.Sequential(Conv1D(4, 4), Conv1D(4, 4), Conv1D(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"0: its weight is tied to 1.weight; 1: .*; 2: it, or a parameter"):
        ternarize(model)


def test_what_stays_float_is_listed_with_its_size():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 3
            self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(10, 4), nn.LayerNorm(4)
            self.conv, self.rnn = nn.Conv1d(4, 4, 3), nn.RNN(4, 4)
            self.linear, self.experts = nn.Linear(4, 4), Experts()
            self.lm_head = nn.Linear(4, 10)

    done = ternarize(Model())
    assert set(done.replaced) == {"linear"}
    assert {name: shape for name, (shape, _) in done.others.items()} == {
        "conv.weight": (4, 4, 3),
        "rnn.weight_ih_l0": (4, 4),
        "rnn.weight_hh_l0": (4, 4),
        "experts.up": (3, 8, 4),
        "experts.down": (3, 4, 8),
    }
    text = str(done)
    assert "experts.up        3×8×4, stays float: experts: 3 experts' matrices of Experts" in text
    assert text.endswith("16 weights are ternary; 272 of hidden layers that are not linear stay float")


class ReadsTheDtype(nn.Module):
    """As T5's feed-forward layers do, which let the second weight be of another dtype."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        hidden = self.wi(x).relu()
        return self.wo(hidden.to(self.wo.weight.dtype))


def test_a_layer_whose_weight_its_parents_forward_names_stays_float():
    model = nn.Sequential(ReadsTheDtype(), nn.ReLU(), nn.Linear(8, 2))
    done = ternarize(model)
    assert list(done.replaced) == ["0.wi"]
    assert done.kept["0.wo"] == "ReadsTheDtype reads its weight without calling its forward"
    model(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"'0.wo' cannot be replaced: ReadsTheDtype reads its weight"):
        ternarize(nn.Sequential(ReadsTheDtype(), nn.ReLU()), include="*.wo")
