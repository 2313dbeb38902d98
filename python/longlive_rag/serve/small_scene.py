"""The bundled small world as a scene: four places that a camera cuts to, or pans across."""

from __future__ import annotations

import difflib
from dataclasses import replace

from torch import Tensor

from longlive_rag.budget import Budget
from longlive_rag.generation.sampling import Sampling
from longlive_rag.selection import OldestAlikeSelection
from longlive_rag.serve.scene import BlockDecoder, Scene, Shot, ShownPolicy, Wish
from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import (
    DENOISING_STEPS,
    TIMESTEP_SHIFT,
    load_backbone,
    load_codec,
    load_encoder,
)
from longlive_rag.small_world.codec import LATENT_SHAPE
from longlive_rag.small_world.policies import OURS, POLICIES
from longlive_rag.small_world.report import FPS

_LABELS = {
    "sliding_window": "forgets: sliding window",
    "latest_query": "remembers: the paper’s query",
    OURS: "remembers: draft query, oldest copies",
}


class SmallScene(Scene):
    """The small world."""

    name = "small world"
    fps = FPS
    block_frames = 1
    latent_shape = LATENT_SHAPE
    places = world.PLACE_NAMES
    default_prompt = world.PLACE_NAMES[0]
    default_policies = ("sliding_window", OURS)
    enlarge = 5

    def __init__(self, memory: int = 128 * 1024**2) -> None:
        """
        Args:
            memory: bytes of keys and values that each video may keep; what is most repetitive is forgotten beyond that.
        """
        self.model = load_backbone()
        self.embedding = load_encoder()
        self.sampling = Sampling(DENOISING_STEPS, TIMESTEP_SHIFT)
        self.budget = Budget(device=memory, host=0)
        self.policies = {
            name: ShownPolicy(label, POLICIES[name].config, OldestAlikeSelection() if name == OURS else None)
            for name, label in _LABELS.items()
        }
        self._codec = load_codec()
        self._embeds = [self.model.prompts[view][None].detach() for view in range(world.VIEWS)]

    def understand(self, prompt: str) -> str:
        words = " ".join(prompt.lower().split())
        for place in self.places:
            if place in words or any(word in words.split() for word in place.split()):
                return place
        near = difflib.get_close_matches(words, self.places, 1)
        if near:
            return near[0]
        *others, last = self.places
        raise ValueError(f"The small world knows four places only: {', '.join(others)} and {last}.")

    def next_shot(self, wish: Wish, before: Shot | None) -> Shot:
        target = self.places.index(wish.prompt) * world.VIEWS_PER_PLACE
        if before is None or wish.camera == "cut":
            return Shot(wish.prompt, target)
        step = max(-1, min(1, target - before.view))
        return replace(before, prompt=wish.prompt, view=before.view + step)

    def embeds(self, shot: Shot) -> Tensor:
        return self._embeds[shot.view]

    def new_decoder(self) -> BlockDecoder:
        return BlockDecoder(self._codec.decode, reach=0)
