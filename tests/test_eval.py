"""Evaluation: what the model is shown, what counts as an answer, the judge, and a question of your own."""

import argparse
import copy
import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import threading

import einops
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from helpers import Program, box, box_mask, read_lines, rle, sample, write_json
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import data
import eval as evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights. Attention is made sharper, so that replies depend on every input."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_vl")
    weights = load_file(folder / "model.safetensors")
    sharper = {name: 4 * w if "q_norm" in name else w for name, w in weights.items()}
    save_file(sharper, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return evaluation.load(checkpoint, "cpu")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """a, b: folders of 8 noisy frames, 96x96. wide.png: 128x64."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for name in [*(f"{folder}/{k}.png" for folder in "ab" for k in range(8)), "wide.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        noise.resize((128, 64) if name == "wide.png" else (96, 96), 0).save(folder / name)
    return folder


@pytest.fixture
def evaluate(checkpoint, media, tmp_path):
    """evaluate(kind, entries, options, name) -> the lines of NAME/predictions.jsonl, and scores.json"""

    def evaluate(kind, entries, options="", name=None):
        name = name or f"run{len(list(tmp_path.iterdir()))}"
        file, out = tmp_path / f"{name}.json", tmp_path / name
        if not file.exists():  # a file that was written anew would be another one
            write_json(file, entries)
        common = f"--model {checkpoint} --media {media} --max-new-tokens 6 --workers 0 --device cpu"
        evaluation.main(f"{kind} {file} --out {out} {common} {options}".split())
        return read_lines(out / "predictions.jsonl"), read_lines(out / "scores.json")[0]

    return evaluate


def refused(command, *arguments):
    """The text of the DataError that a command line, or a call, ends in."""
    with pytest.raises(data.DataError) as error:
        evaluation.main(command.split()) if isinstance(command, str) else command(*arguments)
    return str(error.value)


def bench_entry(**changes):
    entry = {"id": 7, "video": "a", "frame_idx": "3", "caption": "It is red.", "type": "x"}
    entry |= {"Question": "Is <object0><region> red?", "options": ["(A) Yes", "(B) No"], "Answer": "(B) No"}
    return entry | {"annotation": [{"3": {"segmentation": box(10, 20, 30, 40)}}]} | changes


# ---- what the model is shown ----
def test_replies_are_those_of_transformers(evaluate, checkpoint):
    """Of questions as text, against its greedy generate."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    questions, replies = [f"Why {n}?" for n in range(1, 25)], []  # some replies end with a blank
    for question in questions:
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        reply = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        replies.append(tokenizer.decode(reply[0, len(prompt) :], skip_special_tokens=True).strip())
    predictions, _ = evaluate("data", [sample(question, "x") for question in questions])
    assert [p["exact"] for p in predictions] == replies


RED, GREEN = (255, 0, 0), (0, 128, 0)
OUTLINED = "I have outlined an object with a red contour in the video. Please describe the object in detail."


def outlined(picture, mask, colour):
    """The picture (H, W, 3) with what is near the mask (H, W), but not on it, in a colour: one by one."""
    picture, (ys, xs) = picture.copy(), np.nonzero(mask)
    reach = round(max(mask.shape) / 100)
    for y, x in np.ndindex(mask.shape):
        if 0 < np.maximum(abs(ys - y), abs(xs - x)).min() <= reach:
            picture[y, x] = colour
    return picture


def drawn(folder, masks):
    """The frames of a folder as a list, in which the masks are outlined in red."""
    frames = {k: str(folder / f"{k}.png") for k in range(8)}
    for k, polygons in masks.items():
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 96, 96)))
        picture = outlined(np.asarray(Image.open(frames[k])), mask, RED)
        frames[k] = f"{folder}-{k}.png"
        Image.fromarray(picture).save(frames[k])
    return [*frames.values()]


