"""The public repositories' models and pipelines, recorded on a CPU in float32: patched, they make the same videos.

A trace holds what the repository's own code generated, with its own attention and cache. Parameters, noise and prompts
come from formulas (tests/golden/params.py). Here a double of the model's interface is patched and driven the way the
repository's pipeline drives its model.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from longlive_rag import RetrievalConfig, patch
from longlive_rag.generation.sampling import warp_steps
from support.causal_doubles import Pipeline

FOLDER = Path(__file__).parent / "traces"
TRACES = sorted(path.stem for path in FOLDER.glob("*.safetensors") if not path.stem.startswith("comfyui"))
TOLERANCE = 2e-5
Cache = list[dict[str, Any]]
SIZES = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "num_heads", "num_layers")


def _parameters() -> Any:
    path = Path(__file__).parents[1] / "golden" / "params.py"
    spec = importlib.util.spec_from_file_location("golden_parameters", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARAMETERS = _parameters()


class Trace:
    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.latents = file.get_tensor("latents")
            self.later = [file.get_tensor(f"latents.{number}") for number in range(1, len(file.keys()))]
            """Videos that the same pipeline made after the first."""
            metadata = file.metadata()
        self.family = metadata["family"]
        self.case: dict[str, Any] = json.loads(metadata["case"])
        self.retrieved = json.loads(metadata.get("retrieved", "[]"))
        self.seeds = self.case.get("seeds", [self.case["seed"]])
        self._caches: dict[tuple[int, int], list[Cache]] = {}

    @property
    def config(self) -> RetrievalConfig:
        names = ("context_frames", "sink_frames", "memory_frames", "recency_guard", "block_frames", "positions")
        return RetrievalConfig(**{name: self.case[name] for name in names})

    @property
    def tokens(self) -> int:
        return self.case["height"] // 2 * (self.case["width"] // 2)

    @property
    def timesteps(self) -> list[float]:
        return warp_steps(self.case["denoising_steps"], self.case.get("timestep_shift", 5.0))

    @cached_property
    def pipeline(self) -> Pipeline:
        pipeline = Pipeline(self.family, **{name: self.case[name] for name in SIZES})
        PARAMETERS.fill(pipeline.transformer, self.case["seed"])
        if "global_sink" in self.case:
            vars(pipeline)["global_sink"] = self.case["global_sink"]
        return pipeline

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One sample for each seed; `shape` is that of one."""
        return torch.cat([PARAMETERS.tensor(seed, name, (1, *shape)) for seed in self.seeds])

    @property
    def noise(self) -> Tensor:
        """Of all frames but the given ones."""
        made = self.case["frames"] - self.case.get("given", 0)
        return self.tensor("noise", made, 16, self.case["height"], self.case["width"])

    def prompt(self, name: str = "prompt_embeds") -> Tensor:
        return self.tensor(name, self.case["text_len"], self.case["text_dim"])

    def renoise(self, index: int, frames: int) -> Tensor:
        return self.tensor(f"renoise.{index}", frames, 16, self.case["height"], self.case["width"])

    def caches(self, frames: int, **extra: object) -> list[Cache]:
        """Two caches of as many frames; the pipelines keep theirs between videos of as many tokens."""
        batch, tokens = len(self.seeds), self.tokens
        if (batch, tokens) not in self._caches:
            self._caches[batch, tokens] = [self.pipeline.cache(batch, frames * tokens, **extra) for _ in range(2)]
        for layer in (layer for cache in self._caches[batch, tokens] for layer in cache):
            for name in ("global_end_index", "local_end_index"):
                layer[name] = torch.tensor([0])
        return self._caches[batch, tokens]

    def generate(self) -> Tensor:
        """Drive the patched double as the family's pipeline does."""
        if self.family == "Rolling Forcing":
            return _roll(self)
        if self.family == "krea realtime":
            return _with_a_cache_filled_anew(self)
        return _block_by_block(self)


