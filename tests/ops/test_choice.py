"""Which implementation of attend runs where, and what takes the place of one that is not trusted."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from longlive_rag import native, ops
from longlive_rag.checking import isolated
from longlive_rag.checking.verdicts import Verdict
from longlive_rag.ops import _choice
from support import emulated
from support.attend_cases import make_case

GPU = torch.device("cuda", 0)
FAILED, PASSED = Verdict("wrong", "attend 1x3: error 1, limit 0"), Verdict("passed")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has verdicts, but none known to this process."""
    monkeypatch.delenv("LONGLIVE_RAG_CHECK", raising=False)
    monkeypatch.delenv(_choice.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(native, "capability", lambda device: (9, 0))
    _choice.forget()
    yield
    _choice.forget()


def verdicts(monkeypatch: pytest.MonkeyPatch, **found: Verdict) -> None:
    known = {name.replace("_", "-"): verdict for name, verdict in found.items()}
    monkeypatch.setattr("longlive_rag.checking.verdicts.read", lambda device: known)


@pytest.mark.parametrize(
    ("hopper", "ampere", "extension_runs", "chosen"),
    [
        (PASSED, PASSED, "sm90", "sm90"),
        (PASSED, PASSED, "sm80", "sm80"),
        (FAILED, PASSED, "sm90", "sm80"),
        (FAILED, FAILED, "sm90", None),
        (PASSED, FAILED, "sm80", None),
    ],
)
def test_the_next_best_takes_the_place_of_what_failed(
    hopper: Verdict, ampere: Verdict, extension_runs: str, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts(monkeypatch, attend_hopper=hopper, attend_ampere=ampere)
    assert _choice.attend_kernel(GPU, extension_runs) == chosen


@pytest.mark.parametrize(
    ("value", "chosen"), [("hopper", "sm90"), ("ampere", "sm80"), ("portable", None), ("reference", None)]
)
def test_the_switch_forces_one(value: str, chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts(monkeypatch, attend_hopper=FAILED, attend_ampere=FAILED)
    monkeypatch.setenv(_choice.SWITCH, value)
    assert _choice.attend_kernel(GPU, "sm90") == chosen


def test_what_was_not_checked_under_capture_is_checked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts(monkeypatch, attend_hopper=FAILED, attend_ampere=PASSED)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _choice.attend_kernel(GPU, "sm90") == "sm90"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _choice.attend_kernel(GPU, "sm90") == "sm80"


def test_the_environment_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by each layer and pass."""
    verdicts(monkeypatch, attend_hopper=PASSED)
    asked = mock.Mock(wraps=_choice.switch)
    monkeypatch.setattr(_choice, "switch", asked)
    assert [_choice.attend_kernel(GPU, "sm90") for _ in range(3)] == ["sm90"] * 3
    assert asked.call_count == 1


def test_a_switch_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_choice.SWITCH, "fastest")
    with pytest.raises(ValueError, match="LONGLIVE_RAG_ATTEND must be one of auto, hopper, .*, got 'fastest'"):
        ops.attend(*make_case(torch.device("cpu"), torch.bfloat16))


def test_blackwell_gets_pytorchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts(monkeypatch, attend_ampere=PASSED)
    monkeypatch.setattr(native, "capability", lambda device: (10, 0))
    assert _choice.attend_kernel(GPU, "sm80") is None
    _choice.forget()
    monkeypatch.setattr(native, "capability", lambda device: (12, 0))
    assert _choice.attend_kernel(GPU, "sm80") == "sm80"


def test_results_without_trusted_kernels_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path, with the emulated extension: a kernel that failed its check is never launched."""
    case = make_case(torch.device("cpu"), torch.bfloat16, tokens=70)
    expected = ops.attend(*case)
    with emulated.backend(emulated.build(), hopper=True) as calls:
        verdicts(monkeypatch, attend_hopper=FAILED, attend_ampere=FAILED)
        assert torch.equal(ops.attend(*case), expected)  # the same computation twice
        assert "attend" not in calls
        _choice.forget()
        verdicts(monkeypatch, attend_hopper=FAILED, attend_ampere=PASSED)
        ops.attend(*case)
        assert "attend" in calls


@pytest.mark.parametrize("name", ["insert", "retrieve"])
def test_the_other_operations_ask_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts(monkeypatch, insert=FAILED, retrieve=FAILED)
    with emulated.backend(emulated.build()) as calls:
        if name == "retrieve":
            ops.retrieve(torch.randn(1, 16), torch.randn(1, 5, 16), torch.ones(1, 5), 0, 5, 2)
        else:
            pages = torch.zeros(2, 1, 1, 4, 64)
            k, rotation = torch.randn(1, 1, 4, 1, 64), torch.zeros(4, 0, 2)
            ops.insert(k, k, None, rotation, pages[0], pages[1], torch.zeros(1, 1, dtype=torch.int32))
    assert name not in calls


def test_an_unknown_machine_is_checked_once_per_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = mock.Mock(return_value=PASSED)
    monkeypatch.setattr(isolated, "check", checked)
    monkeypatch.setattr("longlive_rag.checking.verdicts.read", lambda device: {})
    monkeypatch.setattr("longlive_rag.checking.verdicts.write", lambda device, found: None)
    assert [_choice.attend_kernel(GPU, "sm90") for _ in range(3)] == ["sm90"] * 3
    assert [call.args[0] for call in checked.call_args_list] == ["attend-hopper"]
