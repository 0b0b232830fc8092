"""train.py --check: what it counts, what it finds, its exit code, and the pixels of its --preview."""

import json
import re

import numpy as np
import pytest
from helpers import box, box_mask, read_lines, rle, run, sample, write_json
from PIL import Image
from transformers import AutoTokenizer


def write_picture(path, brightness):
    """A picture of one hue, which nothing else in a preview has."""
    Image.fromarray((brightness[:, :, None] * [4, 2, 1]).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """p.png, 64 x 32 pixels, brighter in the right half; video, 8 frames of 96 x 64, each brighter."""
    folder = tmp_path_factory.mktemp("media")
    brightness = np.repeat([[50, 60]], 32, axis=1).repeat(32, axis=0)
    write_picture(folder / "p.png", brightness)
    (folder / "video").mkdir()
    for k in range(8):
        write_picture(folder / f"video/{k}.png", np.full((64, 96), 25 + 5 * k))
    return folder


def check(media, samples, options="", code=0):
    """Checks samples of a file that lies elsewhere. Returns {name: rest} of lines that are printed; text."""
    path = write_json(media.parent / "elsewhere" / "data.json", samples)
    text = run(f"train.py --check --data {path} --media {media} --workers 0 {options}", code=code)
    return dict(re.findall("^([a-z]+): (.*)$", text, re.M)), text


def counted(line):
    """A line of "kind 3; other kind 2"."""
    return {name: int(count) for name, count in re.findall(r"([^;]+?) (\d+)(?:; |$)", line)}


MASK = box(10, 10, 40, 10)
A, B = "What is <region>?", "red"
RIGHT = [
    sample(A, B, {3: MASK}, video="video"),
    sample(A, B, {0: MASK, 4: MASK}, video="video"),
    sample(A, B, {0: MASK}, image="p.png"),
    sample(A + A + A, B, {0: MASK}, {0: MASK}, {0: MASK}, image="p.png"),
    sample("Describe it.", B, image="p.png"),
    sample("Describe it.", B, video="video"),
    sample("Say it.", B),
]


def test_counts_of_right_data(media, tmp_path):
    """Against what we wrote, by hand; nothing is trained."""
    facts, text = check(media, RIGHT, f"--out {tmp_path / 'out'} --workers 2")
    assert re.search("^7 samples, 7 ", text, re.M)
    kinds = ["video, regions on one frame", "video, regions on several frames", "image, no regions"]
    kinds += ["video, no regions", "text only, no regions"]
    assert counted(facts["kinds"]) == dict.fromkeys(kinds, 1) | {"image, regions on one frame": 2}
    assert counted(facts["sizes"]) == {"96x64": 3, "64x32": 3}
    assert re.findall("[0-9]+", facts["objects"]) == ["0", "1", "3"]
    assert re.findall("[0-9]+", facts["frames"]) == ["1", "8", "8"]
    assert not (tmp_path / "out").exists()


def test_tokens_are_those_of_transformers(media, final):
    """Least, median and most, of texts whose order is no rank, against the tokenizer's own template."""
    words = [1, 9, 30, 2, 5]
    facts, _ = check(media, [sample("word " * n, B) for n in words], f"--model {final}")
    tokenizer, lengths = AutoTokenizer.from_pretrained(final), []
    for n in sorted(words):
        turns = [{"role": "user", "content": " ".join(["word"] * n)}, {"role": "assistant", "content": B}]
        lengths.append(len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]))
    assert [int(n) for n in re.findall("[0-9]+", facts["tokens"])] == [lengths[0], lengths[2], lengths[4]]


def test_problems_have_places_and_are_grouped(media, tmp_path):
    """Also in --val, of long samples, and of masks on frames that training might not choose."""
    masks = {k: MASK for k in range(8)}
    wrong_masks = (5, {}, [], "x", {"size": [4, 4]}, {"size": [4, 4], "counts": [3]}, [[1, 1, 9, 1]])
    wrong_masks += ({"size": [10, 40], "counts": [100, 300]}, [[1, 1, 900, 1, 9, 9]])
    samples = [sample(A, B, masks | {5: mask}, video="video") for mask in wrong_masks]
    places = [[f"sample {i}", "object 0", "frame 5"] for i in range(len(samples))]
    samples += [sample(A, B, masks | {8: MASK}, video="video", id="late")]
    samples += [sample("A?", B, video=f"absent{n}.mp4") for n in (1, 2)]
    samples += [sample("A " * 200, B), sample("No tag", B, {0: MASK}, image="p.png")]
    places += [["sample 9 (id 'late')", "object 0"], *([f"sample {i}"] for i in range(10, 14))]
    problems, val = tmp_path / "problems.jsonl", write_json(tmp_path / "val.json", [RIGHT[0], samples[0]])
    options = f"--region-frames 2 --max-length 150 --val {val} --problems {problems}"
    _, text = check(media, samples + RIGHT, options, code=1)
    lines = read_lines(problems)
    places = [[str(media.parent / "elsewhere/data.json"), *place] for place in places]
    places.append([str(val), "sample 1", "object 0", "frame 5"])
    for line, place in zip(lines, places, strict=True):
        assert line["places"][: len(place)] == place
    assert "absent2.mp4" in json.dumps(lines[11]) and "150" in lines[12]["reason"]
    assert re.search(f"^{len(samples + RIGHT) + 2} samples, {len(RIGHT) + 1} ", text, re.M)
    groups = [int(n) for n in re.findall("^([0-9]+) x ", text, re.M)]
    assert sum(groups) == len(lines) and groups == sorted(groups, reverse=True) and 2 in groups
    assert "Traceback" not in text


