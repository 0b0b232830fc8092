"""A toy world: clips of moving coloured shapes, and questions that only the mask can answer.

    python tests/shapes.py DIR          # writes DIR/videos, images, train.json, test.json
    python tests/shapes.py DIR --small  # the same, but objects of 16 to 22 pixels in frames of 384 x 384
    python tests/shapes.py DIR --new-kind relation  # the same, but only DIR/new.json asks where objects are

--new-kind is for teaching a model something new, as with adapters, and from both files, or it would forget:

    python train.py --data DIR/train.json --out DIR/before
    python train.py --data DIR/new.json DIR/train.json --model DIR/before/final --train lora --lr 1e-3 \\
        --epochs 2 --out DIR/after
    python eval.py data DIR/test.json --model DIR/before/final --out DIR/scores-before
    python eval.py data DIR/test.json --model DIR/after/final --out DIR/scores-after

Every clip shows four objects: each colour, each shape and each direction of motion occurs once, dealt at
random. The picture as a whole therefore says nothing about any question, and a model that ignores the mask is
right one time in four. The data files hold samples of all kinds, and masks in every form that data.py reads.
"""

import argparse
import json
import math
import random
from pathlib import Path

import clips
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

SIDE, FRAMES, FPS = 96, 8, 4
ANNOTATED = (0, 3, 7)  # the frames that have masks
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 240), "yellow": (240, 220, 40)}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = {"black": (0, 0, 0), "brown": (90, 50, 20), "navy": (20, 25, 100)}
SPEED = 5  # pixels a frame
RADIUS = (12, 15)
SMALL_SCALE, SMALL_RADIUS = 4, (2, 2.75)  # --small: a radius of 8 to 11 pixels, drawn at this scale


def outline(shape, x, y, r):
    """The polygon of a shape around (x, y), as a list of (x, y) points."""
    if shape == "circle":
        return [(x + r * math.cos(a * math.pi / 12), y + r * math.sin(a * math.pi / 12)) for a in range(24)]
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x, y + r), (x - r, y + r)]
    a = r / 3
    corners = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a)]  # half of a cross
    return [(x + dx, y + dy) for dx, dy in corners + [(-dx, -dy) for dx, dy in corners]]


def deal(rng, radius=RADIUS):
    """Returns four objects that stay inside the picture and never touch, as dicts.

    r is the radius and path the centre (x, y) on each frame, in pixels at scale 1.
    """
    while True:
        colours, shapes, directions = (rng.sample(list(names), 4) for names in (COLOURS, SHAPES, DIRECTIONS))
        objects = []
        for colour, shape, direction in zip(colours, shapes, directions):
            for _ in range(30):
                r = rng.uniform(*radius)
                dx, dy = (SPEED * d for d in DIRECTIONS[direction])
                x, y = rng.uniform(r, SIDE - r), rng.uniform(r, SIDE - r)
                path = [(x + dx * t, y + dy * t) for t in range(FRAMES)]
                obj = {"colour": colour, "shape": shape, "direction": direction, "r": r, "path": path}
                inside = all(r <= c <= SIDE - r for c in path[-1])
                if inside and all(apart(obj, other) for other in objects):
                    objects.append(obj)
                    break
        if len(objects) == 4:
            return objects


def apart(a, b):
    far = a["r"] + b["r"] + 1
    return all(max(abs(p[0] - q[0]), abs(p[1] - q[1])) > far for p, q in zip(a["path"], b["path"]))


def draw(objects, background, frame, scale=1):
    """Returns one frame, uint8 (side, side, 3), side being SIDE * scale: drawn 4 times as large, averaged."""
    side, zoom = SIDE * scale, 4 * scale
    picture = Image.new("RGB", (side * 4, side * 4), BACKGROUNDS[background])
    pen = ImageDraw.Draw(picture)
    for o in objects:
        points = outline(o["shape"], *o["path"][frame], o["r"])
        pen.polygon([(zoom * x, zoom * y) for x, y in points], fill=COLOURS[o["colour"]])
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX))


