"""Evaluation: what counts as an answer, each question exactly once, the judge, and a question of your own."""

import contextlib
import http.server
import io
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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import shapes
import torch
from checkpoints import FAMILIES, make_checkpoint
from matplotlib.axes import Axes
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoTokenizer

import data
import eval as evaluation
import model as models
import train

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
    assert evaluation.choose(reply, OPTIONS) == letter


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
    assert evaluation.choose(reply, OPTIONS) == letter
    assert evaluation.choose(reply + "s", OPTIONS) is None
    assert evaluation.choose(reply, OPTIONS | {"E": OPTIONS[letter]}) is None, (
        "two options with the same text"
    )


def test_an_options_text_may_begin_like_an_announcement_or_end_like_a_letter():
    options = {"A": "Answer the phone", "B": "Option trading", "C": "4", "D": "Vitamin C"}
    assert evaluation.choose("Answer the phone", options) == "A"
    assert evaluation.choose("option trading.", options) == "B"
    assert evaluation.choose("The answer is option trading", options) == "B"
    assert evaluation.choose("(d) Vitamin C", options) == "D"
    assert evaluation.choose("d) vitamin C", options) == "D"
    assert evaluation.choose("(b) Vitamin C", options) is None, "C is a second letter here"


def test_a_type_that_is_called_as_another_row_keeps_its_own():
    kinds = ["all", "about regions", "", "(no type)"]
    questions = [{"type": kind, "regions": kind != "", "answer": "a", "exact": "a"} for kind in kinds]
    rows = evaluation.score(questions, ["exact"])
    counts = {row: columns["questions"] for row, columns in rows.items()}
    assert counts["about regions"] == 3 and counts["all"] == 4
    assert counts["type all"] == counts["type about regions"] == 1


def test_entries_without_an_answer_do_not_choose_the_constant_answer():
    """Worked by hand: three entries have no answer that can be read, and always saying A is right twice."""
    question = {"type": "x", "regions": True, "pred_choice": None}
    questions = [question | {"answer": answer} for answer in (None, None, None, "A", "A", "B")]
    rows = evaluation.score(questions, ["pred"], "_choice")
    assert rows["all"]["constant"] == {"right": 2, "asked": 6}
    assert rows["all"]["pred"] == {"right": 0, "asked": 6}
    rows = evaluation.score(questions[:3], ["pred"], "_choice")
    assert rows["all"]["constant"] == {"right": 0, "asked": 3}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_accuracy_by_type_worked_by_hand(tmp_path, capsys):
    listed = ["(A) Sleeping", "(B) Licking its nose", "(C) Running"]
    box = [{"5": {"segmentation": evaluation.box(1, 2, 30, 40)}}]
    entry = {"video": "a.mp4", "Question": "What is <object0><region> doing?", "options": listed}
    entry |= {"frame_idx": "5", "annotation": box}
    truth = [("x", 0), ("x", 1), ("y", 2), ("y", 0), ("y", 2)]
    questions = [
        entry | {"id": 10 + i, "type": kind, "Answer": listed[right]} for i, (kind, right) in enumerate(truth)
    ]
    files = questions_file, replies_file = tmp_path / "q.json", tmp_path / "p.jsonl"
    questions_file.write_text(json.dumps(questions))
    # right, none, right, wrong, right
    replies = {14: "running.", 13: "", 12: "(C) Running", 11: "A", 10: "a"}
    write_lines(replies_file, [{"id": i, "pred": reply} for i, reply in replies.items()])
    evaluation.main(["score", *map(str, files)])
    first, *table = capsys.readouterr().out.splitlines()
    assert first == "pred: 1 replies name no option, and are wrong"
    assert [line.split() for line in table] == [
        ["pred", "constant"],
        ["x", "1/2", "50.0", "%", "1/2", "50.0", "%"],
        ["y", "2/3", "66.7", "%", "2/3", "66.7", "%"],
        ["all", "3/5", "60.0", "%", "3/5", "60.0", "%"],
    ]
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "q.json"], "it writes nothing"
    whole = [{"id": i, "pred": "A"} for i in replies]
    for lines, complaint in (
        (
            [*whole, {"id": 9, "pred": "A"}],
            "p.jsonl: sample 5 (id 9): expected the id of a question, each once",
        ),
        ([*whole, whole[2]], "p.jsonl: sample 5 (id 12): expected the id of a question, each once"),
        (whole[:2] + whole[3:], "p.jsonl: a reply to each question, found 'none to 12'"),
        ([*whole[:4], {"id": 10}], "p.jsonl: sample 4 (id 10): expected id and pred, found {'id': 10}"),
        ([*whole[:4], "A"], "p.jsonl: sample 4: expected id and pred, found 'A'"),
    ):
        write_lines(replies_file, lines)
        with pytest.raises(data.DataError) as error:
            evaluation.main(["score", *map(str, files)])
        assert complaint in str(error.value)
    write_lines(replies_file, [*whole[:4], {"id": 10, "pred": None}])  # the model had nothing to say
    evaluation.main(["score", *map(str, files)])
    output = capsys.readouterr().out
    assert output.startswith("pred: 1 replies name no option") and output.splitlines()[-1].split()[1] == "1/5"
    write_lines(replies_file, [whole[0], whole[1] | {"box": None}, *whole[2:]])  # wrong for box alone
    evaluation.main(["score", *map(str, files)])
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert (last[1], last[4]) == ("2/5", "0/1")


