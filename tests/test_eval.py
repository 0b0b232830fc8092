"""Evaluation: what the model is shown, what counts as an answer, the judge, and a question of your own."""

import http.server
import json
import os
import re
import shlex
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from helpers import TOP, Program, box, box_mask, read_lines, rle, run, sample, write_json
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import data
import eval as evaluation

CONTROLS = ("full", "shuffle", "box", "blind")


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


def column(predictions, name):
    return [prediction.get(name) for prediction in predictions]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


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
def test_replies_and_loss_are_those_of_transformers(evaluate, checkpoint):
    """Of questions as text: its greedy generate, and its cross-entropy, a mean over the answers' tokens."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    talks = {f"Why {n}?": "Because of this." * n for n in range(1, 25)}  # some replies end with a blank
    replies, losses = [], []
    for question, answer in talks.items():
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        reply = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        replies.append(tokenizer.decode(reply[0, len(prompt) :], skip_special_tokens=True).strip())
        target = tokenizer(answer + "<|im_end|>")["input_ids"]
        scores = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses += (-scores[range(len(target)), target]).tolist()
    predictions, scores = evaluate("data", [sample(*pair) for pair in talks.items()])
    assert column(predictions, "exact") == replies
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    talks["Why 7?"] = replies[6]  # now one is right to the letter
    _, scores = evaluate("data", [sample(*pair) for pair in talks.items()])
    assert scores["rows"]["all"]["exact"] == {"right": 1, "asked": 24}


def test_controls_reply_as_to_masks_that_were_replaced_by_hand(evaluate):
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

    by_hand = {
        "exact": entries(mine, theirs),
        "full": entries(dict.fromkeys(mine, whole), dict.fromkeys(theirs, whole)),
        "box": entries({0: first, 3: second, 7: first}, theirs),
        "shuffle": entries({0: theirs[2], 3: theirs[5], 7: theirs[2]}, {2: mine[0], 5: mine[3]}),
        "blind": as_text,
    }
    predictions, scores = evaluate("data", by_hand["exact"], f"--control {' '.join(CONTROLS)}")
    for name, replaced in by_hand.items():
        expected = column(evaluate("data", replaced, "--batch-size 2")[0], "exact")
        if name in ("full", "box", "shuffle"):  # without regions there is nothing to replace
            expected[0] = expected[4] = None
        assert column(predictions, name) == expected, name
    assert len({tuple(column(predictions, name)) for name in by_hand}) == 5
    # Of the five, three are about regions, the third because an earlier turn pointed at one.
    assert [scores["rows"]["all"][name]["asked"] for name in by_hand] == [5, 3, 3, 3, 5]


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


def test_benchmarks_ask_with_upstreams_words_and_the_masks_of_the_mode(evaluate):
    """Against a data file with the prompts of upstream's inference_videorefer_{q,d}_bench.py."""
    masks = [{5: box(n, 2, 30, 40), 7: box(50, 50, n, 40)} for n in (3, 40)]
    later = [{str(frame): mask for frame, mask in of_one.items()} for of_one in masks]  # as in newer files
    annotation = [{frame: {"segmentation": mask} for frame, mask in of_one.items()} for of_one in later]
    entry = bench_entry(Question="Is <object0><region> near <object1><region>?", annotation=annotation)
    ask_q = "Is <object0>[<region>] near <object1>[<region>]? (A) Yes (B) No. "
    ask_q += "Answer with the option's letter from the given choices directly."
    ask_d = "Please give a detailed description of the highlighted object [<region>] in the video."
    single, described, replies = [{7: of_one[7]} for of_one in masks], {"annotation": annotation[:1]}, []
    for kind, mode, changes, question, objects in (
        ("bench-q", "", {"frame_idx": 7}, ask_q, single),
        ("bench-q", "--mode single", {"frame_idx": "7", "annotation": None, "masks": later}, ask_q, single),
        ("bench-q", "--mode multi", {}, ask_q, masks),
        ("bench-d", "", described | {"frame_idx": "7"}, ask_d, single[:1]),
        ("bench-d", "--mode multi", described, ask_d, masks[:1]),
    ):
        [found], _ = evaluate(kind, [entry | changes], mode)
        [expected], _ = evaluate("data", [sample(f"<video>\n{question}", "x", *objects, video="a")])
        assert (found["question"], found["pred"]) == (f"<video>\n{question}", expected["exact"])
        assert found["answer"] == ("B" if kind == "bench-q" else "It is red.") and found["id"] == 7
        replies.append(found["pred"])
    assert replies[0] == replies[1] and len({*replies}) == 4


