"""A scene that is made in milliseconds: a tiny random backbone whose latents are its pictures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longlive_rag.budget import Budget
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import AveragePool
from longlive_rag.generation.sampling import Sampling
from longlive_rag.models import CausalWanModel
from longlive_rag.serve.scene import BlockDecoder, Scene, Shot, ShownPolicy, Wish

MEMORY = RetrievalConfig(
    context_frames=4, sink_frames=1, memory_frames=1, recency_guard=0, block_frames=1, query="draft"
)


class TinyScene(Scene):
    name = "tiny"
    fps = 10.0
    block_frames = 1
    latent_shape = (4, 8, 8)
    places = ("here", "there")
    default_prompt = "here"
    default_policies = ("forgets", "remembers")
    enlarge = 4

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = CausalWanModel(
            dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=2, num_heads=1, num_layers=1, in_dim=4, out_dim=4
        ).requires_grad_(False)
        self.embedding = AveragePool()
        self.sampling = Sampling((1000, 500), 1.0)
        self.budget = Budget()
        self.policies = {
            "forgets": ShownPolicy("forgets: window", replace(MEMORY, memory_frames=0)),
            "remembers": ShownPolicy("remembers: draft", MEMORY),
        }
        self._embeds = {place: torch.randn(1, 2, 8) for place in self.places}
        self.fails: Exception | None = None
        """Raised, once, when the next block is decoded."""

    def understand(self, prompt: str) -> str:
        if prompt not in self.places:
            raise ValueError("Only here and there.")
        return prompt

    def next_shot(self, wish: Wish, before: Shot | None) -> Shot:
        return Shot(wish.prompt)

    def embeds(self, shot: Shot) -> Tensor:
        return self._embeds[shot.prompt]

    def new_decoder(self) -> BlockDecoder:
        def decode(latents: Tensor):
            if self.fails is not None:
                error, self.fails = self.fails, None
                raise error
            return (latents[:, :3] * 40 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()

        return BlockDecoder(decode, reach=0)
