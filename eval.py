"""Evaluation: what the model says about *this* object, how good its answers are, and how much of that the mask earned.

    python eval.py --model out/final --video a.mp4 --frame 36 --box 100,50,200,80 --ask "What is <region> doing?"
    python eval.py --model out/final --data test.json                            # exact match and loss, by type of question
    python eval.py --model out/final --data test.json --control full shuffle     # the same beside what the mask did not earn
    python eval.py --model out/final --bench-q VideoRefer-Bench-Q.json --media DIR --out q       # multiple choice: accuracy by type
    python eval.py --model out/final --bench-d VideoRefer-Bench-D.json --media DIR --out d       # descriptions,
    python eval.py --bench-d VideoRefer-Bench-D.json --score d/predictions.jsonl --out d --judge https://api.openai.com/v1  # judged

    samples --read_questions--> questions --DataLoader, left padding--> generate --> OUT/parts/*.jsonl --> OUT/predictions.jsonl, a table

Every answer of a conversation is one question: the model reads the conversation up to it and answers greedily. A control asks the
same questions with every mask replaced by the whole frame (full), or by the mask of another sample's object (shuffle).

All of it runs under torchrun as well, each rank asking its share. With --out, the same command goes on after a kill where it stopped:
each answer is appended as a whole line as soon as it is there, and each question must have exactly one before anything is scored.

A bad sample ends --data: mend the file (python data.py FILE lists them all). A benchmark goes on without a bad entry, which has its
"error" in predictions.jsonl, counts as wrong in --bench-q, is not judged in --bench-d, and is counted in the last line and scores.json.
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
from itertools import cycle

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
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
    write_whole,
)


def load(path, device=None):
    """A folder that train.py wrote, or a plain backbone -> (model, processor). What training saw of a video, the model sees."""
    processor = models.load_processor(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return models.load_model(path, processor).to(device).eval(), processor


# ------------------------------------------------------------------------------------------------ one question of your own


def ask(model, processor, media, question, objects=(), max_new_tokens=128):
    """The model's answer to one question about a video or an image, as text. Raises data.DataError.

    media: a path. question: with one `<region>` an object, in order. objects: one dict an object, {frame index: mask}, the frame of an
    image being 0; a mask is an array (H, W), not 0 inside the object, or what the data file knows: RLE, or polygons (see box).
    """
    masks = [{str(f): {"segmentation": _segmentation(m)} for f, m in frames.items()} for frames in objects]
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "-"}]  # its answer is not read
    entry = {"video": os.fspath(media), "conversations": turns, "annotation": masks}
    sample = data.parse_sample(entry, (os.fspath(media),), "", 0, outside_paths=True)
    answer = next(answers(model, processor, Questions([sample], processor), [(0, 0)], max_new_tokens))[0]
    if isinstance(answer, data.DataError):
        raise answer
    return answer


def box(x, y, w, h):
    """The polygon of a box: its left upper corner (x, y) and its size, in pixels of the frame."""
    data.expect(w > 0 and h > 0, "a box x,y,w,h of a size above 0", (w, h))
    left, top, right, bottom = map(float, (x, y, x + w, y + h))  # float: numbers of numpy are welcome
    return [left, top, right, top, right, bottom, left, bottom]


def _segmentation(mask):
    """A mask as ask takes it -> as the data file has it: an array becomes RLE."""
    if not isinstance(mask, np.ndarray):
        return mask
    data.expect(mask.ndim == 2, "a mask (H, W)", mask.shape)
    rle = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return rle | {"counts": rle["counts"].decode()}


# The options that point at objects: how each reads its text. They are kept in the order given, as (option, value).
POINTERS = {
    "frame": (int, "N", "the frame that the next masks lie on, from 0"),
    "box": (
        lambda text: box(*map(float, text.split(","))),
        "X,Y,W,H",
        "a mask: left upper corner and size, in pixels of the frame",
    ),
    "polygon": (lambda text: [float(n) for n in text.split(",")], "X1,Y1,X2,Y2,...", "a mask: its corners"),
    "mask": (lambda path: np.asarray(Image.open(path).convert("L")), "PICTURE", "a mask: what is not black"),
}


def read_objects(pointed, info):
    """[(option, value)] -> objects as ask takes them. A mask lies on the --frame named last; --object begins the next object."""
    objects, named, frame = [{}], set(), 0 if info.is_image else None
    for option, value in pointed:
        if option == "object":
            objects.append({})
        elif option == "frame":
            frame = value
            named.add(frame)
        else:
            data.expect(frame is not None, "--frame before the first mask of a video", f"--{option}")
            data.expect(
                frame not in objects[-1],
                "one mask a frame (--object begins the next object)",
                f"two on frame {frame}",
            )
            corners = [] if option == "mask" else value
            inside = all(
                0 <= number <= limit for number, limit in zip(corners, cycle((info.width, info.height)))
            )
            data.expect(
                inside, f"--{option} inside the picture, {info.width}x{info.height} (width x height)", value
            )
            objects[-1][frame] = value
    unused = sorted(named.difference(*objects))
    data.expect(not unused, "a mask (--box, --polygon or --mask) after each --frame", f"none on {unused}")
    return [frames for frames in objects if frames]


def run_ask(args):
    objects = read_objects(args.pointed, data.media_info(args.video))
    if args.preview:
        data.save_picture(preview(args.video, objects), args.preview)
    model, processor = load(args.model, args.device)
    print(ask(model, processor, args.video, args.ask, objects, args.max_new_tokens))


def preview(media, objects):
    """A picture of all frames that objects are marked on, one below the other, in order of time, each under its number."""
    indices = sorted({frame for frames in objects for frame in frames}) or [0]
    rows = []
    for frame, picture in zip(indices, data.read_frames(media, indices)):
        height, width, _ = picture.shape
        marked = [_segmentation(frames.get(frame)) for frames in objects]
        masks = [None if mask is None else data.decode_mask(mask, height, width) for mask in marked]
        size = max(12, min(height, width) // 16)  # as draw_regions writes
        title = Image.new("RGB", (width, 3 * size // 2), "white")
        ImageDraw.Draw(title).text(
            (4, size * 3 // 4), f"frame {frame}", fill="black", anchor="lm", font=ImageFont.load_default(size)
        )
        rows += [np.asarray(title), data.draw_regions(picture, masks)]
    return Image.fromarray(np.concatenate(rows))


# ------------------------------------------------------------------------------------------------ many questions


# What of an entry goes into predictions.jsonl.
KEPT = ("id", "video", "image", "caption", "frame_idx", "Question", "options", "Answer")


def read_questions(samples, strict):
    """-> (questions, keys): for each answer of each sample a dict for its line of predictions.jsonl, and its (number, turn).

    A sample that is wrong raises its DataError if strict; else it becomes one question with an "error". Not all may be.
    """
    questions, keys = [], []
    for number in range(len(samples)):
        entry, _, _, position = samples.read(number)
        entry = entry if isinstance(entry, dict) else {}
        about = (
            {"id": position}
            | {name: entry[name] for name in KEPT if name in entry}
            | {"type": str(entry.get("type") or "")}
        )
        try:
            turns = samples[number].turns
        except data.DataError as error:
            if strict:
                raise
            turns, about["error"] = [("", "")], str(error)
        for turn, (question, answer) in enumerate(turns):
            pointed = "error" in about or any(data.REGION_TAG in earlier for earlier, _ in turns[: turn + 1])
            questions.append(
                about
                | {"turn": turn, "question": question, "answer": answer.strip() or None, "regions": pointed}
            )
            keys.append((number, turn))
    if all("error" in question for question in questions):
        raise data.DataError(f"{questions[0]['error']}; and none of the other {len(samples) - 1} can be used")
    return questions, keys


class Questions(data.ReferringDataset):
    """The same samples, one answer at a time: keys are (number, turn) pairs."""

    def __getitem__(self, key):
        try:
            return self.question(*key)
        except data.DataError as error:
            return error


def collate(samples, **options):
    """-> (a batch of the samples that could be encoded, None without any; for each sample its DataError or None)."""
    errors = [sample if isinstance(sample, data.DataError) else None for sample in samples]
    encoded = [sample for sample, error in zip(samples, errors) if error is None]
    return data.collate(encoded, **options) if encoded else None, errors


def batches(dataset, keys, device, batch_size=1, workers=0, **options):
    """Yields what collate makes of dataset[key], in order, the batches on the device, with a progress bar."""
    joined = partial(collate, pad_token_id=dataset.processor.tokenizer.pad_token_id, **options)
    loader = DataLoader(dataset, batch_size, sampler=keys, collate_fn=joined, num_workers=workers)
    for batch, errors in tqdm(loader, unit="batch", leave=False, disable=rank() > 0 or len(keys) == 1):
        yield (
            batch
            and {
                name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()
            },
            errors,
        )


def answers(model, processor, questions, keys, max_new_tokens, **options):
    """Yields, batch by batch, for each key the model's answer, or the DataError that kept it from being asked."""
    for batch, errors in batches(questions, keys, next(model.parameters()).device, pad_left=True, **options):
        tokens = model.generate(batch, processor.tokenizer.eos_token_id, max_new_tokens) if batch else []
        texts = (processor.tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens)
        yield [next(texts) if error is None else error for error in errors]


