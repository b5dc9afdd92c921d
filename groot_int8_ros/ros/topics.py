"""Default names of topics.

Owns: names that the nodes and the reader of recordings have to agree on. Must not import rclpy.
"""

from __future__ import annotations

import re


def camera_name_in_topic(camera_key: str) -> str:
    """Return a camera's key as part of a topic; a key is any string, a topic is not."""
    return re.sub(r"[^A-Za-z0-9_/]", "_", camera_key)


def default_image_topic(camera_key: str, transport: str) -> str:
    """Return where a camera's images are looked for, relative to the node's namespace.

    Args:
        camera_key: The policy's name of the camera.
        transport: `raw` or `compressed`.
    """
    suffix = "/compressed" if transport == "compressed" else ""
    return f"cameras/{camera_name_in_topic(camera_key)}/image_raw{suffix}"
