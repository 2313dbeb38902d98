"""`longlive-rag check` with doubles in place of a GPU's kernels: some hang, crash or lie."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longlive_rag import cli, native
from longlive_rag.checking import isolated, trust, verdicts
from longlive_rag.checking.cases import cases
from longlive_rag.checking.variants import VARIANTS
from longlive_rag.checking.verdicts import Verdict

CPU = torch.device("cpu")
CHECKED_ON_CPU = "from longlive_rag.checking.__main__ import main; import sys; sys.exit(main())"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without verdicts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LONGLIVE_RAG_CHECK", raising=False)
    trust.forget()
    yield tmp_path / "cache"
    trust.forget()


def double(change: str) -> list[str]:
    """A check on the CPU, whose operations `change` has replaced by something that a GPU might do."""
    script = f"import torch\nfrom longlive_rag import ops\n{change}\n{CHECKED_ON_CPU}"
    return [sys.executable, "-c", script]


HANGS = "import time\nops.attend = lambda *arguments: time.sleep(60)"
DIES = "import os, signal\nops.attend = lambda *arguments: os.kill(os.getpid(), signal.SIGSEGV)"
RAISES = "def fails(*arguments): raise RuntimeError('an illegal memory access was encountered')\nops.attend = fails"
# Wrong in the last frame of the block only, and only in half precision, as a fault in a tail would be.
LIES = """
right = ops.attend
def attend(q, *rest):
    out = right(q, *rest)
    if q.dtype != torch.float64:
        out[:, -1] = 0
    return out
ops.attend = attend
"""
NOISY = "print('a library greets'); print('{not json')"


def test_a_right_kernel_passes() -> None:
    verdict = isolated.check("attend-ampere", CPU, command=double(NOISY))
    assert verdict == Verdict("passed", "8 cases", thorough=False)


@pytest.mark.parametrize("name", ["insert", "retrieve", "pack"])
def test_the_other_kernels_pass(name: str) -> None:
    assert isolated.check(name, CPU, command=double("")).trusted


def test_a_kernel_that_hangs_is_ended_and_named() -> None:
    verdict = isolated.check("attend-hopper", CPU, case_seconds=2, command=double(HANGS))
    assert verdict.status == "hung" and not verdict.trusted
    assert "2 s" in verdict.detail and "attend 1x3x70x2x128x5 bfloat16" in verdict.detail


@pytest.mark.parametrize(
    ("change", "reason"), [(DIES, "signal 11"), (RAISES, "illegal memory access"), ("raise SystemExit(0)", "before")]
)
def test_a_kernel_that_crashes_is_named(change: str, reason: str) -> None:
    verdict = isolated.check("attend-hopper", CPU, command=double(change))
    assert verdict.status == "crashed" and reason in verdict.detail


def test_a_kernel_that_lies_is_caught() -> None:
    verdict = isolated.check("attend-hopper", CPU, command=double(LIES))
    assert verdict.status == "wrong" and "error" in verdict.detail and "limit" in verdict.detail


@pytest.mark.parametrize(
    "change",
    [
        "right = ops.insert\ndef insert(k, v, w, rotation, *rest):\n"
        "    return right(k, v, w, -rotation if k.dtype == torch.float16 else rotation, *rest)\nops.insert = insert",
        "right = ops.insert\ndef insert(k, v, w, r, k_pages, *rest):\n"
        "    out = right(k, v, w, r, k_pages, *rest)\n"
        "    if k.dtype == torch.float32: k_pages[-1] += 1e-3\n    return out\nops.insert = insert",
    ],
    ids=["turned the other way", "a page of somebody else's"],
)
def test_a_lying_insert_is_caught(change: str) -> None:
    assert isolated.check("insert", CPU, command=double(change)).status == "wrong"


@pytest.mark.parametrize(
    "change",
    [
        "right = ops.retrieve\ndef retrieve(*a):\n"
        "    i, s = right(*a)\n    return i.roll(1, 1), s\nops.retrieve = retrieve",
        "right = ops.retrieve\ndef retrieve(q, k, n, first, last, top):\n"
        "    return right(q, k, n, first, last + 1, top)\nops.retrieve = retrieve",
    ],
    ids=["another order", "past the last candidate"],
)
def test_a_lying_retrieve_is_caught(change: str) -> None:
    assert isolated.check("retrieve", CPU, command=double(change)).status == "wrong"


def test_thorough_has_real_sizes() -> None:
    for variant in VARIANTS.values():
        quick = [case.name for case in cases(variant, CPU, thorough=False)]
        thorough = [case.name for case in cases(variant, CPU, thorough=True)]
        assert quick and set(quick) < set(thorough)


def test_a_verdict_is_remembered_for_this_machine_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = verdicts.write(CPU, {"insert": Verdict("passed", "6 cases")})
    assert path is not None and path.is_relative_to(cache)
    verdicts.write(CPU, {"retrieve": Verdict("hung", "no end after 60 s")})
    assert verdicts.read(CPU) == {
        "insert": Verdict("passed", "6 cases"),
        "retrieve": Verdict("hung", "no end after 60 s"),
    }
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert verdicts.read(CPU) == {}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"identity": {}}', '{"verdicts": 3}'])
def test_a_damaged_file_is_no_verdict(damage: str) -> None:
    path = verdicts.write(CPU, {"insert": Verdict("passed")})
    assert path is not None
    path.write_text(damage)
    assert verdicts.read(CPU) == {}
    assert verdicts.write(CPU, {"insert": Verdict("passed")}) == path
    assert verdicts.read(CPU)["insert"].trusted


def test_a_cache_folder_that_cannot_be_written_to_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(taken))
    assert verdicts.write(CPU, {"insert": Verdict("passed")}) is None
    assert verdicts.read(CPU) == {}


class Checks:
    """Counts quick checks, and answers them."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict, self.names = verdict, list[str]()

    def __call__(self, name: str, device: torch.device) -> Verdict:
        self.names.append(name)
        return self.verdict


