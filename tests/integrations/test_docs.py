"""The blocks of docs/frameworks.md run, each after the page's first, which makes the model and the data."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import steepest

from .tiny import assert_same, state

TEXT = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
# Sections whose blocks run in files of their own, such as test_litgpt.py.
OWN_FILE = {"DeepSpeed", "LitGPT", "Megatron", "kohya", "llm-foundry", "ms-swift", "torchtitan"}
# Those whose blocks run here, and what must be installed.
NEEDS = {
    "Transformers": ("transformers", "accelerate"),
    "Accelerate": ("accelerate",),
    "Lightning": ("lightning",),
    "Fabric": ("lightning",),
    "PEFT": ("peft",),
    "TRL": ("trl",),
    "timm": ("timm",),
    "Hydra": ("hydra",),
}
# What a section's blocks print, the table of explain() for instance.
PRINTED = {"Transformers": "'lr/lion'", "Lightning": "net.0.weight"}


def sections() -> dict[str, str]:
    """Heading -> what stands below it."""
    parts = re.split(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


# The model and the data of all blocks, and what writes them to files.
FIRST, ON_DISK = blocks(sections()["Install and resume"])


def test_every_section_with_python_is_run():
    found = {name for name, text in sections().items() if blocks(text)}
    assert found == {"Install and resume", *NEEDS, *OWN_FILE}


@pytest.mark.parametrize("section", NEEDS)
def test_its_blocks_run(section, tmp_path, monkeypatch, capsys):
    for module in NEEDS[section]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in (FIRST, *blocks(sections()[section])):
        if not block.startswith("# train.py"):
            exec(compile(block, f"docs/frameworks.md, {section}", "exec"), names)
    assert PRINTED.get(section, "") in capsys.readouterr().out
    if section == "Hydra":  # its optimizer's state is compared nowhere else
        assert_same(names["resumed"], names["whole"])


def test_the_script_for_the_command_line_trains_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    (script,) = (block for block in blocks(sections()["Lightning"]) if block.startswith("# train.py"))
    Path("train.py").write_text(FIRST + script, encoding="utf-8")
    (commands,) = blocks(sections()["Lightning"], "sh")
    fits = []
    lines = commands.replace("\\\n", "").splitlines()
    without_stop = lines[1].partition(" --ckpt_path")[0] + " --trainer.default_root_dir runs/whole"
    for line in (*lines, without_stop):
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        fits.append(runpy.run_path("train.py", run_name="__main__")["cli"].trainer)
    _, resumed, whole = fits
    assert [(fit.current_epoch, fit.global_step) for fit in fits] == [(1, 8), (2, 16), (2, 16)]
    assert type(whole.optimizers[0]).__name__ == "Muon+AdamW"
    assert_same(state(resumed.model), state(whole.model))
    assert_same(state(resumed.optimizers[0]), state(whole.optimizers[0]))


def test_its_names_exist():
    named = set(re.findall(r"\bsteepest\.(\w+)\b(?!\.)", TEXT)) - {"integrations"}
    assert {"Auto", "Recipe", "param_groups", "build"} <= named
    assert all(hasattr(steepest, name) for name in named)


def test_deepspeeds_flags_are_json():
    (flags,) = blocks(sections()["DeepSpeed"], "json")
    assert json.loads(flags)["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize(
    ("section", "package"),
    [
        ("Axolotl", "axolotl"),
        ("LitGPT", "litgpt"),
        ("Megatron", "megatron-core"),
        ("ms-swift", "ms-swift"),
        ("torchtitan", "torchtitan"),
    ],
)
def test_it_installs_the_releases_that_are_tested(section, package):
    root = Path(__file__).parents[2]
    lists = [root / "constraints.txt", root / "tests" / "integrations" / "stacks" / f"{package}.txt"]
    pinned = "".join(each.read_text(encoding="utf-8") for each in lists if each.exists())
    pinned = {re.sub("[-_]", "-", line.partition(";")[0]) for line in pinned.splitlines()}
    named = set(re.findall(r"\S+==\S+", blocks(sections()[section], "sh")[0]))
    assert named <= pinned
    assert package in {each.partition("==")[0] for each in named}
    assert section == "torchtitan" or "torch==2.13.0" in named  # torchtitan's needs a later one


def test_the_tests_that_it_names_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)`", TEXT)
    table = re.findall(r"^\| .* \| yes\b.*$", sections()["Install and resume"], re.MULTILINE)
    assert len(table) == 17
    of_stacks = [re.findall(r"`(test_\w+\.py)`|(\*page\*)", row) for row in table]
    assert all(of_stacks)
    named += [f"tests/integrations/{file}" for row in of_stacks for file, _ in row if file]
    assert all((Path(__file__).parents[2] / each).exists() for each in named)


def test_its_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (Path(__file__).parents[2] / "docs" / target).exists(), target
