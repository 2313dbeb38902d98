"""What README and docs show can be typed: Python snippets run on doubles, command lines parse, options exist."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import longlive_rag.small_world
from longlive_rag import cli
from longlive_rag.backbones import Patched
from support.causal_doubles import ATTENTIONS, Pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path for folder in ("*", "docs/*", "examples/**/*", "benchmarks/*") for path in sorted(ROOT.glob(f"{folder}.md"))
]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SIZES = {
    "dim": 32, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8, "text_len": 4, "num_heads": 2, "num_layers": 2
}  # fmt: skip
# A GPU's worth of frames becomes a few kilobytes.
SMALLER = [('"cuda"', '"cpu"'), ("layers=30", "layers=2"), ("heads=12", "heads=2"), ("grid=(30, 52)", "grid=(2, 3)")]
ENCODER = Path(longlive_rag.small_world.__path__[0]) / "assets" / "encoder.safetensors"

Snippet = tuple[str, str, str]
"""Place, heading above it, and code."""


def fences(page: Path, *languages: str) -> Iterator[Snippet]:
    heading, kept = "", False
    code: list[str] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if code is not None:
            if line.lstrip().startswith("```"):
                if kept:
                    yield f"{page.relative_to(ROOT)}:{number - len(code)}", heading, textwrap.dedent("\n".join(code))
                code = None
            else:
                code.append(line)
        elif line.lstrip().startswith("```"):
            code, kept = [], line.strip().removeprefix("```") in languages
        elif line.startswith("#"):
            heading = line.lstrip("# ")


class Inference(Pipeline):
    """A double that is driven by its own `inference`, as the public pipelines are."""

    def __init__(self, family: str) -> None:
        super().__init__(family, **SIZES)

    @torch.no_grad()
    def inference(self, noise: Tensor, text_prompts: list[str]) -> Tensor:
        cache = self.cache(1, 12 * 2)
        prompt = torch.ones(1, 4, 8) * len(text_prompts[0])
        video = []
        for start in range(0, noise.shape[1], 3):
            latents = noise[:, start : start + 3]
            for level in (1000.0, 0.0):
                call = {"kv_cache": cache, "current_start": start * 2}
                latents = latents - level / 1000 * self.generator(latents, prompt, torch.full((1, 3), level), **call)
            video.append(latents)
        return torch.cat(video, dim=1)


def diffusers_pipeline() -> Any:
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2,
    )  # fmt: skip

    class AnyFlow:
        def __init__(self) -> None:
            self.transformer = transformer

        def __call__(self, prompt: str, **options: object) -> str:
            return "a video"

    return AnyFlow()


def surroundings(heading: str) -> dict[str, Any]:
    """What a reader has at hand where the snippet begins."""
    family = next(
        (name for name in sorted(ATTENTIONS, key=len, reverse=True) if heading.startswith(name)), "Self-Forcing"
    )
    pipeline = diffusers_pipeline() if "diffusers" in heading else Inference(family)
    batch, frames, tokens, heads, head_dim = 1, 3, 6, 2, 128
    q, k, v = torch.randn(3, batch, frames, tokens, heads, head_dim, dtype=torch.bfloat16)
    return {
        "pipeline": pipeline,
        "model": pipeline,
        "models": SimpleNamespace(transformer=pipeline.transformer),
        "config": longlive_rag.RetrievalConfig(),
        "noise": torch.randn(1, 24, 16, 2, 4),
        "prompt": "a panda",
        "prompts": ["a panda"],
        "text_prompts": ["a panda"],
        "start": 0,
        "frames": frames,
        "layer": 0,
        "q": q,
        "k": k,
        "v": v,
        "clean_latents": torch.randn(batch, frames, 16, 4, 6, dtype=torch.bfloat16),
        "path": ENCODER,
    }


SNIPPETS = list(itertools.chain.from_iterable(fences(page, "python") for page in PAGES))


@pytest.mark.parametrize(("place", "heading", "code"), SNIPPETS, ids=[place for place, _, _ in SNIPPETS])
def test_a_python_snippet_runs(place: str, heading: str, code: str) -> None:
    torch.manual_seed(0)
    for large, small in SMALLER:
        code = code.replace(large, small)
    names = surroundings(heading)
    with contextlib.ExitStack() as stack:
        exec(compile(code, place, "exec"), names)
        for value in list(names.values()):
            if isinstance(value, Patched):
                stack.callback(value.unpatch)
                if isinstance(names.get("video"), Tensor):
                    assert [entry.block_start for entry in value.retrieved] == [18, 21], "context 12, recency guard 5"


def test_the_readme_gives_a_backbone_a_memory_in_five_lines() -> None:
    codes = [code for place, _, code in SNIPPETS if place.startswith("README")]
    assert min(len([line for line in code.splitlines() if line.strip()]) for code in codes) <= 5


def command_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each `longlive-rag COMMAND ...` in fenced and indented code and in code spans, as place and arguments."""
    text = page.read_text(encoding="utf-8")
    outside = re.sub(r"```python.*?```", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)
    joined = re.sub(r"\\\n\s*", lambda match: " ", outside)
    for match in re.finditer(r"(?:longlive-rag|-m longlive_rag) ([a-z][\w-]*)([^`\n]*)", joined):
        try:
            words = shlex.split(match.group(2), comments=True)
        except ValueError:
            words = match.group(2).split()
        yield f"{page.relative_to(ROOT)}: {match.group().strip()[:80]}", [match.group(1), *words]


