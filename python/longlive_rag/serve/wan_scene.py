"""A Wan-family checkpoint as a scene: any prompt, one context policy or several side by side."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from longlive_rag.generation.pipeline import Pipeline
from longlive_rag.serve.scene import BlockDecoder, Scene, Shot, ShownPolicy, Wish

_KEPT_PROMPTS = 16


class WanScene(Scene):
    """The parts that `generate` loads, shown block by block.

    Args:
        pipeline: transformer, VAE, embedding and settings.
        encode: maps a prompt to its embeddings [text_len, text_dim].
        name: of the checkpoint, shown to viewers.
        prompt: what the video begins with.
    """

    default_policies = ("retrieval",)

    def __init__(self, pipeline: Pipeline, encode: Callable[[str], Tensor], *, name: str, prompt: str) -> None:
        settings, policy = pipeline.settings, pipeline.settings.policy
        self.name, self.default_prompt = name, self.understand(prompt)
        self.model, self.embedding, self.budget = pipeline.model, pipeline.embedding, pipeline.budget
        self.sampling, self.fps, self.block_frames = settings.sampling, settings.fps, policy.block_frames
        factor = pipeline.decoder.spatial_factor
        self.latent_shape = (self.model.in_dim, settings.height // factor, settings.width // factor)
        window = replace(policy, memory_frames=0, recency_guard=0, positions="absolute", query="latest")
        self.policies = {
            "sliding_window": ShownPolicy("forgets: sliding window", window),
            "latest_query": ShownPolicy("remembers: the paper’s query", replace(policy, query="latest")),
            "retrieval": ShownPolicy("remembers: draft query", replace(policy, query="draft")),
        }
        self._decoder, self._encode = pipeline.decoder, encode
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()

    def understand(self, prompt: str) -> str:
        words = " ".join(prompt.split())
        if not words:
            raise ValueError("Write what should be seen.")
        return words

    def next_shot(self, wish: Wish, before: Shot | None) -> Shot:
        return Shot(wish.prompt)

    def embeds(self, shot: Shot) -> Tensor:
        if shot.prompt not in self._embeds:
            self._embeds[shot.prompt] = self._encode(shot.prompt)[None].to(self.device, self.dtype)
            if len(self._embeds) > _KEPT_PROMPTS:
                self._embeds.popitem(last=False)
        self._embeds.move_to_end(shot.prompt)
        return self._embeds[shot.prompt]

    def new_decoder(self) -> BlockDecoder:
        decoder = copy.copy(self._decoder)  # the weights are shared
        decoder.reset()  # its memory of the past is its own
        return BlockDecoder(lambda latents: decoder.decode(latents).numpy(), reach=decoder.reach)
