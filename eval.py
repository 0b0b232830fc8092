"""Evaluation: asks a model about objects, and measures how good its answers are.

    python eval.py --model out/final --video a.mp4 --frame 36 --box 100,50,200,80 --ask "What is <region>?"
    python eval.py --model out/final --data test.json                          # exact match and loss, by type
    python eval.py --model out/final --data test.json --control full shuffle box blind   # with controls
    python eval.py --model out/final --bench-q VideoRefer-Bench-Q.json --media DIR --out q   # multiple choice
    python eval.py --model out/final --bench-d VideoRefer-Bench-D.json --media DIR --out d   # descriptions
    python eval.py --bench-q VideoRefer-Bench-Q.json --score q/predictions.jsonl   # of any model: id and pred
    # A server of chat completions judges these descriptions:
    python eval.py --bench-d VideoRefer-Bench-D.json --score d/predictions.jsonl --out d --judge https://HOST

    data file --read_questions--> questions --data.collate--> batches --train.generate_replies--> replies
        --> OUT/parts/*.jsonl --> OUT/predictions.jsonl, OUT/scores.json and a table

Every answer of a conversation is one question: the model reads the conversation up to there, and replies
greedily. A control asks them again, for a column of its own. Three ask those about regions with other masks:
the whole frame (full), the masks of an object on other media (shuffle), or bounding boxes (box). blind asks
all of them as text alone, with "the object" in place of `<region>`. What is still right then does not come
from what was replaced.

All of it runs under torchrun as well (--ask on the first rank alone). With --out, the same command resumes a
run that was killed, and controls can be added later; the loss is computed again. A bad sample ends --data
(python data.py FILE lists all of them). A benchmark continues without a bad entry, which gets an "error" in
predictions.jsonl, is wrong in all columns of --bench-q, and is not judged in --bench-d.
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from bisect import bisect_right
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm
from transformers import AutoConfig, Sam2VideoInferenceSession, Sam2VideoModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import data
import model as models
from train import (
    append_jsonl,
    first_on_this_machine,
    gather_over_ranks,
    generate_replies,
    init_distributed,
    mean_loss,
    rank,
    read_jsonl,
    shared_out,
    write_jsonl,
)


def load(path, device=None):
    """Returns (model, processor) of a folder that train.py wrote, or of a plain backbone."""
    data.expect(path != "tiny", "--model: a trained or pretrained model", path)
    processor = models.load_processor(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return models.load_model(path, processor).to(device).eval(), processor


# ---- questions ----

# The fields of an entry that are copied to predictions.jsonl.
ENTRY_FIELDS = ("id", "video", "image", "caption", "frame_idx", "Question", "options", "Answer")


def read_questions(samples):
    """Returns (questions, keys): one question for each answer of each sample.

    questions: dicts, which become the lines of predictions.jsonl. keys: (sample index, turn index) of each.
    A bad sample becomes one question with an "error". Raises DataError for one that is no ordinary JSON.
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
            common["error"] = str(error)
            turns = [("", "")]  # one empty question stands for a sample that cannot be read
        about_regions = "error" in common  # a bad sample is asked with every control, to be wrong with all
        for turn_index, (text, answer) in enumerate(turns):
            # A question is also about regions if an earlier turn pointed at them.
            about_regions = about_regions or data.REGION_TAG in text
            turn = {"turn": turn_index, "question": text, "answer": answer.strip() or None}
            questions.append(common | turn | {"regions": about_regions})
            keys.append((sample_index, turn_index))
    return questions, keys


def check_errors(questions, strict):
    """Raises data.DataError if every question has an "error", or if strict and any has one."""
    errors = [question["error"] for question in questions if "error" in question]
    if errors and (strict or len(errors) == len(questions)):
        raise data.DataError(f"{errors[0]} ({len(errors)} of {len(questions)} questions cannot be asked)")


# ---- the table ----

# COCO's sizes of objects: below 32 * 32 pixels of the frame, below 96 * 96, and above.
SIZES, SIZE_LIMITS = ("small", "medium", "large"), (32**2, 96**2)
OTHER_ROWS = ("(no type)", *SIZES, "about regions", "all")


def score(questions, columns):
    """Returns {row: {"questions": n, column: {"right": n, "asked": n}, ...}}.

    columns: {column: key of its reply in a question; no key: not asked}. A reply is right if it equals the
    answer; None is wrong. The rows are the types of questions, the sizes of objects (unless all have one
    size), "about regions" (if only some are), and "all". The column "constant" is added: always the most
    frequent answer to questions of this type. It differs for those with and without regions, so that it can
    be compared with the controls.
    """
    answers = defaultdict(Counter)
    for question in questions:
        if question["answer"] is not None:  # None: a bad entry
            answers[question["type"], question["regions"]][question["answer"]] += 1
    constant = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}
    questions = [q | {"constant": constant.get((q["type"], q["regions"]))} for q in questions]

    rows = {}
    for kind in sorted({question["type"] for question in questions}):
        row = kind or "(no type)"
        while kind and row in (*OTHER_ROWS, *rows):
            row = f"type {row}"
        rows[row] = [question for question in questions if question["type"] == kind]
    by_size = defaultdict(list)
    for question in questions:
        if "area" in question:
            by_size[SIZES[bisect_right(SIZE_LIMITS, question["area"])]].append(question)
    if len(by_size) > 1:
        rows |= {size: by_size[size] for size in SIZES if size in by_size}
    about_regions = [question for question in questions if question["regions"]]
    if 0 < len(about_regions) < len(questions):
        rows["about regions"] = about_regions
    rows["all"] = questions

    scores = {}
    for row, members in rows.items():
        scores[row] = {"questions": len(members)}
        for column, key in (columns | {"constant": "constant"}).items():
            asked = [q for q in members if key in q]
            right = [q for q in asked if q[key] is not None and q[key] == q["answer"]]
            scores[row][column] = {"right": len(right), "asked": len(asked)}
    return scores


