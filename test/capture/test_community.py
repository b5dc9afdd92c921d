"""The first port's files: what it would read, and what it would have written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from groot_int8_ros.capture.community import export_community, import_community
from groot_int8_ros.capture.sample import BackboneInputs, CaptureSample, DitInputs
from groot_int8_ros.capture.store import CaptureMeta, CaptureStore, CaptureWriter
from groot_int8_ros.errors import CaptureError, OutputError
from groot_int8_ros.policy.bundle import Manifest, open_bundle
from offline_tools import cli

from ..full_disk import file_size_limit

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return open_bundle(tiny_bundle, verify_hashes=False).manifest


def sample_for(manifest: Manifest, number: int, tokens: int) -> CaptureSample:
    """A sample with the shapes of the bundle's graphs."""
    random = np.random.RandomState(number)

    def normal(graph: str, name: str, *front: int) -> NDArray[np.float32]:
        widths = manifest.graphs[graph].inputs[name].shape[len(front) :]
        shape = (*front, *(axis for axis in widths if isinstance(axis, int)))
        return random.standard_normal(shape).astype(np.float32)

    steps = manifest.denoising_steps
    cameras = len(manifest.robot.cameras)
    return CaptureSample(
        instruction="pick",
        stamp_ns=number,
        source=f"sample {number}",
        backbone=BackboneInputs(
            random.randint(1, 99, tokens).astype(np.int64),
            np.ones(tokens, np.int64),
            normal("backbone", "pixel_values", cameras),
        ),
        dit=DitInputs(
            vl_embs=normal("dit", "vl_embs", 1, tokens)[0],
            image_mask=random.rand(tokens) > 0.5,
            backbone_attention_mask=np.ones(tokens, np.bool_),
            sa_embs=normal("dit", "sa_embs", steps, 1 + manifest.action_horizon),
            timestep=np.arange(steps) * (1000 // steps),
        ),
    )


@pytest.fixture
def store(manifest: Manifest, tmp_path: Path) -> CaptureStore:
    with CaptureWriter(tmp_path / "store", CaptureMeta.of_bundle(manifest, "test")) as writer:
        for number, tokens in enumerate((9, 12, 10)):
            writer.add(sample_for(manifest, number, tokens))
    return CaptureStore.open(tmp_path / "store")


def load(folder: Path) -> Arrays:
    with np.load(folder / "calib_data.npz") as archive:
        return {name: archive[name] for name in archive.files}


def test_backbone_export_is_what_the_first_ports_collector_saves(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "backbone", tmp_path / "out")
    arrays = load(tmp_path / "out")
    # Its recipe: pad at the end with zeros, then concatenate over the samples.
    samples = [sample.backbone for sample in store.samples()]
    expected = {
        name: np.concatenate(
            [np.pad(getattr(s, name), (0, 12 - len(getattr(s, name))))[None] for s in samples]
        )
        for name in ("input_ids", "attention_mask")
    }
    expected["pixel_values"] = np.concatenate([s.pixel_values for s in samples if s])
    assert list(arrays) == ["input_ids", "attention_mask", "pixel_values"]
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert list(metadata) == [
        "capture_target",
        "num_samples",
        "input_ids_shape",
        "attention_mask_shape",
        "pixel_values_shape",
        "padded_sequences",
    ]
    assert metadata["capture_target"] == "backbone"
    assert metadata["num_samples"] == 3
    assert metadata["pixel_values_shape"] == [
        3 * len(manifest.robot.cameras),
        *samples[0].pixel_values.shape[1:],  # type: ignore[union-attr]
    ]
    assert metadata["padded_sequences"] is True


def test_dit_export_has_a_row_for_each_denoising_step(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "dit", tmp_path / "out")
    arrays = load(tmp_path / "out")
    steps = manifest.denoising_steps
    assert list(arrays) == [
        "sa_embs",
        "vl_embs",
        "timestep",
        "image_mask",
        "backbone_attention_mask",
    ]
    second = [sample.dit for sample in store.samples()][1]
    assert second is not None
    for step in range(steps):
        row = steps + step
        np.testing.assert_array_equal(arrays["vl_embs"][row], second.vl_embs)
        np.testing.assert_array_equal(arrays["sa_embs"][row], second.sa_embs[step])
        assert arrays["timestep"][row] == second.timestep[step]
    # The first sample has 9 tokens: the rest is zero, and masked.
    assert not arrays["vl_embs"][0, 9:].any()
    assert not arrays["backbone_attention_mask"][0, 9:].any()
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata == {
        "capture_target": "dit",
        "num_samples": 3 * steps,
        "sa_embs_shape": list(arrays["sa_embs"].shape),
        "vl_embs_shape": list(arrays["vl_embs"].shape),
        "has_image_mask": True,
        "has_backbone_mask": True,
        "padded_sa_embs": False,
        "padded_vl_embs": True,
    }


@pytest.mark.parametrize("graph", ["backbone", "dit"])
def test_import_of_an_export_gives_the_same_feeds(
    store: CaptureStore, manifest: Manifest, tmp_path: Path, graph: str
) -> None:
    export_community(store, graph, tmp_path / "out")
    done = import_community(tmp_path / "out" / "calib_data.npz", manifest, tmp_path / "back")
    assert done.graph == graph
    assert done.left_over == 0
    done.store.check_bundle(manifest)
    for found, wanted in zip(done.store.feeds(graph), store.feeds(graph), strict=True):
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            assert array.dtype == wanted[name].dtype
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_vl_embs_of_an_import_are_stored_once_an_observation(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "dit", tmp_path / "out")
    done = import_community(tmp_path / "out" / "calib_data.npz", manifest, tmp_path / "back")
    assert len(done.store) == 3
    assert [s.dit.vl_embs.ndim for s in done.store.samples() if s.dit] == [2, 2, 2]


def write(folder: Path, arrays: Arrays) -> Path:
    folder.mkdir()
    np.savez(folder / "calib_data.npz", **arrays)  # type: ignore[arg-type]
    return folder / "calib_data.npz"


def refused(path: Path, manifest: Manifest, message: str) -> None:
    target = path.parent / "back"
    with pytest.raises(CaptureError, match=message):
        import_community(path, manifest, target)
    assert not target.exists(), "something half-imported was left behind"


def test_archive_without_a_key_is_refused_by_the_keys_name(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "dit", tmp_path / "out")
    arrays = load(tmp_path / "out")
    # The first port writes no masks where its model gave none.
    less = {n: a for n, a in arrays.items() if n not in ("image_mask", "timestep")}
    refused(write(tmp_path / "a", less), manifest, r"lacks timestep, image_mask.*again with them")
    refused(write(tmp_path / "b", {"weights": np.zeros(3)}), manifest, "lacks input_ids")
    refused(tmp_path / "nothing.npz", manifest, "there is no")


def test_archive_of_another_model_or_other_steps_is_refused(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "dit", tmp_path / "out")
    arrays = load(tmp_path / "out")
    narrow = arrays | {"vl_embs": arrays["vl_embs"][:, :, :-1]}
    refused(write(tmp_path / "a", narrow), manifest, r"vl_embs is .* but the bundle's dit takes")
    single = {name: array[::2] for name, array in arrays.items()}
    refused(write(tmp_path / "b", single), manifest, "1 denoising steps, but the bundle has 2")
    export_community(store, "backbone", tmp_path / "backbone")
    backbone = load(tmp_path / "backbone")
    odd = backbone | {"pixel_values": backbone["pixel_values"][:-1]}
    refused(write(tmp_path / "c", odd), manifest, "no whole number of cameras")
    (tmp_path / "c" / "metadata.json").write_text('{"capture_target": "dit"}')
    refused(tmp_path / "c" / "calib_data.npz", manifest, "do not belong together")


@pytest.mark.parametrize("graph", ["backbone", "dit"])
def test_archive_without_rows_is_said_to_hold_no_samples(
    store: CaptureStore, manifest: Manifest, tmp_path: Path, graph: str
) -> None:
    export_community(store, graph, tmp_path / "out")
    full = load(tmp_path / "out")
    empty = {name: array[:0] for name, array in full.items()}
    refused(write(tmp_path / "empty", empty), manifest, r"holds no samples \(0 rows\)")
    name, *_ = full
    damaged = empty | {name: full[name]}
    refused(write(tmp_path / "damaged", damaged), manifest, "its arrays have 0 and . rows")
    # Any number of such rows would fit into a file of any size.
    hollow = full | {name: full[name][:, :0]}
    refused(write(tmp_path / "hollow", hollow), manifest, "cannot be read")


def test_images_without_rows_are_damage_where_the_other_arrays_have_some(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "backbone", tmp_path / "out")
    arrays = load(tmp_path / "out")
    blind = arrays | {"pixel_values": arrays["pixel_values"][:0]}
    refused(write(tmp_path / "blind", blind), manifest, "its arrays have 0 and 3 rows")


def test_timesteps_that_the_bundle_does_not_run_are_refused_beside_its_own(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "dit", tmp_path / "out")
    arrays = load(tmp_path / "out")
    shifted = arrays | {"timestep": arrays["timestep"] + 1}
    both = "timesteps 1, 501, but the bundle's 2 denoising steps have 0, 500"
    refused(write(tmp_path / "shifted", shifted), manifest, f"observation 0 has the {both}")
    # Four steps of one observation are no two observations of two.
    finer = {name: array[[0, 1, 0, 1]] for name, array in arrays.items()}
    finer["timestep"] = np.array([0, 250, 500, 750])
    refused(write(tmp_path / "finer", finer), manifest, "timesteps 0, 250, but")


def test_rows_that_a_limit_cut_off_are_left_out_and_counted(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "dit", tmp_path / "out")
    cut = {name: array[:-1] for name, array in load(tmp_path / "out").items()}
    done = import_community(write(tmp_path / "cut", cut), manifest, tmp_path / "back")
    assert len(done.store) == 2
    assert done.left_over == 1


def test_damaged_archive_or_nan_is_refused_and_leaves_nothing(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    export_community(store, "dit", tmp_path / "out")
    arrays = load(tmp_path / "out")
    path = write(tmp_path / "damaged", arrays)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    refused(path, manifest, "cannot be read.*CRC|NaN")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "calib_data.npz").write_text("not a zip")
    refused(tmp_path / "text" / "calib_data.npz", manifest, "cannot be read")
    spoilt = arrays | {"sa_embs": arrays["sa_embs"].copy()}
    spoilt["sa_embs"][-1, 0, 0] = np.nan
    refused(write(tmp_path / "nan", spoilt), manifest, "observation 2: array dit/sa_embs")
    spoilt = arrays | {"vl_embs": arrays["vl_embs"].copy()}
    spoilt["vl_embs"][-manifest.denoising_steps :, 0, 0] = np.nan
    refused(write(tmp_path / "nan_embs", spoilt), manifest, "observation 2: array dit/vl_embs")
    objects = arrays | {"vl_embs": np.array([None] * len(arrays["vl_embs"]), dtype=object)}
    refused(write(tmp_path / "object", objects), manifest, "cannot be read")


def test_export_needs_the_tensors_and_an_empty_folder(
    store: CaptureStore, manifest: Manifest, tmp_path: Path
) -> None:
    with CaptureWriter(tmp_path / "bare", CaptureMeta.of_bundle(manifest, "test")) as writer:
        for sample in store.samples():
            writer.add(replace(sample, dit=None))
    with pytest.raises(CaptureError, match="lack the inputs of dit"):
        export_community(CaptureStore.open(tmp_path / "bare"), "dit", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        export_community(store, "dit", tmp_path / "full")


def test_disk_that_fills_up_leaves_no_half_of_an_export(
    store: CaptureStore, tmp_path: Path
) -> None:
    with file_size_limit(50_000), pytest.raises(OutputError, match=r"cannot write .*out"):
        export_community(store, "backbone", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_commands_exchange_and_report(
    store: CaptureStore,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*arguments: object) -> int:
        return cli.main(["calibration-data", *map(str, arguments)])

    out, back = tmp_path / "out", tmp_path / "back"
    assert command("export", store.folder, "--target", "dit", "--output", out) == 0
    archive = out / "calib_data.npz"
    assert command("import", archive, "--bundle", tiny_bundle, "--output", back) == 0
    assert "3 samples for dit" in capsys.readouterr().out
    assert command("report", back, "--bundle", tiny_bundle) == 0
    assert "THIN: the samples have no state" in capsys.readouterr().out
    report = json.loads((back / "coverage.json").read_text())
    assert "3 samples have no instruction on record" in report["thin"]
    assert command("report", tmp_path, "--bundle", tiny_bundle) == 2
