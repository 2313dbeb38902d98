"""A plan as people read it: sentences, a table, a picture; and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_rag import figures
from longlive_rag.budget import format_bytes
from longlive_rag.planning import Outlook, Plan

_NAMES = {"device": "GPU", "host": "host memory", "disk": "disk", "latents": "fits nowhere"}
_LINKS = (("PCIe", 25e9), ("NVLink", 300e9))
"""Between GPUs, each way, as docs/several_gpus.md reckons."""
_COLOURS = {"device": "#1b6ca8", "host": "#58a4b0", "disk": "#d8a657", "latents": "#c9c9c9"}


def as_json(outlook: Outlook) -> dict[str, Any]:
    """One plan; sizes in bytes, on each rank."""
    plan = outlook.plan()
    return {
        "frame_bytes": outlook.video.page_bytes,
        "latent_frames": outlook.video.latent_frames,
        "tiers": {name: {"frames": share.frames, "bytes": share.bytes} for name, share in plan.tiers.items()},
        "moved_bytes_per_block": plan.moved_bytes_per_block,
        "record_bytes": outlook.video.record_bytes(outlook.below),
        "weight_bytes": outlook.video.weight_bytes,
        "working_bytes": outlook.video.working_bytes,
        "device_bytes": outlook.device_bytes,
        "block_seconds": outlook.block_seconds,
        "transfer_seconds": outlook.transfer_seconds(plan),
        "ranks": outlook.video.ranks,
        "sent_bytes_per_block": outlook.video.sent_bytes_per_block,
        "sent_weight_bytes_per_block": outlook.video.sent_weight_bytes_per_block,
    }


def description(outlook: Outlook) -> str:
    """One plan in full."""
    video, plan = outlook.video, outlook.plan()
    settings, lost = video.settings, plan.tiers["latents"]
    gpus = "Each GPU" if video.ranks > 1 else "A GPU"
    lines = [
        f"{video.model}, {settings.seconds:g} s at {settings.height} x {settings.width}: {video.latent_frames} latent "
        f"frames, {format_bytes(video.page_bytes)} of keys and values each{_on_each(video.ranks)}.",
        f"{gpus} of {format_bytes(outlook.gpu)}: weights {format_bytes(video.weight_bytes)}, a block's working memory "
        f"about {format_bytes(video.working_bytes)} (estimated), left for keys and values "
        f"{format_bytes(outlook.device_bytes)}.",
        "",
        f"{'where':<14}{'latent frames':>14}{'memory':>12}",
    ]
    for name, share in plan.tiers.items():
        if share.frames or name == "device":
            lines.append(f"{_NAMES[name]:<14}{share.frames:>14}{format_bytes(share.bytes):>12}")
    lines.append("")
    if lost.frames:
        lines.append(
            f"{lost.frames} frames fit nowhere: with --rebuild their keys and values are computed again when they are "
            f"retrieved, otherwise the most redundant ones are forgotten. More --host-memory, --disk-memory or "
            f"fewer --page-bits keep them."
        )
    lines.append(_moves(outlook, plan))
    if plan.tiers["disk"].frames:
        lines.append("Frames that come back from disk are waited for: up to as many bytes a block as come back.")
    if video.ranks > 1:
        lines.append(f"In each block a GPU sends the others {_sent(video.sent_bytes_per_block)}.")
        if video.shard_weights:
            lines.append(f"Of its share of the weights, it sends them {_sent(video.sent_weight_bytes_per_block)}.")
        lines.append("All of this is the first GPU's, which decodes too; each has such a part of host memory and disk.")
    return "\n".join(lines)


def comparison(outlooks: Sequence[Outlook]) -> str:
    """Several plans as a Markdown table."""
    settings, ranks = outlooks[0].video.settings, outlooks[0].video.ranks
    lines = [
        f"{settings.seconds:g} s of video; in latent frames, and the memory that they take{_on_each(ranks)}.",
        "",
        "| model | GPU | on the GPU | in host memory | on disk | nowhere | moved a block | hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outlook in outlooks:
        head = f"| {outlook.video.model} | {format_bytes(outlook.gpu)} |"
        if not outlook.fits:
            needed = outlook.video.weight_bytes + outlook.video.working_bytes
            lines.append(f"{head} too small: {format_bytes(needed)} before the first frame | | | | | |")
            continue
        plan = outlook.plan()
        cells = [
            f"{share.frames}, {format_bytes(share.bytes)}" if share.frames else "-" for share in plan.tiers.values()
        ]
        moved = format_bytes(plan.moved_bytes_per_block) if plan.moved_bytes_per_block else "-"
        hidden = ("yes" if _is_hidden(outlook, plan) else "no") if plan.moved_bytes_per_block else "-"
        lines.append(f"{head} {' | '.join(cells)} | {moved} | {hidden} |")
    return "\n".join(lines)


def draw(outlook: Outlook, path: Path) -> None:
    """What lies where over the length of the video.

    Raises:
        OSError: the file cannot be written.
    """
    video = outlook.video
    block = video.settings.policy.block_frames
    frames = np.unique(np.linspace(block, video.latent_frames, 200).round().astype(int))
    plans = [outlook.plan(int(count)) for count in frames]
    seconds = (1 + (frames - 1) * video.family.temporal_factor) / video.settings.fps
    shares = {name: np.array([plan.tiers[name].frames for plan in plans]) for name in _NAMES}
    shown = [name for name in _NAMES if shares[name].any()]

    drawn = figures.figure(9, 4.5)
    axes = drawn.add_subplot()
    axes.stackplot(seconds, [shares[name] for name in shown], colors=[_COLOURS[name] for name in shown], linewidth=0)
    axes.set(
        xlim=(0, seconds[-1]),
        ylim=(0, video.latent_frames),
        xlabel="seconds of video",
        ylabel="latent frames",
        title=f"{video.model} on {_gpus(outlook)} of {format_bytes(outlook.gpu)}: where keys and values lie",
    )
    beside = axes.twinx()
    beside.set(ylim=(0, video.latent_frames * video.page_bytes / 1e9), ylabel="GB, unpacked")
    below = np.zeros(len(frames))
    for name in shown:
        middle = int(0.93 * (len(frames) - 1))
        height = shares[name][middle]
        if height > 0.02 * video.latent_frames:
            size = "" if name == "latents" else f": {format_bytes(plans[-1].tiers[name].bytes)}"
            axes.text(
                seconds[middle],
                below[middle] + height / 2,
                _NAMES[name] + size,
                ha="right",
                va="center",
                color="black" if name in ("disk", "latents") else "white",
            )
        below = below + shares[name]
    figures.save(drawn, path)


def _gpus(outlook: Outlook) -> str:
    return f"each of {outlook.video.ranks} GPUs" if outlook.video.ranks > 1 else "a GPU"


def _sent(size: int) -> str:
    over = (f"{1000 * size / speed:.0f} ms over {name} of {format_bytes(speed)} a second" for name, speed in _LINKS)
    return f"{format_bytes(size)}: on paper {' or '.join(over)}"


def _on_each(ranks: int) -> str:
    return f", on each of {ranks} GPUs" if ranks > 1 else ""


def _is_hidden(outlook: Outlook, plan: Plan) -> bool:
    return outlook.transfer_seconds(plan) <= outlook.block_seconds


def _moves(outlook: Outlook, plan: Plan) -> str:
    if not plan.moved_bytes_per_block:
        return "Nothing moves."
    needed, there = outlook.transfer_seconds(plan), outlook.block_seconds
    hidden = "behind which they hide" if _is_hidden(outlook, plan) else "so that each block waits for them"
    return (
        f"In each block {format_bytes(plan.down_bytes)} leave the GPU and up to {format_bytes(plan.up_bytes)} come "
        f"back: {1000 * needed:.0f} ms at {format_bytes(outlook.link)} a second. At {outlook.rate:g} pictures a second "
        f"a block takes {1000 * there:.0f} ms, {hidden}."
    )