def print_table(scores):
    width = max(map(len, scores)) + 3
    columns = list(scores["all"])[1:]
    print(" " * width + "".join(f"{column:>18}" for column in columns))
    for row, counts in scores.items():
        line = f"{row:{width}}"
        for column in columns:
            right, asked = counts[column].values()
            cell = f"{right}/{asked} {100 * right / asked:7.1f} %" if asked else "-"
            line += f"{cell:>18}"
        print(line)


# ---- VideoRefer-Bench ----


class Bench:
    """The entries of --bench-q or --bench-d as a sequence of samples of one turn, like data.read_samples."""

    def __init__(self, args):
        self.entries = data.read_samples(args.bench_q or args.bench_d, args.media, args.outside_paths)
        self.args = args

    def __len__(self):
        return len(self.entries)

    def read(self, i):
        return self.entries.read(i)

    def __getitem__(self, i):
        entry, place, media, position = self.read(i)
        with data.within(*place):
            data.expect(isinstance(entry, dict), "a JSON object", entry)
            if self.args.bench_q:
                question, answer = bench_q_turn(entry, self.args.no_options)
            else:
                question, answer = bench_d_turn(entry)
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            entry = entry | {"conversations": turns}
            sample = data.parse_sample(entry, place, media, position, self.args.outside_paths)
            if self.args.mode == "multi":
                return sample
            frame, objects = entry.get("frame_idx"), []
            data.expect(re.fullmatch("[0-9]{1,9}", str(frame)), "frame_idx: a frame index", frame)
            for object_index, masks in enumerate(sample.objects):
                wanted = f"object {object_index}: a mask on frame {frame}, as frame_idx says"
                data.expect(int(frame) in masks, wanted, sorted(masks))
                objects.append({int(frame): masks[int(frame)]})
            return replace(sample, objects=objects)


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
    """Returns (question, letter), the question as upstream asks it.

    Source: PixelRefer, VideoRefer/videorefer/eval/inference_videorefer_q_bench.py (its script for VideoLLaMA3
    has no brackets). no_options: the question alone, for models that never saw options.
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
    """Returns (question, caption), the question as upstream asks it (inference_videorefer_d_bench.py)."""
    caption = entry.get("caption")
    data.expect(isinstance(caption, str) and caption.strip(), "caption: a text", caption)
    region = f"[{data.REGION_TAG}]"
    return f"Please give a detailed description of the highlighted object {region} in the video.", caption


BOXED = re.compile(r"\$?\\boxed\{(?:\\text\{)?([^{}]*)\}+\$?")
ANSWER_IS = re.compile(r"(?:the )?(?:(?:best|correct|right|final) )?(?:answer|option)(?: is)?:?\s+", re.I)
# "(B)", "B)", "B. Running" (a capital, because "b." may end a sentence), or a letter alone on its line.
LETTER = re.compile(r"\(?[A-Z]\)(?!\w)|(?-i:[A-Z])[.:](?=\s)|[A-Z][.:]?(?=\s*$)", re.I | re.M)
# "(B)", "(b)", "B)", "B." or "B:" anywhere in the rest of the reply, or a capital at the end of a line.
ANOTHER_LETTER = re.compile(r"\((?i:[A-Z])\)|\b[A-Z](?:\)|[.:](?=\s)|[.:]?$)", re.M)


def choose(reply, options):
    """Reads a reply to a multiple-choice question with the options {"A": text, ...}.

    Returns (letter, "letter"), (letter, "text") if the reply is an option's text, or (None, "none").
    An option's letter stands at the beginning or after "The answer is", in one of the forms above, and
    no second letter may follow in such a form ("(A) or (B)"). A sentence has no letter ("A dog runs", "The
    answer is a dog"). An option's text counts if it is the whole reply, up to case and a final period. Bold
    type and \\boxed{} are removed.
    """
    whole = reply = without_markup(reply)
    match = ANSWER_IS.match(reply)
    if match:
        reply = reply[match.end() :]
    match = OPTION.fullmatch(reply[:2].upper() + reply[2:])  # also "(b) Running"
    if match and match[1] in options and plain(match[2]) == plain(options[match[1]]):
        return match[1], "letter"
    match = LETTER.match(reply)
    if match:
        letter = match[0].strip("().:").upper()
        others = {other.strip("().:").upper() for other in ANOTHER_LETTER.findall(reply, match.end())}
        return (letter, "letter") if letter in options and others <= {letter} else (None, "none")
    texts = plain(reply), plain(whole)  # whole, because an option's own text may begin like "The answer is"
    same = [letter for letter, text in options.items() if plain(text) in texts]
    return (same[0], "text") if len(same) == 1 else (None, "none")


def choose_all(questions, columns):
    """Reads the letters of all replies, prints the table, and returns what scores.json says of them."""
    choices, replies = {}, {}
    for column in columns:
        choices["accuracy" if column == "pred" else column] = f"{column}_choice"
        counts = Counter()
        for question in questions:
            if column in question:
                letter, by = None, "not asked"
                if question[column] is not None:
                    letter, by = choose(question[column], read_options(question)[0])
                question |= {f"{column}_choice": letter, f"{column}_by": by}
                counts[by] += 1
        replies[column] = {by: counts[by] for by in ("letter", "text", "none")}
    rows = score(questions, choices)
    print_table(rows)
    for column, counts in replies.items():
        print(f"{column}: replies that name a letter: {counts['letter']}; ", end="")
        print(f"an option's whole text: {counts['text']}; neither, which is wrong: {counts['none']}")
    return {"rows": rows, "replies": replies}


def without_markup(text):
    return BOXED.sub(r"\1", text).replace("**", "").strip()


def plain(text):
    return without_markup(text).removesuffix(".").casefold()


ASPECTS = (
    "Subject Correspondence",
    "Appearance Description",
    "Temporal Description",
    "Hallucination Detection",
)
# The aspects, the scale and the layout are the published ones; the words are ours. To compare with published
# numbers, give the published system.txt to --judge-prompt.
JUDGE_PROMPT = """\
You compare two descriptions of one object in a video: the correct answer, and a predicted answer.
Score the prediction on four aspects, each with a whole number from 0 (nothing fits) to 5 \
(everything fits):
1. Subject Correspondence: is it about the same subject?
2. Appearance Description: are colour, shape, texture and other visible properties right?
3. Temporal Description: is what the object does over time right?
4. Hallucination Detection: is it free of facts, actions and things that are not there? 5 means that nothing \
is made up.
Reply with four lines such as "1. Subject Correspondence: 5", each followed by a line with a short reason."""
# "4", "4/5" or "4 out of 5"; no other scale ("4 / 10"), no range ("4-5", "3 to 4") and no fraction ("4.5").
# Blanks are [ \t], because \s would go on to the number that the next line may begin with.
MARK = r"(\d+)(?:[ \t]*(?:/|out of)[ \t]*5)?(?![ \t]*/|[ \t]*out of\b|[ \t]*(?:-|to|or)[ \t]*\d|[.,]?\d)"


def read_marks(reply):
    """Returns a judge's marks as {aspect: 0 to 5}, or None unless each aspect has one line with a mark."""
    marks = {}
    for aspect in ASPECTS:  # as in "3. **Temporal Description**: 4/5"
        line = rf"^[ \t\d.#*-]*{aspect}[ \t*]*:[ \t*]*{MARK}"
        found = re.findall(line, reply, re.MULTILINE | re.IGNORECASE)
        if len(found) != 1 or int(found[0]) > 5:
            return None
        marks[aspect] = int(found[0])
    return marks


# ---- a question of your own ----


def ask(model, processor, media, question, objects=(), max_new_tokens=128, preview=None):
    """Returns the model's reply to one question about a video or an image. Raises data.DataError.

    media: a path, or a list of frame files. question: with one `<region>` for each object, in order. objects:
    for each a dict {frame index: mask}; an image is frame 0. A mask is an array (H, W), not 0 inside the
    object, or what a data file may have: RLE, or polygons in pixels of the frame (see box). preview: a path,
    where the objects are drawn.
    """
    name = data.media_name(media)
    media = [os.fspath(path) for path in media] if isinstance(media, (list, tuple)) else os.fspath(media)
    # A sample needs an answer, though this one is not read.
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "..."}]
    entry = {"video": media, "conversations": turns, "annotation": to_annotation(objects)}
    dataset = data.Questions([data.parse_sample(entry, (name,), "", 0, outside_paths=True)], processor)
    if preview:
        frames, height = set().union(*objects), data.media_info(media).height
        picture = data.preview(dataset, [0], max(1, len(frames)), panel_height=min(height, 480))
        data.save_picture(picture, preview)
    [reply] = generate_replies(model, dataset, [[(0, 0)]], max_new_tokens)
    if isinstance(reply, data.DataError):
        raise reply
    return reply