# ---- what counts as an answer ----
def test_a_letter_is_read_strictly():
    """Replies, beside the option that a reader would say is meant."""
    options = {"A": "Sleeping", "B": "Licking its nose", "C": "Vitamin C", "D": "A dog"}
    replies = {
        "A": "(A) Sleeping ; A ; A. ; A) Sleeping ; sleeping ; Sleeping.",
        "B": "The answer is (B) ; (B) ; (B). ; b ; (b) licking ; b. ; B. Licking ; B: Licking ; Answer: B ; "
        "the correct answer is B. ; B\nIt licks. ; (B) Licking its nose. The answer is (B) ; b) licking ; "
        "**B** ; **B.** Licking ; The answer is **B**. ; **Answer:** (B) ; \\boxed{B} ; $\\boxed{B}$ ; "
        "The answer is \\boxed{\\text{B}}. ; (B) I see a dog ; B. Licking its nose. It is (b).",
        "C": "The answer is (C) Vitamin C. ; (c) Vitamin C ; vitamin c. ; **C**\n\nIt is.",
        "D": "  (D)\n ; Option D ; (D) A dog ; a dog ; The answer is a dog ; **a dog.**",
        None: " ; A dog runs ; a dogs ; E ; (E) Eating ; A or B ; (A) or (B) ; A, B ; AB ; A B ; A. B. ; "
        "A\nB ; (A) and B) ; Because of (A) ; I think it is B ; Bees ; (Both) ; B is right ; A.M. ; answer ; "
        "() ; (A)sleep ; **A** dog runs ; **A** or **B** ; **** ; \\boxed{} ; \\boxed{A} or \\boxed{B} ; "
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
        ("x", False, "C", None, "-"),
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
    expected = """pred: 3 replies
        full: 2 replies
        pred full constant
        type all 0/1 0.0 % 0/1 0.0 % 0/1 0.0 %
        x 2/6 33.3 % 1/3 33.3 % 5/6 83.3 %
        y 1/1 100.0 % 1/1 100.0 % 1/1 100.0 %
        about regions 2/5 40.0 % 2/5 40.0 % 3/5 60.0 %
        all 3/8 37.5 % 2/5 40.0 % 6/8 75.0 %"""
    write_lines(replies, lines[::-1])
    evaluation.main(command.split())
    printed = capsys.readouterr().out.splitlines()
    for row, wanted in zip(printed, expected.split("\n"), strict=True):
        assert row.split()[: len(wanted.split())] == wanted.split()
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "q.json"]  # it writes nothing
    rows = {
        "sample 8 (id 9)": [*lines, {"id": 9, "pred": "A"}],
        "sample 8 (id 2)": [*lines, lines[2]],
        "sample 0 (id 0)": [{"id": 0}, *lines[1:]],
        "none to 7": lines[:-1],
    }
    for named, wrong in rows.items():
        write_lines(replies, wrong)
        assert named in refused(command)
    write_lines(replies, lines[:4])
    write_json(questions, entries[:4])
    evaluation.main(command.split())  # all are about regions, which then have no row of their own
    assert "about regions" not in capsys.readouterr().out
    write_json(questions, [*entries, entries[3]])  # an id names one question
    assert "q.json" in refused(command)


