"""decode: pictures of one block, three latent frames of 16 x 60 x 104 in the middle of a video, by Wan's VAE and by the
tiny decoder, with random weights. The pictures are on the CPU at the end, as the video's encoder takes them.

At 16 pictures a second a block of twelve must not take longer than 0.75 s together with the transformer, if it is to be
watched while it is made.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from longlive_rag.bench.common import Case, Machine, Row
from longlive_rag.generation.decoder import Decoder
from longlive_rag.generation.tiny_decoder import TinyDecoder, tiny_layers
from longlive_rag.generation.wan_vae import StreamingDecoder

FRAMES, CHANNELS = 3, 16
GOAL_SECONDS = 12 / 16


def cases(machine: Machine) -> dict[str, Case]:
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    name = str(dtype).removeprefix("torch.")
    return {
        f"{what}, {name}{', channels last' if last else ''}": partial(measure, machine, what, name, dtype, last)
        for what, last in (("Wan's VAE", False), ("tiny", False), ("tiny", True))
    }


def measure(machine: Machine, what: str, name: str, dtype: torch.dtype, channels_last: bool) -> Row:
    # A CPU would need minutes for a picture of the VAE at Wan's size.
    height, width = (60, 104) if machine.cuda else (4, 6)
    decoder = decoder_of(what, machine.device, dtype)
    if channels_last:
        assert isinstance(decoder, TinyDecoder)
        decoder.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    latents = torch.randn(FRAMES, CHANNELS, height, width, device=machine.device)
    decoder.decode(latents)  # from now on, it has a past
    with FlopCounterMode(display=False) as counter:
        decoder.decode(latents)

    def ours(_: int) -> Tensor:
        return decoder.decode(latents)

    (seconds,) = machine.seconds([ours], sets=1, graph=False)
    case = f"{what}, {name}{', channels last' if channels_last else ''}, {8 * height} x {8 * width}"
    limit = counter.get_total_flops() / machine.matmul_rate
    return Row("decode", case, seconds, limit, "matmul rate", goal=GOAL_SECONDS if machine.cuda else None)


def decoder_of(what: str, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder at its published size, with random weights."""
    if what == "tiny":
        return TinyDecoder(tiny_layers(CHANNELS, 1).to(device, dtype))
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan()
    return StreamingDecoder(nn.Module.to(vae.eval().requires_grad_(False), device, dtype))  # its own method warns
