"""Ways are timed once and the fastest is kept; nothing is timed where choices must agree."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

import steepest
from pages import run_python
from steepest import autotuning
from steepest.linalg import COEFFICIENTS, newton_schulz
from steepest.linalg.newton_schulz_ways import Iterations, Way, choose_way
from steepest.linalg.product import multiply, product
from steepest.linalg.symmetric import _in_panels, mirrored_product

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A process that has chosen nothing, and an empty cache folder."""
    monkeypatch.setenv("STEEPEST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotuning, "_chosen", {})
    autotuning._file_of_this_process.cache_clear()
    monkeypatch.setattr(autotuning, "_mode", "measure")
    timed = autotuning._timed

    def given_or_timed(run, device):
        """Return the seconds that a trial gives for itself, which no busy machine changes."""
        given = []
        seconds = timed(lambda: given.append(run()), device)
        return given[0] if isinstance(given[0], float) else seconds

    monkeypatch.setattr(autotuning, "_timed", given_or_timed)
    return monkeypatch


class Trials:
    """Functions that give the seconds they take; ``runs`` counts how often each was called."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.runs = seconds, dict.fromkeys(seconds, 0)

    def __call__(self):
        return {way: lambda way=way: self.run(way) for way in self.seconds}

    def run(self, way):
        self.runs[way] += 1
        return self.seconds[way]

    def choose(self, *question):
        return autotuning.choose(question or ("one",), CPU, list(self.seconds), self)


def forget():
    """What a new process knows."""
    autotuning._chosen.clear()


def test_the_fastest_way_is_timed_once_and_kept():
    trials = Trials(slow=0.02, fast=0.001, medium=0.005)
    assert trials.choose() == "fast"
    assert all(trials.runs.values())
    runs = dict(trials.runs)
    assert trials.choose() == "fast"
    assert trials.runs == runs
    assert trials.choose("another") == "fast"
    assert trials.runs["fast"] > runs["fast"]


def test_the_default_stays_unless_another_is_clearly_faster(monkeypatch):
    """The margin is 3 %."""
    times = {"default": 1.00, "other": 0.98}
    monkeypatch.setattr(autotuning, "_timed", lambda run, device: run())
    monkeypatch.setattr(autotuning, "_BUDGET", 100)

    def choose(question):
        return autotuning.choose(
            (question,), CPU, list(times), lambda: {w: lambda w=w: times[w] for w in times}
        )

    assert choose("close") == "default"
    times["other"] = 0.94
    assert choose("clear") == "other"


def test_a_new_process_takes_the_choice_from_the_file_and_times_nothing():
    assert Trials(slow=0.01, fast=0.001).choose() == "fast"
    forget()
    trials = Trials(slow=0.0, fast=0.01)
    assert trials.choose() == "fast"
    assert not any(trials.runs.values())


def test_choices_belong_to_a_machine_and_its_threads():
    assert Trials(slow=0.01, fast=0.001).choose() == "fast"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        trials = Trials(slow=0.01, fast=0.001)
        trials.choose()
        assert all(trials.runs.values())
    finally:
        torch.set_num_threads(threads)
    table = json.loads(steepest.autotune_file().read_text())
    assert len(table) == 2
    assert all(torch.__version__ in machine and "threads" in machine for machine in table)


def test_a_way_that_the_file_names_and_nobody_knows_is_chosen_anew():
    Trials(old=0.0, other=0.01).choose()
    forget()
    assert Trials(slow=0.01, fast=0.001).choose() == "fast"


@pytest.mark.parametrize("content", ["", "[1]", '{"m": 3}', '{"m": {"q": ', "\0"])
def test_a_broken_file_counts_as_empty_and_is_replaced(content):
    path = steepest.autotune_file()
    path.parent.mkdir()
    path.write_text(content)
    assert Trials(slow=0.01, fast=0.001).choose() == "fast"
    ((_, choices),) = json.loads(path.read_text()).items()
    assert choices == {"one": "fast"}


def test_without_a_folder_choices_last_as_long_as_the_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEEPEST_CACHE_DIR", str(tmp_path / "file" / "cache"))
    trials = Trials(slow=0.01, fast=0.001)
    assert trials.choose() == "fast"
    runs = dict(trials.runs)
    assert trials.choose() == "fast"
    assert trials.runs == runs


def _choose_in_a_process(number):
    autotuning._chosen.clear()
    return Trials(slow=0.004, fast=0.001).choose(f"question {number}")


def test_processes_that_write_at_once_leave_a_whole_file():
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_choose_in_a_process, range(12), chunksize=1) == ["fast"] * 12
    ((_, choices),) = json.loads(steepest.autotune_file().read_text()).items()
    assert set(choices.values()) == {"fast"}
    assert len(choices) == 12
    names = {path.name for path in steepest.autotune_file().parent.iterdir()}
    assert names <= {"autotune.json", "autotune.lock"}


def test_a_slow_default_is_not_compared(monkeypatch):
    monkeypatch.setattr(autotuning, "_BUDGET", 0.005)
    trials = Trials(default=0.01, fast=0.0)
    assert trials.choose() == "default"
    assert trials.runs == {"default": 1, "fast": 0}


def test_answers_to_other_questions_on_the_way_are_not_timed():
    """The first run of the way that asks more questions takes longer than the other way."""
    inner = Trials(slow=0.02, fast=0.0)

    def asks():
        before = dict(inner.runs)
        inner.choose("inner")
        return 0.02 if inner.runs != before else 0.001

    ways = {"other": lambda: 0.01, "asks": asks}
    assert autotuning.choose(("outer",), CPU, list(ways), lambda: ways) == "asks"


class TestWhereNothingIsTimed:
    def check(self, mode="measure"):
        steepest.autotune(mode)
        trials = Trials(default=0.01, fast=0.001)
        assert trials.choose("unknown") == "default"
        assert not any(trials.runs.values())
        assert not steepest.autotune_file().exists()
        steepest.autotune("measure")

    def test_switched_off(self):
        self.check("off")

    def test_cached_uses_the_file_alone(self):
        self.check("cached")
        assert Trials(slow=0.01, fast=0.001).choose() == "fast"
        forget()
        autotuning._file_of_this_process.cache_clear()
        steepest.autotune("cached")
        trials = Trials(slow=0.01, fast=0.001)
        assert trials.choose() == "fast"
        assert not any(trials.runs.values())

    def test_off_ignores_what_was_chosen(self):
        assert Trials(slow=0.01, fast=0.001).choose() == "fast"
        steepest.autotune("off")
        assert Trials(slow=0.01, fast=0.001).choose() == "slow"

    def test_deterministic_algorithms(self):
        torch.use_deterministic_algorithms(True)
        try:
            self.check()
        finally:
            torch.use_deterministic_algorithms(False)

    def test_other_processes_would_choose_otherwise(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        self.check()
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
        assert Trials(slow=0.01, fast=0.001).choose() == "fast"
        # A group that is made later must not find what this process has chosen.
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert Trials(slow=0.01, fast=0.001).choose() == "slow"


def test_modes(monkeypatch):
    assert steepest.autotune() == "measure"
    assert steepest.autotune("cached") == "cached" == steepest.autotune()
    with pytest.raises(ValueError, match="must be one of 'measure', 'cached', 'off', got 'on'"):
        steepest.autotune("on")  # type: ignore[arg-type]
    assert steepest.autotune() == "cached"
    monkeypatch.setattr(autotuning, "_mode", None)
    monkeypatch.setenv("STEEPEST_AUTOTUNE", "off")
    assert steepest.autotune() == "off"
    monkeypatch.setattr(autotuning, "_mode", None)
    monkeypatch.setenv("STEEPEST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="STEEPEST_AUTOTUNE"):
        steepest.autotune()


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def stored(**ways):
    """Write choices for questions that begin with these words."""

    def choose(question, device, known, trials):
        for word, way in ways.items():
            if question[0] == word:
                assert way in known
                return way
        return known[0]

    return choose


@pytest.mark.parametrize(
    ("name", "within", "rounding"), [("polar_express", 3e-4, 0.04), ("minimax_9_17_3", 2e-3, 0.2)]
)
@pytest.mark.parametrize("shape", [(192, 192), (160, 400), (400, 160), (2, 200, 190)], ids=str)
def test_every_way_of_newton_schulz_agrees(shape, name, within, rounding, monkeypatch):
    """Within these parts of the polar factor's norm in float32 and bfloat16."""
    x = randn(*shape)
    exact = newton_schulz(x.double(), name)
    plan = Iterations(((2.0, -1.5, 0.5),), "frobenius", 1.0)
    ways = set()

    def record(question, device, known, trials):
        if question[0] == "newton_schulz":
            ways.update(known)
        return known[0]

    monkeypatch.setattr("steepest.linalg.newton_schulz_ways.choose", record)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, within), (torch.bfloat16, rounding)):
            ways.clear()
            newton_schulz(x, name, dtype=dtype)
            assert len(ways) == (4 if shape[-2] > shape[-1] else 2)
            for way in sorted(ways):
                monkeypatch.setattr("steepest.linalg.newton_schulz_ways.choose", stored(newton_schulz=way))
                found = newton_schulz(x, name, dtype=dtype)
                assert (found - exact).norm() < tolerance * exact.norm(), way
            monkeypatch.setattr("steepest.linalg.newton_schulz_ways.choose", record)
    assert isinstance(choose_way(x.reshape(-1, *x.shape[-2:]), plan, "plain", None, True, None), Way)


