"""What several tests share: programs that start at once, small data files, masks, and a model to ask.

It is imported once more by a *forkserver*: a process that has loaded torch, transformers and our modules, and
forks itself for each program. So train.py --steps 3 takes a second, where a fresh Python needs seven, most
of it for imports.
"""

import json
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import sys
import time
from multiprocessing.util import get_temp_dir
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from transformers import Qwen3VLForConditionalGeneration  # noqa: F401 (takes a second when it is first used)

import data
import eval  # noqa: F401 (and with it all other modules)

TOP = Path(__file__).resolve().parent.parent
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["helpers"])


# ---- programs ----
class Program:
    """A command line at the top level, `train.py --data ...`, that runs. ranks: as torchrun starts them.

    A context manager, so that a test that fails leaves no process behind.
    """

    def __init__(self, command, ranks=1, folder=None, **environment):
        program, *arguments = shlex.split(command)
        self.logs = [Path(get_temp_dir(), f"{time.monotonic_ns()}") for _ in range(ranks)]
        if ranks > 1:
            with socket.create_server(("localhost", 0)) as free:
                environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank, log in enumerate(self.logs):
            of_rank = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            arguments_of_child = (TOP / program, arguments, of_rank, folder or TOP, log)
            self.processes.append(forkserver.Process(target=_run, args=arguments_of_child))
            self.processes[-1].start()

    @property
    def text(self):
        """What all ranks have printed, to stdout and stderr."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def wait(self, code=0):
        """Returns the text when all ranks have ended; fails unless each ended with this code."""
        for process in self.processes:
            process.join(300)
        codes = [process.exitcode for process in self.processes]
        assert codes == [code] * len(codes), f"exit codes {codes}\n{self.text[-5000:]}"
        return self.text

    def wait_until(self, happened):
        """Returns when happened() is true. Fails if the program ends before, or nothing happens for long."""
        deadline = time.monotonic() + 300
        while not happened():
            assert self.processes[0].exitcode is None or happened(), self.text[-5000:]
            assert time.monotonic() < deadline, self.text[-5000:]
            self.processes[0].join(0.01)

    def send(self, number, rank=0):
        """Sends a signal to a rank and its workers, as a terminal or a cluster does."""
        os.killpg(self.processes[rank].pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for rank, process in enumerate(self.processes):
            if process.exitcode is None:
                self.send(signal.SIGKILL, rank)
            process.join()


def _run(program, arguments, environment, folder, log):
    """In the new process: becomes the program."""
    os.setsid()  # a group of its own, for Program.send
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # else workers would outlive a SIGKILL
    torch.set_num_threads(1)
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def run(command, ranks=1, code=0, **options):
    """Runs a command line to its end. Returns what it printed; fails unless it exits with this code."""
    with Program(command, ranks, **options) as program:
        return program.wait(code)


def refusal(function, *arguments):
    """The DataError that a call raises."""
    with pytest.raises(data.DataError) as caught:
        function(*arguments)
    return caught.value


# ---- files ----
def write_json(path, value):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def read_lines(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- samples ----
def box(x, y, w, h):
    """The polygon of a box."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def box_mask(height, width, x, y, w, h):
    """uint8 (H, W), 1 in the box."""
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def rle(mask):
    """A mask as pycocotools compresses it, for JSON."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def sample(question, answer, *objects, **keys):
    """An entry of a data file with one question. objects: {frame index: segmentation} of each."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    annotation = [{str(k): {"segmentation": mask} for k, mask in masks.items()} for masks in objects]
    return {"conversations": turns, "annotation": annotation} | keys


def write_texts(path, count, bad=()):
    """A data file of samples that are text alone, which train quickly; those in bad have no conversation."""
    entries = []
    for i in range(count):
        entry = sample(f"What is {i} + {i}?", f"{2 * i}, of course" * (i % 3 + 1), id=i)
        entries.append(entry | ({"conversations": []} if i in bad else {}))
    return write_json(path, entries)
