"""One of several gloo processes, among which Megatron's tensor parallelism cuts the layers."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import steepest

from .test_megatron import DEFINITIONS, STEPS, OnCpu, run_page, settings
from .tiny import rows, state

RULES = ["sgd", "lion"]
REFUSED = ["sgd_sai", "muon"]


class Model(nn.Module):
    """A hidden layer, of which each process has some neurons, and an output layer."""

    def __init__(self, world: int) -> None:
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        torch.manual_seed(0)
        config = ModelParallelConfig(tensor_model_parallel_size=world, use_cpu_initialization=True)
        options = {"config": config, "init_method": nn.init.xavier_uniform_, "bias": True}
        self.up = ColumnParallelLinear(8, 16, gather_output=False, **options)
        self.down = RowParallelLinear(16, 4, input_is_parallel=True, skip_bias_add=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)[0]))[0]

    def joined(self) -> list[Tensor]:
        return [joined(param) for param in self.parameters()]


def joined(param: Tensor) -> Tensor:
    if not getattr(param, "tensor_model_parallel", False):
        return param.detach().clone()
    shards = [torch.empty_like(param) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, param.detach().contiguous())
    return torch.cat(shards, param.partition_dim)


def train(model: nn.Module, optimizer: Any, steps: int = STEPS // 2) -> None:
    x, y = rows()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def alone(rule: str, start: list[Tensor]) -> list[Tensor]:
    """The same training by torch, of layers that nobody has cut."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(start), model.parameters())
    given = settings()
    optimizer = steepest.build(model, rule, lr=given.lr, weight_decay=given.weight_decay)

    def clip(*step: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), given.clip_grad)

    optimizer.register_step_pre_hook(clip)
    train(model, optimizer, STEPS)
    return [param.detach() for param in model.parameters()]


def run(make: Any, world: int) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for rule in RULES:
        whole, resumed = Model(world), Model(world)
        start = whole.joined()
        optimizers = [make(model, settings(), rule) for model in (whole, resumed)]
        train(whole, optimizers[0])
        resumed.load_state_dict(state(whole))
        optimizers[1].load_state_dict(state(optimizers[0]))
        train(whole, optimizers[0])
        train(resumed, optimizers[1])
        done[rule] = {"whole": whole.joined(), "resumed": resumed.joined(), "alone": alone(rule, start)}
    for rule in REFUSED:
        try:
            make(Model(world), settings(), rule)
        except ValueError as error:
            done[rule] = str(error)
    return done


def main(rank: int, world: int, folder: str) -> None:
    from megatron.core import parallel_state

    make = run_page(DEFINITIONS)["megatron_optimizer"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    with OnCpu():
        torch.save(run(make, world), f"{folder}/{rank}.pt")
    # gloo's threads and destructors can wait for each other at exit.
    dist.barrier()
    os._exit(0)
