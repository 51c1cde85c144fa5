"""Axolotl: the page's commands; and its plugin manager and trainer's create_optimizer with other releases.

Axolotl pins the releases of what it is built on, so ``make`` installs its wheel without them.
"""

import sys
from types import ModuleType

import pytest

import steepest

from .own_environment import assert_resumed, needs_own_environment, run_page
from .tiny import assert_same, llama, state


def numba() -> ModuleType:
    """Numba, with which Axolotl compiles a sampler when it is imported; 150 MB, and nothing here calls it."""
    module = ModuleType("numba")
    module.njit = lambda function: function
    return module


@pytest.fixture(scope="module")
def manager():
    """Axolotl's manager with the plugin, loaded by its path as from a config."""
    base = pytest.importorskip("axolotl.integrations.base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numba", numba())
        pytest.importorskip("axolotl.core.trainers.mixins.optimizer")
    made = base.PluginManager.get_instance()
    made.register("steepest.integrations.axolotl.SteepestPlugin")
    assert made.plugins
    return made


def config(**options):
    from axolotl.utils.dict import DictDefault

    return DictDefault({"learning_rate": 1e-2, "weight_decay": 0.1, "steepest": {"rule": "muon"}, **options})


@pytest.fixture
def trainer_class(manager):
    from axolotl.core.trainers.mixins.optimizer import OptimizerMixin
    from transformers import Trainer

    class AxolotlTrainer(OptimizerMixin, Trainer):
        """Axolotl's own mixes in more, which does not touch the optimizer."""

    return AxolotlTrainer


def trainer(cls, path, model):
    from .test_transformers import arguments, sentences

    args = arguments(path)
    args.loraplus_lr_ratio = args.embedding_lr_scale = args.embedding_lr = args.lr_groups = None
    return cls(model=model, args=args, train_dataset=sentences())


def test_its_config_takes_the_section(manager):
    (path,) = manager.get_input_args()
    module, _, name = path.rpartition(".")
    args = getattr(__import__(module, fromlist=[name]), name)
    assert args(steepest={"rule": "lion"}).steepest == {"rule": "lion"}
    assert args().steepest is None


def test_its_trainer_trains_and_resumes_as_build_does(manager, trainer_class, tmp_path):
    from .test_transformers import STEPS

    runs = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        run = trainer(trainer_class, tmp_path / name, llama())
        cfg = config(optimizer="adamw_torch")
        manager.post_trainer_create(cfg, run)
        for callback in manager.add_callbacks_post_trainer(cfg, run):
            run.add_callback(callback)
        run.train(resume_from_checkpoint=resume)
        runs.append(run)
    whole, again = runs
    assert "lr/muon" in whole.state.log_history[-2]
    assert again.state.global_step == STEPS
    assert_same(state(again.model), state(whole.model))
    made, own = whole.optimizer.optimizer, steepest.build(llama(), "muon", lr=1e-2, weight_decay=0.1)
    assert [g["param_names"] for g in made.param_groups] == [g["param_names"] for g in own.param_groups]
    assert [g["weight_decay"] for g in made.param_groups] == [g["weight_decay"] for g in own.param_groups]


def test_numbers_that_yaml_takes_for_text(manager, trainer_class, tmp_path):
    yaml = pytest.importorskip("yaml")
    section = yaml.safe_load(
        "{rule: muon, lr: 1e-3, fallback: {rule: adamw, eps: 1E-8, betas: [9e-1, 0.99]},"
        " overrides: {'*.q_proj.weight': {lr: 2.5e-4}, '*.k_proj.weight': lion}}"
    )
    assert section["lr"] == "1e-3"
    run = trainer(trainer_class, tmp_path, llama())
    manager.post_trainer_create(config(steepest=section), run)
    made = run.optimizer_cls_and_kwargs[0]()(run.model)
    own = steepest.build(
        llama(),
        "muon",
        lr=1e-3,
        weight_decay=0.1,
        fallback={"rule": "adamw", "eps": 1e-8, "betas": [0.9, 0.99]},
        overrides={"*.q_proj.weight": {"lr": 2.5e-4}, "*.k_proj.weight": "lion"},
    )
    assert_same(made.state_dict(), own.state_dict())


def test_what_would_do_nothing_is_refused(manager, trainer_class, tmp_path):
    run = trainer(trainer_class, tmp_path, llama())
    with pytest.raises(ValueError, match="embedding_lr has no effect with SteepestPlugin"):
        manager.post_trainer_create(config(embedding_lr=1e-5), run)
    with pytest.raises(TypeError, match="momentun"):
        manager.post_trainer_create(config(steepest={"rule": "muon", "momentun": 0.9}), run)
    assert run.optimizer_cls_and_kwargs is None


@needs_own_environment("axolotl")
def test_the_commands_of_the_page_resume_bit_for_bit(tmp_path):
    run_page("Axolotl", tmp_path)
    assert_resumed(tmp_path / "runs")
