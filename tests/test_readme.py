"""README.md keeps what it promises: its commands and snippets run as they stand there, in their order.

The files that they name are small ones of ours: random checkpoints under the names of published models. What
they answer is the concern of the other tests.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import shapes
from checkpoints import make_checkpoint, make_sam
from helpers import TOP, box, read_lines, run, sample, write_json
from PIL import Image
from pycocotools import mask as coco_mask

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (TOP / "README.md").read_text(), re.MULTILINE | re.DOTALL)
# .ci/run runs these. A script of tests/ may take hours.
ELSEWHERE = ("export", "python3 -m venv", "python tests/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy, final):
    """What a user of README has: data, videos, and models under their names."""
    folder = tmp_path_factory.mktemp("user")
    make_checkpoint(folder / "Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl")
    make_sam(folder / "facebook/sam2.1-hiera-tiny")
    shutil.copytree(toy, folder / "toy")
    shutil.copytree(TOP / "tests/bunny", folder / "tests/bunny")
    for name in ("toy/run", "out"):
        shutil.copytree(final, folder / name / "final")
    (folder / "videos").mkdir()
    video, image = folder / "videos/a.mp4", folder / "b.jpg"
    # As large as the coordinates in README need, and longer than frame 36.
    objects = [{"colour": "red", "shape": "square", "r": 10, "path": [(50, 22)]}]
    shapes.write_video(video, [shapes.draw(objects, "navy", 0, scale=4)] * 40)
    for copy in ("a.mp4", "videos/b.mp4"):
        shutil.copy(video, folder / copy)
    Image.fromarray(shapes.draw(objects, "navy", 0, scale=4)).save(image)
    Image.fromarray(shapes.draw(objects, "black", 0, scale=4)).save(folder / "cup.png")
    (folder / "masks/a").mkdir(parents=True)
    for k in range(3):  # of two objects, the second hides at first
        numbers = np.zeros((384, 384), np.uint8)
        numbers[48:128, 160:240] = 1
        numbers[200:220, 10 * k : 20 * k] = 2
        Image.fromarray(numbers).save(folder / f"masks/a/{k:05}.png")
    masks = {36: box(160, 48, 80, 80)}
    captions = [sample("What is <region>?", "A square.", masks, video=name) for name in ("a.mp4", "b.mp4")]
    for name in ("captions", "detailed", "qa", "held_out", "data"):
        write_json(folder / f"{name}.json", captions)
    about = {"type": "x", "frame_idx": "36", "annotation": captions[0]["annotation"]}
    about |= {"Question": "Is <object0><region> red?", "options": ["(A) Yes", "(B) No"]}
    answers = ["(A) Yes", "(B) No", "(B) No", "(A) Yes"]
    bench = [about | {"id": i, "video": f"{'ab'[i % 2]}.mp4", "Answer": answers[i]} for i in range(4)]
    write_json(folder / "VideoRefer-Bench-Q.json", bench)
    write_json(folder / "VideoRefer-Bench-D.json", [entry | {"caption": "It moves."} for entry in bench])
    write_json(folder / "other_model.jsonl", [{"id": i, "pred": answers[i]} for i in range(4)])
    return folder


def test_all_commands_run_as_they_stand_in_the_readme(folder):
    """Truth: a user types them one after another."""
    commands = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    commands = [command for command in commands if not command.startswith(ELSEWHERE)]
    assert len(commands) > 10
    for command in commands:
        program = re.sub(r"^(python|torchrun --nproc_per_node 8) ", "", command)
        program = program.replace("--steps 150", "--steps 2")
        if program.startswith("eval.py judge"):  # it needs a server: see test_eval.py
            assert "--prompt" in run("eval.py judge --help")
            continue
        if command.startswith("torchrun") and "train.py" in command:  # the one that the real torchrun starts
            start = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
            subprocess.run(shlex.split(f"{start} {TOP}/{program}"), cwd=folder, check=True, timeout=600)
            continue
        printed = run(program, ranks=2 if command.startswith("torchrun") else 1, folder=folder)
        if program.startswith("eval.py score"):
            assert re.search(r"all .* 4/4", printed)
    entry = read_lines(folder / "masks.json")[0]
    assert entry["video"] == "a.mp4" and len(entry["annotation"]) == 1
    assert Image.open(folder / "preview.png").width > 500


def test_all_snippets_of_python_run(folder, monkeypatch, capsys):
    """Truth: what they print or write can be used by the commands."""
    monkeypatch.chdir(folder)
    snippets = [text for language, text in BLOCKS if language == "python"]
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    assert capsys.readouterr().out
    first, second = (entry["annotation"][0] for entry in json.loads((folder / "data.json").read_text()))
    assert [*first] == ["0", "1", "2"] and [*second] == ["1", "2"]
    assert coco_mask.area([mask["segmentation"] for mask in second.values()]).tolist() == [200, 400]
    run("train.py --data data.json --check", folder=folder)


def test_each_line_of_the_format_is_a_sample(folder):
    """Of the kinds that its comments name. Training reads all of them, as it reads tests/bunny/data.json."""
    [text] = [text for language, text in BLOCKS if language == "jsonc"]
    lines = [line for line in text.splitlines() if not line.startswith("//")]
    (folder / "format.jsonl").write_text("\n".join(lines))
    printed = run("train.py --data format.jsonl --media tests/bunny --check", folder=folder)
    assert "6 samples, 6 of them" in printed
    kinds = re.search("^kinds: (.*)$", printed, re.M)[1].split("; ")
    expected = ["video, regions on one frame 1", "video, regions on several frames 1", "video, no regions 1"]
    expected += ["image, regions on one frame 1", "image, no regions 1", "text only, no regions 1"]
    assert sorted(kinds) == sorted(expected)


def test_the_files_that_the_readme_names_exist():
    for path in set(re.findall(r"\btests/[\w.]+\.\w+", (TOP / "README.md").read_text())):
        assert (TOP / path).exists(), path
