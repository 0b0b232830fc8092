"""Draws the curves of runs of train.py, one colour each: `python tests/curves.py RUN [RUN ...] --out FILE`

RUN is the folder that train.py wrote (--out). A thin line is the loss in training, a thick one with dots that
on held-out data (--val).
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("runs", nargs="+")
parser.add_argument("--out", default="curves.png")
args = parser.parse_args()
figure = Figure(figsize=(8, 4.5), layout="constrained")
axis = figure.subplots()
for i, run in enumerate(args.runs):
    with open(Path(run, "metrics.jsonl")) as file:  # whose last line may not be whole yet
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    for name, style, width in (("loss", "-", 0.8), ("val_loss", "o-", 2)):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points), style, color=f"C{i}", linewidth=width, label=f"{run}: {name}")
axis.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
axis.legend()
axis.grid(which="both", alpha=0.3)
figure.savefig(args.out, format="png", dpi=120)