def test_the_first_use_checks_once_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(Verdict("passed", "8 cases"))
    monkeypatch.setattr(isolated, "check", checks)
    assert trust.trusted("attend-ampere", CPU) and trust.trusted("attend-ampere", CPU)
    assert checks.names == ["attend-ampere"]
    trust.forget()  # another process
    assert trust.trusted("attend-ampere", CPU)
    assert checks.names == ["attend-ampere"]


def test_what_failed_is_not_used_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(isolated, "check", Checks(Verdict("hung", "no end after 60 s, in attend 1x3 bfloat16")))
    with caplog.at_level(logging.WARNING):
        assert not any(trust.trusted("attend-hopper", CPU) for _ in range(3))
    (warning,) = [record.getMessage() for record in caplog.records]
    for part in ("attend-hopper did not end", "no end after 60 s", "the kernel for sm_80 is used instead", "--report"):
        assert part in warning


def test_the_check_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(Verdict("hung"))
    monkeypatch.setattr(isolated, "check", checks)
    monkeypatch.setenv("LONGLIVE_RAG_CHECK", "0")
    assert trust.trusted("insert", CPU) and not checks.names


def test_nothing_is_checked_inside_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(Verdict("hung"))
    monkeypatch.setattr(isolated, "check", checks)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert trust.trusted("insert", CPU) and not checks.names
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert not trust.trusted("insert", CPU) and checks.names == ["insert"]


class Machine:
    """A machine with one Hopper GPU, whose kernels end as `verdicts` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **found: Verdict) -> None:
        self.verdicts = {name.replace("_", "-"): verdict for name, verdict in found.items()}
        properties = SimpleNamespace(name="A GPU", major=9, minor=0)
        monkeypatch.setattr(native, "cuda_status", lambda: native.CudaStatus(True, ("sm_80", "sm_90a"), True, None))
        monkeypatch.setattr(native, "capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(isolated, "check", lambda name, device, thorough: self.verdicts[name])


ALL_PASSED = {
    name: Verdict("passed", "8 cases", thorough=True) for name in ("insert", "retrieve", "pack", "attend_ampere")
}


def test_the_command_prints_a_table_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hung = Verdict("hung", "no end after 30 s, in attend 1x3x70x2x128x5 bfloat16", thorough=True)
    Machine(monkeypatch, **ALL_PASSED, attend_hopper=hung)
    report = tmp_path / "report.json"
    assert cli.main(["check", "--report", str(report)]) == 1
    table = capsys.readouterr().out
    assert "attend-hopper  hung" in table and "the kernel for sm_80 is used instead" in table
    assert "retrieve       passed   8 cases" in table
    content = json.loads(report.read_text())
    assert content["verdicts"]["attend-hopper"]["status"] == "hung" and content["device"] == "A GPU"
    for fact in ("driver", "torch", "python", "system", "package", "extension"):
        assert fact in content
    # What was found is in force from now on, without another check.
    assert not trust.trusted("attend-hopper", torch.device("cuda", 0))
    assert trust.trusted("attend-ampere", torch.device("cuda", 0))


def test_the_command_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Machine(monkeypatch, **ALL_PASSED, attend_hopper=Verdict("passed", "8 cases"))
    assert cli.main(["check", "--quick"]) == 0
    assert "wrong" not in capsys.readouterr().out


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Machine(monkeypatch)
    for device in ("cuda:1", "cpu", "gpu"):
        assert cli.main(["check", "--device", device]) == 2
        assert f"got '{device}'" in capsys.readouterr().err


def test_without_a_gpu_there_is_nothing_to_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if native.cuda_status().available:
        pytest.skip("there is a GPU")
    assert cli.main(["check", "--report", str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out.startswith("Nothing to check: ")
    assert json.loads((tmp_path / "report.json").read_text())["cuda"]["available"] is False
