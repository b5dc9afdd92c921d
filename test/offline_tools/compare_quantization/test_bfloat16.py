"""Hazard of the yardstick: a bfloat16 run that is not the one the reference would make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="bfloat16 runs in torch")
pytest.importorskip("transformers", reason="the model needs transformers")

from groot_int8_ros.policy.preprocess import ModelInputs
from offline_tools.compare_quantization.bfloat16 import bfloat16_actions


def test_our_bfloat16_costs_what_the_references_own_run_recorded(golden_dir: Path) -> None:
    recorded = json.loads((golden_dir / "yardsticks.json").read_text())["precision"]
    inputs, noises, floats, rows = [], [], [], []
    for index in range(3):
        with np.load(golden_dir / f"golden_obs{index}.npz") as arrays:
            inputs.append(
                ModelInputs(
                    pixel_values=arrays["pixel_values"],
                    input_ids=arrays["input_ids"],
                    attention_mask=arrays["attention_mask"],
                    state=arrays["normalized_state"][0],
                )
            )
            noises.append(arrays["noise"][0])
            floats.append(arrays["n4.action_pred"][0])
            rows.append(int(arrays["embodiment_id"][0]))
    found = bfloat16_actions(
        golden_dir / "checkpoint",
        golden_dir / "eagle_config.json",
        inputs,
        noises,
        embodiment_id=rows[0],
        denoising_steps=4,
    )
    for index, (one, exact) in enumerate(zip(found, floats, strict=True)):
        error = np.linalg.norm(one - exact) / np.linalg.norm(exact)
        # Another attention kernel rounds elsewhere; the size of the error is what is compared.
        assert error == pytest.approx(recorded[f"obs{index}.bf16"]["action_pred_rel"], rel=0.35)