def answer_all(model, processor, samples, turns, control, args):
    """-> {n: the model's answer, or the DataError that kept it from being asked} for turns {n: (number of the sample, turn)}, each n
    exactly once, the same on every rank.

    Each rank asks its share of what OUT/parts does not hold yet and appends to a file of its own, that no other process ever touches.
    What could not be asked is not written: the same command tries it again, since the video may be there by then. Two runs at once
    do no harm unless their answers differ.
    """
    parts, found = os.path.join(args.out, "parts"), []
    paths = sorted(glob.glob(os.path.join(glob.escape(parts), f"{control}-*.jsonl"))) if rank() == 0 else []
    done = {(line["question"], line["answer"]) for path in paths for line in read_jsonl(path)}
    done = gather(done)[0]  # one reads for all: once a rank knows what is left, it writes
    known = {n for n, _ in done}
    mine = [n for n in turns if n not in known][rank() :: world_size()]
    questions, options = (
        Questions(samples, processor, control=control),
        {"batch_size": args.batch_size, "workers": args.workers},
    )
    os.makedirs(parts, exist_ok=True)
    path = os.path.join(parts, f"{control}-{rank()}-{time.time_ns()}.jsonl")
    for answered in answers(
        model, processor, questions, [turns[n] for n in mine], args.max_new_tokens, **options
    ):
        for n, answer in zip(mine[len(found) :], answered):
            found.append((n, answer))
            if isinstance(answer, str):
                append_jsonl(path, {"question": n, "answer": answer})
    everything = [*done, *(pair for pairs in gather(found) for pair in pairs)]
    check_once([n for n, _ in everything], turns, parts)
    return dict(sorted(everything))


