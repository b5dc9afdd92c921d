"""The trained policy that the package ships.

Owns: where it is. Must not import torch.
"""

from __future__ import annotations

from pathlib import Path

POLICY_FOLDER = Path(__file__).parent / "tabletop_policy"
