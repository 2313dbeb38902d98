"""Retrieval memory for ComfyUI: a pack of nodes. docs/comfyui.md says how to install and use them."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