# ---- bad entries ----
def test_a_bad_entry_of_a_benchmark_is_named_and_wrong_in_every_column(evaluate, media, tmp_path):
    """The first and the last entry are good. When a missing video has come, it alone is asked."""
    seg, zeros = {"segmentation": box(1, 2, 3, 4)}, {"segmentation": {"size": [96, 96], "counts": [96 * 96]}}
    bad = [  # what is wrong with an entry, and a word of its error
        ({"options": ["(A) Yes", "(A) No"], "Answer": "(A) Yes"}, "options"),
        ({"Answer": "(C) Perhaps"}, "Answer"),
        ({"Question": None}, "Question"),
        ({"Question": "No tag?"}, "<region>"),
        ({"frame_idx": "6"}, "frame_idx"),
        ({"annotation": [{"3": {"segmentation": None}, "5": seg}]}, "frame_idx"),
        ({"annotation": [{"3": zeros}]}, "object 0"),
        ({"annotation": [{"300": seg}], "frame_idx": "300"}, "300"),
        ({"video": "later"}, "later"),
    ]
    changes = [{}, *(change for change, _ in bad), {"video": "b"}]
    entries = [bench_entry(**change) | {"id": i} for i, change in enumerate(changes)]
    predictions, scores = evaluate("bench-q", entries, "--control full blind", "q")
    for name in ("pred", "full", "blind"):
        assert [isinstance(reply, str) for reply in column(predictions, name)] == [True, *[False] * 9, True]
        assert scores["rows"]["all"][name]["asked"] == 11
    assert scores["not_asked"] == 9
    for n, (_, word) in enumerate(bad, start=1):
        assert f"sample {n} (id {n})" in predictions[n]["error"] and word in predictions[n]["error"]
    predictions, _ = evaluate("bench-d", entries)  # a description needs no options, Answer, Question and tag
    assert [n for n in range(11) if predictions[n]["pred"] is None] == list(range(5, 10))
    shutil.copytree(media / "b", media / "later")
    _, scores = evaluate("bench-q", entries, "--control full blind", "q")
    shutil.rmtree(media / "later")
    assert scores["not_asked"] == 8
    assert [i for i, _ in read_lines(tmp_path / "q/parts/none-0.jsonl")] == [0, 10, 9]
    # Nobody can lend masks to the last of these, so that it is wrong without a control, too.
    videos, masks = [["a/0.png", "a/1.png"], ["b/0.png", "b/1.png"], ["a/0.png", "b/0.png"]], [{"0": seg}]
    entries = [bench_entry(video=video, frame_idx="0", annotation=masks) for video in videos]
    predictions, _ = evaluate("bench-q", entries, "--control shuffle")
    for name in ("pred", "shuffle"):
        assert [reply is None for reply in column(predictions, name)] == [False, False, True]


def test_what_is_wrong_as_a_whole_ends_the_run(evaluate, tmp_path):
    """A DataError that names the file or sample, and no score; what is noticed early leaves no OUT behind."""
    file = tmp_path / "q.json"
    for content, named in (("{", "q.json"), ("[]", "q.json"), ('[{"id": 1}, {"id": 2}]', "id 1")):
        file.write_text(content)
        assert named in refused(f"bench-q {file} --model nowhere --out {tmp_path}/out")
    assert "tiny" in refused(evaluation.load, "tiny")  # random weights are not evaluated
    good, frames = sample("<region>", "x", {0: box(10, 20, 30, 40)}, video="a"), ["a/0.png", "a/1.png"]
    shared = [good | {"video": frames}, good | {"video": frames[::-1]}]
    rows = [
        ("data", [good, good | {"conversations": []}], "", "sample 1"),
        ("data", [good, good | {"video": "none"}], "", "sample 1"),
        ("data", shared, "--control shuffle", "sample 0"),  # no other media to lend masks
        ("bench-q", [bench_entry(video=f"{n}.mp4") for n in range(2)], "", "0.mp4"),
    ]
    for n, (kind, entries, options, named) in enumerate(rows):
        assert named in refused(evaluate, kind, entries, options, f"out{n}")
        assert not (tmp_path / f"out{n}/predictions.jsonl").exists()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out0").exists()


