"""python data.py FILE: what it counts, what it finds, and that nothing hangs it."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import clips
import numpy as np
import pytest
import shapes
import torch
from PIL import Image

import data

TOP = Path(__file__).resolve().parent.parent
TURNS = [{"from": "human", "value": "What is <region>?"}, {"from": "gpt", "value": "red"}]
PLAIN = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": "red"}]


def box(x, y, w, h):
    return {"segmentation": [x, y, x + w, y, x + w, y + h, x, y + h]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("check")
    shapes.write_video(path / "a.mp4", [np.full((96, 96, 3), 20 * i, np.uint8) for i in range(8)])
    Image.new("RGB", (64, 32), "white").save(path / "white.png")
    return path


def write(folder, samples):
    (folder / "data.json").write_text(json.dumps(samples))
    return str(folder / "data.json")


def check(folder, samples, *options):
    """What the command does with these samples, in this process; -> (exit status, output)."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = data.main([write(folder, samples), *map(str, options)])
    return status, output.getvalue()


RUNS = {"segmentation": {"size": [2, 2], "counts": [1, 3]}}
TWO = {"segmentation": [box(1, 1, 9, 9)["segmentation"], box(20, 1, 9, 9)["segmentation"]]}
RIGHT = [
    {"video": "a.mp4", "conversations": TURNS, "annotation": [{"3": box(10, 10, 40, 40)}]},
    {"video": "a.mp4", "conversations": TURNS, "annotation": [{"0": box(10, 10, 40, 40), "4": RUNS}]},
    {"image": "white.png", "conversations": TURNS, "annotation": [{"0": TWO}]},
    {"image": "white.png", "conversations": PLAIN},
    {"video": "a.mp4", "conversations": PLAIN},
    {"conversations": PLAIN},
]


def test_counts_of_right_data(folder):
    command = [sys.executable, "data.py", write(folder, RIGHT)]
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True, timeout=240)
    status, output = done.returncode, done.stdout
    assert status == 0 and "6 samples, 6 of them right" in output and "3 objects" in output
    kinds = [
        "video, regions on one frame",
        "video, regions on several frames",
        "image, regions on one frame",
        "image, no regions",
    ]
    for name in (*kinds, "video, no regions", "text only"):
        assert f"{name} 1" in output
    assert "one polygon 2" in output and "uncompressed RLE 1" in output and "several polygons 1" in output
    assert (
        "frames per object: min 1, median 1, max 2" in output
        and "frames per video: min 8, median 8, max 8" in output
    )
    assert (
        "96x96 3" in output
        and "64x32 2" in output
        and "stills: min 0, median 1, max 2" in output
        and re.search(r"tokens: min \d+, median \d+, max \d+", output)
    )


def test_problems_are_grouped_and_written_and_set_the_exit_status(folder, tmp_path):
    wrong = [
        {"id": "x", "video": "absent1.mp4", "conversations": PLAIN},
        {"id": "y", "video": "absent2.mp4", "conversations": PLAIN},
        {"id": "tags", "video": "a.mp4", "conversations": PLAIN, "annotation": [{"3": box(10, 10, 40, 40)}]},
        {"id": "late", "video": "a.mp4", "conversations": TURNS, "annotation": [{"8": box(10, 10, 40, 40)}]},
    ]
    problems = tmp_path / "problems.jsonl"
    status, output = check(folder, RIGHT + wrong, "--problems", problems)
    lines = [json.loads(line) for line in problems.read_text().splitlines()]
    assert status == 1 and "10 samples, 6 of them right" in output
    assert (
        "\n2 x " in output
        and output.count("\n1 x ") == 2
        and "sample 6 (id 'x')" in output
        and "sample 7 (id 'y')" in output
    )
    named = {line["places"][1]: ": ".join([*line["places"], line["reason"]]) for line in lines}
    assert len(lines) == 4 and set(named) == {
        f"sample {6 + i} (id '{name}')" for i, name in enumerate(("x", "y", "tags", "late"))
    }
    assert (
        "absent2.mp4" in named["sample 7 (id 'y')"]
        and "a frame index below 8" in named["sample 9 (id 'late')"]
    )
    status, output = check(folder, RIGHT + wrong, "--structure-only")
    assert (
        status == 1 and "10 samples, 9 of them right" in output and "media, regions on one frame 3" in output
    )


