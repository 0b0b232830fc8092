"""What each part of the system earns: trains the tiny model without it, with several seeds.

    python tests/ablate.py DIR --jobs 2    # what is missing in DIR/results.jsonl, two at a time, and a table

The toy worlds of tests/shapes.py are made in DIR/toy and DIR/small. A run is one arm of ARMS with one seed: a
training with the arm's options and then its evaluations, which become one line of DIR/results.jsonl. Runs
that have their line are not repeated, so the command may be interrupted. The seed is that of the weights, the
order of samples and every random choice; the clips and the questions are always the same.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shapes  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402


@dataclass
class Arm:
    """One way to train the tiny model."""

    world: str  # "toy" or "small", folders in DIR
    options: str = ""  # of train.py, beside --data, --seed and --out
    masks: str = "none"  # of the training data, as eval.Questions' control has them; "outline": asked so, too
    without: str = ""  # the part of the region encoder that stays zero: "mlp" or "position"
    asks: tuple = ("all masks",)  # the evaluations; with all masks, or each object's first alone
    controls: tuple = ()  # of the evaluation "all masks"


BOTH = ("all masks", "first mask")
CONTROLS = ("full", "shuffle", "box", "blind")
WHOLE_FRAMES = "--window 0 --region-pixels 9216"  # 96 x 96, because an object is smaller in these
# An object that several questions ask about has one outline if they show it on the same frames.
OUTLINES = "--single-frame 0"
# The names are those of the table's lines.
ARMS = {
    "toy: all parts": Arm("toy", asks=BOTH, controls=CONTROLS),
    "toy: whole frames": Arm("toy", WHOLE_FRAMES),
    "toy: window 3": Arm("toy", "--window 3"),
    "toy: window 4": Arm("toy", "--window 4"),
    "small: all parts": Arm("small", controls=CONTROLS),
    "small: whole frames": Arm("small", WHOLE_FRAMES),
    "small: window 3": Arm("small", "--window 3"),
    "small: window 4": Arm("small", "--window 4"),
    "toy: trained on shuffled masks": Arm("toy", masks="shuffle"),
    "toy: trained on boxes": Arm("toy", masks="box"),
    "toy: trained on one frame": Arm("toy", "--single-frame 1", asks=BOTH),
    "toy: trained on several frames": Arm("toy", "--single-frame 0", asks=BOTH),
    "toy: 1 region token": Arm("toy", "--region-tokens 1"),
    "toy: 2 region tokens": Arm("toy", "--region-tokens 2"),
    "toy: no position code": Arm("toy", without="position"),
    "toy: no MLP": Arm("toy", without="mlp"),
    "toy: outlines, 16 visual tokens": Arm("toy", OUTLINES, masks="outline"),
    "toy: outlines, 144 visual tokens": Arm("toy", f"{OUTLINES} --frame-pixels 9216", masks="outline"),
    "small: outlines, 16 visual tokens": Arm("small", OUTLINES, masks="outline"),
    "small: outlines, 576 visual tokens": Arm("small", f"{OUTLINES} --frame-pixels 36864", masks="outline"),
}
SEEDS = 3


# ---- one run ----
def run(folder, name, seed):
    """Trains and evaluates one arm, and writes its line of results.jsonl."""
    arm, world = ARMS[name], folder / ARMS[name].world
    out = folder / "runs" / re.sub(r"\W+", "-", f"{name} {seed}")
    shutil.rmtree(out, ignore_errors=True)  # what is left of a run that was interrupted
    started = time.time()
    options = ["--data", str(world / "train.json"), "--seed", str(seed), "--out", str(out), "--workers", "0"]
    train_arm(arm, [*options, *arm.options.split()])
    evaluations = {}
    for asked in arm.asks:
        if asked == "first mask":
            settings = out / "final" / models.SETTINGS_FILE
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"region_frames": 1}))
        scores = out / asked.replace(" ", "-")
        options = ["data", str(world / "test.json"), "--model", str(out / "final"), "--out", str(scores)]
        if asked == "all masks":
            options += ["--control", *arm.controls, *({arm.masks} & {"outline"})]
        evaluation.main([*options, "--workers", "0"])
        evaluations[asked] = json.loads((scores / "scores.json").read_text())["rows"]
    line = {"arm": name, "seed": seed, "evaluations": evaluations, "seconds": round(time.time() - started)}
    train.append_jsonl(folder / "results.jsonl", line)


class ArmDataset(evaluation.Questions):
    """The data of a training with the masks of a control."""

    def __init__(self, *args, control, **options):
        super(evaluation.Questions, self).__init__(*args, **options)
        self.control = control

    __getitem__ = data.ReferringDataset.__getitem__


def train_arm(arm, options):
    """Trains as train.py does, but with the masks and without the part that the arm names."""
    dataset = partial(ArmDataset, control=arm.masks)
    groups = models.ReferringVideoLLM.parameter_groups
    without = partialmethod(groups_without, groups, arm.without)
    with mock.patch.object(data, "ReferringDataset", dataset):
        with mock.patch.object(models.ReferringVideoLLM, "parameter_groups", without):
            train.train(train.parse(options))


def groups_without(model, parameter_groups, part):
    """The model's parameter groups without a part of the region encoder, whose last weights so stay zeros."""
    groups = parameter_groups(model)
    if part:
        frozen = {id(p) for p in getattr(model.region_encoder, part).parameters()}
        groups["region"] = [p for p in groups["region"] if id(p) not in frozen]
    return groups