def test_questions_tell_sets_and_norms_apart():
    """Sets of equally many triples take equally long, and the words of earlier versions stay valid."""

    def words(name, normalization):
        return Iterations(COEFFICIENTS[name].schedule(), normalization, 1.0).words

    assert words("jordan", "frobenius") == words("polar_express", "frobenius") == "5 iterations"
    assert words("jordan", "schatten8") == "5 iterations, schatten8"
    assert words("minimax_9_17_3", "schatten8") == "degrees 9 17 3, schatten8"
    assert words("minimax_17_17_3", "aol") == "degrees 17 17 3, aol"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("panels", [1, 2, 3, 4, 6])
def test_all_numbers_of_panels_agree(panels, dtype):
    x = randn(2, 410, 300, dtype=dtype)
    exact = x.double() @ x.double().mT
    for exactly in (False, True):
        out = torch.full((2, 410, 410), float("nan"), dtype=dtype)
        _in_panels(panels, "batched", x, x.mT, None, 1.0, 1.0, exactly, out)
        assert (out - exact).abs().max() < {torch.bfloat16: 2.0, torch.float32: 1e-3}.get(dtype, 1e-11)
        assert not exactly or torch.equal(out, out.mT)


def test_a_step_times_its_ways_and_a_second_one_nothing(monkeypatch):
    """Real trials, once: 384×800 is large enough."""
    monkeypatch.setattr(autotuning, "_BUDGET", 0.02)
    weight = torch.nn.Parameter(randn(800, 384))
    optimizer = steepest.Muon([weight])
    weight.grad = randn(800, 384)
    random = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), random)
    ((_, choices),) = json.loads(steepest.autotune_file().read_text()).items()
    assert {"newton_schulz", "product"} <= {question.split()[0] for question in choices}
    monkeypatch.setattr(autotuning, "_timed", None)
    optimizer.step()


