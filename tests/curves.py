"""Draws the curves of runs of train.py, one colour each: `python tests/curves.py RUN [RUN ...] --out FILE`

RUN is the folder that train.py wrote (--out). A thin line is the loss in training, a thick one with dots that
on held-out data (--val).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogFormatter  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402


def values(lines, name):
    """Returns (steps, values) of the lines of metrics.jsonl that hold this name."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, run in enumerate(args.runs):
        lines = train.read_jsonl(Path(run, "metrics.jsonl"))
        data.expect(lines, f"{run}: the folder of a run, with metrics.jsonl", "none")
        axis.plot(*values(lines, "loss"), f"C{i}", linewidth=0.8, alpha=0.7, label=f"{run}: training")
        if any("val_loss" in line for line in lines):
            axis.plot(
                *values(lines, "val_loss"), f"C{i}o-", linewidth=2, markersize=4, label=f"{run}: held-out"
            )
    axis.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(args.out, format="png", dpi=120)


if __name__ == "__main__":
    with train.errors_in_one_line():
        main()