def preview(media, tmp_path, samples, options=""):
    """uint8 (H, W, 3), and the tiles in it that show the media, from left to right: slices."""
    check(media, samples, f"--preview {tmp_path}/p.png {options}")
    return tiles_of(tmp_path / "p.png")


def tiles_of(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    r, g, b = np.moveaxis(pixels, 2, 0)
    shows = (abs(r - 2 * g) < 5) & (abs(g - 2 * b) < 5) & (r > 20)  # no other pixels have such a colour
    columns = np.flatnonzero(shows.any(0))
    tiles = []
    for part in np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1):
        rows = np.flatnonzero(shows[:, part].any(1))
        tiles.append(pixels[rows[0] : rows[-1] + 1, part[0] : part[-1] + 1])
    return tiles


def at(tile, y, x, margin=0):
    """The pixels around a place, y and x from 0 to 1."""
    y, x = round(y * len(tile)), round(x * tile.shape[1])
    return tile[y - margin : y + margin + 1, x - margin : x + margin + 1].reshape(-1, 3)


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours


def test_preview_outlines_objects_and_lights_cells(media, tmp_path):
    """Two boxes in a picture of 4 x 2 cells, the first of a cell and a half: pixels at known places."""
    masks = {0: box(0, 0, 24, 16)}, {0: box(48, 16, 16, 16)}
    frame, *cells = preview(media, tmp_path, [sample(A + A, B, *masks, image="p.png")], "--window 0")
    assert abs(at(frame, 0.7, 0.1) - (200, 100, 50)).max() < 3
    assert abs(at(frame, 0.3, 0.9) - (240, 120, 60)).max() < 3
    assert abs(at(frame, 1 / 4, 12 / 64) - (200, 100, 50)).max() < 3  # inside
    for colour, y, x in ((BLUE, 1 / 4, 24 / 64), (BLUE, 1 / 2, 12 / 64), (ORANGE, 3 / 4, 48 / 64)):
        assert abs(at(frame, y, x, margin=3) - colour).max(1).min() < 20
    dim = 0.15
    light = [[1, (1 + dim) / 2, dim, dim], [dim] * 4], [[dim] * 4, [dim, dim, dim, 1]]
    for k, row, column in np.ndindex(2, 2, 4):
        red = at(cells[k], (row + 0.5) / 2, (column + 0.5) / 4)[0][0]
        assert abs(red - (200, 240)[column // 2] * light[k][row][column]) < 3


def test_preview_shows_windows(media, tmp_path):
    """Windows of twice the boxes, in opposite corners: a quarter is lit, with the colour of that corner."""
    masks = {0: box(0, 0, 8, 8)}, {0: box(56, 24, 8, 8)}
    _, first, second = preview(media, tmp_path, [sample(A + A, B, *masks, image="p.png")])
    for window, y, x, red in ((first, 0.25, 0.25, 200), (second, 0.75, 0.75, 240)):
        assert abs(at(window, y, x)[0][0] - red) < 3
        assert abs(at(window, 1 - y, x)[0][0] - 0.15 * red) < 3
        assert abs(at(window, y, 1 - x)[0][0] - 0.15 * red) < 3


def test_preview_shows_first_middle_and_last_frame(media, tmp_path):
    """Of five annotated frames, by their brightness. Each is followed by what is encoded."""
    masks = {k: box(10, 10, 30, 20) for k in (0, 1, 2, 5, 7)}
    tiles = preview(media, tmp_path, [sample(A, B, masks, video="video")])
    assert [round(at(tile, 0.9, 0.9)[0][0] / 20) for tile in tiles[::2]] == [5, 7, 12]
    assert len(tiles) == 6


def test_preview_draws_any_right_sample(media, tmp_path):
    """An object smaller than a pixel, text alone, media without regions, formulas."""
    tiny = sample(A, B, {0: rle(box_mask(320, 640, 1, 0, 1, 1))}, image="p.png")
    for samples in ([tiny, *RIGHT], [sample("What is $x_", "$\\frac{")], RIGHT[4:]):
        check(media, samples, f"--preview {tmp_path}/any.png")
        with Image.open(tmp_path / "any.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_a_look_at_a_frame_needs_no_model_and_no_question(media, tmp_path):
    """The frame by its brightness, and boxes by the pixels of an edge."""
    look = f"eval.py ask --video {media}/video"
    assert f"{tmp_path}/p.png" in run(f"{look} --frame 5 --preview {tmp_path}/p.png")
    [frame] = tiles_of(tmp_path / "p.png")
    assert abs(at(frame, 0.5, 0.5) - (200, 100, 50)).max() < 3 and frame.shape[1] > 1000
    run(f"{look} --object 7:24,16,48,32 --object 7:84,2,9,60 --preview {tmp_path}/p.png")
    [frame] = tiles_of(tmp_path / "p.png")
    assert abs(at(frame, 0.5, 0.5) - (240, 120, 60)).max() < 3
    for colour, y, x in ((BLUE, 1 / 2, 24 / 96), (BLUE, 3 / 4, 40 / 96), (ORANGE, 3 / 4, 84 / 96)):
        assert abs(at(frame, y, x, margin=3) - colour).max(1).min() < 20
    assert "--preview" in run(look, code=1) and "--model" in run(f"{look} What?", code=1)
