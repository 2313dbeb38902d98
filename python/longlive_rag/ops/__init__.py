"""The four operations of the memory.

Each module holds one operation whole: its contract and shape checks, its PyTorch reference (the definition of correct,
and the backend of every device without a kernel) and its registration as ``torch.ops.longlive_rag.<name>``. `unpack` is
the way back of `pack`.
"""

from longlive_rag.ops.attend import attend
from longlive_rag.ops.insert import insert
from longlive_rag.ops.pack import layer_slice, pack, packed_bytes, unpack
from longlive_rag.ops.retrieve import retrieve

__all__ = ["attend", "insert", "layer_slice", "pack", "packed_bytes", "retrieve", "unpack"]