# ---- a run goes on, or is another ----
def test_only_the_same_run_is_resumed(checkpoint, tmp_path):
    """run.json: the task, its files in order, the model and what shapes replies; controls may be added."""
    model, out = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "a/out"
    one, two = (write_json(tmp_path / f"{n}.json", [sample(f"Why {n}?", "x")]) for n in (1, 2))
    bench = write_json(tmp_path / "bench.json", [bench_entry()])
    common = f"--model {model} --out {out} --workers 0 --device cpu --max-new-tokens"

    def main(options):
        evaluation.main(f"data {one} {two} {common} 2 {options}".split())
        return {path.name: path.read_text() for path in (out / "parts").iterdir()}

    parts = main("")
    assert main("--batch-size 1") == parts  # nothing is asked again
    added = main("--control blind")
    assert added == main("") == parts | {"blind-0.jsonl": parts["none-0.jsonl"]}
    for files in (f"{two} {one}", f"{one}", f"{one} {two} --media {tmp_path}"):
        assert "--out" in refused(f"data {files} {common} 2")
    assert "--out" in refused(f"data {one} {two} {common} 3")
    for edited in (one, model / "model.safetensors", model / "tokenizer.json"):
        times = edited.stat()
        os.utime(edited, (1, 1))
        assert "--out" in refused(main, "")
        os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main("") == added
    for first, second in (("bench-q", "bench-d"), ("bench-q --mode multi", "bench-q --mode single")):
        shutil.rmtree(out)
        first, second = (evaluation.parse(f"{kind} {bench} {common} 2".split()) for kind in (first, second))
        evaluation.open_run(first)
        assert "--out" in refused(evaluation.open_run, second)
    os.rename(out / "run.json", out / "notes.json")  # a folder with anything else
    assert "--out" in refused(main, "")


def test_a_killed_run_goes_on_from_its_parts(evaluate, checkpoint, media, tmp_path):
    """It ends with the files of an undisturbed run, and asks each question once."""
    masks = [{"3": {"segmentation": box(n, 2 * n, 30, 40)}} for n in range(12)]
    entries = [bench_entry(id=n, annotation=[masks[n]]) for n in range(12)]
    controls = "--control box blind full"
    expected = evaluate("bench-q", entries, controls, "undisturbed")
    file, parts = write_json(tmp_path / "out.json", entries), tmp_path / "out/parts"
    command = f"eval.py bench-q {file} --media {media} --model {checkpoint} --out {tmp_path}/out {controls}"
    torn = parts / "blind-0.jsonl"
    with Program(f"{command} --workers 0 --max-new-tokens 6 --device cpu --batch-size 1") as program:
        program.wait_until(lambda: torn.exists() and torn.read_bytes().count(b"\n") >= 2)
        program.send(signal.SIGKILL)
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    assert {*before} == {"none-0.jsonl", "box-0.jsonl", "blind-0.jsonl"}
    torn.write_bytes(before[torn.name] + b'[3, "to')  # as a kill in the middle of a write leaves it
    assert evaluate("bench-q", entries, controls, "out") == expected
    for part in parts.iterdir():
        assert part.read_bytes().startswith(before.get(part.name, b""))
        assert [i for i, _ in read_lines(part)] == list(range(12))


# ---- the judge ----
ASPECTS = ("Subject Correspondence", "Appearance Description", "Temporal Description")
ASPECTS += ("Hallucination Detection",)


def marked(*marks):
    """A reply as the published prompt asks for."""
    rows = (f"{aspect}: {mark}\nExplanation: 2 of 5 are." for aspect, mark in zip(ASPECTS, marks))
    return "\n".join(f"{i}. {row}" for i, row in enumerate(rows, start=1))


