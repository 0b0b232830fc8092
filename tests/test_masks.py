"""Masks, and what is measured of them: pycocotools, COCO's specification and Fractions are the truth."""

import random
import re
from fractions import Fraction
from functools import reduce
from math import ceil, floor

import numpy as np
import pytest
from fuzz import with_a_change
from helpers import box, box_mask, refusal, rle
from pycocotools import mask as coco_mask

import data

H, W = 24, 32


# ---- RLE ----
def coco_runs(text):
    """COCO's compressed counts, by its specification; None, if it is no such string. Numbers in base 32, the
    lowest digit first, in two's complement. "0" to "O" is the last digit of one, "P" to "o" another. From the
    fourth on, a number is the difference to the run two before. pycocotools misreads more than 6 digits."""
    if not re.fullmatch("([P-o]{0,5}[0-O])*", text):
        return None
    runs = []
    for word in re.findall("[P-o]*[0-O]", text):
        number = sum((ord(char) - 48) % 32 * 32**i for i, char in enumerate(word))
        if number >= 32 ** len(word) // 2:
            number -= 32 ** len(word)
        runs.append(number + runs[-2] if len(runs) >= 3 else number)
    return runs


def draw(runs, height, width):
    """Runs of zeros and ones in turn, down the columns, as (H, W). None: not such a mask."""
    if runs is None or min(runs, default=0) < 0 or sum(runs) != height * width:
        return None
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T


def test_mutated_strings_are_decoded_as_specified_or_refused():
    """Truths: the decoder above, and pycocotools for what is valid. What is refused never reaches it."""
    rng, accepted = random.Random(0), 0
    for _ in range(2000):
        height, width = rng.randint(1, 12), rng.randint(1, 12)
        share = rng.choice([0.1, 0.5, 1])
        mask = np.array([[rng.random() < share for _ in range(width)] for _ in range(height)])
        text = rle(mask)["counts"]
        for _ in range(rng.choice([0, 1, 2, 8])):
            text = with_a_change(rng, text) or "0"
        segmentation = {"size": [height, width], "counts": text}
        expected = draw(coco_runs(text), height, width) if isinstance(text, str) else None
        if expected is None:
            refusal(data.decode_mask, segmentation, height, width)
            continue
        accepted += 1
        decoded = data.decode_mask(segmentation, height, width)
        np.testing.assert_array_equal(decoded, expected, text)
        np.testing.assert_array_equal(decoded, coco_mask.decode(segmentation), text)
        runs = data.decode_mask(segmentation | {"counts": coco_runs(text)}, height, width)
        np.testing.assert_array_equal(runs, expected, text)
    assert 400 < accepted < 1500, "mutations spoil neither everything nor nothing"


def test_a_mask_may_have_another_resolution_of_the_frames_shape():
    """The limits, by hand: scaled to a side of the larger picture, the smaller is right to a pixel."""
    video = (720, 1280)  # 9 : 16
    fits = [((9, w), video) for w in (15, 16, 17)] + [((8, 16), video), ((480, 854), video)]
    fits += [((720, w), (9, 16)) for w in (1200, 1280, 1440)] + [(video, (240, 426)), ((12, 16), (720, 960))]
    other = [((9, w), video) for w in (14, 18)] + [((7, 16), video), ((1280, 720), video)]
    other += [((720, 1441), (9, 16))]
    for size, frame in fits:
        assert data.decode_mask(rle(np.ones(size)), *frame).shape == size
    for size, frame in other:
        assert f"{size[1]}x{size[0]}" in str(refusal(data.decode_mask, rle(np.ones(size)), *frame))


# ---- polygons ----
def test_polygons_are_filled_as_pycocotools_fills_each_alone():
    rng = random.Random(0)
    for _ in range(300):
        height, width = rng.randint(5, 40), rng.randint(5, 40)
        kind = rng.choice([float, int, lambda x: round(x, 1)])
        polygons = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            points = range(rng.choice([3, 4, 6, 20, 300]))
            beyond = rng.choice([0, 0, 2])  # 2: as far outside as is allowed
            sides = [side for _ in points for side in (width, height)]
            polygons.append([kind(rng.uniform(-beyond, side + beyond)) for side in sides])
        alone = [coco_mask.decode(coco_mask.frPyObjects([p], height, width))[..., 0] for p in polygons]
        found = data.decode_mask(polygons, height, width)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.any(alone, axis=0))
        np.testing.assert_array_equal(data.decode_mask(polygons[0], height, width), alone[0])


def test_a_polygon_may_reach_2_pixels_beyond_the_frame():
    """As COCO's do; one of a larger frame is refused, at each side."""
    assert data.decode_mask(box(-2, -2, W + 4, H + 4), H, W).all()
    outside = box(-3, 0, W, H), box(0, -3, W, H), box(0, 0, W + 3, H), box(0, 0, W, H + 3)
    for polygon, found in zip(outside, (-3, -3, W + 3, H + 3)):
        assert f"{found}" in str(refusal(data.decode_mask, polygon, H, W))


