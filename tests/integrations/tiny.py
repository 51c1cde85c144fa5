"""Tiny models and data that frameworks train in a second, and how to compare trainings bit for bit."""

import copy
import doctest
import inspect
from types import ModuleType

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 32, 8


def llama(seed: int = 0):
    """A language model of two layers, 16 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def tiny_model(kind: str):
    """A model of another architecture, one layer and 16 wide."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH, pad_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "t5":
        sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
        config = transformers.T5Config(**sizes, num_heads=2, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "modernbert":
        special = dict.fromkeys(("pad", "eos", "bos", "cls", "sep"), 0)
        config = transformers.ModernBertConfig(
            **sizes,
            **{f"{name}_token_id": index for name, index in special.items()},
            intermediate_size=32,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
        return transformers.ModernBertForMaskedLM(config)
    assert kind == "mamba"
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4))


def sentences(count: int = 32) -> list[dict[str, Tensor]]:
    """Sequences of tokens that are their own labels."""
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each, "labels": each} for each in tokens]


def mlp(seed: int = 0) -> nn.Sequential:
    """Two hidden layers with a norm between them, and an output layer."""
    torch.manual_seed(seed)
    hidden = nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(16, 4))


def rates_of_steps(optimizer) -> list[float]:
    """Return a list that gets the first group's learning rate as each step begins."""
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda one, *given: used.append(float(one.param_groups[0]["lr"])))
    return used


def rows(count: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs of 8 numbers, and classes."""
    draw = torch.Generator().manual_seed(2)
    return torch.randn(count, 8, generator=draw), torch.randint(4, (count,), generator=draw)


def train(model, optimizer, steps: int = 2) -> None:
    """Train on all rows at once."""
    x, y = rows()
    for _ in range(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def state(thing) -> dict:
    """A copy of a state dict, which training on would not change."""
    return copy.deepcopy(thing.state_dict())


def assert_same(found, expected, where: str = "") -> None:
    """Raise unless two nested state dicts are equal, tensors bit for bit and dtype for dtype."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def run_examples(module: ModuleType) -> int:
    """Run the examples in a module's docstrings, return how many there were."""
    assert inspect.getdoc(module)
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0
    return tried
