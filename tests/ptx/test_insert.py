"""The contract of `ops.insert` on nvcc's PTX for sm_80."""

from __future__ import annotations

import torch

from ops.test_insert import (  # noqa: F401
    DTYPES,
    check,
    test_a_frame_does_not_depend_on_its_batch,
    test_any_shape,
    test_matches_float64,
    test_pages_beyond_32_bit_offsets,
    test_pools_at_any_address,
    test_rows_at_any_address,
)
from ptx import execute
from support import emulated

SOURCE = "cuda/insert.cu"


def test_every_entry() -> None:
    """One, two and four vectors a thread in each dtype, each against float64."""
    module = execute.build(SOURCE)
    with emulated.backend(module), execute.executed(module) as names:
        for dtype in DTYPES:
            elements = 128 // torch.finfo(dtype).bits  # of a vector
            for vectors in (40, 700, 1300):
                check(torch.device("cpu"), dtype, (1, 2, 2, vectors * elements // 8, 8), 3)
    assert names == set(execute.kernels(SOURCE))
