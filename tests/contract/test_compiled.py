"""``compile``: the same bits as eager on the CPU, one graph for a whole schedule, eager where it must be."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from steepest.compile import available, cache
from steepest.compile.available import compiler_available
from steepest.engine import compiled, pipeline

from .cases import CASES, Case, able, by_id
from .training import identical, make_params, set_gradients, steps, train

pytestmark = pytest.mark.skipif(not compiler_available("cpu"), reason="torch.compile needs a C++ compiler")


def _plain(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """A single tensor: compiling is what takes the time here."""
    return make_params(dtype, shapes=[(4, 3)])


def _varied(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Among them an empty one, a scalar, and a transposed one."""
    params = make_params(dtype, shapes=[(4, 3), (), (0,), (3, 5)])
    params[3] = Parameter(params[3].detach().t())
    return params


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _reschedule(optimizer: torch.optim.Optimizer, step: int) -> None:
    """A schedule that changes all that a schedule may, first away from a weight decay of 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.03 / (1 + step)
        group["weight_decay"] = 0.1 * step
        if group.get("momentum"):
            group["momentum"] = 0.9 - 0.01 * step
        if "betas" in group:
            others = len(group["betas"]) - 1
            group["betas"] = (0.9 - 0.01 * step, *[0.99 + 0.0001 * step] * others)


@pytest.fixture(autouse=True)
def _no_fallback():
    """A compilation that is given up warns; here that is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def _follows_eager(case: Case, make: Callable[[], list[Parameter]], **options: Any) -> None:
    params, twins = make(), make()
    optimizer = case.make(params, compile=True, **options)
    twin = case.make(twins, compile=False, **options)
    for step in range(10):
        for some, some_params in ((optimizer, params), (twin, twins)):
            _reschedule(some, step)
            set_gradients(some_params, step)
        if step == 0:
            optimizer.step()
            graphs, specs = _graphs(), len(cache._made)
        else:
            with torch._dynamo.config.patch(error_on_recompile=True):
                optimizer.step()
        twin.step()
        assert identical(params, twins), f"step {step}"
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert (_graphs(), len(cache._made)) == (graphs, specs), "recompiled"


@pytest.mark.parametrize("case", able(CASES, "compile", "weight_decay"), ids=by_id)
def test_it_equals_eager_over_a_schedule_that_never_recompiles(case: Case):
    _follows_eager(case, _plain)


def test_it_rounds_stochastically_as_eager_does():
    """Rounding is the same code for every rule."""
    options = {"rounding": "stochastic", "state_dtype": torch.float32}
    _follows_eager(Case("lion"), lambda: _varied(torch.bfloat16), **options)


@pytest.mark.parametrize("method", ["independent", "untied", "palm", "sign", "cautious", "l2"])
def test_it_decays_as_eager_does(method: str):
    """The decay is the same code for every rule."""
    _follows_eager(Case("signgsd"), _plain, weight_decay_method=method)


def test_it_maximizes_complex_parameters_as_eager_does():
    _follows_eager(Case("adamw"), lambda: _varied(torch.complex64), maximize=True)


@pytest.mark.parametrize("rule", ["muon", "sgd_sai", "soap", "adam_mini"])
def test_tensors_that_share_a_graph_step_as_eager_ones_do(rule: str):
    """Of each kind of pass: around products, with sums over a tensor, in a rotated basis, with blocks."""
    _follows_eager(Case(rule), lambda: make_params(shapes=[(4, 3), (3, 5), (2, 2)]))


def test_it_takes_roots_as_eager_does():
    _follows_eager(Case("adamw"), lambda: make_params(shapes=[(1000,)]), eps=0.01)


def test_it_really_compiles(monkeypatch: pytest.MonkeyPatch):
    """Or everything above would compare eager with eager."""
    ran = []
    run = compiled.launches
    monkeypatch.setattr(compiled, "launches", lambda *a: ran.append(run(*a)) or ran[-1])
    monkeypatch.setattr(cache, "_made", {})
    before = _graphs()
    params = _plain()
    train(Case("lion").make(params, compile=True), params, 2)
    assert [left for _, left in ran] == [[], []], "some were left to be stepped eagerly"
    assert _graphs() == before + 1