def gather(value):
    """-> the values of all ranks, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_once(found, wanted, place):
    """Raises DataError unless each of wanted occurs exactly once in found, and nothing else does."""
    counts, wanted = Counter(found), dict.fromkeys(wanted)
    wrong = [key for key in wanted | counts if counts[key] != (key in wanted)]
    shown = ", ".join(
        f"{'question' if key in wanted else 'unknown'} {key} {counts[key]} times" for key in wrong[:3]
    )
    if wrong:
        raise data.DataError(
            f"expected each of {len(wanted)} questions exactly once, found {len(wrong)} faults: {shown}",
            place,
        )


def json_lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def write_file(folder, name, text):
    """Writes a file aside before it takes its name: whole or not at all."""
    path = os.path.join(folder, name)
    with open(path + ".tmp", "w") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def open_run(args):
    """Makes OUT, or finds it: what this very command began is gone on with, anything else is left alone. OUT/run.json tells: how
    the questions are asked, and the sizes and times of the files of questions and of the model's weights."""
    run = {name: getattr(args, name) for name in ("model", "media", "mode", "no_options", "max_new_tokens")}
    weights = glob.glob(os.path.join(glob.escape(args.model), "*.safetensors"))
    for path in [*(args.data or [args.bench_q or args.bench_d]), *sorted(weights)]:
        run[os.path.abspath(path)] = [os.path.getsize(path), os.stat(path).st_mtime_ns]
    saved = os.path.join(args.out, "run.json")
    if not os.path.exists(args.out) or os.path.isdir(args.out) and not os.listdir(args.out):
        write_whole(args.out, lambda folder: write_file(folder, "run.json", json_lines([run])))
    elif read_jsonl(saved) != [run]:
        raise SystemExit(
            f"--out {args.out}: exists and holds no beginning of this run; name another folder, or remove it"
        )


