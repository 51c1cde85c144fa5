from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import altair as alt
import numpy as np
import pytest
from altair.utils.schemapi import validate_jsonschema

from steepest.lab.records import Cost, Metric
from steepest.lab.report.charts import figures
from steepest.lab.report.draw import Figure, Spec, chart, drawn_range, picture
from steepest.lab.report.merge import Section
from steepest.lab.report.search_charts import CROSS
from steepest.lab.report.theme import styles

from ..conftest import make_experiment, make_record
from .conftest import ALL, BEST, BYTES, LRS, make_section


@pytest.fixture(scope="module")
def drawn(section: Section) -> dict[str, Figure]:
    return {figure.key: figure for figure in figures(section, styles(section.names))}


def layers(spec: Spec) -> Iterator[Spec]:
    for layer in spec["layer"]:
        layer = {"data": spec.get("data"), **layer}
        yield from layers(layer) if "layer" in layer else [layer]


def drawn_rows(spec: Spec, mark: str, **properties: Any) -> list[dict[str, Any]]:
    """The data of the layers with a mark of this type and properties, as (x, y) fields resolved."""
    found = []
    for layer in layers(spec):
        if layer["mark"]["type"] == mark and properties.items() <= layer["mark"].items():
            x, y = (layer["encoding"].get(axis, {}).get("field") for axis in "xy")
            for row in spec["datasets"][layer["data"]["name"]]:
                found.append({**row, "x": row.get(x), "y": row.get(y)})
    return found


def test_bytes_of_state_against_quality_come_first(drawn: dict[str, Figure]) -> None:
    assert [*drawn] == ["frontier", "curves", "search", "grid", "series-gain"]


def test_every_seed_and_mean_is_drawn_at_its_value(drawn: dict[str, Figure]) -> None:
    (panel,) = drawn["frontier"].panels
    seeds = {(row["optimizer"], row["x"], row["y"]) for row in drawn_rows(panel, "point", size=38)}
    assert seeds == {
        (name, BYTES[name] / 100, BEST[name] + seed / 1000) for name in ALL for seed in (1, 2, 3)
    }
    means = {row["optimizer"]: (row["x"], row["y"]) for row in drawn_rows(panel, "point", size=150)}
    assert means == {name: (BYTES[name] / 100, pytest.approx(BEST[name] + 0.002)) for name in ALL}


def test_the_frontier_joins_those_that_nothing_beats_with_as_little_state(drawn: dict[str, Figure]) -> None:
    (panel,) = drawn["frontier"].panels
    assert [row["optimizer"] for row in drawn_rows(panel, "line")] == ["signgsd", "lion", "muon"]
    assert "On the frontier: signgsd, lion, muon." in drawn["frontier"].alt
    assert "adamw 8 bytes, 2.102" in drawn["frontier"].alt


def test_curves_go_through_the_evaluations_of_tuned_trials_over_timed_seconds(
    drawn: dict[str, Figure],
) -> None:
    steps, seconds, losses = drawn["curves"].panels
    for panel, factor in ((steps, 1), (seconds, 0.01)):  # 10 ms a step
        thin = {(r["optimizer"], r["seed"], r["x"], r["y"]) for r in drawn_rows(panel, "line", strokeWidth=1)}
        assert ("lion", 2, 1000 * factor, 2.002) in thin
        assert len(thin) == len(ALL) * 3 * 3
        mean = {(r["optimizer"], r["x"]): r["y"] for r in drawn_rows(panel, "point")}
        assert mean["lion", 1000 * factor] == pytest.approx(2.002)
        assert mean["lion", 0] == pytest.approx(5.0)
        (target,) = drawn_rows(panel, "rule")
        assert target["y"] == pytest.approx(2.102)
    assert {r["x"] for r in drawn_rows(losses, "point")} == {500, 1000}
    assert "lion ends at 2.002 and reaches the target after" in drawn["curves"].alt


