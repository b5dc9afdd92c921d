"""A simulated six-joint arm at a table, in MuJoCo: the scene, the task and a scripted expert.

MuJoCo draws off screen through EGL, which Mesa's software renderer offers on a machine without a
GPU, or through OSMesa: `MUJOCO_GL=egl` or `MUJOCO_GL=osmesa`, EGL if the variable is not set.
"""

import os

# MuJoCo reads it when it is imported; its own default, GLFW, cannot draw without a display.
os.environ.setdefault("MUJOCO_GL", "egl")
