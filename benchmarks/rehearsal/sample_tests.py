"""A pytest plugin: of each test function that was selected, one case that the emulator can run in a moment."""

from __future__ import annotations

import pytest

TOO_LARGE = {
    "test_video_sizes": "of a video's size",
    "test_a_million_keys": "4.5 GB of keys",
    "test_agrees_with_the_other_kernel": "of a video's size",
}
"""Tests of sizes that take the emulator hours, and why."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After -m and -k have selected."""
    kept: dict[str, pytest.Item] = {}
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function.rpartition("::")[2] not in TOO_LARGE:
            kept.setdefault(function, item)
    print(f"{len(items)} tests selected, of {len(kept)} functions one each is run")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept.values()])
    items[:] = kept.values()
