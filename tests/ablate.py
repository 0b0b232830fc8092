"""What each part of the system earns: trains the tiny model without it, with several seeds.

    python tests/ablate.py DIR             # what is missing in DIR/results.jsonl, then the table
    python tests/ablate.py DIR --jobs 2    # the same, two runs at a time, which share the cores

The toy worlds of tests/shapes.py are made in DIR/toy and DIR/small. A run is one arm of ARMS with one seed: a
training with the arm's options and then its evaluations, which become one line of DIR/results.jsonl. Runs
that have their line are not repeated, so the command may be interrupted. The seed is that of the weights, the
order of samples and every random choice; the clips and the questions are always the same.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from unittest import mock

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))

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
    masks: str = "none"  # of the training data, as eval.Questions' control has them
    without: str = ""  # the part of the region encoder that stays zero: "mlp" or "position"
    asks: tuple = ("all masks",)  # the evaluations; with all masks, or each object's first alone
    controls: tuple = ()  # of the evaluation "all masks"


BOTH = ("all masks", "first mask")
CONTROLS = ("full", "shuffle", "box", "blind")
WHOLE_FRAMES = "--window 0 --region-pixels 9216"  # 96 x 96, because an object is smaller in these
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
}
KINDS = ("colour", "shape", "direction", "relation")


# ---- one run ----
def run(name, seed, folder):
    """Trains and evaluates one arm. Returns its line of results.jsonl."""
    arm, world, out = ARMS[name], folder / ARMS[name].world, run_folder(folder, name, seed)
    shutil.rmtree(out, ignore_errors=True)  # what is left of a run that was interrupted
    started = time.time()
    options = ["--data", str(world / "train.json"), "--seed", str(seed), "--out", str(out), "--workers", "1"]
    train_arm(arm, [*options, *arm.options.split()])
    evaluations = {}
    for asked in arm.asks:
        if asked == "first mask":
            keep_first_mask(out / "final")
        scores = out / asked.replace(" ", "-")
        options = ["data", str(world / "test.json"), "--model", str(out / "final"), "--out", str(scores)]
        if arm.controls and asked == "all masks":
            options += ["--control", *arm.controls]
        evaluation.main(options)
        evaluations[asked] = json.loads((scores / "scores.json").read_text())["rows"]
    seconds = round(time.time() - started)
    return {"arm": name, "seed": seed, "evaluations": evaluations, "seconds": seconds}


class ArmDataset(evaluation.Questions):
    """The data of a training with the masks of a control. A class that workers may unpickle, by its name."""

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
    """The model's parameter groups, but a part of the region encoder does not learn.

    Each part ends in zeros at the start. So it then adds exactly nothing, also when the model is evaluated.
    """
    groups = parameter_groups(model)
    if part:
        frozen = {id(p) for p in getattr(model.region_encoder, part).parameters()}
        groups["region"] = [p for p in groups["region"] if id(p) not in frozen]
    return groups


def keep_first_mask(final):
    """Changes the settings of a trained model: it then reads each object's first mask alone."""
    path = final / models.SETTINGS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"region_frames": 1}))


# ---- all runs ----
def run_folder(folder, name, seed):
    return folder / "runs" / re.sub(r"\W+", "-", f"{name} {seed}")


def missing_runs(results, seeds):
    """Returns the (arm, seed) that have no line, all seeds of an arm before the next."""
    done = {(line["arm"], line["seed"]) for line in results}
    return [(name, seed) for name in ARMS for seed in range(seeds) if (name, seed) not in done]


def run_in_process(name, seed, folder, threads):
    """Runs one arm in a process of its own, whose output goes to a file."""
    command = [sys.executable, __file__, str(folder), "--run", name, str(seed)]
    log = run_folder(folder, name, seed).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=True)


# ---- the tables ----
def percents(runs, row, column="exact"):
    """runs: the rows of eval.py's table for each seed. Returns the percentages of right answers."""
    return [100 * rows[row][column]["right"] / rows[row][column]["asked"] for rows in runs]


def summary(values):
    """Mean (lowest-highest) of the seeds."""
    return f"{statistics.mean(values):.1f} ({min(values):.0f}-{max(values):.0f})"


def print_row(cells):
    print("| " + " | ".join(map(str, cells)) + " |")


def print_tables(results):
    runs = defaultdict(list)  # (arm, how it was asked): the rows of each seed
    for line in results:
        for asked, rows in line["evaluations"].items():
            runs[line["arm"], asked].append(rows)

    print("Exact match in %: means of the seeds, and the lowest and highest of them\n")
    print_row(["arm", "asked with", "seeds", *KINDS, "about regions"])
    print_row(["---"] * (4 + len(KINDS)))
    for name, arm in ARMS.items():
        for asked in arm.asks:
            seeds = runs[name, asked]
            if seeds:
                kinds = [f"{statistics.mean(percents(seeds, kind)):.1f}" for kind in KINDS]
                print_row([name, asked, len(seeds), *kinds, summary(percents(seeds, "about regions"))])

    print("\nThe same models, asked about regions with other masks or with the words alone\n")
    columns = [*CONTROLS, "constant"]
    print_row(["arm", *columns])
    print_row(["---"] * (1 + len(columns)))
    for name, arm in ARMS.items():
        seeds = runs[name, "all masks"]
        if seeds and arm.controls:
            print_row([name, *(summary(percents(seeds, "about regions", column)) for column in columns)])
    minutes = sum(line["seconds"] for line in results) / 60
    print(f"\n{len(results)} runs, which took {minutes:.0f} minutes in sum")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help="run one arm with one seed alone")
    args = parser.parse_args(argv)
    results = args.folder / "results.jsonl"
    if args.run:
        name, seed = args.run
        train.append_jsonl(results, run(name, int(seed), args.folder))
        return
    for world in ("toy", "small"):
        if not (args.folder / world / "bench_q.json").exists():  # the file that is written last
            shapes.write_world(args.folder / world, 600, 60, small=world == "small")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = missing_runs(train.read_jsonl(results), args.seeds)
        list(pool.map(lambda pair: run_in_process(*pair, args.folder, threads), runs))
    print_tables(train.read_jsonl(results))


if __name__ == "__main__":
    main()
