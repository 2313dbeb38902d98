"""The Markdown summary of what `on_gpu.py` found: goals beside figures, then every step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Figures = dict[str, dict[str, Any]]
"""What each step wrote, by `part: step`."""


class Goal(NamedTuple):
    """A figure that is aimed at.

    Attributes:
        what: it is of.
        target: the number to reach.
        unit: of the number.
        at_least: whether more is better.
        step: that measures it.
        read: from that step's figures; None if it is not among them.
    """

    what: str
    target: float
    unit: str
    at_least: bool
    step: str
    read: Callable[[dict[str, Any]], float | None]

    def reached(self, figure: float) -> bool:
        return figure >= self.target if self.at_least else figure <= self.target


def _row(figures: dict[str, Any], case: str) -> dict[str, Any] | None:
    """The row of a benchmark whose case begins so."""
    rows = (row for row in figures["rows"] if row["case"].startswith(case))
    return next(rows, None)


def _rate(case: str) -> Callable[[dict[str, Any]], float | None]:
    def read(figures: dict[str, Any]) -> float | None:
        row = _row(figures, case)
        match = re.search(r"([\d.e+-]+) TFLOP/s", row["case"]) if row else None
        return float(match[1]) if match else None

    return read


def _times_faster(case: str) -> Callable[[dict[str, Any]], float | None]:
    def read(figures: dict[str, Any]) -> float | None:
        row = _row(figures, case)
        return min(row["faster_than"].values(), default=None) if row else None

    return read


def _milliseconds(case: str) -> Callable[[dict[str, Any]], float | None]:
    def read(figures: dict[str, Any]) -> float | None:
        row = _row(figures, case)
        return 1e3 * row["ours"] if row else None

    return read


def _fastest(figures: dict[str, Any]) -> float | None:
    return min((1e3 * row["ours"] for row in figures["rows"]), default=None)


def _rotation(figures: dict[str, Any]) -> float | None:
    row = _row(figures, "rotation costs")
    return 100 * (row["ours"] / row["limit"] - 1) if row else None


WAN_1_3B, WAN_14B = "Wan 1.3B, 480x832:", "Wan 14B, 480x832:"
GOALS = (
    Goal("attend, 12 heads, first goal", 640, "TFLOP/s", True, "bench-attend: bench", _rate(WAN_1_3B)),
    Goal("attend, 12 heads, second goal", 690, "TFLOP/s", True, "bench-attend: bench", _rate(WAN_1_3B)),
    Goal("attend, 12 heads, beside the best peer", 1.1, "times", True, "bench-attend: bench", _times_faster(WAN_1_3B)),
    Goal("attend, 40 heads", 660, "TFLOP/s", True, "bench-attend: bench", _rate(WAN_14B)),
    Goal("attend, 40 heads, beside the best peer", 1.05, "times", True, "bench-attend: bench", _times_faster(WAN_14B)),
    Goal("rotation in attend", 1, "% of the time", False, "bench-sweep: bench", _rotation),
    Goal("a layer, 12 heads", 1.1, "ms", False, "bench-layer: bench", _milliseconds("Wan 1.3B, 480x832")),
    Goal("the encoder, a block of frames (on an H200)", 0.5, "ms", False, "bench-encoder: bench", _fastest),
    Goal(
        "retrieval", 1, "% of a block", False, "end-to-end: latents", lambda figures: 100 * figures["retrieval_share"]
    ),
    Goal("30 s of video, 1.3B", 15, "s", False, "end-to-end: video", lambda figures: float(figures["seconds"])),
)
MACHINE = ("device", "capability", "memory", "driver", "cuda", "torch", "python", "commit", "sources")


def figures_of(results: dict[str, Any]) -> Figures:
    return {name: step["figures"] for name, step in results["steps"].items() if "figures" in step}


def goals(figures: Figures) -> list[tuple[Goal, float | None]]:
    """Each goal with its figure; None where it has not been measured."""
    return [(goal, goal.read(figures[goal.step]) if goal.step in figures else None) for goal in GOALS]


def summary(results: dict[str, Any]) -> str:
    """The page for `results.json`."""
    machine, steps = results["machine"], results["steps"]
    figures = figures_of(results)
    title = f"On {machine['device']}"
    lines = [f"# {title}", ""]
    if results["rehearsal"]:
        lines += ["A rehearsal at tiny sizes without a GPU: no figure here means anything.", ""]
    lines += table(["", ""], [[name, machine[name]] for name in MACHINE])
    lines += [
        "",
        "## Goals",
        "",
        *table(["of", "goal", "figure", "", "step"], [_goal(*each) for each in goals(figures)]),
    ]
    lines += ["", "## Steps", ""]
    lines += table(
        ["step", "outcome", "seconds", "at most", "last line"],
        [
            [name, step["outcome"], step.get("seconds", ""), step["limit"], step.get("reason") or step.get("said", "")]
            for name, step in steps.items()
        ],
    )
    rows = [row for each in figures.values() for row in each.get("rows", ())]
    if rows:
        lines += ["", "## Figures", "", *table(["operation", "case", "ours", "of limit", "peers"], map(_figure, rows))]
    for name in (name for name in ("end-to-end: latents", "end-to-end: video") if name in figures):
        lines += [
            "",
            f"## {name}",
            "",
            *table(["", ""], [[key, _short(value)] for key, value in figures[name].items()]),
        ]
    for name, step in steps.items():
        if "tail" in step:
            lines += ["", f"## {name} {step['outcome']}", "", "```", *step["tail"], "```"]
    return "\n".join(lines) + "\n"


def table(header: list[str], rows: Any) -> list[str]:
    """Lines of a Markdown table."""
    cells = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _goal(goal: Goal, figure: float | None) -> list[str]:
    target = f"{'at least' if goal.at_least else 'at most'} {goal.target:g} {goal.unit}"
    if figure is None:
        return [goal.what, target, "not measured", "", goal.step]
    return [goal.what, target, f"{figure:.3g}", "reached" if goal.reached(figure) else "**missed**", goal.step]


def _figure(row: dict[str, Any]) -> list[str]:
    peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["faster_than"].items())
    share = f"{row['of_limit']:.0%} of {row['limit_is']}" if row["of_limit"] else ""
    return [row["operation"], row["case"], _time(row["ours"]), share, peers]


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
