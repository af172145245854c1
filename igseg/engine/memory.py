"""How many interpolation steps go through the network at once, and how much memory was used."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import torch

MAX_STEP_BATCH = 64  # larger batches are not faster on a GPU, and strain its memory
CPU_STEP_BATCH_PIXELS = 4 * 256 * 256  # of a whole step batch: on a CPU it pays for small images
WORTHWHILE = 0.95  # a larger step batch must take at most this share of the time per step


# --------------------------------------------------------------------------- step batch


class StepBatch:
    """How many interpolation steps go through the network at once.

    A fixed size is used as it is. Otherwise each shape of input is measured once, on steps that are
    needed anyway: 1, 2, 4, … at a time, while this saves time and fits into memory. One size that
    saves no time is skipped, since the next may. Any size is halved when memory runs out.
    """

    def __init__(self, device: torch.device, fixed: int | None = None) -> None:
        self.device = device
        self.size = fixed or 1
        self._fixed = fixed
        self.single = False  # whether the network can take only one image at a time
        self._chosen: dict[object, int] = {}  # (pixels, precision) -> size
        self.measuring = False  # whether the best size is still unknown
        self._times: list[float] = []  # seconds per step, with the current size
        self._best, self._best_size = float('inf'), 1

    def start(self, pixels: int, precision: torch.dtype | None = None) -> None:
        """Prepare for an image with so many pixels."""
        self._key = (pixels, precision)
        if self._fixed is not None or self.single:
            self.size, self.measuring = 1 if self.single else self._fixed or 1, False
            return
        self.measuring = self._key not in self._chosen
        self.size = self._chosen.get(self._key, 1)
        self._limit = min(MAX_STEP_BATCH, max(1, CPU_STEP_BATCH_PIXELS // pixels))
        self._times, self._best, self._best_size = [], float('inf'), self.size
        if self.device.type == 'cuda' and self.measuring:
            self._limit = MAX_STEP_BATCH
            self._idle_bytes = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def timed(self, count: int) -> Iterator[None]:
        """Measure the time of a chunk of `count` steps. Only while measuring, wait for the GPU."""
        if not self.measuring or count < self.size:
            yield
            return
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.judge((time.perf_counter() - started) / count)

    def judge(self, seconds: float) -> None:
        """Note the seconds that a step took; then try twice the size, or choose the best one."""
        if self.device.type == 'cuda' and self.size == 1:
            self._limit = min(MAX_STEP_BATCH, self._room())
        self._times.append(seconds)
        if len(self._times) == 1 and self._limit > 1:
            return  # the first pass with a new size also prepares its kernels
        if self._times[-1] <= WORTHWHILE * self._best:
            self._best, self._best_size = self._times[-1], self.size
        if self.size <= 2 * self._best_size and 2 * self.size <= self._limit:
            self._times = []
            self.size *= 2
            return
        self.size = self._best_size
        self._settle()

    def _room(self) -> int:
        """How many steps fit into four fifths of a GPU's free memory, as measured on one step."""
        used = torch.cuda.max_memory_allocated(self.device) - self._idle_bytes
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device)
        free -= torch.cuda.memory_allocated(self.device)
        return max(1, int(0.8 * free / max(1, used)))

    def halve(self) -> None:
        """Halve the size when memory ran out. Raises MemoryError if a single step does not fit."""
        if self.size == 1:
            raise MemoryError('out of memory for a single step')
        self.size //= 2
        if self._fixed is not None:
            self._fixed = self.size
        self._settle()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()

    def one_at_a_time(self) -> None:
        """Use a size of 1 from now on: the network cannot take several images together."""
        self.size, self.measuring, self.single = 1, False, True

    def _settle(self) -> None:
        self.measuring = False
        self._chosen[self._key] = self.size

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


def widest_type(device: torch.device) -> torch.dtype:
    """The widest floating type that a device has: MPS has no float64."""
    return torch.float32 if device.type == 'mps' else torch.float64


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far, in bytes: of tensors on a GPU, else of this process; None: unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024
