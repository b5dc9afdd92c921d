"""Where the simulated robot's configuration lies.

Owns: `config_file`. Must not import MuJoCo or ROS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from groot_int8_ros.errors import ConfigurationError

DESCRIPTION = "simulated_arm.yaml"
NODES = "simulated_arm_node.yaml"
STEPPED_NODES = "simulated_arm_stepped.yaml"


def config_file(name: str) -> Path:
    """Return a file of the package's folder `config`: of the source tree, or as it was installed.

    Raises:
        ConfigurationError: It is in none of these places.
    """
    prefixes = [*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep))]
    folders = [
        Path(__file__).parents[2] / "config",
        *(Path(prefix, "share", "groot_int8_ros", "config") for prefix in (*prefixes, sys.prefix)),
    ]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise ConfigurationError(
            f"config/{name} is missing; looked in {', '.join(map(str, folders))}. Install the "
            "package again, or run in its source tree."
        )
    return found