def test_a_benchmark_whose_ids_repeat_is_refused(tmp_path):
    """Predictions name a question by its id."""
    box = [{"5": {"segmentation": evaluation.box(1, 2, 30, 40)}}]
    entry = {"video": "a.mp4", "Question": "Is <region>?", "options": ["(A) Yes"], "Answer": "(A) Yes"}
    entry |= {"frame_idx": "5", "annotation": box}
    (tmp_path / "q.json").write_text(json.dumps([entry | {"id": id} for id in (3, 4, 3)]))
    write_lines(tmp_path / "p.jsonl", [{"id": id, "pred": "A"} for id in (3, 4)])
    with pytest.raises(data.DataError, match=r"q.json: each id once, found \[3, 4, 3\]"):
        evaluation.main(["score", str(tmp_path / "q.json"), str(tmp_path / "p.jsonl")])


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

    def read(name, mode):
        args = {"command": f"bench-{name[0]}", "mode": mode}
        sample = evaluation.Bench(data.read_samples(tmp_path / name), SimpleNamespace(**args))[0]
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
    with pytest.raises(data.DataError, match="a mask of each object on frame .*, as frame_idx says"):
        read("q2.json", "single")
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
    files = ("bench-q", world / "bench_q.json", "--model", checkpoint, "--out", out)
    return [str(a) for a in (*files, *options, *more)]


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
    lengths = {len(evaluation.Questions(samples, processor)[n, 0]["input_ids"]) for n in range(10)}
    assert len(lengths) > 1
    found = []
    for batch_size in (1, 4, 10):
        args = SimpleNamespace(
            out=tmp_path / str(batch_size),
            batch_size=batch_size,
            workers=0,
            max_new_tokens=8,
        )
        questions = [{"sample": n, "turn": 0, "regions": True} for n in range(10)]
        found.append(evaluation.ask_all(model, evaluation.Questions(samples, processor), questions, args))
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
    while not any(path.read_bytes().count(b"\n") >= 2 for path in out.glob("parts/none-0.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "no line yet"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = out.glob("parts/*")
    before = part.read_bytes()
    assert 2 <= before.count(b"\n") < len(whole) and not (out / "predictions.jsonl").exists()
    part.write_bytes(before + b'[3, "to')  # what a kill in the middle of a write leaves
    evaluation.main(command(checkpoint, world, out, "--batch-size", 7))
    assert list(out.glob("parts/*")) == [part] and part.read_bytes().startswith(before)
    assert sorted(i for i, _ in lines(part)) == list(range(len(whole))), "nothing is asked again"
    assert lines(out / "predictions.jsonl") == whole


def test_two_ranks_answer_what_one_does(checkpoint, world, whole, tmp_path):
    out = tmp_path / "out"
    process = start(*command(checkpoint, world, out, "--batch-size", 3), ranks=2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert lines(out / "predictions.jsonl") == whole
    assert output.count("constant") == 1, "one rank prints"
    shares = [len(lines(path)) for path in out.glob("parts/none-*.jsonl")]
    assert sum(shares) == len(whole) and abs(shares[0] - shares[1]) <= 1


def test_data_on_two_ranks_gives_the_same_table(checkpoint, world, tmp_path):
    (world / "few.json").write_text(json.dumps(json.loads((world / "test.json").read_text())[4:11]))
    common = ("data", world / "few.json", "--model", checkpoint, "--control", "full")
    common += ("--max-new-tokens", 2, "--workers", 0)
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
    ({"frame_idx": "6"}, "a mask of each object on frame 6, as frame_idx says, found [[3]]"),
    ({"frame_idx": None}, "a mask of each object on frame None, as frame_idx says"),
    ({"annotation": None}, "as many <region> tags"),
    ({"annotation": ["no"]}, "annotation: object 0"),
    (
        {"annotation": [{"3": {"segmentation": None}, "5": {"segmentation": MASK}}]},
        "a mask of each object on frame 3, as frame_idx says, found [[5]]",
    ),
    (
        {"annotation": [{"3": {"segmentation": {"size": [96, 96], "counts": [5, 6]}}}]},
        "run lengths that sum to",
    ),
    (
        {"annotation": [{"3": {"segmentation": {"size": [96, 96], "counts": [96 * 96]}}}]},
        "a mask that is not empty",
    ),
    ({"annotation": [{"300": {"segmentation": MASK}}], "frame_idx": "300"}, "frame indices below 8"),
    ({"video": "videos/none.mp4"}, "videos/none.mp4"),
    ({"video": "bad.json"}, "bad.json: expected a video that FFmpeg can open and decode, found"),
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
    evaluation.main([str(a) for a in (f"bench-{kind}", bad_file, *options, *more)])
    [scores] = lines(out / "scores.json")
    return lines(out / "predictions.jsonl"), scores


def test_a_bad_entry_is_recorded_and_counts_as_wrong(checkpoint, bad_file, tmp_path, capsys, monkeypatch):
    """It neither ends the run nor leaves the denominator, whoever reads the predictions."""
    monkeypatch.setattr(evaluation, "choose", lambda reply, options: "B")  # right, whatever is said
    predictions, scores = run_bad("q", checkpoint, bad_file, tmp_path / "out", "--workers", 1)
    *table, last = capsys.readouterr().out.splitlines()
    assert last.startswith("16 of 18 questions could not be asked, such as: ")
    assert "bad.json: sample 1 (id 1): " in last
    assert [p["id"] for p in predictions] == list(range(18))
    assert [isinstance(p["pred"], str) for p in predictions] == [True, *[False] * 16, True]
    for n, (_, complaint) in enumerate(BAD_ENTRIES, start=1):
        assert complaint in predictions[n]["error"]
        assert f"bad.json: sample {n} (id {n})" in predictions[n]["error"]
    counts = {"right": 2, "asked": 18}
    assert scores["not_asked"] == 16 and list(scores["rows"]) == ["x", "all"]
    assert scores["rows"]["all"]["pred"] == scores["rows"]["x"]["pred"] == counts
    assert table[0] == "pred: 16 replies name no option, and are wrong"
    evaluation.main(["score", str(bad_file), str(tmp_path / "out" / "predictions.jsonl")])
    again = capsys.readouterr().out.splitlines()
    assert again[0] == table[0] and [line.split()[1] for line in again[2:]] == ["2/18", "2/18"]
    # Another model's predictions: an entry without answer or object counts as wrong; masks are not read.
    theirs = tmp_path / "theirs.jsonl"
    write_lines(theirs, [{"id": i, "pred": "B"} for i in range(18)])
    evaluation.main(["score", str(bad_file), str(theirs)])
    other = capsys.readouterr().out.splitlines()
    assert other[0] == "pred: 8 replies name no option, and are wrong"
    assert other[-1].split()[:2] == ["all", "10/18"]


def test_media_elsewhere_and_worker_processes_that_are_spawned(bad_file, tmp_path):
    entries = json.loads(bad_file.read_text())
    (tmp_path / "q.json").write_text(
        json.dumps([entries[0] | {"video": str(bad_file.parent / entries[0]["video"])}])
    )
    arguments = ["bench-q", str(tmp_path / "q.json"), "--model", "m", "--out", "o"]
    entries = data.read_samples(tmp_path / "q.json")
    samples = evaluation.Bench(entries, evaluation.parse(arguments))
    assert samples[0].media == str(bad_file.parent / "videos" / "test0000.mp4")
    assert pickle.loads(pickle.dumps(samples))[0] == samples[0]


def test_a_bad_sample_ends_data_before_anything_is_asked(checkpoint, world, tmp_path):
    samples = json.loads((world / "test.json").read_text())[:3]
    (world / "one_bad.json").write_text(
        json.dumps([*samples, samples[0] | {"id": 9, "video": "videos/none.mp4"}])
    )
    with pytest.raises(data.DataError, match=r"one_bad.json: sample 3 \(id 9\)"):
        arguments = ("data", world / "one_bad.json", "--model", checkpoint, "--workers", 0, "--device", "cpu")
        evaluation.main([str(a) for a in (*arguments, "--out", tmp_path / "out")])
    assert os.listdir(tmp_path / "out") == ["run.json"]


def test_a_file_that_vanishes_while_data_is_asked_ends_the_run(checkpoint, world, tmp_path, monkeypatch):
    """Its loss was computed before, so nothing else would notice; None must not count as a wrong answer."""
    choose_objects = evaluation.Questions.choose_objects

    def vanished(self, sample, info, rng):
        data.expect(sample.id != 1, "a media file", "none")
        return choose_objects(self, sample, info, rng)

    monkeypatch.setattr(evaluation.Questions, "choose_objects", vanished)
    (world / "vanish.json").write_text(json.dumps(json.loads((world / "test.json").read_text())[:3]))
    options = ("--max-new-tokens", 1, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out")
    with pytest.raises(data.DataError, match="expected a media file"):
        evaluation.main([str(a) for a in ("data", world / "vanish.json", "--model", checkpoint, *options)])
    assert not (tmp_path / "out" / "scores.json").exists()


def test_a_bad_entry_is_not_judged(checkpoint, bad_file, tmp_path, server, capsys):
    wrong_in_q = 6  # whatever options, Answer or Question are, a description can be asked for
    predictions, scores = run_bad("d", checkpoint, bad_file, tmp_path / "out", "--workers", 0)
    assert [p["id"] for p in predictions if p["pred"] is None] == list(range(1 + wrong_in_q, 17))
    assert scores["not_asked"] == 10
    assert "10 of 18 questions could not be asked, such as: " in capsys.readouterr().out.splitlines()[-1]
    _, last = judged(tmp_path / "out" / "predictions.jsonl", server)
    assert last == "pred: 8 replies, 0 without four marks, left out"
    assert len(server.asked) == len({p["pred"] for p in predictions if p["pred"]}), "each reply once"


def test_what_could_not_be_asked_is_asked_by_the_next_run(checkpoint, bad_file, tmp_path):
    """A video may be there by then. On two ranks, for errors must cross over as well."""
    arguments = ["bench-q", bad_file, "--model", checkpoint, "--out", tmp_path / "out"]
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
    assert sorted(i for i, _ in parts) == [0, 15, 17]


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "not valid JSON"),
        ("[]", "q.json: "),
        ('{"questions": []}', "no other entry is right"),
        ('[{"id": 1}, {"id": 2}]', "found None \\(and no other entry is right"),
        (None, "a readable file"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_ends_at_once(tmp_path, content, complaint):
    if content:
        (tmp_path / "q.json").write_text(content)
    with pytest.raises(data.DataError, match=complaint):
        evaluation.main(
            ["bench-q", str(tmp_path / "q.json"), "--model", "nowhere", "--out", str(tmp_path / "out")]
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
    for different in (("--mode", "single"), ("--max-new-tokens", 5)):
        with pytest.raises(data.DataError, match="a new folder, or that of a run of this command"):
            evaluation.main(command(checkpoint, world, out, *different))
    questions = world / "bench_q.json"
    for changed in (next(checkpoint.glob("*.safetensors")), questions):  # trained anew; edited
        times = changed.stat()
        os.utime(changed, (1, 1))
        with pytest.raises(data.DataError, match="a new folder, or that of a run of this command"):
            evaluation.main(command(checkpoint, world, out))
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    evaluation.main(command(checkpoint, world, out))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "ideas.txt").write_text("mine")
    with pytest.raises(data.DataError, match="a new folder, or that of a run of this command"):
        evaluation.main(command(checkpoint, world, tmp_path / "notes"))


def test_a_run_is_its_task_its_files_in_order_and_its_model(checkpoint, world, tmp_path):
    """The answers in OUT/parts name a question by its index."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "nanorefer.json").write_text("{}")
    a, b = str(world / "test.json"), str(world / "train.json")

    def open_run(*arguments):
        evaluation.open_run(
            evaluation.parse([*arguments, "--model", str(model), "--out", str(tmp_path / "out")])
        )

    open_run("data", a, b)
    open_run("data", a, b, "--control", "full")
    for different in (["data", b, a], ["data", a], ["bench-q", a], ["bench-d", a]):
        with pytest.raises(data.DataError, match="a new folder, or that of a run of this command"):
            open_run(*different)
    for name in ("nanorefer.json", "tokenizer.json"):
        times = (model / name).stat()
        os.utime(model / name, (1, 1))
        with pytest.raises(data.DataError, match="a new folder, or that of a run of this command"):
            open_run("data", a, b)
        os.utime(model / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    open_run("data", a, b)
    shutil.rmtree(tmp_path / "out")
    open_run("bench-q", a)
    with pytest.raises(data.DataError, match="a new folder, or that of a run of this command"):
        open_run("bench-d", a)


def test_out_may_be_any_folder_that_holds_nothing(checkpoint, world, tmp_path):
    for name in ("empty", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for out in (
        tmp_path / "empty",
        tmp_path / "link",
        tmp_path / "a" / "b",
        f"{tmp_path}/q/",
    ):
        for _ in range(2):
            evaluation.open_run(evaluation.parse(command(checkpoint, world, out)))
    assert (tmp_path / "target" / "run.json").exists() and (tmp_path / "q" / "run.json").exists()


def test_bench_q_asks_the_toy_model_what_data_asks(checkpoint, world, tmp_path, monkeypatch):
    """bench-q --mode multi shows the model the same pictures and regions that data does, and counts alike.
    The model is a stand-in whose answer depends on every number of these."""
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

    def content(value):
        if isinstance(value, dict):
            return b"".join(content(value[key]) for key in sorted(value))
        return value.numpy().tobytes() if torch.is_tensor(value) else b""

    def generate(model, batch, end, max_new_tokens):
        assert len(batch["ids"]) == 1
        shown = ("still_patches", "video_patches", "tower", "regions")
        digest = zlib.crc32(b"".join(content(batch[name]) for name in shown))
        question = tokenizer.decode(batch["input_ids"][0])
        asked = [names for word, names in kinds.items() if word in question][0]
        return [tokenizer(asked[digest % 4])["input_ids"]]

    monkeypatch.setattr(models.ReferringVideoLLM, "generate", generate)
    common = ["--model", str(checkpoint), "--batch-size", "1", "--workers", "0", "--device", "cpu"]
    evaluation.main(["data", str(world / "same_test.json"), *common, "--out", str(tmp_path / "data")])
    more = ["--mode", "multi", "--out", str(tmp_path / "q")]
    evaluation.main(["bench-q", str(world / "same_bench_q.json"), *common, *more])
    rows = json.loads((tmp_path / "data" / "scores.json").read_text())["rows"]
    bench_rows = json.loads((tmp_path / "q" / "scores.json").read_text())["rows"]
    for row in ("colour", "shape", "direction", "relation", "all"):
        assert bench_rows[row]["pred"] == rows[row]["exact"], row
    assert 0 < bench_rows["all"]["pred"]["right"] < bench_rows["all"]["pred"]["asked"]
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
    arguments = ("data", world / "uneven.json", "--model", checkpoint, "--control", *controls, *options)
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


def ask_coverage(coverage_bench, checkpoint, out, *controls, kind="bench-q"):
    options = [kind, coverage_bench, "--model", checkpoint, "--batch-size", 1, "--workers", 0]
    options += ["--device", "cpu", "--out", out, *(["--control", *controls] if controls else [])]
    evaluation.main([str(a) for a in options])
    return lines(out / "predictions.jsonl")


def test_bench_q_with_every_control(checkpoint, coverage_bench, tmp_path, says_its_coverage, capsys):
    predictions = ask_coverage(coverage_bench, checkpoint, tmp_path / "out", *CONTROLS)
    output = capsys.readouterr().out
    assert {column: [p.get(column) for p in predictions] for column in SAID} == SAID
    assert [p["pred_choice"] for p in predictions] == ["A", "B", "D"]
    [scores] = lines(tmp_path / "out" / "scores.json")
    right = {"pred": [3, 3], "full": [0, 2], "shuffle": [0, 2], "box": [1, 2], "blind": [1, 3]}
    assert {column: list(scores["rows"]["all"][column].values()) for column in right} == right
    table = output.splitlines()
    assert [line.split(":")[0] for line in table[:5]] == list(right)
    assert all(line.endswith(": 0 replies name no option, and are wrong") for line in table[:5])
    assert table[5].split() == [*right, "constant"]

    # The predictions can be scored again, whole or without the controls, and say as much.
    files = ["score", str(coverage_bench)]
    evaluation.main([*files, str(tmp_path / "out" / "predictions.jsonl")])
    again = capsys.readouterr().out.splitlines()
    assert again == table
    theirs = tmp_path / "theirs.jsonl"
    write_lines(theirs, [{"id": p["id"], "pred": p["pred"]} for p in predictions])
    evaluation.main([*files, str(theirs)])
    assert capsys.readouterr().out.splitlines()[1].split() == ["pred", "constant"]


def test_controls_may_be_added_to_a_run_that_is_done(checkpoint, coverage_bench, tmp_path, says_its_coverage):
    for controls in ((), ("box",), ("blind", "box"), ("blind", "blind")):
        predictions = ask_coverage(coverage_bench, checkpoint, tmp_path / "out", *controls)
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
    while not any(path.read_bytes().count(b"\n") >= 2 for path in out.glob("parts/blind-0.jsonl")):
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
        assert path.read_bytes().startswith(before.get(path, b""))
    assert set(asked.values()) == {len(whole)}, "each question once in each column"
    for name in ("predictions.jsonl", "scores.json"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    predictions = lines(out / "predictions.jsonl")
    assert [p["pred"] for p in predictions] == [p["pred"] for p in whole]
    assert [p["blind"] for p in predictions] != [p["pred"] for p in whole]


def test_bench_d_is_judged_under_every_control(
    checkpoint, coverage_bench, tmp_path, says_its_coverage, server, waits
):
    """The marks, worked by hand, are the digits behind the point of what was said: 0.25 means 2 and 5."""
    bench, predictions = coverage_bench.with_name("coverage_d.json"), tmp_path / "out" / "predictions.jsonl"
    ask_coverage(bench, checkpoint, tmp_path / "out", *CONTROLS, kind="bench-d")
    averages = {
        "pred": (5 + 4 + (5 + 2) / 2 + (0 + 5) / 2) / 4,
        "full": (5 + 4 + 0 + 0) / 4,
        "shuffle": (5 + 4 + (2 + 5) / 2 + (5 + 0) / 2) / 4,
        "box": (5 + 4 + 5 + 0) / 4,
        "blind": 0,
    }
    asked_before = set()
    for column, average in averages.items():
        new, replies = [], []
        for caption, text in zip(("It covers 0.50.", "It covers 0.25."), SAID[column]):
            request = f"##Correct answer: {caption}\n##Predicted answer: {text}\n"
            if request not in asked_before:
                new.append(request)
                marks = (0, 0, 0, 0) if text == "none" else (5, 4, *map(int, text[2:]))
                replies.append(GOOD.format(*marks))
        asked_before.update(new)
        assert len(new) == (0 if column == "box" else 2), "it says of boxes what others said"
        server.asked.clear()
        server.script = [*replies[:-1], *[503] * 9]
        if new:
            with pytest.raises(data.DataError, match="goes on from here"):
                judged(predictions, server, "--column", column)
        server.script = replies[-1:]
        means, last = judged(predictions, server, "--column", column)
        assert means[-1] == float(f"{average:.2f}") and last.startswith(f"{column}: 2 replies, 0 without")
        questions = [body["messages"][1]["content"] for _, _, body in server.asked]
        assert questions == new[:-1] + new[-1:] * 10, "9 attempts at the last in vain"
    server.asked.clear()
    judged(predictions, server, "--column", "full")
    assert not server.asked, "the replies that are there are kept"


def test_an_entry_that_cannot_be_asked_counts_alike_in_all_columns(
    checkpoint, bad_file, tmp_path, monkeypatch
):
    """A question without its media could be asked all the same: then blind would be right more often."""
    monkeypatch.setattr(evaluation, "choose", lambda reply, options: "B")
    controls = ("--control", "full", "blind", "--workers", 0)
    predictions, scores = run_bad("q", checkpoint, bad_file, tmp_path / "out", *controls)
    for column in ("pred", "full", "blind"):
        assert [isinstance(p[column], str) for p in predictions] == [True, *[False] * 16, True]
    for column in ("pred", "full", "blind"):
        assert scores["rows"]["all"][column] == {"right": 2, "asked": 18}
    assert scores["not_asked"] == 16


def test_shuffle_needs_masks_of_other_media(checkpoint, bad_file, tmp_path):
    """What was asked before is kept."""
    entry = json.loads(bad_file.read_text())[0]
    same = bad_file.with_name("same_video.json")
    same.write_text(json.dumps([entry, entry | {"id": 1}]))
    with pytest.raises(data.DataError, match="a sample with regions on other media to take masks from"):
        run_bad("q", checkpoint, same, tmp_path / "out", "--control", "box", "shuffle")
    assert not (tmp_path / "out" / "scores.json").exists()
    _, scores = run_bad("q", checkpoint, same, tmp_path / "out", "--control", "box")
    assert scores["not_asked"] == 0


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
    assert evaluation.read_marks(reply) == marks


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
def waits(monkeypatch):
    """The waits between attempts, recorded in place of waited; and a judge may take 0.3 s."""
    waits, client = [], openai.OpenAI
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(openai, "OpenAI", lambda **options: client(**options | {"timeout": 0.3}))
    return waits


@pytest.fixture
def described(tmp_path, waits, monkeypatch):
    """Three descriptions to judge. -> their folder"""
    described = [{"id": i, "caption": f"It runs {i}.", "pred": f"It sits {i}."} for i in range(3)]
    write_lines(tmp_path / "p.jsonl", described)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


def judged(path, server, *more):
    """Returns the printed means, the last of which is their average, and the last line."""
    path = path / "p.jsonl" if path.is_dir() else path
    prompt = path.with_name("system.txt")
    if not prompt.exists():
        prompt.write_text("Judge.")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    options = ["judge", path, "--url", url, "--judge", "some-judge", "--prompt", prompt, *more]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        evaluation.main([str(a) for a in options])
    *rows, last = output.getvalue().splitlines()
    assert [row[:26].strip() for row in rows] in ([], [*evaluation.ASPECTS, "Average"])
    return [float(row[26:]) for row in rows], last


def test_a_judge_that_answers_well(described, server, waits, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.script = [GOOD.format(5, 4, 3, 2), GOOD.format(1, 1, 1, 1), GOOD.format(0, 4, 5, 0)]
    means, last = judged(described, server)
    assert means == [2, 3, 3, 1, 2.25]
    assert last == "pred: 3 replies, 0 without four marks, left out" and waits == []
    path, key, body = server.asked[1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "some-judge")
    assert body["temperature"] == 0, "otherwise two runs of the same judge give different scores"
    assert body["messages"][0] == {"role": "system", "content": "Judge."}
    assert body["messages"][1]["content"] == "##Correct answer: It runs 1.\n##Predicted answer: It sits 1.\n"
    assert "secret" not in (described / "judged.jsonl").read_text()
    assert [line["model"] for line in lines(described / "judged.jsonl")] == ["local-1"] * 3
    assert judged(described, server) == (means, last)
    assert len(server.asked) == 3, "lines that are there are kept"


def test_a_judge_that_answers_badly_is_counted(described, server):
    server.script = ["Five stars!", None, GOOD.format(5, 4, 3, 2)]
    means, last = judged(described, server)
    assert means == [5, 4, 3, 2, 3.5] and last == "pred: 3 replies, 2 without four marks, left out"
    replies = [line["reply"] for line in lines(described / "judged.jsonl")]
    assert replies == ["Five stars!", "", GOOD.format(5, 4, 3, 2)]


def test_none_of_the_replies_readable(described, server):
    server.script = ["?"] * 3
    means, last = judged(described, server)
    assert means == [] and last == "pred: 3 replies, 3 without four marks, left out"


@pytest.mark.parametrize("fault", [500, 408, 409, 429, "hang", "cut"])
def test_a_judge_that_falters_is_asked_again(described, server, waits, fault):
    server.script = [fault, fault, GOOD.format(5, 4, 3, 2)]
    assert judged(described, server)[1] == "pred: 3 replies, 0 without four marks, left out"
    assert len(waits) == 2 and len(server.asked) == 5


@pytest.mark.parametrize("fault", ["garbage", "empty"])
def test_what_is_no_chat_completion_ends_the_run(described, server, fault):
    server.script = [GOOD.format(5, 4, 3, 2), fault]
    with pytest.raises(data.DataError, match="^--url http.*The same command goes on from here"):
        judged(described, server)
    assert len(lines(described / "judged.jsonl")) == 1


def test_a_judge_that_is_gone_ends_the_run_and_the_next_goes_on(described, server, waits):
    server.script = [GOOD.format(5, 4, 3, 2)] + [503] * 9
    with pytest.raises(data.DataError, match="503.*The same command goes on from here"):
        judged(described, server)
    assert len(waits) == 8 and len(server.asked) == 10
    with open(described / "judged.jsonl", "a") as file:
        file.write('{"id": 1, "requ')  # and a kill tore a line
    server.asked.clear()
    assert judged(described, server)[1].startswith("pred: 3 replies") and len(server.asked) == 2
    assert [line["id"] for line in lines(described / "judged.jsonl")] == [0, 1, 2]


def test_nobody_listens(described):
    nowhere = SimpleNamespace(server_address=("127.0.0.1", 9))
    with pytest.raises(data.DataError, match="Connection error.*goes on from here"):
        judged(described, nowhere)


def test_a_wrong_key_is_not_tried_twice(described, server):
    server.script = [401]
    with pytest.raises(data.DataError, match="401"):
        judged(described, server)
    assert len(server.asked) == 1


def test_marks_of_another_judge_prompt_or_prediction_are_not_mixed_in(described, server):
    """Each has its own; those of before are kept."""
    means, _ = judged(described, server)
    server.script = [GOOD.format(0, 0, 0, 0)] * 3
    assert judged(described, server, "--judge", "another")[0] == [0] * 5
    assert judged(described, server)[0] == means and len(server.asked) == 6
    (described / "system.txt").write_text("Another prompt.")
    server.script = [GOOD.format(1, 1, 1, 1)] * 3
    assert judged(described, server)[0] == [1] * 5 and len(server.asked) == 9
    (described / "p.jsonl").write_text((described / "p.jsonl").read_text().replace("sits 1", "sat 1"))
    server.script = [GOOD.format(4, 4, 4, 4)]
    assert judged(described, server)[0] == [2] * 5 and len(server.asked) == 10


def test_a_prediction_without_a_caption_is_named(described, server):
    write_lines(described / "p.jsonl", [{"id": 7, "pred": "It runs."}])
    with pytest.raises(
        data.DataError, match=r"p.jsonl: sample 0 \(id 7\): expected an object with .caption."
    ):
        judged(described, server)
    assert not server.asked


def test_a_judge_prompt_that_is_not_there_is_noticed_before_anything_is_asked(described, server):
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        judged(described, server, "--prompt", "absent.txt")
    assert not server.asked


# ---- a question of your own ----


@pytest.fixture(scope="session")
def loaded(checkpoint):
    return evaluation.load(checkpoint, "cpu")


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return encoded | {"counts": encoded["counts"].decode()}


def test_ask_from_the_command_line(checkpoint, loaded, world, tmp_path):
    video, question = world / "videos" / "test0000.mp4", "Is <region> near <region>?"
    mask = np.zeros((96, 96), np.uint8)
    mask[50:70, 60:90] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    pointed = ["--object", "3:10,20,30,40", "0:10,20,50,20,50,60", "--object", f"3:{tmp_path / 'm.png'}"]
    options = ["--max-new-tokens", 6, "--device", "cpu", "--preview", tmp_path / "p.png"]
    process = start("ask", question, "--model", checkpoint, "--video", video, *pointed, *options)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    objects = [{3: evaluation.box(10, 20, 30, 40), 0: [10, 20, 50, 20, 50, 60]}, {3: mask}]
    answer = evaluation.ask(*loaded, video, question, objects, max_new_tokens=6)
    assert answer and output.rstrip().endswith(answer)
    # The preview shows what python train.py --check shows of the same objects in a data file.
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "..."}]
    masks = [
        {str(f): {"segmentation": m} for f, m in frames.items()} for frames in (objects[0], {3: rle(mask)})
    ]
    entry = {"video": str(video), "conversations": turns, "annotation": masks}
    (tmp_path / "one.json").write_text(json.dumps([entry]))
    [sample] = list(data.read_samples(tmp_path / "one.json"))
    dataset = data.ReferringDataset([replace(sample, place=(str(video),))], loaded[1])
    train.preview(dataset, [0], tmp_path / "expected.png", frames_shown=2)
    assert (tmp_path / "p.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_preview_without_regions_shows_the_first_frame(
    checkpoint, loaded, world, tmp_path, monkeypatch, says_its_coverage
):
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    drawn, imshow = [], Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda axis, x, **options: drawn.append(x) or imshow(axis, x, **options)
    )
    video = world / "videos" / "test0000.mp4"
    arguments = ("ask", "What is this?", "--model", checkpoint, "--video", video, "--device", "cpu")
    evaluation.main([str(a) for a in (*arguments, "--preview", tmp_path / "p.png")])
    [picture] = drawn
    assert (picture == data.open_media(video).read([0])[0]).all()
    with Image.open(tmp_path / "p.png") as preview:
        assert preview.format == "PNG"


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
    common = ("ask", "What is <region>?", "--model", checkpoint, "--image", tmp_path / "wide.png")
    common += ("--device", "cpu", "--object")
    for pointed in ("96,0,32,64", "0:96,0,32,64", "96,0,128,0,128,64,96,64"):
        evaluation.main([str(a) for a in (*common, pointed)])
        assert capsys.readouterr().out == "0.25\n"
    for pointed in ("0,40,32,32", "0,0,32,0,32,72", "100,0,32,64"):
        with pytest.raises(data.DataError, match="inside the picture, 128x64"):
            evaluation.main([str(a) for a in (*common, pointed)])


def test_a_mask_that_is_no_picture_is_named(tmp_path):
    Image.new("RGB", (128, 64)).save(tmp_path / "wide.png")
    for path, complaint in (
        ("absent.png", "--object: absent.png: expected a picture, .*, found: No such file or directory"),
        (__file__, "--object: .*/test_eval.py: expected a picture, .*, found: cannot identify image file"),
    ):
        with pytest.raises(data.DataError, match=complaint):
            evaluation.main(
                ["ask", "What is <region>?", "--model", "m", "--image", str(tmp_path / "wide.png")]
                + ["--object", path]
            )


@pytest.mark.parametrize(
    "pointed, complaint",
    [
        (["3:80,10,30,30"], "inside the picture, 96x96"),
        (["3:1,2,3,4,5,200"], "inside the picture, 96x96"),
        (["3:nan,1,3,4,5,6"], "a picture, or a mask x,y,..., found: No such file"),
        (["3:a,b,c,d"], "a picture, or a mask x,y,..., found: No such file"),
        (["3:1,,3,4"], "numbers x,y,..., found: could not convert string to float"),
        (["3:1,2,3"], "at least 3 points"),
        (["3:1,2,3,4,5,6,7"], "an even count of numbers"),
        (["3:10,10,0,3"], "of a size above 0, found (0.0, 3.0)"),
        (["8:1,2,30,40"], "expected frame indices below 8"),
        (["x:1,2,30,40"], "--object FRAME:MASK, each frame once, found 'x:1,2,30,40'"),
        (["1,2,30,40"], "--object FRAME:MASK, each frame once"),
        (["3:1,2,30,40", "3:1,2,30,40"], "--object FRAME:MASK, each frame once"),
        (["3:1,2,30,40", "--object", "3:1,2,3,4"], "as many <region> tags"),
        ([], "as many <region> tags"),
        (["3:wide.png"], "a mask of the frame's shape, 96x96"),
        (["3:black.png"], "a mask that is not empty"),
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
    pointed = ["--object", *pointed] if pointed else []
    with pytest.raises(data.DataError) as error:
        evaluation.main(
            ["ask", "What is <region>?", "--model", str(checkpoint), "--video", video, *pointed]
            + ["--device", "cpu"]
        )
    assert complaint in str(error.value)


def test_a_model_of_random_weights_is_not_evaluated():
    with pytest.raises(data.DataError, match="--model: a trained or pretrained model, found 'tiny'"):
        evaluation.load("tiny")


ASK = ["ask", "Why?", "--model", "m", "--video", "v"]
DATA = ["data", "x.json", "--model", "m", "--out", "o"]
BENCH_D = ["bench-d", "d.json", "--model", "m", "--out", "o"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "the following arguments are required: command"),
        (["draw", "x.json"], "invalid choice: 'draw'"),
        (ASK[:4], "required: --video/--image"),
        ([*ASK, "--object"], "--object: expected at least one argument"),
        ([*ASK, "--control", "full"], "unrecognized arguments: --control"),
        ([*ASK, "--media", "d"], "unrecognized arguments: --media"),
        ([*ASK, "--workers", "0"], "unrecognized arguments: --workers"),
        ([*ASK, "--out", "o"], "unrecognized arguments: --out"),
        ([*ASK, "--mode", "multi"], "unrecognized arguments: --mode"),
        ([*DATA, "--object", "0:1,2,3,4"], "unrecognized arguments: --object"),
        ([*DATA, "--mode", "single"], "unrecognized arguments: --mode"),
        ([*DATA, "--control", "other"], "--control: invalid choice: 'other'"),
        ([*DATA, "--batch-size", "0"], "--batch-size: expected a number from 1"),
        ([*DATA, "--workers", "-1"], "--workers: expected a number from 0"),
        ([*DATA, "--max-new-tokens", "-3"], "--max-new-tokens: expected a number from 1"),
        ([*ASK, "--max-new-tokens", "0"], "--max-new-tokens: expected a number from 1"),
        ([*DATA, "--max-new", "3"], "unrecognized arguments: --max-new"),
        (["data", "x.json", "--model", "m"], "required: --out"),
        (["data", "--model", "m", "--out", "o"], "required: FILE"),
        (["bench-q", "q.json", "--model", "m"], "required: --out"),
        (["bench-q", "q.json", "--out", "o"], "required: --model"),
        (
            ["bench-q", "q.json", "--model", "m", "--out", "o", "--url", "http://u"],
            "unrecognized arguments: --url",
        ),
        ([*BENCH_D, "--judge", "gpt-4o"], "unrecognized arguments: --judge"),
        (["score", "q.json"], "required: predictions"),
        (["score", "q.json", "p.jsonl", "--device", "cpu"], "unrecognized arguments: --device"),
        (["judge", "p.jsonl"], "required: --prompt"),
        (["judge", "p.jsonl", "--prompt", "s", "--column", "x"], "--column: invalid choice: 'x'"),
        (["judge", "p.jsonl", "--prompt", "s", "--device", "cpu"], "unrecognized arguments: --device"),
    ],
)
def test_options_that_do_not_go_together(capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        evaluation.main(arguments)
    assert complaint in capsys.readouterr().err


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
