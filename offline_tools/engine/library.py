"""Which TensorRT is here, and where the versions differ.

Owns: `Library`, the one place that knows what changed between TensorRT 8.6, 10 and 11 and how
TensorRT-RTX differs. Must not import torch. What the Python module itself shows (an attribute that
is there or not) is asked of the module; what it does not show is decided by the version:

=====================  ============  =======================  ===========  ============
difference             8.6           10.0 to 10.x             11           TensorRT-RTX
=====================  ============  =======================  ===========  ============
explicit batch         a flag        always                   always       always
strong typing          not there     a flag                   a flag       a flag
FP16 and INT8 flags    yes           yes, where weakly typed  gone         not there
BF16                   not there     type, and a flag         type         type
precision constraints  yes           yes, where weakly typed  gone         not there
INT8 calibrators       yes           deprecated from 10.1     gone         not there
stored INT8 weights    not taken     taken                    taken        taken
progress monitor       not there     yes                      yes          yes
=====================  ============  =======================  ===========  ============

(The names were looked up in the Python bindings of 8.6.1, 10.0.1, 10.3.0, 10.14.1, 11.0.0 and
11.4.0 and in TensorRT-RTX 1.7.1; `docs/engines.md` says which of them ran.)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from groot_int8_ros.errors import EngineError

RTX = "tensorrt_rtx"

# Library -> what to install where it is missing.
_HOW_TO_INSTALL = {
    RTX: "pip install tensorrt-rtx-cu13 (Linux x86-64)",
    "tensorrt": "it comes with JetPack (package python3-libnvinfer; let the virtual environment "
    "see system packages), elsewhere as NVIDIA's wheel beside a GPU",
}
_STRONG_TYPING_SINCE = 10


@dataclass(frozen=True)
class Library:
    """One installed library of the TensorRT family.

    Attributes:
        name: As Python imports it.
        trt: The module.
        version: Its version.
    """

    name: str
    trt: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds without a GPU and not for a Jetson."""
        return self.name == RTX

    @property
    def strongly_typed(self) -> bool:
        """Whether a network can keep the types that its graph states."""
        return self.is_rtx or int(self.version.split(".")[0]) >= _STRONG_TYPING_SINCE

    @property
    def weakly_typed(self) -> bool:
        """Whether a builder can be allowed to choose a lower precision than the graph's."""
        return hasattr(self.trt.BuilderFlag, "FP16")

    @property
    def has_bfloat16(self) -> bool:
        """Whether there is a BF16: a type of strongly typed graphs, and a flag of weak ones."""
        return self.strongly_typed

    @property
    def stores_int8_weights(self) -> bool:
        """Whether an int8 initializer with a DequantizeLinear is taken as a weight.

        8.6 fails in `convertMyelinWeightsToFp32` and wants float weights with a Q→DQ pair.
        """
        return self.strongly_typed

    @property
    def has_calibrators(self) -> bool:
        """Whether `IInt8EntropyCalibrator2` is there."""
        return hasattr(self.trt, "IInt8EntropyCalibrator2")

    @property
    def has_progress_monitor(self) -> bool:
        """Whether a build reports its progress."""
        return hasattr(self.trt, "IProgressMonitor")

    def network_flags(self, *, strongly_typed: bool) -> int:
        """Return the flags of `create_network`."""
        flags = self.trt.NetworkDefinitionCreationFlag
        if strongly_typed:
            return 1 << int(flags.STRONGLY_TYPED)
        if not self.is_rtx and not self.strongly_typed:
            return 1 << int(flags.EXPLICIT_BATCH)
        return 0


def open_library(name: str) -> Library:
    """Import a library of the TensorRT family.

    Args:
        name: `tensorrt` or `tensorrt_rtx`.

    Raises:
        EngineError: It is not installed, or its shared libraries do not load.
    """
    try:
        trt = importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"{name} is not installed: {_HOW_TO_INSTALL[name]}") from error
    except OSError as error:
        raise EngineError(f"{name} is installed but does not load: {error}") from error
    return Library(name=name, trt=trt, version=str(trt.__version__))
