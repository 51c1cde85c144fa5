from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from steepest.lab import LabError, cli
from steepest.lab.bench import (
    BenchConfig,
    Column,
    Record,
    Result,
    Section,
    bench,
    compile_check,
    first_step,
    runner,
)
from steepest.lab.bench.callbacks import Callback, TextLog
from steepest.lab.bench.case import ours
from steepest.lab.bench.first_step import first_step_seconds
from steepest.lab.bench.sections import SECTIONS, first, sweep
from steepest.lab.bench.shapes import MODELS, model_shapes
from steepest.lab.cli.options import BAD_REQUEST, INTERRUPTED

QUICK = ["--quick", "--no-compile", "--no-peers", "--optimizers", "lion,muon"]


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    assert cli.run(["bench", *QUICK, "--threads", "1", "--out", str(out), "--json", str(copy)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["RESULTS.md", "bench.json", "bench.png"]
    record = Record.load(copy)
    assert record == Record.load(out / "bench.json")
    assert record.settings["optimizers"] == ["lion", "muon"]
    assert [result.section for result in record.results] == [
        *("machine", "symmetric", "polar", "polar", "steps", "steps", "families", "host", "offload"),
        *("sweep", "ternary", "ternary"),
    ]
    machine, _, _, _, element, matrix, _, host, _, sizes, *_ = record.results
    assert {row["unit"] for row in machine.rows} == {"GB/s", "Gflop/s"}
    assert all(row["rate"] > 0 for row in machine.rows)
    assert [row["label"] for row in element.rows] == ["axpy", "lion"]
    assert [row["label"] for row in matrix.rows] == ["axpy", "muon bfloat16", "muon", "muon float32"]
    assert all(row["of_copy"] > 0 for row in element.rows)
    assert "; copy " in element.rows[0]["reason"]
    assert element.rows[1]["parameters"] == model_shapes("tiny").numel
    assert "4 hidden matrices of 1 of 2 blocks" in matrix.title
    assert [(row["label"], row["tensors"]) for row in host.rows] == [
        ("lion", len(model_shapes("tiny").tensors))
    ]
    assert host.rows[0]["per_tensor_us"] == pytest.approx(
        1e3 * host.rows[0]["cold_ms"] / host.rows[0]["tensors"]
    )
    assert [row["model"] for row in sizes.rows] == ["tiny", "tiny"]
    assert "| lion | steepest | eager |" in (out / "RESULTS.md").read_text()
    assert "toy GPT-2: muon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt5"], "no model 'gpt5'"),
        (["--model", ","], "no model"),
        (["--optimizers", "lino"], "no optimizer 'lino'"),
        (["--sections", "setps"], "no section 'setps'"),
        (["--dtype", "int8"], "no dtype 'int8'"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--blocks", "-1"], "blocks must be"),
        (["--memory", "0"], "memory must be positive"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--no-compile", "--no-eager"], "neither eager nor compiled"),
    ],
)
def test_a_bad_request_prints_one_line_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *arguments, "--out", str(tmp_path / "out")]) == BAD_REQUEST
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


class Weather:
    """A user-defined section."""

    name = "weather"

    def work_units(self, config: BenchConfig) -> int:
        return 1

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        callback.on_unit_start("looking out")
        callback.on_unit_end()
        yield Result("weather", "The weather", (Column("sky", "sky"),), [{"sky": "blue"}])


class Interrupting(Weather):
    name = "interrupting"

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        raise KeyboardInterrupt
        yield


def test_a_user_defined_section_can_be_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    added: Section = Weather()
    monkeypatch.setitem(SECTIONS, "weather", added)
    record = bench(["tiny"], ["lion"], sections=["weather"], rounds=1, out=tmp_path)
    assert [result.rows for result in record.results] == [[{"sky": "blue"}]]
    assert "| blue |" in (tmp_path / "RESULTS.md").read_text()