@pytest.mark.parametrize(
    ("name", "shapes", "left"),
    [
        ("lion", [(40, 3), (), (0,), (3, 5), (1, 1), (17,)], []),
        ("simba", [(40, 3), (7, 5), (0,), (2,), (34,)], [(7, 5)]),
        ("simba_leaky", [(40, 3), (7, 5), (50,)], [(7, 5)]),
    ],
)
def test_what_a_graph_cannot_take_is_stepped_eagerly(
    name: str, shapes: list[tuple[int, ...]], left: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """With int16 counters, which go in pairs, an odd number of elements; a lone element is none the less."""
    ran = []
    run = compiled.launches
    monkeypatch.setattr(compiled, "launches", lambda *a: ran.append(run(*a)) or ran[-1])
    params, twins = make_params(shapes=shapes), make_params(shapes=shapes)
    train(Case(name).make(params, compile=True), params, 3)
    assert [[tuple(row.columns[0].shape) for row in some] for _, some in ran] == [left] * 3
    assert identical(params, train(Case(name).make(twins), twins, 3))


@pytest.mark.parametrize(
    ("dtype", "rounding", "left"), [(torch.float32, "nearest", 0), (torch.bfloat16, "stochastic", 1)]
)
def test_transposed_parameters_are_compiled_unless_places_matter(
    dtype: torch.dtype, rounding: str, left: int, monkeypatch: pytest.MonkeyPatch
):
    """Noise goes by the logical place, and a flat view has the order of memory.

    The graphs are those of the tests above.
    """
    ran = []
    run = compiled.launches
    monkeypatch.setattr(compiled, "launches", lambda *a: ran.append(run(*a)) or ran[-1])
    params, twins = ([Parameter(torch.ones(6, 5, dtype=dtype).t())] for _ in range(2))
    for some, compile in ((params, True), (twins, False)):
        options = {"compile": compile, "rounding": rounding, "state_dtype": torch.float32}
        optimizer = Case("lion").make(some, lr=0.001, **options)
        for step in range(2):
            some[0].grad = torch.linspace(-1, 1, 30, dtype=dtype).add(step).view(6, 5).t()
            optimizer.step()
    assert [len(some) for _, some in ran] == [left] * 2
    assert identical(params, twins)


@pytest.mark.usefixtures("all_rows")
def test_any_model_runs_in_the_same_graph():
    """Sizes, their number and which of them have a gradient are no part of what is compiled."""
    shapes = [(size + 2, 3) for size in range(11)]
    params, twins = make_params(shapes=shapes), make_params(shapes=shapes)
    steps(Case("lion").make(small := _plain(), compile=True), small, [0])
    before = _graphs()
    optimizer, twin = Case("lion").make(params, compile=True), Case("lion").make(twins)
    for step, count in enumerate((11, 3, 8, 1, 9)):
        for some, some_params in ((optimizer, params), (twin, twins)):
            set_gradients(some_params, step)
            for param in some_params[count:]:
                param.grad = None
            some.step()
        assert identical(params, twins)
    assert _graphs() == before


def test_equal_batches_share_one_graph():
    train(Case("lion").make(params := _plain(), compile=True), params, 1)
    before = _graphs(), len(cache._made)
    optimizer = Case("lion").make([{"params": _plain()}, {"params": _plain(), "lr": 0.5}], compile=True)
    for group in optimizer.param_groups:
        set_gradients(group["params"], 0)
    optimizer.step()
    assert (_graphs(), len(cache._made)) == before


def test_code_is_shared_where_neither_the_rule_nor_its_options_matter():
    """Options of ``transform`` do not reach the element passes, nor does a rule the one after it."""

    def compiled_passes(case: Case) -> list[str]:
        train(case.make(params := _plain(), compile=True), params, 1)
        return [spec.which for spec, _ in cache._made if isinstance(spec, compiled.GraphSpec)]

    before = compiled_passes(Case("muon"))
    assert compiled_passes(Case("muon", {"method": "svd", "bucket_bytes": 1})) == before
    assert compiled_passes(Case("muon", {"nesterov": False})) in (before, [*before, "before"])
    assert compiled_passes(Case("polargrad")).count("after") == before.count("after")


@pytest.mark.parametrize("lr", [torch.tensor(0.03), torch.tensor([0.03])], ids=["0-dim", "1-element"])
def test_a_tensor_lr_compiles_to_the_same_graph(lr: Tensor):
    params, twins = _plain(), _plain()
    optimizer = Case("lion").make(params, lr=lr, compile=True)
    twin = Case("lion").make(twins, lr=lr.clone(), compile=False)
    steps(optimizer, params, [0])
    steps(twin, twins, [0])
    before = _graphs()
    for step in range(1, 4):
        for some, some_params in ((optimizer, params), (twin, twins)):
            some.param_groups[0]["lr"].mul_(0.5)
            steps(some, some_params, [step])
    assert _graphs() == before
    assert identical(params, twins)


def test_checkpoints_and_copies_step_on_in_the_same_graph():
    params, twins = _plain(), _plain()
    optimizer = Case("simba_leaky").make(params, compile=True)
    steps(optimizer, params, range(2))
    before = _graphs()
    again = Case("simba_leaky").make(params, compile=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(again, params, range(2, 4))
    copied = copy.deepcopy(again)
    steps(copied, copied.param_groups[0]["params"], range(4, 6))
    assert _graphs() == before
    assert identical(copied.param_groups[0]["params"], train(Case("simba_leaky").make(twins), twins, 6))


def test_the_gradient_and_the_generator_are_left_alone():
    params = _plain(torch.bfloat16)
    optimizer = Case("simba_leaky").make(
        params, compile=True, rounding="stochastic", state_dtype=torch.float32
    )
    set_gradients(params, 0)
    grads = [param.grad for param in params]
    before, generator = [grad.clone() for grad in grads], torch.get_rng_state()
    optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert identical(grads, before)
    assert torch.equal(torch.get_rng_state(), generator)


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    run = compiled.launches
    monkeypatch.setattr(compiled, "launches", lambda *a: calls.append(a) or run(*a))
    return calls


@pytest.mark.parametrize(
    ("wish", "from_elements", "times"), [(None, 1 << 24, 0), (None, 1, 2), (False, 1, 0)]
)
def test_none_compiles_where_it_pays(
    wish: bool | None, from_elements: int, times: int, monkeypatch: pytest.MonkeyPatch
):
    calls = _counting(monkeypatch)
    monkeypatch.setattr(available, "PAYS_FROM", from_elements)
    monkeypatch.setattr(pipeline, "PAYS_FROM", from_elements)
    params = _plain()
    train(Case("lion").make(params, compile=wish), params, 2)
    assert len(calls) == times


@pytest.mark.parametrize(("wish", "warns"), [(True, 1), (None, 0), (False, 0)])
def test_without_a_compiler_it_runs_eagerly_and_says_so_once(
    wish: bool | None, warns: int, monkeypatch: pytest.MonkeyPatch
):
    calls = _counting(monkeypatch)
    monkeypatch.setattr(available, "compiler_available", lambda device: False)
    monkeypatch.setattr(available, "PAYS_FROM", 1)
    monkeypatch.setattr(pipeline, "PAYS_FROM", 1)
    available.warn_no_compiler.cache_clear()
    params, twins = _plain(), _plain()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            params = _plain()
            train(Case("lion").make(params, compile=wish), params, 3)
    available.warn_no_compiler.cache_clear()
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(said) == warns
    assert all("no compiler for 'cpu'" in words for words in said)
    assert not calls
    assert identical(params, train(Case("lion").make(twins), twins, 3))


def test_a_compiler_that_is_switched_off_for_a_while_is_no_failure():
    """Then the eager pass steps, in pieces, and without a warning; later there is a graph after all."""
    params, twins = _plain(), _plain()
    optimizer = Case("signum").make(params, compile=True, momentum=0.71, weight_decay_method="palm")
    before = _graphs()
    with torch.compiler.set_stance("force_eager"):
        steps(optimizer, params, [0])
    assert _graphs() == before
    steps(optimizer, params, [1])
    assert _graphs() == before + 1
    twin = Case("signum").make(twins, momentum=0.71, weight_decay_method="palm")
    assert identical(params, train(twin, twins, 2))


def test_nor_is_one_that_waits_a_step_or_a_default_device():
    """Under ``eager_then_compile`` the first step is eager; torch's default device is not the parameters'."""
    params, twins = _plain(), _plain()
    options = {"weight_decay_method": "independent"}
    optimizer = Case("signum").make(params, compile=True, **options)
    before = _graphs()
    with torch.compiler.set_stance("eager_then_compile"):
        steps(optimizer, params, [0, 1])
    other = _plain(torch.float64)
    set_gradients(other, 0)
    elsewhere = Case("signum").make(other, compile=True, **options)
    with torch.device("meta"):
        elsewhere.step()
    assert _graphs() == before + 2
    assert identical(params, train(Case("signum").make(twins, **options), twins, 2))


def test_what_a_graph_was_traced_with_is_not_kept():
    """Some megabytes for each graph."""

    def kept() -> int:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) is Tensor]
        return len([each for each in tensors if each.numel() in compiled.TRACED_SIZES])

    params = _plain()
    graphs, before = _graphs(), kept()
    train(Case("signum").make(params, compile=True, weight_decay_method="sign"), params, 1)
    assert _graphs() == graphs + 1
    assert kept() == before


