"""Evaluation: asks a model about objects, and measures how good its answers are.

    python eval.py --model out/final --video a.mp4 --frame 36 --box 100,50,200,80 --ask "What is <region> doing?"
    python eval.py --model out/final --data test.json                          # exact match and loss, by type
    python eval.py --model out/final --data test.json --control full shuffle   # the same with other masks
    python eval.py --model out/final --bench-q VideoRefer-Bench-Q.json --media DIR --out q    # multiple choice
    python eval.py --model out/final --bench-d VideoRefer-Bench-D.json --media DIR --out d    # descriptions,
    python eval.py --bench-d VideoRefer-Bench-D.json --score d/predictions.jsonl --out d --judge URL   # judged

    data file --read_questions--> questions --data.collate--> batches --model.generate--> answers
        --> OUT/parts/*.jsonl --> OUT/predictions.jsonl, OUT/scores.json and a table

Every answer of a conversation is one question: the model reads the conversation up to there, with the earlier
answers as the data file has them, and answers greedily. A control asks the same questions with other masks: the
whole frame (full), or the mask of another sample's object (shuffle). What is still right then does not come from
the mask.

Everything also runs under torchrun, where each rank asks its share. With --out, the same command resumes a run that
was killed. Nothing is scored before each question has exactly one answer.

A bad sample ends a run with --data: mend the file (python data.py FILE lists them all). A benchmark continues
without a bad entry, which gets an "error" in predictions.jsonl, counts as wrong in --bench-q, is not judged in
--bench-d, and is counted in scores.json.
"""

import argparse
import glob
import hashlib
import http.client
import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models
from train import (
    append_jsonl,
    first_on_this_machine,
    init_distributed,
    rank,
    read_jsonl,
    sum_over_ranks,
    world_size,
)