def test_controls_reply_as_to_masks_that_were_replaced_by_hand(evaluate, media):
    """Each column against a run on a data file with such masks, or as text; in batches of another size."""
    first, second, whole = box(0, 0, 48, 96), box(20, 10, 12, 30), box(0, 0, 96, 96)
    angle = [*box(0, 0, 48, 24), *box(0, 24, 16, 72)]  # its bounding box is `first`
    mine, theirs = {0: angle, 3: second, 7: angle}, {2: box(50, 60, 40, 30), 5: box(5, 70, 80, 9)}
    texts = ("Look.\n<video>\nWhere is this?", "x", "What is <region>?", "y", "Why?", "z")
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    as_text = json.dumps(turns).replace("\\n<video>\\n", "\\n").replace("<region>", "the object")
    as_text = [{"conversations": json.loads(as_text)}, sample("Is it the object?", "x"), sample("Why?", "x")]

    def entries(of_a, of_b):
        a = sample("", "", of_a, video="a") | {"conversations": turns}
        return [a, sample("Is it <region>?", "x", of_b, video="b"), sample("Why?", "x", video="b")]

    in_red = json.loads(json.dumps(turns).replace("<region>", "the object outlined in red"))
    in_red = [{"conversations": in_red, "video": drawn(media / "a", mine)}]
    in_red.append(sample("Is it the object outlined in red?", "x", video=drawn(media / "b", theirs)))
    by_hand = {
        "exact": entries(mine, theirs),
        "full": entries(dict.fromkeys(mine, whole), dict.fromkeys(theirs, whole)),
        "box": entries({0: first, 3: second, 7: first}, theirs),
        "shuffle": entries({0: theirs[2], 3: theirs[5], 7: theirs[2]}, {2: mine[0], 5: mine[3]}),
        "blind": as_text,
        "outline": [*in_red, sample("Why?", "x", video="b")],
    }
    predictions, scores = evaluate("data", by_hand["exact"], "--control full shuffle box blind outline")
    for name, replaced in by_hand.items():
        expected = [p["exact"] for p in evaluate("data", replaced, "--batch-size 2")[0]]
        if name in ("full", "box", "shuffle", "outline"):  # without regions there is nothing to replace
            expected[0] = expected[4] = None
        assert [p.get(name) for p in predictions] == expected, name
    assert len({tuple(p.get(name) for p in predictions) for name in by_hand}) == 6
    # Of the five, three are about regions, the third because an earlier turn pointed at one.
    assert [scores["rows"]["all"][name]["asked"] for name in by_hand] == [5, 3, 3, 3, 5, 3]


def test_outline_shows_and_names_objects_as_the_benchmarks_authors_do(loaded, tmp_path):
    """Words: their evaluation_general_mllms.md. Pixels: drawn one by one on frames of flat colours."""
    width, height, processor = 192, 96, copy.copy(loaded[1])  # a contour of 2 pixels
    flat = [np.full((height, width, 3), 20 * k, np.uint8) for k in range(8)]
    (tmp_path / "v").mkdir()
    for k in range(8):
        Image.fromarray(flat[k]).save(tmp_path / f"v/{k}.png")
    first, second = box_mask(height, width, 0, 10, 30, 20), box_mask(height, width, 100, 76, 60, 20)
    first[12:20, 30:50] = 1
    annotation = [{"3": {"segmentation": rle(first)}}, {"3": {"segmentation": rle(second)}}]
    twice = np.kron(second, np.ones((2, 2), np.uint8))
    twice[0, 0] = 1  # less than half of a pixel of the frame
    annotation[1]["6"] = {"segmentation": rle(twice)}
    question = "Is <object3><region> near <object1><region>?"
    entry = bench_entry(Question=question, annotation=annotation, video="v")
    of_one = bench_entry(annotation=annotation[:1], video="v")
    same = sample("<region>? <region>? <region>?", "x", {3: rle(first)}, {3: rle(second)}, video="v")
    same["annotation"][2:] = [{"3": {"segmentation": [[0, 10, 30, 10, 30, 30, 0, 30]]}}]  # most of the first
    (tmp_path / "d.json").write_text(json.dumps([entry, of_one, same]))
    entries = data.read_samples(tmp_path / "d.json")
    processor.settings = dataclasses.replace(processor.settings, num_frames=4)
    texts, shown = [], []
    for i, command in enumerate(("bench-q", "bench-d", "data")):
        args = argparse.Namespace(command=command, mode="multi")
        samples = entries if command == "data" else evaluation.Bench(entries.paths, None, args)
        samples.is_outlined = True
        encoded = evaluation.Questions(samples, processor, "outline")[i, 0]
        texts.append(processor.tokenizer.decode(encoded["input_ids"]).split("<|im_end|>")[0])
        pattern = "(t gh gw m n) (c a ph pw) -> (t a) (gh m ph) (gw n pw) c"
        sizes = {"t": 2, "gh": 3, "gw": 6, "m": 2, "n": 2, "c": 3, "a": 2, "ph": 16}
        shown.append(einops.rearrange(encoded["video_patches"], pattern, **sizes))
        assert encoded["region_tokens"] == []
    ask_q = "I have highlighted an object using a colored mask in the first frame it occurs in the video. "
    ask_q += "<object3>: red; <object1>: green. Is <object3> near <object1>? (A) Yes (B) No. "
    ask_q += "Answer with the option's letter from the given choices directly."
    named = [f"the object outlined in {colour}?" for colour in ("red", "green", "red")]
    for text, expected in zip(texts, (ask_q, OUTLINED, " ".join(named)), strict=True):
        assert text.split("<|vision_end|>")[-1].strip() == expected
    # Of 8 frames, 0, 2, 5 and 7 are sampled; 3 and 6 take the places of 2 and 5, at 24 frames a second.
    both = outlined(outlined(flat[3], first, RED), second, GREEN)
    assert np.array_equal(shown[0], [flat[0], both, outlined(flat[6], second, GREEN), flat[7]])
    assert re.findall("<([0-9.]+) seconds>", texts[0]) == ["0.1", "0.3"]
    assert np.array_equal(shown[1], [flat[0], outlined(flat[3], first, RED), flat[5], flat[7]])
    assert np.array_equal(shown[2][1], both)