def write_video(path, frames):
    # Without mbtree=0, x264 writes other bytes in every run, and the world would not be the same twice.
    options = {"crf": 16, "threads": 1, "x264-params": "mbtree=0"}
    clips.write_video(path, options=options, pictures=frames, rate=FPS)


# ---- masks in every form ----
def segmentation(obj, frame, form, scale=1):
    """Returns one object's mask on one frame, in one of the forms that a data file may hold."""
    points = outline(obj["shape"], *obj["path"][frame], obj["r"])
    if form == "polygon":
        return _flat(points, scale)
    if form == "polygons":  # two halves
        middle = len(points) // 2
        return [_flat(points[: middle + 1], scale), _flat(points[middle:] + points[:1], scale)]
    if form == "rle2x":  # a mask drawn at twice the resolution
        scale *= 2
    side = SIDE * scale
    rle = coco_mask.merge(coco_mask.frPyObjects([_flat(points, scale)], side, side))
    if form == "runs":
        pixels = coco_mask.decode(rle).T.ravel()
        changes = np.flatnonzero(np.diff(pixels, prepend=0))
        return {"size": [side, side], "counts": np.diff([0, *changes, len(pixels)]).tolist()}
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _flat(points, scale):
    """Returns the points as COCO writes a polygon: [x1, y1, x2, y2, ...]."""
    return [round(coordinate * scale, 2) for point in points for coordinate in point]


FORMS = ("rle", "runs", "polygon", "polygons", "rle2x")


def masks(rng, obj, frames, scale):
    """Returns {"0": {"segmentation": ...}, ...}; one in five also has frames on which the object hides."""
    entry = {str(f): {"segmentation": segmentation(obj, f, rng.choice(FORMS), scale)} for f in frames}
    if rng.random() < 0.2:
        entry = {"1": {"segmentation": None}, "2": {}} | entry
    return entry


# ---- questions ----
ASK = {
    "colour": "What colour is <region>?",
    "shape": "What shape is <region>?",
    "direction": "Which way does <region> move?",
    "relation": "Where is <region> from <region>?",
}


def relation(a, b, frames):
    """Returns where a is, seen from b: left, right, above or below; None unless it is clear on all frames."""
    answers = set()
    for f in frames:
        dx, dy = (a["path"][f][i] - b["path"][f][i] for i in (0, 1))
        if abs(abs(dx) - abs(dy)) < 8:
            return None
        before, behind, distance = ("left", "right", dx) if abs(dx) > abs(dy) else ("above", "below", dy)
        answers.add(before if distance < 0 else behind)
    return answers.pop() if len(answers) == 1 else None


def questions(rng, objects, frames, kinds):
    """Returns [(kind, question, answer, objects asked about)], one for each of `kinds`, about random objects.

    A kind asks about every object once before it asks about one again. A "relation" is left out where no two
    objects have a clear one.
    """
    asked, left = [], {}
    for kind in kinds:
        if kind != "relation":
            left[kind] = left.get(kind) or rng.sample(objects, 4)
            obj = left[kind].pop()
            asked.append((kind, ASK[kind], obj[kind], [obj]))
            continue
        pairs = [(a, b) for a in objects for b in objects if a is not b and relation(a, b, frames)]
        if pairs:
            a, b = rng.choice(pairs)
            asked.append((kind, ASK[kind], relation(a, b, frames), [a, b]))
    return asked


def entry(rng, media, scale, asked, frames, later_format=False):
    """Returns a sample about media, ("video" or "image", path). later_format: with masks under `masks`."""
    key, path = media
    turns = []
    for _, question, answer, _ in asked:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"<{key}>\n" + turns[0]["value"]
    sample = {key: path, "conversations": turns}
    regions = [masks(rng, obj, frames, scale) for _, _, _, pointed in asked for obj in pointed]
    if key == "image":  # an image has frame 0 alone, whichever frame of the clip it shows
        regions = [{"0": region[str(frames[0])]} for region in regions]
    if regions and later_format:
        plain = [{f: m["segmentation"] for f, m in r.items() if m.get("segmentation")} for r in regions]
        sample["masks"] = [region["0"] for region in plain] if key == "image" else plain
    elif regions:
        sample["annotation"] = regions
    if rng.random() < 0.5:
        sample |= {"height": SIDE * scale, "width": SIDE * scale}
    return sample


