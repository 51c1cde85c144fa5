"""torchtitan's command for the CPU and torch 2.13, in place of ``torchrun -m torchtitan.train``.

That runs on accelerators only. Replaced are the device that it looks for, what it asks about the device's
memory, flex attention's kernel, which has no backward pass on the CPU, and a function of torch 2.14.
"""

from types import SimpleNamespace

import torch
import torch._utils
from torch.nn.attention import flex_attention


class Cpu:
    """``torch.cpu`` with the functions that ``torch.cuda`` has besides."""

    current_device = staticmethod(lambda: 0)
    get_device_name = staticmethod(lambda device: "CPU")
    get_device_properties = staticmethod(lambda device: SimpleNamespace(total_memory=1))
    memory_stats = staticmethod(lambda device: {})
    reset_peak_memory_stats = empty_cache = staticmethod(lambda: None)

    def __getattr__(self, name):
        return getattr(torch.cpu, name)


def run() -> None:
    """Put the replacements in place and run the command; nothing happens where this file is only imported."""
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device: Cpu()
    flex_attention._validate_device = lambda *tensors: None
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout

    # It looks for a device as soon as it is imported.
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.train import main

    FlexAttention._compiled_flex_attn = staticmethod(flex_attention.flex_attention)
    main()


if __name__ == "__main__":
    run()