def track(media, objects, model, region_frames=data.Settings.region_frames):
    """Returns the objects with masks on region_frames frames (or on all that have one already, if those are
    more), which SAM 2 finds. Raises data.DataError.

    media, objects: as for ask, but a mask may also be a point inside the object: a tuple (x, y) in pixels of
    the frame. A mask that fills its bounding box is taken for a box around the object. Any other is the
    object, and stays as it is. model: see load_tracker. The frames are spread over the video, and are all
    that SAM 2 sees of it, so that memory does not depend on its length. An object's frames on which SAM 2
    sees nothing are left out. Masks come as arrays (H, W).
    """
    video, name = data.open_media(media), data.media_name(media)
    with data.within(name):
        frames = frames_to_track(objects, video.info.num_frames, region_frames)
    pixels = to_pixels(video.read(frames).values(), model.config.image_size)
    session = Sam2VideoInferenceSession(pixels, inference_device=model.device, dtype=pixels.dtype)
    tracked = []
    for i, masks in enumerate(objects):
        with data.within(name, f"object {i}"):
            tracked.append(track_object(model, session, frames, masks, video.info))
    return tracked


def to_annotation(objects):
    """Returns objects, as ask takes them, as the "annotation" of a data file."""
    annotation = []
    for masks in objects:
        annotation.append({str(i): {"segmentation": to_segmentation(mask)} for i, mask in masks.items()})
    return annotation