def test_shuffle_lends_any_object_of_other_media(loaded, media, tmp_path):
    """The boxes that are encoded say whose masks they are: cx of which picture, cy of which object."""
    masks = [[{0: box(20 * n, y, 8, 8)} for y in (8, 60)] for n in range(4)]
    entries = [sample("<region><region>", "x", *masks[n % 4], image=f"a/{n % 4}.png") for n in range(24)]
    samples = data.read_samples(write_json(tmp_path / "d.json", entries), str(media))
    questions, lent = evaluation.Questions(samples, loaded[1], "shuffle"), set()
    for n in range(24):
        centres = [(round(96 * cx), round(96 * cy)) for cx, cy, *_ in questions[n, 0]["boxes"]]
        assert len(centres) == 2 and 20 * (n % 4) + 4 not in [cx for cx, _ in centres]
        lent.update(centres)
    assert lent == {(20 * n + 4, cy) for n in range(4) for cy in (12, 64)}


def test_benchmarks_ask_with_upstreams_words_and_the_masks_of_the_mode(evaluate, media):
    """Against a data file with the prompts of upstream's inference_videorefer_{q,d}_bench.py."""
    masks = [{5: box(n, 2, 30, 40), 7: box(50, 50, n, 40)} for n in (3, 40)]
    annotation = [{k: {"segmentation": mask} for k, mask in of_one.items()} for of_one in masks]
    entry = bench_entry(Question="Is <object0><region> near <object1><region>?", annotation=annotation)
    ask_q = "Is <object0>[<region>] near <object1>[<region>]? (A) Yes (B) No. "
    ask_q += "Answer with the option's letter from the given choices directly."
    ask_d = "Please give a detailed description of the highlighted object [<region>] in the video."
    single, replies = [{7: of_one[7]} for of_one in masks], []
    described = {"annotation": annotation[:1], "frame_idx": "7"}
    for kind, mode, changes, question, objects in (
        ("bench-q", "", {"frame_idx": 7}, ask_q, single),
        ("bench-q", "--mode multi", {}, ask_q, masks),
        ("bench-d", "", described, ask_d, single[:1]),
    ):
        [found], _ = evaluate(kind, [entry | changes], mode)
        [expected], _ = evaluate("data", [sample(f"<video>\n{question}", "x", *objects, video="a")])
        assert (found["question"], found["pred"]) == (f"<video>\n{question}", expected["exact"])
        assert found["answer"] == ("B" if kind == "bench-q" else "It is red.") and found["id"] == 7
        replies.append(found["pred"])
    assert len({*replies}) == 3
    [found], _ = evaluate("bench-d", [entry | described], "--control outline")
    in_red = sample(f"<video>\n{OUTLINED}", "x", video=drawn(media / "a", single[0]))
    [expected], _ = evaluate("data", [in_red])
    assert found["outline"] == expected["exact"] != found["pred"]


