"""Runs the public repositories' own models and pipelines, patched against unpatched, and prints what came out.

    python tests/backbones/against_checkouts.py ~/Self-Forcing ~/LongLive ...

Each folder is a checkout of a repository that docs/backbones.md names; which one it is, is seen from its files. It runs
in a process of its own, on the CPU in float32, with random weights at a tiny size, and none of its files is changed.
The table that docs/backbones.md shows is printed at the end, in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from backbones.checkouts.foreign import Sizes, enter  # noqa: E402
from backbones.checkouts.repositories import LIMIT, commit, fill, largest_difference, options, recognised  # noqa: E402


def main() -> int:
    parser = options(__doc__, frames=60)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_checkout(arguments.checkouts[0].resolve(), arguments)))
        return 0
    rows: list[dict[str, Any]] = []
    for checkout in arguments.checkouts:
        rows += _in_a_process_of_its_own(checkout, sys.argv[1:], arguments)
    print("\n" + table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(map(_passed, rows)) else 1


def _passed(row: dict[str, Any]) -> bool:
    return row.get("error") is None and row["difference"] < LIMIT and row["restored"] is not False


def _in_a_process_of_its_own(checkout: Path, options: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All repositories call their packages `wan`, `pipeline` and `utils`."""
    kept = [option for option in options if option not in [str(path) for path in arguments.checkouts]]
    command = [sys.executable, __file__, str(checkout), "--one", *kept]
    environment = os.environ | {"TQDM_DISABLE": "1"}  # read when tqdm is imported
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        return [
            {"repository": checkout.name, "case": "", "error": f"exit status {result.returncode}", "difference": 1.0}
        ]
    rows: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return rows


def run_checkout(root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    make = recognised(root)
    sizes = Sizes(layers=arguments.layers, heads=arguments.heads, head_dim=arguments.head_dim)
    enter(root, sizes)
    rows = []
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        driver = make(root, sizes, fill)
        cases = [case for case in driver.cases(arguments.frames) if arguments.case in case.name]
        for case in cases:
            try:
                row = _run_case(driver, case, unpatches=case is cases[0])
            except Exception as error:  # the other cases are of interest nevertheless
                traceback.print_exc()
                row = {"case": case.name, "error": f"{type(error).__name__}: {error}"}
            rows.append({"repository": driver.repository, "commit": commit(root)} | row)
    return rows


def _run_case(driver: Any, case: Any, unpatches: bool) -> dict[str, Any]:
    """Args:
    unpatches: make the first video once more when the patch is taken back.
    """
    from longlive_rag import patch

    began = time.perf_counter()
    _say(f"{driver.repository}: {case.name} ...")
    pipeline = driver.build(case.settings)
    own, retrieved = [], []
    for number, video in enumerate(case.videos):
        own.append(driver.expected(pipeline, video))
        retrieved.append(driver.retrieved(pipeline))
        _say(f"  the repository's own, video {number + 1} of {len(case.videos)} ({time.perf_counter() - began:.0f} s)")
    pipeline = driver.build(case.settings)
    differences, same = [], True
    with patch(driver.target(pipeline), case.config, release_cache=driver.family != "krea realtime") as patched:
        for number, video in enumerate(case.videos):
            made = driver.generate(pipeline, video)
            differences.append(largest_difference(made, own[number]))
            if retrieved[number] is not None:
                same &= [entry.frames[0] for entry in patched.retrieved] == retrieved[number]
            _say(f"  patched, video {number + 1}: {differences[-1]:.1e} ({time.perf_counter() - began:.0f} s)")
        family, config = patched.family, patched.config
    if family != (case.family or driver.family):
        raise RuntimeError(f"{driver.repository}: recognised as {family}")
    restored = None
    if unpatches:
        driver.resize(pipeline, (4, 8), 1)
        for name in driver.caches:
            setattr(pipeline, name, None)
        restored = bool(torch.equal(driver.expected(pipeline, case.videos[0]), own[0]))
    return {
        "case": case.name,
        "config": {field.name: getattr(config, field.name) for field in fields(config)},
        "videos": [f"{video.frames} frames of {video.size[0]}x{video.size[1]}" for video in case.videos],
        "batch": max(video.batch for video in case.videos),
        "difference": max(differences),
        "retrieved": sum(len(row or []) for row in retrieved) if same else "other frames",
        "restored": restored,
        "error": None if same else "other frames retrieved",
        "seconds": time.perf_counter() - began,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| repository | commit | case | latent frames | batch | largest difference of a frame | unpatched again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.get("error"):
            lines.append(f"| {row['repository']} | | {row['case']} | | | {row['error']} | |")
            continue
        retrieved = f", the same {row['retrieved']} blocks retrieved" if row["retrieved"] else ""
        again = {True: "bit for bit", False: "other", None: ""}[row["restored"]]
        videos = ", ".join(row["videos"]).replace(" frames of ", " of ")
        lines.append(
            f"| {row['repository']} | `{row['commit'][:8]}` | {row['case']} | {videos} | {row['batch']} | "
            f"{row['difference']:.1e}{retrieved} | {again} |"
        )
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    sys.exit(main())
