"""The folder that VBench-Long reads: videos under names that it takes apart rightly, and the commands to measure them.

Follows https://github.com/Vchitect/VBench at `COMMIT`, folder vbench2_beta_long, mode long_custom_input. What it makes
of a name is why names are changed here: it cuts them at the first ``_`` and at ``.mp4`` and ``-Scene``, and only where
all end in ``-<number>`` does it see that the videos have been split already.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from longlive_rag.files import atomic_path, output_folder, write_json
from longlive_rag.generation.video import VideoReader

REPOSITORY = "https://github.com/Vchitect/VBench"
COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""The six that it measures on videos of any prompts."""

MANIFEST = "vbench.json"
RUN_SCRIPT = "run.sh"
ENVIRONMENT_SCRIPT = "environment.sh"

_CLIP_SECONDS = 2
# A file name may have 255 bytes, and a clip of the video gets another `_000`.
_LONGEST_NAME = 180

_ENVIRONMENT = f"""\
#!/bin/sh
# The environment of VBench-Long: Linux, Python 3.10 or 3.11, git, wget, unzip, and an NVIDIA GPU.
# It needs old packages (transformers 4.33, numpy < 2), so it gets a folder of its own.
# Its first commands download its models: DINO, DINOv2, CLIP (two), DreamSim, AMT, RAFT, MUSIQ, the aesthetic head.
set -eu
cd "$(dirname "$0")"
python3.10 -m venv vbench-env
. vbench-env/bin/activate
git clone {REPOSITORY} VBench
git -C VBench checkout --quiet {COMMIT}
pip install torch==2.3.1 torchvision==0.18.1 --index-url https://download.pytorch.org/whl/cu121
# It imports moviepy.editor, gone since moviepy 2, and its torchvision writes clips with PyAV 12, but not with 18.
pip install -r VBench/requirements.txt 'moviepy<2' 'av<13' 'setuptools<81' dreamsim 'scenedetect[opencv]'
"""


@dataclass(frozen=True)
class Entry:
    """A video to be measured.

    Attributes:
        name: of its file in the folder of its method.
        prompt: that it was made from.
        source: where it comes from.
    """

    name: str
    prompt: str
    source: Path


def find_methods(folders: Iterable[Path]) -> dict[str, list[Entry]]:
    """The videos of each method, by its folder's name; a folder without videos stands for the folders in it.

    The prompt of a video is that in the JSON beside it, as `longlive-rag generate` leaves it, or else its file's name
    without `-<number>`, as VBench has it.

    Raises:
        OSError: a folder is missing.
        ValueError: there are no videos, two methods of one name, or not the same prompts for all methods.
    """
    found: dict[str, list[Entry]] = {}
    for given in folders:
        if not given.is_dir():
            raise FileNotFoundError(f"{given} is no folder of videos")
        inside = [given] if _videos(given) else [each for each in sorted(given.iterdir()) if each.is_dir()]
        with_videos = [folder for folder in inside if _videos(folder)]
        if not with_videos:
            raise ValueError(f"{given} must hold .mp4 files, or folders of them, one for each method; got none")
        for folder in with_videos:
            name = folder.resolve().name
            if name in found:
                raise ValueError(f"two folders are called {name}, which is to be the name of a method; rename one")
            found[name] = list(_entries(_videos(folder)))
    (first, expected), *others = ((method, {entry.name for entry in entries}) for method, entries in found.items())
    for method, names in others:
        if names != expected:
            missing = sorted(names ^ expected)
            raise ValueError(
                f"all methods must have videos of the same prompts, but {first} and {method} differ in {len(missing)}: "
                f"{', '.join(missing[:3])}"
            )
    return found


