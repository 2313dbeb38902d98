"""Budgets that do not fit are refused before anything is made."""

import pytest

from longlive_rag import RetrievalConfig


def test_the_defaults_are_the_papers() -> None:
    config = RetrievalConfig()
    assert (config.context_frames, config.sink_frames, config.memory_frames, config.recency_guard) == (12, 1, 6, 5)
    assert (config.block_frames, config.local_frames, config.positions, config.query) == (3, 5, "relative", "latest")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sink_frames": 4, "memory_frames": 6, "block_frames": 3}, r"4 \+ 6 \+ 3 = 13 > 12"),
        ({"memory_frames": -1}, "memory_frames must be an integer of at least 0, got -1"),
        ({"block_frames": 0}, "block_frames must be an integer of at least 1, got 0"),
        ({"context_frames": 2.5}, "context_frames must be an integer of at least 1, got 2.5"),
        ({"sink_frames": True}, "sink_frames must be an integer"),
        ({"positions": "rotary"}, "positions must be one of relative, absolute, got 'rotary'"),
        ({"query": "newest"}, "query must be one of latest, draft, got 'newest'"),
        ({"context_frames": 200, "memory_frames": 65}, "memory_frames must be at most 64, got 65"),
    ],
)
def test_a_bad_value_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**arguments)  # type: ignore[arg-type]
