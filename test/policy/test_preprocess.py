"""Hazards between camera, joints and instruction and the network's inputs."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from groot_int8_ros.errors import ObservationError, ProcessorError
from groot_int8_ros.policy.image_sizes import image_sizes
from groot_int8_ros.policy.preprocess import (
    MAX_INSTRUCTION_CHARACTERS,
    Preprocessor,
    PromptTokenizer,
    evaluation_image,
    formalize,
    network_image,
    normalize_state,
    pixel_values,
    prompt_text,
)
from groot_int8_ros.policy.processor import (
    ActionKey,
    ImageChain,
    Processor,
    StateKey,
    load_processor,
    parse_processor,
)
from groot_int8_ros.policy.types import CameraSpec, Observation

CHAIN = ImageChain(256, 0.95)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>", "<|endoftext|>")
UInt8 = np.ndarray[Any, np.dtype[np.uint8]]


def _array(*values: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


def _processor(
    *state_keys: StateKey,
    cameras: tuple[str, ...] = ("front", "wrist"),
    formalize_language: bool = True,
    clip_outliers: bool = True,
) -> Processor:
    return Processor(
        embodiment_tag="new_embodiment",
        embodiment_id=10,
        cameras=cameras,
        state_keys=state_keys
        or (StateKey("arm", 2, "min_max", low=_array(0, 0), high=_array(4, 8)),),
        action_keys=(ActionKey("arm", 1, "min_max", "absolute", low=_array(0), high=_array(1)),),
        delta_indices=(0,),
        max_state_dim=8,
        max_action_dim=8,
        max_action_horizon=4,
        image_chain=CHAIN,
        formalize_language=formalize_language,
        clip_outliers=clip_outliers,
    )


def _byte_tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """A real byte-level BPE tokenizer without merges: one token a byte, plus special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def _frame(height: int, width: int, seed: int = 0) -> UInt8:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _bicubic_rows(image: UInt8, size: int) -> UInt8:
    """Pillow's antialiased bicubic along axis 0 with its 22-bit coefficients, written anew."""
    old = image.shape[0]
    if old == size:
        return image
    scale = old / size
    stretch = max(scale, 1.0)

    def cubic(x: float) -> float:
        x = abs(x)
        if x < 1.0:
            return (1.5 * x - 2.5) * x * x + 1.0
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 if x < 2.0 else 0.0

    out = np.empty((size, *image.shape[1:]), np.uint8)
    for row in range(size):
        centre = (row + 0.5) * scale
        first = max(0, math.floor(centre - 2.0 * stretch + 0.5))
        last = min(old, math.floor(centre + 2.0 * stretch + 0.5))
        weights = [cubic((i - centre + 0.5) / stretch) for i in range(first, last)]
        fixed = [w / sum(weights) * 2**22 for w in weights]
        whole = np.array([math.trunc(w + math.copysign(0.5, w)) for w in fixed], np.int64)
        total = np.tensordot(whole, image[first:last].astype(np.int64), axes=1) + 2**21
        out[row] = np.clip(total >> 22, 0, 255)
    return out


# Images


