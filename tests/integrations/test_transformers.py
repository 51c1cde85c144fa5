"""Transformers: three ways to hand an optimizer to the Trainer, its logs, and ternary checkpoints."""

import json

import pytest
import torch

import steepest

from .tiny import assert_same, llama, rates_of_steps, run_examples, sentences, state, tiny_model

STEPS = 4


@pytest.fixture(scope="module")
def hf():
    """The integration, where transformers is installed."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from steepest.integrations import transformers

    return transformers


def arguments(path, steps=STEPS, **more):
    from transformers import TrainingArguments

    given = {
        "output_dir": str(path),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**given, **more})


def trainer(model, path, *, callbacks=(), ways, **more):
    from transformers import Trainer

    given = {"args": arguments(path, **more), "train_dataset": sentences(), "callbacks": list(callbacks)}
    return Trainer(model=model, **given, **ways)


def built(model, **options):
    return {"optimizers": (steepest.build(model, "muon", lr=1e-2, **options), None)}


WAYS = {
    "optimizers": built,
    "recipe": lambda model: {"optimizer_cls_and_kwargs": (steepest.Recipe, {"rule": "muon", "lr": 1e-2})},
    "class": lambda model: {"optimizer_cls_and_kwargs": (steepest.Lion, {"lr": 1e-3})},
}


def resumed_and_whole(path, prepare, way, callbacks=list):
    """Train STEPS steps at once, and again from the checkpoint in the middle; assert that all is equal."""
    runs = []
    for name, resume in (("whole", None), ("resumed", str(path / "whole" / "checkpoint-2"))):
        model = prepare()
        run = trainer(model, path / name, ways=way(model), callbacks=callbacks())
        run.train(resume_from_checkpoint=resume)
        assert run.state.global_step == STEPS
        runs.append(run)
    whole, again = runs
    assert_same(state(again.model), state(whole.model))
    assert_same(state(again.optimizer.optimizer), state(whole.optimizer.optimizer))
    return whole


def test_a_recipe_makes_what_build_makes(hf, tmp_path):
    model = llama()
    made = trainer(model, tmp_path, ways=WAYS["recipe"](model)).create_optimizer()
    assert_same(state(made), state(built(model)["optimizers"][0]))


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_trainer_equals_one_that_never_stopped(hf, way, tmp_path):
    whole = resumed_and_whole(tmp_path, llama, WAYS[way])
    assert any(torch.any(a != b) for a, b in zip(whole.model.parameters(), llama().parameters(), strict=True))


def ternary_llama():
    model = llama()
    steepest.ternary.ternarize(model)
    return model


def test_a_resumed_trainer_of_a_ternary_model_equals_one_that_never_stopped(hf, tmp_path):
    def way(model):
        return built(model, ternary={"threshold": 2})

    whole = resumed_and_whole(tmp_path, ternary_llama, way, lambda: [hf.SteepestCallback(show=None)])
    assert whole.state.log_history[-2]["ternary/total_flips"] > 0
    # Each of the Trainer's checkpoints is one for from_pretrained.
    loaded = type(whole.model).from_pretrained(tmp_path / "whole" / f"checkpoint-{STEPS}")
    assert_same(state(loaded), state(whole.model))


def test_the_callback_explains_once_and_adds_to_the_logs(hf, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # the table folds names to fit the terminal
    shown, reported = [], []
    model = llama()

    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **given):
            reported.append(dict(logs))

    run = trainer(model, tmp_path, ways=built(model), callbacks=[Reporter()])
    hf.SteepestCallback(show=shown.append).add_to(run)
    used = rates_of_steps(run.optimizer)
    run.train()
    (table,) = shown
    assert "model.layers.*.self_attn.q_proj.weight" in table
    losses = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    optimizer, last = run.optimizer.optimizer, losses[-1]
    assert last["state_bytes"] == optimizer.state_bytes() > 0
    assert last["skipped_steps"] == 0
    assert sum(key.startswith("lr/") for key in last) == len(optimizer.param_groups)
    # Warm-up of one step, then linear to 0: the rates with which the steps were taken.
    assert [entry["lr/muon"] for entry in losses] == used == pytest.approx([0, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    # The table has the rate that warm-up leads to, not the 0 it starts from.
    assert "0.01" in next(line for line in table.splitlines() if "self_attn.q_proj.weight" in line).split()
    # Reporters see them too.
    assert [entry["lr/muon"] for entry in reported if "loss" in entry] == [e["lr/muon"] for e in losses]


def test_the_callback_names_an_optimizer_that_is_not_ours(hf, tmp_path):
    model = llama()
    run = trainer(model, tmp_path, ways={}, callbacks=[hf.SteepestCallback()])
    with pytest.raises(TypeError, match=r"SteepestCallback measures an optimizer of steepest.*AdamW"):
        run.train()


@pytest.mark.parametrize(
    ("options", "dtype", "shard"),
    [
        ({}, torch.float32, "50GB"),
        ({"bits": 1}, torch.bfloat16, "2KB"),
        ({"scale": "group", "group_size": 6}, torch.float32, "2KB"),
        ({"scale": "tensor", "include": "*.mlp.*"}, torch.bfloat16, "50GB"),
    ],
    ids=str,
)
def test_a_saved_ternary_model_loads_bit_for_bit(hf, options, dtype, shard, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama().to(dtype)
    steepest.ternary.ternarize(model, **options)
    hf.record_ternary(model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "50GB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(state(loaded), state(model))
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    tokens = torch.stack([each["input_ids"] for each in sentences(2)])
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    # The Trainer takes what was loaded, and it loads once more from what that saves.
    assert trainer(loaded, tmp_path / "runs", ways=built(loaded)).model is loaded
    loaded.save_pretrained(tmp_path / "again")
    assert_same(state(type(model).from_pretrained(tmp_path / "again")), state(model))
    flip = steepest.ternary.TernaryFlip(loaded, threshold=2)
    for _ in range(2):
        loaded.train()(tokens, labels=tokens).loss.backward()
        flip.step()
    assert flip.stats().flips > 0


@pytest.mark.parametrize("kind", ["gpt2", "t5", "modernbert", "mamba"])
def test_models_that_initialize_their_children_load_bit_for_bit(hf, kind, tmp_path):
    """Their ``_init_weights`` writes to ``module.c_proj.weight`` and the like, which packed layers lack."""
    model = tiny_model(kind)
    steepest.ternary.ternarize(model)
    hf.record_ternary(model)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(state(loaded), state(model))
    tokens = torch.stack([each["input_ids"] for each in sentences(2)])
    more = {"decoder_input_ids": tokens} if kind == "t5" else {}
    assert torch.equal(loaded(tokens, **more).logits, model.eval()(tokens, **more).logits)
    packed = [m for m in loaded.modules() if isinstance(m, steepest.ternary.TernaryLinear)]
    assert packed
    assert not any(hasattr(layer, "weight") for layer in packed)


def test_what_a_ternary_checkpoint_lacks_is_initialized(hf, tmp_path):
    from transformers import GPT2ForSequenceClassification

    model = tiny_model("gpt2")
    steepest.ternary.ternarize(model)
    hf.record_ternary(model)
    model.save_pretrained(tmp_path)
    loaded, info = GPT2ForSequenceClassification.from_pretrained(
        tmp_path, num_labels=1024, initializer_range=0.5, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert_same(state(loaded.transformer), state(model.transformer))
    assert loaded.score.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_dense_checkpoint_becomes_ternary_as_it_is_loaded(hf, tmp_path):
    from transformers import AutoModelForCausalLM

    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    config = hf.TernaryConfig(exclude="*.q_proj")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    made = steepest.ternary.ternarize(dense, exclude="*.q_proj")
    assert_same(state(loaded), state(dense))
    loaded.save_pretrained(tmp_path / "ternary")
    written = json.loads((tmp_path / "ternary" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "steepest_ternary"
    assert {name for form in written["layers"] for name in form["names"]} == set(made.replaced)
    assert_same(state(AutoModelForCausalLM.from_pretrained(tmp_path / "ternary")), state(dense))


def test_a_checkpoint_saved_without_its_record_loads_once_it_has_one(hf, tmp_path):
    model = ternary_llama()
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert any(key.endswith("q_proj.weight") for key in info["missing_keys"])
    alike = llama(seed=1)
    steepest.ternary.ternarize(alike)
    hf.record_ternary(alike)
    alike.config.save_pretrained(tmp_path)
    assert_same(state(type(model).from_pretrained(tmp_path)), state(model))


@pytest.mark.parametrize("change", ["densify", "ternarize more"])
def test_layers_that_were_converted_after_the_record_load_as_they_are(hf, change, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama()
    steepest.ternary.ternarize(model, exclude="*.q_proj")
    hf.record_ternary(model)
    if change == "densify":
        steepest.ternary.densify(model)
    else:
        steepest.ternary.ternarize(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(each) for each in again.modules()] == [type(each) for each in model.modules()]
    assert_same(again.state_dict(), model.state_dict())


def test_what_cannot_be_recorded_or_loaded_says_so(hf, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(TypeError, match="takes a model of transformers, got Linear"):
        hf.record_ternary(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no ternary layers"):
        hf.record_ternary(llama())
    with pytest.raises(ValueError, match="quant_method must be 'steepest_ternary'"):
        hf.TernaryConfig(quant_method="gptq")
    with pytest.raises(TypeError, match="tresholds"):
        hf.TernaryConfig(tresholds=2)
    model = ternary_llama()
    hf.record_ternary(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("packed"))
    tensors[name] = torch.full_like(tensors[name], 0b10)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name.removesuffix('.packed')}.*holds the code 10"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("averaged", [False, True])
def test_binary_checkpoints_without_checksums_load_and_averaged_ones_do_not(hf, averaged, tmp_path):
    from safetensors.torch import load_file, save_file

    model = llama()
    steepest.ternary.ternarize(model, bits=1)
    hf.record_ternary(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if averaged:
        name = next(name for name in tensors if name.endswith("packed"))
        tensors[name] //= 2
    else:
        tensors = {name: each for name, each in tensors.items() if not name.endswith("checksum")}
    save_file(tensors, file, {"format": "pt"})
    if averaged:
        with pytest.raises(ValueError, match=f"{name.removesuffix('.packed')}.*does not match its checksum"):
            type(model).from_pretrained(tmp_path)
    else:
        assert_same(state(type(model).from_pretrained(tmp_path)), state(model))


def test_examples(hf):
    from steepest.integrations import hf_ternary, measurements

    assert run_examples(hf_ternary) > 0
    assert run_examples(measurements) > 0
