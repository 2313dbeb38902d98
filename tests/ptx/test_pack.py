"""The contract of `ops.pack` and `ops.unpack` on nvcc's PTX for sm_80."""

from __future__ import annotations

import torch

from ops.test_pack import (  # noqa: F401
    BITS,
    DTYPES,
    check,
    test_a_layer_alone,
    test_at_any_address,
    test_bytes_lie_as_documented,
    test_ends_of_the_range,
    test_half_a_step,
    test_more_layers_than_a_launch_takes,
    test_pages_beyond_32_bit_offsets,
    test_what_is_not_finite_stays_visible,
)
from ptx import execute
from support import emulated

SOURCE = "cuda/pack.cu"


def test_every_entry() -> None:
    """Both operations with 8 and with 4 bits in each dtype, bit for bit as the reference."""
    module = execute.build(SOURCE)
    with emulated.backend(module), execute.executed(module) as names:
        for dtype in DTYPES:
            for bits in BITS:
                check(torch.device("cpu"), dtype, bits, (2, 2, 3, 50, 64), seed=0)
    assert names == set(execute.kernels(SOURCE))
