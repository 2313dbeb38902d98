"""Videos that are there already, which need not be made again and can be replayed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longlive_rag.budget import Budget
from longlive_rag.generation.journal import changed_settings
from longlive_rag.generation.pipeline import video_journal
from longlive_rag.generation.prompts import PromptVideo, Script
from longlive_rag.generation.settings import VideoSettings, flat_settings
from longlive_rag.retrieval_log import recorded_retrieval


def video_facts(script: Script, facts: dict[str, Any]) -> dict[str, Any]:
    """What decides what a video looks like, beside its settings."""
    changes = [[seconds, text] for seconds, text in script.changes]
    return {"prompt": script.prompt, "prompt_at": changes or None, **facts}


def unfinished(
    videos: Sequence[PromptVideo],
    facts: dict[str, Any],
    settings: VideoSettings,
    replay: Sequence[dict[str, Any]] | None,
    budget: Budget,
    device: torch.device,
) -> list[PromptVideo]:
    """Those that are not there yet; what is left of making the others is removed.

    Raises:
        ValueError: one was begun or made with other settings; the message says which.
    """
    left = []
    for video in videos:
        journal = video_journal(video.path, video_facts(video.script, facts), settings, replay, budget, device)
        if _is_done(video, facts, settings):
            journal.remove_finished()
        else:
            journal.check()
            left.append(video)
    return left


def _is_done(video: PromptVideo, facts: dict[str, Any], settings: VideoSettings) -> bool:
    """Whether the video is there.

    Raises:
        ValueError: it is, but was made with other settings; the message says which.
    """
    if not video.path.is_file():
        return False
    log = video.path.with_suffix(".json")
    try:
        before = _log_settings(json.loads(log.read_text(encoding="utf-8")), video_facts(video.script, facts))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{video.path} is there without a readable {log.name}; move it, or use --overwrite") from error
    changed = changed_settings(before, {**video_facts(video.script, facts), **settings.flat()})
    if changed:
        raise ValueError(
            f"{video.path} was made with other settings ({changed}); choose another --output, or --overwrite"
        )
    return True


def _log_settings(log: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    # A log without an entry is older than that choice.
    return {"prompt": log["prompt"], **{name: log.get(name) for name in facts}, **flat_settings(log["settings"])}


def replayed(
    path: Path, scripts: Sequence[Script], facts: dict[str, Any], settings: VideoSettings
) -> list[dict[str, Any]]:
    """What a video's JSON file says was retrieved.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or of other settings; the message says which.
    """
    if len(scripts) != 1:
        raise ValueError(f"replay repeats one video and takes one prompt, got {len(scripts)}")
    facts = video_facts(scripts[0], facts)
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        before, retrieved, frames = _log_settings(log, facts), list(log["retrieved"]), int(log["latent_frames"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"replay must be the JSON file beside a video, got {path} ({error!r})") from error
    changed = changed_settings(before, {**facts, **settings.flat()})
    if changed:
        raise ValueError(f"replay {path} is of a video with other settings ({changed})")
    recorded_retrieval(retrieved, settings.policy, frames)
    return retrieved