def test_labels_of_what_lies_outside_the_plot_stay_inside_and_say_a_value_once() -> None:
    scores = {"adamw": 2.0, "lion": 2.01, "muon": 2.02, "soap": 2.03, "quad": 2.04, "sgd": 9.0, "simba": 9.5}
    records = [make_record(name, value, phase="tuned") for name, value in scores.items()]
    drawn = figures(Section(make_experiment([*scores]), records, []), styles(scores))
    (panel,) = next(figure for figure in drawn if figure.key == "frontier").panels
    y = panel["layer"][0]["encoding"]["y"]["scale"]["domain"]
    rows = drawn_rows(panel, "text")
    pixels = {row["optimizer"]: panel["height"] * (y[1] - row["y"]) / (y[1] - y[0]) for row in rows}
    assert {*pixels} == {*scores}
    # A letter is 12 pixels high and stands 9 above its height.
    assert min(pixels.values()) >= 21
    assert max(pixels.values()) <= panel["height"]
    assert abs(pixels["sgd"] - pixels["simba"]) > 15
    assert {row["text"] for row in rows} == {*scores} - {"sgd", "simba"} | {"sgd ↑ 9", "simba ↑ 9.5"}


def test_labels_of_equal_results_do_not_meet_on_a_phone() -> None:
    """The one beside 4 bytes is to the right of its mark, the one beside 8 to the left."""
    sizes = {"adamw": 800, "sgd_sai": 400}
    records = [make_record(name, 2.0, phase="tuned", state_bytes=size) for name, size in sizes.items()]
    drawn = figures(Section(make_experiment([*sizes]), records, []), styles(sizes))
    (panel,) = next(figure for figure in drawn if figure.key == "frontier").panels
    low, high = panel["layer"][0]["encoding"]["y"]["scale"]["domain"]
    one, other = (row["label"] for row in drawn_rows(panel, "text"))
    assert panel["height"] * abs(one - other) / (high - low) > 15


def test_the_search_shows_each_trial_at_its_lr_a_cross_only_for_divergence_and_arrows_with_values(
    drawn: dict[str, Figure],
) -> None:
    panels = {panel["usermeta"]["optimizer"]: panel for panel in drawn["search"].panels}
    for name, panel in panels.items():
        inside = drawn_rows(panel, "point", size=60)
        crosses = drawn_rows(panel, "point", shape=CROSS)
        arrows = drawn_rows(panel, "point", shape="triangle-up")
        assert {r["x"] for r in inside + crosses + arrows} == {*LRS}
        assert [r["x"] for r in crosses] == ([1e-2] * 2 if name == "signgsd" else [])
        assert [r["value"] for r in arrows] == ([60.0] * 2 if name == "lion" else [])
        for row in inside:
            assert row["y"] == row["value"]
            expected = BEST[name] + abs(LRS.index(row["x"]) - 1) ** 2 * 0.1 + row["weight_decay"]
            assert row["y"] == pytest.approx(expected)
        (ring,) = drawn_rows(panel, "point", size=230)
        assert (ring["x"], ring["weight_decay"]) == (3e-4, 0.0)
        for layer in layers(panel):
            scale = layer["encoding"]["x"]["scale"]
            assert scale["type"] == "log"
            assert not scale["nice"]
            assert scale["domain"][0] < 1e-4 < 1e-2 < scale["domain"][1]
    assert [r["text"] for r in drawn_rows(panels["lion"], "text")] == ["60"]
    assert "signgsd: best at lr 0.0003, weight decay 0; 2 of 8 diverged" in drawn["search"].alt


