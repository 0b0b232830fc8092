"""python train.py --data FILE --check: what it counts, what it finds, and that nothing hangs it."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapes
from matplotlib.axes import Axes
from PIL import Image

import data
import train

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
    command = ["--data", write(folder, samples), "--check", "--workers", "0", *map(str, options)]
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            train.train(train.parse(command))
        except SystemExit as error:
            status = error.code
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


def test_counts_of_right_data(folder, tmp_path):
    command = [
        sys.executable,
        "train.py",
        "--data",
        write(folder, RIGHT),
        "--check",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 0 and "6 samples, 6 of them right" in done.stdout
    kinds = ("video, regions on one frame", "video, regions on several frames", "image, regions on one frame")
    for name in (*kinds, "image, no regions", "video, no regions", "text only, no regions"):
        assert f"{name} 1" in done.stdout
    assert "objects: min 0, median 1, max 1" in done.stdout
    assert "frames: min 1, median 8, max 8" in done.stdout
    assert "96x96 3" in done.stdout and "64x32 2" in done.stdout
    assert re.search(r"tokens: min \d+, median \d+, max \d+", done.stdout)
    assert not (tmp_path / "out").exists()


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
        and "below 8, the number of frames, found 8" in named["sample 9 (id 'late')"]
    )


def test_a_sample_that_kills_its_reader_ends_with_one_line(folder):
    code = "import os, train; train.CheckedDataset.__getitem__ = lambda dataset, i: os.kill(os.getpid(), 9)"
    command = ["-c", f"{code}; train.main()", "--data", write(folder, RIGHT), "--check", "--workers", "1"]
    done = subprocess.run([sys.executable, *command], cwd=TOP, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search("^error: DataLoader worker .*(killed|exited unexpectedly)", done.stderr, re.M)


def check_as(folder, monkeypatch, read, *options):
    """Checks six samples, each of which is read by this function."""
    monkeypatch.setattr(train.CheckedDataset, "__getitem__", read)
    check(folder, RIGHT, *options)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_code_itself_is_not_taken_for_a_crash(folder, monkeypatch, workers):
    def read(dataset, i):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        check_as(folder, monkeypatch, read, "--workers", workers)


def test_masks_are_checked_on_frames_that_training_might_not_choose(folder, tmp_path):
    masks = {str(k): {"segmentation": [[1, 1, 9, 1, 9, 9]]} for k in range(8)}
    wrong = (5, {}, [], "x", {"size": [4, 4]}, {"size": [4, 4], "counts": [3]}, [[1, 1, 9, 1]])
    annotations = [masks, *(masks | {"5": {"segmentation": mask}} for mask in wrong)]
    samples = [{"video": "a.mp4", "conversations": TURNS, "annotation": [masks]} for masks in annotations]
    problems = tmp_path / "problems.jsonl"
    status, output = check(folder, samples, "--region-frames", 2, "--problems", problems)
    assert status == 1 and "8 samples, 1 of them right" in output
    places = [json.loads(line)["places"] for line in problems.read_text().splitlines()]
    assert [place[1] for place in places] == [f"sample {i}" for i in range(1, 8)]
    assert all("object 0" in place and place[-1] == "frame 5" for place in places)


@pytest.fixture
def drawn(monkeypatch):
    """The pictures that the preview shows, [(title, array)]."""
    found, imshow, set_title = [], Axes.imshow, Axes.set_title

    def note_picture(ax, picture):
        found.append(["", picture])
        return imshow(ax, picture)

    def note_title(ax, title, **options):
        found[-1][0] = title
        return set_title(ax, title, **options)

    monkeypatch.setattr(Axes, "imshow", note_picture)
    monkeypatch.setattr(Axes, "set_title", note_title)
    return found


def test_preview_shows_mask_cells(folder, tmp_path, drawn):
    """A white picture, 2 : 1, a box over its left half: the cells there are bright, the others dark."""
    sample = {"image": "white.png", "conversations": TURNS, "annotation": [{"0": box(0, 0, 32, 32)}]}
    status, _ = check(folder, [sample], "--window", 0, "--preview", tmp_path / "p.png")
    assert status == 0 and os.listdir(tmp_path) == ["p.png"]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    (title, frame), (name, cells) = drawn
    assert (title, name) == ("frame 0", "encoded for 1") and frame.shape == (32, 64, 3)
    half = cells.shape[1] // 2
    assert (frame == 255).all() and (cells[:, :half] == 255).all() and (cells[:, half:] == 38).all()


def test_preview_shows_the_windows_that_are_encoded(folder, tmp_path, drawn):
    """Two objects of 8 x 8 pixels, in opposite corners of a white picture of 64 x 32. After it come their
    windows of 16 x 16, with a quarter of the cells lit: upper left and lower right."""
    turns = [{"from": "human", "value": "<region> or <region>?"}, {"from": "gpt", "value": "red"}]
    masks = [{"0": box(0, 0, 8, 8)}, {"0": box(56, 24, 8, 8)}]
    sample = {"image": "white.png", "conversations": turns, "annotation": masks}
    status, output = check(folder, [sample], "--window", 2, "--preview", tmp_path / "p.png")
    assert status == 0 and [title for title, _ in drawn] == ["frame 0", "encoded for 1", "encoded for 2"]
    dim = int(0.15 * 255)
    for (_, window), expected in zip(drawn[1:], ([[255, dim], [dim, dim]], [[dim, dim], [dim, 255]])):
        side = len(window)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            quarter = window[i * side // 2 : (i + 1) * side // 2, j * side // 2 : (j + 1) * side // 2]
            assert (quarter == expected[i][j]).all()
    # With whole frames, both objects cover a quarter of a cell in the same view.
    drawn.clear()
    check(folder, [sample], "--window", 0, "--preview", tmp_path / "p.png")
    assert [title for title, _ in drawn] == ["frame 0", "encoded for 1 2"]
    cells, cell = drawn[1][1], len(drawn[1][1]) // 2
    lit = [[255, dim, dim, dim], [dim, dim, dim, 255]]
    assert cells[cell // 2 :: cell, cell // 2 :: cell, 0].tolist() == lit


def test_preview_draws_any_right_sample(folder, tmp_path):
    """Also an object smaller than a pixel, formulas, text alone, and media without regions."""
    rle = {"size": [320, 640], "counts": [0, 1, 320 * 640 - 1]}
    tiny = {"image": "white.png", "conversations": TURNS, "annotation": [{"0": {"segmentation": rle}}]}
    turns = [{"from": "human", "value": "What is $x_"}, {"from": "gpt", "value": "$\\frac{"}]
    for sample in (tiny, *RIGHT, {"conversations": turns}):
        status, output = check(folder, [sample], "--preview", tmp_path / "p.png")
        assert status == 0 and f"drawn: {tmp_path / 'p.png'}" in output
        (tmp_path / "p.png").unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_media_are_checked_whatever_the_number_of_workers(folder, workers):
    """With --workers 0 no media were opened, and the exit status was 0."""
    status, output = check(folder, [RIGHT[0] | {"video": "absent.mp4"}], "--workers", workers)
    assert status == 1 and "1 samples, 0 of them right" in output and "absent.mp4" in output


def test_medians_are_those_of_all_samples(folder):
    """Five images with 1, 1, 1, 2 and 5 objects: the median counts samples, not distinct values."""
    samples = []
    for n in (1, 5, 1, 2, 1):
        turns = [{"from": "human", "value": "<region>" * n}, {"from": "gpt", "value": "red"}]
        masks = [{"0": box(9, 9, 9, 9)}] * n
        samples.append({"image": "white.png", "conversations": turns, "annotation": masks})
    _, output = check(folder, samples)
    assert "objects: min 1, median 1, max 5" in output


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
    assert "below 8, the number of frames, found 8" in check(folder, [late], "--region-frames", 2)[1]


def test_a_problem_names_its_file(folder):
    (folder / "other.json").write_text(
        json.dumps([RIGHT[0], {"video": "absent.mp4", "conversations": PLAIN}])
    )
    path = folder / "other.json"
    for options in (["--data", folder / "data.json", path], ["--val", path]):  # the latter --data wins
        status, output = check(folder, [RIGHT[0]], *options)
        assert status == 1 and f"{path}: sample 1" in output and "3 samples, 2 of them right" in output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workers", -1], "--workers: expected a number from 0, found -1"),
        (["--num-frames", 0], "--num-frames: expected a number from 1, found 0"),
        (["--region-frames", -2], "--region-frames: expected a number from 1, found -2"),
        (["--window", -1], "--window: expected a number from 0, found -1"),
        (["--problems", "absent/p.jsonl"], "expected a folder that exists, found 'absent/p.jsonl'"),
        (["--no-check", "--preview", "p.png"], "expected --check for --preview and --problems"),
        (["--no-check", "--problems", "p.jsonl"], "expected --check for --preview and --problems"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(folder, monkeypatch, capsys, options, message):
    command = ["train.py", "--data", write(folder, RIGHT), "--check", *map(str, options)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as error:
        train.main()
    assert message in capsys.readouterr().err + str(error.value)


def test_problems_are_written_as_they_are_found(folder, tmp_path, monkeypatch):
    def read(dataset, i):
        if i == 3:
            raise KeyboardInterrupt
        return data.DataError("expected a, found b", "file", f"sample {i}")

    with pytest.raises(KeyboardInterrupt):
        check_as(folder, monkeypatch, read, "--problems", tmp_path / "problems.jsonl")
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == 3