def load(path, device=None):
    """Returns (model, processor) of a folder that train.py wrote, or of a plain backbone.

    The settings in the folder make the model see a video as it did in training.
    """
    processor = models.load_processor(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return models.load_model(path, processor).to(device).eval(), processor


# ---- questions and answers ----

# What a line of predictions.jsonl repeats of the data file's entry.
ENTRY_FIELDS = ("id", "video", "image", "caption", "frame_idx", "Question", "options", "Answer")


def read_questions(samples, strict):
    """Returns (questions, keys): for each answer of each sample a dict and the pair (sample index, turn index).

    The dict becomes a line of predictions.jsonl. Its "regions" is True if this turn or an earlier one has a region.
    A bad sample raises its DataError if strict. Otherwise it becomes one question with an "error" and no answer,
    and the first error is raised only if every sample is bad.
    """
    questions, keys = [], []
    for sample_index in range(len(samples)):
        entry, _, _, position = samples.read(sample_index)
        entry = entry if isinstance(entry, dict) else {}
        common = {"id": position} | {name: entry[name] for name in ENTRY_FIELDS if name in entry}
        common["type"] = str(entry.get("type") or "")
        try:
            turns = samples[sample_index].turns
        except data.DataError as error:
            if strict:
                raise
            turns, common["error"] = [("", "")], str(error)
        has_region = "error" in common
        for turn_index, (text, answer) in enumerate(turns):
            has_region = has_region or data.REGION_TAG in text
            turn = {"turn": turn_index, "question": text, "answer": answer.strip() or None}
            questions.append(common | turn | {"regions": has_region})
            keys.append((sample_index, turn_index))
    if all("error" in question for question in questions):
        raise data.DataError(f"{questions[0]['error']}; and none of the other {len(samples) - 1} can be used")
    return questions, keys


class Questions(data.ReferringDataset):
    """The samples, encoded up to one of their answers. A key is (sample index, turn index)."""

    def __getitem__(self, key):
        try:
            return self.question(*key)
        except data.DataError as error:
            return error  # an exception would end the DataLoader's worker


def batches(dataset, keys, device, pad_left=False, batch_size=1, workers=0):
    """Yields dataset[key] for all keys, in order, as batches on the device (see data.collate)."""
    pad_token_id = dataset.processor.tokenizer.pad_token_id
    collate = partial(data.collate, pad_token_id=pad_token_id, pad_left=pad_left)
    loader = DataLoader(dataset, batch_size, sampler=keys, collate_fn=collate, num_workers=workers)
    for batch in tqdm(loader, unit="batch", leave=False, disable=rank() > 0 or len(keys) == 1):
        yield data.to_device(batch, device)


def generate_answers(model, processor, dataset, keys, max_new_tokens, **loading):
    """Yields for each key, in order, the model's answer as text, or the DataError of a sample that is bad.

    loading: batch_size and workers, as for batches.
    """
    tokenizer, device = processor.tokenizer, next(model.parameters()).device
    for batch in batches(dataset, keys, device, pad_left=True, **loading):
        tokens = []
        if not all(batch["errors"]):
            tokens = model.generate(batch, tokenizer.eos_token_id, max_new_tokens)
        texts = iter(tokenizer.batch_decode(tokens, skip_special_tokens=True))
        for error in batch["errors"]:
            yield error or next(texts).strip()


@torch.no_grad()
def mean_loss(model, processor, samples, args):
    """The cross-entropy of the right answers: a sum over all supervised tokens of all ranks, divided once."""
    dataset = data.ReferringDataset(samples, processor)
    keys = [(0, sample_index) for sample_index in range(len(samples))][rank() :: world_size()]
    loss, tokens = 0.0, 0
    for batch in batches(dataset, keys, args.device, batch_size=args.batch_size, workers=args.workers):
        for error in filter(None, batch["errors"]):
            raise error
        loss += model(batch).item()
        tokens += batch["supervised_tokens"]
    loss, tokens = sum_over_ranks([loss, tokens], args.device)
    return loss / tokens


# ---- the table ----


def score(questions, columns):
    """Returns {row: {"questions": n, title: {"right": n, "asked": n}, ...}}; group says which rows there are.

    columns: {title: the key under which a question holds its reply}. A reply is right if it equals the answer, up to
    white space at the ends. One that is None (the question could not be asked) is wrong, and one that is absent (a
    control asks nothing without a region) does not count.

    A column "constant" is added: how many the most frequent answer to each type of question would get right. Within
    a type, the questions with and without regions have constants of their own, because controls ask only the former.
    """
    frequency = defaultdict(Counter)
    for question in questions:
        frequency[question["type"], question["regions"]][question["answer"]] += 1
    constant = {kind: answers.most_common(1)[0][0] for kind, answers in frequency.items()}
    questions = [q | {"constant": constant[q["type"], q["regions"]]} for q in questions]
    scores = {}
    for row, members in group(questions).items():
        scores[row] = {"questions": len(members)}
        for title, key in (columns | {"constant": "constant"}).items():
            asked = [q for q in members if key in q]
            right = [q for q in asked if q[key] is not None and q[key] == q["answer"]]
            scores[row][title] = {"right": len(right), "asked": len(asked)}
    return scores


def group(questions):
    """Returns {row of the table: its questions}: by type, those about regions if some are not, and all."""
    by_type = defaultdict(list)
    for question in questions:
        by_type[question["type"] or "(no type)"].append(question)
    rows = dict(sorted(by_type.items()))
    about_regions = [question for question in questions if question["regions"]]
    if 0 < len(about_regions) < len(questions):
        rows["about regions"] = about_regions
    return rows | {"all": questions}


def print_table(scores):
    width = max(map(len, scores)) + 3
    titles = [title for title in scores["all"] if title != "questions"]
    print(" " * width + "".join(f"{title:>18}" for title in titles))
    for row, counts in scores.items():
        line = f"{row:{width}}"
        for title in titles:
            right, asked = counts[title]["right"], counts[title]["asked"]
            cell = f"{right}/{asked} {100 * right / asked:7.1f} %" if asked else "-"
            line += f"{cell:>18}"
        print(line)


# ---- VideoRefer-Bench ----


class Bench:
    """VideoRefer-Bench-Q or -D as a sequence of samples of one turn, like the one that data.read_samples returns."""

    def __init__(self, path, to_turn, single_frame=False, media=None, outside_paths=False):
        """to_turn: bench_q_turn or bench_d_turn. single_frame: masks on the published frame alone."""
        self.samples = data.read_samples(path, media, outside_paths)
        self.to_turn, self.single_frame, self.outside_paths = to_turn, single_frame, outside_paths

    def __len__(self):
        return len(self.samples)

    def read(self, i):
        return self.samples.read(i)

    def __getitem__(self, i):
        entry, place, media, position = self.read(i)
        with data.within(*place):
            data.expect(isinstance(entry, dict), "a JSON object", entry)
            question, answer = self.to_turn(entry)
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            objects, frame = entry.get("annotation"), str(entry.get("frame_idx"))
            if self.single_frame and isinstance(objects, list):
                objects = [{frame: o.get(frame)} if isinstance(o, dict) else o for o in objects]
            entry = entry | {"conversations": turns, "annotation": objects}
            return data.parse_sample(entry, place, media, position, self.outside_paths)


OPTION = re.compile(r"\(?([A-Z])[).:]\s*(.+)", re.DOTALL)  # "(A) Running"


def read_options(entry):
    """Returns the options of an entry of Bench-Q as {"A": text, ...}, and the letter of the right one."""
    listed, answer = entry.get("options"), entry.get("Answer")
    data.expect(isinstance(listed, list) and listed, 'options: a list ["(A) ...", "(B) ..."]', listed)
    options = {}
    for text in listed:
        match = OPTION.fullmatch(text.strip()) if isinstance(text, str) else None
        data.expect(match and match[1] not in options, 'options: "(A) ...", each letter once', text)
        options[match[1]] = match[2].strip()
    match = OPTION.match(str(answer))
    data.expect(match and match[1] in options, f"Answer: one of the options {''.join(options)}", answer)
    return options, match[1]


def bench_q_turn(entry, no_options=False):
    """Returns (question, letter): the published question, word for word as upstream asks it (PixelRefer's
    VideoRefer/videorefer/eval/inference_videorefer_q_bench.py; its script for VideoLLaMA3 leaves the brackets out).

    no_options: the question alone, for models that never saw options, such as the toy world's. Its numbers cannot be
    compared with published ones.
    """
    options, letter = read_options(entry)
    question = entry.get("Question")
    data.expect(isinstance(question, str), "Question: a text", question)
    if no_options:
        return re.sub(r"<object\d+>", "", question), letter
    question = question.replace(data.REGION_TAG, f"[{data.REGION_TAG}]")
    request = "Answer with the option's letter from the given choices directly."
    return f"{question} {' '.join(entry['options'])}. {request}", letter


def bench_d_turn(entry):
    """Returns (question, caption): the published request (inference_videorefer_d_bench.py in the same folder)."""
    caption = entry.get("caption")
    data.expect(isinstance(caption, str) and caption.strip(), "caption: a text", caption)
    request = (
        f"Please give a detailed description of the highlighted object [{data.REGION_TAG}] in the video."
    )
    return request, caption


BOXED = re.compile(r"\$?\\boxed\{(?:\\text\{)?([^{}]*)\}+\$?")
ANSWER_IS = re.compile(r"(?:the )?(?:(?:best|correct|right|final) )?(?:answer|option)(?: is)?:?\s+", re.I)
# "(B)", "B)", "B. Running" (a capital, because "b." may end a sentence), or a letter alone on its line.
LETTER = re.compile(
    r"\(([A-Z])\)(?!\w)|([A-Z])\)(?!\w)|(?-i:([A-Z])[.:](?=\s))|([A-Z])[.:]?(?=\s*$)", re.I | re.M
)
ANOTHER_LETTER = re.compile(r"\(([A-Z])\)|\b([A-Z])\)|\b([A-Z])[.:]?$", re.M)


def choose(reply, options):
    """Returns the letter that a reply to a multiple-choice question chooses, or None, and what told it: "letter",
    "text" or "none". options: {"A": text, ...}.

    A letter stands at the beginning, or after "The answer is": "(B)", "(b) Running", "B) Running", "B. Running",
    "B: Running", or alone on its line: "B", "b", "B.". Markdown's ** and LaTeX's \\boxed{} are ignored. It must be an
    option's, and no second letter may follow in such a form ("A or B", "(A) or (B)"). A sentence has no letter ("A dog
    runs", "The answer is a dog"). Otherwise a reply may be an option's whole text, up to case and a final period.
    """
    reply = without_markup(reply)
    match = ANSWER_IS.match(reply)
    if match:
        reply = reply[match.end() :]
    match = OPTION.fullmatch(reply)
    if match and match[1] in options and same_text(match[2], options[match[1]]):
        return match[1], "letter"
    match = LETTER.match(reply)
    if match:
        letter = match[match.lastindex].upper()
        others = {other[other.lastindex] for other in ANOTHER_LETTER.finditer(reply, match.end())}
        return (letter, "letter") if letter in options and others <= {letter} else (None, "none")
    same = [letter for letter, text in options.items() if same_text(text, reply)]
    return (same[0], "text") if len(same) == 1 else (None, "none")


def without_markup(text):
    return BOXED.sub(r"\1", text).replace("**", "").strip()


def same_text(a, b):
    a, b = (without_markup(text).removesuffix(".").casefold() for text in (a, b))
    return a == b


def score_choices(questions):
    """Adds to each question the "choice" of its reply, and "by", what told it. Returns (scores as score returns
    them, {"letter": n, "text": n, "none": n})."""
    told = {"letter": 0, "text": 0, "none": 0}
    for question in questions:
        question["choice"], question["by"] = None, "not asked"
        if "error" not in question:
            options, _ = read_options(question)
            question["choice"], question["by"] = choose(question["pred"], options)
            told[question["by"]] += 1
    return score(questions, {"accuracy": "choice"}), told


ASPECTS = (
    "Subject Correspondence",
    "Appearance Description",
    "Temporal Description",
    "Hallucination Detection",
)
# The aspects, the scale and the layout are the published ones; the words are ours. To compare with published
# numbers, give the published system.txt to --judge-prompt.
JUDGE_PROMPT = """You compare two descriptions of one object in a video: the correct answer, and a predicted answer.
Score the prediction on four aspects, each with a whole number from 0 (nothing fits) to 5 (everything fits):
1. Subject Correspondence: is it about the same subject?
2. Appearance Description: are colour, shape, texture and other visible properties right?
3. Temporal Description: is what the object does over time right?
4. Hallucination Detection: is it free of facts, actions and things that are not there? 5 means that nothing is made up.
Reply with four lines such as "1. Subject Correspondence: 5", each followed by a line with a short reason."""  # noqa: E501


def read_marks(reply):
    """Returns a judge's marks as {aspect: 0 to 5}, or None unless each aspect has one line with one whole number."""
    marks = {}
    for aspect in ASPECTS:
        # "3. **Temporal Description**: 4/5", but neither "4.5" nor "4/10".
        line = rf"^[\s\d.#*-]*{aspect}[\s*]*:[\s*]*(\d+)(?:\s*/\s*5\b)?(?![\d/]|\.\d)"
        found = re.findall(line, reply, re.MULTILINE | re.IGNORECASE)
        if len(found) != 1 or int(found[0]) > 5:
            return None
        marks[aspect] = int(found[0])
    return marks


# ---- a question of your own ----


def ask(model, processor, media, question, objects=(), max_new_tokens=128):
    """Returns the model's answer to one question about a video or an image. Raises data.DataError.

    media: a path. question: has one `<region>` for each object, in order. objects: a dict {frame index: mask} for
    each object; the frame of an image is 0. A mask is an array (H, W), not 0 inside the object, or what a data file
    may have: RLE, or polygons in pixels of the frame (see box).
    """
    dataset = question_dataset(processor, media, question, objects)
    answer = next(generate_answers(model, processor, dataset, [(0, 0)], max_new_tokens))
    if isinstance(answer, data.DataError):
        raise answer
    return answer


def question_dataset(processor, media, question, objects):
    """Returns the one sample that ask asks about, as a dataset."""
    annotation = []
    for frames in objects:
        annotation.append({str(i): {"segmentation": to_segmentation(mask)} for i, mask in frames.items()})
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "-"}]  # a sample needs an answer
    entry = {"video": os.fspath(media), "conversations": turns, "annotation": annotation}
    return Questions([data.parse_sample(entry, (os.fspath(media),), "", 0, outside_paths=True)], processor)