def to_segmentation(mask):
    """Returns a mask as a data file may have it: an array (H, W) becomes RLE."""
    if not isinstance(mask, np.ndarray):
        return mask
    data.expect(mask.ndim == 2, "a mask (H, W)", mask.shape)
    rle = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return rle | {"counts": rle["counts"].decode()}


def box(x, y, w, h):
    """Returns the polygon of a box with the upper left corner (x, y), in pixels of the frame."""
    data.expect(w > 0 and h > 0, "a box x,y,w,h of a size above 0", (w, h))
    left, top, right, bottom = map(float, (x, y, x + w, y + h))  # float: numpy's numbers are allowed
    return [left, top, right, top, right, bottom, left, bottom]


# ---- the whole evaluation ----


def evaluate(args):
    """Reads the questions of --data or of a benchmark, asks them, and scores the replies."""
    bench = args.bench_q or args.bench_d
    # {column: control}. A column is also the key of its replies in predictions.jsonl.
    columns = {"pred" if bench else "exact": "none"} | {control: control for control in args.control}
    if args.score:
        scores = read_settings(args.score)
        args.mode = scores.get("mode", "multi")  # another model may not need a mask on the published frame
    with first_on_this_machine():  # the first rank writes the index of the data file, the others read it
        samples = Bench(args) if bench else data.read_samples(args.data, args.media, args.outside_paths)
    questions, keys = read_questions(samples)
    check_errors(questions, strict=not bench)
    if bench:
        with data.within(bench):
            by_id = questions_by_id(questions)  # ids that repeat end the run before anything is asked
    if args.score:
        args.out.mkdir(parents=True, exist_ok=True)
        read_predictions(args.score, by_id, columns)
    else:
        if "shuffle" in args.control:
            media = {str(q.get("video") or q.get("image")) for q in questions if q["regions"]}
            data.expect(len(media) > 1, "regions on several videos or images for --control shuffle", media)
        if rank() == 0:
            open_run(args)
        model, processor = load(args.model, args.device)
        if bench:
            scores = {"mode": args.mode, "no_options": args.no_options}
        else:
            dataset = data.ReferringDataset(samples, processor)
            scores = {"loss": mean_loss(model, dataset, args.batch_size, args.workers)}
        for column, control in columns.items():
            asked = {i: key for i, key in enumerate(keys) if is_asked(questions[i], control)}
            for i, reply in ask_all(model, processor, samples, asked, control, args).items():
                if isinstance(reply, data.DataError):
                    questions[i]["error"], reply = str(reply), None
                questions[i][column] = reply
    check_errors(questions, strict=not bench)
    is_first = rank() == 0
    if dist.is_initialized():
        # The other ranks end here, because a judge may take longer than they can wait for rank 0.
        dist.barrier()
        dist.destroy_process_group()
    if is_first:
        add_areas(questions, keys, samples)
        report(questions, columns, scores, args)


def is_asked(question, control):
    """Whether there is anything in the question that the control replaces or takes away."""
    return control in ("none", "blind") or question["regions"]


def report(questions, columns, scores, args):
    """Scores the replies, prints the result, and writes OUT/predictions.jsonl and OUT/scores.json."""
    errors = [question["error"] for question in questions if "error" in question]
    for question in questions:
        if "error" in question:  # no reply counts, also not of blind, which needs no media
            question |= dict.fromkeys(columns.keys() & question.keys())
    if args.data:
        scores["rows"] = score(questions, {column: column for column in columns})
        print_table(scores["rows"])
        print(f"loss {scores['loss']:.4f} per supervised token")
    if args.bench_q:
        scores |= choose_all(questions, columns)
    if args.bench_d:
        print(f"{len(questions)} descriptions")
    if not args.score:  # with --score, OUT may be the folder of the run that made these predictions
        write_jsonl(args.out / "predictions.jsonl", questions)
    if args.judge:
        scores |= judge(questions, columns, args)
    scores["not_asked"] = len(errors)
    with data.atomic_write(args.out / "scores.json") as temporary, open(temporary, "w") as file:
        json.dump(scores, file, indent=2)
    if errors:
        fate = "wrong above" if args.bench_q else "not judged"
        print(f"{len(errors)} of {len(questions)} questions could not be asked: {fate}; ", end="")
        print(f"the first: {errors[0]}")


# ---- A first reading may end here. Below stand resuming, the judge's server and the options. ----


