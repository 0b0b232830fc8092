"""Evaluation: what the model says about *this* object, how good its answers are, and how much of that the mask earned.

    python eval.py --model out/final --video a.mp4 --frame 36 --box 100,50,200,80 --ask "What is <region> doing?"
    python eval.py --model out/final --data test.json                            # exact match and loss, by type of question
    python eval.py --model out/final --data test.json --control full shuffle     # the same beside what the mask did not earn
    python eval.py --model out/final --bench-q VideoRefer-Bench-Q.json --media DIR --out q       # multiple choice: accuracy by type
    python eval.py --model out/final --bench-d VideoRefer-Bench-D.json --media DIR --out d       # descriptions,
    python eval.py --bench-d VideoRefer-Bench-D.json --score d/predictions.jsonl --out d --judge https://api.openai.com/v1  # judged

    samples --Questions--> one turn each --DataLoader, left padding--> generate --> OUT/parts/*.jsonl --> OUT/predictions.jsonl

Every answer of a conversation is one question: the model reads the conversation up to it and answers greedily. A control asks the
same questions with every mask replaced by the whole frame (full), or by the mask of another sample's object (shuffle).

All of it runs under torchrun as well, each rank asking its share. With --out, the same command goes on after a kill where it stopped:
each answer is appended as a whole line as soon as it is there, and each question must have exactly one before anything is scored.
"""

import argparse
import fcntl
import glob
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models
from train import init_distributed, rank, sum_over_ranks, world_size, write_whole


def load(path, device=None):
    """A folder that train.py wrote, or a plain backbone -> (model, processor). What training saw of a video, the model sees."""
    saved = os.path.join(path, "nanorefer.json")
    settings = data.Settings(frame_pixels=384 * 384, region_pixels=384 * 384)
    if os.path.exists(saved):
        with open(saved) as file:
            settings = data.Settings(**json.load(file))
    processor = data.Processor.from_pretrained(path, settings)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return models.ReferringVideoLLM.from_pretrained(path, processor.region_token_id).to(device).eval(), processor


# ------------------------------------------------------------------------------------------------ one question of your own


def ask(model, processor, media, question, objects=(), max_new_tokens=128):
    """The model's answer to one question about a video or an image, as text. Raises data.DataError.

    media: a path. question: with one `<region>` an object, in order. objects: one dict an object, {frame index: mask}, the frame of an
    image being 0; a mask is an array (H, W), not 0 inside the object, or what the data file knows: RLE, or polygons (see box).
    """
    masks = [{str(f): {"segmentation": _segmentation(m)} for f, m in frames.items()} for frames in objects]
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "-"}]  # its answer is not read
    entry = {"video": os.fspath(media), "conversations": turns, "annotation": masks}
    sample = data.parse_sample(entry, (os.fspath(media),), "", 0)
    return next(answers(model, processor, Questions([sample], processor), [(0, 0)], max_new_tokens))[0]


def box(x, y, w, h):
    """The polygon of a box: its left upper corner (x, y) and its size, in pixels of the frame."""
    left, top, right, bottom = map(float, (x, y, x + w, y + h))  # float: numbers of numpy are welcome
    return [left, top, right, top, right, bottom, left, bottom]


def _segmentation(mask):
    """A mask as ask takes it -> as the data file has it. An array becomes uncompressed RLE: its runs, column by column."""
    if not isinstance(mask, np.ndarray):
        return mask
    data.expect(mask.ndim == 2, "a mask (H, W)", mask.shape)
    pixels = np.concatenate([[0], (mask != 0).T.ravel(), [0]])  # the first run counts zeros
    edges = np.flatnonzero(np.diff(pixels))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, mask.size]).tolist()}


class Pointing(argparse.Action):
    """Keeps --object, --frame, --box, --polygon and --mask in the order in which they were given."""

    def __call__(self, parser, namespace, value, option=None):
        namespace.pointed = [*namespace.pointed, (option, value)]


