"""--window: what is encoded of an object's frame, and where the object lies in it, each compared with another
way to compute it."""

import json
from dataclasses import asdict
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from PIL import Image
from pycocotools import mask as coco_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import data
import eval as evaluation
import model as models
import train

REGION_PIXELS = (
    100 * 100
)  # of no still whose sides are whole numbers of cells: transformers may round as it likes
TURN = [{"from": "human", "value": "What is <region>?"}, {"from": "gpt", "value": "A dog."}]
TURNS = [{"from": "human", "value": "Is <region> on <region>?"}, {"from": "gpt", "value": "No."}]


def box(top, bottom, left, right, height, width):
    """A mask of this frame that is 1 within the box."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()}}


def tiny(**settings):
    return models.load_processor("tiny", ["What is it?"], region_pixels=REGION_PIXELS, **settings)


def write_clip(folder, height, width, num_frames=3):
    """A folder of PNGs, which keep every pixel. Returns the frames."""
    folder.mkdir()
    rng = np.random.default_rng(height + width)
    frames = rng.integers(0, 255, (num_frames, height, width, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return frames


def dataset_of(folder, entries, processor, **options):
    (folder / "data.json").write_text(json.dumps(entries))
    return data.ReferringDataset(data.read_samples(folder / "data.json"), processor, **options)


def collate(samples, processor):
    return data.collate(samples, processor)


# ---- the truth


def true_window(bounds, sides, height, width):
    """Of all stretches of whole pixels with the right length, the one whose centre is nearest; of two, the
    first."""
    top, bottom, left, right = bounds
    side = sides * max(bottom - top, right - left)
    window = []
    for start, end, limit in ((top, bottom, height), (left, right, width)):
        length = min(side, limit)
        starts = range(limit - length + 1)
        first = min(starts, key=lambda s: abs(Fraction(2 * s + length, 2) - Fraction(start + end, 2)))
        window += [first, first + length]
    return tuple(window)


def true_coverage(mask, gh, gw, window, height, width):
    """Each pixel of the mask as a rectangle, intersected with each cell, in fractions."""
    top, bottom, left, right = window
    pixel = Fraction(height, mask.shape[0]), Fraction(width, mask.shape[1])
    cell = Fraction(bottom - top, gh), Fraction(right - left, gw)
    found = np.zeros((gh, gw))
    for i in range(gh):
        for j in range(gw):
            area = Fraction(0)
            for y, x in np.argwhere(mask).tolist():
                sides = []
                for n, begin, k, m in ((y, top, i, 0), (x, left, j, 1)):
                    low = max(n * pixel[m], begin + k * cell[m])
                    sides.append(max(min((n + 1) * pixel[m], begin + (k + 1) * cell[m]) - low, 0))
                area += sides[0] * sides[1]
            found[i, j] = area / (cell[0] * cell[1])
    return found


def picture_of(patches, grid, patch=8):
    """The picture that these patches were cut from: four of them, side by side in the data, make a cell."""
    rows, columns = grid
    picture = np.zeros((rows * patch, columns * patch, 3), np.uint8)
    patches = iter(patches.reshape(-1, 3, patch, patch))
    for i in range(0, rows, 2):
        for j in range(0, columns, 2):
            for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
                y, x = (i + di) * patch, (j + dj) * patch
                picture[y : y + patch, x : x + patch] = next(patches).transpose(1, 2, 0)
    return picture


# ---- one object

WIDE, TALL, FLAT = (72, 128), (96, 32), (32, 96)  # 16 : 9, 1 : 3 and 3 : 1
CASES = {
    "in the middle": (WIDE, (30, 37, 50, 61)),
    "of even sides": (WIDE, (30, 36, 50, 58)),
    "near the left border": (WIDE, (30, 37, 3, 14)),
    "at the right border": (WIDE, (30, 40, 121, 128)),
    "in a corner": (WIDE, (66, 72, 0, 5)),
    "one pixel": (WIDE, (31, 32, 77, 78)),
    "one pixel in a corner": (WIDE, (0, 1, 127, 128)),
    "as large as the frame": (WIDE, (0, 72, 0, 128)),
    "as wide as the frame": (WIDE, (60, 66, 0, 128)),
    "in a tall frame": (TALL, (70, 90, 5, 12)),
    "as wide as a tall frame": (TALL, (10, 13, 0, 32)),
    "as large as a tall frame": (TALL, (0, 96, 0, 32)),
    "in a flat frame": (FLAT, (0, 12, 80, 89)),
    "as high as a flat frame": (FLAT, (0, 32, 10, 13)),
    "in a frame smaller than a cell": ((3, 5), (2, 3, 0, 1)),
}


@pytest.mark.parametrize("sides", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_an_objects_frame_is_encoded_as_the_window_around_it(tmp_path, case, sides):
    """Window, size, pixels, coverage and box. The mask is the box with a hole, so that it is no rectangle."""
    (height, width), bounds = CASES[case]
    mask = box(*bounds, height, width)
    mask[(bounds[0] + 1) : (bounds[1] - 1), (bounds[2] + 1) : (bounds[3] - 2)] = 0
    frames = write_clip(tmp_path / "clip", height, width)
    entry = {"video": "clip", "conversations": TURN, "annotation": [{"1": rle(mask)}]}
    processor = tiny(window=sides)
    encoded = dataset_of(tmp_path, [entry], processor)[0, 0]

    top, bottom, left, right = window = true_window(bounds, sides, height, width)
    # transformers' rule for large pictures, given this one enlarged.
    size = smart_resize(1000 * (bottom - top), 1000 * (right - left), 16, 1, REGION_PIXELS)
    assert encoded["still_grids"] == [(size[0] // 8, size[1] // 8)] and encoded["region_still"] == [0]
    crop = Image.fromarray(frames[1]).crop((left, top, right, bottom))
    expected = np.asarray(crop.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    (patches,) = encoded["still_patches"]
    np.testing.assert_array_equal(picture_of(patches, encoded["still_grids"][0]), expected)

    gh, gw = size[0] // 16, size[1] // 16
    (cells,) = encoded["coverage"]
    if mask.sum() < 200:  # the truth takes its time
        truth = true_coverage(mask, gh, gw, window, height, width).ravel()
        np.testing.assert_allclose(cells, truth, atol=1e-6)
        np.testing.assert_array_equal(cells > 0, truth > 0)  # nothing in a cell that it only touches
    share = mask.sum() / (
        (bottom - top) * (right - left)
    )  # no pixel of the object lies outside of its window
    assert cells.mean(dtype=float) == pytest.approx(share, rel=1e-5)
    center = (bounds[2] + bounds[3]) / 2 / width, (bounds[0] + bounds[1]) / 2 / height
    sides = (bounds[3] - bounds[2]) / width, (bounds[1] - bounds[0]) / height
    assert encoded["boxes"][0] == pytest.approx((*center, *sides, 0.5))


def test_window_0_is_the_whole_frame(tmp_path):
    frames = write_clip(tmp_path / "clip", *WIDE)
    mask = box(30, 37, 50, 61, *WIDE)
    entry = {"video": "clip", "conversations": TURN, "annotation": [{"1": rle(mask)}]}
    encoded = dataset_of(tmp_path, [entry], tiny(window=0))[0, 0]
    height, width = smart_resize(*WIDE, 16, 256, REGION_PIXELS)
    expected = np.asarray(Image.fromarray(frames[1]).resize((width, height), Image.Resampling.BICUBIC))
    found = picture_of(encoded["still_patches"][0], encoded["still_grids"][0])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(encoded["coverage"][0], data.coverage(mask, height // 16, width // 16).ravel())


@pytest.mark.parametrize("part", [(5, 16, 2, 9), (0, 18, 0, 32), (17, 18, 31, 32), (3, 10, 20, 32)])
@pytest.mark.parametrize("resolution", [(18, 32), (36, 64), (9, 16), (27, 48), (10, 18)])
@pytest.mark.parametrize("grid", [(3, 4), (5, 5), (1, 7)])
def test_coverage_of_a_part_is_exact_for_masks_of_any_resolution(grid, resolution, part):
    mask = np.random.default_rng(sum(part)).random(resolution) < 0.2
    found = data.coverage(mask.astype(np.uint8), *grid, part, (18, 32))
    truth = true_coverage(mask, *grid, part, 18, 32)
    np.testing.assert_allclose(found, truth, atol=1e-6)
    np.testing.assert_array_equal(found > 0, truth > 0)


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_a_mask_of_another_resolution_has_the_same_window(sides):
    small = box(7, 9, 3, 6, 18, 32)
    window = true_window((28, 36, 12, 24), sides, *WIDE)  # of the frame, which is four times as large
    for scale in (1, 2, 4, 8):
        assert data.window(np.kron(small, np.ones((scale, scale), np.uint8)), sides, *WIDE) == window
    # Worked by hand: on a 426 x 240 frame the box ends at 33.3, 43.3, 200.02 and 213 pixels.
    large = box(100, 130, 601, 640, 720, 1280)
    assert data.window(large, 3, 240, 426) == (19, 58, 187, 226)


def test_windows_hold_their_object_whatever_its_place(tmp_path):
    """Also where a mask's pixel ends within one of the frame's."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        (height, width), (rows, columns) = rng.integers(1, 60, (2, 2)).tolist()
        top, bottom = sorted(rng.choice(rows + 1, 2, replace=False).tolist())
        left, right = sorted(rng.choice(columns + 1, 2, replace=False).tolist())
        mask = box(top, bottom, left, right, rows, columns)
        touched = floor(Fraction(top * height, rows)), ceil(Fraction(bottom * height, rows))
        touched += floor(Fraction(left * width, columns)), ceil(Fraction(right * width, columns))
        for sides in (1, 2, 5, 10**9):
            window = data.window(mask, sides, height, width)
            assert window == true_window(touched, min(sides, 200), height, width)
            assert window[0] <= touched[0] < touched[1] <= window[1] <= height
            assert window[2] <= touched[2] < touched[3] <= window[3] <= width


