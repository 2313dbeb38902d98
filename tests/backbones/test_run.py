"""`longlive-rag run`: somebody's script, unchanged, generates with memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SCRIPT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch
from support.causal_doubles import Pipeline
torch.set_grad_enabled("gradients" in sys.argv)
torch.manual_seed(0)
family, blocks = sys.argv[1], int(sys.argv[2])
sizes = dict(dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=1)
pipeline = Pipeline(family, **sizes)
for video in range(2):
    cache, tokens = pipeline.cache(1, 10), 2 + 2 * video
    for block in range(blocks):
        latents, prompt = torch.randn(1, 1, 16, 2, 4 + 4 * video), torch.ones(1, 4, 8)
        for level in (1000.0, 0.0):
            pipeline.generator(latents, prompt, torch.full((1, 1), level), kv_cache=cache, current_start=block * tokens)
print("sizes of the cache:", *cache[0]["k"].shape)
"""
NATIVE = """pipeline = Pipeline(family, **sizes)
pipeline.generator.requires_grad_(True)
for block in pipeline.transformer.blocks:
    block.self_attn.uncached = lambda x, kv_cache: x  # as if the model had cached attention of its own
"""
OPTIONS = ["--context-frames", "5", "--memory-frames", "2", "--recency-guard", "0", "--block-frames", "1"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longlive_rag", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "inference.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_generates_with_memory(tmp_path: Path, script: str) -> None:
    log = tmp_path / "log.json"
    result = run(*OPTIONS, "--log", str(log), "--", sys.executable, script, "LongLive", "9")
    assert result.returncode == 0, result.stderr
    assert "LongLive model patched, videos with memory: 2" in result.stderr
    assert "sizes of the cache: 1 0 2 16" in result.stdout
    (report,) = json.loads(log.read_text())
    assert [[block["start"] for block in video] for video in report["videos"]] == [[6, 7, 8]] * 2


def test_a_script_that_calls_no_model(tmp_path: Path) -> None:
    result = run("--", sys.executable, "-c", "import torch; torch.nn.Linear(1, 1)(torch.ones(1))")
    assert result.returncode == 2
    assert "called no causal video transformer" in result.stderr and "Traceback" not in result.stderr


def test_a_config_that_does_not_fit_the_model(script: str) -> None:
    result = run("--query", "draft", "--", sys.executable, script, "Rolling Forcing", "1")
    assert result.returncode == 2
    assert "config.query must be 'latest'" in result.stderr and "Traceback" not in result.stderr


def test_the_script_s_own_status_is_passed_on() -> None:
    assert run("--", sys.executable, "-c", "raise SystemExit(7)").returncode == 7


def test_a_script_whose_calls_need_gradients(script: str) -> None:
    source = Path(script).read_text().replace("pipeline = Pipeline(family, **sizes)", NATIVE)
    Path(script).write_text(source)
    result = run(*OPTIONS, "--", sys.executable, script, "Self-Forcing", "2", "gradients")
    assert result.returncode == 2
    assert "no call of it went through memory" in result.stderr and "no_grad" in result.stderr
    assert "Traceback" not in result.stderr


def test_torch_imported_by_a_pth_file(tmp_path: Path, script: str) -> None:
    """It comes before sitecustomize, so nothing sees the import."""
    (tmp_path / "early.pth").write_text("import torch\n")
    packages = [path for path in sys.path if path.endswith("-packages")]
    start = (
        f"import sys; sys.path += {packages!r}; import site; site.addsitedir({str(tmp_path)!r}); "
        f"assert 'torch' in sys.modules; site.main(); "
        f"import runpy; sys.argv = ['script', 'LongLive', '9']; runpy.run_path({script!r})"
    )
    result = run(*OPTIONS, "--", sys.executable, "-S", "-c", start)
    assert result.returncode == 0, result.stderr
    assert "LongLive model patched, videos with memory: 2" in result.stderr


def test_the_policy_is_the_model_s_own_but_for_what_is_given(script: str) -> None:
    source = Path(script).read_text()
    own = "; ".join(
        ["for block in pipeline.transformer.blocks: block.self_attn.local_attn_size, block.self_attn.sink_size = 6, 2"]
    )
    Path(script).write_text(source.replace("for video in", f"{own}\nfor video in", 1))
    command = ["--device-memory", "12MB", "--recency-guard", "0", "--", sys.executable, script, "LongLive", "10"]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "context frames 6, sink frames 2, memory frames 1, recency guard 0, block frames 1" in result.stderr
    result = run("--native", *command)
    assert result.returncode == 0, result.stderr
    assert "memory frames 0" in result.stderr and "positions absolute" in result.stderr
    result = run("--context-frames", "12", *command)
    assert "context frames 12, sink frames 2, memory frames 6" in result.stderr


def test_a_value_out_of_range_is_found_before_the_script_runs() -> None:
    result = run("--memory-frames", "65", "--", sys.executable, "-c", "raise SystemExit(7)")
    assert result.returncode == 2 and "memory_frames must be at most 64, got 65" in result.stderr
