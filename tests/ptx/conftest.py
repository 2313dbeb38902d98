"""The contract tests of tests/ops that are imported here run on the PTX that nvcc made, under both schedules."""

from __future__ import annotations

from collections.abc import Iterator

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
