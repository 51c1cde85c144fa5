"""Train an MLP with tensor parallelism and Muon.

Run `torchrun --nproc-per-node 2 examples/tensor_parallel.py`, on CPUs or GPUs; it takes a few seconds. The
first layer of each block is cut by rows and the second by columns, so that a block communicates once. Muon
needs whole matrices: each is computed by one rank, to which the parts travel in every step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import steepest

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def spirals(points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two interleaved spirals: points of shape (points, 2) and their labels, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (points,), generator=generator)
    radius = torch.rand(points, generator=generator).sqrt()
    angle = 6 * radius + torch.pi * labels
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1), labels


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)  # the same initial weights on all ranks
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    device = torch.device("cuda" if on_gpu else "cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    model = Model().to(device)
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    # After the model is parallelized. Plain parameters (stem, norms, head) are equal on all ranks.
    optimizer = steepest.build(model, "muon", lr=3e-3)
    if dist.get_rank() == 0:
        print(optimizer.explain())

    losses = []
    for step in range(steps):
        # All ranks see the same points: they share one replica of the model.
        points, labels = (each.to(device) for each in spirals(256, seed=step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if dist.get_rank() == 0 and step % 20 == 19:
            print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.destroy_process_group()
