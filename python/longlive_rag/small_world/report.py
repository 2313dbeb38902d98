"""What the demo leaves: the report, the videos, the comparison of all policies and the picture of the memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longlive_rag import figures
from longlive_rag.generation.video import VideoWriter
from longlive_rag.small_world import world
from longlive_rag.small_world.measure import Score, Videos, revisits
from longlive_rag.small_world.policies import POLICIES

Setting = Literal["given", "generated"]
"""Whether the first lap is rendered, or the model's own."""
FPS = 8
SCALE = 6  # 64 pixels become 384
PANEL_SCALE, CAPTION = 4, 26
KEPT, LOST = (88, 214, 121), (255, 86, 86)


def entry(walk: world.Walk, scores: Mapping[Setting, Score]) -> dict[str, Any]:
    """The report on one policy, whose `scores` are "given", "generated" or both.

    `identity_accuracy`: first lap given; `identity_accuracy_generated`: first lap generated as well. Each with its 95%
    interval over videos, their number, and chance. `_without_sink`: spots that the first frame, the sink, does not
    show. `_by_lap`: means of the second lap, the third, and so on. `sprite_error`: how far a returned inhabitant is
    from a rendered one, root mean square on a scale of 0 to 1.
    """
    events = revisits(walk)
    away = np.array([event.spot not in world.visible_spots(int(walk.views[0])) for event in events])
    laps = np.array([event.frame // walk.lap for event in events])
    facts: dict[str, Any] = {}
    for setting, score in scores.items():
        name = "identity_accuracy" if setting == "given" else "identity_accuracy_generated"
        facts[name] = {**score.interval(), "chance": round(score.chance, 4)}
        facts[f"{name}_without_sink"] = score.interval(away)
        facts[f"{name}_by_lap"] = [round(float(score.correct[:, laps == lap].mean()), 4) for lap in np.unique(laps)]
    facts["sprite_error"] = {setting: round(score.error, 4) for setting, score in scores.items()}
    return facts


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """[N, H, W, 3], each pixel a square of `scale`."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def write_video(path: Path, frames: np.ndarray) -> None:
    """One policy's video, frames [N, 64, 64, 3], enlarged."""
    with VideoWriter(path, fps=FPS) as video:
        for frame in frames:
            video.write(enlarge(frame[None], SCALE))


def write_comparison(
    path: Path, walk: world.Walk, frames: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]
) -> None:
    """All policies side by side, frames [N, 64, 64, 3] each.

    After the first lap every inhabitant is underlined: in green where it is the one of the first visit (`truth`: for
    each policy the sprite of every spot, -1 unknown), in red where it is another.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    columns = (len(frames) + 1) // 2
    panel = world.SIZE * PANEL_SCALE
    height, width = 2 * (panel + CAPTION) + CAPTION, columns * panel
    with VideoWriter(path, fps=FPS) as video:
        for time in range(len(walk.views)):
            canvas = Image.new("RGB", (width, height), (24, 24, 34))
            draw = ImageDraw.Draw(canvas)
            for index, (name, clip) in enumerate(frames.items()):
                left, top = index % columns * panel, index // columns * (panel + CAPTION)
                draw.text((left + 8, top + 3), POLICIES[name].label, font=font, fill=(240, 240, 245))
                canvas.paste(Image.fromarray(enlarge(clip[time : time + 1], PANEL_SCALE)[0]), (left, top + CAPTION))
                if time >= walk.lap:
                    mark(draw, clip[time], int(walk.views[time]), truth[name], left, top + CAPTION)
            story = f"frame {time}: {where(walk, time)}"
            draw.text((8, height - CAPTION + 4), story, font=small, fill=(200, 200, 210))
            legend = "underlined: the inhabitant of the first lap (green) or another (red)"
            draw.text((width - 8, height - CAPTION + 4), legend, font=small, fill=(200, 200, 210), anchor="ra")
            video.write(np.asarray(canvas)[None])


def mark(draw: Any, frame: np.ndarray, view: int, truth: np.ndarray, left: int, top: int) -> None:
    sprites = world.decode(frame[None], np.array([view]))[0][0]
    for spot in world.visible_spots(view):
        if truth[spot] < 0:
            continue
        x = left + (world.SPOTS[spot][0] - view * world.STRIDE) * PANEL_SCALE
        y = top + (world.SPOTS[spot][1] + world.CELL) * PANEL_SCALE
        side = world.CELL * PANEL_SCALE
        draw.rectangle((x + 6, y - 5, x + side - 6, y - 2), fill=KEPT if sprites[spot] == truth[spot] else LOST)


def where(walk: world.Walk, time: int) -> str:
    """The place the camera shows, in words."""
    name = world.PLACE_NAMES[min(round(walk.views[time] / world.VIEWS_PER_PLACE), world.PLACES - 1)]
    if time < walk.lap:
        return f"{name}, first lap"
    return name


def first_residents(walk: world.Walk, frames: np.ndarray) -> np.ndarray:
    """Who stood on each spot at the end of its first visit in one video [N, 64, 64, 3]: [spots]."""
    residents = np.full(len(world.SPOTS), -1)
    last = {event.spot: event.first_seen for event in revisits(walk)}
    for spot, time in last.items():
        residents[spot] = world.decode(frames[time : time + 1], walk.views[time : time + 1])[0][0, spot]
    return residents


def draw_memory(path: Path, walk: world.Walk, videos: Mapping[str, Videos]) -> None:
    """What each block of the first video retrieved, similarity as colour.

    Frames that show the same place are shaded. Blocks at which an inhabitant comes back are ringed: only memory knows
    who it was. videos: the policies to show, one panel each.
    """
    figure = figures.figure(6.4 * len(videos), 6.8)
    time = np.arange(len(walk.views))
    apart = np.abs(walk.views[:, None] - walk.views[None])
    same_place = apart < world.VIEWS_PER_PLACE // 2
    shade = np.where(same_place & (time[None] < time[:, None]), 1.0, np.nan).T
    events = revisits(walk)
    returns = sorted({event.frame for event in events})
    axes = np.atleast_1d(figure.subplots(1, len(videos), sharey=True))
    for axis, (name, clip) in zip(axes, videos.items(), strict=True):
        axis.imshow(shade, origin="lower", cmap="Greys", vmin=0, vmax=6, interpolation="nearest")
        starts = np.concatenate([np.full(len(r.frames[0]), r.block_start) for r in clip.recalls])
        frames = np.concatenate([r.frames[0] for r in clip.recalls]).astype(int)
        similarity = np.concatenate([r.similarity[0] for r in clip.recalls])
        ringed = np.isin(starts, returns)
        points = axis.scatter(starts, frames, c=similarity, s=9, cmap="viridis", vmin=0.3, vmax=1.0, zorder=3)
        axis.scatter(starts[ringed], frames[ringed], s=42, facecolors="none", edgecolors="tab:red", zorder=4)
        recalled = {r.block_start: [world.visible_spots(int(walk.views[f])) for f in r.frames[0]] for r in clip.recalls}
        shown = np.mean([any(event.spot in spots for spots in recalled[event.frame]) for event in events])
        axis.set_title(f"{POLICIES[name].label}: shows {100 * shown:.0f}% of returning inhabitants", fontsize=12)
        axis.axvline(walk.lap - 0.5, color="tab:red", linewidth=1, linestyle="--")
    axes[0].set_ylabel("frame retrieved (grey: shows the same place)")
    figure.supxlabel(
        "frame being generated (dashed: end of the first lap; ringed: an inhabitant comes back)", fontsize=10
    )
    figure.colorbar(points, ax=axes, label="cosine similarity to the query", shrink=0.8)
    figures.save(figure, path, dpi=110)


def table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as text."""
    rows = [f"{'inhabitants still themselves':30}  {'first lap given':>22}  {'first lap generated':>22}"]
    for name, facts in policies.items():
        values = [facts.get(key) for key in ("identity_accuracy", "identity_accuracy_generated")]
        cells = [f"{v['mean']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" if v else "-" for v in values]
        rows.append(f"{POLICIES[name].label:30}  {cells[0]:>22}  {cells[1]:>22}")
    return "\n".join(rows)
