"""What VBench-Long has measured, as one table: six dimensions for each method, and its average rank.

The average rank is LongLive-RAG's (arXiv 2606.02553): the mean over the six dimensions of a method's rank among the
methods beside it. Methods with the same score share the mean of their ranks. Scores are compared as they are printed,
in hundredths of a per cent, so that the ranks can be checked on the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longlive_rag.evaluation.vbench import DIMENSIONS, MANIFEST, command

_PRINTED_DIGITS = 4
_CONSISTENCY = ("subject_consistency", "background_consistency")


class Measured(NamedTuple):
    """Results of one method.

    Attributes:
        scores: of each dimension, 0 to 1, higher is better.
        between_clips: of the two kinds of consistency, the part that compares the clips of a video, before VBench maps
            it to the scale of the other part.
    """

    scores: dict[str, float]
    between_clips: dict[str, float]


def collect(folder: Path) -> dict[str, Measured]:
    """Read what VBench-Long left in a prepared folder.

    Raises:
        OSError: the folder was not prepared.
        ValueError: a dimension has not been measured, or not on all videos, or without `--dev_flag`; or a result file
            is damaged or of another format.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest} does not exist; give the folder that `vbench prepare` wrote")
    try:
        methods = json.loads(manifest.read_text(encoding="utf-8"))["methods"]
        names = {method: {Path(each["file"]).stem for each in videos} for method, videos in methods.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is not as `vbench prepare` wrote it ({error})") from error
    return {method: _measured(folder, method, videos) for method, videos in names.items()}


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """Rank of each method by its score, 1 for the highest; those with the same score share the mean of their ranks."""
    printed = {method: round(score, _PRINTED_DIGITS) for method, score in scores.items()}
    return {
        method: 1 + sum(other > score for other in printed.values()) + (list(printed.values()).count(score) - 1) / 2
        for method, score in printed.items()
    }


def average_ranks(results: Mapping[str, Measured]) -> dict[str, float]:
    """Mean over the dimensions of each method's rank."""
    columns = [ranks({method: each.scores[name] for method, each in results.items()}) for name in DIMENSIONS]
    return {method: sum(column[method] for column in columns) / len(columns) for method in results}


def as_markdown(results: Mapping[str, Measured]) -> str:
    """The table, scores in per cent, the best of each column in bold."""
    titles = [name.replace("_", " ") for name in DIMENSIONS]
    average = average_ranks(results)
    lines = [f"| method | {' | '.join(titles)} | average rank |", f"|---|{'---|' * (len(titles) + 1)}"]
    best = {name: max(round(each.scores[name], _PRINTED_DIGITS) for each in results.values()) for name in DIMENSIONS}
    for method, each in results.items():
        cells = []
        for name in DIMENSIONS:
            text = f"{100 * each.scores[name]:.2f}"
            cells.append(f"**{text}**" if round(each.scores[name], _PRINTED_DIGITS) == best[name] else text)
        text = f"{average[method]:.2f}"
        cells.append(f"**{text}**" if average[method] == min(average.values()) else text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_json(results: Mapping[str, Measured]) -> dict[str, Any]:
    """The same with ranks, and the part of consistency between clips on its own."""
    by_dimension = {name: ranks({method: each.scores[name] for method, each in results.items()}) for name in DIMENSIONS}
    average = average_ranks(results)
    return {
        "dimensions": list(DIMENSIONS),
        "methods": {
            method: {
                "scores": each.scores,
                "between_clips": each.between_clips,
                "ranks": {name: by_dimension[name][method] for name in DIMENSIONS},
                "average_rank": average[method],
            }
            for method, each in results.items()
        },
    }


def _measured(folder: Path, method: str, videos: set[str]) -> Measured:
    found: dict[str, tuple[Path, Any]] = {}
    # Their names begin with the time, so that the newest of a dimension counts.
    for path in sorted((folder / method / "results").glob("*_eval_results.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a dimension and its result, got a {type(content).__name__}")
        found |= {dimension: (path, result) for dimension, result in content.items()}
    missing = [name for name in DIMENSIONS if name not in found]
    if missing:
        raise ValueError(f"{method} lacks {', '.join(missing)}; in {folder}, give: {command(method, missing[0])}")
    scores, between = {}, {}
    for name in DIMENSIONS:
        path, result = found[name]
        try:
            score, details, seen = _read(result)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} is not as VBench-Long writes it ({error})") from error
        if not (math.isfinite(score) and 0 <= score <= 1):
            raise ValueError(f"{path}: {name} must be a score from 0 to 1, got {score}")
        if seen != videos:
            absent = sorted(videos ^ seen)
            raise ValueError(
                f"{path}: {name} was not measured on the videos that were prepared; {len(absent)} differ, such as "
                f"{absent[0]}"
            )
        scores[name] = score
        if name in _CONSISTENCY:
            between[name] = _between_clips(path, name, details)
    return Measured(scores, between)


def _read(result: Any) -> tuple[float, list[Mapping[str, Any]], set[str]]:
    """Score, details, and the names of the videos: a path in the details leads through split_clip/<name>."""
    score, details = float(result[0]), list(result[1])
    seen = set()
    for each in details:
        parts = Path(each["video_path"]).parts
        seen.add(parts[parts.index("split_clip") + 1])
    return score, details, seen


def _between_clips(path: Path, dimension: str, details: list[Mapping[str, Any]]) -> float:
    try:
        rows = [
            (float(each["clip2clip_score"]), float(each["inclip_score"]), float(each["video_results"]))
            for each in details
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {dimension} has no scores between clips ({error})") from error
    # With the flag both parts weigh a half; without it the one between clips weighs nothing.
    if all(math.isclose(inside, both, rel_tol=1e-9) for _, inside, both in rows):
        raise ValueError(
            f"{path}: {dimension} was measured without --dev_flag, so without consistency over more than a clip; "
            "measure it again with the flag"
        )
    if any(score == 0 for score, _, _ in rows):
        raise ValueError(
            f"{path}: {dimension} has a video without a score between clips; remove VBench's folders and rerun"
        )
    return sum(score for score, _, _ in rows) / len(rows)
