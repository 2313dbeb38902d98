"""MemFlow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longlive_rag.backbones.families.longlive import LongLive
from longlive_rag.backbones.follow import Follower
from longlive_rag.backbones.own_context import Said
from longlive_rag.backbones.wan import cache_ends
from longlive_rag.backbones.wan_attention import Arguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Switches:
    """What its pipeline does with the sink when the prompt switches."""

    said: Said

    @property
    def drop_the_sink(self) -> bool:
        kept = self.said.flag("global_sink")
        if kept is None:
            logger.warning(
                "a prompt switch of MemFlow keeps the sink, as with its published global_sink: true; if it is set "
                "otherwise, patch the pipeline"
            )
        return kept is False


class MemFlow(LongLive):
    """Its bank of keys stays empty; the retrieval memory takes over.

    Its calls do not say whether a prompt switch drops the sink, so its pipeline is asked. Where it does, the published
    code goes on with a sink of zeros; here the frames that are made again begin the video anew, as in LongLive.
    """

    name = "MemFlow"
    marks = frozenset({"kv_bank", "update_bank", "is_recache"})

    def new_state(self, said: Said) -> Switches:
        return Switches(said)

    def start_pass(
        self, follower: Follower[Switches], start: int, frames: int, latents: Tensor, arguments: Arguments
    ) -> None:
        if arguments.get("is_recache") and follower.state.drop_the_sink:
            follower.restart()
        super().start_pass(follower, start, frames, latents, arguments)

    def output(self, x: Tensor, arguments: Arguments) -> Any:
        # Its update step needs an update to read; one that is called a recomputation leaves cache and bank alone.
        return x, (*cache_ends(x, arguments), {"action": "none", "is_recompute": True})
