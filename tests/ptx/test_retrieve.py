"""The contract of `ops.retrieve` on nvcc's PTX for sm_80."""

from __future__ import annotations

import torch

from ops.test_retrieve import (  # noqa: F401
    DTYPES,
    check,
    stored,
    test_a_sample_does_not_depend_on_its_batch,
    test_any_shape_and_range,
    test_matches_float64,
    test_nan_is_never_selected,
    test_range_on_the_device,
    test_repeats_bit_for_bit,
    test_ties_go_to_the_lower_index,
    test_zeros_of_either_sign_are_equal,
)
from ptx import execute
from support import emulated

SOURCE = "cuda/retrieve.cu"


def test_every_entry() -> None:
    """Lists of 32 and 64 entries in each dtype."""
    module, device = execute.build(SOURCE), torch.device("cpu")
    torch.manual_seed(0)
    with emulated.backend(module), execute.executed(module) as names:
        for dtype in DTYPES:
            keys, inverse_norms = stored(device, dtype, 2, 210, 72)
            for k in (7, 40):
                check(torch.randn(2, 72).to(device, dtype), keys, inverse_norms, 3, 205, k)
    assert names == set(execute.kernels(SOURCE))
