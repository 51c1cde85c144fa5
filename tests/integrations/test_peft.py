"""PEFT: adapters over packed weights."""

import pytest
import torch
from torch import nn

import steepest
from steepest.ternary import TernaryLinear

from .tiny import assert_same, llama, mlp, rows, run_examples, state, train

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapters():
    """The integration, where peft is installed."""
    pytest.importorskip("peft")
    from steepest.integrations import peft

    return peft


def config(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0", "3"], **options})


def ternary_mlp(**options):
    model = mlp()
    steepest.ternary.ternarize(model, **options)
    return model


def adapted(adapters, model, **options):
    from peft import get_peft_model

    made = get_peft_model(model, adapters.adapt_ternary(config(**options)))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in made.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide it
                param.copy_(torch.randn(param.shape, generator=draw))
    return made


@pytest.mark.parametrize("every", ["all-linear", "All-Linear"])
def test_all_linear_is_refused_with_what_to_pass(adapters, every):
    """PEFT itself looks for nn.Linear, finds none, and says that no target_modules were passed."""
    with pytest.raises(ValueError, match=r"finds nn.Linear only.*target_modules=\['q_proj'"):
        adapters.adapt_ternary(config(target_modules=every))
    adapters.adapt_ternary(config(target_modules=".*proj"))


@pytest.mark.parametrize("options", [{}, {"bits": 1}, {"scale": "group", "group_size": 3}], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_over_the_dense_weights(adapters, options, rslora):
    packed = adapted(adapters, ternary_mlp(**options), use_rslora=rslora)
    dense = ternary_mlp(**options)
    steepest.ternary.densify(dense)
    dense = adapted(adapters, dense, use_rslora=rslora)
    factors = {name: value for name, value in packed.state_dict().items() if "lora" in name}
    assert len(factors) == 4
    dense.load_state_dict(factors, strict=False)
    x, y = rows()
    outputs = []
    for model in (packed, dense):
        outputs.append(model(x))
        nn.functional.cross_entropy(outputs[-1], y).backward()
    torch.testing.assert_close(*outputs)
    theirs = dict(dense.named_parameters())
    trained = [name for name, param in packed.named_parameters() if param.grad is not None]
    assert trained == [name for name in theirs if "lora" in name]
    for name in trained:
        torch.testing.assert_close(packed.get_parameter(name).grad, theirs[name].grad)
    # The formula, too: W x + (alpha / r, or over √r) B A x.
    layer = packed.base_model.model[0]
    (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
    expected = nn.functional.linear(x, layer.base_layer.dense(), layer.base_layer.bias)
    expected = expected + (6 / (2**0.5 if rslora else 2)) * x @ a.weight.T @ b.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_packed_weights_stay_and_an_adapter_that_is_saved_resumes(adapters, tmp_path):
    from peft import LoraConfig, PeftModel

    def optimizer_of(model):
        return steepest.build(model, "lion", lr=1e-2, ternary=False)

    base = ternary_mlp()
    before = state(base)
    whole = adapted(adapters, base)
    optimizer = optimizer_of(whole)
    train(whole, optimizer)
    whole.save_pretrained(tmp_path)
    saved = state(optimizer)
    train(whole, optimizer)
    read = adapters.adapt_ternary(LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(ternary_mlp(), tmp_path, is_trainable=True, config=read)
    resumed = optimizer_of(again)
    resumed.load_state_dict(saved)
    train(again, resumed)
    assert_same(state(again), state(whole))
    assert_same(state(resumed), state(optimizer))
    again.unload()
    assert_same(state(whole.unload()), before)


def test_what_needs_the_float_weights_is_refused(adapters):
    model = adapted(adapters, ternary_mlp())
    with pytest.raises(ValueError, match="cannot be merged into weights of 2 bits"):
        model.merge_and_unload()
    assert isinstance(model.base_model.model[0], adapters.TernaryLora)
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' .* a TernaryLinear does not have"):
        adapted(adapters, ternary_mlp(), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="use_dora"):
        adapted(adapters, ternary_mlp(), use_dora=True)
    # Without the registration PEFT knows no such layer.
    from peft import get_peft_model

    with pytest.raises(ValueError, match=r"TernaryLinear.* is not supported"):
        get_peft_model(ternary_mlp(), config())


def test_adapters_are_in_the_base_layers_dtype_and_several_take_turns(adapters):
    model = adapted(adapters, ternary_mlp().to(torch.float64))
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == torch.float64
    x = rows()[0].double()
    one = model(x)
    model.add_adapter("other", adapters.adapt_ternary(config(r=3)))
    model.set_adapter("other")
    assert not torch.equal(model(x), one)
    model.set_adapter("default")
    assert torch.equal(model(x), one)
    with model.disable_adapter():
        assert torch.equal(model(x), ternary_mlp().to(torch.float64)(x))


def test_a_trainer_resumes_adapters_on_a_ternary_model(adapters, tmp_path):
    pytest.importorskip("accelerate")
    from peft import get_peft_model

    from steepest.integrations.transformers import record_ternary

    from .test_transformers import resumed_and_whole

    made = llama()
    steepest.ternary.ternarize(made)
    record_ternary(made)
    made.save_pretrained(tmp_path / "base")

    def prepare():
        model = type(made).from_pretrained(tmp_path / "base")
        model = get_peft_model(model, adapters.adapt_ternary(config(target_modules=TARGETS)))
        bases = {type(m.base_layer) for m in model.modules() if isinstance(m, adapters.TernaryLora)}
        assert bases == {TernaryLinear}
        return model

    resumed_and_whole(tmp_path, prepare, lambda model: {"optimizers": (steepest.build(model, "adamw"), None)})


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS"])
def test_layers_that_peft_trains_whole_go_by_their_own_names(kind):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForSequenceClassification

    model, head, given = llama(), "lm_head", {"modules_to_save": ["lm_head"]}
    if kind == "SEQ_CLS":
        model, head, given = LlamaForSequenceClassification(model.config), "score", {}
    targets = ["q_proj", "embed_tokens"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type=kind, **given))
    overrides = {
        f"{head}.weight": "lion",
        "model.layers.1.self_attn.q_proj.lora_A.weight": {"lr": 0.5},
        "model.embed_tokens.lora_embedding_B": {"lr": 0.25},
    }
    optimizer = steepest.build(model, "muon", overrides=overrides)
    rows = {row.name.removeprefix("base_model.model."): row for row in optimizer.explain().rows}
    assert {name for name, row in rows.items() if row.rule == "lion" and not row.frozen} == {
        f"{head}.modules_to_save.default.weight"
    }
    assert {name: row.lr for name, row in rows.items() if row.lr in (0.5, 0.25)} == {
        "model.layers.1.self_attn.q_proj.lora_A.default.weight": 0.5,
        "model.embed_tokens.lora_embedding_B.default": 0.25,
    }
    # The frozen copy is no parameter that anyone could mean, or must decide about.
    plain = steepest.build(model, "muon").explain()
    assert [text for text in plain.warnings if not text.startswith("nothing goes to 'muon'")] == []
    for typo in (f"{head}.wieght", f"{head}.original_modul.weight"):
        with pytest.raises(ValueError, match="matches no parameter") as caught:
            steepest.build(model, "muon", overrides={typo: "lion"})
        assert "original_module.weight'?" not in str(caught.value)


def test_examples(adapters):
    assert run_examples(adapters) > 0
