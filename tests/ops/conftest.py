"""Every contract test runs over every backend there is: the PyTorch reference, the CUDA kernels emulated on the CPU
(under both schedules; attend also as on Hopper), and the CUDA kernels on a GPU. attend has one more: PyTorch's own
attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from longlive_rag.native import cuda_status
from longlive_rag.ops._choice import SWITCH
from support import emulated

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
EVERYWHERE: list[object] = ["reference", "emulated", "emulated-reverse", CUDA]
HOPPER = ["emulated-sm90", "emulated-sm90-reverse"]
"""Where frames have fewer tokens than the kernel for Hopper takes, these run the other one, as a GPU does."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked cuda, for which the emulator is too slow, runs on a GPU only."""
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "device" not in metafunc.fixturenames or "device" in chosen:
        return
    if metafunc.definition.get_closest_marker("cuda"):
        backends: list[object] = [CUDA]
    elif metafunc.module.__name__.endswith("test_attend"):
        backends = ["portable", *EVERYWHERE, *HOPPER]
    else:
        backends = EVERYWHERE
    metafunc.parametrize("device", backends, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device whose tensors get the backend under test."""
    if request.param == "cuda":
        status = cuda_status()
        if not status.available:
            pytest.skip(f"no CUDA kernels here: {status.reason}")
        yield torch.device("cuda")
    elif request.param in ("reference", "portable"):
        monkeypatch.setenv(SWITCH, request.param)
        yield torch.device("cpu")
    else:
        monkeypatch.setenv("SIMT_ORDER", "reverse" if request.param.endswith("reverse") else "forward")
        with emulated.backend(emulated.build(), hopper="sm90" in request.param):
            yield torch.device("cpu")


@pytest.fixture
def assert_same(request: pytest.FixtureRequest, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """For one sample's result from tensors of two shapes: in another batch, or with other unused table entries.

    Our kernels add up in an order that depends on neither, so the bits are the same. PyTorch chooses its kernels by
    shape, CPU and number of threads: the reference may differ by the order of a float32 sum, and then by one rounding
    to the result's dtype.
    """
    is_pytorch = request.node.callspec.params["device"] in ("reference", "portable")

    def compare(got: torch.Tensor, expected: torch.Tensor) -> None:
        # Sums of at most 256 terms of order 1: eps * sqrt(256).
        rtol, atol = (torch.finfo(got.dtype).eps, 16 * torch.finfo(torch.float32).eps) if is_pytorch else (0, 0)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)

    return compare