def open_run(args):
    """Makes the folder OUT with run.json, which says what is asked, or finds that of the same command.

    Raises SystemExit if OUT holds anything else.
    """
    run = {name: getattr(args, name) for name in ("model", "media", "mode", "no_options", "max_new_tokens")}
    run["task"] = "data" if args.data else "bench-q" if args.bench_q else "bench-d"
    paths = args.data or [args.bench_q or args.bench_d]  # in order: OUT/parts names a question by its index
    model_files = sorted(Path(args.model).glob("[!.]*.*"))
    run["files"] = []
    for path in [*paths, *model_files]:
        run["files"].append([os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns])
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "run.json"
    if all(name.endswith(".tmp") for name in os.listdir(args.out)):  # a kill may have left run.json.*.tmp
        write_jsonl(path, [run])
    elif read_jsonl(path) != [run]:
        raise SystemExit(f"--out {args.out}: holds no run of this command; name another folder, or remove it")


def read_settings(predictions):
    """Returns mode and no_options of the run that wrote the predictions, or {} if they are not eval.py's."""
    path = Path(predictions)
    runs = read_jsonl(path.with_name("run.json")) if path.name == "predictions.jsonl" else []
    return {key: run[key] for run in runs for key in ("mode", "no_options")}


def add_areas(questions, keys, samples):
    """Adds to each question about regions the "area" of the smallest object that it points at.

    An object's area is its mean over the frames where it is visible, in pixels of the frame. A question that
    points at nothing is about the objects of the question before. There is no area where masks or media
    cannot be read: predictions can be scored without the media.
    """
    reader = data.TimedReader(timeout=120)
    info_of = lru_cache(maxsize=None)(lambda path: reader.run(path, data.media_info, path))
    for question, (sample_index, turn_index) in zip(questions, keys):
        if not question["regions"]:
            continue
        with suppress(data.DataError):
            sample = samples[sample_index]
            info = info_of(sample.media)
            size = sample.size or (info.height, info.width)
            tags = [text.count(data.REGION_TAG) for text, _ in sample.turns[: turn_index + 1]]
            latest = [count for count in tags if count][-1]
            areas = []
            for masks in sample.objects[sum(tags) - latest : sum(tags)]:
                shares = [data.mask_share(mask, *size) for mask in masks.values()]
                visible = [share for share in shares if share > 0]
                data.expect(visible, "a mask that is not empty", shares)
                areas.append(info.height * info.width * sum(visible) / len(visible))
            question["area"] = min(areas)


def ask_all(model, processor, samples, keys, control, args):
    """Returns {question index: reply, or DataError of a bad sample}, on every rank.

    keys: {question index: (sample index, turn index)}. Each rank asks its share of what OUT/parts does not
    hold yet, and appends every reply at once to a file of its own. A DataError is not written, so that a
    resumed run asks again: the video may be there by then.
    """
    parts = args.out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    # All use what rank 0 has read, because a fast rank may write before a slow one has read.
    replies = gather_over_ranks(read_replies(parts, control))[0]
    batches = shared_out([i for i in keys if i not in replies], args.batch_size)
    batches_of_keys = [[keys[i] for i in batch] for batch in batches]
    dataset = data.Questions(samples, processor, control=control)
    generated = generate_replies(model, dataset, batches_of_keys, args.max_new_tokens, args.workers)
    path = parts / f"{control}-{rank()}-{time.time_ns()}.jsonl"
    new_replies = {}
    for i, reply in zip(chain(*batches), generated):
        new_replies[i] = reply
        if isinstance(reply, str):
            append_jsonl(path, {"question": i, "answer": reply})
    for replies_of_rank in gather_over_ranks(new_replies):
        replies |= replies_of_rank
    assert replies.keys() == keys.keys(), f"{len(replies)} replies to {len(keys)} questions in {parts}"
    return replies


def read_replies(parts, control):
    """Returns {question index: reply} from the files of all ranks and runs.

    Raises data.DataError if two replies to a question differ, as two runs at once could write them.
    """
    replies = {}
    for path in sorted(parts.glob(f"{control}-*.jsonl")):
        for line in read_jsonl(path):
            i, reply = line["question"], line["answer"]
            first = replies.setdefault(i, reply)
            with data.within(str(path)):
                data.expect(first == reply, f"one answer to question {i}", [first, reply])
    return replies


def questions_by_id(questions):
    """Returns {id as JSON text: question}; an id may be a list. Raises data.DataError if one repeats."""
    by_id = {}
    for question in questions:
        id = json.dumps(question["id"])
        data.expect(id not in by_id, "each id once", question["id"])
        by_id[id] = question
    return by_id


def read_predictions(path, by_id, columns):
    """Adds the replies of all columns to the questions, from a file of {"id": ..., "pred": text, ...}.

    The file has exactly one line for each question. Only a run with controls writes keys other than "pred".
    """
    lines, missing = data.read_samples(path), dict(by_id)
    for i in range(len(lines)):
        line, place, *_ = lines.read(i)
        with data.within(*place):
            data.expect(isinstance(line, dict) and "id" in line, 'an object with "id" and "pred"', line)
            question = missing.pop(json.dumps(line["id"]), None)
            data.expect(question is not None, "the id of a question, each once", line["id"])
            for column in [column for column in columns if is_asked(question, columns[column])]:
                data.expect(column in line, f'an object with "{column}"', sorted(line))
                question[column] = line[column]
                if not isinstance(line[column], str):
                    question["error"] = str(line.get("error", f"its {column} is not a text"))
    with data.within(path):
        data.expect(not missing, "a prediction for each question", f"none for {', '.join(missing)}")


