"""The families, one file each; a new one is a file here and a line in the table.

Source of each contract: the family's public repository; docs/backbones.md names what was checked against it.
"""

from __future__ import annotations

from longlive_rag.backbones.families.anyflow import AnyFlow
from longlive_rag.backbones.families.causvid import CausVid
from longlive_rag.backbones.families.comfyui import ComfyUI
from longlive_rag.backbones.families.infinity_rope import InfinityRoPE
from longlive_rag.backbones.families.krea import Krea
from longlive_rag.backbones.families.longlive import LongLive
from longlive_rag.backbones.families.longlive2 import LongLive2
from longlive_rag.backbones.families.longlive_rag import LongLiveRAG
from longlive_rag.backbones.families.memflow import MemFlow
from longlive_rag.backbones.families.rolling_forcing import RollingForcing
from longlive_rag.backbones.families.self_forcing import SelfForcing
from longlive_rag.backbones.family import Family

FAMILIES: tuple[Family, ...] = (
    MemFlow(),
    RollingForcing(),
    LongLive2(),
    LongLiveRAG(),
    LongLive(),
    InfinityRoPE(),
    CausVid(),
    Krea(),
    SelfForcing(),
    AnyFlow(),
    ComfyUI(),
)
"""The first that fits counts, so a family that builds on another precedes it."""
