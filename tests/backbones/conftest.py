from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.causal_doubles import Pipeline
from support.tiny_videos import SIZES


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline("Self-Forcing", **SIZES)