class Faulty(torch.utils.data.Dataset):
    """Two of its samples kill the process that reads them."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i in (5, 30):
            os.kill(os.getpid(), signal.SIGKILL)
        return [("tokens", i)]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sample_that_kills_its_reader_is_named_up_to_its_neighbours_and_the_rest_is_read(workers):
    findings = data.check(Faulty(), workers)
    right = np.array(findings.usable)
    lost = np.flatnonzero(~right)
    read = findings.statistics["tokens"]
    assert right.sum() == read.total() and set(read).isdisjoint(lost)
    assert {5, 30} <= set(lost.tolist()) and len(lost) <= 2 * 2 * workers
    for error, *_ in findings.examples.values():
        assert "killed" in str(error) or "exited unexpectedly" in str(error)


class Wrong(Faulty):
    def __getitem__(self, i):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_code_itself_is_not_taken_for_a_crash(workers):
    with pytest.raises(RuntimeError, match="a bug"):
        data.check(Wrong(), workers)


@pytest.mark.parametrize("options", [(), ("--structure-only",)])
def test_masks_are_checked_on_frames_that_training_might_not_choose(folder, options):
    masks = {str(k): {"segmentation": [[1, 1, 9, 1, 9, 9]]} for k in range(20)}
    wrong = [
        masks | {"13": {"segmentation": mask}}
        for mask in (5, {}, [], "x", {"size": [4, 4]}, {"size": [4, 4], "counts": [3]})
    ]
    wrong.append({"1": {"segmentation": [[1, 1, 9, 1]]}})
    status, output = check(
        folder, [{"video": "a.mp4", "conversations": TURNS, "annotation": [m]} for m in wrong], *options
    )
    assert status == 1 and "7 samples, 0 of them right" in output and output.count("object 0: frame 13") == 6


def test_preview_shows_mask_cells_and_conversation(folder, tmp_path):
    """A white picture, 2 : 1, a box over its left half: the cells there are bright, the others dark."""
    sample = {"image": "white.png", "conversations": TURNS, "annotation": [{"0": box(0, 0, 32, 32)}]}
    status, _ = check(folder, [sample], "--preview", tmp_path / "p.png")
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("L")).astype(float)
    assert status == 0 and os.listdir(tmp_path) == ["p.png"]
    height, top = data.PANEL_HEIGHT, data.LINE_HEIGHT
    frame, cells = (picture[y : y + height, 6 : 6 + 2 * height] for y in (top, top + height))
    left, right = slice(40, height - 40), slice(height + 40, 2 * height - 10)
    assert (frame[90:170, left] == 255).all() and (frame[:, right] == 127).all()
    assert (cells[:, left] == 255).all() and cells[:, right].max() < 60
    assert (picture[:, 6 + 2 * data.PANEL_HEIGHT + 20 :] < 128).any()  # the conversation


def test_preview_shows_the_windows_that_are_encoded(folder, tmp_path):
    """Two objects of 8 x 8 pixels, in opposite corners of a white picture of 64 x 32. Below it stand their
    windows of 16 x 16 side by side, numbered, with a quarter of the cells lit: upper left and lower right."""
    turns = [{"from": "human", "value": "<region> or <region>?"}, {"from": "gpt", "value": "red"}]
    masks = [{"0": box(0, 0, 8, 8)}, {"0": box(56, 24, 8, 8)}]
    sample = {"image": "white.png", "conversations": turns, "annotation": masks}
    status, output = check(folder, [sample], "--window", 2, "--preview", tmp_path / "p.png")
    assert status == 0 and "stills: min 3, median 3, max 3" in output  # the whole image, and two windows
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("L")).astype(float)
    side = data.PANEL_HEIGHT - 2  # two windows and a gap of 4 pixels are as wide as the frame
    top = data.LINE_HEIGHT + data.PANEL_HEIGHT + 4
    assert (picture[top : top + side, 6 + side : 10 + side] == 255).all()
    dim = int(0.15 * 255)
    for left, expected in ((6, [[255, dim], [dim, dim]]), (10 + side, [[dim, dim], [dim, 255]])):
        window = picture[top : top + side, left : left + side]
        assert (window[2:14, 2:12] != window[20, 20]).any()  # the number
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            quarter = window[i * side // 2 : (i + 1) * side // 2, j * side // 2 : (j + 1) * side // 2]
            assert (quarter[20:-2, 20:-2] == expected[i][j]).all()
    # With whole frames, both objects cover a quarter of a cell in the same view, which has 2 x 4 cells.
    check(folder, [sample], "--window", 0, "--preview", tmp_path / "p.png")
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("L")).astype(float)
    top, left, cell = data.LINE_HEIGHT + data.PANEL_HEIGHT, 6, data.PANEL_HEIGHT // 2
    cells = picture[top : top + 2 * cell, left : left + 4 * cell][cell // 2 :: cell, cell // 2 :: cell]
    lit = int((0.15 + 0.85 / 4) * 255)
    assert cells.tolist() == [[lit, dim, dim, dim], [dim, dim, dim, lit]]


@pytest.mark.parametrize("workers", [0, 2])
def test_media_are_checked_whatever_the_number_of_workers(folder, workers):
    """With --workers 0 no media were opened, and the exit status was 0."""
    status, output = check(folder, [RIGHT[0] | {"video": "absent.mp4"}], "--workers", workers)
    assert status == 1 and "1 samples, 0 of them right" in output and "absent.mp4" in output


def test_medians_are_those_of_all_samples(folder):
    """Five videos with 1, 1, 1, 2 and 5 annotated frames: the median counts objects, not distinct values."""
    masks = [{str(frame): box(9, 9, 9, 9) for frame in range(n)} for n in (1, 5, 1, 2, 1)]
    samples = [{"video": "a.mp4", "conversations": TURNS, "annotation": [mask]} for mask in masks]
    _, output = check(folder, samples)
    assert "frames per object: min 1, median 1, max 5" in output


def test_outlined_objects_keep_their_pixels_and_the_rest_is_dimmed():
    """A blue square under a red veil would be violet, beside the question what colour it is."""
    picture = np.full((100, 200, 3), (10, 200, 90), np.uint8)
    left, right = np.zeros((100, 200), np.uint8), np.zeros((50, 100), np.uint8)
    left[40:60, 20:60], right[25:35, 60:80] = 1, 1
    drawn = data.draw_regions(picture, [left, None, right])
    inside = (left | np.kron(right, np.ones((2, 2), np.uint8))) == 1
    labels = np.zeros_like(inside)
    labels[25:42, 18:40] = labels[35:52, 118:140] = True  # the numbers, above each
    assert (drawn[inside & ~labels] == picture[inside & ~labels]).all()
    assert (drawn[39, 45] == data.COLOURS[0]).all() and (drawn[60, 45] == data.COLOURS[0]).all()
    assert (drawn[60, 160] == data.COLOURS[2]).all() and (drawn[70, 140] == data.COLOURS[2]).all()
    assert (drawn[90, 100] == picture[90, 100] // 2).all()
    assert (data.draw_regions(picture, [None]) == picture).all()


def test_a_video_that_an_edit_list_cut_is_counted(folder):
    """30 of its frames lie before time 0: some of them are stored, decoded, and never shown."""
    clips.write_video(folder / "cut.mp4", options={"x264-params": "keyint=12:bframes=2"}, pts=range(-30, 42))
    cut = {"video": "cut.mp4", "conversations": PLAIN}
    status, output = check(folder, [cut, cut, RIGHT[0]])
    assert status == 0 and f"1 videos, such as {folder}/cut.mp4, were cut by an edit list" in output
    assert "edit list" not in check(folder, RIGHT)[1]


def test_frames_that_training_might_choose_are_checked_against_the_video(folder):
    """Of 20 annotated frames training shows 8 at most, or one at random, and the checker saw only these 8."""
    masks = {str(k): box(10, 10, 40, 40) for k in range(8)}
    wrong_shape = {"segmentation": {"size": [10, 40], "counts": [100, 300]}}
    far = {"segmentation": [[1, 1, 900, 1, 9, 9]]}
    for frame, mask in (("1", wrong_shape), ("2", far)):
        sample = {"video": "a.mp4", "conversations": TURNS, "annotation": [masks | {frame: mask}]}
        status, output = check(folder, [sample], "--region-frames", 2)
        assert status == 1 and f"object 0: frame {frame}" in output
    late = {"video": "a.mp4", "conversations": TURNS, "annotation": [masks | {"8": box(1, 1, 9, 9)}]}
    assert "a frame index below 8" in check(folder, [late], "--region-frames", 2)[1]


def test_objects_side_by_side_are_drawn_apart_and_one_asked_about_again_is_not():
    """Small objects with similar boxes were taken for one, and the second was never drawn."""
    picture, masks = np.full((400, 400, 3), 90, np.uint8), np.zeros((3, 400, 400), np.uint8)
    masks[0, 200:206, 200:206], masks[1, 200:206, 208:214], masks[2, 300:350, 300:350] = 1, 1, 1
    drawn = data.draw_regions(picture, [*masks, masks[2]])
    colours = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}
    assert {*data.COLOURS[:3]} <= colours and data.COLOURS[3] not in colours


def test_a_problem_names_its_file(folder):
    (folder / "other.json").write_text(
        json.dumps([RIGHT[0], {"video": "absent.mp4", "conversations": PLAIN}])
    )
    _, output = check(folder, [RIGHT[0]], folder / "other.json")
    assert f"{folder}/other.json: sample 1" in output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workers", -1], "--workers: a number from 0, found -1"),
        (["--timeout", 0], "--timeout: a number above 0, found 0"),
        (["--num-frames", 0], "--num-frames: a whole number from 1, found 0"),
        (["--region-frames", -2], "--region-frames: a whole number from 1, found -2"),
        (["--window", -1], "--window: a whole number from 0, found -1"),
        (["--structure-only", "--preview", "p.png"], "--preview without --structure-only"),
        (["--preview", "absent/p.png"], "a file in a folder that exists, found 'absent/p.png'"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(folder, options, message):
    with pytest.raises(data.DataError, match=message):
        check(folder, RIGHT, *options)


def test_problems_are_written_as_they_are_found(folder, tmp_path):
    class Interrupted(Faulty):
        def __getitem__(self, i):
            if i == 3:
                raise KeyboardInterrupt
            return data.DataError("expected a, found b", "file", f"sample {i}")

    with pytest.raises(KeyboardInterrupt):
        data.check(Interrupted(), 0, tmp_path / "problems.jsonl")
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == 3
