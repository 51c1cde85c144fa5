from __future__ import annotations

import math
from itertools import combinations

import pytest

import steepest
from steepest.lab.report.theme import _COLORS, _KNOWN, MODES, PAGE, Mode, config, place, styles

FOREIGN = [f"somebody.module:Optimizer{number}" for number in range(12)]


def test_a_colour_follows_from_the_name_alone() -> None:
    everything = styles([*steepest.list_optimizers(), *FOREIGN])
    for name in everything:
        for few in ([name], [name, "muon"], ["zzz", name]):
            for mode in MODES:
                assert getattr(styles(few)[name], mode) == getattr(everything[name], mode)


def test_our_rules_have_different_colours_and_other_spellings_the_same() -> None:
    # There are as many colours as names that have one of their own; a name without takes another's colour.
    ours = [name for name in steepest.list_optimizers() if name.replace("_", "") in _KNOWN]
    assert len({place(name) for name in ours}) == len(ours) > 18
    assert place("torch.optim:AdamW") == place("adamw") != place("torch.optim:Adam")
    # By a hash that no process salts: this place must never change.
    assert place("pytorch_optimizer:Prodigy") == 12


@pytest.mark.parametrize("mode", MODES)
def test_the_config_has_the_colours_in_the_order_of_the_styles(mode: Mode) -> None:
    chosen = styles(["muon", "adamw"])
    assert config(chosen, mode)["range"]["category"] == [getattr(chosen[name], mode) for name in chosen]


def test_no_two_optimizers_differ_in_colour_alone() -> None:
    many = styles([*steepest.list_optimizers(), *FOREIGN]).values()
    assert len({(style.shape, style.dash) for style in many}) == len(many)
    # Optimizers that prefer the same shape and colour, on one page.
    ten = styles(
        ["adamw", "torch.optim:AdamW", "other:adamw", "normuon", "signum", "a", "b", "c", "d", "e"]
    ).values()
    assert len({style.shape for style in ten}) == 10


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def channels(color: str) -> list[float]:
    return [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_text_and_lines_have_enough_contrast(mode: Mode) -> None:
    page = PAGE[mode]
    assert contrast(page["text"], page["background"]) > 7
    assert contrast(page["muted"], page["background"]) > 4.5
    assert all(contrast(pair[MODES.index(mode)], page["background"]) > 2 for pair in _COLORS)


# Simulation of dichromatic vision on linear RGB (Machado, Oliveira and Fernandes 2009).
SIGHT = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "no green": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "no blue": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def cielab(color: str, sight: str) -> tuple[float, float, float]:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(color)]
    seen = [min(1.0, max(0.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in SIGHT[sight]]
    to_xyz = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))
    x, y, z = (sum(a * b for a, b in zip(row, seen, strict=True)) for row in to_xyz)
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("mode", MODES)
def test_the_colours_are_distinguishable_with_any_colour_vision(mode: Mode, sight: str) -> None:
    seen = [cielab(pair[MODES.index(mode)], sight) for pair in _COLORS]
    assert len(seen) == len(set(_KNOWN)) == 20
    # About ten just noticeable differences; the minimum among Okabe and Ito's eight is 16 on white.
    assert min(math.dist(a, b) for a, b in combinations(seen, 2)) > 10