# ---- what counts as an answer ----
def test_a_letter_is_read_strictly():
    """Replies, beside the option that a reader would say is meant."""
    options = {"A": "Sleeping", "B": "Licking its nose", "C": "Vitamin C", "D": "A dog"}
    replies = {
        "A": "(A) Sleeping ; A ; A) Sleeping ; Sleeping.",
        "B": "The answer is (B) ; (B). ; b ; (b) licking ; B: Licking ; the right answer is B. ; "
        "b) licking ; B\nIt licks. ; **Answer:** (B) ; $\\boxed{B}$ ; The answer is \\boxed{\\text{B}}. ; "
        "(B) I see a dog ; (B) Licking its nose. The answer is (B) ; **B.** Licking its nose. It is (b).",
        "C": "The answer is (C) Vitamin C. ; vitamin c. ; **C**\n\nIt is.",
        "D": "  (D)\n ; Option D ; (D) A dog ; The answer is a dog ; **a dog.**",
        None: " ; A dog runs ; E ; (E) Eating ; A or B ; (A) or (B) ; AB ; A. B. ; A\nB ; Because of (A) ; "
        "I think it is B ; (Both) ; A.M. ; answer ; () ; (A)sleep ; **A** dog runs ; **** ; \\boxed{} ; "
        "A. Sleeping B. Licking ; A: x, B: y ; (A) x, B: y ; (a) x or (b) ; A) Sleeping or b) Licking",
    }
    for letter, texts in replies.items():
        for text in texts.split(" ; "):
            assert evaluation.choose(text, options) == letter, text
    options = {"A": "Answer the phone", "B": "4", "C": "Vitamin D", "D": "4"}
    texts = ("Answer the phone", "4", "(c) vitamin D", "(b) Vitamin D")
    assert [evaluation.choose(text, options) for text in texts] == ["A", None, "C", None]


def test_score_counts_replies_of_any_model(tmp_path, capsys):
    """Its table worked by hand, with the most frequent answer for a type with, and without, regions."""
    given = [  # type, is it about a region, answer, pred, full ("-": not asked)
        ("y", True, "A", "a", "A"),
        ("x", True, "A", "(B)", "no idea"),
        ("x", True, "A", "Yes.", "A"),
        ("x", True, "B", "A", "A"),
        ("x", False, "C", "C", "-"),
        ("x", False, "C", "C or B", "-"),
        ("all", True, "?", "A", "A"),  # a bad entry: it is wrong, and names no constant answer
    ]
    entries, lines = [], []
    for n, (kind, is_about_region, answer, pred, full) in enumerate(given):
        no_region = {} if is_about_region else {"Question": "Is it?", "annotation": []}
        listed = {"options": ["(A) Yes", "(B) No", "(C) Red"], "Answer": f"({answer}) ..."}
        entries.append(bench_entry(id=n, type=kind, **listed, **no_region))
        lines.append({"id": n, "pred": pred} | ({} if full == "-" else {"full": full}))
    questions, replies = write_json(tmp_path / "q.json", entries), tmp_path / "p.jsonl"
    command = f"score {questions} {replies}"
    expected = """pred: 2 replies
        full: 2 replies
        pred full constant
        type all 0/1 0.0 % 0/1 0.0 % 0/1 0.0 %
        x 2/5 40.0 % 1/3 33.3 % 4/5 80.0 %
        y 1/1 100.0 % 1/1 100.0 % 1/1 100.0 %
        about regions 2/5 40.0 % 2/5 40.0 % 3/5 60.0 %
        all 3/7 42.9 % 2/5 40.0 % 5/7 71.4 %"""
    write_json(replies, lines[::-1])
    evaluation.main(command.split())
    printed = capsys.readouterr().out.splitlines()
    for row, wanted in zip(printed, expected.split("\n"), strict=True):
        assert row.split()[: len(wanted.split())] == wanted.split()
    rows = {
        "sample 7 (id 2)": [*lines, lines[2]],
        "sample 0 (id 0)": [{"id": 0}, *lines[1:]],
        "none to 6": lines[:-1],
    }
    for named, wrong in rows.items():
        write_json(replies, wrong)
        assert named in refused(command)
    write_json(questions, [*entries, entries[3]])  # an id names one question
    assert "q.json" in refused(command)


