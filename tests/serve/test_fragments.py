"""Fragments: appended to one head they are one video, whatever their length and content."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from longlive_rag.serve.fragments import boxes, codec_string, encode_fragment
from support.serving import picture_times


@pytest.mark.parametrize("fps", [4, 8, 16, Fraction(24000, 1001)])
def test_fragments_of_any_length_follow_each_other_without_a_gap(fps):
    chance = np.random.default_rng(0)
    lengths, data, first = [1, 9, 12, 1, 12], b"", 0
    for index, length in enumerate(lengths):
        # Noise: every picture looks like a cut to the encoder.
        pictures = chance.integers(0, 256, (length, 32, 48, 3), dtype=np.uint8)
        fragment = encode_fragment(pictures, fps=Fraction(fps), first_picture=first, number=index + 1)
        assert [kind for kind, *_ in boxes(fragment.body, 0, len(fragment.body))] == [b"moof", b"mdat"]
        data = data or fragment.head
        assert data.startswith(fragment.head)
        data, first = data + fragment.body, first + length
    assert picture_times(data) == pytest.approx([n / float(fps) for n in range(sum(lengths))], abs=2 / 90_000)
    with av.open(io.BytesIO(data), "r") as container:
        keys = [
            index for index, packet in enumerate(p for p in container.demux(video=0) if p.size) if packet.is_keyframe
        ]
    assert keys == [0, 1, 10, 22, 23]
    assert codec_string(data).startswith("avc1.64")