def test_small_matrices_are_not_timed(monkeypatch):
    monkeypatch.setattr(autotuning, "_timed", None)
    with torch.no_grad():
        newton_schulz(randn(120, 120))
        x = randn(160, 160)
        product(x, x.mT)
        mirrored_product(x, x.mT)


def test_derivatives_tracers_and_subclasses_are_not_timed(monkeypatch):
    monkeypatch.setattr(autotuning, "_timed", None)
    x = randn(600, 600).requires_grad_()
    product(x, x.mT)
    newton_schulz(torch.empty(600, 900, device="meta"))


def test_ways_leave_their_operands_alone():
    x, y = randn(1, 400, 300), randn(1, 300, 350)
    before = x.clone(), y.clone()
    for way in ("batched", "loop"):
        multiply(way, x, y, None, -1.0, 1.0, None)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_the_page_s_python_runs(capsys):
    text = (Path(__file__).parents[1] / "docs" / "autotuning.md").read_text(encoding="utf-8")
    run_python("docs/autotuning.md")
    assert capsys.readouterr().out == "autotune.json\n"
    for way in ("batched", "loop", "onednn", "turned"):
        assert f"`{way}`" in text
    assert f"{autotuning._BUDGET} seconds" in text
    assert f"{autotuning._MARGIN - 1:.0%}".replace("%", " %") in text


def test_explain_names_the_way_without_timing_it(monkeypatch):
    weight = torch.nn.Parameter(randn(300, 128))
    optimizer = steepest.Muon([("weight", weight)], ns_dtype=torch.float32)
    monkeypatch.setattr(autotuning, "_timed", None)
    assert optimizer.explain().rows[0].way == "gram float32"
    ways = ("gram float32", "gram float32 turned", "plain float32", "plain float32 turned")
    words = f"newton_schulz float32 300x128 5 iterations ({'/'.join(ways)})"
    path = steepest.autotune_file()
    path.parent.mkdir()
    path.write_text(json.dumps({autotuning.machine_words(CPU): {words: "plain float32 turned"}}))
    assert optimizer.explain().rows[0].way == "plain float32 turned"
    assert "autotune chose 'plain float32 turned' for matrices of 300×128" in optimizer.explain().notes
    steepest.autotune("off")
    assert optimizer.explain().rows[0].way == "gram float32"
    assert not any("autotune" in note for note in optimizer.explain().notes)
    assert steepest.Lion([weight]).explain().rows[0].way is None