def test_a_search_over_ranges_has_small_multiples_of_each_hyper_parameter() -> None:
    records = [
        make_record("adamw", 2.0 + n / 10, searched={"lr": 1e-3 * 1.7**n, "weight_decay": 0.01 * 1.3**n})
        for n in range(5)
    ]
    figure = {f.key: f for f in figures(Section(make_experiment(["adamw"]), records, []), styles(["adamw"]))}
    assert [*figure] == ["search", "search-weight_decay"]
    rows = drawn_rows(figure["search-weight_decay"].panels[0], "point", size=60)
    assert [row["x"] for row in rows] == pytest.approx([0.01 * 1.3**n for n in range(5)])


def test_the_heat_map_has_a_cell_per_setting_and_marks_the_best(drawn: dict[str, Figure]) -> None:
    panels = {panel["usermeta"]["optimizer"]: panel for panel in drawn["grid"].panels}
    panel = panels["signgsd"]
    assert len(drawn_rows(panel, "rect", style="empty")) == 8
    (best,) = drawn_rows(panel, "rect", strokeWidth=3)
    assert (best["x"], best["y"]) == (3e-4, 0.0)
    texts = {(row["lr"], row["weight_decay"]): row["text"] for row in drawn_rows(panel, "text")}
    assert texts[1e-2, 0.1] == "×"
    assert texts[1e-3, 0.1] == "2.800"
    assert panel["title"]["subtitle"] == ["1 of 8 cells within 1 %"]


def test_costs_are_drawn_log_log_and_planned_ones_hollow() -> None:
    costs = {
        f"{name} {size}": Cost(
            optimizer=name, model=f"m{size}", parameters=size, state_bytes=8 * size, peak_bytes=9 * size,
            optimizer_ms=None if size == 10**9 else size / 1e6, planned=size == 10**9,
        )
        for name in ("adamw", "lion") for size in (10**6, 10**8, 10**9)
    }  # fmt: skip
    section = Section(make_experiment(costs=costs, trials=0), [], [])
    (figure,) = figures(section, styles(section.names))
    times, state, _ = figure.panels
    assert {r["x"] for r in drawn_rows(times, "point")} == {10**6, 10**8}
    assert {r["x"] for r in drawn_rows(state, "point", filled=False)} == {10**9}
    assert {(r["x"], r["y"]) for r in drawn_rows(state, "point")} == {
        (n, 8 * n) for n in (10**6, 10**8, 10**9)
    }
    scales = [
        layer["encoding"][axis]["scale"]["type"]
        for panel in figure.panels
        for layer in layers(panel)
        for axis in "xy"
    ]
    assert {*scales} == {"log"}


def test_optimizers_without_state_are_named_where_a_logarithmic_axis_cannot_show_them() -> None:
    costs = {
        f"{name} {size}": Cost(
            optimizer=name, model="m", parameters=size, state_bytes=state * size, optimizer_ms=1.0
        )
        for name, state in (("signgsd", 0), ("lion", 4))
        for size in (10**6, 10**8)
    }
    for chosen, drawn in (
        (costs, [4 * 10**6, 4 * 10**8]),
        ({k: costs[k] for k in [*costs][::2]}, [0, 4 * 10**6]),
    ):
        section = Section(make_experiment(costs=chosen, trials=0), [], [])
        (figure,) = figures(section, styles(section.names))
        axis = "y" if chosen is costs else "x"
        assert sorted(row[axis] for row in drawn_rows(figure.panels[1], "point")) == drawn
        assert ("Without state, and so not drawn there: signgsd." in figure.caption) == (chosen is costs)


def test_costs_on_one_model_are_a_point_per_optimizer() -> None:
    costs = {
        name: Cost(optimizer=name, model="m", parameters=9, state_bytes=72, optimizer_ms=ms)
        for name, ms in (("adamw", 2.0), ("lion", 1.0))
    }
    section = Section(make_experiment(costs=costs, trials=0), [], [])
    (figure,) = figures(section, styles(section.names))
    times, state = figure.panels
    assert {(r["y"], r["x"]) for r in drawn_rows(times, "point")} == {("adamw", 2.0), ("lion", 1.0)}
    assert [r["x"] for r in drawn_rows(state, "point")] == [72.0, 72.0]
    assert section.warnings == []


