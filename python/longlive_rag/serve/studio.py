"""The thread that makes the video, and what it may be told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from longlive_rag.serve.recording import Facts, Recording
from longlive_rag.serve.scene import Scene, Wish
from longlive_rag.serve.take import Event, Take

_IDLE = 10.0  # seconds after which a viewer that says nothing is not waited for


class Studio:
    """Makes one video after the other, block by block, a little ahead of those who watch.

    Commands may come from any thread; each returns the video and the block from which on it holds.

    Args:
        scene: what makes the pictures.
        folder: for the videos.
        ahead: seconds that may be made before the foremost viewer has seen them.
        seed: of the first video; each later one counts on.
        resume: go on with the newest video in the folder.
        emit: is given every event, from any thread.
    """

    def __init__(
        self,
        scene: Scene,
        folder: Path,
        *,
        ahead: float = 1.5,
        seed: int = 0,
        resume: bool = False,
        emit: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.scene, self.folder, self.ahead, self.emit = scene, folder, ahead, emit
        self._changed = threading.Condition()
        self._wish = Wish(scene.default_prompt)
        self._seed = seed
        self._policies = scene.default_policies
        self._paused = self._stopping = self._restart = False
        self._begun = 0
        self._trouble: str | None = None
        self._positions: dict[object, tuple[float, float]] = {}
        self._take: Take | None = None
        number = Recording.latest(folder)
        if resume and number:
            self.recording = Recording(folder, number)
            self._goes_on(self.recording)
        else:
            self.recording = self._new_recording(number + 1)
        self._thread = threading.Thread(target=self._run, name="studio", daemon=True)

    # ---- from any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the block that is being made, and stop."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if self._take is not None:
            self._take.close()
        self.recording.close()

    def ask(self, prompt: str | None = None, camera: str | None = None) -> Event:
        """Wish for something else to be seen.

        Raises:
            ValueError: the scene does not understand the prompt.
        """
        understood = None if prompt is None else self.scene.understand(prompt)
        with self._changed:
            if understood is not None:
                self._wish = replace(self._wish, prompt=understood)
            if camera is not None:
                self._wish = replace(self._wish, camera=camera)
            return self._effective({"prompt": self._wish.prompt, "camera": self._wish.camera})

    def pause(self) -> Event:
        with self._changed:
            self._paused = True
            return self._effective()

    def resume(self) -> Event:
        """Go on after a pause, or try again what failed."""
        with self._changed:
            self._paused, self._trouble = False, None
            return self._effective()

    def new_video(self, seed: int | None = None, policies: tuple[str, ...] | None = None) -> Event:
        """Begin another video with the newest prompt.

        Raises:
            ValueError: there is no such policy.
        """
        for name in policies or ():
            if name not in self.scene.policies:
                raise ValueError(f"There is no policy {name!r}; expected some of {', '.join(self.scene.policies)}.")
        with self._changed:
            self._seed = self._seed + 1 if seed is None else seed
            self._policies = policies or self._policies
            self._restart, self._paused, self._trouble = True, False, None
            return self._effective({"seed": self._seed, "policies": list(self._policies)})

    def watches(self, viewer: object, seconds: float | None) -> None:
        """A viewer has seen the current video up to here; None: it left."""
        with self._changed:
            if seconds is None:
                self._positions.pop(viewer, None)
            else:
                self._positions[viewer] = (seconds, time.monotonic())
            self._changed.notify_all()

    def state(self) -> Event:
        with self._changed:
            recording = self.recording
            return {
                "video": recording.number,
                "blocks": recording.blocks,
                "frames": recording.frames,
                "seconds": recording.seconds,
                "bytes": recording.size,
                "mime": recording.mime,
                "fps": recording.facts.fps,
                "block_frames": self.scene.block_frames,
                "seed": recording.facts.seed,
                "policies": list(recording.facts.policies),
                "prompt": self._wish.prompt,
                "camera": self._wish.camera,
                "paused": self._paused,
                "trouble": self._trouble,
                "ahead": self.ahead,
                "viewers": len(self._positions),
                "scene": self.scene.name,
                "places": list(self.scene.places),
                "enlarge": self.scene.enlarge,
                "aspect": self.scene.latent_shape[2] / self.scene.latent_shape[1],
                "offered": {name: policy.label for name, policy in self.scene.policies.items()},
            }

    def _effective(self, facts: Event | None = None) -> Event:
        """From when on a command holds; called with the lock."""
        self._changed.notify_all()
        video = self.recording.number + self._restart
        return {"video": video, "block": 0 if self._restart else self._begun, **(facts or {})}

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._make_block()
            except Exception as error:
                # The block did not happen: what the disk knows is what memory is rebuilt from.
                with self._changed:
                    self._begun = self.recording.blocks
                    self._trouble = _in_plain_words(error)
                if self._take is not None:
                    self._take.close()
                    self._take = None
                self.emit({"type": "trouble", "video": self.recording.number, "message": self._trouble})

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._stopping and (self._trouble or (not self._restart and (self._paused or self._far_ahead()))):
                self._changed.wait(1.0)
            return not self._stopping

    def _far_ahead(self) -> bool:
        """Whether nobody has seen what is there; when nobody watches, only a beginning is made."""
        now = time.monotonic()
        foremost = max((at for at, when in self._positions.values() if now - when < _IDLE), default=0.0)
        return self.recording.seconds >= foremost + self.ahead

    def _make_block(self) -> None:
        if self._restart:
            self._begin_video()
        if self._take is None:
            self._take = Take(self.scene, self.recording)
            for done in self._take.replay():
                self.emit({"type": "rebuilding", "video": self.recording.number, "block": done})
                if self._stopping:
                    return
        with self._changed:
            wish = self._wish
            block = self._begun
            self._begun += 1
        shot = self.scene.next_shot(wish, self._take.last_shot)
        record = self._take.make(block, shot, wish)
        record.pop("thumbnails", None)
        self.emit({"type": "block", "video": self.recording.number, **record})

    def _begin_video(self) -> None:
        if self._take is not None:
            self._take.close()
            self._take = None
        old = self.recording
        with self._changed:
            self.recording = self._new_recording(old.number + 1)
            self._restart, self._begun = False, 0
            self._positions = {viewer: (0.0, when) for viewer, (_, when) in self._positions.items()}
        old.close()
        self.emit({"type": "video", "state": self.state()})

    def _new_recording(self, number: int) -> Recording:
        scene = self.scene
        shape = (len(self._policies), scene.block_frames, *scene.latent_shape)
        dtype = str(scene.dtype).removeprefix("torch.")
        facts = Facts(scene.name, self._seed, self._policies, scene.fps, shape, dtype)
        return Recording(self.folder, number, facts)

    def _goes_on(self, recording: Recording) -> None:
        facts, scene = recording.facts, self.scene
        expected = (len(facts.policies), scene.block_frames, *scene.latent_shape)
        dtype = str(scene.dtype).removeprefix("torch.")
        if (facts.scene, facts.fps, facts.latent_shape, facts.dtype) != (scene.name, scene.fps, expected, dtype):
            raise ValueError(
                f"{recording.path} is of another scene ({facts.scene}, {facts.fps:g} fps, latents "
                f"{list(facts.latent_shape)} {facts.dtype}) than this one ({scene.name}, {scene.fps:g} fps, "
                f"{list(expected)} {dtype}); start without --resume, or in another --output"
            )
        unknown = [name for name in facts.policies if name not in scene.policies]
        if unknown:
            raise ValueError(f"{recording.path} was made with policies that this scene lacks: {', '.join(unknown)}")
        self._seed, self._policies, self._begun = facts.seed, facts.policies, recording.blocks
        if recording.blocks:
            asked = recording.record(recording.blocks - 1)["wish"]
            self._wish = Wish(**asked)


def _in_plain_words(error: Exception) -> str:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "There was not enough memory for the next block. Nothing is lost; try again with “go on”."
    if isinstance(error, OSError):
        return f"The video could not be written ({error.strerror or error}). Make room, then press “go on”."
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"The next block failed ({reason}). Nothing is lost; try again with “go on”."