class Wrapper(Tensor):
    """A tensor whose elements lie in another."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        self: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map_only(cls, lambda each: each.inner, args), **(kwargs or {}))


@pytest.mark.parametrize("disguise", [Wrapper, torch._neg_view], ids=["wrapper", "negative"])
def test_gradients_that_are_not_what_lies_in_memory_are_stepped_eagerly(disguise: Callable[[Tensor], Tensor]):
    params, twins = _plain(), _plain()
    runs = []
    for own, compile_ in ((params, True), (twins, False)):
        for param in own:
            param.grad = disguise(torch.arange(-6.0, 6.0).view(4, 3))
        optimizer = Case("sgd").make(own, compile=compile_)
        optimizer.step()
        runs.append([param.detach().clone() for param in own])
    assert identical(*runs)
    expected = torch.arange(-6.0, 6.0) * (1 if disguise is Wrapper else -1)
    moved = _plain()[0].detach() - runs[0][0]
    assert ((moved.flatten() * expected) >= 0).all()


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_graph_that_does_not_compile_is_given_up_once(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def broken(function: Any, rows: Any, others: Any, **options: Any) -> None:
        tried.append(function)
        raise torch._dynamo.exc.TorchDynamoException("no such header")

    monkeypatch.setattr(compiled, "compiled_code", broken)
    monkeypatch.setattr(cache, "_made", {})
    monkeypatch.setattr(cache, "_broken", set())
    params, twins = _plain(), _plain()
    optimizer = Case("lion").make(params, compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, params, 3)
    assert len(tried) == 1
    assert len(caught) == 1
    assert "'lion' without compilation" in str(caught[0].message)
    assert identical(params, train(Case("lion").make(twins), twins, 3))


def test_a_compiler_without_the_processors_instructions_is_asked_what_it_has(monkeypatch: pytest.MonkeyPatch):
    """Trying takes seconds, so it is done where the first attempt fails; and torch forgets that one."""
    from torch._inductor import compile_fx

    tried = []
    make_code = compile_fx.compile_fx

    def compile(graph: Any, examples: Any, *, config_patches: Any = None, **more: Any) -> Any:
        if config_patches is None:  # Inductor calls itself with the options set
            return make_code(graph, examples, **more)
        tried.append(dict(config_patches))
        if "cpp.vec_isa_ok" in config_patches:
            raise RuntimeError("unrecognized command-line option -mavx512f")
        assert torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0
        return make_code(graph, examples, config_patches=config_patches, **more)

    monkeypatch.setattr(compile_fx, "compile_fx", compile)
    monkeypatch.setattr(cache, "_made", {})
    params, twins = _plain(), _plain()
    with warnings.catch_warnings(), torch._inductor.config.patch({"cpp.vec_isa_ok": None}):
        warnings.simplefilter("error")
        train(Case("lion").make(params, compile=True), params, 2)
    assert [sorted(each) for each in tried] == [["cpp.vec_isa_ok", "size_asserts"], ["size_asserts"]]
    assert identical(params, train(Case("lion").make(twins), twins, 2))


def test_torchs_settings_may_change_under_it():
    """Each has a graph of its own: compiled anew within a step, it could meet a limit half way."""
    params, twins = _plain(), _plain()
    optimizer, twin = Case("lion").make(params, compile=True), Case("lion").make(twins)
    threads = torch.get_num_threads()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=1):
            for step, number in enumerate((1, 2, 3, 1)):
                torch.set_num_threads(number)
                for some, some_params in ((optimizer, params), (twin, twins)):
                    set_gradients(some_params, step)
                    with torch.autocast("cpu", enabled=step == 1):
                        some.step()
    finally:
        torch.set_num_threads(threads)
    assert identical(params, twins)


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_what_fails_in_compiling_a_later_group_has_moved_nothing(monkeypatch: pytest.MonkeyPatch):
    first, second = _plain(), make_params(torch.bfloat16, shapes=[(4, 3)])
    optimizer = Case("lion").make([{"params": first}, {"params": second}], compile=True)

    code = compiled._code

    def interrupted(spec: Any, config: Any) -> Callable[..., None]:
        if torch.bfloat16 in spec.dtypes:
            raise KeyboardInterrupt
        return code(spec, config)

    monkeypatch.setattr(compiled, "_code", interrupted)
    before = [param.detach().clone() for param in (*first, *second)]
    for group in optimizer.param_groups:
        set_gradients(group["params"], 0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert identical([param.detach() for param in (*first, *second)], before)