COMMAND_LINES = dict(itertools.chain.from_iterable(command_lines(page) for page in PAGES))


@functools.cache
def options(*command: str) -> frozenset[str]:
    """What the help of a command names; without one, the help of the program."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return frozenset(re.findall(r"--[a-z][\w-]*", out.getvalue()))


@pytest.mark.parametrize("place", COMMAND_LINES)
def test_a_command_line_parses(place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = COMMAND_LINES[place]
    assert name in cli.COMMANDS
    own = list(itertools.takewhile(lambda word: word != "--", arguments))
    unknown = {word.partition("=")[0] for word in own if word.startswith("--")} - options(name)
    assert unknown == set()
    if own and not any(re.search(r"\.\.\.|…|[\[\]|<>]|^[A-Z]+$", word) for word in own):
        command = cli.COMMANDS[name]
        kind = getattr(importlib.import_module(command.module), command.class_name)
        monkeypatch.setattr(kind, "run", lambda self: 0)
        assert cli.main([name, *arguments]) == 0, capsys.readouterr().err


def shell_lines(page: Path) -> Iterator[str]:
    """Lines of indented and fenced code, but for Python."""
    text = re.sub(r"```python.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for fence in re.findall(r"```.*?\n(.*?)```", text, flags=re.DOTALL):
        yield from fence.splitlines()
    yield from re.findall(r"^ {4,}(.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_made_or_run_is_there(page: Path) -> None:
    """Targets of make with their variables, scripts of the repository."""
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    variables = {*re.findall(r"^(\w+) \?=", MAKEFILE, flags=re.MULTILINE), "LONGLIVE_RAG_CUDA"}
    missing = []
    for line in shell_lines(page):
        words = shlex.split(line, comments=True) if line.startswith("make ") else []
        names = [word.partition("=") for word in words[1:]]
        missing += [name for name, equals, _ in names if name not in (variables if equals else targets)]
        scripts = re.findall(r"(?<![\w/.~-])((?:examples|benchmarks|tests|\.ci)/[\w./-]+\.(?:py|sh)|\.ci/\w+)", line)
        missing += [script for script in scripts if not (ROOT / script).is_file()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_option_that_is_mentioned_exists(page: Path) -> None:
    spans = re.findall(r"`(--[a-z][^`]*)`", page.read_text(encoding="utf-8"))
    mentioned = {word for span in spans for word in re.findall(r"--[a-z][\w-]*", span)}
    others = {"--nnodes", "--kernel-regex"}  # of torchrun and compute-sanitizer
    scripts = {
        name
        for script in [*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/*.py")]
        for name in re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text(encoding="utf-8"))
    }
    assert mentioned - others - scripts <= options().union(*map(options, cli.COMMANDS))
