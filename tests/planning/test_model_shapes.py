from __future__ import annotations

import pytest

from steepest.model_shapes import MODELS, model_shapes

# Published with the models.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "resnet18": 11_689_512,
    "vit-s16": 22_050_664,
    "llama-1b": 1_100_048_384,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_the_parameters_add_up_to_the_published_count(name: str, count: int) -> None:
    assert model_shapes(name).numel == count


def test_gpt2_has_148_tensors_of_which_48_are_hidden_matrices() -> None:
    shapes = model_shapes("gpt2-124m")
    assert (len(shapes.tensors), len(shapes.hidden()), shapes.blocks) == (148, 48, 12)
    assert sum(tensor.numel for tensor in shapes.hidden()) == 12 * 12 * 768 * 768
    assert [tensor.shape for tensor in shapes.hidden(1)] == [
        (2304, 768),
        (768, 768),
        (3072, 768),
        (768, 3072),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_and_hidden_tensors_exclude_embeddings_and_output_layers(name: str) -> None:
    shapes = model_shapes(name)
    assert shapes.name == name
    assert len({tensor.name for tensor in shapes.tensors}) == len(shapes.tensors)
    for tensor in shapes.hidden():
        assert len(tensor.shape) in (2, 4)
        assert not any(word in tensor.name for word in ("embed", "wte", "wpe", "head"))
    hidden = {tensor.name for tensor in shapes.hidden()}
    first_and_last = [t for t in shapes.tensors if len(t.shape) in (2, 4) and t.name not in hidden]
    assert 1 <= len(first_and_last) <= 2
    assert {tensor.block for tensor in shapes.hidden()} == set(range(shapes.blocks))


def test_the_error_for_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gpt5'.*resnet18"):
        model_shapes("gpt5")
