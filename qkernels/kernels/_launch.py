"""Launch a Triton kernel without looking everything up again at each call.

Triton's own launch binds arguments by name, derives a specialization from each and builds a key of strings: more time
than a small kernel takes.  A `Launcher` keeps the compiled kernel under a key of what Triton specializes on (types,
alignment to 16 bytes, divisibility of sizes by 16, 64-bit sizes) and from the second call on hands over addresses.  A
`Launch` is one of its launches with all but the pointers given: for a kernel so short that making the key counts.

Triton's launch hooks (its Proton profiler sets them) see the first launch of a variant only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import triton
from triton import JITFunction

# How Triton 3.6's launch in C takes its arguments.
_PASSES_SCRATCH = triton.__version__.startswith("3.6.")
_thread = threading.local()
Grid = tuple[int, int, int]  # of plain integers: triton.cdiv, made for kernels, takes longer than the rest of a launch


class Config(Protocol):
    """What a launch needs of a configuration, which is hashable."""

    @property
    def num_warps(self) -> int: ...

    @property
    def max_registers(self) -> int | None: ...


class Ready(NamedTuple):
    """A compiled kernel on a device, where it is loaded.

    Attributes:
        start: launches it, a function of (*grid, stream, *between, *arguments).
        between: what it takes between the stream and the kernel's arguments.
        compiled: Triton's object, kept because the kernel is unloaded with it.
    """

    start: Callable[..., None]
    between: tuple[object, ...]
    compiled: object


def _enter_context(device: int) -> None:
    """Make the device's CUDA context the thread's.

    CUDA's runtime does it at a thread's first call, and Triton before it launches.  But it makes descriptors before
    that, by the driver, which then says "invalid device context": in autograd's thread, where a product may come first.
    Where CUDA is not in use, a launch is one that is only compiled.
    """
    if getattr(_thread, "device", None) != device and torch.cuda.is_initialized():
        torch.cuda.mem_get_info(device)  # a call of the runtime that no capture minds
        _thread.device = device


def _ready(compiled: Any) -> Ready:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if _PASSES_SCRATCH and not (run.global_scratch_size or run.profile_scratch_size):
        # Triton's Python would allocate scratch memory and call this: the kernel has none.
        flags = run.launch_cooperative_grid, run.launch_pdl
        return Ready(run.launch, (function, *flags, None, None, metadata, None, None, None), compiled)
    return Ready(run, (function, metadata, None, None, None), compiled)


class Launcher:
    """One kernel's compiled variants.

    The kernel's arguments are descriptors of tensors first, then pointers, sizes and compile-time constants.

    Args:
        kernel: the jit function.
        views: positions of the pointers that the kernel sees as another dtype than the tensor has.
        options: Triton's compile options that every launch shares.
    """

    def __init__(self, kernel: Any, views: dict[int, torch.dtype] | None = None, **options: object) -> None:
        self._kernel = kernel
        self._views = views or {}
        self._options = options
        self._variants: dict[tuple[object, ...], Ready] = {}
        # In the interpreter there is nothing to keep.
        self._interpreted = not isinstance(kernel, JITFunction)

    def __call__(
        self,
        grid: Grid,
        pointers: tuple[torch.Tensor | None, ...],
        sizes: tuple[int, ...],
        constants: tuple[object, ...],
        config: Config,
        descriptors: tuple[object, ...] = (),
    ) -> Ready | None:
        """Launch on the current device and stream.

        Args:
            pointers: tensors on that device; None for a pointer that the constants say is not read.
            sizes: run-time integers, each given a type and a specialization as Triton does.
            descriptors: of tensors that are read by TMA; their dtype is that of a pointer, their tile a constant.

        Returns:
            What was launched; None in the interpreter, or where a hook of Triton's refused to compile it.
        """
        scalars = (*sizes, *constants)
        if self._interpreted:
            self._first(grid, descriptors, pointers, scalars, config)
            return None
        device = torch._C._cuda_getDevice()
        if descriptors:
            _enter_context(device)
        addresses = [None if pointer is None else pointer.data_ptr() for pointer in pointers]
        types = [None if pointer is None else pointer.dtype for pointer in pointers]
        specialized = 0  # three bits a size
        for size in sizes:
            specialized = specialized * 8 + (size % 16 == 0) + 2 * (size == 1) + 4 * (size >= 2**31)
        together = 0
        for address in addresses:
            together |= address or 0
        # Nearly always all pointers are aligned; only else it is looked at which are not.
        misaligned = tuple((address or 0) % 16 != 0 for address in addresses) if together % 16 else ()
        key = (device, specialized, misaligned, config, constants, *types)
        ready = self._variants.get(key)
        if ready is None:
            compiled = self._first(grid, descriptors, pointers, scalars, config)
            if compiled is None:  # a hook of Triton's refused the compilation, and nothing was launched
                return None
            ready = self._variants[key] = _ready(compiled)
            return ready
        stream = torch._C._cuda_getCurrentRawStream(device)
        ready.start(*grid, stream, *ready.between, *descriptors, *addresses, *scalars)
        return ready

    def _first(
        self,
        grid: Grid,
        descriptors: tuple[object, ...],
        pointers: tuple[torch.Tensor | None, ...],
        scalars: tuple[object, ...],
        config: Config,
    ) -> Any:
        """Launch through Triton, which compiles the variant, and return it."""
        tensors = [
            pointer.view(-1).view(self._views[position]) if position in self._views and pointer is not None else pointer
            for position, pointer in enumerate(pointers)
        ]
        return self._kernel[grid](
            *descriptors,
            *tensors,
            *scalars,
            num_warps=config.num_warps,
            maxnreg=config.max_registers,
            **self._options,
        )


def early_and_late(kernel: Any, **options: Any) -> dict[bool, Launcher]:
    """Two launchers of a kernel, by its constant EARLY (BESIDE): whether it begins before the kernel before it ends."""
    return {early: Launcher(kernel, launch_pdl=early, **options) for early in (False, True)}


class Launch:
    """One launch of a `Launcher` again and again: the same arguments but for the pointers, whose dtypes stay too."""

    def __init__(
        self, launcher: Launcher, grid: Grid, sizes: tuple[int, ...], constants: tuple[object, ...], config: Config
    ) -> None:
        self._launcher = launcher
        self._arguments = grid, sizes, constants, config
        self._scalars = (*sizes, *constants)
        # For pointers that are all aligned, by device.
        self._aligned: dict[int, Ready] = {}

    def __call__(self, *pointers: torch.Tensor | None) -> None:
        """Launch on the current device and stream; `pointers` as `Launcher` takes them."""
        device = torch._C._cuda_getDevice()
        addresses = [0 if pointer is None else pointer.data_ptr() for pointer in pointers]
        together = 0
        for address in addresses:
            together |= address
        grid, sizes, constants, config = self._arguments
        ready = None if together % 16 else self._aligned.get(device)
        if ready is not None:
            stream = torch._C._cuda_getCurrentRawStream(device)
            ready.start(*grid, stream, *ready.between, *addresses, *self._scalars)
            return
        ready = self._launcher(grid, pointers, sizes, constants, config)
        if ready is not None and not together % 16:
            self._aligned[device] = ready