def read_predictions(path, questions):
    """A file of lines {"id": ..., "pred": text, ...}, exactly one an id -> {n: reply}, as answer_all gives it."""
    lines = data.Samples([(path, "")])
    found, ids = [], [json.dumps(question["id"]) for question in questions]
    for number in range(len(lines)):
        line, place, *_ = lines.read(number)
        with data.within(*place):
            data.expect(
                isinstance(line, dict) and "id" in line and "pred" in line,
                'an object with "id" and "pred"',
                line,
            )
        missing = data.DataError(str(line.get("error", "its pred is not a text")))
        found.append((json.dumps(line["id"]), line["pred"] if isinstance(line["pred"], str) else missing))
    check_once([i for i, _ in found], ids, path)
    replies = dict(found)
    return {n: replies[i] for n, i in enumerate(ids)}


@torch.no_grad()
def mean_loss(model, processor, samples, args):
    """Cross-entropy of the right answers: a sum over all supervised tokens of all ranks, divided once by their number."""
    total, tokens = 0.0, 0
    keys = [(0, i) for i in range(len(samples))][rank() :: world_size()]
    for batch, errors in batches(
        data.ReferringDataset(samples, processor), keys, args.device, args.batch_size, args.workers
    ):
        for error in filter(None, errors):
            raise error
        total += model(batch).item()
        tokens += int((batch["labels"][:, 1:] != data.IGNORE_INDEX).sum())
    total, tokens = sum_over_ranks([total, tokens], args.device)
    return total / tokens


def score(questions, columns):
    """Prints the table, a row a type of question: how many of its questions each column answers right, up to white space at the ends,
    and how many the most frequent answer to each type would. -> {row: {column: counts}}.

    columns: {name: {number of the question: answer}}; a control has no entry where there is no region.
    """
    rows, frequent, scores = defaultdict(list), defaultdict(Counter), {}
    kinds = [(question["type"], question["regions"]) for question in questions]
    for n, kind in enumerate(kinds):
        rows[kind[0] or "(no type)"].append(n)
        frequent[kind][questions[n]["answer"]] += 1
    best = {kind: counter.most_common(1)[0][0] for kind, counter in frequent.items()}
    columns = columns | {"constant": {n: best[kind] for n, kind in enumerate(kinds)}}
    pointed = [n for n, question in enumerate(questions) if question["regions"]]
    rows = dict(sorted(rows.items())) | (
        {"about regions": pointed} if 0 < len(pointed) < len(questions) else {}
    )
    rows["all"] = list(range(len(questions)))
    width = max(map(len, rows)) + 3
    print(" " * width + "".join(f"{name:>18}" for name in columns))
    for row, members in rows.items():
        scores[row], line = {"questions": len(members)}, f"{row:{width}}"
        for name, given in columns.items():
            asked = [n for n in members if n in given]
            right = sum(given[n] is not None and given[n] == questions[n]["answer"] for n in asked)
            scores[row][name] = {"right": right, "asked": len(asked)}
            share = f"{right}/{len(asked)} {100 * right / len(asked):7.1f} %" if asked else "-"
            line += f"{share:>18}"
        print(line)
    return scores