# ---- bad entries ----
def test_a_bad_entry_of_a_benchmark_is_named_and_wrong_in_every_column(evaluate):
    """The first and the last entry are good. All are about regions."""
    bad = [  # what is wrong with an entry, and a word of its error
        ({"options": ["(A) Yes", "(A) No"], "Answer": "(A) Yes"}, "options"),
        ({"Answer": "(C) Perhaps"}, "Answer"),
        ({"Question": None}, "Question"),
        ({"frame_idx": "6"}, "frame_idx"),
        ({"video": "absent"}, "absent"),
    ]
    changes = [{}, *(change for change, _ in bad), {"video": "b"}]
    entries = [bench_entry(**change) | {"id": i} for i, change in enumerate(changes)]
    predictions, scores = evaluate("bench-q", entries, "--control full blind")
    for name in ("pred", "full", "blind"):
        assert [isinstance(p[name], str) for p in predictions] == [True, *[False] * 5, True]
        assert scores["rows"]["all"][name]["asked"] == 7
    assert scores["not_asked"] == 5 and scores["rows"].keys() == {"x", "all"}
    for n, (_, word) in enumerate(bad, start=1):
        assert f"sample {n} (id {n})" in predictions[n]["error"] and word in predictions[n]["error"]
    predictions, _ = evaluate("bench-d", entries)  # a description needs no options, Answer and Question
    assert [n for n in range(7) if predictions[n]["pred"] is None] == [4, 5]
    # Nobody can lend masks to the last of these, so that it is wrong without a control, too.
    videos = [["a/0.png", "a/1.png"], ["b/0.png", "b/1.png"], ["a/0.png", "b/0.png"]]
    masks = [{"0": {"segmentation": box(1, 2, 3, 4)}}]
    entries = [bench_entry(video=video, frame_idx="0", annotation=masks) for video in videos]
    predictions, _ = evaluate("bench-q", entries, "--control shuffle")
    for name in ("pred", "shuffle"):
        assert [p[name] is None for p in predictions] == [False, False, True]


def test_what_is_wrong_as_a_whole_ends_the_run(evaluate, tmp_path):
    """A DataError that names the file or sample, and no score; what is noticed early leaves no OUT behind."""
    assert "tiny" in refused(evaluation.load, "tiny")  # random weights are not evaluated
    good, nowhere = sample("Why?", "x"), [bench_entry(video=f"{n}.mp4") for n in range(2)]
    rows = (
        ("data", [good, good | {"conversations": []}], "sample 1", True),
        ("bench-q", [{"id": 1}, {"id": 2}], "id 1", True),
        ("bench-q", nowhere, "0.mp4", False),
    )
    for n, (kind, entries, named, is_early) in enumerate(rows):
        out = tmp_path / f"out{n}"
        assert named in refused(evaluate, kind, entries, "", out.name)
        assert not (out / "predictions.jsonl").exists() and out.exists() != is_early


# ---- a run goes on, or is another ----
def test_only_the_same_run_is_resumed(evaluate, tmp_path):
    """run.json: the task, its files in order, the model and what shapes replies."""
    entries, out = [sample("Why?", "x")], tmp_path / "a/out"
    one, two, weights = (write_json(tmp_path / f"a.{name}", entries) for name in ("json", "jsonl", "weights"))
    options = f"--model {tmp_path} --out {out}"
    command, bench = f"data {one} {two} {options}", f"bench-q {one} {options}"

    def open_run(command):
        evaluation.open_out(evaluation.parse(command.split()))

    for first, second, edited in (
        (command, f"data {two} {one} {options}", None),
        (command, f"{command} --media {tmp_path}", None),
        (command, f"{command} --max-new-tokens 3", None),
        (command, command, two),
        (command, command, weights),
        (bench, f"bench-d {one} {options}", None),
        (bench, f"{bench} --mode multi", None),
    ):
        shutil.rmtree(out, ignore_errors=True)
        open_run(first)
        if edited:
            os.utime(edited, (1, 1))
        assert "--out" in refused(open_run, second), (second, edited)
    write_json(tmp_path / "full/notes.json", "a folder with anything else")
    assert "--out" in refused(evaluate, "data", entries, "", "full")


