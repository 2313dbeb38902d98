"""Every contract test runs over every backend there is: the PyTorch reference, the CUDA kernels emulated on the CPU
(under both schedules), and the CUDA kernels on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from longlive_rag.native import cuda_status
from support import emulated


@pytest.fixture(params=["reference", "emulated", "emulated-reverse", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device whose tensors get the backend under test."""
    if request.param == "cuda":
        status = cuda_status()
        if not status.available:
            pytest.skip(f"no CUDA kernels here: {status.reason}")
        yield torch.device("cuda")
    elif request.param == "reference":
        yield torch.device("cpu")
    else:
        monkeypatch.setenv("SIMT_ORDER", request.param.partition("-")[2])
        with emulated.backend(emulated.build()):
            yield torch.device("cpu")
