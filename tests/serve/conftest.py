from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longlive_rag.serve.studio import Studio
from support.tiny_scene import TinyScene


@pytest.fixture
def scene() -> TinyScene:
    return TinyScene()


class Heard:
    """Events of a studio, and a way to wait for them."""

    def __init__(self) -> None:
        self.events: list[dict] = []
        self._changed = threading.Condition()

    def __call__(self, event: dict) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, wanted: Callable[[dict], bool]) -> dict:
        with self._changed:
            found = self._changed.wait_for(lambda: next((e for e in self.events if wanted(e)), None), timeout=60)
        assert found is not None, f"never heard, only {self.events}"
        return found

    def wait_for_block(self, number: int, video: int = 1) -> dict:
        return self.wait(lambda e: e["type"] == "block" and e["video"] == video and e["block"] >= number)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def open_studio(scene: TinyScene, tmp_path: Path, heard: Heard) -> Iterator[Callable[..., Studio]]:
    """Starts studios that are stopped in the end; `ahead` is generous, so that a test has what to look at."""
    studios = []

    def start(**options) -> Studio:
        settings = {"folder": tmp_path, "ahead": 1.0, "emit": heard, **options}
        studio = Studio(settings.pop("scene", scene), settings.pop("folder"), **settings)
        studios.append(studio)
        studio.start()
        return studio

    yield start
    for studio in studios:
        studio.stop()
