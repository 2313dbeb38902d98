"""`longlive-rag vbench`: videos for VBench-Long, and its results as one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longlive_rag.options import Positional

if TYPE_CHECKING:
    from longlive_rag.evaluation.vbench import Entry


@dataclass(frozen=True)
class Vbench:
    """Measure videos with VBench-Long, which runs in an environment of its own, on a GPU.

    `prepare` takes folders of videos, one for each method, all of the same prompts, and writes a folder with the
    videos under names that VBench-Long takes apart rightly, a script that sets up its environment, and the commands
    that measure. `collect` reads the results that these leave there, and writes a table of the six dimensions and the
    average rank, as Markdown and JSON.

    Examples:
      longlive-rag vbench prepare videos/window videos/retrieval --output measured
      longlive-rag vbench collect measured
    """

    step: Positional[tuple[str, ...]]
    """prepare and the folders of the methods' videos, or collect and the folder that prepare wrote. A folder without
    videos stands for the folders in it."""
    output: Path | None = None
    """With prepare: the folder to write; created if it is missing."""

    def run(self) -> int:
        name, folders = (self.step[0] if self.step else "nothing"), [Path(word) for word in self.step[1:]]
        if name not in ("prepare", "collect"):
            raise ValueError(f"vbench must be followed by prepare or collect, got {name}")
        if name == "collect":
            if len(folders) != 1 or self.output is not None:
                raise ValueError("vbench collect takes the one folder that `vbench prepare` wrote, and no --output")
            return _collect(folders[0])
        if not folders or self.output is None:
            raise ValueError("vbench prepare takes at least one folder of videos, and --output FOLDER")
        return _prepare(folders, self.output)


def _prepare(folders: list[Path], output: Path) -> int:
    from tqdm import tqdm

    from longlive_rag.evaluation import vbench

    methods = vbench.find_methods(folders)
    entries: list[Entry] = [entry for each in methods.values() for entry in each]
    bar = tqdm(entries, desc="checking videos", unit="video", disable=None, leave=False)
    commands = vbench.prepare(methods, output, bar)
    counted = ", ".join(f"{name} ({len(each)} videos)" for name, each in methods.items())
    print(f"{output} is ready for VBench-Long: {counted}.")
    print(f"\nOn a machine with an NVIDIA GPU, once:\n\n  sh {output / vbench.ENVIRONMENT_SCRIPT}")
    print(f"\nThen, in {output} (or all at once: sh {output / vbench.RUN_SCRIPT}):\n")
    print("\n".join(f"  {command}" for command in commands))
    print("\nWithout --dev_flag, consistency over more than two seconds is not measured. Then here again:\n")
    print(f"  longlive-rag vbench collect {output}")
    return 0


def _collect(folder: Path) -> int:
    from longlive_rag.evaluation import vbench_results
    from longlive_rag.files import atomic_path, write_json

    results = vbench_results.collect(folder)
    table = vbench_results.as_markdown(results)
    write_json(folder / "average_ranks.json", vbench_results.as_json(results))
    with atomic_path(folder / "average_ranks.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(table)
    print(f"Written: {folder / 'average_ranks.md'}, {folder / 'average_ranks.json'}")
    return 0
