"""Deterministic parameters and inputs for the golden traces.

Nothing is stored that a formula can give: every parameter and every noise draw of a
golden case comes from NumPy's frozen legacy generator, seeded by the case's seed and
the tensor's name. Parameter names are those of the public Wan-family checkpoints.
"""

import zlib

import numpy as np
import torch


def tensor(seed: int, name: str, shape) -> torch.Tensor:
    """Standard normal float32 tensor of `shape`, fixed by (seed, name)."""
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ (seed * 2654435761)) & 0xFFFFFFFF)
    return torch.from_numpy(state.standard_normal(tuple(shape)).astype(np.float32))


def fill(module: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter of `module` with its golden value.

    norm weights (1-D, name ends in 'weight'): 1 + 0.1 n;  other 1-D: 0.02 n;
    'modulation': n / sqrt(last dim);  everything else: n / sqrt(fan_in).
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = tensor(seed, name, parameter.shape)
            if name.endswith("modulation"):
                value = value / parameter.shape[-1] ** 0.5
            elif parameter.ndim == 1:
                value = 1 + 0.1 * value if name.endswith("weight") else 0.02 * value
            else:
                value = value / (parameter[0].numel() ** 0.5)
            parameter.copy_(value)
