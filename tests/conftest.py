"""Settings of the whole suite: no network, no window, no GPU test without a GPU."""

import os

import hypothesis
import pytest
import torch

from longlive_rag.native import cuda_status

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("LONGLIVE_RAG_CHECK", "0")  # the tests are the check
# The models are too small for a second thread to pay, least of all on a busy machine. The variable is for subprocesses.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same examples on every run, and no deadline: the machines are slow and shared.
hypothesis.settings.register_profile("longlive_rag", derandomize=True, deadline=None)
hypothesis.settings.load_profile("longlive_rag")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    status = cuda_status()
    if not status.available:
        skip = pytest.mark.skip(reason=f"CUDA kernels: {status.reason}")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)
