"""Prints what a data file of a million samples costs: `python tests/bench_index.py [SAMPLES]`.

It needs 0.9 GB of disk for a while. The memory is that of a process and its 4 workers, less that of the same
processes with an empty data set. (A page that n processes share counts 1/n for each.)
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


class Nothing:
    def __getitem__(self, key):
        return None


def write_samples(path, count):
    rng, answer = np.random.default_rng(0), "It walks over the grass to the gate. " * 3
    with open(path, "w") as file:
        for i in range(count):
            masks = {6 * k: (rng.random((1, 16)) * 300).round(1).tolist() for k in range(4)}
            entry = sample("What is <region> doing?", answer, masks, id=i, video=f"videos/{i}.mp4")
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(entry))
        file.write("\n]")


def memory():
    """The MB of this process and its children."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(re.search(r"^Pss: +(\d+) kB", text, re.M)[1]) for text in texts) / 1024


def peak_memory(dataset, count):
    """The most MB that were in use while 4 workers read the samples of 400 steps."""
    order = train.Order(count, 16, 400, seed=0, rank=0, world_size=1)
    loader = DataLoader(dataset, batch_sampler=order, num_workers=4, collate_fn=len)
    return max(memory() for i, _ in enumerate(loader) if i % 20 == 0)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    warnings.simplefilter("ignore")  # about more workers than cores
    without = peak_memory(Nothing(), count)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        write_samples(f"{folder}/data.json", count)
        for which in ("first", "second"):
            start = time.perf_counter()
            samples = data.read_samples(f"{folder}/data.json")
            print(f"opened for the {which} time: {time.perf_counter() - start:.3f} s")
        # The media are missing, so that no frames are held.
        processor = models.load_processor("tiny", ["What is it?"])
        used = peak_memory(data.ReferringDataset(samples, processor), count)
    print(f"{count} samples, {without:.0f} MB without them, {used:.0f} MB with them: {used - without:.0f} MB")
