"""Evaluation: asks a model about objects, and measures how good its answers are.

    python eval.py ask "What is <region>?" --model out/final --video a.mp4 --object 36:100,50,200,80
    python eval.py data test.json --model out/final --out scores --control full shuffle box blind
    python eval.py bench-q VideoRefer-Bench-Q.json --model out/final --media DIR --out q    # multiple choice
    python eval.py bench-d VideoRefer-Bench-D.json --model out/final --media DIR --out d    # descriptions
    python eval.py judge d/predictions.jsonl --prompt system.txt       # descriptions of any model
    python eval.py score VideoRefer-Bench-Q.json predictions.jsonl     # replies of any model: id and pred

    data file --read_questions--> questions --Questions--> batches --generate_replies--> replies
        --> OUT/parts/*.jsonl --> OUT/predictions.jsonl, OUT/scores.json and a table

Each answer of a conversation is one question: the model reads the conversation up to there, and replies
greedily. A control asks again with other masks: the whole frame (full), those of an object on other media
(shuffle) or bounding boxes (box); as text alone, with "the object" for `<region>` (blind); or with coloured
outlines in the frames and their names in the text (outline). What is still right then does not come from what
was replaced, and outlines are what any video LLM can be asked with.

data and the benchmarks run under torchrun, too. The same command resumes a run that was killed, or adds
controls. A bad sample ends data (train.py --check lists them). A benchmark goes on without a bad entry, which
gets an "error" in predictions.jsonl, and is wrong or not judged.
"""

import argparse
import json
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see train.py; to be set before torch is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor
from pycocotools import mask as coco_mask
from tqdm import tqdm
from transformers import AutoConfig, Sam2VideoInferenceSession, Sam2VideoModel, Sam2VideoProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import data
import model as models
import train

CONTROLS = ("full", "shuffle", "box", "blind", "outline")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(path, device=DEVICE, **settings):
    """Returns (model, processor) of a folder that train.py wrote, or of a plain backbone. settings: fields of
    data.Settings, if they are to be others than in training.
    """
    data.expect(path != "tiny", "--model: a trained or pretrained model", path)
    processor = models.load_processor(path, **settings)
    return models.load_model(path, processor).to(device).eval(), processor


# ---- a question of your own ----
def ask(model, processor, media, question, objects=(), max_new_tokens=128, preview=None):
    """Returns the model's reply to one question about a video or an image. Raises data.DataError.

    media: a path, or a list of frame files. question: with one `<region>` for each object, in order.
    objects: {frame index: mask} for each; an image is frame 0. A mask is an array (H, W), not 0 inside the
    object, or what a data file has: RLE, or polygons (see box). preview: a PNG file to draw the objects in.
    """
    media = [os.fspath(path) for path in media] if isinstance(media, (list, tuple)) else os.fspath(media)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "..."}]  # "..." is not read
    # "video" serves images, too: the file's suffix decides.
    entry = {"video": media, "conversations": turns, "annotation": to_annotation(objects)}
    sample = data.parse_sample(entry, (data.media_name(media),), "", 0)
    dataset = Questions([sample], processor)
    [reply] = generate_replies(model, dataset, [[(0, 0)]], max_new_tokens)
    if isinstance(reply, data.DataError):
        raise reply
    if preview:
        dataset.samples = [replace(sample, turns=[(question, reply)])]
        train.preview(dataset, [0], preview, frames_shown=max(1, sum(map(len, objects))))  # all of them
    return reply


def look(media, objects, frames, preview):
    """Draws frames, and those of objects, as ask takes them, to a PNG file; frame 0 if there are none."""
    video, name, tiles = data.open_media(media), data.media_name(media), []
    for i, picture in video.read({*frames}.union(*objects) or {0}).items():
        masks = {}
        for k, of_object in enumerate(objects):
            with data.within(name, f"object {k}", f"frame {i}"):
                if i in of_object:
                    masks[k] = data.decode_mask(to_segmentation(of_object[i]), *picture.shape[:2])
        tiles.append((f"frame {i}", picture, masks))
    train.draw([(name, tiles)], preview)


def to_annotation(objects):
    """Returns objects, as ask takes them, as the "annotation" of a data file."""
    return [{str(k): {"segmentation": to_segmentation(m)} for k, m in masks.items()} for masks in objects]


def to_segmentation(mask):
    """Returns a mask as a data file may have it: an array (H, W) becomes RLE."""
    if not isinstance(mask, np.ndarray):
        return mask
    data.expect(mask.ndim == 2, "a mask (H, W)", mask.shape)
    values = np.unique(mask)
    data.expect(len(values) <= 2, "a mask of one object, such as (numbers == 2)", f"the values {values}")
    rle = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return rle | {"counts": rle["counts"].decode()}


def box(x, y, w, h):
    """Returns the polygon of a box with the upper left corner (x, y), in pixels of the frame."""
    data.expect(w > 0 and h > 0, "a box x,y,w,h of a size above 0", (w, h))
    left, top, right, bottom = map(float, (x, y, x + w, y + h))  # float: numpy's numbers are allowed
    return [left, top, right, top, right, bottom, left, bottom]


