"""What times calls: CUDA events around a CUDA graph, or a clock where there is no GPU.

A benchmark captures its calls once and replays them, so that neither Python nor launching is part of what it measures;
on a CPU, capturing is remembering. Whatever is measured runs through :class:`Timer`, so that everything but the device
itself is tested without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Run = Callable[[], Any]


class Timer(Protocol):
    """Captures and times work on one device.

    Attributes:
        name: of what measures.
        device: where tensors of a measured call live.
        cache_bytes: last-level cache, which must be cold.
    """

    name: str
    device: torch.device
    cache_bytes: int

    def capture(self, run: Run) -> Run:
        """What replays all work that ``run`` starts; ``run`` is called a few times first."""

    def seconds(self, replay: Run, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` replays, one after the other."""

    def describe(self) -> dict[str, Any]:
        """The device and its clocks, for a report."""


WARM_CALLS = 3


class CpuTimer:
    """The process's clock."""

    name = "clock"
    device = torch.device("cpu")

    def __init__(self, cache_bytes: int = 1 << 20) -> None:
        self.cache_bytes = cache_bytes

    def capture(self, run: Run) -> Run:
        for _ in range(WARM_CALLS):
            run()
        return run

    def seconds(self, replay: Run, repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            replay()
            times.append(time.perf_counter() - start)
        return times

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu", "torch": torch.__version__, "timer": self.name}


class CudaTimer:
    """CUDA events around replays of a CUDA graph, on a stream of its own.

    Warm calls run on the stream that captures: what a backend allocates once per stream is there before the capture.

    Raises:
        RuntimeError: there is no GPU.
    """

    name = "cuda events, cuda graph"

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no NVIDIA GPU, or a build of torch without CUDA: nothing can be timed")
        self.device = torch.device("cuda", index)
        self._properties = torch.cuda.get_device_properties(index)
        self.cache_bytes = int(self._properties.L2_cache_size)
        self._stream = torch.cuda.Stream(self.device)

    def capture(self, run: Run) -> Run:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_CALLS):
                run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()

        def replay(kept: Run = run) -> None:  # the graph holds addresses in what the call keeps alive
            graph.replay()

        return replay

    def seconds(self, replay: Run, repeats: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        with torch.cuda.stream(self._stream):
            replay()
            for start, end in events:
                start.record()
                replay()
                end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "device": self._properties.name,
            "capability": self._properties.major * 10 + self._properties.minor,
            "multiprocessors": self._properties.multi_processor_count,
            "l2_bytes": self.cache_bytes,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "timer": self.name,
        }
        try:  # needs NVML's Python module
            found["sm_clock_mhz"] = torch.cuda.clock_rate(self.device)
        except (ModuleNotFoundError, RuntimeError) as error:
            found["sm_clock_mhz"] = None
            found["clock_unknown"] = str(error)
        return found
