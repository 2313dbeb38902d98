"""What fewer bits, and rebuilding from latents, do to the output of attention over real latents.

    python benchmarks/page_bits_clip.py CLIP --json FILE [--layers 6] [--rows 40] [--columns 64]

CLIP is a safetensors file with `latents` [frames, 16, height, width] of a real video. They go, a clean pass for each
frame, through a transformer of Wan 1.3B's width with random weights, on a device with room for one context and one
block. The output of each attention is compared with that over untouched pages, which is also what the model goes on
with: every attention's own error is seen, and none adds up. Random weights make keys and values without the outliers
that trained ones may have, so that this is no substitute for the trained model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from page_bits import PRECISIONS, REFERENCE, tight
from safetensors.torch import load_file
from torch import Tensor

import longlive_rag
from longlive_rag import Budget, RetrievalConfig, RetrievalMemory
from longlive_rag.embedding import AveragePool
from longlive_rag.files import check_writable, write_json
from longlive_rag.models import CausalWanModel
from longlive_rag.models.causal_wan import Attention

POLICY = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=3, recency_guard=0, block_frames=1)


class Listening:
    """Attention of a memory whose outputs are kept; with a reference, the model goes on with the reference's."""

    def __init__(self, memory: RetrievalMemory, reference: Iterator[Tensor] | None) -> None:
        self._memory, self._reference = memory, reference
        self.outputs: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **norm: Any) -> Tensor:
        self.outputs.append(self._memory.attend(layer, q, k, v, **norm))
        return self.outputs[-1] if self._reference is None else next(self._reference)


def attention_outputs(
    model: CausalWanModel, clip: Tensor, budget: Budget, reference: list[Tensor] | None
) -> tuple[list[Tensor], dict[int, list[list[int]]]]:
    """Outputs over the clip [1, F, C, H, W] by frame and layer, and what each frame retrieved."""
    prompt = model.prepare_prompt(torch.randn(1, 8, model.text_dim, generator=torch.Generator().manual_seed(1)))
    timestep = torch.zeros(1, 1)

    def clean_pass(video: int, frames: range, latents: Tensor, attention: Attention) -> None:
        model(latents, timestep, prompt, attention)

    with RetrievalMemory.for_model(
        model, clip.shape, POLICY, embedding=AveragePool(), budget=budget, clean_pass=clean_pass
    ) as memory:
        listening = Listening(memory, None if reference is None else iter(reference))
        for frame, latents in enumerate(clip.split(1, dim=1)):
            memory.begin_block(frame, 1)
            model(latents, timestep, prompt, listening)
            memory.commit(latents)
        return listening.outputs, {entry.block_start: entry.frames for entry in memory.retrieved}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="safetensors file with latents [frames, 16, height, width]")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--layers", type=int, default=6, help="of the transformer; default 6")
    parser.add_argument("--rows", type=int, help="of each latent frame, from the top; default all")
    parser.add_argument("--columns", type=int, help="of each latent frame, from the left; default all")
    options = parser.parse_args()
    check_writable(options.json)
    clip = load_file(options.clip)["latents"][None, ..., : options.rows, : options.columns].float()
    torch.manual_seed(0)
    model = CausalWanModel.from_size("1.3B", num_layers=options.layers).eval()
    expected, retrieved = attention_outputs(model, clip, Budget(), None)
    first = options.layers * (POLICY.context_frames + POLICY.block_frames)  # until then all is on the device
    results: dict[str, Any] = {}
    for precision in PRECISIONS:
        if precision == REFERENCE:
            continue
        budget = tight(model, POLICY, (clip.shape[3], clip.shape[4]), 1, precision)
        actual, frames = attention_outputs(model, clip, budget, expected)
        if frames != retrieved:
            raise AssertionError(f"other frames were retrieved with {precision}: {frames}, not {retrieved}")
        layers = [slice(first + layer, None, options.layers) for layer in range(options.layers)]
        pairs = [(torch.stack(actual[layer]), torch.stack(expected[layer])) for layer in layers]
        results[precision] = {
            "error_over_output_by_layer": [round(float((a - e).norm() / e.norm()), 6) for a, e in pairs],
            "largest_error": round(max(float((a - e).abs().max()) for a, e in pairs), 6),
            "largest_output": round(max(float(e.abs().max()) for _, e in pairs), 6),
        }
        print(precision, results[precision], flush=True)
    facts = {"version": longlive_rag.__version__, "torch": torch.__version__, "clip": options.clip.name}
    size = {"latents": list(clip.shape[1:]), "layers": options.layers}
    write_json(options.json, {**facts, **size, "precisions": results})


if __name__ == "__main__":
    main()