def to_segmentation(mask):
    """Returns a mask as a data file may have it: an array (H, W) becomes RLE."""
    if not isinstance(mask, np.ndarray):
        return mask
    data.expect(mask.ndim == 2, "a mask (H, W)", mask.shape)
    rle = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return rle | {"counts": rle["counts"].decode()}


def box(x, y, w, h):
    """Returns the polygon of a box: (x, y) is its upper left corner, (w, h) its size, in pixels of the frame."""
    data.expect(w > 0 and h > 0, "a box x,y,w,h of a size above 0", (w, h))
    left, top, right, bottom = map(float, (x, y, x + w, y + h))  # float: numpy's numbers are allowed
    return [left, top, right, top, right, bottom, left, bottom]


# ---- A first reading may end here. What follows is armour: resumed runs, the judge's server, the options. ----


def evaluate(args):
    """Runs --data or a benchmark: reads the questions, asks them (or reads the answers of --score), and scores."""
    bench = args.bench_q or args.bench_d
    with first_on_this_machine():  # the first rank writes the index of the data file, the others read it
        samples = open_bench(args) if bench else data.read_samples(args.data, args.media, args.outside_paths)
    questions, keys = read_questions(samples, strict=not bench)
    if bench:
        ids = [json.dumps(question["id"]) for question in questions]
        check_once(ids, ids, bench)
    if args.score:
        os.makedirs(args.out, exist_ok=True)
        scores = {}
        add_replies(questions, "pred", read_predictions(args.score, questions), strict=False)
    else:
        if rank() == 0:
            open_run(args)
        model, processor = load(args.model, args.device)
        scores = {"mode": args.mode, "no_options": args.no_options}
        if not bench:
            scores = {"loss": mean_loss(model, processor, samples, args)}
        for control in ("none", *args.control):
            asked = {i: key for i, key in enumerate(keys) if control == "none" or questions[i]["regions"]}
            replies = answer_all(model, processor, samples, asked, control, args)
            plain_name = "pred" if bench else "exact"
            name = plain_name if control == "none" else control
            add_replies(questions, name, replies, strict=not bench)
    is_first = rank() == 0
    if (
        dist.is_initialized()
    ):  # the other ranks end here: a judge may take longer than they can wait for rank 0
        dist.barrier()
        dist.destroy_process_group()
    if is_first:
        report(questions, scores, args)


