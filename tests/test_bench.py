from __future__ import annotations

import json
from pathlib import Path

import pytest

from longlive_rag import cli
from longlive_rag.native import cuda_status


@pytest.mark.skipif(cuda_status().available, reason="takes minutes on a GPU, where benchmarks/on_gpu.sh runs it")
def test_bench_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "results.png"
    status = cli.main(["bench", "retrieve", "layer", "--json", str(results), "--plot", str(picture)])
    assert status == 0 and picture.stat().st_size > 1000
    assert "no measure of them" in capsys.readouterr().out
    written = json.loads(results.read_text())
    assert written["machine"]["device"].startswith("CPU")
    operations = [row["operation"] for row in written["rows"]]
    assert operations == ["retrieve", "retrieve", "layer"]
    for row in written["rows"]:
        assert row["ours"] > 0 and all(ratio > 0 for ratio in row["faster_than"].values())


def test_output_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "insert", "--json", str(tmp_path / "missing" / "results.json")]) == 2
    assert "missing" in capsys.readouterr().err
