"""Evaluation: what counts as an answer, each question exactly once, the judge, and a question of your own."""

import http.server
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapes
import torch
from checkpoints import FAMILIES, make_checkpoint
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoTokenizer

import data
import eval as evaluation
import model as models

TOP = Path(__file__).resolve().parent.parent
OPTIONS = {"A": "Sleeping", "B": "Licking its nose", "C": "Vitamin C", "D": "A dog"}


# ---- what counts as an answer ----


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("(A) Sleeping", "A"), ("A", "A"), ("A.", "A"), ("A) Sleeping", "A"), ("The answer is (B)", "B"),
        ("(B)", "B"), ("(B).", "B"), ("b", "B"), ("(b) licking", "B"), ("b.", "B"), ("B. Licking", "B"),
        ("B: Licking", "B"), ("Answer: B", "B"), ("Option D", "D"), ("the correct answer is B.", "B"),
        ("The answer is (C) Vitamin C.", "C"), ("  (D)\n", "D"), ("B\nIt licks.", "B"),
        ("(B) Licking its nose. The answer is (B)", "B"), ("(D) A dog", "D"), ("(B) I see a dog", "B"),
        ("(c) Vitamin C", "C"),
        ("**B**", "B"), ("**B.** Running", "B"), ("**B. Licking its nose**", "B"), ("**(B)** Licking", "B"),
        ("The answer is **B**.", "B"), ("**Answer:** (B)", "B"), ("**Answer: B**", "B"),
        ("**C**\n\nIt is.", "C"), ("**(C) Vitamin C**", "C"), (r"\boxed{B}", "B"), (r"$\boxed{B}$", "B"),
        (r"The answer is \boxed{\text{B}}.", "B"), (r"\boxed{(b)}", "B"),
        (r"\boxed{B. Licking its nose}", "B"),
        ("", None), ("   ", None), ("A dog runs", None), ("a dog runs", None), ("E", None),
        ("(E) Eating", None),
        ("The answer is a dog that runs", None), ("A or B", None), ("(A) or (B)", None), ("A, B", None),
        ("AB", None), ("A B", None), ("A. B.", None), ("A\nB", None), ("(A) and B)", None),
        ("Because of (A)", None), ("I think it is B", None), ("Bees", None), ("(Both)", None),
        ("B is right", None), ("A.M.", None), ("answer", None), ("()", None), ("ÄA", None),
        ("(A)sleep", None), ("**A** dog runs", None), ("**A** or **B**", None), ("**A**sleep", None),
        ("**E**", None), (r"\boxed{A} or \boxed{B}", None), (r"\boxed{A dog runs}", None),
        (r"\boxed{}", None),
        ("****", None),
        ("A. Sleeping B. Licking", None), ("A: sleeping, B: licking", None), ("(A) x, B: y", None),
        ("(a) sleeping or (b)", None), ("B. Licking its nose. It is (b).", "B"), ("B. (B) B: Licking", "B"),
    ],
)  # fmt: skip
def test_a_letter_is_read_strictly(reply, letter):
    assert evaluation.choose(reply, OPTIONS) == (letter, "letter" if letter else "none")


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("sleeping", "A"),
        ("Vitamin C.", "C"),
        ("a dog", "D"),
        ("The answer is a dog", "D"),
        ("**a dog.**", "D"),
    ],
)
def test_an_options_whole_text_is_an_answer(reply, letter):
    assert evaluation.choose(reply, OPTIONS) == (letter, "text")
    assert evaluation.choose(reply + "s", OPTIONS) == (None, "none")
    assert evaluation.choose(reply, OPTIONS | {"E": OPTIONS[letter]}) == (None, "none"), (
        "two options with the same text"
    )


def test_an_options_text_may_begin_like_an_announcement_or_end_like_a_letter():
    options = {"A": "Answer the phone", "B": "Option trading", "C": "4", "D": "Vitamin C"}
    assert evaluation.choose("Answer the phone", options) == ("A", "text")
    assert evaluation.choose("option trading.", options) == ("B", "text")
    assert evaluation.choose("The answer is option trading", options) == ("B", "text")
    assert evaluation.choose("(d) Vitamin C", options) == ("D", "letter")
    assert evaluation.choose("d) vitamin C", options) == ("D", "letter")
    assert evaluation.choose("(b) Vitamin C", options) == (None, "none"), "C is a second letter here"


def test_a_type_that_is_called_as_another_row_keeps_its_own():
    kinds = ["all", "about regions", "", "(no type)"]
    questions = [{"type": kind, "regions": kind != "", "answer": "a", "reply": "a"} for kind in kinds]
    rows = evaluation.score(questions, {"exact": "reply"})
    counts = {row: columns["questions"] for row, columns in rows.items()}
    assert counts["type all"] == counts["type about regions"] == counts["(no type)"] == 1
    assert counts["about regions"] == 3 and counts["all"] == 4 and counts["type (no type)"] == 1
    kinds = ["type large", "small", "large", "large"]
    questions = [{"type": kind, "regions": True, "answer": "a", "reply": "a"} for kind in kinds]
    for question, area in zip(questions, (9, 1024, 1025, 9216)):
        question["area"] = area
    rows = evaluation.score(questions, {"exact": "reply"})
    counts = {row: columns["questions"] for row, columns in rows.items()}
    types = {"type large": 2, "type small": 1, "type type large": 1}
    assert counts == types | {"small": 1, "medium": 2, "large": 1, "all": 4}


@pytest.mark.parametrize(
    "area, size",
    [(1, "small"), (1023.9, "small"), (1024, "medium"), (9215.9, "medium"), (9216, "large"), (1e7, "large")],
)
def test_the_row_of_a_size_holds_what_is_right_in_it(area, size):
    """Two questions of the size, one of them right, one of another size and one without."""
    other = 1 if area >= 1024 else 1024
    questions = [(area, "a"), (area, "b"), (other, "a"), (None, "a")]
    questions = [
        {"type": "x", "regions": True, "answer": "a", "reply": reply} | ({"area": area} if area else {})
        for area, reply in questions
    ]
    rows = evaluation.score(questions, {"exact": "reply"})
    assert rows[size]["exact"] == {"right": 1, "asked": 2}
    assert rows["all"]["exact"] == {"right": 3, "asked": 4} and len(rows) == 4
    del questions[2]
    assert list(evaluation.score(questions, {"exact": "reply"})) == ["x", "all"], "one size is no news"


def test_entries_without_an_answer_do_not_choose_the_constant_answer():
    """Worked by hand: three entries have no answer that can be read, and always saying A is right twice."""
    question = {"type": "x", "regions": True, "choice": None}
    questions = [question | {"answer": answer} for answer in (None, None, None, "A", "A", "B")]
    rows = evaluation.score(questions, {"accuracy": "choice"})
    assert rows["all"]["constant"] == {"right": 2, "asked": 6}
    rows = evaluation.score(questions[:3], {"accuracy": "choice"})
    assert rows["all"]["constant"] == {"right": 0, "asked": 3}


def test_accuracy_by_type_worked_by_hand(tmp_path, capsys):
    listed = ["(A) Sleeping", "(B) Licking its nose", "(C) Running"]
    box = [{"5": {"segmentation": evaluation.box(1, 2, 30, 40)}}]
    entry = {
        "video": "a.mp4",
        "Question": "What is <object0><region> doing?",
        "options": listed,
        "frame_idx": "5",
        "annotation": box,
    }
    truth = [("x", 0), ("x", 1), ("y", 2), ("y", 0), ("y", 2)]
    questions = [
        entry | {"id": 10 + i, "type": kind, "Answer": listed[right]} for i, (kind, right) in enumerate(truth)
    ]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    replies = {
        14: "running.",
        13: "",
        12: "(C) Running",
        11: "A",
        10: "a",
    }  # right, none, right, wrong, right
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": i, "pred": reply}) + "\n" for i, reply in replies.items())
    )
    evaluation.main(["--bench-q", str(tmp_path / "q.json"), "--score", str(tmp_path / "p.jsonl")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["accuracy", "constant"] and rows[1:4] == [
        ["x", "1/2", "50.0", "%", "1/2", "50.0", "%"],
        ["y", "2/3", "66.7", "%", "2/3", "66.7", "%"],
        ["all", "3/5", "60.0", "%", "3/5", "60.0", "%"],
    ]
    assert "name a letter: 3; an option's whole text: 1; neither, which is wrong: 1" in " ".join(rows[4])
    for change, complaint in (
        (replies | {9: "A"}, "p.jsonl: sample 5 (id 9): expected the id of a question, each once"),
        (
            {i: reply for i, reply in replies.items() if i != 12},
            "p.jsonl: expected a prediction for each question, found 'none for 12'",
        ),
    ):
        (tmp_path / "p.jsonl").write_text(
            "".join(json.dumps({"id": i, "pred": reply}) + "\n" for i, reply in change.items())
        )
        with pytest.raises(data.DataError) as error:
            evaluation.main(["--bench-q", str(tmp_path / "q.json"), "--score", str(tmp_path / "p.jsonl")])
        assert complaint in str(error.value)
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": i, "pred": "A"}) + "\n" for i in (10, 11, 12, 13, 14, 12))
    )
    with pytest.raises(data.DataError, match=r"sample 5 \(id 12\): expected the id of a question, each once"):
        evaluation.main(["--bench-q", str(tmp_path / "q.json"), "--score", str(tmp_path / "p.jsonl")])


def test_a_benchmark_whose_ids_repeat_is_refused(tmp_path):
    """Predictions name a question by its id."""
    box = [{"5": {"segmentation": evaluation.box(1, 2, 30, 40)}}]
    entry = {"video": "a.mp4", "caption": "It runs.", "frame_idx": "5", "annotation": box}
    (tmp_path / "d.json").write_text(json.dumps([entry | {"id": id} for id in (3, 4, 3)]))
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": id, "pred": "It sits."}) + "\n" for id in (3, 4))
    )
    with pytest.raises(data.DataError, match=r"d.json: expected each id once, found 3"):
        evaluation.main(
            ["--bench-d", str(tmp_path / "d.json"), "--score", str(tmp_path / "p.jsonl")]
            + ["--judge", "http://localhost", "--out", str(tmp_path / "out")]
        )


