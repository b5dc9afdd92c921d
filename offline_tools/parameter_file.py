"""The nodes' YAML parameter files, read without ROS.

Owns: `read_parameter_file`. Must not import rclpy: what is read from a bag or looked at on a
machine without ROS takes its topics and joints from the same file as the nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from groot_int8_ros.errors import ConfigurationError
from groot_int8_ros.policy.files import read_yaml


def read_parameter_file(path: Path) -> dict[str, Any]:
    """Return the values of every node in a parameter file, by dotted name.

    Raises:
        ConfigurationError: The file is no parameter file.
    """
    values: dict[str, Any] = {}
    try:
        content = read_yaml(path)
        for node in content.values():
            _flatten(node["ros__parameters"], "", values)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is no ROS parameter file ({error!r}); name the YAML that the node is started "
            "with."
        ) from error
    return values


def _flatten(tree: dict[str, Any], prefix: str, into: dict[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}.", into)
        else:
            into[f"{prefix}{name}"] = value
