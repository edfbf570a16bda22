# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of the stages of an update."""

import sys
import time

import psutil
import torch


class StageMeter:
    """Seconds and peak memory by stage.

    Attributes:
        seconds: wall time by stage, the GPU's work included.
        peaks: largest number of allocated bytes on the GPU by stage; empty without CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._stage: str | None = None
        self._started = 0.0

    def mark(self, stage: str | None) -> None:
        """The current stage ends here and `stage` begins; `None` ends the update."""
        if stage == self._stage:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter()
        if self._stage is not None:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._started
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), peak)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stage, self._started = stage, now

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def table(self) -> str:
        """Seconds and peaks as text."""
        lines = [f"{'stage':<10} {'seconds':>9}   {'peak GiB':>8}"]
        for stage, seconds in self.seconds.items():
            peak = f"{self.peaks[stage] / 2**30:8.2f}" if stage in self.peaks else f"{'-':>8}"
            lines.append(f"{stage:<10} {seconds:9.2f}   {peak}")
        if self.peaks:
            lines.append(f"{'update':<10} {self.total:9.2f}   {max(self.peaks.values()) / 2**30:8.2f}")
        else:
            lines.append(f"{'update':<10} {self.total:9.2f}")
            peak = peak_resident_bytes() / 2**30
            lines.append(f"peak of the whole process, loading included: {peak:.2f} GiB")
        return "\n".join(lines)


def peak_resident_bytes() -> int:
    """The largest memory of this process so far; now, where the system does not tell the largest."""
    try:
        import resource
    except ImportError:
        memory = psutil.Process().memory_info()
        # Windows' name.
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