def test_the_published_prompt_word_for_word(tmp_path):
    """As upstream's inference_videorefer_q_bench.py and inference_videorefer_d_bench.py write it."""
    masks = [
        {
            "5": {"segmentation": evaluation.box(n, 2, 30, 40)},
            "7": {"segmentation": evaluation.box(n, 3, 30, 40)},
        }
        for n in (1, 9)
    ]
    entry = {"id": 3, "video": "a.mp4", "frame_idx": "7", "annotation": masks, "caption": "It runs."}
    entry |= {
        "Question": "Is <object0><region> near <object1><region>?",
        "options": ["(A) Yes", "(B) No"],
        "Answer": "(B) No",
        "type": "x",
    }
    (tmp_path / "q.json").write_text(json.dumps([entry]))
    (tmp_path / "d.json").write_text(json.dumps([entry | {"annotation": masks[:1]}]))

    def read(name, mode, no_options=False):
        path, kind = str(tmp_path / name), name[0]
        files = {
            "bench_q": path if kind == "q" else None,
            "bench_d": path if kind == "d" else None,
            "media": None,
            "score": None,
            "outside_paths": False,
        }
        sample = evaluation.Bench(SimpleNamespace(mode=mode, no_options=no_options, **files))[0]
        return sample.turns[0], [sorted(frames) for frames in sample.objects]

    text = "Is <object0>[<region>] near <object1>[<region>]? (A) Yes (B) No. "
    text += "Answer with the option's letter from the given choices directly."
    assert read("q.json", "single") == (("<video>\n" + text, "B"), [[7], [7]])
    assert read("q.json", "multi") == (("<video>\n" + text, "B"), [[5, 7], [5, 7]])
    later = {name: value for name, value in entry.items() if name != "annotation"}
    later["masks"] = [{frame: m["segmentation"] for frame, m in frames.items()} for frames in masks]
    (tmp_path / "q2.json").write_text(json.dumps([later]))
    assert read("q2.json", "single")[1] == [[7], [7]] and read("q2.json", "multi")[1] == [[5, 7], [5, 7]]
    (tmp_path / "q2.json").write_text(json.dumps([later | {"frame_idx": "7" * 5000}]))
    with pytest.raises(data.DataError, match="frame_idx: a frame index"):
        read("q2.json", "single")
    assert read("q.json", "single", no_options=True)[0] == ("<video>\nIs <region> near <region>?", "B")
    text = "<video>\nPlease give a detailed description of the highlighted object [<region>] in the video."
    assert read("d.json", "single")[0] == (text, "It runs.")


# ---- each question exactly once ----


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, train_clips=0, test_clips=5)
    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3_vl")


