"""ms-swift: the page's commands, and its plugin on Transformers' own Trainer, of other releases.

To import all of ms-swift takes modelscope and thirty other packages; what makes the optimizer needs none.
"""

import sys
from types import ModuleType

import pytest
import torch

from .own_environment import assert_resumed, needs_own_environment, run_page
from .source import functions_at, module_at, package_folder
from .test_docs import FIRST, blocks, sections
from .tiny import assert_same, llama, sentences, state

(PLUGIN,) = blocks(sections()["ms-swift"])
METHODS = (
    "create_optimizer",
    "create_optimizer_and_scheduler",
    "create_scheduler",
    "_disable_foreach_for_deepspeed",
)


@pytest.fixture
def trainer_class(monkeypatch):
    """Transformers' Trainer with ms-swift's methods, and its table of callbacks with the page's in it."""
    transformers = pytest.importorskip("transformers")
    version = pytest.importorskip("packaging.version")
    swift = package_folder("swift")
    optimizers = ModuleType("swift.optimizers")
    optimizers.OptimizerCallback = module_at(swift / "optimizers" / "base.py").OptimizerCallback
    optimizers.optimizers_map = {"default": optimizers.OptimizerCallback}
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.optimizers", optimizers)
    exec(compile(FIRST + PLUGIN, "docs/frameworks.md, ms-swift", "exec"), {})

    class Trainer(transformers.Trainer):
        def __init__(self, *given, optimizer, **options):
            super().__init__(*given, **options)
            self.optimizer_callback = optimizers.optimizers_map[optimizer](self.args, self)

    methods = functions_at(swift / "trainers" / "mixin.py", *METHODS, version=version, torch=torch)
    for name, method in methods.items():
        setattr(Trainer, name, method)
    return Trainer


def test_the_plugin_of_the_page_trains_and_resumes(trainer_class, tmp_path):
    from transformers import TrainingArguments

    options = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}

    def train(resume=None):
        args = TrainingArguments(str(tmp_path), learning_rate=1e-3, **options)
        trainer = trainer_class(llama(), args, train_dataset=sentences(), optimizer="steepest")
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, resumed = train(), train(str(tmp_path / "checkpoint-2"))
    assert type(whole.optimizer.optimizer).__name__ == "Muon+AdamW"
    assert_same(state(resumed.model), state(whole.model))
    assert_same(state(resumed.optimizer.optimizer), state(whole.optimizer.optimizer))


@needs_own_environment("ms-swift")
def test_the_commands_of_the_page_resume_bit_for_bit(tmp_path):
    run_page("ms-swift", tmp_path)
    assert_resumed(tmp_path / "runs")