def open_bench(args):
    to_turn = partial(bench_q_turn, no_options=args.no_options) if args.bench_q else bench_d_turn
    single_frame = args.mode == "single" and not args.score  # --score reads no masks, so they may be missing
    return Bench(args.bench_q or args.bench_d, to_turn, single_frame, args.media, args.outside_paths)


def add_replies(questions, name, replies, strict):
    """Gives each question its reply under name; for a DataError None, and the question's "error".

    replies: {question index: text or DataError}. An error is raised if strict, or if there are only errors.
    """
    errors = [reply for reply in replies.values() if isinstance(reply, data.DataError)]
    if errors and (strict or len(errors) == len(replies)):
        raise errors[0]
    for i, reply in replies.items():
        if isinstance(reply, data.DataError):
            questions[i]["error"], reply = str(reply), None
        questions[i][name] = reply


def report(questions, scores, args):
    """Scores the replies, prints the result, and writes OUT/predictions.jsonl and OUT/scores.json."""
    if args.data:
        scores["rows"] = score(questions, {name: name for name in ("exact", *args.control)})
        print_table(scores["rows"])
        print(f"loss {scores['loss']:.4f} per supervised token")
    if args.bench_q:
        scores["rows"], told = score_choices(questions)
        scores["replies"] = told
        print_table(scores["rows"])
        line = f"replies that name a letter: {told['letter']}; an option's whole text: {told['text']}; "
        print(line + f"neither, which is wrong: {told['none']}")
    if not args.score:  # with --score, OUT may be the folder of the run that made these predictions
        write_jsonl(os.path.join(args.out, "predictions.jsonl"), questions)
    if args.bench_d:
        print(f"{len(questions)} descriptions")
    if args.judge:
        scores |= judge([question for question in questions if "error" not in question], args)
    errors = [question["error"] for question in questions if "error" in question]
    scores["not_asked"] = len(errors)
    write_text(os.path.join(args.out, "scores.json"), json.dumps(scores, indent=2))
    if errors:
        fate = "wrong above" if args.bench_q else "not judged"
        line = f"{len(errors)} of {len(questions)} questions could not be asked: {fate}; "
        print(line + f"the first: {errors[0]}")


