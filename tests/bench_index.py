"""Prints what a data file of a million samples costs: `python tests/bench_index.py [SAMPLES]`.

It needs 0.9 GB of disk for a while. The memory is that of a process and its 4 workers; compare it with that
for a file of one sample. (A page that n processes share counts 1/n for each.)
"""

import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
from helpers import sample  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402


def write_samples(path, count):
    rng, answer = np.random.default_rng(0), "It walks over the grass to the gate. " * 3
    with open(path, "w") as file:
        for i in range(count):
            masks = {6 * k: (rng.random((1, 16)) * 300).round(1).tolist() for k in range(4)}
            entry = sample("What is <region> doing?", answer, masks, id=i, video=f"videos/{i}.mp4")
            file.write(json.dumps(entry) + "\n")


def memory():
    """The MB of this process and its children."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(re.search(r"^Pss: +(\d+) kB", text, re.M)[1]) for text in texts) / 1024


def measure(count):
    """Prints how long it takes to open a file twice, and the most MB while 4 workers read 400 steps of it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        write_samples(f"{folder}/data.jsonl", count)
        times = [time.perf_counter()]
        for _ in range(2):
            samples = data.read_samples(f"{folder}/data.jsonl")
            times.append(time.perf_counter())
        # The media are missing, so that no frames are held.
        dataset = data.ReferringDataset(samples, models.load_processor("tiny", ["What is it?"]))
        order = train.Order(count, 16, 400, seed=0, rank=0, world_size=1)
        loader = DataLoader(dataset, batch_sampler=order, num_workers=4, collate_fn=len)
        most = max(memory() for i, _ in enumerate(loader) if i % 20 == 0)
    first, second = times[1] - times[0], times[2] - times[1]
    print(f"{count} samples: opened in {first:.3f} s, once more in {second:.3f} s; {most:.0f} MB")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # about more workers than cores
    measure(1)
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
