"""Runs VBench-Long's own program on a prepared folder, on a CPU, with stand-ins for its models.

What it splits, names, finds, weighs and writes is its own; only the numbers that its networks would give are made up.
It proves that every video of `longlive-rag vbench prepare` is found under its name, and it recorded `vbench_results`:

    python against_vbench.py CHECKOUT FOLDER METHOD [DIMENSION...] [--without-dev-flag]

CHECKOUT is https://github.com/Vchitect/VBench (its folders vbench and vbench2_beta_long are enough), FOLDER what
`vbench prepare` wrote. The environment needs torch < 2.6, torchvision, numpy < 2, decord, 'moviepy<2', 'av<13', scipy,
opencv-python-headless, scenedetect, easydict, tqdm, pyyaml, pillow; no weights.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


def stand_in(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def per_clip(dimension: str) -> Any:
    """What `vbench.<dimension>` computes for each clip, but for a network: a number that differs from clip to clip."""
    largest = 100 if dimension == "imaging_quality" else 1

    def compute(info: str, device: Any, submodules: Any, **_: Any) -> tuple[float, list[dict[str, Any]]]:
        clips, _ = sys.modules["vbench.utils"].load_dimension_info(info, dimension=dimension, lang="en")
        print(f"{dimension}: {len(clips)} clips")
        rows = [
            {"video_path": clip, "video_results": largest * (0.9 - 0.01 * number)}
            for number, clip in enumerate(sorted(clips))
        ]
        if dimension == "dynamic_degree":
            rows = [{**row, "video_results": row["video_results"] > 0.87} for row in rows]
        return sum(row["video_results"] for row in rows) / len(rows) / largest, rows

    return compute


def between_clips(*arguments: Any) -> tuple[float, list[dict[str, Any]]]:
    """What they compute for the videos made of the clips' first frames, where the flag is not given."""
    videos = next(each for each in arguments if isinstance(each, list))
    return 0.8, [{"video_path": video, "video_results": 0.8} for video in videos]


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--without-dev-flag"]
    checkout, folder, method, *dimensions = words
    sys.path.insert(0, checkout)

    import torch

    class MeanColours(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), (2, 2)).flatten(1)

        embed = encode_image = forward

    stand_in("dreamsim", dreamsim=lambda **_: (MeanColours(), None))
    stand_in("clip", load=lambda *_, **__: (MeanColours(), None))
    torch.hub.load = lambda **_: MeanColours()
    cpu = torch.device("cpu")
    torch.device = lambda *_: cpu  # type: ignore[assignment, misc]

    importlib.import_module("vbench")
    for name in ("vbench", "vbench.utils"):
        vars(sys.modules[name])["init_submodules"] = lambda chosen, **_: {
            each: {"read_frame": False} if each == "subject_consistency" else ["ViT-B/32", False] for each in chosen
        }
    for dimension in DIMENSIONS:
        stand_in(f"vbench.{dimension}", **{f"compute_{dimension}": per_clip(dimension), dimension: between_clips})
    stand_in("vbench.temporal_flickering", compute_temporal_flickering=None)
    sys.modules["vbench2_beta_long.static_filter"] = MagicMock()

    program = str(Path(checkout) / "vbench2_beta_long" / "eval_long.py")
    place = Path(folder) / method
    flag = [] if "--without-dev-flag" in sys.argv else ["--dev_flag"]
    sys.argv = [program, "--mode", "long_custom_input", *flag, "--dimension", *(dimensions or DIMENSIONS)]
    sys.argv += ["--videos_path", str(place / "videos"), "--output_path", str(place / "results")]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
