"""Which frame is forgotten when nothing has room for it: the one that an older frame replaces best."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import torch
from torch import Tensor

from longlive_rag.index import LatentIndex
from longlive_rag.tiers import Entry


class Redundancy:
    """How similar each kept frame is to the most similar older frame that is kept.

    Copies of copies drift, so of two frames that are alike the older one stays.

    Args:
        batch: videos.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self.count = 0
        """Frames that are known."""
        self._unit = np.zeros((batch, 0, 0), np.float32)
        self._kept = np.zeros((batch, 0), bool)
        # Of each frame: cosine to the most similar older one that is kept, and which that is.
        self._cosine = np.zeros((batch, 0), np.float32)
        self._older = np.zeros((batch, 0), np.int64)

    def put(self, start: int, embeddings: np.ndarray) -> None:
        """Embeddings [B, F, D] of the frames ``start ..``, the newest there are."""
        end = start + embeddings.shape[1]
        if end > self._kept.shape[1] or not self.count:
            self._grow(max(64, 2 * end), embeddings.shape[2])
        norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
        self._unit[:, start:end] = embeddings / np.maximum(norms, 1e-12)
        self._kept[:, start:end] = True
        self.count = end
        for video in range(self._batch):
            for frame in range(start, end):
                self._compare(video, frame)

    def forget(self, entry: Entry) -> None:
        """A frame is no longer kept."""
        video, frame = entry
        self._kept[video, frame] = False
        for other in np.flatnonzero(self._older[video, : self.count] == frame):
            self._compare(video, int(other))

    def victim(self, candidates: Set[Entry]) -> Entry | None:
        """The most redundant of these frames, the newest of several; None if there is none to choose from."""
        known = [entry for entry in candidates if entry[1] < self.count]
        return max(known, key=lambda entry: (self._cosine[entry], entry[1]), default=None)

    def clear(self) -> None:
        """Begin a new video."""
        self.count = 0

    def _compare(self, video: int, frame: int) -> None:
        # Below every cosine where there is no older frame: nothing replaces it.
        self._cosine[video, frame], self._older[video, frame] = -2, -1
        if frame:
            cosines = self._unit[video, :frame] @ self._unit[video, frame]
            cosines[~self._kept[video, :frame]] = -2
            self._older[video, frame] = best = int(cosines.argmax())
            self._cosine[video, frame] = cosines[best]

    def _grow(self, capacity: int, width: int) -> None:
        for name, shape in (("_unit", (capacity, width)), *((n, (capacity,)) for n in ("_kept", "_cosine", "_older"))):
            old = getattr(self, name)
            larger = np.zeros((self._batch, *shape), old.dtype)
            if self.count:
                larger[:, : self.count] = old[:, : self.count]
            setattr(self, name, larger)


class Forgetting:
    """Chooses frames to forget, and has the index never find them again.

    Args:
        index: of the memory.
        batch: videos.
        sink_frames: first frames of each video, which are never forgotten.
    """

    def __init__(self, index: LatentIndex, batch: int, sink_frames: int) -> None:
        self._index, self._sink_frames = index, sink_frames
        self._redundancy = Redundancy(batch)
        self._arriving: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def note(self, start: int, embeddings: Tensor) -> None:
        """Have the embeddings [B, F, D] of a committed block at hand on the host, without waiting for them."""
        if embeddings.device.type != "cuda":
            self._arriving.append((start, embeddings.clone(), None))
            return
        host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
        host.copy_(embeddings, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._arriving.append((start, host, arrived))

    def victim(self, candidates: Set[Entry]) -> Entry | None:
        """The most redundant of these frames, sink excepted; None if there is none to choose from."""
        self._catch_up()
        return self._redundancy.victim({entry for entry in candidates if entry[1] >= self._sink_frames})

    def forget(self, entry: Entry) -> None:
        """A frame is no longer kept."""
        self._redundancy.forget(entry)
        self._index.forget(*entry)

    def restore(self) -> None:
        """Know what the index, which was saved, had forgotten."""
        self._catch_up()
        for entry in self._index.forgotten:
            self._redundancy.forget(entry)

    def clear(self) -> None:
        """Begin a new video."""
        self._redundancy.clear()
        self._arriving.clear()

    def _catch_up(self) -> None:
        first = self._arriving[0][0] if self._arriving else self._index.count
        if self._redundancy.count < first:  # frames from when all fitted
            known = self._redundancy.count
            self._redundancy.put(known, self._index.embeddings[:, known:first].float().cpu().numpy())
        for start, embeddings, arrived in self._arriving:
            if arrived is not None:
                arrived.synchronize()
            self._redundancy.put(start, embeddings.float().numpy())
        self._arriving.clear()
