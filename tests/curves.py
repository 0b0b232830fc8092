"""Draws the curves of runs of train.py, one colour for each:

    python tests/curves.py RUN [RUN ...] --out curves.png

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


def draw(runs):
    """Returns the Figure of these folders. Raises data.DataError if one holds no run."""
    logs = {str(run): train.read_jsonl(Path(run) / "metrics.jsonl") for run in runs}
    for run, lines in logs.items():
        data.expect(lines, f"{run}: the folder of a run, with metrics.jsonl", "none")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (run, lines) in enumerate(logs.items()):
        colour = f"C{i}"
        axis.plot(*values(lines, "loss"), color=colour, linewidth=0.8, alpha=0.7, label=f"{run}: training")
        steps, measured = values(lines, "val_loss")
        if steps:
            label = f"{run}: held-out"
            axis.plot(steps, measured, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    axis.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def values(lines, name):
    """Returns (steps, values) of the lines of metrics.jsonl that hold this name."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="curves.png", help="the picture, a PNG (default: %(default)s)")
    args = parser.parse_args(argv)
    figure = draw(args.runs)
    with train.atomic_write(args.out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    with train.errors_in_one_line():
        main()
