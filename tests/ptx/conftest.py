"""The contract tests of tests/ops that are imported here run on the PTX that nvcc made, under both schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from ptx import execute
from support import emulated


@pytest.fixture(params=["forward", "reverse"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A CPU device whose operations run on the translated kernels that the test module names in SOURCE."""
    monkeypatch.setenv("SIMT_ORDER", request.param)
    with emulated.backend(execute.build(request.module.SOURCE)):
        yield torch.device("cpu")


@pytest.fixture
def assert_same() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """As in tests/ops: our kernels add up in an order that depends neither on the batch nor on unused entries."""

    def compare(got: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)

    return compare