class Judge(http.server.BaseHTTPRequestHandler):
    """Does what the server's script says next: a text to reply, a status, or an address to redirect to.
    At the end of the script it replies with four fours."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, {**self.headers}, body))
        act = self.server.script.pop(0) if self.server.script else marked(4, 4, 4, 4)
        is_redirect = str(act).startswith("http")
        self.send_response(act if isinstance(act, int) else 307 if is_redirect else 200)
        self.send_header("Retry-After-Ms", "1")  # otherwise openai waits half a second and more
        if is_redirect:
            self.send_header("Location", act)
        self.end_headers()
        message = {"message": {"role": "assistant", "content": act}}
        reply = "<html>" if act == "garbage" else json.dumps({"model": "local-1", "choices": [message]})
        self.wfile.write(reply.encode())

    def log_message(self, *_):
        pass


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
    write_lines(tmp_path / "p.jsonl", lines)
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
    kept = read_lines(tmp_path / "judged.jsonl")[1]
    assert (kept["id"], kept["reply"], kept["model"]) == (1, marked(1, 1, 1, 1), "local-1")
    assert "secret" not in (tmp_path / "judged.jsonl").read_text()
    # Another judge, column or prediction is asked about by itself, and the others are kept.
    assert judge("--judge other")[0] == [4] * 5 and server.asked[-1][2]["model"] == "other"
    assert judge("--column box")[0] == [4] * 5 and "Box 2." in str(server.asked[-1][2])
    assert judge() == (means, [3, 0]) and len(server.asked) == 9
    file.write_text(file.read_text().replace("Sits 1", "Sat 1"))
    assert judge()[0] == [3, 4, 4, 2, 3.25] and len(server.asked) == 10


def test_a_judge_that_falters_is_asked_again_and_the_next_run_goes_on(judge, server, tmp_path):
    """Statuses that pass are tried nine times, others once. No reply is lost."""
    server.script = [408, 409, 429, 500]
    assert judge() == ([4] * 5, [3, 0]) and len(server.asked) == 7
    for stops in ([503] * 9, [401], ["garbage"]):
        server.asked, server.script = [], [marked(5, 5, 5, 5), *stops]
        (tmp_path / "judged.jsonl").write_text("")
        assert "--url" in refused(judge)
        with open(tmp_path / "judged.jsonl", "a") as file:
            file.write('{"id": 1, "requ')  # as a kill leaves it
        assert judge()[1] == [3, 0] and len(server.asked) == 1 + len(stops) + 2
        assert column(read_lines(tmp_path / "judged.jsonl"), "id") == [0, 1, 2]


def test_the_key_does_not_follow_a_redirect(judge, server):
    """What arrives after a redirect to another host: no header holds it."""
    server.script = [f"http://localhost:{server.port}/elsewhere"]
    assert judge()[1] == [3, 0]
    found = [(path == "/elsewhere", "secret" in str(headers)) for path, headers, _ in server.asked]
    assert found == [(False, True), (True, False), (False, True), (False, True)]


def test_marks_are_read_strictly(judge, server, tmp_path):
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
    server.script = ["Five stars!", None, marked(5, 4, 3, 2)]  # None: withheld by a filter
    assert judge() == ([5, 4, 3, 2, 3.5], [3, 2])
    server.script = ["?"] * 3
    assert judge("--judge other") == ([], [3, 3]) and len(server.asked) == 6
    write_lines(tmp_path / "p.jsonl", [{"id": 7, "pred": "It runs."}])  # without a caption
    assert "p.jsonl: sample 0 (id 7)" in refused(judge) and len(server.asked) == 6


# ---- a question of your own ----
def test_ask_replies_as_to_a_data_file(evaluate, loaded, checkpoint, media, tmp_path, capsys):
    """The objects of its options, and of its function, against the same masks in a data file."""
    drawn, first = box_mask(96, 96, 60, 50, 20, 25), {3: box(10, 20, 30, 40)}
    picture, faint = tmp_path / "m.png", tmp_path / "faint.png"
    Image.fromarray(drawn * 255).save(picture)
    Image.fromarray(drawn * 3).save(faint)  # what is brighter than half of the brightest
    rows = [
        (f"{media}/a --object 3:10,20,30,40", [first]),
        (f"{media}/a --object 3:10,20,30,40 0:9,9,90,9,90,90", [first | {0: [9, 9, 90, 9, 90, 90]}]),
        (f"{media}/b --object 5:{picture} --object 5:0,0,9.5,9", [{5: rle(drawn)}, {5: box(0, 0, 9.5, 9)}]),
        (f"{media}/b --object 5:{faint}", [{5: rle(drawn)}]),
        (f"{media}/wide.png --object 96,0,32,64", [{0: box(96, 0, 32, 64)}]),
        (f"{media}/wide.png --object 0:0,0,128,0,128,64", [{0: [0, 0, 128, 0, 128, 64]}]),
        (f"{media}/a", []),
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
        assert evaluation.ask(*loaded, frames, "What? <region>", [{5: mask}], 6) == answers[3]
    said = run(f"eval.py ask 'What? <region>' {common} --video {rows[0][0]}")  # as a user does
    assert said.splitlines()[-1] == answers[0].splitlines()[-1]
    program = (TOP / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = program.replace("out/final", str(checkpoint)).replace("a.mp4", str(media / "a"))
    exec(program.replace("{36", "{3").replace("100, 50, 200, 80", "10, 20, 30, 40"), {})
    answer = evaluation.ask(*loaded, media / "a", "What is <region> doing?", [first])
    assert capsys.readouterr().out.endswith(answer + "\n")


def test_a_preview_shows_the_frames_that_have_masks(loaded, tmp_path):
    """Of a red, a green and a blue frame, by colour; without objects the first."""
    colours, frames = [(255, 0, 0), (0, 255, 0), (0, 0, 255)], [tmp_path / f"{k}.png" for k in range(3)]
    for file, colour in zip(frames, colours):
        Image.new("RGB", (96, 96), colour).save(file)
    for masks, shown in (
        ([{0: box(9, 9, 30, 30), 2: box(9, 9, 40, 40)}], [True, False, True]),
        ([], [True, False, False]),
    ):
        evaluation.ask(*loaded, frames, "?" + "<region>" * len(masks), masks, 1, tmp_path / "preview")
        pixels = np.asarray(Image.open(tmp_path / "preview").convert("RGB"))
        assert [(pixels == colour).all(-1).sum() > 1000 for colour in colours] == shown


def test_what_is_wrong_with_an_object_is_named(loaded, checkpoint, media, tmp_path):
    """A DataError with what was found, behind the ; of each line."""
    Image.new("L", (96, 40)).save(tmp_path / "m.png")
    rows = f"""3:80,10,30,30; 3:80,10,30,30
        3:1,2,3,4,5,200; 200
        3:1,,3,4; 3:1,,3,4
        8:1,2,30,40; 8
        x:1,2,30,40; x:1,2,30,40
        1,2,30,40; 1,2,30,40
        3:1,2,30,40 3:1,2,30,40; 3:1,2,30,40
        3:1,2,30,40 --object 3:1,2,3,4; 2
        3:{tmp_path}/m.png; 96x96
        3:absent.png; absent.png
        3:40,50 --model none; 40.0, 50.0
        0:0,40,32,32 --image {media}/wide.png; 128x64
        100,0,32,64 --image {media}/wide.png; 128x64"""
    for options, found in (row.split("; ") for row in rows.split("\n")):
        command = f"ask <region> --model {checkpoint} --device cpu --video {media}/a --object {options}"
        assert found in refused(command), options
    assert "1)" in refused(evaluation.ask, *loaded, media / "a", "<region>", [{3: np.ones((96, 96, 1))}])


# ---- the command line, and README.md ----
def test_options_and_their_defaults(capsys):
    """Documented numbers; numbers that cannot be; and the options of the commands in README.md."""
    ask, of_data = "ask Why? --model m --video v", "data x.json --model m --out o"
    for command, defaults in (
        (ask, {"max_new_tokens": 128, "device": "cuda" if torch.cuda.is_available() else "cpu"}),
        (of_data, {"max_new_tokens": 128, "batch_size": 32, "workers": 2, "control": [], "media": None}),
        ("bench-d x.json --model m --out o", {"mode": "single", "max_new_tokens": 128}),
        ("judge p --prompt s", {"url": "https://api.openai.com/v1", "judge": "gpt-4o", "column": "pred"}),
    ):
        assert vars(evaluation.parse(command.split())).items() >= defaults.items()
    for options in (f"{of_data} --batch-size 0", f"{of_data} --workers -1", f"{ask} --max-new-tokens 0"):
        with pytest.raises(SystemExit, match="2"):
            evaluation.parse(options.split())
        assert options.split()[-2] in capsys.readouterr().err
    text = (TOP / "README.md").read_text() + evaluation.__doc__.replace("\n    ", "\n")
    commands = re.findall(r"^(?:python|torchrun[^\n]*?) eval\.py (.*)$", text, re.MULTILINE)
    assert len([evaluation.parse(shlex.split(command, comments=True)) for command in commands]) >= 12
