"""What a process holds over time: memory, threads, open files, processor time.

Owns: reading `/proc` of another process, and what a series of readings says. Must not import ROS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offline_tools.benchmark.memory import process_memory

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/<pid>/stat behind the command's name: utime, stime and the number of threads.
_USER, _SYSTEM, _THREADS = 11, 12, 17


@dataclass(frozen=True)
class Sample:
    """One reading.

    Attributes:
        time_s: Steady time.
        resident_bytes: `VmRSS`.
        threads: Of the process.
        files: Open file descriptors.
        processor_s: Time on all cores since the process began.
    """

    time_s: float
    resident_bytes: int
    threads: int
    files: int
    processor_s: float


@dataclass(frozen=True)
class Series:
    """What readings say, warm-up left out.

    Attributes:
        seconds: From the first reading to the last.
        first_bytes: Resident at the first.
        last_bytes: Resident at the last.
        most_bytes: The most.
        growth_bytes_per_h: Slope of the least-squares line through the resident bytes.
        threads: At the first reading and at the last.
        files: Likewise.
        cores: Mean use.
    """

    seconds: float
    first_bytes: int
    last_bytes: int
    most_bytes: int
    growth_bytes_per_h: float
    threads: tuple[int, int]
    files: tuple[int, int]
    cores: float


def read_sample(pid: int, time_s: float) -> Sample:
    """Read a process.

    Args:
        pid: Which; of the same user.
        time_s: Steady time, noted in the sample.

    Raises:
        OSError: There is no such process any more.
    """
    folder = Path(f"/proc/{pid}")
    # The name, in parentheses, may hold anything.
    fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return Sample(
        time_s=time_s,
        resident_bytes=process_memory("VmRSS", pid),
        threads=int(fields[_THREADS]),
        files=sum(1 for _ in (folder / "fd").iterdir()),
        processor_s=(int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS_PER_S,
    )


def series(samples: Sequence[Sample]) -> Series:
    """Return what readings say.

    Args:
        samples: At least two, in the order of their times.
    """
    first, last = samples[0], samples[-1]
    times_h = np.array([(sample.time_s - first.time_s) / 3600.0 for sample in samples])
    resident = np.array([sample.resident_bytes for sample in samples], np.float64)
    seconds = last.time_s - first.time_s
    return Series(
        seconds=seconds,
        first_bytes=first.resident_bytes,
        last_bytes=last.resident_bytes,
        most_bytes=int(resident.max()),
        growth_bytes_per_h=float(np.polyfit(times_h, resident, 1)[0]),
        threads=(first.threads, last.threads),
        files=(first.files, last.files),
        cores=(last.processor_s - first.processor_s) / seconds,
    )