def test_an_interrupt_keeps_the_results_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for section in (Weather(), Interrupting()):
        monkeypatch.setitem(SECTIONS, section.name, section)
    status = cli.run(["bench", "--quick", "--sections", "weather,interrupting", "--out", str(tmp_path)])
    assert status == INTERRUPTED
    assert "contains the results so far" in capsys.readouterr().err
    record = Record.load(tmp_path / "bench.json")
    assert record.interrupted
    assert [result.section for result in record.results] == ["weather"]


@pytest.mark.parametrize("section", ["steps", "first", "sweep"])
def test_an_interrupted_table_keeps_its_rows(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def once(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return {"cold_seconds": 1.0} if section == "first" else [{"key": "k", "status": "ok"}]

    module = importlib.import_module(f"steepest.lab.bench.sections.{section}")
    monkeypatch.setattr(module, "first_step_seconds" if section == "first" else "compare", once)
    monkeypatch.setattr(module, "recompilations", lambda *arguments: 0, raising=False)
    model = "gpt2-124m" if section == "sweep" else "tiny"
    record = bench([model], ["lion", "adamw"], sections=[section], rounds=1)
    assert record.interrupted
    assert [len(result.rows) for result in record.results] == [1]


def test_the_callback_receives_as_many_work_units_as_announced() -> None:
    class Counting(Callback):
        planned, begun, finished, closed = 0, 0, 0, 0

        def __init__(self) -> None:
            self.fractions: list[float] = []

        def on_start(self, work_units: int) -> None:
            self.planned = work_units

        def on_unit_start(self, description: str) -> None:
            self.begun += 1

        def on_progress(self, fraction: float) -> None:
            self.fractions.append(fraction)

        def on_unit_end(self) -> None:
            self.finished += 1

        def on_end(self) -> None:
            self.closed += 1

    callback = Counting()
    bench(["tiny"], ["lion", "muon"], rounds=1, compiled=False, peers=False, callback=callback)
    assert callback.planned == callback.begun == callback.finished == 13
    assert callback.closed == 1
    assert 0 < min(callback.fractions) <= max(callback.fractions) <= 1


def test_the_text_log_counts_work_units(capsys: pytest.CaptureFixture[str]) -> None:
    callback = TextLog()
    callback.on_start(2)
    callback.on_unit_start("one")
    callback.on_unit_start("two")
    assert capsys.readouterr().out == "[1/2] one\n[2/2] two\n"


def test_the_default_is_one_block_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchConfig] = []

    class Recording(Weather):
        def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
            seen.append(config)
            yield from ()

    monkeypatch.setitem(SECTIONS, "weather", Recording())
    for blocks in (None, 0, 2):
        bench(["tiny"], ["lion"], sections=["weather"], blocks=blocks)
    assert [config.blocks for config in seen] == [1, None, 2]
    assert seen[0].rounds >= 9
    assert runner.ROUNDS >= 9


def test_the_sweep_plans_models_that_exceed_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(MODELS) - {"tiny"}:
        monkeypatch.setitem(MODELS, name, lambda name=name: replace(model_shapes("tiny"), name=name))
    copy = 4 * model_shapes("tiny").numel
    record = bench(
        ["gpt2-124m"],
        ["signgsd", "adamw", "muon"],
        sections=["sweep"],
        rounds=1,
        compiled=False,
        peers=False,
        memory=3.5 * copy / 2**30,
    )
    rows = [row for row in record.results[0].rows if row["key"] != "axpy"]
    assert len(rows) == 2 * (len(MODELS) - 1)
    assert {(row["label"], row["status"]) for row in rows} == {("signgsd", "ok"), ("adamw", "planned")}
    assert set(sweep.NAMES) <= set(steepest.list_optimizers())


def test_slow_measurements_need_full_or_named_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = list(MODELS)[-1]
    for name in set(MODELS) - {"tiny", "gpt2-124m", largest}:
        monkeypatch.delitem(MODELS, name)
    for name in ("gpt2-124m", largest):
        monkeypatch.setitem(MODELS, name, lambda name=name: replace(model_shapes("tiny"), name=name))
    monkeypatch.setattr(first, "first_step_seconds", lambda *arguments: {"cold_seconds": 1.0})
    monkeypatch.setattr(first, "recompilations", lambda *arguments: 0)
    module = importlib.import_module("steepest.lab.bench.compare")
    row_of = module._case_row
    monkeypatch.setattr(module, "_measure", lambda group, batch, *rest: [row_of(case) for case in batch])

    def measured(**options: Any) -> tuple[set[str], dict[str, str], str]:
        record = bench(["gpt2-124m"], sections=["first", "sweep"], rounds=1, peers=False, **options)
        few, sizes = record.results
        reasons = {row["model"]: row["reason"] for row in sizes.rows if row["key"] != "axpy"}
        return {row["label"] for row in few.rows}, reasons, " ".join(few.notes + sizes.notes)

    labels, reasons, notes = measured()
    assert labels == set(first.FEW)
    assert {model for model, reason in reasons.items() if reason == "not timed without --full"} == {largest}
    assert notes.count("--full") == 2
    labels, reasons, _ = measured(full=True)
    assert labels > set(first.FEW)
    assert not any(reasons.values())
    # Named optimizers are always measured.
    assert measured(optimizers=["signgsd"])[0] == {"signgsd"}


def test_the_first_step_is_timed_in_a_new_process(tmp_path: Path) -> None:
    case = ours("signgsd", "eager")
    found = first_step._run_process(case, "tiny", torch.device("cpu"), torch.float32, tmp_path)
    assert set(found) == {"first", "second"}
    assert all(value > 0 for value in found.values())


def test_an_uncompiled_first_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where TORCHDYNAMO_DISABLE is set: no graph, and no warning either."""
    case = ours("signgsd", "compiled")
    request = {"key": case.key, "model": "tiny", "device": "cpu", "dtype": "float32", "threads": 1}
    monkeypatch.setattr(compile_check, "compiled_graph_count", lambda: 0)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="made no graph"):
        first_step.main(request)


def test_a_broken_compiler_is_reported_in_the_row_of_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    record = bench(["tiny"], ["signgsd"], sections=["first"], rounds=1)
    (row,) = record.results[0].rows
    assert "RuntimeWarning: steepest runs 'signgsd' without compilation" in row["reason"]
    assert not {"cold_seconds", "warm_seconds", "recompilations"} & row.keys()


def test_the_first_steps_cache_is_cold_then_warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A fake Python interpreter that reports the number of files in the cache and then adds one.
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib\n"
        "cache = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
        "print(json.dumps({'first': len(list(cache.iterdir())), 'second': 0.5}))\n"
        "(cache / 'graph').touch()\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    found = first_step_seconds(ours("lion", "compiled"), "tiny", torch.device("cpu"), torch.float32)
    assert found == {"cold_seconds": 0, "warm_seconds": 1, "second_ms": 500.0}


def test_the_python_api_rejects_invalid_requests() -> None:
    with pytest.raises(LabError, match="name at least one"):
        bench([])
    with pytest.raises(LabError, match="no dtype"):
        bench(dtype="float8")


@pytest.mark.gpu
def test_on_cuda_launches_are_counted_and_graphs_are_replayed() -> None:
    record = bench(["tiny"], ["lion", "muon"], sections=["steps"], device="cuda", rounds=1)
    rows = [row for result in record.results for row in result.rows if row["key"] != "axpy"]
    assert {row["how"] for row in rows if row["source"] == "steepest"} == {"eager", "compiled", "graph"}
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert row["launches"] > 0
        assert row["device_ms"] > 0
        assert (row["graph"] == "") == (row["source"] == "steepest")
    json.dumps(rows)


@pytest.mark.gpu
def test_on_cuda_offload_and_symmetric_products_are_measured() -> None:
    record = bench(["tiny"], ["lion"], sections=["offload", "symmetric"], device="cuda", rounds=1)
    rows = [row for result in record.results for row in result.rows]
    assert rows
    assert all(row["status"] == "ok" for row in rows), rows