# ---- SAM 2 ----


def load_tracker(path, device=None):
    """Returns the Sam2VideoModel of a folder or Hugging Face name, such as facebook/sam2.1-hiera-tiny."""
    expected = "a Hugging Face name or a folder with config.json and weights of a SAM 2 video model"
    with models.model_errors_in_one_line(path, "--track", expected):
        family = AutoConfig.from_pretrained(path).model_type
        data.expect(family == "sam2_video", "a SAM 2 video model (sam2_video)", family)
        model = models.load_weights(Sam2VideoModel, path)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def frames_to_track(objects, num_frames, count):
    """Returns the frames with masks, filled up to count with others evenly spread, in order of time."""
    pointed = sorted(set().union(*objects))
    others = data.evenly(range(num_frames), count)
    for frame in pointed:
        data.expect(frame in range(num_frames), f"a frame index from 0 to {num_frames - 1}", frame)
        if others:  # the frame takes the place of the nearest one
            others.pop(np.argmin([abs(other - frame) for other in others]))
    return sorted({*pointed, *others})


def to_pixels(pictures, size):
    """T pictures, uint8 (H, W, 3) -> float32 (T, 3, size, size).

    It stands in for transformers' Sam2VideoVideoProcessor, which needs torchvision.
    """
    pictures = torch.from_numpy(np.stack(list(pictures))).movedim(3, 1)
    pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    mean, std = 255 * torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[:, :, None, None]
    return (pictures - mean) / std


def track_object(model, session, frames, masks, info):
    """Returns {frame: bool (H, W)} of an object that masks, {frame: mask or point}, point at."""
    data.expect(masks, "a mask or a point on at least one frame", masks)
    session.reset_tracking_data()
    drawn, found = {}, {}
    for frame, mask in masks.items():
        k = frames.index(frame)
        with data.within(f"frame {frame}"):
            drawn[frame] = add_prompt(session, k, mask, info, model.config.image_size)
        model(session, k)
    for reverse in (False, True):  # from the first of these frames on
        for output in model.propagate_in_video_iterator(session, reverse=reverse):
            logits = F.interpolate(output.pred_masks, (info.height, info.width), mode="bilinear")
            found[frames[output.frame_idx]] = (logits[0, 0] > 0).cpu().numpy()
    found |= {frame: mask for frame, mask in drawn.items() if mask is not None}
    visible = {frame: mask for frame, mask in sorted(found.items()) if mask.any()}
    data.expect(visible, "an object that SAM 2 sees on at least one frame", frames)
    return visible


def add_prompt(session, k, mask, info, size):
    """Tells SAM 2 where the object is on frame k of the session. Returns the mask if it is the object itself.

    It stands in for transformers' Sam2VideoProcessor, which needs torchvision. size: the side, in pixels, of
    the square pictures that SAM 2 sees.
    """
    index = session.obj_id_to_idx(0)  # of the one object in the session
    session.obj_with_new_inputs = [0]
    picture = f"inside the picture, {info.width}x{info.height} (width x height)"
    if isinstance(mask, tuple):
        is_inside = len(mask) == 2 and 0 <= mask[0] < info.width and 0 <= mask[1] < info.height
        data.expect(is_inside, f"a point x,y {picture}", mask)
        points, labels, height, width = [mask], [1], info.height, info.width
    else:
        segmentation = to_segmentation(mask)
        mask = data.decode_mask(segmentation, info.height, info.width)
        data.expect(mask.any(), f"a mask that is not empty {picture}", segmentation)
        height, width = mask.shape
        top, bottom, left, right = data.mask_bounds(mask)
        if not mask[top:bottom, left:right].all():
            resized = torch.from_numpy(mask)[None, None].float()
            resized = F.interpolate(resized, (size, size), mode="bilinear", antialias=True)
            session.add_mask_inputs(index, k, resized >= 0.5)
            return mask
        points, labels = [(left, top), (right, bottom)], [2, 3]  # the labels of a box's corners
    points = torch.tensor(points) * torch.tensor([size / width, size / height])
    prompt = {"point_coords": points[None, None], "point_labels": torch.tensor(labels)[None, None]}
    session.add_point_inputs(index, k, prompt)
    return None


# ---- the judge's server ----

ATTEMPTS = 6
JUDGE_TIMEOUT = 120  # seconds


def judge(questions, columns, args):
    """Has the descriptions judged, prints the mean marks, and returns what scores.json says of them."""
    prompt_hash = hashlib.sha256(args.judge_system.encode()).hexdigest()[:12]
    setting = {"judge": args.judge_model, "prompt": prompt_hash}
    results = {column: judge_column(questions, column, setting, args) for column in columns}
    names = sorted(set().union(*(result["models"] for result in results.values())))
    print(f"judge: {args.judge_model} at {args.judge}, which calls itself {', '.join(names)}")
    print(f"prompt {prompt_hash}: {args.judge_prompt or 'the one in eval.py, not the published one'}")
    print(" " * 26 + "".join(f"{column:>9}" for column in columns))
    for aspect in (*ASPECTS, "Average"):
        means = [result["means"][aspect] for result in results.values()]
        print(f"{aspect:26}" + "".join(f"{'-' if mean is None else f'{mean:.2f}':>9}" for mean in means))
    for column, result in results.items():
        print(f"{column}: {result['replies']} replies, ", end="")
        print(f"{result['failed']} of them without four scores: left out of the means")
    return setting | results