# ---- questions, and what a control makes of them ----
class Questions(data.ReferringDataset):
    """Samples, each encoded up to the question of one turn. Keys are (sample index, turn index) pairs.
    control: "none", or one of CONTROLS.
    """

    def __init__(self, samples, processor, control="none"):
        super().__init__(samples, processor)
        self.control = control

    def __getitem__(self, key):
        i, turn = key
        try:
            sample = self.samples[i]
            turns = sample.turns[: turn + 1]
            num_regions = sum(question.count(data.REGION_TAG) for question, _ in turns)
            sample = replace(sample, turns=turns, objects=sample.objects[:num_regions])
            rng = np.random.default_rng((self.seed, i))  # the same for all turns of a conversation
            return self.encode(sample, rng, for_generation=True)
        except data.DataError as error:
            return error

    def encode(self, sample, rng, for_generation=False):
        if self.control == "blind":
            turns = []
            for question, answer in sample.turns:
                text = data.MEDIA_TAG.sub("\n", question).strip("\n")
                turns.append((text.replace(data.REGION_TAG, "the object"), answer))
            sample = replace(sample, media=None, turns=turns, objects=[])
        if self.control == "outline" and sample.objects:
            with data.within(*sample.place), data.time_limit():
                sample = self._outlined(sample, rng)
        return super().encode(sample, rng, for_generation)

    def choose_objects(self, sample, info, rng):
        """The masks of each object as the control has them, on the same frames."""
        objects = super().choose_objects(sample, info, rng)
        for masks in objects:
            if self.control == "shuffle":
                others = self._masks_on_other_media(sample, rng)
            for k, (frame, mask) in enumerate(masks.items()):
                if self.control == "full":
                    masks[frame] = np.ones((1, 1), np.uint8)  # a pixel as large as the frame
                if self.control == "box":
                    top, bottom, left, right = data.mask_bounds(mask)
                    masks[frame] = np.zeros_like(mask)
                    masks[frame][top:bottom, left:right] = 1
                if self.control == "shuffle":
                    masks[frame] = others[k % len(others)]  # if they are fewer, again from the first on
        return objects

    def _masks_on_other_media(self, sample, rng):
        """The masks of a random object of a random sample on other media, as a list."""
        for i in rng.permutation(len(self)).tolist():
            with suppress(data.DataError):  # a bad sample cannot lend its masks; it has its own report
                donor = self.samples[i]
                if donor.objects and not files_of(donor) & files_of(sample):
                    k = rng.integers(len(donor.objects))
                    donor = replace(donor, objects=[donor.objects[k]])
                    [masks] = super().choose_objects(donor, self.media_of(donor).info, rng)
                    return list(masks.values())
        raise data.DataError("expected a sample with regions on other media to take masks from, found none")

    def _outlined(self, sample, rng):
        """The sample with outlines in the frames of its prompt, and their colours' names in its text."""
        media, distinct, names = self.media_of(sample), [], []
        for masks in self.choose_objects(sample, media.info, rng):
            for frame, mask in masks.items():
                shares = data.coverage(mask, media.info.height, media.info.width)  # of the frame's pixels
                masks[frame] = shares >= min(0.5, shares.max())  # by half, or by most if none is
            same = [k for k, others in enumerate(distinct) if show_the_same(masks, others)]
            if not same:
                distinct.append(masks)
            k = same[0] if same else len(distinct) - 1
            data.expect(k < len(COLOURS), f"at most {len(COLOURS)} objects to outline", len(sample.objects))
            says_outlined = isinstance(self.samples, Bench)  # in its own questions
            names.append(COLOURS[k] if says_outlined else f"the object outlined in {COLOURS[k]}")
        name, turns = iter(names), []
        for question, answer in sample.turns:
            turns.append((re.sub(data.REGION_TAG, lambda tag: next(name), question), answer))
        outlined = Outlined(media, distinct, self.settings.num_frames)
        return replace(sample, media=outlined, turns=turns, objects=[])

    def media_of(self, sample):
        return sample.media if isinstance(sample.media, Outlined) else super().media_of(sample)


# In the order in which the benchmark's authors give them to objects.
COLOURS = ("red", "green", "yellow", "blue", "grey", "purple", "orange", "brown", "pink")


class Outlined:
    """Media (see data.open_media) that consist of the frames in a prompt, with the objects outlined. An
    annotated frame takes the place of the nearest that is sampled otherwise.

    objects: {frame: mask} of each; the k-th is outlined in COLOURS[k].
    """

    def __init__(self, media, objects, num_frames):
        self.media, self.objects, info = media, objects, media.info
        annotated = data.evenly(sorted(set().union(*objects)), num_frames)
        self.frames = fill_up(annotated, info.num_frames, num_frames)
        for masks in objects:
            expected = f"a frame of each object among the {num_frames} of the prompt"
            data.expect(masks.keys() & {*self.frames}, expected, sorted(masks))
        self.times = [media.times[frame] for frame in self.frames]
        fps = info.fps * len(self.frames) / info.num_frames
        self.info = replace(info, num_frames=len(self.frames), fps=fps)

    def read(self, indices):
        pictures = self.media.read([self.frames[k] for k in indices])
        for k, masks in enumerate(self.objects):
            for frame in masks.keys() & pictures.keys():
                pictures[frame] = draw_outline(pictures[frame], masks[frame], COLOURS[k])
        return {k: pictures[self.frames[k]] for k in indices}