# ---- what is refused ----
BAD = [  # a segmentation on a frame of 4 x 4, and what its error names
    ([], "[]"),
    ("mja", "mja"),
    ([1, 1, 3, 3], "[1, 1, 3, 3]"),
    ([1, 1, 3, 3, 5, 1, 9], "9]"),
    ([box(1, 1, 2, 2)], "[[1, 1"),  # one list too many
    ([[[1, 1], [3, 3], [5, 1], [1, 1], [3, 3], [5, 1]]], "[1, 1]"),  # points in pairs
    ([box(1, 1, 2, 2)[0], [1, 1, 3, 3]], "[1, 1, 3, 3]"),
    ([reduce(lambda nest, _: [nest], range(100_000))], ""),  # too deep to be printed
]
NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e30, "3", [1], None, True)
BAD += [([1, 1, 3, number, 5, 1], "[1, 1" if isinstance(number, list | str) else "") for number in NUMBERS]
BAD += [([0, 0, 0.5, 0, 0.5, 1], "1")]  # shares of the frame
COUNTS = [[20, -4], [8.0, 8], [True, 15], 16, None]
# An unfinished number, one without end, one of seven characters, and other characters.
COUNTS += ["PPP", "P" * 99 + "0", "0<1goooooO", "\u00e9~ "]
BAD += [({"size": [4, 4], "counts": counts}, "counts") for counts in COUNTS]
SUMS = {"found 7": [3, 4], "found 17": [3, 14], "16": [9 * 10**4299] * 2}  # too long to be printed
BAD += [({"size": [4, 4], "counts": counts}, found) for found, counts in SUMS.items()]
SIZES = [None, "44", [4], [4.0, 4], [True, 16], [0, 4], [-4, -4], [2**13 + 1, 2**13]]  # 2**26 is the limit
BAD += [({"size": size, "counts": [16]}, "size") for size in SIZES]


def test_a_wrong_mask_is_an_error_that_names_what_is_wrong():
    for segmentation, named in BAD:
        error = str(refusal(data.decode_mask, segmentation, 4, 4))
        assert named in error and len(error) < 400
    largest = {"size": [2**13] * 2, "counts": [2**26]}
    assert data.decode_mask(largest, 4, 4).shape == (2**13, 2**13)


# ---- coverage ----
def true_coverage(mask, gh, gw, part, height, width):
    """Each pixel of a mask is a rectangle, whose part in each cell is a fraction of the cell."""
    top, bottom, left, right = part
    pixel_h, pixel_w = Fraction(height, mask.shape[0]), Fraction(width, mask.shape[1])
    cell_h, cell_w = Fraction(bottom - top, gh), Fraction(right - left, gw)
    found = np.zeros((gh, gw), object)
    for i, j in np.ndindex(gh, gw):
        y, x = top + i * cell_h, left + j * cell_w
        for row, column in np.argwhere(mask).tolist():
            high = min((row + 1) * pixel_h, y + cell_h) - max(row * pixel_h, y)
            wide = min((column + 1) * pixel_w, x + cell_w) - max(column * pixel_w, x)
            found[i, j] += max(high, 0) * max(wide, 0)
    return (found / (cell_h * cell_w)).astype(float)


def test_coverage_is_the_exact_share_of_each_cell():
    """Of whole pictures and of parts, for masks of the frame's resolution and others, against Fractions."""
    rng, frame = np.random.default_rng(0), (9, 16)
    parts = [None, (2, 8, 2, 9), (0, 9, 0, 16), (8, 9, 15, 16), (1, 5, 10, 16)]
    for grid in ((1, 1), (3, 4), (5, 5), (1, 7)):
        for resolution in (frame, (18, 32), (5, 8)):
            for part in parts:
                mask = (rng.random(resolution) < 0.1).astype(np.uint8)
                found = data.coverage(mask, *grid, part, frame)
                truth = true_coverage(mask, *grid, part or (0, 9, 0, 16), *frame)
                assert found.dtype == np.float32 and found.shape == grid and found.max() <= 1
                np.testing.assert_allclose(found, truth, atol=1e-6)
                np.testing.assert_array_equal(found > 0, truth > 0)  # nothing in cells that are only touched
    np.testing.assert_array_equal(data.coverage(np.ones((7, 9), np.uint8), 4, 4), np.ones((4, 4)))
    # One pixel of 1280 x 720 is no object too small to be seen.
    found = data.coverage(box_mask(720, 1280, 997, 401, 1, 1), 27, 27)
    assert (found > 0).sum() == 1 and found.max() == pytest.approx(27 * 27 / (720 * 1280))
    assert found[401 * 27 // 720, 997 * 27 // 1280] > 0


# ---- windows ----
def true_window(touched, sides, height, width):
    """Of all stretches of the right length, the one whose centre is nearest; of two, the first."""
    top, bottom, left, right = touched
    side, found = sides * max(bottom - top, right - left), []
    for start, end, limit in ((top, bottom, height), (left, right, width)):
        length = min(side, limit)
        starts = range(limit - length + 1)
        found.append(min(starts, key=lambda first: abs(2 * first + length - start - end)))
        found.append(found[-1] + length)
    return tuple(found)


def test_a_window_is_the_square_around_the_pixels_that_an_objects_box_touches():
    """Random boxes in frames and masks of any two resolutions. The one by hand ends at 33.3, 43.3, 200.02
    and 213 pixels of the frame."""
    assert data.window(box_mask(720, 1280, 601, 100, 39, 30), 3, 240, 426) == (19, 58, 187, 226)
    rng = np.random.default_rng(0)
    for _ in range(300):
        (height, width), (rows, columns) = rng.integers(1, 60, (2, 2)).tolist()
        top, bottom = sorted(rng.choice(rows + 1, 2, replace=False).tolist())
        left, right = sorted(rng.choice(columns + 1, 2, replace=False).tolist())
        mask = box_mask(rows, columns, left, top, right - left, bottom - top)
        touched = floor(Fraction(top * height, rows)), ceil(Fraction(bottom * height, rows))
        touched += floor(Fraction(left * width, columns)), ceil(Fraction(right * width, columns))
        for sides in (1, 2, 5, 10**9):
            expected = true_window(touched, min(sides, 100), height, width)
            assert data.window(mask, sides, height, width) == expected