def _block_by_block(trace: Trace) -> Tensor:
    case, frames = trace.case, trace.case["block_frames"]
    noise = trace.noise
    batch = noise.shape[0]
    extra: dict[str, object] = {}
    if trace.family == "LongLive 2":
        extra = {"pinned_start": torch.tensor([-1]), "pinned_len": torch.tensor([0])}
    conditional, unconditional = trace.caches(case["context_frames"], **extra)
    prompts = [trace.prompt(name) for name in case.get("prompts", ["prompt_embeds"])]
    switches = case.get("switch_frames", [])
    given = case.get("given", 0)
    output = torch.zeros(batch, case["frames"], *noise.shape[2:])
    draws = itertools.count()
    if given:  # an image
        output[:, :given] = latents = trace.tensor("given", given, *noise.shape[2:])
        _predict(
            trace, prompts[0], conditional, unconditional, {"current_start": 0}, latents, torch.zeros(batch, given)
        )

    for block in range(noise.shape[1] // frames):
        start = given + block * frames
        if start in switches:
            _make_again(trace, output, start, prompts[1], conditional)
        prompt = prompts[sum(switch <= start for switch in switches)]
        call: dict[str, Any] = {"current_start": start * trace.tokens}
        if trace.family == "LongLive 2":
            shot = sum(first <= block for first in case.get("shots", []))
            call |= {"t_scale": case.get("t_scale", 1.0), "temporal_offset": float(shot * case.get("rope_offset", 0))}
        if trace.family == "Infinity-RoPE":
            prompt = _scene(trace, conditional, start, prompt)
        predict = partial(_predict, trace, prompt, conditional, unconditional, call)
        latents = noise[:, start - given : start - given + frames]
        for step, timestep in enumerate(trace.timesteps):
            clean = latents - timestep / 1000 * predict(latents, torch.full((batch, frames), timestep))
            if step + 1 < len(trace.timesteps):
                sigma = trace.timesteps[step + 1] / 1000
                latents = (1 - sigma) * clean + sigma * trace.renoise(next(draws), frames)
        predict(clean, torch.zeros(batch, frames))
        output[:, start : start + frames] = clean
        if block in case.get("shots", []):
            for cache in conditional:
                cache["pinned_start"].copy_(cache["local_end_index"] - frames * trace.tokens)
                cache["pinned_len"].fill_(frames * trace.tokens)
    return output


def _predict(
    trace: Trace,
    prompt: Tensor,
    conditional: Cache,
    unconditional: Cache,
    call: dict[str, Any],
    latents: Tensor,
    timestep: Tensor,
) -> Tensor:
    generator = trace.pipeline.generator
    flow = generator(latents, prompt, timestep, kv_cache=conditional, **call)
    if "guidance_scale" in trace.case:
        rest = generator(latents, trace.prompt("prompt_embeds.negative"), timestep, kv_cache=unconditional, **call)
        flow = rest + trace.case["guidance_scale"] * (flow - rest)
    return flow


def _make_again(trace: Trace, output: Tensor, start: int, prompt: Tensor, cache: Cache) -> None:
    """LongLive's prompt switch: the newest frames pass once more, all in one call, under the new prompt."""
    first = max(0, start - trace.case["context_frames"])
    frames = output[:, first:start]
    if trace.family == "MemFlow":
        call = {"is_recache": True}
    else:
        call = {} if trace.case["global_sink"] else {"sink_recache_after_switch": True}
    trace.pipeline.generator(
        frames, prompt, torch.zeros(frames.shape[:2]), kv_cache=cache, current_start=first * trace.tokens, **call
    )


def _scene(trace: Trace, cache: Cache, start: int, prompt: Tensor) -> Tensor:
    """Infinity-RoPE's scene change: a new prompt, and a cache cut down to three frames under a new index."""
    scenes = trace.case.get("scenes", [])
    for layer in cache:
        layer["scene_cut"] = [start, True] in scenes
        if start in [first for first, _ in scenes]:
            layer["local_end_index"] = torch.tensor([3 * trace.tokens])
    number = sum(first <= start for first, _ in scenes)
    return trace.prompt(f"prompt_embeds.{number}") if number else prompt


def _roll(trace: Trace) -> Tensor:
    """Rolling Forcing: a window of blocks at falling noise levels moves on by a block after each pass."""
    frames, steps, noise = trace.case["block_frames"], trace.timesteps, trace.noise
    batch, blocks = noise.shape[0], noise.shape[1] // frames
    cache, _ = trace.caches(24)
    latents, output = noise.clone(), torch.zeros_like(noise)
    draws = itertools.count()

    def predict(latents: Tensor, timestep: Tensor, first: int, clean_pass: bool) -> Tensor:
        return trace.pipeline.generator(
            latents, trace.prompt(), timestep, kv_cache=cache, current_start=first * frames * trace.tokens,
            cache_start=first * frames * trace.tokens, updating_cache=clean_pass,
        )  # fmt: skip

    for window in range(blocks + len(steps) - 1):
        first, last = max(0, window - len(steps) + 1), min(blocks - 1, window)
        levels = [window - block for block in range(first, last + 1)]
        part = slice(first * frames, (last + 1) * frames)
        timestep = torch.tensor(steps)[levels].repeat_interleave(frames).expand(batch, -1)
        sigma = timestep[:, :, None, None, None] / 1000
        clean = latents[:, part] - sigma * predict(latents[:, part], timestep, first, False)
        output[:, part] = clean
        for offset, level in enumerate(levels):
            if level + 1 < len(steps):
                fresh = trace.renoise(next(draws), len(levels) * frames)
                own, next_sigma = slice(offset * frames, (offset + 1) * frames), steps[level + 1] / 1000
                target = slice((first + offset) * frames, (first + offset + 1) * frames)
                latents[:, target] = (1 - next_sigma) * clean[:, own] + next_sigma * fresh[:, own]
        predict(clean[:, :frames], torch.zeros(batch, frames), first, True)
    return output


def _with_a_cache_filled_anew(trace: Trace) -> Tensor:
    """krea realtime: the first and the newest frames fill the cache before each block, numbered from its left end."""
    case, frames = trace.case, trace.case["block_frames"]
    cached, pipeline, noise = case["context_frames"] - frames, trace.pipeline, trace.noise
    cache, _ = trace.caches(case["context_frames"])
    prompt, switches = trace.prompt(), case.get("switch_frames", [])
    output, draws = torch.zeros_like(noise), itertools.count()
    for start in range(0, noise.shape[1], frames):
        call = {"kv_cache": cache, "current_start": min(start, cached) * trace.tokens}
        if start:
            context = torch.cat([output[:, :1], output[:, 1:start][:, 1 - cached :]], dim=1)
            block = torch.arange(context.shape[1]).repeat_interleave(trace.tokens) // frames
            pipeline.transformer.block_mask = block[:, None] >= block
            pipeline.generator(context, prompt, torch.zeros(context.shape[:2]), **call)
            pipeline.transformer.block_mask = None
        if start in switches:
            prompt = trace.prompt(case["prompts"][1 + switches.index(start)])
        latents = noise[:, start : start + frames]
        for step, timestep in enumerate(trace.timesteps):
            flow = pipeline.generator(latents, prompt, torch.full(latents.shape[:2], timestep), **call)
            output[:, start : start + frames] = clean = latents - timestep / 1000 * flow
            if step + 1 < len(trace.timesteps):
                sigma = trace.timesteps[step + 1] / 1000
                latents = (1 - sigma) * clean + sigma * trace.renoise(next(draws), frames)
    return output


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TRACES)
def test_patched_model_makes_the_recorded_video(name: str) -> None:
    """Native window and no memory, or for LongLive-RAG its own retrieval: the recorded latents, block by block."""
    trace = Trace(name)
    with torch.no_grad(), patch(trace.pipeline, trace.config) as patched:
        assert patched.family == trace.family
        for recorded in (trace.latents, *trace.later):
            trace.case["frames"], trace.case["height"], trace.case["width"] = (recorded.shape[i] for i in (1, 3, 4))
            latents = trace.generate()
            for start in range(0, latents.shape[1], trace.case["block_frames"]):
                block = slice(start, start + trace.case["block_frames"])
                assert relative_error(latents[:, block], recorded[:, block]) < TOLERANCE, f"block at frame {start}"
        assert [(entry.block_start, entry.frames) for entry in patched.retrieved] == [
            (entry["block_start"], entry["frames"]) for entry in trace.retrieved
        ]
        for entry, expected in zip(patched.retrieved, trace.retrieved, strict=True):
            torch.testing.assert_close(
                torch.tensor(entry.similarity), torch.tensor(expected["similarity"]), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize(
    "name",
    (
        "self_forcing",
        "causvid",
        "longlive_switch",
        "longlive_rag",
        "longlive2_shots",
        "rolling_forcing",
        "infinity_rope_scenes",
    ),
)
def test_a_batch_gives_what_single_videos_give(name: str) -> None:
    """Whatever the public pipeline can do."""
    trace = Trace(name)
    trace.case["frames"] = min(trace.case["frames"], 6 * trace.case["block_frames"])
    seeds = [trace.case["seed"], 101]
    videos = []
    with torch.no_grad():
        for trace.seeds in (seeds, seeds[:1], seeds[1:]):
            with patch(trace.pipeline, trace.config):
                videos.append(trace.generate())
    assert relative_error(videos[0], torch.cat(videos[1:])) < TOLERANCE


def test_the_traces_tell_a_wrong_position_from_a_right_one() -> None:
    trace = Trace("longlive_infinity")
    trace.case["positions"] = "absolute"
    with torch.no_grad(), patch(trace.pipeline, trace.config):
        assert relative_error(trace.generate(), trace.latents) > 100 * TOLERANCE
