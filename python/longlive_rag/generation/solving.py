"""From noise to the clean latents of a block: by the solver of the sampling, and around latents that are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longlive_rag.generation.sampling import FreshNoise, Sampling, denoise
from longlive_rag.generation.unipc import unipc


def solve(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sampling: Sampling,
    fresh_noise: FreshNoise,
    held: Tensor | None,
) -> Iterator[Tensor]:
    """Yield the clean prediction of a block after each step; the last one is the result.

    Args:
        predict, noise: as for `denoise` and `unipc`.
        fresh_noise: for the solver that draws it.
        held: the block's first latents, which stay as they are.
    """

    def with_held(latents: Tensor) -> Tensor:
        return latents if held is None else torch.cat([held, latents[:, held.shape[1] :]], dim=1)

    def predict_rest(latents: Tensor, timestep: Tensor) -> Tensor:
        if held is not None:
            timestep = timestep.clone()
            timestep[:, : held.shape[1]] = 0
        return predict(with_held(latents), timestep)

    steps = (
        unipc(predict_rest, noise, sampling.timesteps)
        if sampling.solver == "unipc"
        else denoise(predict_rest, noise, sampling.timesteps, fresh_noise)
    )
    return map(with_held, steps)


def matching_first(first: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, n, C, H, W] that a block begins with, as the block's noise is.

    Raises:
        ValueError: they do not fit into the block.
    """
    shape = (noise.shape[0], *noise.shape[2:])
    if first.ndim != 5 or (first.shape[0], *first.shape[2:]) != shape or not 0 < first.shape[1] < noise.shape[1]:
        raise ValueError(
            f"first must be [{noise.shape[0]}, n, {', '.join(map(str, noise.shape[2:]))}] like the noise, with n below "
            f"{noise.shape[1]}, got {list(first.shape)}"
        )
    return first.to(noise)
