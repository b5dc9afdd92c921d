"""Metadata of the package, for pip and for colcon's ament_python builds.

It works with the setuptools of the supported ROS distributions (59 and later), so the metadata is
here and not in pyproject.toml. Versions are lower bounds; requirements.lock has the exact set that
`make setup` installs.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "groot_int8_ros"

# The wheels of ROS 2 and of TensorRT-RTX exist for this platform only. Elsewhere ROS comes from
# the system and the check with TensorRT-RTX reports what is missing.
WHEELS = '; sys_platform == "linux" and platform_machine == "x86_64"'

# What a robot with ROS 2 needs. Image messages are converted by cv_bridge where the system has it,
# else by rosbags-image, which the extra `ros` brings.
CORE = [
    "numpy>=1.26",
    "onnxruntime>=1.18",
    "opencv-python-headless>=4.8",
    "pillow>=10.0",
    "pyyaml>=6.0",
    "tokenizers>=0.19",
]

EXTRAS = {
    # ROS 2 itself from wheels, for a machine without a system installation of ROS.
    "ros": [
        f"ros-rclpy[fastrtps]>=7.1.6{WHEELS}",
        f"ros-ament-index-python{WHEELS}",
        f"ros-builtin-interfaces{WHEELS}",
        f"ros-diagnostic-msgs{WHEELS}",
        f"ros-geometry-msgs{WHEELS}",
        f"ros-lifecycle-msgs{WHEELS}",
        f"ros-rcl-interfaces{WHEELS}",
        f"ros-rosgraph-msgs{WHEELS}",
        f"ros-sensor-msgs{WHEELS}",
        f"ros-std-msgs{WHEELS}",
        f"ros-std-srvs{WHEELS}",
        f"ros-trajectory-msgs{WHEELS}",
        "rosbags>=0.11.9",
        "rosbags-image>=0.10",
    ],
    # The workstation side: checkpoint to bundle, episodes to bags.
    "offline": [
        "av>=14",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "onnx>=1.19",
        "onnx-ir>=0.1.12",
        "onnxscript>=0.5.6",
        "pyarrow>=15",
        "rosbags>=0.11.9",
        "rosbags-image>=0.10",
        "safetensors>=0.4.3",
        "tqdm>=4.60",
        "torch==2.13.0",
        "transformers>=5.0",
    ],
    # The simulated robot. Drawing without a display needs a library of the system too: libegl1 and
    # libgl1-mesa-dri (apt), or libosmesa6; `make setup` looks for them. The releases after 3.8
    # bring viewers four times the simulator's size, and 4 wants Python 3.11.
    "sim": ["mujoco>=3.3,<3.9"],
    # Building, auditing and running TensorRT engines. TensorRT itself comes with JetPack, or as
    # NVIDIA's wheel; CUDA 12 (JetPack 6) wants 'cuda-python<13'.
    "tensorrt": [
        "cuda-python>=12.4",
        "onnx>=1.19",
        "onnx-ir>=0.1.12",
        "tqdm>=4.60",
    ],
    # A parser and builder of the TensorRT family that needs no GPU.
    "rtx": [f"tensorrt-rtx-cu13==1.7.1.116{WHEELS}"],
    # NVIDIA's own quantiser, to be compared with. Its extra `onnx` would put an ONNX Runtime with
    # CUDA in the place of ours; these are what its CPU path imports.
    "compare": [
        "lief>=0.16",
        "nvidia-modelopt==0.47.0",
        "onnx-graphsurgeon>=0.6.1",
        "onnxslim>=0.1.76",
    ],
    "dev": [
        "colcon-bash",
        "colcon-ros",
        "hypothesis>=6.100",
        "mypy>=1.15",
        "pre-commit>=3.7",
        "pytest>=8.2",
        "pytest-timeout>=2.3",
        "ruff>=0.12",
        "setuptools>=61",
        "types-PyYAML",
        "types-setuptools",
        "uv",
    ],
}


def version() -> str:
    """Return the version, read without importing the package and what it needs."""
    text = Path(PACKAGE, "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise SystemExit(f"{PACKAGE}/__init__.py defines no __version__")
    return match.group(1)


def files(folder: str, pattern: str) -> list[str]:
    """Return the matching files as data_files wants them: relative, in a stable order."""
    return sorted(map(str, Path(folder).glob(pattern)))


setup(
    name=PACKAGE,
    version=version(),
    description="A fine-tuned GR00T N1.6 policy on a robot with ROS 2, through ONNX and TensorRT.",
    author="The groot_int8_ros authors",
    maintainer="The groot_int8_ros authors",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[f"{PACKAGE}*", "offline_tools*"]),
    package_data={
        PACKAGE: ["py.typed"],
        "offline_tools.cost": ["published_latencies.csv"],
        "offline_tools.demo": ["page.html.j2"],
        "offline_tools.training": ["tabletop_policy/*"],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        (f"share/{PACKAGE}/launch", files("launch", "*.py")),
        (f"share/{PACKAGE}/config", files("config", "*.yaml")),
        (f"share/{PACKAGE}/config/sros2", files("config/sros2", "*.xml")),
    ],
    zip_safe=False,
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "groot-int8 = offline_tools.cli:main",
            f"policy_node = {PACKAGE}.policy_node:main",
            f"calibration_recorder_node = {PACKAGE}.calibration_recorder_node:main",
            f"chunk_executor_node = {PACKAGE}.chunk_executor_node:main",
        ],
    },
)
