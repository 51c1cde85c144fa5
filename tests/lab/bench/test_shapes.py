from __future__ import annotations

import pytest

from steepest.lab import LabError
from steepest.lab.bench.shapes import SHAPE_LISTS, shape_list

# As published with the models.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "resnet18": 11_689_512,
    "vit-s16": 22_050_664,
    "llama-1b": 1_100_048_384,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_the_parameters_add_up_to_the_published_count(name: str, count: int) -> None:
    assert shape_list(name).numel == count


def test_gpt2_has_148_tensors_of_which_48_are_hidden_matrices() -> None:
    shapes = shape_list("gpt2-124m")
    assert (len(shapes.tensors), len(shapes.hidden()), shapes.blocks) == (148, 48, 12)
    assert sum(tensor.numel for tensor in shapes.hidden()) == 12 * 12 * 768 * 768
    assert [tensor.shape for tensor in shapes.hidden(1)] == [
        (2304, 768),
        (768, 768),
        (3072, 768),
        (768, 3072),
    ]


@pytest.mark.parametrize("name", SHAPE_LISTS)
def test_names_are_unique_and_hidden_tensors_are_matrices_of_no_embedding_and_no_head(name: str) -> None:
    shapes = shape_list(name)
    assert shapes.name == name
    assert len({tensor.name for tensor in shapes.tensors}) == len(shapes.tensors)
    for tensor in shapes.hidden():
        assert len(tensor.shape) in (2, 4)
        assert not any(word in tensor.name for word in ("embed", "wte", "wpe", "head"))
    hidden = {tensor.name for tensor in shapes.hidden()}
    stem_and_head = [t for t in shapes.tensors if len(t.shape) in (2, 4) and t.name not in hidden]
    assert 1 <= len(stem_and_head) <= 2
    assert {tensor.block for tensor in shapes.hidden()} == set(range(shapes.blocks))


def test_an_unknown_model_is_named_with_those_that_there_are() -> None:
    with pytest.raises(LabError, match=r"'gpt5'.*resnet18"):
        shape_list("gpt5")
