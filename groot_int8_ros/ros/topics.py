"""Default names of topics.

Owns: names that the nodes and the reader of recordings have to agree on. Must not import rclpy.
"""

from __future__ import annotations

import re


def default_image_topic(camera_key: str, transport: str) -> str:
    """Return where a camera's images are looked for, relative to the node's namespace.

    Args:
        camera_key: The policy's name of the camera.
        transport: `raw` or `compressed`.
    """
    # A key is any string; a topic is not.
    name = re.sub(r"[^A-Za-z0-9_/]", "_", camera_key)
    return f"cameras/{name}/image_raw" + ("/compressed" if transport == "compressed" else "")
