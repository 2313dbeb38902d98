"""The compiled extension where no kernel can run: it loads, and a launch says what is wrong."""

from __future__ import annotations

import pytest

from longlive_rag import native


def test_launch_without_a_gpu_raises() -> None:
    kernels = native.kernels()
    if kernels is None:
        pytest.skip(f"no CUDA kernels: {native.cuda_status().reason}")
    if native.cuda_status().available:
        pytest.skip("there is a GPU, on which a launch would succeed")
    rows, no_queries = (16, 64, 64, 64, 0, False), (0, 0, 0, 0, 0, False)
    with pytest.raises(RuntimeError, match="(driver|device)"):
        kernels.insert(rows, rows, no_queries, 16, 16, 0, 16, 16, (1, 1, 1, 1, 64), 0, 2, 1e-6, 0, 0)