# ---- each question exactly once ----


def open_run(args):
    """Makes the folder OUT, or finds the one that the same command began. Raises SystemExit if OUT holds other things.

    OUT/run.json tells: how questions are asked, and the sizes and times of the data files and the model's weights.
    """
    run = {name: getattr(args, name) for name in ("model", "media", "mode", "no_options", "max_new_tokens")}
    weights = glob.glob(os.path.join(glob.escape(args.model), "*.safetensors"))
    for path in [*(args.data or [args.bench_q or args.bench_d]), *sorted(weights)]:
        run[os.path.abspath(path)] = [os.path.getsize(path), os.stat(path).st_mtime_ns]
    if not os.path.exists(args.out) or os.path.isdir(args.out) and not os.listdir(args.out):
        with data.atomic_write(args.out) as folder:
            os.mkdir(folder)
            write_jsonl(os.path.join(folder, "run.json"), [run])
    elif read_jsonl(os.path.join(args.out, "run.json")) != [run]:
        raise SystemExit(
            f"--out {args.out}: exists, but another command made it; name another folder, or remove it"
        )


def answer_all(model, processor, samples, keys, control, args):
    """Returns {question index: the model's answer, or a DataError} for keys {question index: (sample index, turn
    index)}, the same on every rank.

    Each rank asks its share of what OUT/parts does not hold yet, and appends every answer at once to a file that no
    other process writes to. A DataError is not written: a resumed run asks again, the video may be there by then.
    """
    parts = os.path.join(args.out, "parts")
    # Rank 0 reads for all. Otherwise a slow rank would read what a fast one has written already, and they would
    # disagree on what is left.
    answers = gather(read_answers(parts, control) if rank() == 0 else None)[0]
    share = [i for i in keys if i not in answers][rank() :: world_size()]
    dataset, share_keys = Questions(samples, processor, control=control), [keys[i] for i in share]
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    generated = generate_answers(model, processor, dataset, share_keys, args.max_new_tokens, **loading)
    os.makedirs(parts, exist_ok=True)
    path = os.path.join(parts, f"{control}-{rank()}-{time.time_ns()}.jsonl")
    new_answers = {}
    for i, answer in zip(share, generated):
        new_answers[i] = answer
        if isinstance(answer, str):
            append_jsonl(path, {"question": i, "answer": answer})
    for answers_of_rank in gather(new_answers):
        answers |= answers_of_rank
    check_once(list(answers), keys, parts)
    return dict(sorted(answers.items()))