def score_choices(questions, replies):
    """The same table for the letters that the replies choose; each question gets its "choice", and "by": what told it."""
    for n, question in enumerate(questions):
        question["choice"], question["by"] = None, "not asked"
        if "error" not in question:
            question["choice"], question["by"] = choose(replies[n], read_options(question)[0])
    rows = score(questions, {"accuracy": {n: question["choice"] for n, question in enumerate(questions)}})
    told = {by: sum(question["by"] == by for question in questions) for by in ("letter", "text", "none")}
    print(
        f"replies that name a letter: {told['letter']}; an option's whole text: {told['text']}; neither, which is wrong: {told['none']}"
    )
    return {"rows": rows, "replies": told}


def run_questions(args):
    bench = args.bench_q or args.bench_d
    with first_on_this_machine():  # it makes the index of the file, the others find it
        samples = Bench(args) if bench else data.read_samples(args.data, args.media, args.outside_paths)
    questions, keys = read_questions(samples, strict=not bench)
    columns, scores = {}, {}
    if bench:
        ids = [json.dumps(question["id"]) for question in questions]
        check_once(ids, ids, bench)
    if args.score:
        os.makedirs(args.out, exist_ok=True)
        columns["pred"] = read_predictions(args.score, questions)
    else:
        if rank() == 0:
            open_run(args)
        model, processor = load(args.model, args.device)
        scores = (
            {"mode": args.mode, "no_options": args.no_options}
            if bench
            else {"loss": mean_loss(model, processor, samples, args)}
        )
        for name, control in (("pred" if bench else "exact", "none"), *zip(args.control, args.control)):
            asked = {n: key for n, key in enumerate(keys) if questions[n]["regions"] or control == "none"}
            columns[name] = answer_all(model, processor, samples, asked, control, args)
    for column in columns.values():
        failed = {n: reply for n, reply in column.items() if isinstance(reply, data.DataError)}
        if failed and (not bench or len(failed) == len(column)):
            raise next(iter(failed.values()))
        for n, error in failed.items():
            column[n], questions[n]["error"] = None, str(error)
    first = rank() == 0
    if (
        dist.is_initialized()
    ):  # what is left is for rank 0 alone, and a judge may take longer than the others can wait
        dist.barrier()
        dist.destroy_process_group()
    if first:
        report(questions, columns, scores, args)


def report(questions, columns, scores, args):
    """Scores, prints and writes OUT/predictions.jsonl and OUT/scores.json."""
    if args.data:
        scores["rows"] = score(questions, columns)
        print(f"loss {scores['loss']:.4f} per supervised token")
    if args.bench_q:
        scores |= score_choices(questions, columns["pred"])
    lines = [
        question | {name: column[n] for name, column in columns.items() if n in column}
        for n, question in enumerate(questions)
    ]
    if not args.score:  # they may be another run's
        write_file(args.out, "predictions.jsonl", json_lines(lines))
    if args.bench_d:
        print(f"{len(lines)} descriptions")
    if args.judge:
        scores |= judge([line for line in lines if "error" not in line], args)
    errors = [line["error"] for line in lines if "error" in line]
    write_file(args.out, "scores.json", json.dumps(scores | {"not_asked": len(errors)}, indent=2))
    if errors:
        fate = "wrong above" if args.bench_q else "not judged"
        print(f"{len(errors)} of {len(lines)} questions could not be asked: {fate}; the first: {errors[0]}")


# ------------------------------------------------------------------------------------------------ VideoRefer-Bench


class Bench(data.Samples):
    """VideoRefer-Bench-Q or -D as samples of one turn. With --score there are no masks to read, and --mode does not matter."""

    def __init__(self, args):
        self.args, path = args, args.bench_q or args.bench_d
        super().__init__([(path, args.media or os.path.dirname(path))], args.outside_paths)

    def __reduce__(self):
        return type(self), (self.args,)

    def prepare(self, entry):
        data.expect(isinstance(entry, dict), "a JSON object", entry)
        question, answer = (
            bench_q_turn(entry, self.args.no_options) if self.args.bench_q else bench_d_turn(entry)
        )
        listed, frame = entry.get("annotation"), str(entry.get("frame_idx"))
        if (
            self.args.mode == "single" and not self.args.score and isinstance(listed, list)
        ):  # each object on the published frame alone
            listed = [{frame: frames.get(frame)} if isinstance(frames, dict) else frames for frames in listed]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return entry | {"conversations": turns, "annotation": listed}


