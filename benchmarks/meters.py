# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Instruments of the benchmarks: seconds and bytes by stage of an update, and what they were measured on."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from flowbp.publishing.run_info import cpu_name

GIB = 2**30
STAGES = ("rollout", "decode", "reward", "sweep", "optimizer")


class Stages:
    """Splits one update into stages.

    Args:
        device: where the models are; on CUDA each mark waits for the device.
        take_peak: gives the largest number of bytes in use since it was last called, or `None`.

    Attributes:
        seconds: wall time by stage.
        cpu_seconds: CPU time of this process by stage.
        peaks: largest number of bytes by stage, empty without `take_peak`.
    """

    def __init__(self, device: torch.device, take_peak: Callable[[], int] | None = None) -> None:
        self._device = device
        self._take_peak = take_peak
        self.current: str | None = None
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.cpu_seconds = dict.fromkeys(STAGES, 0.0)
        self.peaks: dict[str, int] = {}

    def mark(self, stage: str | None) -> None:
        """The stage that runs ends here and `stage` begins; `None` ends the update."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now, cpu_now = time.perf_counter(), time.process_time()
        if self.current is not None:
            self.seconds[self.current] += now - self._start
            self.cpu_seconds[self.current] += cpu_now - self._cpu_start
        if self._take_peak is not None:
            peak = self._take_peak()
            if self.current is not None:
                self.peaks[self.current] = max(peak, self.peaks.get(self.current, 0))
        # The profiler sees the same boundaries.
        with record_function(f"flowbp stage {stage}"):
            self.current = stage
        self._start, self._cpu_start = time.perf_counter(), time.process_time()


class SavedBytes:
    """Counts the bytes that autograd keeps for backward, live, each storage once.

    What is kept inside `torch.utils.checkpoint` (`samples_per_decode`) is not seen here; the allocator sees it.

    Args:
        excluded: tensors that exist anyway (parameters, buffers, prompt embeddings).
    """

    def __init__(self, excluded: Iterable[torch.Tensor]) -> None:
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._users: dict[int, int] = {}
        self.live = 0
        self._peak = 0

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def take_peak(self) -> int:
        """Largest number of live bytes since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    def _pack(self, tensor: torch.Tensor) -> "_Saved":
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._excluded:
            return _Saved(self, tensor, None)
        users = self._users.get(key, 0)
        if not users:
            self.live += storage.nbytes()
            self._peak = max(self._peak, self.live)
        self._users[key] = users + 1
        return _Saved(self, tensor, key)

    def release(self, key: int, size: int) -> None:
        """One saved tensor of the storage `key` is gone."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


class _Saved:
    """What autograd keeps in a tensor's place; its end is the tensor's release."""

    __slots__ = ("tensor", "_counter", "_key")

    def __init__(self, counter: SavedBytes, tensor: torch.Tensor, key: int | None) -> None:
        self.tensor, self._counter, self._key = tensor, counter, key

    def __del__(self) -> None:
        if self._key is not None:
            self._counter.release(self._key, self.tensor.untyped_storage().nbytes())


def cpu_allocator_peaks(run: Callable[[], None]) -> dict[str, int]:
    """Largest number of bytes above the start that PyTorch's CPU allocator holds in each stage of `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return peaks_by_stage(events)


def peaks_by_stage(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Running sum of a profiler trace's memory events: its largest value between the marks of `Stages`."""
    relevant = [
        event
        for event in events
        if event.get("ph") in ("X", "i")
        and (event.get("name") == "[memory]" or str(event.get("name")).startswith("flowbp stage "))
    ]
    peaks: dict[str, int] = {}
    live, stage = 0, None
    for event in sorted(relevant, key=lambda event: float(event["ts"])):
        if event["name"] == "[memory]":
            # Type 0 is the CPU.
            if event["args"]["Device Type"] == 0:
                live += event["args"]["Bytes"]
        else:
            stage = event["name"].removeprefix("flowbp stage ")
        if stage in STAGES:
            peaks[stage] = max(peaks.get(stage, 0), live)
    return peaks


class CudaPeak:
    """Peak of `torch.cuda.max_memory_allocated` above what was allocated when this was made.

    Attributes:
        base: bytes that were allocated then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self.base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    def take_peak(self) -> int:
        """Largest number of bytes above the base since the last call."""
        peak = torch.cuda.max_memory_allocated(self._device) - self.base
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        # glibc's allocator decides how often large tensors cost page faults.
        "malloc_settings": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
