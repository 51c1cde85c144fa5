"""Lightning: its Trainer, its command line and Fabric, with the callback."""

import csv

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import steepest

from .tiny import assert_same, mlp, rates_of_steps, rows, run_examples, state


@pytest.fixture(scope="module")
def integration():
    """The integration, where lightning is installed."""
    pytest.importorskip("lightning")
    from steepest.integrations import lightning

    return lightning


@pytest.fixture(scope="module")
def classifier(integration):
    """A LightningModule that takes its optimizer as LightningCLI gives it."""
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self, optimizer, ternary: bool = False):
            super().__init__()
            self.net, self.optimizer = mlp(), optimizer
            if ternary:
                steepest.ternary.ternarize(self.net)

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def train_dataloader(self):
            return DataLoader(TensorDataset(*rows()), batch_size=4)

        def configure_optimizers(self):
            optimizer = self.optimizer(self)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Classifier


def muon(module):
    return steepest.build(module, "muon", lr=1e-2, fallback="adamw")


def fit(module, path, *, epochs, resume=None, **options):
    from lightning.pytorch import Trainer

    given = {
        "max_epochs": epochs,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "log_every_n_steps": 2,
        "logger": False,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": path,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{**given, **options})
    trainer.fit(module, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("ternary", [False, True])
def test_a_resumed_fit_equals_one_that_never_stopped(integration, classifier, ternary, tmp_path):
    options = {"ternary": {"threshold": 2}} if ternary else {}

    def prepare():
        return classifier(lambda module: steepest.build(module, "muon", lr=1e-2, **options), ternary)

    half = fit(prepare(), tmp_path, epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = fit(prepare(), tmp_path, epochs=2, resume=str(tmp_path / "half.ckpt"))
    whole = fit(prepare(), tmp_path, epochs=2)
    assert again.global_step == whole.global_step == 8
    assert_same(state(again.model), state(whole.model))
    assert_same(state(again.optimizers[0]), state(whole.optimizers[0]))


def test_the_callback_explains_and_logs_beside_the_monitor(integration, classifier, tmp_path):
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    shown = []
    callbacks = [
        integration.SteepestCallback(show=shown.append),
        LearningRateMonitor("step", log_momentum=True),
    ]
    used = []

    def watched(module):
        optimizer = muon(module)
        used.append(rates_of_steps(optimizer))
        return optimizer

    trainer = fit(classifier(watched), tmp_path, epochs=1, logger=CSVLogger(tmp_path), callbacks=callbacks)
    (table,) = shown
    assert "net.0.weight" in table
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        entries = [entry for entry in csv.DictReader(file) if entry.get("state_bytes")]
    optimizer = trainer.optimizers[0]
    assert [int(entry["step"]) for entry in entries] == [2, 4]
    # The rates with which the steps were taken: the schedule has moved on by the time they are logged.
    assert [float(entry["lr/muon"]) for entry in entries] == pytest.approx(used[0][1::2])
    assert len(set(used[0])) == 4
    # The table has OneCycleLR's peak, not the 25th of it that the first step takes.
    assert "0.01" in next(line for line in table.splitlines() if "net.3.weight" in line).split()
    assert float(entries[-1]["state_bytes"]) == optimizer.state_bytes()
    assert float(entries[-1]["skipped_steps"]) == 0
    ours = [key for key in entries[-1] if key.startswith("lr/")]
    assert len(ours) == len(optimizer.param_groups)
    theirs = {
        key.rpartition("/")[2] for key in entries[-1] if key.startswith("lr-") and "momentum" not in key
    }
    assert {key.removeprefix("lr/") for key in ours} == theirs
    assert float(trainer.callback_metrics["lr/muon"]) == pytest.approx(float(entries[-1]["lr/muon"]))


def test_the_callback_names_an_optimizer_that_is_not_ours(integration, classifier, tmp_path):
    module = classifier(lambda module: torch.optim.AdamW(module.parameters()))
    with pytest.raises(TypeError, match=r"SteepestCallback measures an optimizer of steepest.*AdamW"):
        fit(module, tmp_path, epochs=1, callbacks=[integration.SteepestCallback()])


@pytest.mark.parametrize("way", ["command line", "class path"])
def test_its_command_line_builds_by_auto(integration, classifier, way, tmp_path):
    pytest.importorskip("jsonargparse")
    from collections.abc import Callable, Iterable

    from lightning.pytorch.cli import LightningCLI
    from torch.optim import Optimizer

    class Plain(classifier):
        """Whose optimizer the command line configures."""

        def __init__(self):
            super().__init__(None)

        configure_optimizers = integration.LightningModule.configure_optimizers

    class Given(classifier):
        """Whose constructor takes a class path."""

        def __init__(self, optimizer: Callable[[Iterable], Optimizer]):
            super().__init__(optimizer)

    options = {"rule": "muon", "lr": 0.01, "weight_decay": 0.1}
    key = "optimizer" if way == "command line" else "model.optimizer"
    args = [f"--{key}=steepest.Auto", *(f"--{key}.{name}={value}" for name, value in options.items())]
    trainer = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    cli = LightningCLI(
        Plain if way == "command line" else Given,
        args=["fit", *args],
        trainer_defaults={**trainer, "enable_progress_bar": False, "default_root_dir": str(tmp_path)},
        save_config_callback=None,
    )
    made, own = cli.trainer.optimizers[0], steepest.build(cli.model, **options)
    assert type(made).__name__ == "Muon+AdamW"
    assert [g["param_names"] for g in made.param_groups] == [g["param_names"] for g in own.param_groups]
    assert made.param_groups[0]["weight_decay"] == 0.1
    assert made.state_bytes() > 0


def test_fabric_resumes_bit_for_bit(integration, tmp_path):
    from lightning.fabric import Fabric

    def prepare():
        fabric = Fabric(accelerator="cpu", devices=1)
        model = mlp()
        return fabric, *fabric.setup(model, muon(model))

    def train(fabric, model, optimizer, steps):
        x, y = rows()
        for _ in range(steps):
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()

    fabric, model, optimizer = prepare()
    train(fabric, model, optimizer, 2)
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, 2)
    fabric, again, resumed = prepare()
    fabric.load(tmp_path / "half.ckpt", {"model": again, "optimizer": resumed})
    train(fabric, again, resumed, 2)
    assert_same(state(again), state(model))
    assert_same(state(resumed), state(optimizer))


def test_examples(integration):
    run_examples(integration)