# ---- the table ----
def summary(runs, row, column):
    """runs: the rows of eval.py's table for each seed. Returns "mean (lowest-highest)" in %."""
    counts = [rows[row][column] for rows in runs if column in rows[row]]
    values = [100 * count["right"] / count["asked"] for count in counts]
    return f"{statistics.mean(values):.1f} ({min(values):.0f}-{max(values):.0f})" if values else "-"


def print_table(results):
    """By kind, and about regions with the controls, too: other masks, or the words alone."""
    runs = defaultdict(list)  # (arm, how it was asked): the rows of each seed
    for line in results:
        for asked, rows in line["evaluations"].items():
            runs[line["arm"], asked].append(rows)
    print("Exact match in %: means of the seeds, and the lowest and highest of them\n")
    head = ["arm", "asked with", "seeds", *shapes.ASK, "about regions", *CONTROLS, "constant"]
    print(" | ".join(head))
    print(" | ".join("---" for _ in head))
    for name, asked in ((name, asked) for name, arm in ARMS.items() for asked in arm.asks):
        seeds, column = runs[name, asked], "outline" if ARMS[name].masks == "outline" else "exact"
        cells = [summary(seeds, kind, column) for kind in (*shapes.ASK, "about regions")]
        cells += [summary(seeds, "about regions", control) for control in (*CONTROLS, "constant")]
        print(" | ".join([name, asked, str(len(seeds)), *cells]))
    minutes = sum(line["seconds"] for line in results) / 60
    print(f"\n{len(results)} runs, which took {minutes:.0f} minutes in sum")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    args = parser.parse_args()
    for world in ("toy", "small"):
        if not (args.folder / world / "test.json").exists():  # the file that is written last
            shapes.write_world(args.folder / world, 600, 60, small=world == "small")
    done = {(line["arm"], line["seed"]) for line in train.read_jsonl(args.folder / "results.jsonl")}
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, max_tasks_per_child=1) as pool:
        runs = [(name, seed) for name in ARMS for seed in range(SEEDS) if (name, seed) not in done]
        for future in [pool.submit(run, args.folder, *pair) for pair in runs]:
            future.result()
    print_table(train.read_jsonl(args.folder / "results.jsonl"))


if __name__ == "__main__":
    main()