def read_answers(parts, control):
    """Returns {question index: answer} from all files in the folder parts. Two runs at once may both have answered a
    question; raises data.DataError if their answers differ."""
    answers = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(parts), f"{control}-*.jsonl"))):
        for line in read_jsonl(path):
            i, answer = line["question"], line["answer"]
            if answers.setdefault(i, answer) != answer:
                found = f"{data.shorten(answers[i])} and {data.shorten(answer)}"
                raise data.DataError(f"expected one answer to question {i}, found {found}", path)
    return answers


def gather(value):
    """Returns the values of all ranks, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_once(found, expected, place):
    """Raises data.DataError unless found holds each of expected exactly once, and nothing else."""
    counts, expected = Counter(found), dict.fromkeys(expected)
    faults = [f"question {key} {counts[key]} times" for key in expected if counts[key] != 1]
    faults += [f"unknown {key} {counts[key]} times" for key in counts if key not in expected]
    if faults:
        reason = f"expected each of {len(expected)} questions exactly once, found {len(faults)} faults"
        raise data.DataError(f"{reason}: {', '.join(faults[:3])}", place)


def read_predictions(path, questions):
    """Reads lines {"id": ..., "pred": text}, one for each question. Returns {question index: text or DataError}."""
    lines = data.read_samples(path)
    found, replies = [], {}
    for i in range(len(lines)):
        line, place, *_ = lines.read(i)
        with data.within(*place):
            is_prediction = isinstance(line, dict) and "id" in line and "pred" in line
            data.expect(is_prediction, 'an object with "id" and "pred"', line)
        reply = line["pred"]
        if not isinstance(reply, str):
            reply = data.DataError(str(line.get("error", "its pred is not a text")))
        found.append(json.dumps(line["id"]))
        replies[found[-1]] = reply
    ids = [json.dumps(question["id"]) for question in questions]
    check_once(found, ids, path)
    return {i: replies[id] for i, id in enumerate(ids)}


def write_jsonl(path, lines):
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_text(path, text):
    with data.atomic_write(path) as temporary, open(temporary, "w") as file:
        file.write(text)


# ---- the judge's server ----

RETRIES, JUDGE_TIMEOUT = 5, 120  # seconds


def judge(lines, args):
    """Has each description judged, prints the mean marks, and returns what scores.json says of them.

    Each reply becomes a line of OUT/judged.jsonl at once, and is not asked for again. Raises data.DataError if that
    file holds marks of other predictions, or of another judge or prompt.
    """
    system = JUDGE_PROMPT
    if args.judge_prompt:
        with open(args.judge_prompt) as file:
            system = file.read()
    setting = {"judge": args.judge_model, "prompt": hashlib.sha256(system.encode()).hexdigest()[:12]}
    wanted = {}
    for line in lines:
        fields = {name: line.get(name) for name in ("id", "video", "caption", "pred")}
        wanted[json.dumps(line["id"])] = fields | setting
    path = os.path.join(args.out, "judged.jsonl")
    judged = read_jsonl(path)
    for line in judged:
        is_same = wanted.get(json.dumps(line["id"]), {}).items() <= line.items()
        data.expect(is_same, f"in {path} only what this judge said of these predictions", line)
    write_jsonl(path, judged)  # removes what a kill may have left of a last line
    known = {json.dumps(line["id"]) for line in judged}
    for id in tqdm([id for id in wanted if id not in known], unit="reply", leave=False):
        texts = f"##Correct answer: {wanted[id]['caption']}\n##Predicted answer: {wanted[id]['pred']}\n"
        reply, model = chat(args, system, texts)
        judged.append(wanted[id] | {"model": model, "reply": reply, "marks": read_marks(reply)})
        append_jsonl(path, judged[-1])
    check_once([json.dumps(line["id"]) for line in judged], wanted, path)

    marks = [line["marks"] for line in judged if line["marks"]]
    failed = len(judged) - len(marks)
    means = dict.fromkeys((*ASPECTS, "Average"))
    if marks:
        means = {aspect: sum(mark[aspect] for mark in marks) / len(marks) for aspect in ASPECTS}
        means["Average"] = sum(means.values()) / len(ASPECTS)
    names = sorted({str(line["model"]) for line in judged})
    source = args.judge_prompt or "the prompt in eval.py, not the published one"
    line = f"judge: {args.judge_model} at {args.judge}, which calls itself {', '.join(names)}; "
    print(line + f"prompt {setting['prompt']} ({source})")
    for aspect, mean in means.items():
        print(f"{aspect:26}{'-' if mean is None else f'{mean:.2f}':>6}")
    print(f"{len(judged)} replies, {failed} of them without four scores: left out of the means")
    return setting | {"models": names, "means": means, "replies": len(judged), "failed": failed}


def chat(args, system, user):
    """Asks the chat-completions server of --judge. Returns (its reply, the model it says it is).

    Faults that may pass, such as a busy server, are retried. Others, such as a wrong key, and the last retry raise
    SystemExit.
    """
    url = args.judge.rstrip("/") + "/chat/completions"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = json.dumps({"model": args.judge_model, "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if os.environ.get("OPENAI_API_KEY"):  # unredirected: the key must not follow to another server
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['OPENAI_API_KEY']}")
    for attempt in range(RETRIES + 1):
        if attempt:
            time.sleep(min(2**attempt, 30))
        try:
            with urllib.request.urlopen(request, timeout=JUDGE_TIMEOUT) as response:
                reply = json.load(response)
            text = reply["choices"][0]["message"]["content"]
            return text if isinstance(text, str) else "", reply.get("model")  # null: withheld by a filter
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 409, 429):
                raise SystemExit(f"--judge {url}: {problem}") from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
    problem = f"no answer in {RETRIES + 1} tries, the last: {problem}"
    raise SystemExit(f"--judge {url}: {problem}. The same command resumes from here.")


# ---- the command line ----


def run_ask(args):
    info = data.media_info(args.video)
    objects = read_objects(args.pointed, info)
    model, processor = load(args.model, args.device)
    if args.preview:
        dataset = question_dataset(processor, args.video, args.ask, objects)
        frames = {frame for frames in objects for frame in frames}
        picture = data.preview(dataset, [0], frames_shown=len(frames), panel_height=min(info.height, 480))
        with data.atomic_write(args.preview) as path:
            picture.save(path, "PNG")
    print(ask(model, processor, args.video, args.ask, objects, args.max_new_tokens))


class Pointing(argparse.Action):
    """Appends (option, value) to args.pointed: the order of --frame, --object and the masks matters."""

    def __call__(self, parser, namespace, text, option_string=None):
        option = self.option_strings[0].removeprefix("--")
        try:
            value = read_pointing(option, text)
        except ValueError:
            raise argparse.ArgumentError(self, f"invalid {self.metavar} value: {text!r}") from None
        namespace.pointed = [*namespace.pointed, (option, value)]


def read_pointing(option, text):
    """Returns the value of an option that points at an object. Raises ValueError for a text of another form."""
    if option == "object":
        return None
    if option == "frame":
        return int(text)
    if option == "mask":
        return np.asarray(Image.open(text).convert("L"))
    numbers = [float(number) for number in text.split(",")]
    if option == "polygon":
        return numbers
    x, y, w, h = numbers
    return box(x, y, w, h)


def read_objects(pointed, info):
    """Returns objects as ask takes them. A mask lies on the --frame named last; --object begins the next object.

    pointed: [(option, value)] in the order given. info: the data.MediaInfo of the video or image.
    """
    objects, named, frame = [{}], set(), 0 if info.is_image else None
    for option, value in pointed:
        if option == "object":
            objects.append({})
        elif option == "frame":
            frame = value
            named.add(frame)
        else:
            data.expect(frame is not None, "--frame before the first mask of a video", f"--{option}")
            is_new = frame not in objects[-1]
            data.expect(is_new, "one mask a frame (--object begins the next object)", f"two on frame {frame}")
            if option != "mask":
                in_width = all(0 <= x <= info.width for x in value[0::2])
                in_height = all(0 <= y <= info.height for y in value[1::2])
                inside = f"--{option} inside the picture, {info.width}x{info.height} (width x height)"
                data.expect(in_width and in_height, inside, value)
            objects[-1][frame] = value
    unused = sorted(named.difference(*objects))
    data.expect(not unused, "a mask (--box, --polygon or --mask) after each --frame", f"none on {unused}")
    return [frames for frames in objects if frames]


def parse(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--model", help="a folder that train.py wrote (OUT/final), or a pretrained backbone")
    source("--score", metavar="JSONL", help="score these predictions of a benchmark: lines with id and pred")
    task = parser.add_mutually_exclusive_group(required=True).add_argument
    task("--ask", metavar="QUESTION", help="one question about --video, with one <region> for each object")
    task("--data", nargs="+", help="data files: JSON arrays or JSONL")
    task("--bench-q", metavar="JSON", help="VideoRefer-Bench-Q: multiple choice")
    task("--bench-d", metavar="JSON", help="VideoRefer-Bench-D: descriptions")
    add("--video", "--image", help="what --ask is about")
    point = partial(add, action=Pointing, dest="pointed", default=[])
    point("--frame", metavar="N", help="the frame that the next masks lie on, from 0")
    point("--box", metavar="X,Y,W,H", help="a mask: upper left corner and size, in pixels of the frame")
    point("--polygon", metavar="X1,Y1,X2,Y2,...", help="a mask: its corners")
    point("--mask", metavar="PICTURE", help="a mask: all that is not black")
    point("--object", nargs=0, help="the masks that follow belong to the next object")
    add("--preview", metavar="PNG", help="draw the objects of --ask into their frames")
    add("--media", help="folder that media paths are relative to (default: each data file's own)")
    add("--outside-paths", action="store_true", help="also take media paths that lead out of that folder")
    controls = ("full", "shuffle")
    add("--control", nargs="+", choices=controls, default=[], help="ask --data again with other masks")
    modes = ("single", "multi")
    add(
        "--mode", choices=modes, default="single", help="masks of a benchmark: on the published frame, or all"
    )
    add("--no-options", action="store_true", help="--bench-q: ask without options; an option's text is right")
    add("--judge", metavar="URL", help="--bench-d: a chat-completions server; its key is in OPENAI_API_KEY")
    add("--judge-model", default="gpt-4o", help="(default: %(default)s)")
    add("--judge-prompt", metavar="FILE", help="the published system.txt, instead of eval.py's own words")
    add("--out", help="a new folder for predictions.jsonl and scores.json, or that of a run to resume")
    add("--batch-size", type=int, default=32)
    add("--max-new-tokens", type=int, default=128)
    add("--workers", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    bench, asks = args.bench_q or args.bench_d, args.ask is not None
    for is_wrong, message in (
        (args.score and not bench, "--score: goes with --bench-q or --bench-d"),
        (args.control and not args.data, "--control: goes with --data"),
        (args.judge and not args.bench_d, "--judge: goes with --bench-d"),
        (bench and not args.out and (args.judge or not args.score), "--out is missing"),
        (asks and args.out, "--out: does not go with --ask"),
        (asks and not args.video, "--ask: --video or --image is missing"),
        (
            not asks and (args.pointed or args.preview or args.video),
            "--video, masks, --preview go with --ask",
        ),
    ):
        if is_wrong:
            parser.error(message)
    return args


def main(argv=None):
    args = parse(argv)
    args.device = init_distributed(args.device)
    if args.ask is not None:
        return run_ask(args)
    with tempfile.TemporaryDirectory() as scratch:
        args.out = args.out or scratch
        evaluate(args)


if __name__ == "__main__":
    try:
        main()
    except (data.DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
