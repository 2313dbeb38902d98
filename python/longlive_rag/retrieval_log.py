"""What each block of a video retrieved: as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive_rag import figures
from longlive_rag.config import RetrievalConfig
from longlive_rag.context import ContextPlan
from longlive_rag.memory import Retrieval


def retrieval_entries(retrieved: Sequence[Retrieval], video: int = 0) -> list[dict[str, Any]]:
    """One entry per block that retrieved something: its first latent frame, the frames, and their similarity."""
    return [
        {"start": block.block_start, "frames": block.frames[video], "similarity": block.similarity[video]}
        for block in retrieved
    ]


Record = dict[int, tuple[list[list[int]], list[list[float]]]]
"""By first frame of the block, the frames that each video retrieved and their similarity (see `ReplaySelection`)."""


def recorded_retrieval(entries: Sequence[dict[str, Any]], config: RetrievalConfig, latent_frames: int) -> Record:
    """The reverse of `retrieval_entries`, for one video.

    Args:
        entries: of a video's JSON file.
        config: the policy that the video was made with.
        latent_frames: length of the video.

    Raises:
        ValueError: they are not what `retrieval_entries` makes of such a video.
    """
    record: Record = {}
    for entry in entries:
        try:
            start = int(entry["start"])
            frames, similarity = (
                [int(frame) for frame in entry["frames"]],
                [float(each) for each in entry["similarity"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"an entry of retrieved must have start, frames and similarity, got {entry!r}") from error
        candidates = ContextPlan(config, start, config.block_frames).candidates
        if not set(frames) <= set(candidates) or not len(similarity) == len(frames) <= config.memory_frames:
            raise ValueError(
                f"the block at latent frame {start} may retrieve {config.memory_frames} of the frames "
                f"{candidates.start} to {candidates.stop - 1}, each with its similarity, got {entry!r}"
            )
        record[start] = [frames], [similarity]
    blocks = range(0, latent_frames, config.block_frames)
    expected = [start for start in blocks if ContextPlan(config, start, config.block_frames).candidates]
    if list(record) != expected:
        raise ValueError(f"retrieved must have an entry for each block that may retrieve, at latent frames {expected}")
    return record


def draw_retrieval(
    entries: Sequence[dict[str, Any]],
    config: RetrievalConfig,
    latent_frames: int,
    seconds_per_frame: float,
    path: Path,
) -> None:
    """Draw which earlier moments of the video each block retrieved, and how similar they were.

    Args:
        entries: from `retrieval_entries`, at least one of them with frames; a block has none if all that it could
            retrieve was forgotten.
        config: the policy that the video was made with.
        latent_frames: length of the video.
        seconds_per_frame: duration of a latent frame.
        path: PNG file, written atomically.
    """
    entries = [entry for entry in entries if entry["frames"]]
    figure = figures.figure(9, 8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    end = latent_frames * seconds_per_frame
    points = [
        ((entry["start"] + config.block_frames / 2) * seconds_per_frame, (frame + 0.5) * seconds_per_frame, similarity)
        for entry in entries
        for frame, similarity in zip(entry["frames"], entry["similarity"], strict=True)
    ]
    now, then, similarities = zip(*points, strict=True)
    # A square per retrieved frame, as high as a latent frame where the picture allows.
    size = max(4.0, min(60.0, (430 / latent_frames) ** 2))
    dots = upper.scatter(now, then, c=similarities, s=size, marker="s", cmap="viridis", linewidths=0, zorder=3)
    figure.colorbar(dots, ax=upper, label="cosine similarity to the query")

    starts = [frame * seconds_per_frame for frame in range(0, latent_frames + 1, config.block_frames)]
    local = (config.local_frames - config.block_frames) * seconds_per_frame
    block = config.block_frames * seconds_per_frame
    upper.fill_between(
        starts,
        [max(0.0, s - local) for s in starts],
        [s + block for s in starts],
        step="post",
        color="0.85",
        lw=0,
        label="local window",
    )
    out_of_reach = (config.context_frames - config.sink_frames + config.recency_guard) * seconds_per_frame
    upper.plot(
        [out_of_reach, end], [0, end - out_of_reach], color="0.5", lw=0.8, ls="--", label="newest that may return"
    )
    if config.sink_frames:
        upper.axhspan(0, config.sink_frames * seconds_per_frame, color="#f2b134", alpha=0.5, lw=0, label="sink")
    upper.set(xlim=(0, end), ylim=(0, end), ylabel="retrieved frame (s)", title="What each block retrieved")
    upper.legend(loc="upper left", frameon=False)

    blocks = [(entry["start"] + config.block_frames / 2) * seconds_per_frame for entry in entries]
    lower.plot(blocks, [max(entry["similarity"]) for entry in entries], label="best")
    lower.plot(blocks, [min(entry["similarity"]) for entry in entries], label="last of the retrieved")
    lower.set(xlabel="block being made (s)", ylabel="similarity")
    lower.legend(frameon=False, ncols=2)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path, dpi=110)