@pytest.mark.parametrize(
    "size", [(256, 333), (256, 340), (340, 256), (256, 256), (256, 455), (56, 60)]
)
def test_network_resize_takes_width_first_whatever_the_pillow_version(
    size: tuple[int, int],
) -> None:
    # 256x333 to 252x336 is where Pillow 13 alone would take the height first.
    image = _frame(*size)
    height, width = (round(side / 28) * 28 for side in size)
    columns_first = _bicubic_rows(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    assert np.array_equal(network_image(image), _bicubic_rows(columns_first, height))


def test_image_values_do_not_depend_on_strides_or_write_protection() -> None:
    frame = _frame(120, 160)
    expected = pixel_values([frame], CHAIN)
    flipped_twice = np.ascontiguousarray(frame[..., ::-1])[..., ::-1]
    fortran = np.asfortranarray(frame)
    padded = np.zeros((120, 200, 3), np.uint8)
    padded[:, :160] = frame
    locked = np.frombuffer(frame.tobytes(), np.uint8).reshape(frame.shape)
    for variant in (flipped_twice, fortran, padded[:, :160], locked):
        assert np.array_equal(pixel_values([variant], CHAIN), expected)


@pytest.fixture
def opencv_threads() -> Iterator[None]:
    before = cv2.getNumThreads()
    yield
    cv2.setNumThreads(before)


@pytest.mark.usefixtures("opencv_threads")
@pytest.mark.parametrize("size", [(480, 640), (120, 160), (720, 1280)])
def test_image_values_do_not_depend_on_opencv_threads(size: tuple[int, int]) -> None:
    frame = _frame(*size)
    cv2.setNumThreads(1)
    one = evaluation_image(frame, CHAIN)
    cv2.setNumThreads(4)
    assert np.array_equal(evaluation_image(frame, CHAIN), one)


def test_image_chain_leaves_the_camera_s_frame_untouched() -> None:
    # A square of the final size with no crop passes through without any resize: no copy there.
    frame = _frame(252, 252)
    before = frame.copy()
    values = pixel_values([frame], ImageChain(252, 1.0))
    values[...] = 0
    assert np.array_equal(frame, before)


def test_pixel_values_span_minus_one_to_one_in_rgb_order() -> None:
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[..., 0], frame[..., 2] = 255, 51
    values = pixel_values([frame, frame[:, :, ::-1]], CHAIN)
    assert values.dtype == np.float32
    assert values.shape == (2, 3, 252, 336)
    assert np.unique(values[0, 0]).tolist() == [1.0]
    assert np.unique(values[0, 1]).tolist() == [-1.0]
    assert np.allclose(values[1, 0], 51 / 127.5 - 1)


@pytest.mark.parametrize("size", [(10, 3000), (1, 1000), (3000, 10)])
def test_frames_beyond_the_eagle_limits_are_refused_before_any_work(
    size: tuple[int, int],
) -> None:
    with pytest.raises(ProcessorError, match=f"{size[0]}x{size[1]}"):
        evaluation_image(np.zeros((*size, 3), np.uint8), CHAIN)


def test_shrinking_averages_every_pixel_instead_of_sampling_some() -> None:
    frame = _frame(768, 768)
    means = frame.reshape(256, 3, 256, 3, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.array_equal(evaluation_image(frame, ImageChain(256, 1.0)), np.rint(means))


def test_a_stripe_narrower_than_eagle_allows_is_refused() -> None:
    with pytest.raises(ProcessorError, match="aspect ratio 200"):
        image_sizes(100, 20_100, ImageChain(30, 1.0))


def test_a_network_image_too_small_for_eagle_is_refused() -> None:
    with pytest.raises(ProcessorError, match="28x28"):
        image_sizes(480, 480, ImageChain(28, 1.0))
    with pytest.raises(ProcessorError, match="no pixels"):
        image_sizes(0, 640, CHAIN)


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    edge=st.integers(1, 1200),
    fraction=st.floats(0.05, 1.0),
)
def test_any_frame_size_gives_whole_tokens_or_a_clear_refusal(
    height: int, width: int, edge: int, fraction: float
) -> None:
    try:
        sizes = image_sizes(height, width, ImageChain(edge, fraction))
    except ProcessorError:
        return
    assert sizes.network[0] % 28 == sizes.network[1] % 28 == 0
    assert sizes.tokens * 784 == sizes.network[0] * sizes.network[1]
    assert min(sizes.evaluation) == edge


@pytest.mark.parametrize("size", [(37, 61), (480, 640), (1080, 1920), (256, 256), (255, 300)])
def test_predicted_sizes_are_those_of_the_images(size: tuple[int, int]) -> None:
    sizes = image_sizes(*size, CHAIN)
    evaluation = evaluation_image(_frame(*size), CHAIN)
    assert evaluation.shape == (*sizes.evaluation, 3)
    assert network_image(evaluation).shape == (*sizes.network, 3)


def test_frame_sizes_after_each_stage_equal_the_public_code(golden_dir: Path) -> None:
    entries = json.loads((golden_dir / "image_sizes.json").read_text())
    assert len(entries) == 19
    for entry in entries:
        height, width = entry["input"]
        sizes = image_sizes(height, width, CHAIN)
        assert [
            list(sizes.resized),
            list(sizes.cropped),
            list(sizes.evaluation),
            list(sizes.network),
            sizes.tokens,
        ] == [
            entry["after_first_resize"],
            entry["after_crop"],
            entry["eval_size"],
            entry["final"],
            entry["tokens"],
        ]


def _assert_same_image(found: UInt8, expected: UInt8) -> None:
    # Identical with the OpenCV builds at hand; other builds may round a few pixels otherwise.
    assert found.shape == expected.shape
    difference = np.abs(found.astype(np.int16) - expected.astype(np.int16))
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.999


def _levels(values: np.ndarray[Any, np.dtype[np.float32]]) -> UInt8:
    return np.round(127.5 * values + 127.5).astype(np.uint8)


@pytest.mark.parametrize("size", ["240x320", "480x640", "720x1280", "360x640", "600x800"])
def test_image_chain_equals_the_public_code(golden_dir: Path, size: str) -> None:
    with np.load(golden_dir / "golden_preprocess.npz") as golden:
        raw, expected = golden[f"raw_{size}"], golden[f"pixel_values_{size}"]
        _assert_same_image(evaluation_image(raw, CHAIN), golden[f"eval_{size}"])
        values = pixel_values([raw], CHAIN)[0]
        _assert_same_image(_levels(values), _levels(expected))
        same = _levels(values) == _levels(expected)
        assert np.array_equal(values[same], expected[same])


# Prompt


def test_instruction_is_reduced_to_what_training_saw() -> None:
    assert formalize("Pick up the RED cube!") == "pick up the red cube"
    assert formalize("  keep\tspaces_and 3.5 ") == "  keep\tspaces_and 35 "
    assert formalize("caf\u00e9 cafe\u0301") == "caf\u00e9 cafe"


def test_prompt_puts_text_before_images_and_numbers_them_from_one() -> None:
    text = prompt_text("Go!", (1, 2), True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\ngo"
        "<image 1><img><IMG_CONTEXT></img><image 2><img><IMG_CONTEXT><IMG_CONTEXT></img>"
        "<|im_end|>\n"
    )
    assert "\nGo!<image 1>" in prompt_text("Go!", (1,), False)


@pytest.mark.parametrize("missing", SPECIAL)
def test_a_tokenizer_without_a_special_token_is_refused(missing: str) -> None:
    with pytest.raises(ProcessorError, match=missing.replace("|", r"\|")):
        PromptTokenizer(_byte_tokenizer(tuple(t for t in SPECIAL if t != missing)))


def test_a_damaged_or_missing_tokenizer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ProcessorError, match="is missing"):
        PromptTokenizer.from_file(path)
    path.write_text(_byte_tokenizer().to_str()[:-40])
    with pytest.raises(ProcessorError, match="is not a tokenizer"):
        PromptTokenizer.from_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProcessorError, match="is not a tokenizer"):
        PromptTokenizer.from_file(path)
    # Its library panics on a prefix longer than the word that it is to be cut from.
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    model["continuing_subword_prefix"] = "longer than b"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ProcessorError, match="is not a tokenizer"):
        PromptTokenizer.from_file(path)