def read_objects(pointed, info):
    """[(option, value)] in order -> objects as ask takes them. --object begins a new one, --frame names the next mask's frame."""
    objects, frame = [{}], None
    for option, value in [*pointed, ("--object", [])] if pointed else []:
        with data.within(f"{option} {value}" if value else option):
            if option in ("--frame", "--object"):
                data.expect(frame is None, f"a mask (--box, --polygon or --mask) after --frame {frame}", option)
            if option == "--frame":
                data.expect(re.fullmatch("[0-9]{1,9}", value), "a frame index: a whole number from 0", value)
                frame = int(value)
            elif option == "--object":
                objects += [{}] if objects[-1] else []
            else:
                data.expect(frame is not None or info.is_image, "--frame before each mask of a video", "none")
                frame = frame or 0
                data.expect(frame not in objects[-1], "one mask a frame (--object begins the next object)", f"two on frame {frame}")
                objects[-1][frame] = _read_mask(option, value, info)
                frame = None
    return objects[:-1]


def _read_mask(option, value, info):
    if option == "--mask":
        try:
            mask = np.asarray(Image.open(value).convert("L"))
        except OSError as error:
            raise data.DataError(f"expected a picture, not black inside the object; found: {error}") from None
        data.expect(mask.any(), "a mask that is not empty", "only black")
        return mask
    try:
        numbers = [float(n) for n in value.split(",")]
    except ValueError:
        numbers = []
    if option == "--box":
        data.expect(len(numbers) == 4 and min(numbers[2:]) > 0, "x,y,w,h: 4 numbers, the size above 0", value)
        numbers = box(*numbers)
    data.expect(len(numbers) >= 6 and len(numbers) % 2 == 0, "x1,y1,x2,y2,...: 3 points or more", value)
    inside = all(0 <= x <= info.width for x in numbers[::2]) and all(0 <= y <= info.height for y in numbers[1::2])
    data.expect(inside, f"a place inside the picture, {info.width}x{info.height} (width x height)", value)
    return numbers


def run_ask(args):
    objects = read_objects(args.pointed, data.media_info(args.video))
    if args.preview:
        preview(args.video, objects).save(args.preview)
    model, processor = load(args.model, args.device)
    print(ask(model, processor, args.video, args.ask, objects, args.max_new_tokens))


def preview(media, objects):
    """A picture of all frames that objects are marked on, one below the other, in order of time."""
    indices = sorted({frame for frames in objects for frame in frames}) or [0]
    rows = []
    for frame, picture in zip(indices, data.read_frames(media, indices)):
        marked = [_segmentation(frames.get(frame)) for frames in objects]
        masks = [None if mask is None else data.decode_mask(mask, *picture.shape[:2]) for mask in marked]
        rows.append(data.draw_regions(picture, masks))
    return Image.fromarray(np.concatenate(rows))


# ------------------------------------------------------------------------------------------------ many questions: generation


class Questions(data.ReferringDataset):
    """The same samples, one answer at a time: keys are (number, turn) pairs."""

    def __getitem__(self, key):
        try:
            return self.question(*key)
        except data.DataError as error:
            return error


def collate(samples, **options):
    """A batch, or the first DataError among the samples: raised here, in a worker, it would lose its shape."""
    errors = [s for s in samples if isinstance(s, data.DataError)]
    return errors[0] if errors else data.collate(samples, **options)