# ---- the world ----
def write_clip(rng, folder, name, small):
    """Writes videos/NAME.mp4 and two of its frames as images/NAME-FRAME.png.

    Returns objects, scale, ("video", path), {frame: ("image", path)} and the question about the background.
    """
    scale, radius = (SMALL_SCALE, SMALL_RADIUS) if small else (1, RADIUS)
    objects, background = deal(rng, radius), rng.choice(list(BACKGROUNDS))
    frames = [draw(objects, background, f, scale) for f in range(FRAMES)]
    images = {f: ("image", f"images/{name}-{f}.png") for f in sorted(rng.sample(range(FRAMES), 2))}
    write_video(folder / f"videos/{name}.mp4", frames)
    for f, (_, path) in images.items():
        Image.fromarray(frames[f]).save(folder / path)
    background = ("background", "What colour is the background?", background, [])
    return objects, scale, ("video", f"videos/{name}.mp4"), images, background


def train_samples(rng, clip, left_out):
    """Yields three samples of one clip: a video with regions on three frames, and two of the other kinds,
    mostly images with regions. No question is of the kind left_out."""
    objects, scale, video, images, background = clip
    kinds = ["shape"] * 3 + ["direction"] * 4 + ["relation"] * 2 + ["colour"]
    kinds = [kind for kind in kinds if kind != left_out]
    asked = questions(rng, objects, ANNOTATED, kinds) + [background]
    yield entry(rng, video, scale, rng.sample(asked, len(asked)), ANNOTATED, rng.random() < 0.2)
    for frame, image in images.items():
        kinds = [kind for kind in ["shape"] * 4 + ["colour"] if kind != left_out]
        asked = questions(rng, objects, (frame,), kinds)
        choice = rng.random()
        if choice < 0.8:
            yield entry(rng, image, scale, rng.sample(asked, len(asked)), (frame,), rng.random() < 0.2)
        elif choice < 0.9:
            yield entry(rng, video, scale, rng.sample(asked, len(asked)), (frame,))
        elif choice < 0.98:
            yield entry(rng, image if choice < 0.94 else video, scale, [background], ())
        else:
            word = rng.choice([*COLOURS, *SHAPES])
            turns = {"from": "human", "value": f"Say {word}."}, {"from": "gpt", "value": word}
            yield {"conversations": turns}


def write_world(folder, train_clips, test_clips, small=False, new_kind=None):
    folder = Path(folder)
    for name in ("videos", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    train, new, test = [], [], []
    rng = random.Random(0)
    for i in range(train_clips):
        clip = objects, scale, video, _, _ = write_clip(rng, folder, f"train{i:04}", small)
        train += train_samples(rng, clip, new_kind)
        asked = questions(rng, objects, ANNOTATED, [new_kind] * 4) if new_kind else []
        if asked:
            new.append(entry(rng, video, scale, asked, ANNOTATED))
    rng.shuffle(train)
    rng = random.Random("test")  # so that the test does not depend on how many clips there are to learn from
    for i in range(test_clips):
        objects, scale, video, _, background = write_clip(rng, folder, f"test{i:04}", small)
        for question in questions(rng, objects, ANNOTATED, [*ASK, *ASK]):
            test.append(entry(rng, video, scale, [question], ANNOTATED) | {"type": question[0]})
        test.append(entry(rng, video, scale, [background], ()) | {"type": "background"})
    files = {"train": train, "test": test} | ({"new": new} if new_kind else {})
    for name, samples in files.items():
        lines = [json.dumps({"id": i} | sample) for i, sample in enumerate(samples)]
        (folder / f"{name}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{folder}: {len(train)} training samples, {len(test)} test questions")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder")
    parser.add_argument("--train-clips", type=int, default=600)
    parser.add_argument("--test-clips", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="objects of 16 to 22 pixels in 384 x 384")
    parser.add_argument("--new-kind", choices=ASK, help="questions in new.json alone, not in train.json")
    args = parser.parse_args()
    write_world(args.folder, args.train_clips, args.test_clips, args.small, args.new_kind)


if __name__ == "__main__":
    main()