OPTION = re.compile(r"\(?([A-Z])[).:]\s*(.+)", re.DOTALL)


def read_options(entry):
    """An entry of VideoRefer-Bench-Q -> ({"A": text, ...}, the right letter)."""
    listed = entry.get("options")
    data.expect(isinstance(listed, list) and listed, 'options: a list ["(A) ...", "(B) ..."]', listed)
    options = {}
    for text in listed:
        match = isinstance(text, str) and OPTION.fullmatch(text.strip())
        data.expect(match and match[1] not in options, 'options: "(A) ...", each letter once', text)
        options[match[1]] = match[2].strip()
    match = OPTION.match(str(entry.get("Answer")))
    data.expect(
        match and match[1] in options, f"Answer: one of the options {''.join(options)}", entry.get("Answer")
    )
    return options, match[1]


def bench_q_turn(entry, no_options):
    """The published question: the region in brackets, the options, and the request for a letter, joined as upstream joins them
    (alibaba-damo-academy/PixelRefer, VideoRefer/videorefer/eval/inference_videorefer_q_bench.py; its later script for VideoLLaMA3 leaves
    the brackets out).

    no_options: the question alone, for models that never saw options (the toy world's): not comparable with published numbers.
    """
    options, letter = read_options(entry)
    question = entry.get("Question")
    data.expect(isinstance(question, str), "Question: a text", question)
    if no_options:
        return re.sub(r"<object\d+>", "", question), letter
    question = question.replace(data.REGION_TAG, f"[{data.REGION_TAG}]")
    return (
        f"{question} {' '.join(entry['options'])}. Answer with the option's letter from the given choices directly.",
        letter,
    )


def bench_d_turn(entry):
    """The published request for a description (the same folder, inference_videorefer_d_bench.py)."""
    caption = entry.get("caption")
    data.expect(isinstance(caption, str) and caption.strip(), "caption: a text", caption)
    return (
        f"Please give a detailed description of the highlighted object [{data.REGION_TAG}] in the video.",
        caption,
    )


