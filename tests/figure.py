"""Draws the picture at the top of the README: what a model answers about objects, and how it learns to.

    python tests/shapes.py toy
    python train.py --data toy/train.json --out toy/figure --save-every 70 --keep 8
    python tests/figure.py toy toy/figure --out tests/figure.png

eval.py asks every checkpoint the questions of toy/test.json, and the final model also with controls. What it
writes is in RUN/asked, so that the same command resumes after a kill, and later only draws.

No clip is picked by hand. Left: for each kind of question, the first test clip not shown yet that has two of
them with different answers. Right: all test questions about objects, of every checkpoint.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import shapes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402

# The colours of the kinds of questions, other than those of the objects.
KINDS = dict(zip(shapes.ASK, ("rebeccapurple", "chocolate", "teal", "mediumvioletred")))
CONTROLS = {  # control: style of its line, and what it does
    "full": ("--", "mask of the whole frame"),
    "shuffle": ("-.", "mask of another clip"),
    "blind": (":", "no mask and no video"),
}
FRAMES = shapes.ANNOTATED[0], shapes.ANNOTATED[-1]
LONGEST = 8  # characters of an answer that are shown; blind, the model may repeat itself


def ask(toy, run):
    """Has eval.py ask all checkpoints, and RUN/final as the last. Returns {steps: rows of scores.json}."""
    models = {int(path.name[5:]): path for path in train.checkpoints(run)}
    models[train.read_jsonl(run / "metrics.jsonl")[-1]["step"] + 1] = run / "final"
    scores = {}
    for step, model in sorted(models.items()):
        out = run / "asked" / model.name
        if not (out / "scores.json").exists():
            controls = ["--control", *CONTROLS] if model.name == "final" else []
            options = ["data", str(toy / "test.json"), "--model", str(model), "--out", str(out)]
            evaluation.main([*options, *controls])
        scores[step] = json.loads((out / "scores.json").read_text())["rows"]
    return scores


def choose_pairs(questions):
    """Returns {kind: (index, index)}: two questions about one clip, as the rule above says."""
    pairs, shown = {}, set()
    for kind in KINDS:
        asked = [i for i, q in enumerate(questions) if q["type"] == kind and q["video"] not in shown]
        for i, j in combinations(asked, 2):
            one, two = questions[i], questions[j]
            if one["video"] == two["video"] and one["answer"] != two["answer"]:
                pairs[kind] = i, j
                shown.add(one["video"])
                break
    return pairs


def draw_questions(figure, samples, questions):
    """Draws a row for each kind: two questions that differ in the mask alone, and the answers to them."""
    pairs = choose_pairs(questions)
    margins = {"left": 0.01, "right": 0.98, "bottom": 0.06, "top": 0.84, "hspace": 0.3, "wspace": 0.05}
    axes = figure.subplots(len(pairs), 6, width_ratios=(1, 1, 1.25) * 2, gridspec_kw=margins)
    figure.text(0.01, 0.95, "The same clip and question, another mask", size=13)
    note = "<region>: the object under the mask (white outline). Blind: without mask and video."
    figure.text(0.01, 0.91, note, size=9, color="dimgrey")
    for row, (kind, pair) in zip(axes, pairs.items()):
        text = data.MEDIA_TAG.sub("", questions[pair[0]]["question"])
        row[0].set_title(text, loc="left", color=KINDS[kind], weight="bold", size=10)
        for cells, i in zip((row[:3], row[3:]), pair):
            # A question has the index of its sample, because each sample of test.json asks one.
            draw_frames(cells[:2], samples[i])
            draw_answers(cells[2], questions[i])
    for column in (0, 1, 3, 4):
        axes[-1][column].set_xlabel(f"frame {FRAMES[column % 3]}", size=9)


def draw_frames(axes, sample):
    """Draws the first and the last annotated frame, the objects outlined, and numbered if there are two."""
    pictures = data.open_media(sample.media).read(FRAMES)
    for axis, frame in zip(axes, FRAMES):
        axis.imshow(pictures[frame], interpolation="bicubic")
        axis.set(xticks=[], yticks=[])
        height, width, _ = pictures[frame].shape
        for number, masks in enumerate(sample.objects, 1):
            # Coverage has the resolution of the frame, whatever that of the mask.
            inside = data.coverage(data.decode_mask(masks[frame], height, width), height, width)
            axis.contour(inside, [0.5], colors="black", linewidths=3)
            axis.contour(inside, [0.5], colors="white", linewidths=1.5)
            if len(sample.objects) > 1:
                y, x = np.argwhere(inside > 0.5).mean(axis=0)
                stroke = [withStroke(linewidth=2.5, foreground="black")]
                axis.text(x, y, number, color="white", ha="center", va="center", path_effects=stroke)


def draw_answers(axis, question):
    """Writes the model's answer, and below it the answer to the same words without mask and video."""
    axis.axis("off")
    for title, column, y, size in (("answer", "exact", 0.88, 12), ("asked blind", "blind", 0.36, 9)):
        reply = question[column]
        mark, colour = ("✓", "green") if reply == question["answer"] else ("✗", "firebrick")
        if len(reply) > LONGEST:
            reply = reply[:LONGEST] + "…"
        axis.text(0.06, y, title, size=9, color="dimgrey", va="center")
        style = {"size": size, "color": colour, "weight": "bold", "va": "center", "parse_math": False}
        axis.text(0.06, y - 0.2, f"{reply} {mark}", **style)


def draw_curves(figure, scores):
    """Draws accuracy over training; the last scores have the controls."""
    figure.text(0.06, 0.95, "Right answers on test clips", size=13)
    axis = figure.add_axes((0.15, 0.42, 0.83, 0.49))
    curves, lines, last = [], [], max(scores)
    for kind, colour in KINDS.items():
        shares = [share(rows[kind]["exact"]) for rows in scores.values()]
        style = {"color": colour, "linewidth": 2, "marker": "o", "markersize": 4}
        curves += axis.plot(list(scores), shares, label=f"{kind}  {shares[-1]:.0%}", **style)
    for control, (style, meaning) in CONTROLS.items():
        accuracy = share(scores[last]["about regions"][control])
        label = f"{control}: {meaning}  {accuracy:.0%}"
        lines.append(axis.axhline(accuracy, color="black", linestyle=style, linewidth=1.2, label=label))
    axis.set(xlim=(0, last * 1.02), ylim=(0, 1.03), xlabel="training step")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.spines[["top", "right"]].set_visible(False)
    style = {"frameon": False, "fontsize": 9, "alignment": "left", "title_fontsize": 9, "handlelength": 1.8}
    figure.legend(handles=curves, loc=(0.04, 0.2), title="The final model:", ncols=2, **style)
    figure.legend(handles=lines, loc=(0.04, 0.02), title="The same model without the right mask:", **style)


def share(count):
    return count["right"] / count["asked"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("toy", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", default="figure.png")
    args = parser.parse_args()
    scores = ask(args.toy, args.run)
    figure = Figure(figsize=(9, 5.4), dpi=200)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    asked = train.read_jsonl(args.run / "asked/final/predictions.jsonl")
    draw_questions(left, data.read_samples(args.toy / "test.json"), asked)
    draw_curves(right, scores)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(128).save(args.out)  # with a palette, the file is a third as large