def fill_up(pointed, num_frames, count):
    """Returns frames of a video, filled up to count with others evenly spread, in order of time."""
    others = data.evenly(range(num_frames), count)
    for frame in pointed:
        if others:  # the frame takes the place of the nearest one
            others.pop(np.argmin([abs(other - frame) for other in others]))
    return sorted(pointed + others)


def show_the_same(masks, others):
    """Whether two regions are one object: on each frame that both have, two thirds are the same (IoU)."""
    shared = masks.keys() & others.keys()
    overlaps = [(masks[k] & others[k]).sum() / (masks[k] | others[k]).sum() for k in shared]
    return bool(shared) and min(overlaps) > 2 / 3


def draw_outline(picture, mask, colour):
    """Returns a frame, uint8 (H, W, 3), with the outline of a mask, bool (H, W): around the object, not on
    it, and a hundredth of the longer side wide.
    """
    reach = max(1, round(max(mask.shape) / 100))  # pixels
    near = torch.from_numpy(mask)[None].float()
    near = F.max_pool2d(near, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    near = F.max_pool2d(near, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    picture = picture.copy()
    picture[(near[0] > 0).numpy() & ~mask] = ImageColor.getrgb(colour)
    return picture


def files_of(sample):
    """The paths of a sample's media, as a set: media that share a frame file are the same."""
    media = [sample.media] if isinstance(sample.media, str) else sample.media
    return {os.path.normpath(path) for path in media}


def generate_replies(model, dataset, batches_of_keys, max_new_tokens=128, workers=0):
    """Yields for each key of Questions, in order, the reply as text, or the DataError of a bad sample."""
    tokenizer, device = dataset.processor.tokenizer, next(model.parameters()).device
    batches = train.read_batches(dataset, batches_of_keys, device, workers, for_generation=True)
    name = "replies" if dataset.control == "none" else dataset.control
    for batch in tqdm(batches, name, len(batches_of_keys), leave=False, disable=train.rank() > 0):
        texts = []  # the replies of samples that are not bad
        if not all(batch["errors"]):
            tokens = model.generate(batch, max_new_tokens)
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for error in batch["errors"]:
            yield error or texts.pop(0).strip()


# ---- a whole data file or benchmark ----
# What predictions.jsonl keeps of an entry:
ENTRY_FIELDS = ("id", "video", "image", "caption", "frame_idx", "Question", "options", "Answer")


def read_questions(samples, raise_bad):
    """Returns a dict for each answer of each sample, which becomes a line of predictions.jsonl. A bad entry
    becomes one question with an "error"; it is raised if raise_bad, or if all are bad.
    """
    questions = []
    for i in range(len(samples)):
        entry, _, _, position = samples.read(i)
        entry = entry if isinstance(entry, dict) else {}
        common = {"id": position} | {name: entry[name] for name in ENTRY_FIELDS if name in entry}
        common |= {"type": str(entry.get("type") or "(no type)"), "sample": i}
        try:
            turns, about_regions = samples[i].turns, False
        except data.DataError as error:
            if raise_bad:
                raise
            common["error"] = str(error)
            turns, about_regions = [("", None)], True  # so that it counts in every column, as wrong
        for turn, (text, answer) in enumerate(turns):
            # A question is also about regions if an earlier turn pointed at them.
            about_regions = about_regions or data.REGION_TAG in text
            asked = {"turn": turn, "question": text, "answer": answer, "regions": about_regions}
            questions.append(common | asked)
    if all("error" in q for q in questions):
        raise data.DataError(f"{questions[0]['error']} (and no other entry is right)")
    return questions


def evaluate(args):
    """Asks the questions of a data file or benchmark, scores the replies, and writes all of it to OUT."""
    is_data = args.command == "data"
    samples = data.read_samples(args.files, args.media) if is_data else Bench(args.files, args.media, args)
    questions = read_questions(samples, raise_bad=is_data)
    shown = {"num_frames": args.num_frames, "frame_pixels": args.frame_pixels}
    model, processor = load(args.model, args.device, **shown)
    open_out(args)
    scores = {}
    if is_data:
        for q in questions:  # a tokenizer may compose letters: an answer is compared in the form of a reply
            ids = processor.tokenizer(q["answer"], add_special_tokens=False)["input_ids"]
            q["answer"] = processor.tokenizer.decode(ids).strip()
        dataset = data.ReferringDataset(samples, processor)
        scores["loss"] = train.mean_loss(model, dataset, args.batch_size, args.workers)
    # {column of predictions.jsonl: the control that fills it}
    columns = {"exact" if is_data else "pred": "none"} | {control: control for control in args.control}
    for column, control in columns.items():
        if not is_data:
            samples.is_outlined = control == "outline"
        replies = ask_all(model, Questions(samples, processor, control), questions, args)
        for i, reply in replies.items():
            if isinstance(reply, data.DataError):
                questions[i]["error"], reply = str(reply), None
            questions[i][column] = reply
    bad = [q for q in questions if "error" in q]
    if bad and (is_data or len(bad) == len(questions)):
        raise data.DataError(f"{bad[0]['error']} ({len(bad)} of {len(questions)} questions cannot be asked)")
    for q in bad:  # wrong in every column, also where a control (blind) does not need what is missing
        q.update({column: None for column in columns if column in q})
    if train.rank() == 0:
        if is_data:
            scores["rows"] = score(questions, columns)
            print(f"loss {scores['loss']:.4f} per supervised token")
        elif args.command == "bench-q":
            scores["rows"] = score_choices(questions, columns)
        if bad:
            print(f"{len(bad)} of {len(questions)} questions could not be asked, such as: {bad[0]['error']}")
        train.write_jsonl(args.out / "predictions.jsonl", questions)
        train.write_jsonl(args.out / "scores.json", [scores | {"not_asked": len(bad)}])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def open_out(args):
    """Says in OUT/run.json what is asked. Raises DataError if OUT holds replies to anything else."""
    names = ("command", "model", "media", "mode", "max_new_tokens", "num_frames", "frame_pixels")
    run = {name: getattr(args, name) for name in names} | {"files": []}
    # In the order of the files, because a question is known by its number.
    for path in [*args.files, *sorted(Path(args.model).glob("[!.]*.*"))]:
        status = os.stat(path)
        run["files"].append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    old = train.read_jsonl(args.out / "run.json")
    is_new = all(path.suffix == ".tmp" for path in args.out.glob("*"))  # a kill may have left run.json.tmp
    allowed = f"--out {args.out}: a new folder, or that of a run of this command"
    data.expect(is_new or old == [run], allowed, old)
    train.gather_over_ranks(None)  # no rank writes before all have looked
    if is_new and train.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        train.write_jsonl(args.out / "run.json", [run])


def ask_all(model, dataset, questions, args):
    """Returns on every rank {index of a question: reply, or DataError of a bad sample}; the reply is None if
    the question has an "error" already. Replies are appended to OUT/parts as they come, and kept there.
    """
    control, parts, replies = dataset.control, args.out / "parts", {}
    parts.mkdir(parents=True, exist_ok=True)
    for path in parts.glob(f"{control}-*.jsonl"):
        replies.update(train.read_jsonl(path))
    replies = train.gather_over_ranks(replies)[0]  # what rank 0 has read, before any rank writes
    path = parts / f"{control}-{train.rank()}.jsonl"
    train.write_jsonl(path, train.read_jsonl(path))  # without the half line that a kill may have left
    # Without regions, there is nothing for a control of masks to replace.
    asked = [i for i, q in enumerate(questions) if q["regions"] or control in ("none", "blind")]
    missing = [i for i in asked if i not in replies and "error" not in questions[i]]
    batches = train.shared_out(missing, args.batch_size)
    keys = [[(questions[i]["sample"], questions[i]["turn"]) for i in batch] for batch in batches]
    generated = generate_replies(model, dataset, keys, args.max_new_tokens, args.workers)
    new = {}
    for i, reply in zip(chain(*batches), generated):
        new[i] = reply
        if isinstance(reply, str):  # an error is not kept: the video may be there in the next run
            train.append_jsonl(path, (i, reply))
    for replies_of_rank in train.gather_over_ranks(new):
        replies |= replies_of_rank
    return {i: replies.get(i) for i in asked}


# ---- scores ----
def score(questions, columns, suffix=""):
    """Prints a table, and returns it as {row: {"questions": n, column: {"right": n, "asked": n}, ...}}.

    A question that was asked for a column has a reply under column + suffix, which is right if it equals the
    answer. Rows: the types of questions, "about regions" (if only some are) and "all". The column "constant"
    is added, also to the questions: always the most frequent answer to those of this type, with or without
    regions.
    """
    counts, rows = defaultdict(Counter), defaultdict(list)
    for q in sorted(questions, key=lambda q: q["type"]):
        if q["answer"] is not None:  # None: a bad entry
            counts[q["type"], q["regions"]][q["answer"]] += 1
        # A type may be called as one of the rows below.
        name = f"type {q['type']}" if q["type"] in ("about regions", "all") else q["type"]
        rows[name].append(q)
    for q in questions:
        answers = counts[q["type"], q["regions"]]
        q["constant" + suffix] = max(answers, key=answers.get, default=None)
    about_regions = [q for q in questions if q["regions"]]
    if 0 < len(about_regions) < len(questions):
        rows["about regions"] = about_regions
    rows["all"] = questions
    scores, columns, width = {}, [*columns, "constant"], max(map(len, rows)) + 3
    print(" " * width + "".join(f"{column:>18}" for column in columns))
    for row, members in rows.items():
        scores[row], line = {"questions": len(members)}, f"{row:{width}}"
        for column in columns:
            asked = [q for q in members if column + suffix in q]
            right = sum(q["answer"] is not None and q[column + suffix] == q["answer"] for q in asked)
            scores[row][column] = {"right": right, "asked": len(asked)}
            cell = f"{right}/{len(asked)} {100 * right / len(asked):7.1f} %" if asked else "-"
            line += f"{cell:>18}"
        print(line)
    return scores


# "The correct answer is: ..."
ANNOUNCED = re.compile(r"\A(the )?((best|correct|right|final) )?(answer|option)( is)?:?\s+", re.I)
# A letter that is meant as an answer: "(B)", "(b)", "b)", "B.", "B:", or "B" at the end of a line.
LETTER = re.compile(r"(?<!\w)\(?([A-Za-z])\)(?!\w)|\b([A-Z])(?:[.:](?!\w)|\s*$)", re.M)


def choose(reply, options):
    """Returns the letter that a reply means, or None. options: {"A": text, ...}.

    Without "The answer is" and markup, it is an option's letter, text, or both, up to case and punctuation.
    Or it begins with a letter as in LETTER, and no other such letter follows, as in "(A) or (B)". (The
    published scorer falls back to the first character, which takes "The ..." for T.)
    """
    reply = re.sub(r"\*\*|\\boxed|\\text|[{}$]", "", reply).strip()
    answer = ANNOUNCED.sub("", reply)
    meant = set()
    for letter, text in options.items():
        forms = words(letter), words(text), words(f"{letter} {text}")
        # A text, too, may begin like "The answer is".
        if words(answer) in forms or words(reply) == words(text):
            meant.add(letter)
    if not meant and LETTER.match(answer):
        meant = {(in_brackets or plain).upper() for in_brackets, plain in LETTER.findall(answer)}
    return meant.pop() if len(meant) == 1 and meant <= options.keys() else None


def words(text):
    return re.sub(r"[.,:;!?()\[\]'\"]", " ", text.casefold()).split()


# ---- VideoRefer-Bench ----
# As upstream asks: PixelRefer, VideoRefer/videorefer/eval/inference_videorefer_q_bench.py (its script for
# VideoLLaMA3 has no brackets) and inference_videorefer_d_bench.py.
BENCH_Q = "{} {}. Answer with the option's letter from the given choices directly."
BENCH_D = "Please give a detailed description of the highlighted object [<region>] in the video."
# As they ask general models (VideoRefer/benchmark/evaluation_general_mllms.md); <region> becomes the colour.
OUTLINE_Q = "I have highlighted an object using a colored mask in the first frame it occurs in the video. "
OUTLINE_D = "I have outlined an object with a <region> contour in the video. "
OUTLINE_D += "Please describe the object in detail."
OPTION = re.compile(r"\(?([A-Z])[).:]\s*(.+)", re.DOTALL)  # "(A) Running"


class Bench(data.Samples):
    """The entries of a benchmark as samples of one turn."""

    def __init__(self, paths, media, args):
        super().__init__(paths, media)
        self.args = args
        self.is_outlined = False  # True: with the questions for frames with outlines

    def __getitem__(self, i):
        entry, place, media, position = self.read(i)
        with data.within(*place):
            data.expect(isinstance(entry, dict), "a JSON object", entry)
            if self.args.command == "bench-d":
                question, answer = OUTLINE_D if self.is_outlined else BENCH_D, entry.get("caption")
                data.expect(isinstance(answer, str) and answer.strip(), "caption: a text", answer)
            else:
                question, (_, answer) = entry.get("Question"), read_options(entry)
                data.expect(isinstance(question, str), "Question: a text", question)
                question = BENCH_Q.format(question, " ".join(entry["options"]))
                in_brackets = question.replace(data.REGION_TAG, f"[{data.REGION_TAG}]")
                question = with_legend(question) if self.is_outlined else in_brackets
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            sample = data.parse_sample(entry | {"conversations": turns}, place, media, position)
            if self.args.mode == "multi":
                return sample
            frame = str(entry.get("frame_idx"))
            objects = [{k: mask for k, mask in masks.items() if str(k) == frame} for masks in sample.objects]
            wanted = f"a mask of each object on frame {frame}, as frame_idx says"
            data.expect(all(objects), wanted, [sorted(masks) for masks in sample.objects])
            return replace(sample, objects=objects)


def with_legend(question):
    """A question of Bench-Q behind a legend of its objects, in which the tags stand for colours."""
    names = re.findall(r"(<object\d+>)?<region>", question)
    data.expect(all(names), "Question: <object0> or the like before each <region>", question)
    legend = "; ".join(f"{name}: {data.REGION_TAG}" for name in names)
    return f"{OUTLINE_Q}{legend}. " + question.replace(data.REGION_TAG, "")


def read_options(entry):
    """Returns the options of an entry of Bench-Q as {"A": text, ...}, and the letter of the right one."""
    listed, answer, options = entry.get("options"), entry.get("Answer"), {}
    data.expect(isinstance(listed, list) and listed, 'options: a list ["(A) ...", "(B) ..."]', listed)
    for text in listed:
        match = OPTION.fullmatch(text.strip()) if isinstance(text, str) else None
        data.expect(match and match[1] not in options, 'options: "(A) ...", each letter once', text)
        options[match[1]] = match[2]
    match = OPTION.match(str(answer))
    data.expect(match and match[1] in options, f"Answer: one of the options {''.join(options)}", answer)
    return options, match[1]


def score_choices(questions, columns):
    """Reads the option's letter from each reply to Bench-Q, and returns what score finds."""
    for column in columns:
        asked = [q for q in questions if column in q]
        for q in asked:
            is_read = "error" not in q and isinstance(q[column], str)  # null: it could not be asked
            q[f"{column}_choice"] = choose(q[column], read_options(q)[0]) if is_read else None
        unread = sum(q[f"{column}_choice"] is None for q in asked)
        print(f"{column}: {unread} replies name no option, and are wrong")
    return score(questions, columns, "_choice")


def score_file(args):
    """Scores a file of replies to Bench-Q: {"id": ..., "pred": text} for each question, once."""
    questions = read_questions(Bench([args.file], None, args), raise_bad=False)
    missing = {json.dumps(q["id"]): q for q in questions}
    data.expect(len(missing) == len(questions), f"{args.file}: each id once", [q["id"] for q in questions])
    lines, columns = data.read_samples(args.predictions), set()
    for i in range(len(lines)):
        line, place, *_ = lines.read(i)
        with data.within(*place):
            data.expect(isinstance(line, dict) and {"id", "pred"} <= line.keys(), "id and pred", line)
            q = missing.pop(json.dumps(line["id"]), None)
            data.expect(q is not None, "the id of a question, each once", line["id"])
            for column in line.keys() & {"pred", *CONTROLS}:
                columns.add(column)
                q[column] = line[column]
    data.expect(not missing, f"{args.predictions}: a reply to each question", f"none to {', '.join(missing)}")
    score_choices(questions, [column for column in ("pred", *CONTROLS) if column in columns])


# ---- A first reading may end here. Below: the judge, --object, SAM 2, and the command line. ----
ASPECTS = ("Subject Correspondence", "Appearance Description")
ASPECTS += ("Temporal Description", "Hallucination Detection")
# "4", "4/5" or "4 out of 5"; no other scale ("4 / 10"), no range ("4-5", "3 to 4") and no fraction ("4.5").
# Blanks are [ \t], because \s would go on to the number that the next line may begin with.
MARK = (
    r"(\d+)(?:\.0)?(?:[ \t]*(?:/|out of)[ \t]*5)?(?![ \t]*/|[ \t]*out of\b|[ \t]*(?:-|to|or)[ \t]*\d|[.,]?\d)"
)


def read_marks(reply):
    """Returns a judge's four marks from 0 to 5, or None unless each aspect has one line with a mark."""
    marks, reply = [], reply.split("</think>")[-1]
    for aspect in ASPECTS:  # as in "3. **Temporal Description**: 4/5"
        found = re.findall(rf"(?im)^[ \t\d.#*-]*{aspect}[ \t*]*:[ \t*]*{MARK}", reply)
        if len(found) != 1 or int(found[0]) > 5:
            return None
        marks.append(int(found[0]))
    return marks


def judge(args):
    """Has the descriptions of one column judged by a server of chat completions, and prints the mean marks.
    Each reply is kept in judged.jsonl, beside the predictions, and not paid for again.
    """
    import openai  # takes a second, and all else does without it

    system, path = Path(args.prompt).read_text(), Path(args.predictions).with_name("judged.jsonl")
    api_key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=args.url, api_key=api_key, max_retries=8, timeout=120)
    errors = openai.OpenAIError, AttributeError, LookupError, TypeError, UnicodeError
    judged = {json.dumps(line["request"]): line for line in train.read_jsonl(path)}
    train.write_jsonl(path, judged.values())  # without the half line that a kill may have left
    lines, marks = data.read_samples(args.predictions), []
    for i in tqdm(range(len(lines)), "judge", unit="reply", leave=False):
        line, place, *_ = lines.read(i)
        with data.within(*place):
            valid = isinstance(line, dict) and args.column in line
            valid = valid and ("caption" in line or line[args.column] is None)  # None: a bad entry
            data.expect(valid, f'an object with "caption" and "{args.column}"', line)
        if line[args.column] is None:
            continue
        user = f"##Correct answer: {line['caption']}\n##Predicted answer: {line[args.column]}\n"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        request = {"model": args.judge, "messages": messages}
        request |= {} if args.no_temperature else {"temperature": 0}
        key = json.dumps(request)
        if key not in judged:
            with data.readable("a completion (the next run goes on)", f"--url {args.url}", errors=errors):
                answer = client.chat.completions.create(**request)
                data.expect(answer.choices, "a completion", getattr(answer, "error", answer))
                reply = answer.choices[0].message.content or ""  # None: withheld by a filter
                if isinstance(reply, list):  # of parts: texts, and perhaps thoughts
                    reply = "".join(part.get("text", "") for part in reply)
            judged[key] = {"id": line.get("id"), "request": request, "reply": reply, "model": answer.model}
            train.append_jsonl(path, judged[key])
        marks.append(read_marks(judged[key]["reply"]))
    read = [four for four in marks if four]
    means = [*np.mean(read, axis=0), np.mean(read)] if read else []
    for aspect, mean in zip((*ASPECTS, "Average"), means):
        print(f"{aspect:26}{mean:9.2f}")
    print(f"{args.column}: {len(marks)} replies, {len(marks) - len(read)} without four marks, left out")


def read_object(pointed, info):
    """Returns one --object, ["FRAME:MASK", ...], as track takes it: {frame: mask}. info: data.MediaInfo."""
    masks = {}
    for text in pointed:
        frame, mask = re.fullmatch(r"(?s)(?:(\d+):)?(.*)", text).groups()
        is_named = frame is not None or info.is_image
        frame = int(frame or 0)
        data.expect(is_named and frame not in masks, "--object FRAME:MASK, each frame once", text)
        with data.readable("a picture, or a mask x,y,...", "--object", text):
            if re.fullmatch(r"[-\d.,]+", mask):
                numbers = [float(number) for number in mask.split(",")]
                corners = box(*numbers) if len(numbers) == 4 else numbers
                masks[frame] = tuple(corners) if len(corners) == 2 else corners
            else:
                masks[frame] = read_mask(*re.fullmatch(r"(?s)(.*?)(?::(\d+))?", mask).groups())
            if not isinstance(masks[frame], tuple):  # before a model is loaded, and anything is written
                data.to_rle(to_segmentation(masks[frame]), info.height, info.width)
    return masks


def read_mask(path, number=None):
    """Returns the mask of a picture, bool (H, W): of a palette (as in DAVIS) the object with this number;
    what is opaque, if a part is not; else what is brighter than half of the brightest.
    """
    image = Image.open(path)
    if number is not None or image.mode == "P":
        data.expect(image.mode in ("P", "L"), f"a picture with numbers of objects for :{number}", image.mode)
        objects = np.asarray(image)
        found = sorted({*np.unique(objects).tolist()} - {0})
        chosen = int(number) if number else found[0] if len(found) == 1 else None
        data.expect(chosen in found, f"{path}:NUMBER, one of the objects in it", f"the objects {found}")
        return objects == chosen
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    brightness = alpha if alpha.min() < alpha.max() else data.as_rgb(image).max(axis=2)
    return brightness > brightness.max() / 2


# ---- SAM 2: from a click to masks on more frames ----
def load_tracker(path, device=DEVICE):
    """Returns the Sam2VideoModel of a folder or Hugging Face name, such as facebook/sam2.1-hiera-tiny."""
    expected = "a Hugging Face name or a folder with config.json and weights of a SAM 2 video model"
    with data.readable(expected, f"--track {path}", errors=models.MODEL_ERRORS):
        family = AutoConfig.from_pretrained(path).model_type
        data.expect(family == "sam2_video", "a SAM 2 video model (sam2_video)", family)
        return models.load_weights(Sam2VideoModel, path).to(device).eval()


def track(media, objects, model, region_frames=data.Settings.region_frames):
    """Returns the objects with the masks (H, W) that SAM 2 finds on region_frames frames, spread over the
    video, or on all that have a mask already, if those are more. Raises data.DataError.

    media, objects: as for ask, but a mask may also be a point inside the object: a tuple (x, y) in pixels of
    the frame. A mask that fills its bounding box is taken for a box around the object. Any other is the
    object, and stays as it is. model: see load_tracker. It sees these frames alone, so that memory does not
    depend on the video's length. Frames on which it sees nothing of an object are left out.
    """
    video, name = data.open_media(media), data.media_name(media)
    height, width, size = video.info.height, video.info.width, model.config.image_size
    frames = fill_up(sorted(set().union(*objects)), video.info.num_frames, region_frames)
    # In place of transformers' Sam2VideoVideoProcessor, which needs torchvision.
    pixels = torch.from_numpy(np.stack(list(video.read(frames).values()))).movedim(3, 1)
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    mean, std = 255 * torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[:, :, None, None]
    pixels = (pixels - mean) / std
    session = Sam2VideoInferenceSession(pixels, height, width, model.device, dtype=pixels.dtype)
    prompter = object.__new__(Sam2VideoProcessor)  # without its __init__, whose parts need torchvision
    prompter.target_size, prompter.point_pad_value = size, -10
    tracked = []
    for i, masks in enumerate(objects):
        session.reset_tracking_data()
        found, drawn = {}, {}
        for frame, mask in masks.items():
            with data.within(name, f"object {i}", f"frame {frame}"):
                prompt = to_prompt(mask, height, width)
            if "input_masks" in prompt:
                drawn[frame] = prompt["input_masks"]
            prompter.add_inputs_to_inference_session(session, frames.index(frame), 0, **prompt)
            model(session, frames.index(frame))
        for reverse in (False, True):  # from the first of these frames on
            outputs = model.propagate_in_video_iterator(session, reverse=reverse) if masks else ()
            for output in outputs:
                logits = F.interpolate(output.pred_masks, (height, width), mode="bilinear")
                found[frames[output.frame_idx]] = (logits[0, 0] > 0).cpu().numpy()
        tracked.append({frame: mask for frame, mask in sorted((found | drawn).items()) if mask.any()})
        with data.within(name, f"object {i}"):
            data.expect(tracked[i], "an object that SAM 2 sees on at least one frame", [*masks])
    return tracked


def to_prompt(mask, height, width):
    """Returns a point, box or mask as transformers takes it."""
    picture = f"inside the picture, {width}x{height} (width x height)"
    if isinstance(mask, tuple):
        is_inside = len(mask) == 2 and 0 <= mask[0] < width and 0 <= mask[1] < height
        data.expect(is_inside, f"a point x,y {picture}", mask)
        return {"input_points": [[[[float(x) for x in mask]]]], "input_labels": [[[1]]]}
    segmentation = to_segmentation(mask)
    mask = data.decode_mask(segmentation, height, width)
    data.expect(mask.any(), f"a mask that is not empty {picture}", segmentation)
    top, bottom, left, right = data.mask_bounds(mask)
    if not mask[top:bottom, left:right].all():
        return {"input_masks": mask}
    y, x = height / mask.shape[0], width / mask.shape[1]  # a mask may have another resolution
    return {"input_boxes": [[[x * left, y * top, x * right, y * bottom]]]}


# ---- the command line ----
def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.set_defaults(mode="multi")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("ask", "data", "bench-q", "bench-d"):
        add = commands.add_parser(name, allow_abbrev=False).add_argument
        add("--model", required=name != "ask", help="a folder that train.py wrote, or a pretrained backbone")
        add("--max-new-tokens", type=int, default=128, help="(default: 128)")
        add("--device", default=DEVICE, help="cuda or cpu (default: cuda if there is one)")
        if name == "ask":
            add("question", nargs="?", help="with a <region> for each --object, in order (or see --preview)")
            add("--video", "--image", required=True, help="a file, or a folder of frames")
            mask = "a box x,y,w,h, a polygon x,y,x,y,..., a picture (FILE.png; of several objects FILE.png:2)"
            mask += " or, with --track, a click x,y; of an image without FRAME:"
            add("--object", nargs="+", action="append", default=[], metavar="FRAME:MASK", help=mask)
            add("--track", metavar="SAM2", help="a SAM 2 video model, which finds the objects on more frames")
            add("--save-masks", metavar="JSON", help="write the objects as a data file's annotation")
            add("--preview", metavar="PNG", help="draw the objects in their frames, with a scale of pixels")
            add("--frame", type=int, nargs="+", default=[], help="without a question: frames to draw, too")
            continue
        add("files", metavar="FILE", nargs="+" if name == "data" else 1, help="a JSON array or JSONL")
        add("--media", help="folder that media paths are relative to (default: each file's own)")
        add("--control", nargs="+", choices=CONTROLS, default=[], help="ask again with other masks or none")
        add("--num-frames", type=int, help="frames sampled from a video (default: as in training)")
        add("--frame-pixels", type=int, help="pixels of such a frame at most (default: as in training)")
        add("--batch-size", type=int, default=32, help="(default: 32)")
        add("--workers", type=int, default=2, help="processes of a rank that read data (default: 2)")
        add("--out", type=Path, required=True, help="a new folder, or that of a run to resume")
        if name != "data":
            modes = "masks of frame_idx alone (default), or all"
            add("--mode", choices=("single", "multi"), default="single", help=modes)
    add = commands.add_parser("score", allow_abbrev=False).add_argument
    add("file", help="VideoRefer-Bench-Q.json")
    add("predictions", help="JSONL with id and pred of each question, such as bench-q writes")
    add = commands.add_parser("judge", allow_abbrev=False).add_argument
    add("predictions", help="JSONL with caption and pred, such as bench-d writes")
    add("--prompt", required=True, help="the judge's system prompt: the published system.txt")
    add("--url", default="https://api.openai.com/v1", help="a server; its key is in OPENAI_API_KEY")
    add("--judge", default="gpt-4o", help="the server's model (default: gpt-4o)")
    add("--no-temperature", action="store_true", help="do not ask for temperature 0, which some refuse")
    add("--column", choices=("pred", *CONTROLS), default="pred", help="(default: pred)")
    args = parser.parse_args(argv)
    numbers = {"batch_size": 1, "max_new_tokens": 1, "workers": 0, "num_frames": 1, "frame_pixels": 1}
    for name, least in numbers.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: expected a number from {least}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.command == "judge":
        return judge(args)
    if args.command == "score":
        return score_file(args)
    args.device = train.init_distributed(args.device)
    if args.command != "ask":
        return evaluate(args)
    info = data.open_media(args.video).info
    objects = [read_object(pointed, info) for pointed in args.object]
    clicks = [mask for masks in objects for mask in masks.values() if isinstance(mask, tuple)]
    data.expect(args.track or not clicks, "--track for a click", clicks)
    if args.question is None:
        data.expect(args.preview, "a question, or --preview to look at a frame", "neither")
        settings = data.Settings()
    else:
        data.expect(args.model and not args.frame, "--model with a question, and no --frame", args.frame)
        model, processor = load(args.model, args.device)
        settings = processor.settings
    if args.track:
        objects = track(args.video, objects, load_tracker(args.track, args.device), settings.region_frames)
    if args.save_masks:
        train.write_jsonl(args.save_masks, [{"video": args.video, "annotation": to_annotation(objects)}])
    if args.question is None:
        return look(args.video, objects, args.frame, args.preview)
    reply = ask(model, processor, args.video, args.question, objects, args.max_new_tokens, args.preview)
    # What a terminal would obey is shown as an escape.
    train.print0("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in reply))


if __name__ == "__main__":
    with train.errors_in_one_line():
        main()
