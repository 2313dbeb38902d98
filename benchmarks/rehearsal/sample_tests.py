"""A pytest plugin: of each test function that was selected, one case that can be run here in a moment."""

from __future__ import annotations

import pytest

NOT_HERE = {
    "test_video_sizes": "hours in the emulator",
    "test_agrees_with_the_other_kernel": "hours in the emulator",
    "test_a_million_keys": "4.5 GB of keys",
    "test_retrieve_in_cuda_graphs_made_by_the_compiler": "torch.compile makes graphs for a real GPU only",
    "test_the_first_call_of_a_process_may_be_captured": "a new process knows nothing of the stand-ins",
    "test_a_block_begins_while_the_device_is_busy": "a CPU is done at once",
    "test_it_learns_in_mixed_precision_on_a_gpu": "torch's own kernels in half precision",
}
"""Tests that only a GPU can run, and why."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After -m and -k have selected."""
    kept: dict[str, pytest.Item] = {}
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function.rpartition("::")[2] not in NOT_HERE:
            kept.setdefault(function, item)
    print(f"{len(items)} tests selected, of {len(kept)} functions one each is run")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept.values()])
    items[:] = kept.values()