def test_a_killed_run_goes_on_from_its_parts(evaluate, checkpoint, media, tmp_path):
    """It ends with the files of an undisturbed run, and asks each question once; controls may be added."""
    entries = [sample(f"Why {n}?", "Because.") for n in range(12)]
    expected = evaluate("data", entries, "--control blind", "undisturbed")
    file, out = write_json(tmp_path / "out.json", entries), tmp_path / "out"
    part, options = out / "parts/none-0.jsonl", "--workers 0 --max-new-tokens 6 --device cpu --batch-size 1"
    command = f"eval.py data {file} --media {media} --model {checkpoint} --out {out} {options}"
    with Program(command) as program:
        program.wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") >= 2)
        program.send(signal.SIGKILL)
    before = part.read_bytes()
    part.write_bytes(before + b'[3, "to')  # as a kill in the middle of a write leaves it
    assert evaluate("data", entries, "--control blind", "out") == expected
    assert part.read_bytes().startswith(before)
    for path in (part, out / "parts/blind-0.jsonl"):
        assert [i for i, _ in read_lines(path)] == list(range(12))


# ---- the judge ----
ASPECTS = ("Subject Correspondence", "Appearance Description", "Temporal Description")
ASPECTS += ("Hallucination Detection",)


def marked(*marks):
    """A reply as the published prompt asks for."""
    rows = (f"{aspect}: {mark}\nExplanation: 2 of 5 are." for aspect, mark in zip(ASPECTS, marks))
    return "\n".join(f"{i}. {row}" for i, row in enumerate(rows, start=1))


