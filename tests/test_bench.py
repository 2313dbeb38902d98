from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from longlive_rag import cli, ops
from longlive_rag.bench import attend, attend_sweep, common, decode, encoder, parallel, retrieve
from longlive_rag.native import cuda_status
from longlive_rag.ops._attend_arguments import Arguments

without_gpu = pytest.mark.skipif(
    cuda_status().available, reason="takes minutes on a GPU, where benchmarks/on_gpu.sh runs it"
)


@without_gpu
def test_bench_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "results.png"
    assert cli.main(["bench", "--json", str(results), "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    assert "no measure of them" in capsys.readouterr().out
    written = json.loads(results.read_text())
    assert written["machine"]["device"].startswith("CPU")
    operations = [row["operation"] for row in written["rows"]]
    assert operations == [
        *["insert", "retrieve", "retrieve", "attend", "pack", "unpack", "pack", "unpack"],
        *["layer", "block", "encoder", "encoder"],
    ]
    for row in written["rows"]:
        assert row["ours"] > 0 and all(ratio > 0 for ratio in row["faster_than"].values())


@without_gpu
def test_decoding_is_measured_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    cases = decode.cases(common.machine())
    assert list(cases) == ["Wan's VAE, float32", "tiny, float32", "tiny, float32, channels last"]
    row = cases["tiny, float32, channels last"]()  # the VAE takes most of a minute
    assert row.case == "tiny, float32, channels last, 32 x 48"
    assert row.ours > 0 and row.limit is not None and row.limit > 0


@without_gpu
def test_a_layer_on_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(parallel.cases(common.machine())) == [f"12 heads, 2 x 5 tokens, {ranks} ranks" for ranks in (2, 3, 4)]
    results = tmp_path / "results.json"
    two = next(iter(parallel.cases(common.machine()).values()))
    monkeypatch.setattr(parallel, "cases", lambda machine: {"two": two})
    assert cli.main(["bench", "parallel", "--json", str(results)]) == 0
    (row,) = json.loads(results.read_text())["rows"]
    # 3 frames of 10 tokens with 12 heads of 128 numbers in float32: 4 * 3 * 10 * 12 * 128 * 4 * (2 - 1) / 2**2
    assert row["case"].endswith("gloo, 184.32 KB sent, 184.32 KB by formula")
    assert set(row["peers"]) == {"one rank", "exchange", "attention", "its attention"}
    assert all(seconds > 0 for seconds in row["peers"].values())


def test_output_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "insert", "--json", str(tmp_path / "missing" / "results.json")]) == 2
    assert "missing" in capsys.readouterr().err


def test_rows_survive_a_case_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> common.Row:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    row = common.Row("retrieve", "small", 1e-3)
    monkeypatch.setattr(retrieve, "cases", lambda machine: {"small": lambda: row, "large": too_large})
    monkeypatch.setattr(common.Machine, "facts", lambda self: {"kernels": "CUDA"})
    results = tmp_path / "results.json"
    assert cli.main(["bench", "retrieve", "--json", str(results)]) == 0
    assert "for lack of GPU memory: retrieve: large" in capsys.readouterr().out
    written = json.loads(results.read_text())
    assert [row["case"] for row in written["rows"]] == ["small"]
    assert written["out_of_memory"] == ["retrieve: large"]


def test_an_interrupted_run_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> common.Row:
        raise KeyboardInterrupt

    row = common.Row("retrieve", "small", 1e-3)
    monkeypatch.setattr(retrieve, "cases", lambda machine: {"small": lambda: row, "large": interrupted})
    results = tmp_path / "results.json"
    with contextlib.suppress(KeyboardInterrupt):
        cli.main(["bench", "retrieve", "--json", str(results)])
    assert "retrieve  small  1.00 ms" in capsys.readouterr().out
    assert [row["case"] for row in json.loads(results.read_text())["rows"]] == ["small"]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["attend", "--sweep"], "compute capability 9.0"), (["insert", "--sweep"], "got insert")]
)
@without_gpu
def test_a_sweep_needs_a_hopper_gpu_and_attend(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_variant_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own code, on a CPU, with the reference in place of the kernels that it forces."""

    def launch(variant: attend_sweep.Variant, arguments: Arguments, out: torch.Tensor, lse: torch.Tensor) -> None:
        launched.append(variant)
        for buffer, result in zip((out, lse), ops.attend(*arguments, return_lse=True), strict=True):
            buffer.copy_(result)

    launched: list[attend_sweep.Variant] = []
    tiny = attend.Sizes(1, 64, 6, 1, 2, goal_rate=1e12, goal_ratio=1.1)
    monkeypatch.setattr(common.Machine, "hopper", True)
    monkeypatch.setattr(attend_sweep, "launch", launch)
    for name, value in {"WAN_1_3B": tiny, "SWEPT": [tiny], "FIGURES": [tiny]}.items():
        monkeypatch.setattr(attend_sweep, name, value)
    machine = common.Machine(torch.device("cpu"))
    figure, variants, rotation = (measure() for measure in attend_sweep.cases(machine).values())
    assert set(launched) == {*attend_sweep.VARIANTS, attend_sweep.SM80}
    assert set(variants.peers) == set(map(str, launched))
    assert figure.goal is not None and figure.goal <= tiny.work / 1e12
    assert rotation.goal is not None and rotation.limit is not None and rotation.goal > rotation.limit


def test_table_tells_goals_reached_from_missed() -> None:
    rows = [
        common.Row("encoder", "fast", 4e-4, goal=5e-4),
        common.Row("encoder", "slow", 6e-4, goal=5e-4, peers={"other": 3e-4, "absent": None}),
    ]
    header, fast, slow = common.table(rows).splitlines()
    assert "goal" in header and "500.0 us, reached" in fast and "500.0 us, missed" in slow
    assert "other 300.0 us (0.50x), absent -" in slow


def test_arguments_of_attend_are_what_the_operation_takes() -> None:
    sizes = attend.Sizes(2, 64, 6, 2, 3, batch=2)
    arguments = attend.random_arguments(sizes, torch.float32, torch.device("cpu"))
    assert ops.attend(*arguments).shape == arguments.q.shape
    for sample in range(2):
        assert len(set(arguments.slots[sample].tolist())) == 3
    assert arguments.query_position.tolist() == [[1, 2], [1, 2]]
    q, k, v = attend._gather(arguments)
    page = arguments.slots[1, 2]
    assert q.shape == (2, 2, 12, 64)
    assert torch.equal(k[1, :, 12:], arguments.k_pages[page]) and torch.equal(v[1, :, 12:], arguments.v_pages[page])


def test_work_of_the_encoder_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from longlive_rag.embedding import LatentAutoencoder

    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        LatentAutoencoder().embed(torch.zeros(encoder.FRAMES, encoder.CHANNELS, encoder.HEIGHT, encoder.WIDTH))
    assert encoder.encoder_flops() == counter.get_total_flops()