def batches(dataset, keys, device, batch_size=1, workers=0, **options):
    """Batches of dataset[key] on the device, in order, with a progress bar. A sample that cannot be used ends the evaluation."""
    joined = partial(collate, pad_token_id=dataset.processor.tokenizer.pad_token_id, **options)
    loader = DataLoader(dataset, batch_size, sampler=keys, collate_fn=joined, num_workers=workers)
    for batch in tqdm(loader, unit="batch", leave=False, disable=rank() > 0 or len(keys) == 1):
        if isinstance(batch, data.DataError):
            raise batch
        yield {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def answers(model, processor, questions, keys, max_new_tokens, **options):
    """Yields the model's answers to the Questions with these keys: batch by batch, a list of texts."""
    for batch in batches(questions, keys, next(model.parameters()).device, pad_left=True, **options):
        tokens = model.generate(batch, processor.tokenizer.eos_token_id, max_new_tokens)
        yield [processor.tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]


def answer_all(model, processor, samples, turns, control, args):
    """-> {n: the model's answer} for turns {n: (number of the sample, turn)}, the same on every rank, each n exactly once.

    Each rank asks its share of what OUT/parts does not hold yet and appends to a file of its own. What is done is read by one rank
    for all: others may already be writing.
    """
    done = gather(read_parts(args.out, control) if rank() == 0 else None)[0]
    known, found = {n for n, _ in done}, []
    mine = [n for n in turns if n not in known][rank() :: world_size()]
    questions, options = Questions(samples, processor, control=control), {"batch_size": args.batch_size, "workers": args.workers}
    with open(os.path.join(args.out, "parts", f"{control}-{rank()}.jsonl") if args.out else os.devnull, "a") as file:
        if args.out:
            lock(file)
        for texts in answers(model, processor, questions, [turns[n] for n in mine], args.max_new_tokens, **options):
            new = list(zip(mine[len(found) :], texts))
            append_lines(file, [{"question": n, "answer": text} for n, text in new])
            found += new
    everything = done + [pair for pairs in gather(found) for pair in pairs]
    check_once([n for n, _ in everything], turns, args.out or "the answers")
    return dict(sorted(everything))


def gather(value):
    """-> the values of all ranks, on every rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def finish():
    """The ranks part, since what is left is for rank 0 alone, and a judge may take longer than others can wait. -> is this rank 0?"""
    first = rank() == 0
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return first


def check_once(found, wanted, place):
    """Raises DataError unless each of wanted occurs exactly once in found, and nothing else does."""
    counts, wanted = Counter(found), list(wanted)
    faults = {"missing": [key for key in wanted if not counts[key]], "repeated": [key for key in counts if counts[key] > 1]}
    faults["unknown"] = sorted(set(counts) - set(wanted), key=str)
    text = ", ".join(f"{len(keys)} {fault} ({', '.join(map(str, keys[:3]))})" for fault, keys in faults.items() if keys)
    if text:
        raise data.DataError(f"expected each of {len(wanted)} questions exactly once, found {text}", str(place))


# ------------------------------------------------------------------------------------------------ files

pause = time.sleep  # tests replace it


def append_lines(file, entries):
    """Appends one JSON object a line and hands them to the system at once, so that a kill can tear the last one at most."""
    file.write("".join(json.dumps(entry) + "\n" for entry in entries))
    file.flush()


def lock(file, patience=10):
    """Keeps other processes from appending to a file until it is closed. Ranks live on for seconds when torchrun alone is killed, and
    so do a killed rank's workers, which hold its files: hence the patience."""
    for attempt in range(patience + 1):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pause(1)
    raise SystemExit(f"{file.name}: another run is still writing to it; end that one, or wait for its end")


def read_lines(path, torn=False):
    """JSONL -> a list of dicts. torn: the file was being appended to when a kill came; what is left of a last line is cut off."""
    if torn:
        with open(path, "r+b") as file:
            lock(file)
            file.truncate(file.read().rfind(b"\n") + 1)
    entries = []
    with open(path) as file:
        for number, line in enumerate(file, start=1):
            with data.within(path, f"line {number}"):
                try:
                    entries.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise data.DataError(f"expected JSON, found {error.msg}") from None
                data.expect(isinstance(entries[-1], dict), "a JSON object", entries[-1])
    return entries


def read_parts(out, control):
    """-> [(n, answer)]: what all ranks of all earlier runs have answered."""
    paths = sorted(glob.glob(os.path.join(glob.escape(out), "parts", f"{control}-*.jsonl"))) if out else []
    return [(line["question"], line["answer"]) for path in paths for line in read_lines(path, torn=True)]


def write_result(out, predictions, scores):
    """Writes OUT/predictions.jsonl and OUT/scores.json, those that are not empty, each aside before it takes its name: whole or not."""
    lines = "".join(json.dumps(line) + "\n" for line in predictions)
    for name, text in (("predictions.jsonl", lines), ("scores.json", json.dumps(scores, indent=2) if scores else "")):
        if text:
            path = os.path.join(out, name)
            with open(path + ".tmp", "w") as file:
                file.write(text)
            os.replace(path + ".tmp", path)


def open_run(args, files):
    """Makes OUT, or finds it: what this very command began is gone on with, anything else is left alone. OUT/run.json tells: how
    the questions are asked, and the sizes and times of the files of questions and of the model's weights."""
    run = {name: getattr(args, name) for name in ("model", "media", "mode", "no_options", "max_new_tokens")}
    for path in [*files, *sorted(glob.glob(os.path.join(glob.escape(args.model), "*.safetensors")))]:
        run[os.path.abspath(path)] = [os.path.getsize(path), os.stat(path).st_mtime_ns]
    saved = os.path.join(args.out, "run.json")
    if os.path.isfile(saved):
        with open(saved) as file:
            if json.load(file) == run:
                return
    if os.path.exists(args.out):
        raise SystemExit(f"--out {args.out}: exists and holds no beginning of this run; name another folder, or remove it")

    def write(folder):
        os.mkdir(os.path.join(folder, "parts"))
        with open(os.path.join(folder, "run.json"), "w") as file:
            json.dump(run, file, indent=2)

    write_whole(args.out, write)


# ------------------------------------------------------------------------------------------------ --data: exact match and loss


@torch.no_grad()
def mean_loss(model, processor, samples, args):
    """Cross-entropy of the right answers: a sum over all supervised tokens of all ranks, divided once by their number."""
    total, tokens = 0.0, 0
    keys = [(0, i) for i in range(len(samples))][rank() :: world_size()]
    for batch in batches(data.ReferringDataset(samples, processor), keys, args.device, args.batch_size, args.workers):
        total += model(batch).item()
        tokens += int((batch["labels"][:, 1:] != data.IGNORE).sum())
    total, tokens = sum_over_ranks([total, tokens], args.device)
    return total / tokens


def table_rows(questions):
    """{row: numbers of its questions}: each type, then all questions about regions, then all questions."""
    rows = defaultdict(list)
    for i, question in enumerate(questions):
        rows[question["type"] or "(no type)"].append(i)
    rows = dict(sorted(rows.items()))
    rows["about regions"] = [i for i, question in enumerate(questions) if question["regions"]]
    rows["all"] = list(range(len(questions)))
    return {name: members for name, members in rows.items() if members}


def report(questions, columns, rows, loss, out):
    """Prints the table: a row a type of question; its questions, the share answered exactly (up to white space at the ends), the
    same under each control, and the share that the best constant answer to each type would get. Writes it all to out, if given.

    columns: {"exact" or a control: {number of the question: prediction}}; a control has no entry where there is no region.
    """
    scores = {"loss": loss, "rows": {}}
    print(f"{'':16}{'questions':>10}" + "".join(f"{name:>10}" for name in columns) + f"{'constant':>10}")
    for row, members in rows.items():
        counts = {"questions": len(members)}
        for name, predictions in columns.items():
            asked = [i for i in members if i in predictions]
            counts[name] = {"right": sum(predictions[i] == questions[i]["answer"] for i in asked), "asked": len(asked)}
        answers = defaultdict(Counter)  # type -> how often each answer is the right one
        for i in members:
            answers[questions[i]["type"]][questions[i]["answer"]] += 1
        counts["constant"] = sum(counter.most_common(1)[0][1] for counter in answers.values())
        scores["rows"][row] = counts
        shares = [f"{100 * c['right'] / c['asked']:.1f} %" if c["asked"] else "-" for c in (counts[name] for name in columns)]
        shares.append(f"{100 * counts['constant'] / len(members):.1f} %")
        print(f"{row:16}{len(members):>10}" + "".join(f"{share:>10}" for share in shares))
    print(f"loss {loss:.4f} per supervised token")
    if out:
        given = [{name: found[i] for name, found in columns.items() if i in found} for i in range(len(questions))]
        write_result(out, [question | answers for question, answers in zip(questions, given)], scores)


def run_data(args):
    samples = data.read_samples(args.data, args.media)
    turns, questions = [], []
    for number in range(len(samples)):
        sample = samples[number]
        for turn, (question, answer) in enumerate(sample.turns):
            turns.append((number, turn))
            pointed = any(data.REGION_TAG in earlier for earlier, _ in sample.turns[: turn + 1])
            asked = {"id": sample.id, "turn": turn, "type": sample.type, "regions": pointed}
            questions.append(asked | {"question": question, "answer": answer.strip()})
    model, processor = load(args.model, args.device)
    loss = mean_loss(model, processor, samples, args)
    columns = {}
    for name, control in [("exact", "none"), *((name, name) for name in args.control)]:
        asked = {i: turns[i] for i, question in enumerate(questions) if question["regions"] or control == "none"}
        columns[name] = answer_all(model, processor, samples, asked, control, args)
    if finish():
        report(questions, columns, table_rows(questions), loss, args.out)


# ------------------------------------------------------------------------------------------------ VideoRefer-Bench


class Bench(data.Samples):
    """A VideoRefer-Bench file as samples of one turn. turn: an entry -> (question, right answer)."""

    def __init__(self, path, media, mode, turn):
        super().__init__([(path, media or os.path.dirname(path))])
        self.mode, self.turn = mode, turn

    def __getitem__(self, i):
        entry, place, media, position = self.read(i)
        with data.within(*place):
            data.expect(isinstance(entry, dict), "a JSON object", entry)
            question, answer = self.turn(entry)
            entry["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            listed, frame = entry.get("annotation"), str(entry.get("frame_idx"))
            if self.mode == "single" and isinstance(listed, list):  # each object on the published frame alone
                entry["annotation"] = [{frame: frames.get(frame)} if isinstance(frames, dict) else frames for frames in listed]
            return data.parse_sample(entry, place, media, position)


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
    data.expect(match and match[1] in options, f"Answer: one of the options {''.join(options)}", entry.get("Answer"))
    return options, match[1]


def bench_q_turn(entry, no_options):
    """The published question: the region in brackets, the options, and the request for a letter, joined as upstream joins them
    (alibaba-damo-academy/PixelRefer, VideoRefer/videorefer/eval/inference_videorefer_q_bench.py; its later script for VideoLLaMA3 leaves
    the brackets out).

    no_options: the question alone, for models that never saw options (the toy world's): not comparable with published numbers.
    """
    question, (options, letter) = entry.get("Question"), read_options(entry)
    data.expect(isinstance(question, str), "Question: a text", question)
    if no_options:
        return re.sub(r"<object\d+>", "", question), options[letter]
    question = question.replace(data.REGION_TAG, f"[{data.REGION_TAG}]")
    return f"{question} {' '.join(entry['options'])}. Answer with the option's letter from the given choices directly.", letter


def bench_d_turn(entry):
    """The published request for a description (the same folder, inference_videorefer_d_bench.py)."""
    caption = entry.get("caption")
    data.expect(isinstance(caption, str) and caption.strip(), "caption: a text", caption)
    return f"Please give a detailed description of the highlighted object [{data.REGION_TAG}] in the video.", caption


ANSWER_IS = re.compile(r"\A(?:the )?(?:best |correct |right |final )?(?:answer|option)(?: is)?:?\s+", re.IGNORECASE)
LETTER = re.compile(r"\(([A-Z])\)(?!\w)|([A-Z])\)(?!\w)|(?-i:([A-Z])[.:](?=\s))|([A-Z])[.:]?(?=\s*$)", re.IGNORECASE | re.MULTILINE)
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


def score_choices(entries, replies):
    """-> (entries with "pred", "choice" and "by"; {row: counts}); prints the accuracy by type, then over all questions."""
    scored, rows = [], defaultdict(Counter)
    for entry, reply in zip(entries, replies):
        options, right = read_options(entry)
        letter, by = choose(reply, options)
        scored.append(entry | {"pred": reply, "choice": letter, "by": by})
        for row in (str(entry.get("type", "")), "all"):
            rows[row] += Counter({"questions": 1, "right": int(letter == right), by: 1})
    rows = {row: rows[row] for row in sorted(rows, key=lambda row: (row == "all", row))}
    names = ("questions", "right", "letter", "text", "none")
    print(f"{'':26}{'accuracy':>10}" + "".join(f"{name:>10}" for name in names))
    for row, counts in rows.items():
        share = f"{100 * counts['right'] / counts['questions']:.1f} %"
        print(f"{row:26}{share:>10}" + "".join(f"{counts[name]:>10}" for name in names))
    print("letter, text: replies that name an option by its letter, or by its whole text; none: neither, counted as wrong")
    return scored, {row: {name: counts[name] for name in names} for row, counts in rows.items()}


def run_bench(args):
    path = args.bench_q or args.bench_d
    turn = partial(bench_q_turn, no_options=args.no_options) if args.bench_q else bench_d_turn
    samples = Bench(path, args.media, args.mode, turn)
    entries = [samples.read(i)[0] | {"id": samples[i].id} for i in range(len(samples))]  # each is checked, before a model is loaded
    entries = [{name: value for name, value in entry.items() if name != "annotation"} for entry in entries]
    ids = [json.dumps(entry["id"]) for entry in entries]
    check_once(ids, dict.fromkeys(ids), path)
    if args.score:
        replies = read_predictions(args.score, ids)
        os.makedirs(args.out or ".", exist_ok=True)
    else:
        model, processor = load(args.model, args.device)
        replies = answer_all(model, processor, samples, {n: (n, 0) for n in range(len(entries))}, "none", args).values()
    if not finish():
        return
    if args.bench_q:
        scored, scores = score_choices(entries, replies)
        scores = {"mode": args.mode, "no_options": args.no_options, "rows": scores}
    else:
        scored = [{k: entry[k] for k in ("id", "video", "caption")} | {"pred": reply} for entry, reply in zip(entries, replies)]
        scores = judge(scored, args) if args.judge else {}
    if args.out:
        write_result(args.out, [] if args.score else scored, scores)


def read_predictions(path, ids):
    """A file of lines {"id": ..., "pred": text, ...}, exactly one an id -> the texts in the order of ids (JSON texts)."""
    found = read_lines(path)
    for number, line in enumerate(found, start=1):
        with data.within(path, f"line {number}"):
            data.expect("id" in line and isinstance(line.get("pred"), str), 'an object with "id" and "pred", a text', line)
    check_once([json.dumps(line["id"]) for line in found], ids, path)
    texts = {json.dumps(line["id"]): line["pred"] for line in found}
    return [texts[i] for i in ids]


# ------------------------------------------------------------------------------------------------ the judge of VideoRefer-Bench-D

ASPECTS = ("Subject Correspondence", "Appearance Description", "Temporal Description", "Hallucination Detection")
# Aspects, scale and layout as published; the words are ours. Give the published system.txt to --judge-prompt to compare numbers.
JUDGE_PROMPT = """You compare two descriptions of one object in a video: the correct answer, and a predicted answer.
Score the prediction on four aspects, each with a whole number from 0 (nothing fits) to 5 (everything fits):
1. Subject Correspondence: is it about the same subject?
2. Appearance Description: are colour, shape, texture and other visible properties right?
3. Temporal Description: is what the object does over time right?
4. Hallucination Detection: is it free of facts, actions and things that are not there? 5 means that nothing is made up.
Reply in this layout, with a short reason after each score:
1. Subject Correspondence: 5
Explanation: ...
2. Appearance Description: 4
Explanation: ...
3. Temporal Description: 5
Explanation: ...
4. Hallucination Detection: 3
Explanation: ..."""
RETRIES = 5


def read_marks(reply):
    """A judge's reply -> {aspect: 0 to 5}, or None unless each aspect stands on a line of its own, once, with a whole number."""
    marks = {}
    for aspect in ASPECTS:
        found = re.findall(rf"^[\s\d.#*-]*{aspect}[\s*]*:[\s*]*(\d+)(?:\s*/\s*5\b)?(?![\d/]|\.\d)", reply, re.MULTILINE | re.IGNORECASE)
        if len(found) != 1 or int(found[0]) > 5:
            return None
        marks[aspect] = int(found[0])
    return marks


def chat(url, messages, args):
    """Asks a chat-completions server -> (its reply, the model it says it is). What may pass is tried again, then ends the run."""
    url = url if url.endswith("/chat/completions") else url.rstrip("/") + "/chat/completions"
    body = json.dumps({"model": args.judge_model, "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    if os.environ.get("OPENAI_API_KEY"):
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['OPENAI_API_KEY']}")
    for attempt in range(RETRIES + 1):
        if attempt:
            pause(min(2**attempt, 30))
        try:
            with urllib.request.urlopen(request, timeout=args.judge_timeout) as response:
                reply = json.load(response)
            text = reply["choices"][0]["message"]["content"]
            return text if isinstance(text, str) else "", reply.get("model")  # null: the server's filter kept it back
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 409, 429):
                raise SystemExit(f"--judge {url}: {problem}") from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise SystemExit(f"--judge {url}: no answer in {RETRIES + 1} tries, the last: {problem}. The same command goes on from here.")


def judge(scored, args):
    """Has each description judged, a line each in OUT/judged.jsonl, and prints the means; lines that are there are kept."""
    system, path = JUDGE_PROMPT, os.path.join(args.out, "judged.jsonl")
    if args.judge_prompt:
        with open(args.judge_prompt) as file:
            system = file.read()
    setting = {"judge": args.judge_model, "prompt": hashlib.sha256(system.encode()).hexdigest()[:12]}
    wanted = {json.dumps(entry["id"]): entry | setting for entry in scored}
    lines = read_lines(path, torn=True) if os.path.exists(path) else []
    for line in lines:
        same = (line | wanted.get(json.dumps(line.get("id")), {"id": None})) == line
        data.expect(same, f"in {path} only what this judge said of these predictions", line)
    done = {json.dumps(line["id"]) for line in lines}
    with open(path, "a") as file:
        lock(file)
        for key, entry in tqdm(wanted.items(), unit="reply", leave=False):
            if key not in done:
                question = f"##Correct answer: {entry['caption']}\n##Predicted answer: {entry['pred']}\n"
                messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
                reply, model = chat(args.judge, messages, args)
                lines.append(entry | {"model": model, "reply": reply, "marks": read_marks(reply)})
                append_lines(file, lines[-1:])
    check_once([json.dumps(line["id"]) for line in lines], wanted, path)
    marks = [line["marks"] for line in lines if line["marks"]]
    models = sorted({str(line["model"]) for line in lines})
    own = "the prompt in eval.py, not the published one" if system == JUDGE_PROMPT else args.judge_prompt
    print(f"judge: {args.judge_model} at {args.judge}, which calls itself {', '.join(models)}; prompt {setting['prompt']} ({own})")
    means = {aspect: sum(m[aspect] for m in marks) / len(marks) if marks else None for aspect in ASPECTS}
    means["Average"] = sum(means.values()) / len(means) if marks else None
    for aspect, mean in means.items():
        print(f"{aspect:26}{'-' if mean is None else f'{mean:.2f}':>6}")
    failed = len(lines) - len(marks)
    print(f"{len(lines)} replies, {failed} of them without four scores: left out of the means")
    return setting | {"models": models, "means": means, "replies": len(lines), "failed": failed}


# ------------------------------------------------------------------------------------------------ the command line


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a folder that train.py wrote (OUT/final), or a pretrained backbone")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--ask", metavar="QUESTION", help="one question about --video, with one <region> an object")
    task.add_argument("--data", nargs="+", help="data files: JSON arrays or JSONL")
    task.add_argument("--bench-q", metavar="JSON", help="VideoRefer-Bench-Q: multiple choice")
    task.add_argument("--bench-d", metavar="JSON", help="VideoRefer-Bench-D: descriptions")
    add("--video", "--image", help="what --ask is about")
    masks = {"frame": "of the next mask, from 0", "box": "x,y,w,h in pixels", "polygon": "x1,y1,x2,y2,...", "mask": "a picture"}
    for name, text in masks.items():
        add(f"--{name}", action=Pointing, dest="pointed", default=[], metavar=name.upper(), help=text)
    add("--object", action=Pointing, dest="pointed", nargs=0, help="what follows belongs to the next object")
    add("--preview", metavar="PNG", help="draw the objects of --ask into their frames")
    add("--media", help="folder that media paths are relative to (default: each data file's own)")
    add("--control", nargs="+", choices=("full", "shuffle"), default=[], help="--data: ask again with the masks replaced")
    add("--mode", choices=("single", "multi"), default="single", help="benchmarks: masks on the published frame alone, or on all")
    add("--no-options", action="store_true", help="--bench-q: the question alone, no options; an option's text is the answer")
    add("--score", metavar="JSONL", help="benchmarks: score these predictions, with id and pred, and generate nothing")
    add("--judge", metavar="URL", help="--bench-d: a chat-completions server that scores; its key in OPENAI_API_KEY, if it needs one")
    add("--judge-model", default="gpt-4o", help="(default: %(default)s)")
    add("--judge-prompt", metavar="FILE", help="the published system.txt, in place of eval.py's own words")
    add("--judge-timeout", type=float, default=60, help="seconds to wait for it (default: %(default)s)")
    add("--out", help="a new folder for predictions.jsonl and scores.json, or that of a run to go on with")
    add("--batch-size", type=int, default=32)
    add("--max-new-tokens", type=int, default=128)
    add("--workers", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    bench = args.bench_q or args.bench_d
    for wrong, message in (
        (not args.model and not args.score, "--model is missing"),
        (args.score and not bench, "--score: goes with --bench-q or --bench-d"),
        (args.judge and not args.bench_d, "--judge: goes with --bench-d"),
        (bench and not args.out and (args.judge or not args.score), "--out is missing"),
        (args.ask is not None and not args.video, "--ask: --video or --image is missing"),
        (args.ask is None and (args.pointed or args.preview or args.video), "--video, masks and --preview go with --ask"),
    ):
        if wrong:
            parser.error(message)
    return args


def main(argv=None):
    args = parse(argv)
    args.device = init_distributed(args.device)
    if args.ask is not None:
        run_ask(args)
        return
    if args.out and not args.score and rank() == 0:
        open_run(args, args.data or [args.bench_q or args.bench_d])
    if args.data:
        run_data(args)
    else:
        run_bench(args)


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"data error: {error}") from None