def prepare(methods: Mapping[str, list[Entry]], output: Path, progress: Iterable[Entry] | None = None) -> list[str]:
    """Write the folder, and return the commands that measure it, to be given in it.

    It gets, for each method, `<method>/videos` with the files alone that VBench-Long is to see, and
    `<method>/prompts.json` ({file: prompt}); and for all `vbench.json`, `environment.sh` and `run.sh`. What is there
    already from an earlier call with the same videos is kept, VBench's own clips and results too.

    Args:
        methods: from `find_methods`.
        output: the folder, created if it is missing.
        progress: all entries in the order of the methods, to be watched; default the entries themselves.

    Raises:
        OSError: a folder or a file cannot be written.
        ValueError: a video cannot be read or is too short, or the folder holds other videos.
    """
    pairs = [(method, entry) for method, entries in methods.items() for entry in entries]
    watched = (entry for _, entry in pairs) if progress is None else progress
    for entry in watched:
        _check_length(entry.source)
    output_folder(output)
    for method, entries in methods.items():
        folder = output_folder(output / method / "videos")
        others = {path.name for path in folder.glob("*.mp4")} - {entry.name for entry in entries}
        if others:
            raise ValueError(
                f"{folder} holds other videos, such as {min(others)}; choose another --output or remove it"
            )
        for entry in entries:
            _place(entry.source, folder / entry.name)
        write_json(output / method / "prompts.json", {entry.name: entry.prompt for entry in entries})
        output_folder(output / method / "results")
    commands = [command(method, dimension) for method in methods for dimension in DIMENSIONS]
    _write_script(output / ENVIRONMENT_SCRIPT, _ENVIRONMENT)
    lines = ["#!/bin/sh", "# What has been measured already is not measured again.", "set -eu", 'cd "$(dirname "$0")"']
    lines += [
        f"grep -qs '\"{dimension}\":' {shlex.quote(method)}/results/*_eval_results.json || {command(method, dimension)}"
        for method in methods
        for dimension in DIMENSIONS
    ]
    _write_script(output / RUN_SCRIPT, "\n".join([*lines, ""]))
    write_json(
        output / MANIFEST,
        {
            "vbench": {"repository": REPOSITORY, "commit": COMMIT, "mode": "long_custom_input"},
            "methods": {
                method: [{"file": each.name, "prompt": each.prompt, "source": str(each.source)} for each in entries]
                for method, entries in methods.items()
            },
        },
    )
    return commands


def command(method: str, dimension: str) -> str:
    """The command, given in the prepared folder, that measures one dimension of one method.

    One dimension at a time, since VBench writes its result when all that it was asked for are done.
    """
    words = ["vbench-env/bin/python", "VBench/vbench2_beta_long/eval_long.py", "--mode", "long_custom_input"]
    words += ["--dev_flag", "--dimension", dimension]
    words += ["--videos_path", f"{method}/videos", "--output_path", f"{method}/results"]
    return shlex.join(words)


def file_name(prompt: str, number: int) -> str:
    """`<prompt>-<number>.mp4`, with what VBench-Long or a file system would trip over taken out, and cut to fit."""
    name = re.sub(r"[\x00-\x1f\x7f/\\_]+", " ", prompt)
    name = re.sub(r"\.mp4|-Scene", " ", name, flags=re.IGNORECASE)
    name = " ".join(name.split()).lstrip("-. ")
    name = name.encode()[:_LONGEST_NAME].decode(errors="ignore").strip()
    return f"{name or 'video'}-{number}.mp4"


def _videos(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.glob("*.mp4")
        if path.is_file() and not path.name.endswith(".partial.mp4") and not path.name.startswith(".")
    )


def _entries(videos: list[Path]) -> Iterator[Entry]:
    counts: Counter[str] = Counter()
    for path in videos:
        prompt = _prompt(path)
        plain = file_name(prompt, 0)
        yield Entry(file_name(prompt, counts[plain]), prompt, path)
        counts[plain] += 1


def _prompt(video: Path) -> str:
    log = video.with_suffix(".json")
    if log.is_file():
        try:
            recorded = json.loads(log.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{log} is no JSON file: {error}") from error
        if isinstance(recorded, dict) and isinstance(recorded.get("prompt"), str):
            prompt: str = recorded["prompt"]
            return prompt
    return re.sub(r"-\d+$", "", video.stem)


def _check_length(path: Path) -> None:
    with VideoReader(path) as video:
        frames, clip = video.frames, _CLIP_SECONDS * int(video.fps)
    if frames is not None and frames <= clip:
        raise ValueError(
            f"{path} has {frames} frames, one clip of {_CLIP_SECONDS} seconds, and consistency between clips needs two"
        )


def _place(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, without a copy where the file system can do that."""
    if target.exists():
        if not (target.samefile(source) or filecmp.cmp(source, target, shallow=False)):
            raise ValueError(f"{target} is another video than {source}; choose another --output or remove it")
        return
    with atomic_path(target) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, temporary)


def _write_script(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
