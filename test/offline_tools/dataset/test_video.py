"""Encoding: what it must not do to the process around it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Run in a process of its own: other threads of this one have their own reasons. SVT-AV1 does what
# is looked for only where it may, which is as root: elsewhere this shows nothing.
CODE = """
import ctypes, os, sys, threading
from pathlib import Path
import numpy as np
from offline_tools.dataset.video import write_rgb_frames

threads = Path("/proc/self/task")

def policies():
    return {os.sched_getscheduler(int(thread.name)) for thread in threads.iterdir()}

def frames():
    for _ in range(3):
        yield np.zeros((64, 64, 3), np.uint8)
        seen.add((len(list(threads.iterdir())) > 4, *policies()))

seen = set()
write_rgb_frames(Path(sys.argv[1]), frames(), 10.0, "libsvtav1")
assert seen == {(True, os.SCHED_OTHER)}, seen
assert policies() == {os.SCHED_OTHER}
# What the C library believes is what it tells those that start threads from here.
policy, priority = ctypes.c_int(), ctypes.c_int()
get = ctypes.CDLL(None).pthread_getschedparam
me = ctypes.c_ulong(threading.get_ident())
assert get(me, ctypes.byref(policy), ctypes.byref(priority)) == 0
assert policy.value == os.SCHED_OTHER, policy
"""


def test_encoding_starts_no_real_time_threads_and_leaves_none(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CODE, tmp_path / "video.mp4"], check=True)