def test_saved_truncation_and_padding_cannot_cut_off_the_images(tmp_path: Path) -> None:
    plain, saved = _byte_tokenizer(), _byte_tokenizer()
    saved.enable_truncation(10)
    saved.enable_padding(length=500)
    path = tmp_path / "tokenizer.json"
    saved.save(str(path))
    ids, mask = PromptTokenizer.from_file(path).encode("go", (4, 4), formalize=True)
    expected, _ = PromptTokenizer(plain).encode("go", (4, 4), formalize=True)
    assert np.array_equal(ids, expected)
    assert ids.shape == mask.shape
    assert ids.dtype == mask.dtype == np.int64
    assert mask.all()


def _released(path: Path) -> PromptTokenizer:
    _byte_tokenizer().save(str(path))
    tokenizer = PromptTokenizer.from_file(path)
    tokenizer.encode("go", (4,), formalize=True)
    tokenizer.release()
    return tokenizer


def test_a_released_tokenizer_still_knows_its_prompts_and_reads_its_file_for_others(
    tmp_path: Path,
) -> None:
    path, whole = tmp_path / "tokenizer.json", PromptTokenizer(_byte_tokenizer())
    tokenizer = _released(path)
    hidden = path.rename(tmp_path / "hidden")
    for spelled in ("go", "Go!"):
        found, _ = tokenizer.encode(spelled, (4,), formalize=True)
        np.testing.assert_array_equal(found, whole.encode("go", (4,), formalize=True)[0])
        found[...] = 0
    # Not an error of the file's kind: the node has to live on without this one instruction.
    with pytest.raises(ObservationError, match=r"is new, .*tokenizer\.json is missing"):
        tokenizer.encode("stop", (4,), formalize=True)
    hidden.rename(path)
    expected, _ = whole.encode("stop", (4,), formalize=True)
    np.testing.assert_array_equal(tokenizer.encode("stop", (4,), formalize=True)[0], expected)
    # It was let go again, and what it found is known.
    path.unlink()
    np.testing.assert_array_equal(tokenizer.encode("stop", (4,), formalize=True)[0], expected)
    with pytest.raises(ObservationError, match="is missing"):
        tokenizer.encode("wait", (4,), formalize=True)