class Judge(http.server.BaseHTTPRequestHandler):
    """Does what the server's script says next: a status, or a reply. At its end, it replies with fours."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, {**self.headers}, body))
        act = self.server.script.pop(0) if self.server.script else marked(4, 4, 4, 4)
        self.send_response(act if isinstance(act, int) else 200)
        self.send_header("Content-Type", "text/html" if act == b"<html>" else "application/json")
        self.send_header("Retry-After-Ms", "1")  # otherwise openai waits half a second and more
        self.send_header("Location", f"http://localhost:{self.server.port}/elsewhere")  # of status 307
        self.end_headers()
        message = {"message": {"role": "assistant", "content": act}}
        reply = {"model": "local-1", "choices": [message]}
        self.wfile.write(act if isinstance(act, bytes) else json.dumps(reply).encode())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        server.script, server.asked, server.port = [], [], server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


@pytest.fixture
def judge(server, tmp_path, capsys):
    """judge(options) -> the means that it prints, and the numbers of its last line. Of three captions."""
    lines = [{"id": i, "caption": f"Runs {i}.", "pred": f"Sits {i}.", "box": f"Box {i}."} for i in range(3)]
    lines.insert(1, {"id": 9, "pred": None, "box": None})  # a bad entry: it is not judged
    write_json(tmp_path / "p.jsonl", lines)
    (tmp_path / "system.txt").write_text("Judge.")
    url = f"http://127.0.0.1:{server.port}/v1"

    def judge(options=""):
        command = f"judge {tmp_path}/p.jsonl --prompt {tmp_path}/system.txt --url {url} {options}"
        evaluation.main(command.split())
        *rows, last = capsys.readouterr().out.splitlines()
        assert [row[:26].strip() for row in rows] in ([], [*ASPECTS, "Average"])
        return [float(row[26:]) for row in rows], [int(number) for number in re.findall(r"\d+", last)]

    return judge


def test_the_judge_is_asked_as_published_and_paid_once(judge, server, tmp_path):
    """What arrives at a server; means worked by hand; and what a second run asks."""
    server.script = [marked(5, 4, 3, 2), marked(1, 1, 1, 1), marked(0, 4, 5, 0)]
    means, file = [2, 3, 3, 1, 2.25], tmp_path / "p.jsonl"
    assert judge() == (means, [3, 0])
    path, headers, body = server.asked[1]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer secret")
    user = "##Correct answer: Runs 1.\n##Predicted answer: Sits 1.\n"
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": user}]
    assert body == {"model": "gpt-4o", "messages": messages, "temperature": 0}
    assert "secret" not in (tmp_path / "judged.jsonl").read_text()
    # Another judge, column or prediction is asked about by itself, and the others are kept.
    assert judge("--judge other")[0] == [4] * 5 and server.asked[-1][2]["model"] == "other"
    assert judge("--column box")[0] == [4] * 5 and "Box 2." in str(server.asked[-1][2])
    assert judge("--no-temperature")[0] == [4] * 5 and "temperature" not in server.asked[-1][2]
    assert judge() == (means, [3, 0]) and len(server.asked) == 12
    file.write_text(file.read_text().replace("Sits 1", "Sat 1"))
    assert judge()[0] == [3, 4, 4, 2, 3.25] and len(server.asked) == 13


def test_a_judge_that_falters_is_asked_again_and_the_next_run_goes_on(judge, server, tmp_path):
    """Statuses that pass are tried nine times, others once. No reply is lost."""
    server.script = [408, 409, 429, 500]
    assert judge() == ([4] * 5, [3, 0]) and len(server.asked) == 7
    for stops in ([503] * 9, [401], [b"<html>"], [b'{"caf\xe9": 1}']):  # the last is no UTF-8
        server.asked, server.script = [], [marked(5, 5, 5, 5), *stops]
        (tmp_path / "judged.jsonl").write_text("")
        assert "--url" in refused(judge)
        with open(tmp_path / "judged.jsonl", "a") as file:
            file.write('{"id": 1, "requ')  # as a kill leaves it
        assert judge()[1] == [3, 0] and len(server.asked) == 1 + len(stops) + 2
        assert [line["id"] for line in read_lines(tmp_path / "judged.jsonl")] == [0, 1, 2]


def test_the_key_does_not_follow_a_redirect(judge, server):
    """What arrives after a redirect to another host: no header holds it."""
    server.script = [307]
    assert judge()[1] == [3, 0]
    found = [(path == "/elsewhere", "secret" in str(headers)) for path, headers, _ in server.asked]
    assert found == [(False, True), (True, False), (False, True), (False, True)]


def test_marks_are_read_strictly(judge, server):
    """Replies, beside the marks that a reader would see. Those without four are counted, and left out."""
    heads = "**{}**: 5\n- {}: 4/5\n## {}: **1**\n4. {}: 2\n5 in all"
    assert evaluation.read_marks(heads.format(*map(str.lower, ASPECTS))) == [5, 4, 1, 2]
    for last in "0;5;4 / 5;4 out of 5;4 - the same dog;4.".split(";"):
        assert evaluation.read_marks(marked(5, 4, 0, last)) == [5, 4, 0, int(last[0])], last
    for last in "6;4.5;-1;four;35;4/10;4 / 10;4 out of 10;4 /50;4-5;3 to 4;3 or 4;4,5;".split(";"):
        assert evaluation.read_marks(marked(5, 4, 0, last)) is None, last
    no_marks = "\n".join(f"{i}. {aspect}:" for i, aspect in enumerate(ASPECTS))
    for reply in ("", marked(5, 4, 3), marked(5, 4, 0, 3) + "\n" + marked(1, 1, 1, 1), no_marks):
        assert evaluation.read_marks(reply) is None
    thoughts = f"<think>\n{marked(1, 1, 1, 1)}\n</think>\n{marked(5, 4, 3, 2)}"
    server.script = ["Five stars!", [{"type": "text", "text": marked(5, 4, 3, 2)}], thoughts]
    assert judge() == ([5, 4, 3, 2, 3.5], [3, 1])
    server.script = ["?", None, ""]  # None: withheld by a filter
    assert judge("--judge other") == ([], [3, 3]) and len(server.asked) == 6


# ---- a question of your own ----
def test_ask_replies_as_to_a_data_file(evaluate, loaded, checkpoint, media, tmp_path, capsys):
    """The objects of its options, and of its function, against the same masks in a data file."""
    drawn, left, right = box_mask(96, 96, 60, 50, 20, 25), box(10, 20, 30, 40), box(96, 0, 32, 64)
    picture, corners = tmp_path / "m.png", [0, 0, 128, 0, 128, 64]
    Image.fromarray(drawn * 255).save(picture)
    rows = [
        (f"{media}/a", []),
        (f"{media}/a --object 3:10,20,30,40 0:9,9,90,9,90.5,90", [{3: left, 0: [9, 9, 90, 9, 90.5, 90]}]),
        (f"{media}/wide.png --object 96,0,32,64 --object 0:0,0,128,0,128,64", [{0: right}, {0: corners}]),
        (f"{media}/b --object 5:{picture}", [{5: rle(drawn)}]),
    ]
    answers, common = [], f"--model {checkpoint} --max-new-tokens 6 --device cpu"
    for options, objects in rows:
        question, path = "What?" + " <region>" * len(objects), options.split()[0]
        capsys.readouterr()
        evaluation.main(["ask", question, *f"{common} --image {options}".split()])
        answers.append(capsys.readouterr().out.removesuffix("\n"))
        [prediction], _ = evaluate("data", [sample(question, "x", *objects, video=path)])
        reply = evaluation.ask(*loaded, path, question, objects, 6)
        assert reply == prediction["exact"], options
        # A terminal would obey control characters, so these are printed as escapes.
        assert answers[-1] == re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", lambda c: ascii(c[0])[1:-1], reply)
    assert len({*answers}) == len(rows)
    # Arrays are masks wherever they are not 0, and media may be a list of frame files.
    frames = [media / f"b/{k}.png" for k in range(8)]
    for mask in (drawn, drawn.astype(bool), 0.2 * drawn):
        assert evaluation.ask(*loaded, frames, "What? <region>", [{5: mask}], 6) == reply


def test_what_is_wrong_with_an_object_is_named(loaded, checkpoint, media):
    """A DataError with what was found, behind the ; of each line. wide.png is 128x64."""
    rows = """a --object 3:1,,3,4; 3:1,,3,4
        a --object 1,2,30,40; 1,2,30,40
        a --object 3:1,2,30,40 3:1,2,30,40; 3:1,2,30,40
        a --object 3:absent.png; absent.png
        a --object 3:40,50 --model none; 40.0, 50.0
        a --object 3: --model none; No such file
        wide.png --object 0:-3,0,32,64 --model none; 128x64
        wide.png --object 0:0,40,32,32; 128x64
        wide.png --object 100,0,32,64; 128x64"""
    for options, found in (row.strip().split("; ") for row in rows.split("\n")):
        command = f"ask <region> --model {checkpoint} --device cpu --video {media}/{options}"
        assert found in refused(command), options
    assert "1)" in refused(evaluation.ask, *loaded, media / "a", "<region>", [{3: np.ones((96, 96, 1))}])
    numbers = np.eye(96) + 2 * np.eye(96, k=3)  # of two objects
    assert "0. 1. 2." in refused(evaluation.ask, *loaded, media / "a", "<region>", [{3: numbers}])
    assert "object 0" in refused(evaluation.ask, *loaded, media / "a", "<region>", [{}])


# ---- the command line ----
def test_options_and_their_defaults(capsys):
    """Numbers that are documented, and numbers that cannot be."""
    of_data, device = "data x.json --model m --out o", "cuda" if torch.cuda.is_available() else "cpu"
    defaults = {"max_new_tokens": 128, "batch_size": 32, "workers": 2, "control": [], "device": device}
    assert vars(evaluation.parse(of_data.split())).items() >= defaults.items()
    assert evaluation.parse("judge p --prompt s".split()).url == "https://api.openai.com/v1"
    for options in (f"{of_data} --batch-size 0", f"{of_data} --workers -1", f"{of_data} --max-new-tokens 0"):
        with pytest.raises(SystemExit, match="2"):
            evaluation.parse(options.split())
        assert options.split()[-2] in capsys.readouterr().err
