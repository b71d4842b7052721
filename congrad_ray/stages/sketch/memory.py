"""A token budget that fits the memory, found before the work begins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from congrad_ray.modeling.packing import PairTokens
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.sketch.capture import GradientCapture

# Of the memory that is free, how much a micro-batch may take: the rest is for everything else.
_SHARE = 0.8
_SAMPLE_SECONDS = 0.002


def fitting_token_budget(
    capture: GradientCapture,
    work: Callable[[PairTokens], object],
    max_tokens: int,
    max_length: int,
    free_bytes: int | None = None,
) -> int:
    """The largest budget, at most `max_tokens` padded tokens, whose micro-batches fit.

    `work` is done on made-up pairs whose rows have `max_length` tokens: first on the smallest micro-batch, whose
    peak memory foretells that of others, then on the budget found from it. `free_bytes` is what may be used; by
    default it is asked from the device, or on a CPU from the system.

    Raises ValueError, with the figures, if not even one pair of rows of `max_length` fits.
    """
    longest = 2 * max_length
    available = int(_SHARE * (free_memory(capture.model.device) if free_bytes is None else free_bytes))
    needed = _peak_bytes(capture, work, 1, max_length)
    if needed is None or needed > available:
        raise ValueError(
            f"one pair with rows of model.max_length = {max_length} tokens takes "
            f"{'more' if needed is None else f'{needed / 2**30:.2f} GiB'} beside the model, and "
            f"{available / 2**30:.2f} GiB may be used; lower model.max_length, set sketch.gradient_checkpointing: "
            "true, or give the replicas more memory"
        )
    pairs = min(max(1, max_tokens // longest), max(1, available // max(needed, 1)))
    while (
        pairs > 1 and capture.model.device.type == "cuda" and _peak_bytes(capture, work, pairs, max_length) is None
    ):
        pairs = pairs * 3 // 4
    return max_tokens if pairs >= max(1, max_tokens // longest) else pairs * longest


def _made_up_pairs(capture: GradientCapture, count: int, max_length: int) -> PairTokens:
    tokens = list(range(3, 3 + min(64, capture.model.get_input_embeddings().get_parameter("weight").shape[0] - 3)))
    row = (tokens * (max_length // len(tokens) + 1))[: max_length - 1]
    return capture.layout([TokenizedPair([tokens[0]], row, row[::-1])] * count)


def _peak_bytes(
    capture: GradientCapture, work: Callable[[PairTokens], object], pairs: int, max_length: int
) -> int | None:
    """How many bytes more than before are in use at the peak; None if there are not enough."""
    batch = _made_up_pairs(capture, pairs, max_length)
    if capture.model.device.type != "cuda":
        with PeakResidentMemory() as memory:
            work(batch)
        return memory.peak - memory.before
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        work(batch)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated() - before


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that its device, a GPU or the CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device; for a CPU, of the machine or the container (Linux; elsewhere no limit)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    information = Path("/proc/meminfo")
    if not information.exists():
        return 2**62  # nothing is known; nothing is refused
    values = dict(line.split(":", 1) for line in information.read_text().splitlines())
    free = int(values["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


class PeakResidentMemory:
    """The largest resident memory of this process within a `with` block, sampled every 2 ms (Linux)."""

    def __enter__(self) -> PeakResidentMemory:
        self.before = self.peak = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _resident_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, _resident_bytes())


def _resident_bytes() -> int:
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return 0
    return int(statistics.read_text().split()[1]) * 4096