def test_a_tokenizer_changed_after_its_release_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = _released(path)
    _byte_tokenizer(tuple(reversed(SPECIAL))).save(str(path))
    with pytest.raises(ObservationError, match="was changed since the policy was loaded"):
        tokenizer.encode("stop", (4,), formalize=True)


_RESIDENT_MB = """
import sys
from pathlib import Path
from groot_int8_ros.policy.preprocess import PromptTokenizer

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3)

resident()
tokenizer = PromptTokenizer.from_file(Path(sys.argv[1]))
tokenizer.encode("go", (4,), formalize=True)
resident()
for text in ("go", "stop"):
    tokenizer.release()
    tokenizer.encode(text, (4,), formalize=True)
    resident()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is glibc's to return")
def test_a_released_tokenizer_of_true_size_leaves_no_memory_behind(golden_dir: Path) -> None:
    path = golden_dir / "tokenizer" / "tokenizer.json"
    command = [sys.executable, "-c", _RESIDENT_MB, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, held, *released = (float(line) for line in done.stdout.split())
    assert held - before > 60
    # First known, then new, for which the file is read once more.
    assert max(released) - before < 20


def test_token_ids_are_those_of_the_tokenizer_at_hand() -> None:
    reordered = _byte_tokenizer(tuple(reversed(SPECIAL)))
    tokenizer = PromptTokenizer(reordered)
    ids, _ = tokenizer.encode("go", (5,), formalize=True)
    assert (ids == tokenizer.image_token_id).sum() == 5
    assert reordered.id_to_token(tokenizer.image_token_id) == "<IMG_CONTEXT>"
    assert reordered.id_to_token(tokenizer.pad_token_id) == "<|endoftext|>"


@pytest.mark.parametrize("instruction", ["", "  \n", "!?", "\u200b"])
def test_an_empty_task_is_refused_before_the_robot_acts_without_one(instruction: str) -> None:
    with pytest.raises(ObservationError, match="is empty"):
        PromptTokenizer(_byte_tokenizer()).encode(instruction, (1,), formalize=True)


def test_an_endless_instruction_is_refused() -> None:
    tokenizer = PromptTokenizer(_byte_tokenizer())
    tokenizer.encode("a" * MAX_INSTRUCTION_CHARACTERS, (1,), formalize=True)
    with pytest.raises(ObservationError, match="1001 characters"):
        tokenizer.encode("a" * (MAX_INSTRUCTION_CHARACTERS + 1), (1,), formalize=True)


def test_half_a_surrogate_pair_is_refused_not_raised_by_the_tokenizer() -> None:
    tokenizer = PromptTokenizer(_byte_tokenizer())
    with pytest.raises(ObservationError, match="character 3"):
        tokenizer.encode("go \ud800", (1,), formalize=False)
    tokenizer.encode("go \ud800", (1,), formalize=True)


@pytest.mark.parametrize("text", [*SPECIAL, "<image-1>", "<video-2>", "<|im_end|><|im_start|>"])
def test_a_raw_instruction_cannot_spell_the_prompt_s_own_tokens(text: str) -> None:
    tokenizer = PromptTokenizer(_byte_tokenizer())
    with pytest.raises(ObservationError, match="special text"):
        tokenizer.encode(f"go {text} now", (2,), formalize=False)
    tokenizer.encode(f"go {text} now", (2,), formalize=True)


@settings(deadline=None, max_examples=300)
@given(
    instruction=st.lists(
        st.text(max_size=5) | st.sampled_from([*SPECIAL, "<image-1>", "<", "|>", "im_end"]),
        max_size=6,
    ).map("".join),
    formalized=st.booleans(),
)
def test_no_instruction_changes_the_number_or_order_of_image_tokens(
    instruction: str, formalized: bool
) -> None:
    tokenizer = PromptTokenizer(_byte_tokenizer())
    try:
        ids, _ = tokenizer.encode(instruction, (3, 2), formalize=formalized)
    except ObservationError:
        assert not formalized or not formalize(instruction).strip()
        return
    is_image = (ids[0] == tokenizer.image_token_id).astype(int)
    runs = np.flatnonzero(np.diff(is_image, prepend=0, append=0)).reshape(-1, 2)
    assert (runs[:, 1] - runs[:, 0]).tolist() == [3, 2]


@pytest.fixture(scope="module")
def golden_tokenizer(golden_dir: Path) -> PromptTokenizer:
    # One recorded instruction has 7469 characters.
    return PromptTokenizer.from_file(
        golden_dir / "tokenizer" / "tokenizer.json", max_instruction_characters=10_000
    )


def test_token_ids_equal_the_public_code_for_every_recorded_instruction(
    golden_dir: Path, golden_tokenizer: PromptTokenizer
) -> None:
    items = json.loads((golden_dir / "golden_tokenizer.json").read_text())["items"]
    with np.load(golden_dir / "golden_tokenizer.npz") as golden:
        ids, offsets = golden["ids"], golden["offsets"]
    assert len(items) * 3 == len(offsets) - 1 == 90
    for item in items:
        assert formalize(item["instruction"]) == item["formalized"]
        for column, images in enumerate((1, 2, 4)):
            entry = 3 * item["index"] + column
            expected = ids[offsets[entry] : offsets[entry + 1]]
            prompt = prompt_text(item["instruction"], (108,) * images, True)
            assert np.array_equal(golden_tokenizer.encode_prompt(prompt)[0], expected)
            if item["formalized"].strip():
                found, mask = golden_tokenizer.encode(
                    item["instruction"], (108,) * images, formalize=True
                )
                assert np.array_equal(found[0], expected)
                assert mask.shape == found.shape
    assert golden_tokenizer.image_token_id == 151669
    assert golden_tokenizer.pad_token_id == 151643


# State


def test_bounded_state_maps_its_range_to_minus_one_and_one_and_clips() -> None:
    state = {"arm": np.array([0, 16], np.float32)}
    assert normalize_state(_processor(), state).tolist() == [[-1, 1, 0, 0, 0, 0, 0, 0]]
    raw = normalize_state(_processor(clip_outliers=False), state)
    assert raw.dtype == np.float32
    assert raw[0, :2].tolist() == [-1, 3]


def test_constant_joints_and_zero_deviations_do_not_divide_by_zero() -> None:
    keys = (
        StateKey("lock", 2, "min_max", low=_array(5, 0), high=_array(5.00001, 1)),
        StateKey("vel", 2, "mean_std", mean=_array(1, 1), std=_array(0, 2)),
    )
    state = {"lock": np.array([9, 1], np.float32), "vel": np.array([7, 7], np.float32)}
    assert normalize_state(_processor(*keys), state)[0, :4].tolist() == [0, 1, 7, 3]


def test_sines_come_before_cosines_and_take_twice_the_room() -> None:
    keys = (
        StateKey("angle", 2, "sin_cos"),
        StateKey("arm", 1, "min_max", low=_array(0), high=_array(2)),
    )
    state = {"angle": np.array([0, np.pi / 2], np.float32), "arm": np.array([2], np.float32)}
    found = normalize_state(_processor(*keys), state)[0]
    assert np.allclose(found, [0, 1, 1, 0, 1, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no state 'arm'"),
        ({"arm": np.zeros(3, np.float32)}, r"'arm' has shape \(3,\).*\(2,\)"),
        ({"arm": np.zeros((1, 2), np.float32)}, r"shape \(1, 2\)"),
        ({"arm": np.array([0, np.nan], np.float32)}, "'arm' is nan at joint index 1"),
        ({"arm": np.array([-np.inf, 0], np.float32)}, "'arm' is -inf at joint index 0"),
        ({"arm": np.array([0, 1e300])}, "joint index 1"),
        ({"arm": np.array(["a", "b"])}, "instead of numbers"),
    ],
)
def test_unusable_state_is_refused_with_key_and_joint(
    state: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ObservationError, match=message):
        normalize_state(_processor(), state)


@pytest.mark.parametrize("encoding", ["min_max", "mean_std"])
def test_a_state_that_overflows_when_scaled_is_refused(encoding: str) -> None:
    tiny = _array(1e-5)
    key = (
        StateKey("arm", 1, "min_max", low=_array(0), high=tiny)
        if encoding == "min_max"
        else StateKey("arm", 1, "mean_std", mean=_array(0), std=tiny)
    )
    with pytest.raises(ObservationError, match=r"'arm' at joint index 0.*overflows"):
        normalize_state(
            _processor(key, clip_outliers=False), {"arm": np.array([3e38], np.float32)}
        )


@pytest.mark.parametrize("percentiles", [0, 1])
@pytest.mark.parametrize("plain", [False, True])
def test_every_state_encoding_equals_the_public_code(
    golden_dir: Path, percentiles: int, plain: bool
) -> None:
    content = json.loads((golden_dir / "golden_norm.json").read_text())
    modalities = content["modality_config"] | {
        "video": {"delta_indices": [0], "modality_keys": ["front"]}
    }
    config = {
        "processor_kwargs": {
            "modality_configs": {"new_embodiment": modalities},
            "use_albumentations": True,
            "use_relative_action": True,
            "use_percentiles": bool(percentiles),
            "clip_outliers": not plain,
            "apply_sincos_state_encoding": not plain,
        }
    }
    processor = parse_processor(config, content["statistics"], None, None)
    variant = f"percentiles{percentiles}{'.noclip_nosincos' if plain else ''}"
    with np.load(golden_dir / "golden_norm.npz") as golden:
        state = {key.key: golden[f"in.state.{key.key}"][0] for key in processor.state_keys}
        found = normalize_state(processor, state)[0]
        start = 0
        for key in processor.state_keys:
            expected = golden[f"{variant}.state.{key.key}"][0]
            values = found[start : start + key.encoded_dim]
            start += key.encoded_dim
            if key.encoding == "sin_cos":
                # NumPy's float32 sine differs between processors by its last bit.
                np.testing.assert_array_max_ulp(values, expected, maxulp=2)
            else:
                assert np.array_equal(values, expected)
        assert not found[start:].any()


# The whole observation

CAMERAS = (CameraSpec("front", 120, 160), CameraSpec("wrist", 240, 320))


def _preprocessor(**changes: Any) -> Preprocessor:
    return Preprocessor(_processor(**changes), PromptTokenizer(_byte_tokenizer()), CAMERAS)


def _observation(**changes: Any) -> Observation:
    values: dict[str, Any] = {
        "images": {"wrist": _frame(240, 320, 1), "front": _frame(120, 160, 0)},
        "state": {"arm": np.array([1, 2], np.float32)},
        "instruction": "Go!",
    }
    return Observation(**{**values, **changes})


def test_cameras_follow_the_checkpoint_s_order_not_the_observation_s() -> None:
    preprocessor = Preprocessor(
        _processor(), PromptTokenizer(_byte_tokenizer()), tuple(reversed(CAMERAS))
    )
    observation = _observation()
    inputs = preprocessor(observation)
    expected = pixel_values([observation.images["front"], observation.images["wrist"]], CHAIN)
    assert np.array_equal(inputs.pixel_values, expected)
    assert preprocessor.tokens_per_image == (108, 108)
    assert preprocessor.image_shape == (252, 336)
    assert inputs.state.shape == (1, 8)


def test_a_caller_that_writes_into_the_inputs_cannot_poison_the_next_ones() -> None:
    preprocessor = _preprocessor()
    first = preprocessor(_observation())
    kept = first.input_ids.copy()
    first.input_ids[...] = 0
    first.attention_mask[...] = 0
    second = preprocessor(_observation())
    assert np.array_equal(second.input_ids, kept)
    assert second.attention_mask.all()


def test_each_instruction_keeps_its_own_tokens() -> None:
    preprocessor = _preprocessor()
    tokenizer = PromptTokenizer(_byte_tokenizer())
    for instruction in ("go", "stop", "go"):
        found = preprocessor(_observation(instruction=instruction)).input_ids
        expected, _ = tokenizer.encode(instruction, (108, 108), formalize=True)
        assert np.array_equal(found, expected)


def test_the_processor_decides_whether_instructions_are_formalized() -> None:
    raw = _preprocessor(formalize_language=False)
    expected, _ = PromptTokenizer(_byte_tokenizer()).encode("Go!", (108, 108), formalize=False)
    assert np.array_equal(raw(_observation()).input_ids, expected)


def test_an_instruction_can_be_checked_before_any_observation() -> None:
    preprocessor = _preprocessor()
    preprocessor.check_instruction("go")
    with pytest.raises(ObservationError, match="is empty"):
        preprocessor.check_instruction("...")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (None, "no frame of camera 'front'"),
        (_frame(240, 320), "'front' gives frames of 240x320.*exported for 120x160.*export again"),
        (_frame(120, 160).astype(np.float32), "'front' gives float32"),
        (_frame(120, 160)[..., :1], r"'front' gives frames of shape \(120, 160, 1\)"),
        (_frame(120, 160)[..., 0], r"'front' gives frames of shape \(120, 160\)"),
        (np.zeros((120, 160, 4), np.uint8), r"'front' gives frames of shape \(120, 160, 4\)"),
    ],
)
def test_an_unusable_frame_is_refused_with_its_camera(
    frame: np.ndarray[Any, Any] | None, message: str
) -> None:
    images: dict[str, Any] = dict(_observation().images)
    if frame is None:
        del images["front"]
    else:
        images["front"] = frame
    with pytest.raises(ObservationError, match=message):
        _preprocessor()(_observation(images=images))


@pytest.mark.parametrize(
    "cameras",
    [CAMERAS[:1], (*CAMERAS, CameraSpec("top", 120, 160)), (CAMERAS[0], CAMERAS[0]), ()],
)
def test_cameras_other_than_the_checkpoint_s_are_refused_at_once(
    cameras: tuple[CameraSpec, ...],
) -> None:
    with pytest.raises(ProcessorError, match="was trained with front, wrist"):
        Preprocessor(_processor(), PromptTokenizer(_byte_tokenizer()), cameras)


def test_cameras_of_different_shapes_are_refused_at_once() -> None:
    mixed = (CAMERAS[0], CameraSpec("wrist", 360, 640))
    with pytest.raises(ProcessorError, match=r"'front' 120x160 becomes 252x336.*252x448"):
        Preprocessor(_processor(), PromptTokenizer(_byte_tokenizer()), mixed)
    with pytest.raises(ProcessorError, match="one size"):
        pixel_values([_frame(120, 160), _frame(360, 640)], CHAIN)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_whole_observations_equal_the_public_code(
    golden_dir: Path, golden_tokenizer: PromptTokenizer, index: int
) -> None:
    processor = load_processor(golden_dir / "checkpoint")
    with np.load(golden_dir / f"golden_obs{index}.npz") as golden:
        images = {key: golden[f"image.{key}"] for key in processor.cameras}
        preprocessor = Preprocessor(
            processor,
            golden_tokenizer,
            [CameraSpec(key, *image.shape[:2]) for key, image in images.items()],
        )
        instruction = str(golden["instruction"])
        inputs = preprocessor(
            Observation(
                images=images,
                state={key.key: golden[f"state.{key.key}"][0] for key in processor.state_keys},
                instruction=instruction,
            )
        )
        assert prompt_text(instruction, preprocessor.tokens_per_image, True) == str(
            golden["expanded_text"]
        )
        assert np.array_equal(inputs.input_ids, golden["input_ids"])
        assert np.array_equal(inputs.attention_mask, golden["attention_mask"])
        assert np.array_equal(inputs.state, golden["normalized_state"][0])
        _assert_same_image(_levels(inputs.pixel_values), _levels(golden["pixel_values"]))
        for image, expected in zip(images.values(), golden["eval_images"], strict=True):
            _assert_same_image(evaluation_image(image, processor.image_chain), expected)
