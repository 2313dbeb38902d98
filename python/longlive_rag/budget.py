"""How much memory keys and values may take, in bytes, and what happens to those that do not fit."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Bits = Literal[16, 8, 4]

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_bytes(text: str | int) -> int:
    """Bytes that a size such as "12GB", "1.5 TiB" or "4096" stands for: GB is 10**9, GiB 2**30, a plain number bytes.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"a size must look like 12GB, 500MiB or 4096, got {text!r}")
    return int(float(match[1]) * units[match[2].lower()])


def format_bytes(size: float) -> str:
    """A size as people read it: 12.4 GB."""
    if size < 1000:
        return f"{size:.0f} B"
    unit, factor = next(
        ((unit, factor) for unit, factor in (("KB", 1e3), ("MB", 1e6), ("GB", 1e9)) if size < 1000 * factor),
        ("TB", 1e12),
    )
    return f"{size / factor:.2f} {unit}"


@dataclass(frozen=True)
class Budget:
    """What the keys and values of a memory may take, in bytes, from the fastest tier to the slowest.

    A frame that does not fit into one tier goes down to the next. What fits into none is forgotten, the frame most
    similar to an older one first.

    Raises:
        ValueError: a value is out of range.
    """

    device: int | None = None
    """On the device, taken at once. None: as it is needed, on CUDA up to all that is free beside the weights and what a
    block needs to work with, without a limit on a CPU."""
    host: int | None = None
    """In host memory, pinned if the device is a GPU. None: half of what the machine has available."""
    disk: int = 0
    """In a file."""
    folder: Path | None = None
    """Where that file lies, without a name, while it is needed; None: the folder for temporary files, which on some
    systems lies in memory."""
    bits: Bits = 16
    """Of each number below the device: 16, as it is (whatever the dtype), or quantised to 8 or 4."""
    rebuild: bool = False
    """Keep the latents of all frames, and rebuild keys and values that fit nowhere from them when they are retrieved:
    one clean pass of the block, exact in the first layer and an approximation in the others. `CausalWanModel` only."""
    forget: bool = True
    """False: raise MemoryError where a frame would have to be forgotten."""

    def __post_init__(self) -> None:
        for name in ("device", "host", "disk"):
            value = getattr(self, name)
            if value is None and name != "disk":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"budget.{name} must be a number of bytes, 0 or more, got {value!r}")
        if self.bits not in get_args(Bits):
            raise ValueError(f"budget.bits must be 16, 8 or 4, got {self.bits!r}")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ValueError(f"budget.folder must be a folder that is there, got {self.folder}")

    @property
    def host_bytes(self) -> int:
        """The host budget, measured now where it is None."""
        return available_host_bytes() // 2 if self.host is None else self.host


@dataclass(frozen=True)
class BudgetOptions:
    """A `Budget` as it is typed on the command line."""

    device_memory: str | None = None
    """Keys and values on the GPU at most, such as 12GB. Default: all that is free beside the weights."""
    host_memory: str | None = None
    """Keys and values in host memory at most, for frames that do not fit on the GPU. Default: half of what is
    available."""
    disk_memory: str = "0"
    """Keys and values on disk at most, for frames that do not fit into host memory, such as 500GB."""
    disk_folder: Path | None = None
    """Where the file with them lies while the video is made. Default: the folder for temporary files."""
    page_bits: Literal["16", "8", "4"] = "16"
    """Bits of each number below the GPU; 8 halves what a frame takes and the time to move it."""
    keep_all: bool = False
    """Stop with an error rather than forget a frame that fits nowhere."""

    @property
    def budget(self) -> Budget:
        """
        Raises:
            ValueError: a size cannot be read, or the folder is not there.
        """
        bits: dict[str, Bits] = {"16": 16, "8": 8, "4": 4}
        return Budget(
            device=None if self.device_memory is None else parse_bytes(self.device_memory),
            host=None if self.host_memory is None else parse_bytes(self.host_memory),
            disk=parse_bytes(self.disk_memory),
            folder=self.disk_folder,
            bits=bits[self.page_bits],
            forget=not self.keep_all,
        )


def available_host_bytes() -> int:
    """Host memory that may be allocated now without swapping, within the limits of this process's control group."""
    try:
        text = Path("/proc/meminfo").read_text()
        available = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", text)[1])  # type: ignore[index]
    except (OSError, TypeError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return available