def test_a_mask_that_reaches_beyond_the_frame_counts_as_far_as_it_is_seen(tmp_path):
    write_clip(tmp_path / "clip", *WIDE)
    outside = [100, 20, 180, 20, 180, 30, 100, 30]  # x from 100 to 180 of 128
    inside = [100, 20, 128, 20, 128, 30, 100, 30]
    entries = []
    for polygon in (outside, inside):
        masks = [{"1": {"segmentation": [polygon]}}]
        entries.append({"video": "clip", "conversations": TURN, "annotation": masks})
    dataset = dataset_of(tmp_path, entries, tiny(window=2))
    found, expected = dataset[0, 0], dataset[0, 1]
    np.testing.assert_array_equal(found["still_patches"], expected["still_patches"])
    np.testing.assert_array_equal(found["coverage"], expected["coverage"])


@pytest.mark.parametrize("region_pixels, side", [(96 * 96, 96), (95 * 95, 80), (64 * 64, 64), (1, 16)])
def test_every_square_gets_the_most_cells_that_fit(region_pixels, side):
    """transformers' own rule gives some squares (of 19, 38, 47 pixels, ...) a row and column fewer."""
    processor = models.load_processor("tiny", ["a"], region_pixels=region_pixels, window=3)
    assert {processor.window_size(n, n) for n in range(1, 2000)} == {(side, side)}
    assert processor.window_size(1, 200)[0] == processor.window_size(200, 1)[1] == 16