def judge_column(questions, column, setting, args):
    """Has the descriptions of one column judged. Returns what scores.json says of them.

    Each reply becomes a line of OUT/judged.jsonl (of a control: OUT/judged-CONTROL.jsonl) at once, and is not
    asked for again. Raises data.DataError if that file holds marks of other predictions, or of another judge
    or prompt.
    """
    wanted, judged = {}, {}
    for id, question in questions_by_id(questions).items():
        if question.get(column) is not None:
            entry = {name: question.get(name) for name in ("id", "video", "caption")}
            wanted[id] = entry | {"pred": question[column]} | setting
    path = args.out / ("judged.jsonl" if column == "pred" else f"judged-{column}.jsonl")
    for line in read_jsonl(path):
        id = json.dumps(line["id"])
        is_known = id not in judged and id in wanted and wanted[id].items() <= line.items()
        data.expect(is_known, f"in {path} only what this judge said of these predictions, each once", line)
        judged[id] = line
    write_jsonl(path, judged.values())  # removes what a kill may have left of a last line
    for id in tqdm([id for id in wanted if id not in judged], unit="reply", leave=False):
        texts = f"##Correct answer: {wanted[id]['caption']}\n##Predicted answer: {wanted[id]['pred']}\n"
        reply, model = chat(args, texts)
        judged[id] = wanted[id] | {"model": model, "reply": reply, "marks": read_marks(reply)}
        append_jsonl(path, judged[id])

    marks = [line["marks"] for line in judged.values() if line["marks"]]
    means = dict.fromkeys((*ASPECTS, "Average"))
    if marks:
        means = {aspect: sum(mark[aspect] for mark in marks) / len(marks) for aspect in ASPECTS}
        means["Average"] = sum(means.values()) / len(ASPECTS)
    names, failed = sorted({str(line["model"]) for line in judged.values()}), len(judged) - len(marks)
    return {"models": names, "means": means, "replies": len(judged), "failed": failed}