def test_options_that_exclude_ways_ask_another_question():
    """One shape with every dtype, form and set in turn, timed for real, gives what each gives alone."""
    x = randn(256, 256)
    options = [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32, "form": "plain"},
        {"dtype": torch.float32, "form": "gram"},
        {"coefficients": [(3.4445, -4.7750, 2.0315)], "dtype": torch.bfloat16},
        {"coefficients": "minimax_17_17"},
        {},
    ]
    with torch.no_grad():
        first = [newton_schulz(x, **each) for each in options]
        forget()
        assert all(
            torch.equal(newton_schulz(x, **each), was) for each, was in zip(options, first, strict=True)
        )


def test_a_step_with_groups_of_one_shape_and_other_options():
    weights = [torch.nn.Parameter(randn(256, 256)) for _ in range(3)]
    groups = [
        {"params": [weights[0]], "ns_dtype": torch.float32},
        {"params": [weights[1]], "ns_dtype": None},
        {"params": [weights[2]], "coefficients": "cans"},
    ]
    optimizer = steepest.Muon(groups)
    for weight in weights:
        weight.grad = randn(256, 256)
    optimizer.step()


def test_a_way_that_fails_is_none():
    def fail():
        raise torch.OutOfMemoryError("no memory")

    ways = {"default": lambda: 0.01, "fails": fail, "fast": lambda: 0.001}
    assert autotuning.choose(("one",), CPU, list(ways), lambda: ways) == "fast"
    ways = {"default": fail, "fast": lambda: None}
    assert autotuning.choose(("two",), CPU, list(ways), lambda: ways) == "default"
    assert autotuning.choose(("three",), CPU, ["default", "other"], fail) == "default"


def test_cached_choices_stay_whatever_other_processes_write(monkeypatch):
    Trials(slow=0.01, fast=0.001).choose("known")
    autotuning._file_of_this_process.cache_clear()
    steepest.autotune("cached")
    assert Trials(slow=0.0, fast=0.0).choose("unknown") == "slow"
    path = steepest.autotune_file()
    table = json.loads(path.read_text())
    for choices in table.values():
        choices.update({"known": "slow", "unknown": "fast"})
    path.write_text(json.dumps(table))
    assert Trials(slow=0.0, fast=0.0).choose("unknown") == "slow"
    assert Trials(slow=0.0, fast=0.0).choose("known") == "fast"


def test_what_another_process_has_written_meanwhile_is_taken():
    trials = Trials(slow=0.01, fast=0.001)
    machine = autotuning.machine_words(CPU)
    assert autotuning._written(machine, "question", "slow", ["slow", "fast"]) == "slow"
    assert autotuning._written(machine, "question", "fast", ["slow", "fast"]) == "slow"
    assert trials.choose("question") == "slow"
    assert not any(trials.runs.values())


def test_without_a_home_choices_last_as_long_as_the_process(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("STEEPEST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(autotuning.Path, "home", no_home)
    assert steepest.autotune_file() is None
    assert Trials(slow=0.01, fast=0.001).choose() == "fast"


@pytest.mark.parametrize("mode", ["off", "measure"])
def test_fewer_than_128_rows_stay_in_float32(mode):
    steepest.autotune(mode)
    x = randn(64, 1024)
    with torch.no_grad():
        assert torch.allclose(newton_schulz(x), newton_schulz(x.double()).float(), atol=1e-5)


def test_kept_memory_is_no_inference_tensor():
    from steepest.scratch import borrow, give_back

    with torch.inference_mode():
        give_back(torch.empty(1 << 18))
    borrow((1 << 18,), torch.float32, CPU).fill_(1.0)


def test_a_rule_s_own_finish_gets_the_input():
    from steepest.rules.muon import MuonRule

    class Dual(MuonRule):
        def finish(self, polar, u, **options):
            return polar * (polar * u).sum((-2, -1), keepdim=True), {}

    steepest.autotune("off")
    u = randn(1, 20, 30)
    given = {"ns_steps": None, "coefficients": "quintic", "normalization": None, "method": "svd"}
    more = {"ns_dtype": None, "scale": "none", "extra_scale": 1.0, "fp32_matmul_prec": "highest"}
    found = Dual().transform(u.clone(), orthogonalize=None, **given, **more)[0]
    assert torch.allclose(found, newton_schulz(u, method="svd") * torch.linalg.svdvals(u).sum(), atol=1e-3)