def test_a_window_has_no_more_pixels_than_the_checkpoint_takes():
    processor = tiny(window=3)
    processor.max_pixels = 50 * 50
    assert processor.window_size(7, 7) == (48, 48)


# ---- several objects


def test_objects_with_the_same_window_share_a_still_and_others_do_not(tmp_path, monkeypatch):
    """The first two objects have one box on frame 0, though not the same pixels, and two boxes on frame 1.
    Each frame is decoded once; the second time it comes from the cache."""
    frames = write_clip(tmp_path / "clip", *WIDE)
    full, ring = box(30, 40, 50, 60, *WIDE), box(30, 40, 50, 60, *WIDE)
    ring[32:38, 52:58] = 0
    moved, far = box(31, 41, 50, 60, *WIDE), box(2, 12, 100, 110, *WIDE)
    objects = [{"0": rle(full), "1": rle(full)}, {"0": rle(ring), "1": rle(moved)}, {"0": rle(far)}]
    turns = [{"from": "human", "value": "<region> <region> <region>?"}, {"from": "gpt", "value": "No."}]
    entry = {"video": "clip", "conversations": turns, "annotation": objects}
    loaded, load = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: loaded.append(Path(file).name) or load(file))
    dataset = dataset_of(tmp_path, [entry], tiny(window=2))
    encoded = dataset[0, 0]
    assert loaded == ["0.png", "0.png", "1.png", "2.png"]  # the first time for the size
    assert encoded["region_still"] == [0, 1, 0, 2, 3] and len(encoded["still_patches"]) == 4
    windows = [(0, (25, 45, 45, 65)), (1, (25, 45, 45, 65)), (1, (26, 46, 45, 65)), (0, (0, 20, 95, 115))]
    for (frame, (top, bottom, left, right)), patches in zip(windows, encoded["still_patches"]):
        crop = Image.fromarray(frames[frame][top:bottom, left:right])
        expected = np.asarray(crop.resize((96, 96), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(picture_of(patches, (12, 12)), expected)
    shares = [cells.mean(dtype=float) * 400 for cells in encoded["coverage"]]
    assert shares == pytest.approx([100, 100, 64, 100, 100], rel=1e-5)
    again = dataset[1, 0]
    assert len(loaded) == 4
    np.testing.assert_array_equal(again["still_patches"], encoded["still_patches"])


def image_sample(folder, name, boxes, size=WIDE, turns=TURN):
    rng = np.random.default_rng(len(name))
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    masks = [{"0": rle(box(*bounds, *size))} for bounds in boxes]
    return {"image": name, "conversations": turns, "annotation": masks}


def test_an_image_stands_in_the_prompt_whole_beside_the_windows_of_its_regions(tmp_path):
    """The second object is as large as the image. In the prompt its 32 x 96 pixels stay as they are, but its
    window becomes as large as a still may be."""
    entry = image_sample(tmp_path, "a.png", [(30, 37, 5, 16), (0, 96, 0, 32)], size=TALL, turns=TURNS)
    whole, windows = (dataset_of(tmp_path, [entry], tiny(window=sides))[0, 0] for sides in (0, 2))
    assert whole["region_still"] == [0, 0] and windows["region_still"] == [1, 2]
    np.testing.assert_array_equal(windows["input_ids"], whole["input_ids"])
    np.testing.assert_array_equal(windows["still_patches"][0], whole["still_patches"][0])
    assert windows["still_grids"] == [(12, 4), (12, 12), (20, 6)]


def test_a_region_whose_window_is_the_image_as_it_stands_in_the_prompt_shares_its_still(tmp_path):
    entry = image_sample(tmp_path, "a.png", [(0, 96, 0, 96)], size=(96, 96))
    encoded = dataset_of(tmp_path, [entry], tiny(window=2))[0, 0]
    assert encoded["region_still"] == [0] and encoded["still_grids"] == [(12, 12)]


def test_controls_take_the_window_of_the_mask_that_they_put_in_place(tmp_path):
    entries = [image_sample(tmp_path, f"{i}.png", [(30, 37, 10 * i, 10 * i + 8)]) for i in range(1, 3)]
    processor = tiny(window=2)
    for control, window in (("full", (0, 72, 0, 128)), ("shuffle", (25, 41, 16, 32))):
        samples = dataset_of(tmp_path, entries, processor).samples
        encoded = evaluation.Questions(samples, processor, control)[0, 0]
        top, bottom, left, right = window
        crop = Image.open(tmp_path / "1.png").crop((left, top, right, bottom))
        grid = encoded["still_grids"][encoded["region_still"][0]]
        expected = np.asarray(crop.resize((grid[1] * 8, grid[0] * 8), Image.Resampling.BICUBIC))
        found = picture_of(encoded["still_patches"][encoded["region_still"][0]], grid)
        np.testing.assert_array_equal(found, expected)
    assert encoded["boxes"][0][0] == pytest.approx(24 / 128)


# ---- the model


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def mixed(tmp_path):
    """Videos and images, in an order that collate must change, with windows of several shapes."""
    write_clip(tmp_path / "clip", *WIDE)
    masks = [box(30, 37, 50, 61, *WIDE), box(60, 66, 0, 128, *WIDE)]
    video = {"video": "clip", "conversations": TURNS}
    return [
        video | {"annotation": [{"0": rle(masks[0]), "2": rle(masks[1])}, {"1": rle(masks[0])}]},
        image_sample(tmp_path, "a.png", [(30, 37, 50, 61), (60, 66, 0, 128)], turns=TURNS),
        {"conversations": [{"from": "human", "value": "Say no."}, {"from": "gpt", "value": "No."}]},
        image_sample(tmp_path, "bb.png", [(1, 9, 1, 20)], size=TALL),
        video | {"conversations": TURN, "annotation": [{"2": rle(masks[1])}]},
    ]


def test_stills_of_several_sizes_in_one_batch_give_the_losses_of_single_samples(checkpoint, tmp_path, mixed):
    processor = models.load_processor(checkpoint, region_pixels=REGION_PIXELS, frame_pixels=64 * 64, window=2)
    model = models.load_model(checkpoint, processor).eval()
    dataset = dataset_of(tmp_path, mixed, processor)
    samples = [dataset[0, i] for i in range(len(mixed))]
    assert len({grid for sample in samples for grid in sample["still_grids"]}) > 2
    with torch.no_grad():
        single = [model(collate([sample], processor)).item() for sample in samples]
        together = model(collate(samples, processor)).item()
    assert together == pytest.approx(sum(single), rel=1e-5)
    # Each of the stills counts: another one in its place gives another loss.
    for sample in samples:
        for i in range(len(sample["still_patches"])):
            changed = sample | {"still_patches": list(sample["still_patches"])}
            changed["still_patches"][i] = 255 - changed["still_patches"][i]
            with torch.no_grad():
                changed_loss = model(
                    collate([other if other is not sample else changed for other in samples], processor)
                )
            assert changed_loss.item() != pytest.approx(together, rel=1e-6)


def test_a_region_token_starts_as_the_average_of_the_cells_of_its_window(checkpoint, tmp_path, mixed):
    """Truth: the window cut out with PIL, through the checkpoint's own image processor and vision tower; its
    cells weighted by coverage in fractions."""
    processor = models.load_processor(checkpoint, region_pixels=REGION_PIXELS, frame_pixels=64 * 64, window=2)
    model = models.load_model(checkpoint, processor).eval()
    sample = dataset_of(tmp_path, mixed, processor)[0, 1]
    tokens = []
    model.region_encoder.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        model(collate([sample], processor))
    for token, bounds in zip(tokens[0], [(30, 37, 50, 61), (60, 66, 0, 128)]):
        top, bottom, left, right = window = true_window(bounds, 2, *WIDE)
        crop = Image.open(tmp_path / "a.png").crop((left, top, right, bottom))
        limits = {"shortest_edge": 1, "longest_edge": REGION_PIXELS}
        large = crop.resize((crop.width * 20, crop.height * 20))
        size = processor.image_processor(images=[large], size=limits, return_tensors="pt")["image_grid_thw"]
        rows, columns = (size[0, 1:] * processor.patch_size).tolist()
        resized = crop.resize((columns, rows), Image.Resampling.BICUBIC)
        inputs = processor.image_processor(images=[resized], do_resize=False, return_tensors="pt")
        with torch.no_grad():
            cells = model.backbone.model.visual(
                inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
            ).pooler_output
        gh, gw = rows // processor.factor, columns // processor.factor
        weight = true_coverage(box(*bounds, *WIDE), gh, gw, window, *WIDE).ravel()
        expected = weight @ cells.double().numpy() / weight.sum()
        np.testing.assert_allclose(token.numpy(), expected, atol=1e-5)


def test_a_window_changes_nothing_before_the_first_region(checkpoint, tmp_path, mixed):
    """The logits of the image in the prompt and of the text before the placeholder are those of window 0."""
    logits = []
    for sides in (0, 2):
        settings = {"region_pixels": REGION_PIXELS, "window": sides}
        processor = models.load_processor(checkpoint, **settings)
        model = models.load_model(checkpoint, processor).eval()
        sample = dataset_of(tmp_path, mixed, processor)[0, 1]
        first = sample["input_ids"].tolist().index(processor.region_token_id)
        with torch.no_grad():
            logits.append(model.logits(collate([sample], processor))[0])
    np.testing.assert_allclose(logits[0][:first], logits[1][:first], atol=1e-5)
    assert (logits[0][first] - logits[1][first]).abs().max() > 1e-3


def test_eval_asks_with_the_window_that_was_saved(checkpoint, tmp_path, mixed):
    processor = models.load_processor(checkpoint, region_pixels=REGION_PIXELS, window=3)
    model = models.load_model(checkpoint, processor)
    model.save_pretrained(tmp_path / "final", asdict(processor.settings))
    processor.save_pretrained(tmp_path / "final")
    _, saved = evaluation.load(tmp_path / "final")
    assert saved.settings == processor.settings and saved.settings.window == 3
    samples = dataset_of(tmp_path, mixed, saved).samples
    expected = data.ReferringDataset(samples, processor)[0, 1]
    asked = evaluation.Questions(samples, saved)[1, 0]
    assert asked["region_still"][0] == 1
    np.testing.assert_array_equal(asked["still_patches"][1], expected["still_patches"][1])
    assert models.load_processor(tmp_path / "final", window=0).settings.window == 0  # given anew


@pytest.mark.parametrize("window", ["-1", "1.5", "two"])
def test_a_window_is_a_whole_number(tmp_path, capsys, window):
    options = ["--data", "data.json", "--out", str(tmp_path / "out")]
    assert train.parse([*options, "--window=0"]).window == 0
    with pytest.raises(SystemExit):
        train.parse([*options, f"--window={window}"])
    assert "error: " in (shown := capsys.readouterr().err) and "--window: " in shown
