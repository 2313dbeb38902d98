"""`patch` in the environments of other repositories, which lack what the rest of the package needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"diffusers", "transformers", "ftfy", "av", "matplotlib", "PIL", "tokenizers"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from longlive_rag import RetrievalConfig, patch
from support.causal_doubles import Pipeline
from support.tiny_videos import CONFIG, SIZES, generate
with torch.no_grad():
    pipeline = Pipeline("Self-Forcing", **SIZES)
    with patch(pipeline, CONFIG) as patched:
        generate(pipeline, 8)
        print([entry.block_start for entry in patched.retrieved])
"""


def test_patch_needs_torch_and_little_else() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[6, 7]"
