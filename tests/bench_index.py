"""Prints what a data file of a million samples costs: `python tests/bench_index.py [SAMPLES]`.

It needs 0.9 GB of disk for a while. The memory is that of a process and its 4 workers, less that of the same
processes with an empty data set. It is counted as proportional set size: a page that n processes share counts
1/n for each.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))

import numpy as np  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402


def write_samples(path, count):
    rng = np.random.default_rng(0)
    turns = [
        {"from": "human", "value": "What is <region> doing?"},
        {"from": "gpt", "value": "It walks over the grass to the gate. " * 3},
    ]
    with open(path, "w") as file:
        file.write("[\n")
        for i in range(count):
            polygons = (rng.random((4, 16)) * 300).round(1).tolist()
            masks = {str(6 * k): {"segmentation": [polygon]} for k, polygon in enumerate(polygons)}
            entry = {"id": i, "video": f"videos/{i}.mp4", "conversations": turns, "annotation": [masks]}
            file.write(json.dumps(entry) + ("\n]" if i == count - 1 else ",\n"))


def memory():
    """Returns the MB of this process and its children."""
    total = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


def peak_memory(dataset, steps):
    """Returns the most MB that were in use while 4 workers read the samples of so many steps."""
    order = train.Order(len(dataset), 16, steps, seed=0, rank=0, world_size=1)
    loader = DataLoader(dataset, batch_sampler=order, num_workers=4, collate_fn=len)
    peak = 0
    for i, _ in enumerate(loader):
        if i % 20 == 0:
            peak = max(peak, memory())
    return peak


class Nothing(list):
    """A data set that reads nothing."""

    def __getitem__(self, key):
        return None


def main(count):
    warnings.simplefilter("ignore")  # about more workers than cores
    processor = models.load_processor("tiny", ["What is it?"])
    without = peak_memory(Nothing(range(count)), 400)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        path = os.path.join(folder, "data.json")
        write_samples(path, count)
        for which in ("first", "second"):
            start = time.perf_counter()
            samples = data.read_samples(path)
            print(f"opened for the {which} time: {time.perf_counter() - start:.3f} s")
        # The media are missing, so that no frames are held.
        used = peak_memory(data.ReferringDataset(samples, processor), 400)
    print(f"{count} samples, {without:.0f} MB without them, {used:.0f} MB with them: {used - without:.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