def chat(args, user):
    """Asks the chat-completions server of --judge. Returns (its reply, the model it says it is).

    Retries after faults that may pass, such as a busy server. Raises SystemExit after the last attempt, or
    at once for other faults, such as a wrong key.
    """
    url = args.judge.rstrip("/") + "/chat/completions"
    messages = [{"role": "system", "content": args.judge_system}, {"role": "user", "content": user}]
    body = json.dumps({"model": args.judge_model, "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if os.environ.get("OPENAI_API_KEY"):  # unredirected: the key must not follow to another server
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['OPENAI_API_KEY']}")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=JUDGE_TIMEOUT) as response:
                reply = json.load(response)
            text = reply["choices"][0]["message"]["content"]
            return text if isinstance(text, str) else "", reply.get("model")  # null: withheld by a filter
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            may_pass = status is None or status >= 500 or status in (408, 409, 429)
            if attempt == ATTEMPTS or not may_pass:
                found = f"attempt {attempt} of {ATTEMPTS}: {type(error).__name__}: {error}"
                raise SystemExit(f"--judge {url}: {found}. The same command resumes from here.") from None
        time.sleep(min(2**attempt, 30))


# ---- the command line ----


def x_y_w_h(text):
    try:
        return box(*map(float, text.split(",")))
    except data.DataError as error:  # as a ValueError, it would lose its reason
        raise argparse.ArgumentTypeError(str(error)) from None


def corners(text):
    return [float(number) for number in text.split(",")]


def x_y(text):
    x, y = corners(text)
    return x, y


def picture(path):
    return np.asarray(Image.open(path).convert("L"))


def read_objects(pointed, info):
    """Returns the objects that the command line points at, as ask takes them. info: the data.MediaInfo.

    pointed: the options in their order. A number is the frame that the next masks lie on, None begins the
    next object, and all else is a mask.
    """
    objects, frame = [{}], 0 if info.is_image else None
    for value in pointed:
        if value is None:
            objects.append({})
        elif isinstance(value, int):
            frame = value
        else:
            data.expect(frame is not None, "--frame before the first mask of a video", pointed)
            again = frame in objects[-1]
            data.expect(not again, "one mask a frame (--object begins the next)", f"two on frame {frame}")
            if isinstance(value, list):  # a box or a polygon
                x_inside = all(0 <= x <= info.width for x in value[0::2])
                y_inside = all(0 <= y <= info.height for y in value[1::2])
                wanted = f"corners x,y,... inside the picture, {info.width}x{info.height} (width x height)"
                data.expect(x_inside and y_inside, wanted, value)
            objects[-1][frame] = value
    unused = {value for value in pointed if isinstance(value, int)}.difference(*objects)
    data.expect(not unused, "a mask (--box, --polygon or --mask) after each --frame", f"none on {unused}")
    return [masks for masks in objects if masks]


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    # One list for all of these, because their order matters.
    point = partial(add, dest="pointed", action="append", default=[])
    point("--frame", type=int, metavar="N", help="the frame that the next masks lie on, from 0")
    point("--box", type=x_y_w_h, metavar="X,Y,W,H", help="a mask: upper left corner and size, in pixels")
    point("--polygon", type=corners, metavar="X1,Y1,X2,Y2,...", help="a mask: its corners, in pixels")
    point("--mask", type=picture, metavar="PICTURE", help="a mask: all that is not black")
    point("--point", type=x_y, metavar="X,Y", help="--track: a point inside the object, in pixels")
    add("--object", dest="pointed", action="append_const", const=None, help="begins the next object")
    add("--track", metavar="SAM2", help="a SAM 2 video model, which finds the objects on more frames")
    add("--save-masks", metavar="JSON", help="write the objects as a data file's annotation")
    add("--preview", metavar="PNG", help="draw the objects of --ask into their frames")
    relative = "folder that media paths are relative to (default: each data file's own); --score: for areas"
    add("--media", help=relative)
    add("--outside-paths", action="store_true", help="also take media paths that lead out of that folder")
    controls = ("full", "shuffle", "box", "blind")
    again = "ask again with other masks or without media; --score: read the replies of such a run"
    add("--control", nargs="+", choices=controls, default=[], help=again)
    on_frames = "benchmarks: masks on the published frame alone (default), or on all"
    add("--mode", choices=("single", "multi"), help=on_frames)
    add("--no-options", action="store_true", help="--bench-q: ask without options; an option's text is right")
    add("--judge", metavar="URL", help="--bench-d: a chat-completions server; its key is in OPENAI_API_KEY")
    add("--judge-model", help="(default: gpt-4o)")
    add("--judge-prompt", metavar="FILE", help="the published system.txt, instead of eval.py's own words")
    add("--out", type=Path, help="a new folder for what is written, or that of a run to resume")
    add("--batch-size", type=int, help="(default: 32)")
    add("--max-new-tokens", type=int, help="(default: 128)")
    add("--workers", type=int, help="(default: 2)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args(argv)
    bench, asks = args.bench_q or args.bench_d, args.ask is not None
    points = args.video or args.pointed or args.preview
    masks = [value for value in args.pointed if value is not None and not isinstance(value, int)]
    clicks = any(isinstance(mask, tuple) for mask in masks)
    loading = args.batch_size is not None or args.workers is not None
    counts = [count for count in (args.batch_size, args.max_new_tokens) if count is not None]
    for option, is_given, fits, needed in (
        ("--ask", asks, args.video, "--video or --image"),
        ("--video, masks, --preview", points, asks, "--ask"),
        ("--track, --save-masks", args.track or args.save_masks, masks, "an object: --box, --point, ..."),
        ("--point", clicks, args.track, "--track"),
        ("--score", args.score, bench, "--bench-q or --bench-d"),
        ("--score and --bench-d", args.score and args.bench_d, args.judge, "--judge"),
        ("--control", args.control, not asks, "--data or a benchmark"),
        ("--mode", args.mode, bench and args.model, "--model and a benchmark"),
        ("--no-options", args.no_options, args.bench_q and args.model, "--model and --bench-q"),
        ("--judge", args.judge, args.bench_d, "--bench-d"),
        ("--judge", args.judge, re.match("https?://", args.judge or ""), "an http:// or https:// address"),
        ("--judge-prompt, --judge-model", args.judge_prompt or args.judge_model, args.judge, "--judge"),
        ("a benchmark", bench and (args.model or args.judge), args.out, "--out"),
        ("--out", args.out, not asks, "--data or a benchmark"),
        ("--media, --outside-paths", args.media or args.outside_paths, not asks, "--data or a benchmark"),
        ("--batch-size, --workers", loading, args.model and not asks, "--model and --data or a benchmark"),
        ("--max-new-tokens", args.max_new_tokens is not None, args.model, "--model"),
        ("--device", args.device, args.model, "--model"),
        ("--batch-size, --max-new-tokens", counts, min(counts, default=1) > 0, "1 or more"),
        ("--workers", True, (args.workers or 0) >= 0, "0 or more"),
    ):
        if is_given and not fits:
            parser.error(f"{option} needs {needed}")
    defaults = {"mode": "single", "judge_model": "gpt-4o", "batch_size": 32, "max_new_tokens": 128}
    defaults |= {"workers": 2, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.judge_system = Path(args.judge_prompt).read_text() if args.judge_prompt else JUDGE_PROMPT
    return args


def main(argv=None):
    args = parse(argv)
    args.device = init_distributed(args.device)
    if args.ask is None:
        with tempfile.TemporaryDirectory() as scratch:
            args.out = args.out or Path(scratch)
            evaluate(args)
    elif rank() == 0:
        objects = read_objects(args.pointed, data.media_info(args.video))
        model, processor = load(args.model, args.device)
        if args.track:
            sam, region_frames = load_tracker(args.track, args.device), processor.settings.region_frames
            objects = track(args.video, objects, sam, region_frames)
        if args.save_masks:
            with data.atomic_write(args.save_masks) as temporary, open(temporary, "w") as file:
                json.dump({"video": args.video, "annotation": to_annotation(objects)}, file)
        print(ask(model, processor, args.video, args.ask, objects, args.max_new_tokens, args.preview))


if __name__ == "__main__":
    try:
        main()
    except (data.DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
