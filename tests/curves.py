"""Draws the curves of runs of train.py, one colour for each:

    python tests/curves.py RUN [RUN ...] --out curves.png

RUN is the folder that train.py wrote (--out). A thin line is the loss in training, a thick one with dots that
on held-out data (--val). Exact match (--val-answers) has axes of its own, if a run has measured it.
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
    has_exact = any("val_exact" in line for lines in logs.values() for line in lines)
    figure = Figure(figsize=(8, 7 if has_exact else 4.5), layout="constrained")
    axes = figure.subplots(2 if has_exact else 1, sharex=True, squeeze=False)[:, 0]
    for i, (run, lines) in enumerate(logs.items()):
        colour = f"C{i}"
        axes[0].plot(*values(lines, "loss"), color=colour, linewidth=0.8, alpha=0.7, label=f"{run}: training")
        for axis, name, label in zip(axes, ("val_loss", "val_exact"), ("held-out", None)):
            steps, measured = values(lines, name)
            if steps:
                label = label and f"{run}: {label}"
                axis.plot(steps, measured, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    axes[0].set(ylabel="loss per supervised token", yscale="log")
    axes[0].yaxis.set_major_formatter(LogFormatter())
    axes[0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes[0].legend()
    if has_exact:
        axes[1].set(ylabel="exact match", ylim=(-0.03, 1.03))
    axes[-1].set(xlabel="step")
    for axis in axes:
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
    try:
        figure = draw(args.runs)
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from None
    with data.atomic_write(args.out) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    main()