def test_series_are_means_over_the_seeds_a_panel_per_tensor(drawn: dict[str, Figure]) -> None:
    first, second = drawn["series-gain"].panels
    assert (first["title"]["text"], second["title"]["text"]) == ("layer0", "layer1")
    assert {(r["x"], r["y"]) for r in drawn_rows(second, "point")} == {(0, 1.0), (500, 3.0)}
    assert "lion from 1 to 3" in drawn["series-gain"].alt


def test_records_of_several_lengths_are_drawn_against_them() -> None:
    records = [
        make_record("adamw", 3.0 - steps / 1000 + seed / 100, phase="tuned", steps=steps, seed=seed)
        for steps in (500, 1000, 2000)
        for seed in (1, 2)
    ]
    found = {f.key: f for f in figures(Section(make_experiment(["adamw"]), records, []), styles(["adamw"]))}
    means = {r["x"]: r["y"] for r in drawn_rows(found["horizon"].panels[0], "point")}
    assert means == pytest.approx({500: 2.515, 1000: 2.015, 2000: 1.015})


def test_the_drawn_range_leaves_out_what_is_far_worse_and_nothing_that_is_better() -> None:
    low, high = drawn_range([2.0, 2.1, 2.2, 2.3, 900.0, math.nan], True)
    assert low < 2.0 < 2.3 < high < 3
    low, high = drawn_range([90.0, 91.0, 89.0, 10.0, 92.0], False)
    assert 80 < low < 89
    assert 92 < high < 94
    assert drawn_range([], True) == (0.0, 1.0)
    low, high = drawn_range([2.0, 2.0], True)
    assert low < 2.0 < high
    # Where most are as good as the best, "much worse than the median" says nothing.
    low, high = drawn_range([1.0, 1.0, 1.0, 2.0], True)
    assert low < 1.0 < 2.0 < high


@pytest.mark.parametrize("case", ["all diverged", "one record", "one seed", "far off", "infinite", "nothing"])
def test_charts_survive_what_experiments_do(case: str) -> None:
    diverged = [make_record("lion", math.nan, lr=10.0**-n) for n in range(3)]
    records = {
        "all diverged": [*diverged, make_record("lion", math.nan, phase="tuned")],
        "one record": [make_record()],
        "one seed": [make_record("adamw", 2.0, phase="tuned"), *diverged],
        "far off": [
            make_record("adamw", v, phase="tuned", seed=n) for n, v in enumerate([2.0, 2.1, 1e30], 1)
        ],
        "infinite": [make_record("adamw", 2.0, phase="tuned", curve=[(0, math.inf), (500, 3.0)])],
        "nothing": [],
    }[case]
    section = Section(make_experiment(), records, [])
    for figure in figures(section, styles(section.names)):
        assert figure.alt
        text = json.dumps(figure.panels)
        assert "NaN" not in text
        assert "Infinity" not in text
        for panel in figure.panels:
            for layer in layers(panel):
                domain = layer["encoding"].get("y", {}).get("scale", {}).get("domain", [0, 1])
                assert np.isfinite(domain).all()
                assert domain[0] < domain[1]


def test_the_same_specification_is_valid_and_becomes_png_and_svg_in_the_optimizers_colours() -> None:
    section = make_section(metrics=[Metric(name="loss")])
    style = styles(section.names)
    figure, *others = figures(section, style)
    for each in (figure, *others):
        # Half as long as building Altair's objects from it, which checks against this schema too.
        validate_jsonschema(chart(each, style, "light"), alt.load_schema())
    svg = picture(chart(figure, style, "dark"), "svg").decode()
    for name in ALL:
        assert style[name].dark in svg
        assert f">{name}<" in svg
    assert style["lion"].light not in svg
    assert picture(chart(figure, style, "light"), "png").startswith(b"\x89PNG")
