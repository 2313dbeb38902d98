"""Lets torch take the CPU for a Hopper GPU: the device "cuda" is the CPU, streams do nothing, graphs are recorded.

What it cannot show: which of two devices a tensor is on, and anything about time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
FREE_BYTES = 2**30
"""Too few for the tests of offsets beyond 32 bits."""


class CudaIsCpu(TorchFunctionMode):
    """Wherever a device is passed to torch, the CPU takes the place of "cuda"."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(on_cpu, (args, kwargs or {}))
        return function(*args, **kwargs)


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return CPU if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class Recorder(TorchDispatchMode):
    """Writes down every operation, as the capture of a graph does."""

    capturing: ClassVar[Recorder | None] = None
    """Writes down the next call of the extension; none within an operation, which is written down as a whole."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch._dynamo would be imported, which takes seconds

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a tensor's value is asked for while a graph is captured")
        Recorder.capturing = None
        try:
            return self.call(function, args, kwargs or {})
        finally:
            Recorder.capturing = self

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    def __enter__(self) -> Recorder:
        Recorder.capturing = self
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        Recorder.capturing = None
        super().__exit__(*raised)


class Extension:
    """The extension, or a plan that it made, whose launches a graph that is being captured writes down too."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.made, name)

        def call(*arguments: Any, **options: Any) -> Any:
            recorder = Recorder.capturing
            out = value(*arguments, **options) if recorder is None else recorder.call(value, arguments, options)
            return Extension(out) if hasattr(out, "launch") else out

        return call if callable(value) else value


class Graph:
    """In place of `torch.cuda.CUDAGraph`: replays operations into the tensors that they made at the capture."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def replay(self) -> None:
        for function, args, kwargs, before in self.recorder.calls:
            after = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Generator(torch.Generator):
    """A generator of the CPU, whatever device it is asked for."""

    def __new__(cls, device: object = "cpu") -> Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class Event:
    """In place of `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    """In place of `torch.cuda.Stream`: there is one, and it never runs ahead."""

    cuda_stream = 0

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def pretend() -> None:
    """Make torch and `longlive_rag.native` believe in the GPU, for the rest of the process."""

    # A function of its own for each name: torch._dynamo refuses to meet the same one twice.
    def nothing() -> Callable[..., None]:
        return lambda *_, **__: None

    def block() -> Callable[..., contextlib.AbstractContextManager[None]]:
        return lambda *_, **__: contextlib.nullcontext()

    properties = SimpleNamespace(
        L2_cache_size=2**16, multi_processor_count=2, total_memory=FREE_BYTES, name="Rehearsal", major=9, minor=0
    )
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "Rehearsal",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (FREE_BYTES, FREE_BYTES),
        "max_memory_allocated": lambda device=None: FREE_BYTES,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "current_stream": lambda device=None: Stream(),
        "graph": lambda graph, **_: graph.recorder,
        **{name: block() for name in ("stream", "device")},
        **{name: nothing() for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep")},
        **{name: nothing() for name in ("set_sync_debug_mode", "manual_seed_all", "manual_seed")},
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]
    compile_module = torch.nn.Module.compile

    def compile_in_a_moment(module: torch.nn.Module) -> None:
        compile_module(module, backend="eager")

    torch.nn.Module.compile = compile_in_a_moment  # type: ignore[method-assign, assignment]
    CudaIsCpu().__enter__()

    from longlive_rag import native

    native.capability = lambda device: (9, 0) if device.type == "cuda" else None  # type: ignore[assignment]
    native.cuda_status = lambda: native.CudaStatus(True, ("sm_90a",), True, None)


@contextlib.contextmanager
def emulated_kernels() -> Iterator[None]:
    """The operations run the kernels of this source tree in the emulator, `attend` as on Hopper."""
    from longlive_rag import native
    from support import emulated

    extension = Extension(emulated.build())
    native.kernels = lambda: extension  # type: ignore[assignment, return-value]
    with emulated.backend(extension, hopper=True):  # type: ignore[arg-type]
        yield
