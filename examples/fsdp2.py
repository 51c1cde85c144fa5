"""Train a small language model with FSDP2 and Muon, and resume from a sharded checkpoint.

Run `torchrun --nproc-per-node 2 examples/fsdp2.py [DIRECTORY]`, on CPUs or GPUs. It reads the source of
Python's standard library, takes a few seconds, and leaves a checkpoint in DIRECTORY (default: runs/fsdp2).
Run it again, also with another number of processes, and it goes on from there.
"""

import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import steepest

CONTEXT, WIDTH, DEPTH = 64, 64, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Model(nn.Module):
    """A GPT over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).flatten(0, 1))


def corpus() -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:30])
    return torch.frombuffer(bytearray(source), dtype=torch.uint8)


def batch(text: Tensor, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of the text, others on each rank and in each step."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - CONTEXT - 1, (8,), generator=generator)
    windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts]).long().to(device)
    return windows[:, :-1], windows[:, 1:]


def main(directory: str = "runs/fsdp2", steps: int = 20) -> list[float]:
    """Take some steps more than the checkpoint has; return their losses."""
    torch.manual_seed(0)  # the same initial weights on all ranks
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    device = torch.device("cuda" if on_gpu else "cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    model = Model().to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After the model is sharded. The hidden matrices go to Muon, everything else to AdamW.
    views = {f"blocks.{at}.qkv.weight": steepest.views.rows(WIDTH, WIDTH, WIDTH) for at in range(DEPTH)}
    optimizer = steepest.build(model, "muon", lr=3e-3, views=views)

    first = 0
    if (Path(directory) / ".metadata").exists():
        models, optimizers = get_state_dict(model, optimizer)
        loaded = {"model": models, "optimizer": optimizers, "step": torch.zeros((), dtype=torch.int64)}
        dcp.load(loaded, checkpoint_id=directory)
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        first = int(loaded["step"])
    if dist.get_rank() == 0:
        print(optimizer.explain())

    text, losses = corpus(), []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        inputs, targets = batch(text, step, device)
        loss = F.cross_entropy(model(inputs), targets.flatten())
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {losses[-1]:.3f}")

    models, optimizers = get_state_dict(model, optimizer)
    taken = torch.tensor(first + steps)
    dcp.save({"model": models, "optimizer": optimizers, "step": taken}, checkpoint_id=directory)
    return losses


if __name__ == "__main__":
    dist.init_process_group()
    main(*sys.argv[1:])
    dist.destroy_process_group()