ANSWER_IS = re.compile(
    r"\A(?:the )?(?:best |correct |right |final )?(?:answer|option)(?: is)?:?\s+", re.IGNORECASE
)
LETTER = re.compile(
    r"\(([A-Z])\)(?!\w)|([A-Z])\)(?!\w)|(?-i:([A-Z])[.:](?=\s))|([A-Z])[.:]?(?=\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
OTHER = re.compile(r"\(([A-Z])\)|\b([A-Z])\)|\b([A-Z])[.:]?$", re.MULTILINE)


def choose(reply, options):
    """A reply to a multiple-choice question -> (the letter it chooses, or None; "letter", "text" or "none": what told it).

    A letter stands at the beginning, after "The answer is" at most: "(B)", "(b) Running", "B) Running", "B. Running", "B: Running", or
    alone on its line, "B", "b", "B.". It must be an option's, and no second one may follow in such a form ("A or B", "(A) or (B)"). A
    sentence has no letter ("A dog runs", "The answer is a dog"). Or the reply is an option's text, whole, up to case and a last period.
    """
    reply = ANSWER_IS.sub("", reply.strip())
    plain = lambda text: text.strip().removesuffix(".").casefold()
    match = OPTION.fullmatch(reply)
    if match and plain(match[2]) == plain(options.get(match[1], "")):
        return match[1], "letter"
    match = LETTER.match(reply)
    if match:
        letter = "".join(filter(None, match.groups())).upper()
        others = {"".join(groups) for groups in OTHER.findall(reply[match.end() :])}
        return (letter, "letter") if letter in options and others <= {letter} else (None, "none")
    same = [letter for letter, text in options.items() if plain(text) == plain(reply)]
    return (same[0], "text") if len(same) == 1 else (None, "none")


# ------------------------------------------------------------------------------------------------ the judge of VideoRefer-Bench-D

ASPECTS = (
    "Subject Correspondence",
    "Appearance Description",
    "Temporal Description",
    "Hallucination Detection",
)
# Aspects, scale and layout as published; the words are ours. Give the published system.txt to --judge-prompt to compare numbers.
JUDGE_PROMPT = """You compare two descriptions of one object in a video: the correct answer, and a predicted answer.
Score the prediction on four aspects, each with a whole number from 0 (nothing fits) to 5 (everything fits):
1. Subject Correspondence: is it about the same subject?
2. Appearance Description: are colour, shape, texture and other visible properties right?
3. Temporal Description: is what the object does over time right?
4. Hallucination Detection: is it free of facts, actions and things that are not there? 5 means that nothing is made up.
Reply with four lines such as "1. Subject Correspondence: 5", each followed by a line with a short reason."""
RETRIES, JUDGE_TIMEOUT = 5, 120  # seconds


def read_marks(reply):
    """A judge's reply -> {aspect: 0 to 5}, or None unless each aspect stands on a line of its own, once, with a whole number."""
    marks = {}
    for aspect in ASPECTS:
        found = re.findall(
            rf"^[\s\d.#*-]*{aspect}[\s*]*:[\s*]*(\d+)(?:\s*/\s*5\b)?(?![\d/]|\.\d)",
            reply,
            re.MULTILINE | re.IGNORECASE,
        )
        if len(found) != 1 or int(found[0]) > 5:
            return None
        marks[aspect] = int(found[0])
    return marks


def chat(url, messages, args):
    """Asks a chat-completions server -> (its reply, the model it says it is). What may pass is tried again, then ends the run."""
    url = url.rstrip("/") + "/chat/completions"
    body = json.dumps({"model": args.judge_model, "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if os.environ.get("OPENAI_API_KEY"):
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['OPENAI_API_KEY']}")
    for attempt in range(RETRIES + 1):
        if attempt:
            time.sleep(min(2**attempt, 30))
        try:
            with urllib.request.urlopen(request, timeout=JUDGE_TIMEOUT) as response:
                reply = json.load(response)
            text = reply["choices"][0]["message"]["content"]
            return text if isinstance(text, str) else "", reply.get(
                "model"
            )  # null: the server's filter kept it back
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 409, 429):
                raise SystemExit(f"--judge {url}: {problem}") from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise SystemExit(
        f"--judge {url}: no answer in {RETRIES + 1} tries, the last: {problem}. The same command goes on from here."
    )


def judge(lines, args):
    """Has each described line judged, a line each in OUT/judged.jsonl, and prints the means; what is there already is kept."""
    system, path = JUDGE_PROMPT, os.path.join(args.out, "judged.jsonl")
    if args.judge_prompt:
        with open(args.judge_prompt) as file:
            system = file.read()
    setting = {"judge": args.judge_model, "prompt": hashlib.sha256(system.encode()).hexdigest()[:12]}
    wanted = {
        json.dumps(line["id"]): {k: line.get(k) for k in ("id", "video", "caption", "pred")} | setting
        for line in lines
    }
    judged = read_jsonl(path)
    for line in judged:
        same = wanted.get(json.dumps(line["id"]), {}).items() <= line.items()
        data.expect(same, f"in {path} only what this judge said of these predictions", line)
    write_file(args.out, "judged.jsonl", json_lines(judged))  # without what a kill left of a last line
    known = {json.dumps(line["id"]) for line in judged}
    for key in tqdm([key for key in wanted if key not in known], unit="reply", leave=False):
        question = f"##Correct answer: {wanted[key]['caption']}\n##Predicted answer: {wanted[key]['pred']}\n"
        reply, model = chat(
            args.judge, [{"role": "system", "content": system}, {"role": "user", "content": question}], args
        )
        judged.append(wanted[key] | {"model": model, "reply": reply, "marks": read_marks(reply)})
        append_jsonl(path, judged[-1])
    check_once([json.dumps(line["id"]) for line in judged], wanted, path)
    marks = [line["marks"] for line in judged if line["marks"]]
    names = sorted({str(line["model"]) for line in judged})
    own = "the prompt in eval.py, not the published one" if system == JUDGE_PROMPT else args.judge_prompt
    print(
        f"judge: {args.judge_model} at {args.judge}, which calls itself {', '.join(names)}; prompt {setting['prompt']} ({own})"
    )
    means = {aspect: sum(m[aspect] for m in marks) / len(marks) if marks else None for aspect in ASPECTS}
    means["Average"] = sum(means.values()) / len(means) if marks else None
    for aspect, mean in means.items():
        print(f"{aspect:26}{'-' if mean is None else f'{mean:.2f}':>6}")
    failed = len(judged) - len(marks)
    print(f"{len(judged)} replies, {failed} of them without four scores: left out of the means")
    return setting | {"models": names, "means": means, "replies": len(judged), "failed": failed}


# ------------------------------------------------------------------------------------------------ the command line


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a folder that train.py wrote (OUT/final), or a pretrained backbone")
    source.add_argument(
        "--score", metavar="JSONL", help="benchmarks: no model, but these predictions, lines with id and pred"
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--ask", metavar="QUESTION", help="one question about --video, with one <region> an object"
    )
    task.add_argument("--data", nargs="+", help="data files: JSON arrays or JSONL")
    task.add_argument("--bench-q", metavar="JSON", help="VideoRefer-Bench-Q: multiple choice")
    task.add_argument("--bench-d", metavar="JSON", help="VideoRefer-Bench-D: descriptions")
    add("--video", "--image", help="what --ask is about")
    for name, (read, shown, text) in POINTERS.items():
        point = lambda value, name=name, read=read: (name, read(value))
        point.__name__ = shown  # argparse names it when the value is wrong
        add(f"--{name}", dest="pointed", action="append", type=point, default=[], metavar=shown, help=text)
    add(
        "--object",
        dest="pointed",
        action="append_const",
        const=("object", None),
        help="what follows belongs to the next object",
    )
    add("--preview", metavar="PNG", help="draw the objects of --ask into their frames")
    add("--media", help="folder that media paths are relative to (default: each data file's own)")
    add(
        "--outside-paths",
        action="store_true",
        help="also take media paths that are absolute or climb out of that folder",
    )
    add(
        "--control",
        nargs="+",
        choices=("full", "shuffle"),
        default=[],
        help="ask --data again with the masks replaced",
    )
    add(
        "--mode",
        choices=("single", "multi"),
        default="single",
        help="benchmarks: masks on the published frame alone, or on all",
    )
    add(
        "--no-options",
        action="store_true",
        help="--bench-q: ask the question alone; an option's text is the answer",
    )
    add(
        "--judge",
        metavar="URL",
        help="--bench-d: a chat-completions server that scores; its key in OPENAI_API_KEY, if it needs one",
    )
    add("--judge-model", default="gpt-4o", help="(default: %(default)s)")
    add("--judge-prompt", metavar="FILE", help="the published system.txt, in place of eval.py's own words")
    add("--out", help="a new folder for predictions.jsonl and scores.json, or that of a run to go on with")
    add("--batch-size", type=int, default=32)
    add("--max-new-tokens", type=int, default=128)
    add("--workers", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    bench = args.bench_q or args.bench_d
    for wrong, message in (
        (args.score and not bench, "--score: goes with --bench-q or --bench-d"),
        (args.control and not args.data, "--control: goes with --data"),
        (args.judge and not args.bench_d, "--judge: goes with --bench-d"),
        (bench and not args.out and (args.judge or not args.score), "--out is missing"),
        (args.ask is not None and args.out, "--out: does not go with --ask"),
        (args.ask is not None and not args.video, "--ask: --video or --image is missing"),
        (
            args.ask is None and (args.pointed or args.preview or args.video),
            "--video, masks and --preview go with --ask",
        ),
    ):
        if wrong:
            parser.error(message)
    return args


def main(argv=None):
    args = parse(argv)
    args.device = init_distributed(args.device)
    if args.ask is not None:
        return run_ask(args)
    with tempfile.TemporaryDirectory() as scratch:
        args.out = args.out or scratch
        run_questions(args)


if __name__ == "__main__":
    try:
        main()
    except (data.DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