def command(checkpoint, world, out, *more):
    options = ("--mode", "multi", "--max-new-tokens", 4, "--workers", 0, "--device", "cpu")
    return [
        str(a)
        for a in ("--model", checkpoint, "--bench-q", world / "bench_q.json", "--out", out, *options, *more)
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def whole(checkpoint, world, tmp_path_factory):
    """The predictions of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluation.main(command(checkpoint, world, out))
    predictions = lines(out / "predictions.jsonl")
    assert [p["id"] for p in predictions] == list(
        range(len(json.loads((world / "bench_q.json").read_text())))
    )
    assert len({p["pred"] for p in predictions}) > 3, "answers that differ, or nothing is tested"
    return predictions


def test_batched_answers_equal_single_ones(family, world, tmp_path):
    """Left padding, positions and the cache: an answer does not depend on what else is in the batch."""
    model, processor = evaluation.load(family, "cpu")
    samples = data.read_samples(world / "test.json")
    lengths = {len(data.Questions(samples, processor)[n, 0]["input_ids"]) for n in range(10)}
    assert len(lengths) > 1
    found = []
    for batch_size in (1, 4, 10):
        args = SimpleNamespace(
            out=tmp_path / str(batch_size),
            batch_size=batch_size,
            workers=0,
            device="cpu",
            max_new_tokens=8,
        )
        found.append(
            evaluation.ask_all(model, processor, samples, {n: (n, 0) for n in range(10)}, "none", args)
        )
    assert found[0] == found[1] == found[2] and len(set(found[0].values())) > 1


def start(*arguments, ranks=None):
    """eval.py in a process of its own."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    )
    line = [sys.executable, *launcher, "eval.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=TOP, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_run_goes_on_where_it_stopped(checkpoint, world, whole, tmp_path):
    out = tmp_path / "out"
    process = start(*command(checkpoint, world, out, "--batch-size", 1))
    deadline = time.monotonic() + 120
    while not any(path.read_bytes().count(b"\n") >= 2 for path in out.glob("parts/none-0-*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "no line yet"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = out.glob("parts/*")
    before = part.read_bytes()
    assert 2 <= before.count(b"\n") < len(whole) and not (out / "predictions.jsonl").exists()
    part.write_bytes(before + b'{"question": 3, "answer": "to')  # what a kill in the middle of a write leaves
    evaluation.main(command(checkpoint, world, out, "--batch-size", 7))
    answered = [path.read_bytes().count(b"\n") for path in sorted(out.glob("parts/*"))]
    assert answered == [before.count(b"\n"), len(whole) - before.count(b"\n")], "nothing is asked again"
    assert lines(out / "predictions.jsonl") == whole


def test_two_ranks_answer_what_one_does(checkpoint, world, whole, tmp_path):
    out = tmp_path / "out"
    process = start(*command(checkpoint, world, out, "--batch-size", 3), ranks=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert lines(out / "predictions.jsonl") == whole
    assert output.count("accuracy") == 1, "one rank prints"
    shares = [len(lines(path)) for path in out.glob("parts/none-*.jsonl")]
    assert sum(shares) == len(whole) and abs(shares[0] - shares[1]) <= 1


def test_data_on_two_ranks_gives_the_same_table(checkpoint, world, tmp_path):
    (world / "few.json").write_text(json.dumps(json.loads((world / "test.json").read_text())[4:11]))
    common = (
        "--model",
        checkpoint,
        "--data",
        world / "few.json",
        "--control",
        "full",
        "--max-new-tokens",
        2,
        "--workers",
        0,
    )
    evaluation.main([str(a) for a in (*common, "--out", tmp_path / "one", "--device", "cpu")])
    process = start(*common, "--out", tmp_path / "two", "--device", "cpu", ranks=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert lines(tmp_path / "one" / "predictions.jsonl") == lines(tmp_path / "two" / "predictions.jsonl")
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert one["rows"] == two["rows"] and one["loss"] == pytest.approx(two["loss"], rel=1e-6)


MASK = evaluation.box(10, 20, 30, 40)
BAD_ENTRIES = [  # what is wrong with an entry, and its "error"
    ({"options": ["Yes", "No"]}, "options"),
    ({"options": ["(A) Yes", "(A) No"]}, "each letter once"),
    ({"Answer": "(C) Perhaps"}, "Answer: one of the options AB"),
    ({"Answer": None}, "Answer"),
    ({"Question": None}, "Question: a text"),
    ({"Question": "Without a tag?"}, "as many <region> tags"),
    ({"frame_idx": "6"}, "object 0: a mask on frame 6, as frame_idx says, found [3]"),
    ({"frame_idx": None}, "a frame index"),
    ({"annotation": None}, "as many <region> tags"),
    ({"annotation": ["no"]}, "annotation: object 0"),
    (
        {"annotation": [{"3": {"segmentation": None}, "5": {"segmentation": MASK}}]},
        "a mask on frame 3, as frame_idx says, found [5]",
    ),
    (
        {"annotation": [{"3": {"segmentation": {"size": [96, 96], "counts": [5, 6]}}}]},
        "run lengths that sum to",
    ),
    (
        {"annotation": [{"3": {"segmentation": {"size": [96, 96], "counts": [96 * 96]}}}]},
        "a mask that is not empty",
    ),
    ({"annotation": [{"300": {"segmentation": MASK}}], "frame_idx": "300"}, "a frame index below 8"),
    ({"video": "videos/none.mp4"}, "videos/none.mp4"),
    ({"video": "bad.json"}, "bad.json: expected a video, found what FFmpeg can't open"),
]


@pytest.fixture
def bad_file(world):
    """A benchmark whose entries are bad, but for the first and the last; ids from 0. -> its path."""
    entry = {
        "video": "videos/test0000.mp4",
        "frame_idx": "3",
        "annotation": [{"3": {"segmentation": MASK}}],
        "caption": "It is red.",
    }
    entry |= {
        "Question": "Is <object0><region> red?",
        "options": ["(A) Yes", "(B) No"],
        "Answer": "(B) No",
        "type": "x",
    }
    entries = [entry, *(entry | change for change, _ in BAD_ENTRIES), entry]
    (world / "bad.json").write_text(json.dumps([entry | {"id": i} for i, entry in enumerate(entries)]))
    return world / "bad.json"


def run_bad(kind, checkpoint, bad_file, out, *more):
    options = (
        "--model",
        checkpoint,
        "--out",
        out,
        "--max-new-tokens",
        3,
        "--batch-size",
        4,
        "--device",
        "cpu",
    )
    evaluation.main([str(a) for a in (*options, f"--bench-{kind}", bad_file, *more)])
    return lines(out / "predictions.jsonl"), json.loads((out / "scores.json").read_text())


def test_a_bad_entry_is_recorded_and_counts_as_wrong(checkpoint, bad_file, tmp_path, capsys, monkeypatch):
    """It neither ends the run nor leaves the denominator, whoever reads the predictions."""
    monkeypatch.setattr(
        evaluation, "choose", lambda reply, options: ("B", "letter")
    )  # right, whatever is said
    predictions, scores = run_bad("q", checkpoint, bad_file, tmp_path / "out", "--workers", 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last.startswith("16 of 18 questions could not be asked: wrong above;")
        and "bad.json: sample 1 (id 1)" in last
    )
    assert [p["id"] for p in predictions] == list(range(18))
    assert [isinstance(p["pred"], str) for p in predictions] == [True, *[False] * 16, True]
    for n, (_, complaint) in enumerate(BAD_ENTRIES, start=1):
        assert (
            complaint in predictions[n]["error"]
            and f"bad.json: sample {n} (id {n})" in predictions[n]["error"]
        )
    counts = {"right": 2, "asked": 18}
    assert scores["mode"] == "single" and scores["replies"]["pred"] == {"letter": 2, "text": 0, "none": 0}
    assert (
        scores["not_asked"] == 16
        and scores["rows"]["all"]["accuracy"] == scores["rows"]["x"]["accuracy"] == counts
    )
    evaluation.main(
        [
            "--bench-q",
            str(bad_file),
            "--score",
            str(tmp_path / "out" / "predictions.jsonl"),
            "--out",
            str(tmp_path / "scored"),
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1] == last
    again = json.loads((tmp_path / "scored" / "scores.json").read_text())
    assert again == scores and list(scores["rows"]) == ["x", "all"]
    assert again["rows"]["all"]["accuracy"] == counts
    # Another model's predictions: an entry without answer or object counts as wrong; masks are not read.
    theirs = tmp_path / "out" / "theirs.jsonl"
    theirs.write_text("".join(json.dumps({"id": i, "pred": "B"}) + "\n" for i in range(18)))
    evaluation.main(["--bench-q", str(bad_file), "--score", str(theirs), "--out", str(tmp_path / "scored")])
    other = json.loads((tmp_path / "scored" / "scores.json").read_text())
    assert "mode" not in other, "how they were asked is not known"
    assert other["not_asked"] == 8 and other["rows"]["all"]["accuracy"] == {"right": 10, "asked": 18}


def test_media_elsewhere_and_worker_processes_that_are_spawned(bad_file, tmp_path):
    entries = json.loads(bad_file.read_text())
    (tmp_path / "q.json").write_text(
        json.dumps([entries[0] | {"video": str(bad_file.parent / entries[0]["video"])}])
    )
    arguments = ["--bench-q", str(tmp_path / "q.json"), "--score", "p.jsonl"]
    with pytest.raises(data.DataError, match="inside the media folder"):
        evaluation.Bench(evaluation.parse(arguments))[0]
    samples = evaluation.Bench(evaluation.parse([*arguments, "--outside-paths"]))
    assert pickle.loads(pickle.dumps(samples))[0] == samples[0]


def test_a_bad_sample_ends_data_before_anything_is_asked(checkpoint, world, tmp_path):
    samples = json.loads((world / "test.json").read_text())[:3]
    (world / "one_bad.json").write_text(
        json.dumps([*samples, samples[0] | {"id": 9, "video": "videos/none.mp4"}])
    )
    with pytest.raises(data.DataError, match=r"one_bad.json: sample 3 \(id 9\)"):
        arguments = (
            "--model",
            checkpoint,
            "--data",
            world / "one_bad.json",
            "--workers",
            0,
            "--out",
            tmp_path / "out",
            "--device",
            "cpu",
        )
        evaluation.main([str(a) for a in arguments])
    assert os.listdir(tmp_path / "out") == ["run.json"]


def test_a_file_that_vanishes_while_data_is_asked_ends_the_run(checkpoint, world, tmp_path, monkeypatch):
    """Its loss was computed before, so nothing else would notice; None must not count as a wrong answer."""
    original = data.Questions.question

    def question(self, i, turn_index):
        data.expect(i != 1, "a media file", "none")
        return original(self, i, turn_index)

    monkeypatch.setattr(data.Questions, "question", question)
    (world / "vanish.json").write_text(json.dumps(json.loads((world / "test.json").read_text())[:3]))
    options = ("--max-new-tokens", 1, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out")
    with pytest.raises(data.DataError, match="expected a media file"):
        evaluation.main([str(a) for a in ("--model", checkpoint, "--data", world / "vanish.json", *options)])
    assert not (tmp_path / "out" / "scores.json").exists()


def test_a_bad_entry_is_not_judged(checkpoint, bad_file, tmp_path, server, capsys):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    wrong_in_q = 6  # whatever options, Answer or Question are, a description can be asked for
    predictions, scores = run_bad("d", checkpoint, bad_file, tmp_path / "out", "--workers", 0, "--judge", url)
    assert [p["id"] for p in predictions if p["pred"] is None] == list(range(1 + wrong_in_q, 17))
    assert scores["not_asked"] == 10 and scores["pred"]["replies"] == 8 == len(server.asked)
    assert "10 of 18 questions could not be asked: not judged;" in capsys.readouterr().out.splitlines()[-1]


def test_what_could_not_be_asked_is_asked_by_the_next_run(checkpoint, bad_file, tmp_path):
    """A video may be there by then. On two ranks, for errors must cross over as well."""
    arguments = ["--model", checkpoint, "--out", tmp_path / "out", "--bench-q", bad_file]
    arguments += ["--device", "cpu", "--workers", 0]
    process = start(*arguments, ranks=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "16 of 18 questions could not be asked" in output, output[-3000:]
    copy = bad_file.parent / "videos" / "none.mp4"
    copy.write_bytes((bad_file.parent / "videos" / "test0000.mp4").read_bytes())
    try:
        evaluation.main([str(a) for a in arguments])
    finally:
        copy.unlink()
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["not_asked"] == 15
    parts = [line for path in (tmp_path / "out" / "parts").iterdir() for line in lines(path)]
    assert sorted(line["question"] for line in parts) == [0, 15, 17]


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "not valid JSON"),
        ("[]", "q.json: "),
        ('{"questions": []}', "1 of 1 questions cannot be asked"),
        ('[{"id": 1}, {"id": 2}]', "found None \\(2 of 2 questions"),
        (None, "a readable file"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_ends_at_once(tmp_path, content, complaint):
    if content:
        (tmp_path / "q.json").write_text(content)
    with pytest.raises(data.DataError, match=complaint):
        evaluation.main(
            ["--bench-q", str(tmp_path / "q.json"), "--model", "nowhere", "--out", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists(), "the same --out does for the next try"


def test_videos_that_are_all_missing_end_the_run(checkpoint, world, tmp_path):
    """A mistyped --media is no score of 0."""
    with pytest.raises(data.DataError, match="test0000.mp4"):
        evaluation.main(command(checkpoint, world, tmp_path / "out", "--media", tmp_path))
    assert not (tmp_path / "out" / "scores.json").exists()


def test_only_the_same_run_is_gone_on_with(checkpoint, world, whole, tmp_path):
    out = tmp_path / "out"
    evaluation.main(command(checkpoint, world, out))
    for different in (("--mode", "single"), ("--max-new-tokens", 5), ("--no-options",)):
        with pytest.raises(SystemExit, match="name another folder"):
            evaluation.main(command(checkpoint, world, out, *different))
    questions = world / "bench_q.json"
    for changed in (next(checkpoint.glob("*.safetensors")), questions):  # trained anew; edited
        times = changed.stat()
        os.utime(changed, (1, 1))
        with pytest.raises(SystemExit, match="name another folder"):
            evaluation.main(command(checkpoint, world, out))
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    evaluation.main(command(checkpoint, world, out))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "ideas.txt").write_text("mine")
    with pytest.raises(SystemExit, match="name another folder"):
        evaluation.main(command(checkpoint, world, tmp_path / "notes"))


def test_a_run_is_its_task_its_files_in_order_and_its_model(checkpoint, world, tmp_path):
    """The answers in OUT/parts name a question by its index."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "nanorefer.json").write_text("{}")
    a, b = str(world / "test.json"), str(world / "train.json")

    def open_run(*arguments):
        evaluation.open_run(
            evaluation.parse(["--model", str(model), "--out", str(tmp_path / "out"), *arguments])
        )

    open_run("--data", a, b)
    open_run("--data", a, b, "--control", "full")
    for different in (["--data", b, a], ["--data", a], ["--bench-q", a], ["--bench-d", a]):
        with pytest.raises(SystemExit, match="name another folder"):
            open_run(*different)
    for name in ("nanorefer.json", "tokenizer.json"):
        times = (model / name).stat()
        os.utime(model / name, (1, 1))
        with pytest.raises(SystemExit, match="name another folder"):
            open_run("--data", a, b)
        os.utime(model / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    open_run("--data", a, b)
    shutil.rmtree(tmp_path / "out")
    open_run("--bench-q", a)
    with pytest.raises(SystemExit, match="name another folder"):
        open_run("--bench-d", a)


def test_out_may_be_any_folder_that_holds_nothing(checkpoint, world, tmp_path):
    for name in ("empty", "target", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed" / "run.json.0123456789ab.tmp").write_text('{"mod')
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for out in (
        tmp_path / "empty",
        tmp_path / "link",
        tmp_path / "killed",
        tmp_path / "a" / "b",
        f"{tmp_path}/q/",
    ):
        for _ in range(2):
            evaluation.open_run(evaluation.parse(command(checkpoint, world, out)))
    assert (tmp_path / "target" / "run.json").exists() and (tmp_path / "q" / "run.json").exists()


def test_a_question_answered_twice_is_not_scored(checkpoint, world, tmp_path):
    """Two runs at once into one folder, as when ranks outlive a killed torchrun, may do the same work twice.
    Where their answers differ, neither may be scored."""
    out = tmp_path / "out"
    evaluation.main(command(checkpoint, world, out))
    predictions = lines(out / "predictions.jsonl")
    (part,) = out.glob("parts/*")
    (out / "parts" / "none-1-1.jsonl").write_bytes(part.read_bytes())
    evaluation.main(command(checkpoint, world, out))
    assert lines(out / "predictions.jsonl") == predictions
    answers = lines(part)
    answers[3]["answer"] += "?"
    (out / "parts" / "none-1-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    for name in ("predictions.jsonl", "scores.json"):
        (out / name).unlink()
    with pytest.raises(
        data.DataError, match=f"expected one answer to question {answers[3]['question']}, found"
    ):
        evaluation.main(command(checkpoint, world, out))
    assert not (out / "predictions.jsonl").exists() and not (out / "scores.json").exists()


def test_bench_q_asks_the_toy_model_what_data_asks(checkpoint, world, tmp_path, monkeypatch):
    """--no-options gives the model the same tensors that --data does, and counts alike. The model is
    a stand-in whose answer depends on every number of the batch."""
    tests = [s for s in json.loads((world / "test.json").read_text()) if s["type"] != "background"]
    bench = json.loads((world / "bench_q.json").read_text())
    for name, content in (("test", tests), ("bench_q", bench)):
        (world / f"same_{name}.json").write_text(json.dumps(content))
    places = ("left", "right", "above", "below")
    kinds = {
        "colour": list(shapes.COLOURS),
        "shape": shapes.SHAPES,
        "Which way": list(shapes.DIRECTIONS),
        "Where": places,
    }
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def generate(model, batch, end, max_new_tokens, any_rank):
        assert len(batch["ids"]) == 1
        digest = zlib.crc32(
            b"".join(
                value.numpy().tobytes() for key, value in sorted(batch.items()) if torch.is_tensor(value)
            )
        )
        question = tokenizer.decode(batch["input_ids"][0])
        asked = [names for word, names in kinds.items() if word in question][0]
        return [tokenizer(asked[digest % 4])["input_ids"]]

    monkeypatch.setattr(models.ReferringVideoLLM, "generate", generate)
    common = ["--model", str(checkpoint), "--batch-size", "1", "--workers", "0", "--device", "cpu"]
    evaluation.main([*common, "--data", str(world / "same_test.json"), "--out", str(tmp_path / "data")])
    more = ["--mode", "multi", "--no-options", "--out", str(tmp_path / "q")]
    evaluation.main([*common, "--bench-q", str(world / "same_bench_q.json"), *more])
    rows = json.loads((tmp_path / "data" / "scores.json").read_text())["rows"]
    bench_rows = json.loads((tmp_path / "q" / "scores.json").read_text())["rows"]
    for row in ("colour", "shape", "direction", "relation", "all"):
        assert bench_rows[row]["accuracy"] == rows[row]["exact"], row
    assert 0 < bench_rows["all"]["accuracy"]["right"] < bench_rows["all"]["accuracy"]["asked"]
    same = [p["pred"] for p in lines(tmp_path / "q" / "predictions.jsonl")]
    assert same == [p["exact"] for p in lines(tmp_path / "data" / "predictions.jsonl")]


def test_an_answer_ends_at_any_end_token_of_the_checkpoint(loaded, world, monkeypatch):
    """Published checkpoints list several in generation_config.json; the tokenizer names one of them."""
    model, processor = loaded
    passed = []
    monkeypatch.setattr(model.backbone.generation_config, "eos_token_id", [7, 8])
    monkeypatch.setattr(
        model, "generate", lambda batch, end_token_ids, *_: passed.append(end_token_ids) or [[5]]
    )
    evaluation.ask(model, processor, world / "videos" / "test0000.mp4", "What is this?")
    assert {7, 8, processor.tokenizer.eos_token_id} == set(passed[0])


@pytest.fixture
def says_its_coverage(checkpoint, monkeypatch):
    """A stand-in for the model. It answers with the share of the picture that the masks cover, or "none"."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def generate(model, batch, *_):
        assert len(batch["ids"]) == 1
        coverage = batch["regions"]["coverage"]
        return [tokenizer(f"{coverage.mean():.2f}" if len(coverage) else "none")["input_ids"]]

    monkeypatch.setattr(models.ReferringVideoLLM, "generate", generate)


def test_controls_replace_the_masks_of_all_questions_about_regions(
    checkpoint, world, tmp_path, says_its_coverage
):
    """Worked by hand. The object of the first clip fills half of the picture, that of the second a quarter.
    Controls of masks ask only about regions. The last turn of the first sample is about a region as well,
    because an earlier turn has the `<region>`."""
    controls = ("full", "shuffle", "box", "blind")
    half = [{"3": {"segmentation": evaluation.box(0, 0, 48, 96)}}]
    angle = [evaluation.box(0, 0, 48, 24), evaluation.box(0, 24, 16, 72)]  # its box is the other object
    quarter = [{"3": {"segmentation": angle}}]
    turns = [("<video>\nWhere is this?", "none"), ("How large is <region>?", "0.50"), ("Is it?", "0.25")]

    def sample(clip, turns, objects):
        texts = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
        return {
            "video": f"videos/test000{clip}.mp4",
            "conversations": texts,
            "annotation": objects,
            "type": "x",
        }

    samples = [
        sample(0, turns, half),
        sample(1, [("<video>\nHow large is <region>?", "0.50")], quarter),
        sample(1, turns[:1], []),
    ]
    (world / "uneven.json").write_text(json.dumps(samples))
    options = ("--batch-size", 1, "--workers", 0, "--device", "cpu", "--out", tmp_path / "runs" / "1")
    arguments = (
        "--model",
        checkpoint,
        "--data",
        world / "uneven.json",
        "--control",
        *controls,
        *options,
    )
    evaluation.main([str(a) for a in arguments])
    predictions = lines(tmp_path / "runs" / "1" / "predictions.jsonl")
    said = [[p.get(name) for p in predictions] for name in ("exact", *controls)]
    assert said[0] == ["none", "0.50", "0.50", "0.25", "none"]
    assert said[1] == [None, "1.00", "1.00", "1.00", None]
    assert said[2] == [None, "0.25", "0.25", "0.50", None]
    assert said[3] == [None, "0.50", "0.50", "0.50", None]
    assert said[4] == ["none"] * 5
    # The constant answer is chosen apart for questions of a type with regions ("0.50") and without ("none").
    rows = json.loads((tmp_path / "runs" / "1" / "scores.json").read_text())["rows"]
    right = {
        row: [counts[name]["right"] for name in ("exact", *controls, "constant")]
        for row, counts in rows.items()
    }
    asked = {row: [counts[name]["asked"] for name in ("exact", *controls)] for row, counts in rows.items()}
    every, about_regions = [3, 0, 2, 2, 2, 4], [1, 0, 2, 2, 0, 2]
    assert right == {"x": every, "about regions": about_regions, "all": every}
    assert asked == {"x": [5, 3, 3, 3, 5], "about regions": [3] * 5, "all": [5, 3, 3, 3, 5]}


def test_the_area_of_a_question_is_that_of_its_smallest_object(world, tmp_path):
    """Frames of 96x96. The areas are worked by hand, or pycocotools' own."""

    def entry(objects, questions=("What is <region>?",), **more):
        turns = []
        for question in questions:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": "It."}]
        annotation = []
        for masks in objects:
            annotation.append({str(frame): {"segmentation": mask} for frame, mask in masks.items()})
        video = str(world / "videos" / "test0000.mp4")
        return {"video": video, "conversations": turns, "annotation": annotation} | more

    ellipse = np.hypot(*np.ogrid[-3:3:96j, -2:2:96j]) < 1
    at_half = np.zeros((48, 48), np.uint8)
    at_half[7:17, 20:30] = 1
    hidden = {"size": [96, 96], "counts": [96 * 96]}
    small, large = evaluation.box(9, 9, 20, 20), evaluation.box(0, 0, 96, 96)
    both = ["<region> or <region>?", "Sure?"]
    turns = ["Where is this?", "Is it <region>?", "Sure?", "Or <region>?", "Sure?"]
    absent = {"video": str(world / "videos" / "none.mp4")}
    entries = [
        (entry([{3: rle(ellipse)}]), [coco_mask.area(rle(ellipse))]),
        (entry([{3: small, 5: hidden, 6: evaluation.box(0, 0, 60, 60)}]), [(400 + 3600) / 2]),
        (entry([{3: rle(at_half)}]), [400]),
        (entry([{3: evaluation.box(0, 0, 80, 80)}], height=192, width=192), [1600]),
        (entry([{3: small}, {3: large}], both), [400, 400]),
        (entry([{3: small}, {3: large}], turns), [None, 400, 400, 9216, 9216]),
        (entry([], ["Where is this?"]), [None]),
        (entry([{3: hidden}]), [None]),
        (entry([{3: small}]) | absent, [None]),
    ]
    (tmp_path / "areas.json").write_text(json.dumps([entry for entry, _ in entries]))
    samples = data.read_samples(tmp_path / "areas.json", outside_paths=True)
    questions, keys = evaluation.read_questions(samples)
    evaluation.add_areas(questions, keys, samples)
    areas = [area for _, expected in entries for area in expected]
    assert [question.get("area") for question in questions] == areas


# ---- the controls on the benchmarks ----

CONTROLS = ("full", "shuffle", "box", "blind")


@pytest.fixture
def coverage_bench(world):
    """A benchmark about how much of the picture an object covers, as says_its_coverage answers. -> its path.

    The objects of the first two entries cover a half and a quarter of it, which is an angle in the box of
    the first. The first is tiny on all other frames. The third is about no object.
    """
    half, tiny = evaluation.box(0, 0, 48, 96), evaluation.box(9, 9, 8, 8)
    angle = [evaluation.box(0, 0, 48, 24), evaluation.box(0, 24, 16, 72)]
    masks = [[{frame: half if frame == 3 else tiny for frame in range(8)}], [{3: angle}], []]
    entries = []
    for i, (objects, answer) in enumerate(zip(masks, ("(A) 0.50", "(B) 0.25", "(D) none"))):
        entry = {"id": i, "video": f"videos/test000{i}.mp4", "frame_idx": "3", "type": "x", "Answer": answer}
        entry["options"] = ["(A) 0.50", "(B) 0.25", "(C) 1.00", "(D) none"]
        entry["Question"] = "How large is <object0><region>?" if objects else "How large is nothing?"
        entry["caption"] = f"It covers {answer[4:]}."
        entry["annotation"] = [{str(f): {"segmentation": m} for f, m in frames.items()} for frames in objects]
        entries.append(entry)
    (world / "coverage.json").write_text(json.dumps(entries))
    (world / "coverage_d.json").write_text(json.dumps(entries[:2]))
    return world / "coverage.json"


SAID = {
    "pred": ["0.50", "0.25", "none"],
    "full": ["1.00", "1.00", None],
    "shuffle": ["0.25", "0.50", None],
    "box": ["0.50", "0.50", None],
    "blind": ["none", "none", "none"],
}


def test_bench_q_with_every_control(checkpoint, coverage_bench, tmp_path, says_its_coverage, capsys):
    options = ["--model", checkpoint, "--bench-q", coverage_bench, "--batch-size", 1, "--workers", 0]
    options = [str(a) for a in (*options, "--device", "cpu", "--out", tmp_path / "out")]
    evaluation.main([*options, "--control", *CONTROLS])
    output = capsys.readouterr().out
    predictions = lines(tmp_path / "out" / "predictions.jsonl")
    assert {column: [p.get(column) for p in predictions] for column in SAID} == SAID
    assert [p.get("area") for p in predictions] == [48 * 96, 24 * 96, None], (
        "on the frame that is asked about"
    )
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    right = {"accuracy": [3, 3], "full": [0, 2], "shuffle": [0, 2], "box": [1, 2], "blind": [1, 3]}
    assert {column: list(scores["rows"]["all"][column].values()) for column in right} == right
    assert scores["replies"]["full"] == {"letter": 0, "text": 2, "none": 0}
    assert output.splitlines()[0].split() == [*right, "constant"]
    assert "full: replies that name a letter: 0; an option's whole text: 2" in output

    # The predictions can be scored again, whole or without the controls, and say as much.
    files = ["--bench-q", coverage_bench, "--score", tmp_path / "out" / "predictions.jsonl"]
    files = [str(a) for a in (*files, "--out", tmp_path / "again")]
    evaluation.main([*files, "--control", *CONTROLS])
    assert capsys.readouterr().out == output
    assert json.loads((tmp_path / "again" / "scores.json").read_text()) == scores
    evaluation.main(files)
    again = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert list(again["rows"]["all"]) == ["questions", "accuracy", "constant"]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps({"id": i, "pred": "(A)"}) + "\n" for i in range(3)))
    files[3] = str(theirs)
    with pytest.raises(data.DataError, match=r"""theirs.jsonl: sample 0 .*: expected .* with "box", found"""):
        evaluation.main([*files, "--control", "box"])


def test_controls_may_be_added_to_a_run_that_is_done(checkpoint, coverage_bench, tmp_path, says_its_coverage):
    options = ["--model", checkpoint, "--bench-q", coverage_bench, "--batch-size", 1, "--workers", 0]
    options = [str(a) for a in (*options, "--device", "cpu", "--out", tmp_path / "out")]
    for controls in ((), ("box",), ("blind", "box"), ("blind", "blind")):
        evaluation.main([*options, *(["--control", *controls] if controls else [])])
        predictions = lines(tmp_path / "out" / "predictions.jsonl")
        for column in SAID:
            expected = SAID[column] if column in ("pred", *controls) else [None] * 3
            assert [p.get(column) for p in predictions] == expected
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "out" / "parts").iterdir())
    assert names == ["blind", "box", "none"], "each of them asked once"


def test_a_run_that_is_killed_in_a_control_goes_on_there(checkpoint, world, whole, tmp_path):
    """Nothing is asked again, and the run ends with what one that was not killed finds."""
    controls = ("--control", "box", "blind", "full")
    evaluation.main(command(checkpoint, world, tmp_path / "undisturbed", *controls))
    out = tmp_path / "out"
    process = start(*command(checkpoint, world, out, *controls, "--batch-size", 1))
    deadline = time.monotonic() + 120
    while not any(path.read_bytes().count(b"\n") >= 2 for path in out.glob("parts/blind-0-*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "no line yet"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.read_bytes() for path in out.glob("parts/*")}
    assert {path.name.split("-")[0] for path in before} == {"none", "box", "blind"}
    evaluation.main(command(checkpoint, world, out, *controls))
    asked = {name: 0 for name in ("none", "box", "blind", "full")}
    for path in out.glob("parts/*"):
        asked[path.name.split("-")[0]] += path.read_bytes().count(b"\n")
        assert path not in before or path.read_bytes() == before[path]
    assert set(asked.values()) == {len(whole)}, "each question once in each column"
    for name in ("predictions.jsonl", "scores.json"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    predictions = lines(out / "predictions.jsonl")
    assert [p["pred"] for p in predictions] == [p["pred"] for p in whole]
    assert [p["blind"] for p in predictions] != [p["pred"] for p in whole]


def test_bench_d_is_judged_under_every_control(
    checkpoint, coverage_bench, tmp_path, says_its_coverage, server, capsys, monkeypatch
):
    """The marks, worked by hand, are the digits behind the point of what was said: 0.25 means 2 and 5."""
    monkeypatch.setattr(evaluation.time, "sleep", lambda _: None)
    bench = coverage_bench.with_name("coverage_d.json")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    options = [
        "--model",
        checkpoint,
        "--bench-d",
        bench,
        "--batch-size",
        1,
        "--workers",
        0,
        "--device",
        "cpu",
    ]
    options += ["--out", tmp_path / "out", "--judge", url]
    options = [str(a) for a in options]
    said = [SAID[column][i] for column in ("pred", *CONTROLS) for i in range(2)]
    marks = [(0, 0, 0, 0) if text == "none" else (5, 4, *map(int, text[2:])) for text in said]
    server.script = [GOOD.format(*four) for four in marks[:5]] + [503] * evaluation.ATTEMPTS
    with pytest.raises(SystemExit, match="resumes from here"):
        evaluation.main([*options, "--control", *CONTROLS])
    server.script = [GOOD.format(*four) for four in marks[5:]]
    asked = len(server.asked)
    evaluation.main([*options, "--control", *CONTROLS])
    assert len(server.asked) == asked + 5, "the replies that are there are kept"
    questions = [body["messages"][1]["content"] for _, _, body in server.asked]
    questions = questions[:5] + questions[asked:]
    captions = ["It covers 0.50.", "It covers 0.25."] * 5
    for question, caption, text in zip(questions, captions, said, strict=True):
        assert question == f"##Correct answer: {caption}\n##Predicted answer: {text}\n"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    averages = {
        "pred": (5 + 4 + (5 + 2) / 2 + (0 + 5) / 2) / 4,
        "full": (5 + 4 + 0 + 0) / 4,
        "shuffle": (5 + 4 + (2 + 5) / 2 + (5 + 0) / 2) / 4,
        "box": (5 + 4 + 5 + 0) / 4,
        "blind": 0,
    }
    assert {column: scores[column]["means"]["Average"] for column in averages} == averages
    assert all(scores[column]["replies"] == 2 for column in averages)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert list(averages) in table
    assert ["Average", *(f"{mean:.2f}" for mean in averages.values())] in table
    names = {path.name for path in (tmp_path / "out").glob("judged*")}
    assert names == {"judged.jsonl", *(f"judged-{control}.jsonl" for control in CONTROLS)}
    # Fewer columns, and the predictions without the model, need none of that again.
    evaluation.main([*options, "--control", "blind"])
    score = ["--bench-d", bench, "--score", tmp_path / "out" / "predictions.jsonl", "--judge", url]
    evaluation.main([str(a) for a in (*score, "--out", tmp_path / "out", "--control", "blind")])
    assert len(server.asked) == asked + 5
    again = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert again["blind"] == scores["blind"] and again["pred"] == scores["pred"] and "box" not in again


def test_an_entry_that_cannot_be_asked_counts_alike_in_all_columns(
    checkpoint, bad_file, tmp_path, monkeypatch
):
    """A question without its media could be asked all the same: then blind would be right more often."""
    monkeypatch.setattr(evaluation, "choose", lambda reply, options: ("B", "letter"))
    controls = ("--control", "full", "blind", "--workers", 0)
    predictions, scores = run_bad("q", checkpoint, bad_file, tmp_path / "out", *controls)
    for column in ("pred", "full", "blind"):
        assert [isinstance(p[column], str) for p in predictions] == [True, *[False] * 16, True]
    for column in ("accuracy", "full", "blind"):
        assert scores["rows"]["all"][column] == {"right": 2, "asked": 18}
    assert scores["not_asked"] == 16


def test_shuffle_needs_masks_of_other_media(checkpoint, bad_file, tmp_path):
    """It would fail for each question of the last column, after all others had been asked."""
    entry = json.loads(bad_file.read_text())[0]
    same = bad_file.with_name("same_video.json")
    same.write_text(json.dumps([entry, entry | {"id": 1}]))
    with pytest.raises(
        data.DataError, match="several videos or images for --control shuffle, found {'videos/"
    ):
        run_bad("q", checkpoint, same, tmp_path / "out", "--control", "box", "shuffle")
    assert not (tmp_path / "out").exists()


# ---- the judge ----

GOOD = """1. Subject Correspondence: {}
Explanation: yes.
2. Appearance Description: {}
Explanation: Temporal Description: 2 of 5 are.
3. Temporal Description: {}
Explanation: no.
4. Hallucination Detection: {}
Explanation: none."""
MARKDOWN = """**Subject Correspondence**: 5
- Appearance Description: 4/5
## temporal description: **1**
4. Hallucination Detection: 2
Explanation: none."""


@pytest.mark.parametrize(
    "reply, marks",
    [
        (GOOD.format(5, 4, 0, 3), [5, 4, 0, 3]), (MARKDOWN, [5, 4, 1, 2]),
        ("", None), ("I cannot say.", None), (GOOD.format(5, 4, 0, 6), None),
        (GOOD.format(5, 4, 0, 4.5), None), (GOOD.format(5, 4, 0, -1), None),
        (GOOD.format(5, 4, 0, "four"), None), (GOOD.format(5, 4, 0, 35), None),
        (GOOD.format(5, 4, 0, "4 / 5"), [5, 4, 0, 4]), (GOOD.format(5, 4, 0, "4 out of 5"), [5, 4, 0, 4]),
        (GOOD.format(5, 4, 0, "4 - the same dog"), [5, 4, 0, 4]), (GOOD.format(5, 4, 0, "4."), [5, 4, 0, 4]),
        (GOOD.format(5, 4, 0, "4/10"), None), (GOOD.format(5, 4, 0, "4 / 10"), None),
        (GOOD.format(5, 4, 0, "4 out of 10"), None), (GOOD.format(5, 4, 0, "4 /50"), None),
        (GOOD.format(5, 4, 0, "4-5"), None), (GOOD.format(5, 4, 0, "3 to 4"), None),
        (GOOD.format(5, 4, 0, "3 or 4"), None), (GOOD.format(5, 4, 0, "4,5"), None),
        (GOOD.format(5, 4, 0, 3) + GOOD.format(1, 1, 1, 1), None),
        ("1. Subject Correspondence: 5\n2. Appearance Description: 4\n3. Temporal Description: 5", None),
        # An aspect without a mark took the number of the next line for one.
        ("1. Subject Correspondence:\n2. Appearance Description:\n3. Temporal Description: 4\n"
         "4. Hallucination Detection: 5", None),
        # A mark and the number of the next line were taken for a range.
        ("- 1. Subject Correspondence: 5\n- 2. Appearance Description: 4\n- 3. Temporal Description: 1\n"
         "- 4. Hallucination Detection: 2\n- 5 in all", [5, 4, 1, 2]),
    ],
)  # fmt: skip
def test_marks_are_read_strictly(reply, marks):
    assert evaluation.read_marks(reply) == (dict(zip(evaluation.ASPECTS, marks)) if marks else None)


class Judge(http.server.BaseHTTPRequestHandler):
    """Does what the server's script says next: a text to reply, a status, "hang", "cut" or "garbage".
    At the end of the script it replies with four fours."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        act = self.server.script.pop(0) if self.server.script else GOOD.format(4, 4, 4, 4)
        if act == "hang":
            self.server.release.wait(30)
        if isinstance(act, int):
            self.send_error(act)
            return
        reply = json.dumps(
            {"model": "local-1", "choices": [{"message": {"role": "assistant", "content": act}}]}
        ).encode()
        reply = {"garbage": b"<html>", "empty": b'{"choices": []}', "hang": b""}.get(act, reply)
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply) + (50 if act == "cut" else 0)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        server.daemon_threads, server.script, server.asked, server.release = True, [], [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def described(tmp_path, monkeypatch):
    """Three descriptions to judge, the waits recorded in place of waited."""
    mask = [{"5": {"segmentation": evaluation.box(1, 2, 30, 40)}}]
    entries = [
        {"id": i, "video": "a.mp4", "caption": f"It runs {i}.", "frame_idx": "5", "annotation": mask}
        for i in range(3)
    ]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": i, "pred": f"It sits {i}."}) + "\n" for i in range(3))
    )
    waits = []
    monkeypatch.setattr(evaluation.time, "sleep", waits.append)
    monkeypatch.setattr(evaluation, "JUDGE_TIMEOUT", 0.3)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path, waits


def judged(folder, server, *more):
    files = ["--bench-d", folder / "d.json", "--score", folder / "p.jsonl", "--out", folder / "out"]
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    evaluation.main([str(a) for a in (*files, "--judge", url, "--judge-model", "some-judge", *more)])
    return json.loads((folder / "out" / "scores.json").read_text())


def test_a_judge_that_answers_well(described, server, monkeypatch, capsys):
    folder, waits = described
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.script = [GOOD.format(5, 4, 3, 2), GOOD.format(1, 1, 1, 1), GOOD.format(0, 4, 5, 0)]
    scores = judged(folder, server)
    result = scores["pred"]
    assert list(result["means"].values()) == pytest.approx([2, 3, 3, 1, 2.25])
    assert (result["replies"], result["failed"], result["models"]) == (3, 0, ["local-1"])
    assert (scores["judge"], waits) == ("some-judge", [])
    path, key, body = server.asked[1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "some-judge")
    assert body["temperature"] == 0, "otherwise two runs of the same judge give different scores"
    assert body["messages"][1]["content"] == "##Correct answer: It runs 1.\n##Predicted answer: It sits 1.\n"
    output = capsys.readouterr().out
    assert (
        "some-judge" in output
        and "local-1" in output
        and "3 replies, 0 of them" in output
        and "secret" not in output
    )
    assert "secret" not in (folder / "out" / "judged.jsonl").read_text()
    assert judged(folder, server) == scores and len(server.asked) == 3, "lines that are there are kept"
    assert not (folder / "out" / "predictions.jsonl").exists(), (
        "--score writes none: they may be another run's"
    )


def test_a_judge_that_answers_badly_is_counted(described, server, capsys):
    folder, _ = described
    server.script = ["Five stars!", None, GOOD.format(5, 4, 3, 2)]
    result = judged(folder, server)["pred"]
    assert (result["replies"], result["failed"]) == (3, 2)
    assert list(result["means"].values()) == [5, 4, 3, 2, 3.5]
    assert "3 replies, 2 of them without four scores" in capsys.readouterr().out
    assert [line["reply"] for line in lines(folder / "out" / "judged.jsonl")] == [
        "Five stars!",
        "",
        GOOD.format(5, 4, 3, 2),
    ]


def test_none_of_the_replies_readable(described, server, capsys):
    server.script = ["?"] * 3
    assert set(judged(described[0], server)["pred"]["means"].values()) == {None}


@pytest.mark.parametrize("fault", [500, 408, 409, 429, "hang", "garbage", "empty", "cut"])
def test_a_judge_that_falters_is_asked_again(described, server, fault):
    folder, waits = described
    server.script = [fault, fault, GOOD.format(5, 4, 3, 2)]
    assert judged(folder, server)["pred"]["failed"] == 0
    assert waits == [2, 4] and len(server.asked) == 5


def test_a_judge_that_is_gone_ends_the_run_and_the_next_goes_on(described, server):
    folder, waits = described
    server.script = [GOOD.format(5, 4, 3, 2)] + [503] * 6
    with pytest.raises(SystemExit, match="attempt 6 of 6: HTTPError: HTTP Error 503") as error:
        judged(folder, server)
    assert waits == [2, 4, 8, 16, 30] and "resumes from here" in str(error.value)
    with open(folder / "out" / "judged.jsonl", "a") as file:
        file.write('{"id": 1, "capt')  # and a kill tore a line
    server.asked.clear()
    assert judged(folder, server)["pred"]["replies"] == 3 and len(server.asked) == 2
    assert [line["id"] for line in lines(folder / "out" / "judged.jsonl")] == [0, 1, 2]


def test_nobody_listens(described):
    folder, _ = described
    nowhere = SimpleNamespace(server_address=("127.0.0.1", 9))
    with pytest.raises(SystemExit, match="attempt 6 of 6: URLError"):
        judged(folder, nowhere)


def test_a_wrong_key_is_not_tried_twice(described, server):
    server.script = [401]
    with pytest.raises(SystemExit, match="attempt 1 of 6: HTTPError: HTTP Error 401"):
        judged(described[0], server)
    assert len(server.asked) == 1


def test_marks_that_two_runs_at_once_gave_are_not_mixed(described, server):
    folder, _ = described
    judged(folder, server)
    path = folder / "out" / "judged.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(data.DataError, match="each once, found {'id': 1"):
        judged(folder, server)


def test_marks_of_another_judge_prompt_or_prediction_are_not_mixed_in(described, server):
    folder, _ = described
    judged(folder, server)
    (folder / "system.txt").write_text("Another prompt.")
    for more in (("--judge-model", "another"), ("--judge-prompt", folder / "system.txt")):
        with pytest.raises(data.DataError, match="only what this judge said of these predictions"):
            judged(folder, server, *more)
    (folder / "p.jsonl").write_text((folder / "p.jsonl").read_text().replace("sits 1", "sat 1"))
    with pytest.raises(data.DataError, match="only what this judge said of these predictions"):
        judged(folder, server)


# ---- a question of your own ----


@pytest.fixture(scope="session")
def loaded(checkpoint):
    return evaluation.load(checkpoint, "cpu")


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return encoded | {"counts": encoded["counts"].decode()}


def test_ask_from_the_command_line(checkpoint, loaded, world, tmp_path):
    video = world / "videos" / "test0000.mp4"
    pointed = ["--frame", 3, "--box", "10,20,30,40", "--frame", 0, "--polygon", "10,20,50,20,50,60"]
    pointed += ["--object", "--frame", 3, "--mask", tmp_path / "m.png"]
    mask = np.zeros((96, 96), np.uint8)
    mask[50:70, 60:90] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    question = (
        "--ask",
        "Is <region> near <region>?",
        "--max-new-tokens",
        6,
        "--device",
        "cpu",
        "--preview",
        tmp_path / "p.png",
    )
    process = start("--model", checkpoint, "--video", video, *pointed, *question)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    objects = [{3: evaluation.box(10, 20, 30, 40), 0: [10, 20, 50, 20, 50, 60]}, {3: mask}]
    answer = evaluation.ask(*loaded, video, "Is <region> near <region>?", objects, max_new_tokens=6)
    assert answer and output.rstrip().endswith(answer)
    # The preview shows what python data.py shows of the same objects in a data file.
    turns = [{"from": "human", "value": question[1]}, {"from": "gpt", "value": "-"}]
    masks = [
        {str(f): {"segmentation": m} for f, m in frames.items()} for frames in (objects[0], {3: rle(mask)})
    ]
    entry = {"video": str(video), "conversations": turns, "annotation": masks}
    (tmp_path / "one.json").write_text(json.dumps([entry]))
    samples = data.read_samples(tmp_path / "one.json", outside_paths=True)
    dataset = data.ReferringDataset(samples, loaded[1])
    expected = np.asarray(data.preview(dataset, [0], frames_shown=2, panel_height=96))
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture.shape == expected.shape and (picture[:, :204] == expected[:, :204]).all(), (
        "two frames of 96 pixels"
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_a_preview_without_regions_shows_the_first_frame(
    checkpoint, loaded, world, tmp_path, monkeypatch, says_its_coverage
):
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    video = world / "videos" / "test0000.mp4"
    arguments = ("--model", checkpoint, "--video", video, "--ask", "What is this?", "--device", "cpu")
    evaluation.main([str(a) for a in (*arguments, "--preview", tmp_path / "p.png")])
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    left, top = 6, 17  # the margin, and the frame's number
    assert (picture[top : top + 96, left : left + 96] == data.open_media(video).read([0])[0]).all()


def test_ask_about_an_image_and_without_a_region(loaded, world):
    image = next((world / "images").glob("*.png"))
    mask = np.zeros((96, 96), bool)
    mask[20:60, 10:40] = True
    as_array = evaluation.ask(*loaded, image, "What is <region>?", [{0: mask}], 6)
    box = evaluation.box(*np.array([10, 20, 30, 40]))
    assert as_array == evaluation.ask(*loaded, image, "What is <region>?", [{0: box}], 6)
    assert (data.decode_mask(box, 96, 96) == mask).all()
    assert isinstance(evaluation.ask(*loaded, image, "What is this?"), str)


def test_an_array_becomes_the_mask_it_was():
    rng = np.random.default_rng(0)
    for mask in (rng.random((5, 7)) < 0.5, np.ones((3, 4)), np.eye(4), np.eye(4)[::-1] * 7):
        assert (data.decode_mask(evaluation.to_segmentation(mask), *mask.shape) == (mask != 0)).all()
    with pytest.raises(data.DataError, match=r"a mask \(H, W\)"):
        evaluation.to_segmentation(np.ones((3, 4, 1)))


def test_a_soft_mask_is_the_object_wherever_it_is_not_0(loaded, world, says_its_coverage):
    soft = np.zeros((96, 96), np.float32)
    soft[:, :48] = 0.2
    assert (
        evaluation.ask(*loaded, world / "videos" / "test0000.mp4", "What is <region>?", [{3: soft}]) == "0.50"
    )


def test_a_box_is_inside_a_picture_that_is_wider_than_high(
    loaded, checkpoint, tmp_path, monkeypatch, capsys, says_its_coverage
):
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    Image.new("RGB", (128, 64)).save(tmp_path / "wide.png")
    common = (
        "--model",
        checkpoint,
        "--image",
        tmp_path / "wide.png",
        "--ask",
        "What is <region>?",
        "--device",
        "cpu",
    )
    for pointed in (("--box", "96,0,32,64"), ("--polygon", "96,0,128,0,128,64,96,64")):
        evaluation.main([str(a) for a in (*common, *pointed)])
        assert capsys.readouterr().out == "0.25\n"
    for pointed in (("--box", "0,40,32,32"), ("--polygon", "0,0,32,0,32,72"), ("--box", "100,0,32,64")):
        with pytest.raises(data.DataError, match="inside the picture, 128x64"):
            evaluation.main([str(a) for a in (*common, *pointed)])


def test_a_mask_that_is_no_picture_is_named():
    for path, complaint in (
        ("absent.png", "No such file or directory: 'absent.png'"),
        (__file__, "cannot identify image file"),
    ):
        with pytest.raises(OSError, match=complaint):  # which the command line turns into its one line
            evaluation.main(
                ["--model", "m", "--video", "v", "--frame", "3", "--mask", path, "--ask", "What is <region>?"]
            )


@pytest.mark.parametrize(
    "pointed, complaint",
    [
        (["--frame", "3", "--box", "80,10,30,30"], "inside the picture, 96x96"),
        (["--frame", "3", "--polygon", "nan,1,3,4,5,6"], "inside the picture"),
        (["--frame", "3", "--polygon", "1,2,3,4"], "at least 3 points"),
        (["--frame", "3", "--polygon", "1,2,3,4,5,200"], "inside the picture"),
        (["--frame", "8", "--box", "1,2,30,40"], "expected a frame index below 8"),
        (["--frame", "-1", "--box", "1,2,30,40"], "a frame index"),
        (["--box", "1,2,30,40"], "--frame before the first mask"),
        (["--frame", "3", "--box", "1,2,30,40", "--box", "1,2,30,40"], "one mask a frame"),
        (["--frame", "3", "--box", "1,2,30,40", "--frame", "3", "--box", "1,2,30,40"], "one mask a frame"),
        (["--frame", "3", "--frame", "4", "--box", "1,2,30,40"], "after each --frame, found 'none on {3}'"),
        (["--frame", "3", "--box", "1,2,30,40", "--frame", "4"], "after each --frame, found 'none on {4}'"),
        (["--frame", "3", "--box", "1,2,30,40", "--object", "--box", "1,2,3,4"], "as many <region> tags"),
        ([], "as many <region> tags"),
        (["--frame", "3", "--mask", "wide.png"], "a mask of the frame's shape, 96x96"),
        (["--frame", "3", "--mask", "black.png"], "a mask that is not empty"),
    ],
)
def test_what_is_wrong_with_a_question_gets_one_error(
    world, checkpoint, loaded, tmp_path, monkeypatch, pointed, complaint
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 96), 255, np.uint8)).save("wide.png")
    Image.fromarray(np.zeros((96, 96), np.uint8)).save("black.png")
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    video = str(world / "videos" / "test0000.mp4")
    with pytest.raises(data.DataError) as error:
        evaluation.main(
            [
                "--model",
                str(checkpoint),
                "--video",
                video,
                *pointed,
                "--ask",
                "What is <region>?",
                "--device",
                "cpu",
            ]
        )
    assert complaint in str(error.value)


def test_a_model_of_random_weights_is_not_evaluated():
    with pytest.raises(data.DataError, match="--model: a trained or pretrained model, found 'tiny'"):
        evaluation.load("tiny")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--model", "m"], "required"),
        (
            ["--model", "m", "--ask", "Why?", "--video", "v", "--box", "10,10,20"],
            "--box: invalid x_y_w_h value",
        ),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--box", "a,b,c,d"], "--box: invalid"),
        (
            ["--model", "m", "--ask", "Why?", "--video", "v", "--box", "10,10,0,3"],
            "of a size above 0, found (0.0",
        ),
        (
            ["--model", "m", "--ask", "Why?", "--video", "v", "--box", "10,10,nan,3"],
            "of a size above 0, found (nan",
        ),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--polygon", "1;2"], "--polygon: invalid"),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--frame", "two"], "--frame: invalid"),
        (["--model", "m", "--ask", "Why?"], "--ask needs --video or --image"),
        (["--model", "m", "--data", "x.json", "--box", "1,2,3,4"], "needs --ask"),
        (["--model", "m", "--bench-q", "q.json"], "needs --out"),
        (["--bench-q", "q.json", "--out", "o"], "one of the arguments --model --score is required"),
        (
            ["--model", "m", "--bench-q", "q.json", "--out", "o", "--judge", "http://u"],
            "--judge needs --bench-d",
        ),
        (["--data", "x.json", "--score", "p"], "--score needs"),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--control", "full"], "--control needs --data or"),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--media", "d"], "--media, --outside-paths needs"),
        (
            ["--model", "m", "--ask", "Why?", "--video", "v", "--outside-paths"],
            "--outside-paths needs --data",
        ),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--workers", "0"], "--workers needs --model and"),
        (["--bench-q", "q", "--score", "p", "--batch-size", "4"], "--workers needs --model and --data"),
        (["--bench-q", "q", "--score", "p", "--max-new-tokens", "4"], "--max-new-tokens needs --model"),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--out", "o"], "--out needs"),
        (["--model", "m", "--data", "x.json", "--bench-q", "q.json"], "not allowed with"),
        (
            ["--model", "m", "--bench-d", "d", "--out", "o", "--judge", "h.com/v1"],
            "--judge needs an http",
        ),
        (
            ["--model", "m", "--bench-d", "d", "--out", "o", "--judge", "localhost:80/v1"],
            "--judge needs an http",
        ),
        (
            ["--model", "m", "--bench-d", "d", "--out", "o", "--judge-prompt", "f"],
            "--judge-model needs --judge",
        ),
        (
            ["--model", "m", "--bench-d", "d", "--out", "o", "--judge-model", "f"],
            "--judge-model needs --judge",
        ),
        (["--model", "m", "--data", "x.json", "--mode", "single"], "--mode needs"),
        (["--model", "m", "--ask", "Why?", "--video", "v", "--mode", "multi"], "--mode needs"),
        (["--model", "m", "--data", "x.json", "--no-options"], "--no-options needs"),
        (["--model", "m", "--bench-d", "d", "--out", "o", "--no-options"], "--no-options needs"),
        (
            ["--model", "m", "--data", "x.json", "--batch-size", "0"],
            "--batch-size, --max-new-tokens needs 1 or more",
        ),
        (
            ["--model", "m", "--data", "x.json", "--workers", "-1"],
            "--workers needs 0 or more",
        ),
        (["--model", "m", "--data", "x.json", "--max-new-tokens", "-3"], "needs 1 or more"),
        (["--score", "p.jsonl", "--bench-q", "q.json", "--device", "cpu"], "--device needs --model"),
        (["--score", "p.jsonl", "--bench-d", "d.json"], "--score and --bench-d needs --judge"),
    ],
)
def test_options_that_do_not_go_together(capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        evaluation.main(arguments)
    assert complaint in capsys.readouterr().err


def test_a_judge_prompt_that_is_not_there_is_noticed_before_anything_is_asked(tmp_path):
    options = ["--bench-d", "d.json", "--out", str(tmp_path / "out"), "--judge", "http://h"]
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        evaluation.main(["--model", "nowhere", *options, "--judge-prompt", "absent.txt"])


def test_one_rank_answers_a_question_of_your_own(loaded, world, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    video = str(world / "videos" / "test0000.mp4")
    arguments = ["--model", "m", "--video", video, "--ask", "What is this?", "--device", "cpu"]
    for rank, num_lines in ((1, 0), (0, 1)):
        monkeypatch.setattr(evaluation, "rank", lambda rank=rank: rank)
        evaluation.main(arguments)
        assert capsys.readouterr().out.count("\n") == num_lines


def test_the_readme_keeps_the_samples_whose_videos_are_there(tmp_path, monkeypatch):
    program = (TOP / "README.md").read_text().split("```python\n")[3].split("```")[0]
    assert program.count("500]") == program.count("[500") == 1
    monkeypatch.chdir(tmp_path)
    samples = [{"id": i, "video": f"{i % 3}.mp4"} for i in range(9)]
    Path("videorefer-short-caption-500k.json").write_text(json.dumps(samples))
    Path("videos").mkdir()
    Path("videos/0.mp4").touch()
    Path("videos/2.mp4").touch()
    exec(program.replace("500]", "2]").replace("[500", "[2"), {})
    files = ("held_out.json", "captions.json")
    ids = [[sample["id"] for sample in json.loads(Path(name).read_text())] for name in files]
    assert ids == [[0, 2], [3, 5, 6, 8]]


def test_what_the_readme_shows_runs(checkpoint, world, tmp_path, monkeypatch, capsys):
    """Its three lines of Python, with a toy video, and the options of each of its commands."""
    readme = (TOP / "README.md").read_text()
    program = readme.split("```python\n")[1].split("```")[0]
    for shown, toy in (
        ("out/final", checkpoint),
        ("a.mp4", world / "videos" / "test0000.mp4"),
        ("{36", "{3"),
        ("100, 50, 200, 80", "10, 5, 20, 8"),
    ):
        assert program.count(shown) == 1
        program = program.replace(shown, str(toy))
    exec(program, {})
    assert capsys.readouterr().out.strip()
    commands = re.findall(
        r"^(?:python|torchrun[^\n]*?) eval\.py (.*)$",
        readme + evaluation.__doc__.replace("\n    ", "\n"),
        re.MULTILINE,
    )
    assert len(commands) >= 12
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save("cup.png")
    Path("system.txt").write_text("Judge.")
    for line in commands:
        evaluation.parse(shlex.split(line, comments=True))
