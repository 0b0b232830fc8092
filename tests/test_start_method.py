"""Workers that do not inherit the parent's memory, which is how Python 3.14 starts them on Linux.

Such a worker imports the modules anew, and the data set and the collate function are sent to it as pickles.
Everything that the three scripts hand to a DataLoader must therefore be picklable, and must read the same
samples afterwards.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import shapes
from torch.utils.data import DataLoader

import data
import eval as evaluation
import model

TOP = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world, and bad.json: its training samples and one whose video does not exist."""
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, train_clips=2, test_clips=1)
    entries = json.loads((folder / "train.json").read_text())
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "nothing"}]
    entries.insert(1, {"id": "absent", "video": "videos/absent.mp4", "conversations": turns})
    (folder / "bad.json").write_text(json.dumps(entries))
    return folder


def assert_same(found, expected):
    """Compares two encoded samples, batches or parts of them, to the bit."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other)
    elif isinstance(expected, data.DataError):
        assert found.args == expected.args
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method, asks", [("forkserver", False), ("spawn", False), ("spawn", True)])
def test_a_worker_that_inherits_nothing_makes_the_same_batches(world, method, asks):
    samples = data.read_samples(world / "bad.json")
    processor = model.load_processor("tiny", data.sample_texts(samples))
    dataset, collate = data.ReferringDataset(samples, processor, single_frame=0.5, seed=3), data.collate
    steps = [[(0, 0), (0, 1), (0, 2)], [(1, 3), (1, 4)]]  # keys: epoch and sample, of which 1 is the bad one
    if asks:
        dataset = evaluation.Questions(samples, processor, "shuffle")
        steps = [[(0, 0), (1, 0), (2, 0)], [(3, 0), (4, 0)]]  # keys: sample and turn
    collate = partial(collate, processor=processor, for_generation=asks)
    loader = DataLoader(
        dataset,
        batch_sampler=steps,
        num_workers=1,
        multiprocessing_context=method,
        collate_fn=collate,
    )
    expected = [collate([dataset[key] for key in keys]) for keys in steps]
    found = list(loader)
    assert_same(found, expected)
    _, bad, _ = found[0]["errors"]
    assert bad.args[1:3] == (str(world / "bad.json"), "sample 1 (id 'absent')")
    assert "absent.mp4" in str(bad)


def run_by_forkserver(tmp_path, *command):
    """Runs a script as Python 3.14 would, with forkserver for the start method -> its output."""
    # Python imports sitecustomize, if it finds one, before the script.
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('forkserver')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=TOP,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_the_scripts_run_with_forkserver(world, tmp_path):
    shown = run_by_forkserver(tmp_path, "-c", "import multiprocessing as m; print(m.get_start_method())")
    assert shown == "forkserver\n"
    files, workers = ("--data", world / "train.json"), ("--workers", 1)

    found = run_by_forkserver(tmp_path, "train.py", *files, *workers, "--check")
    assert "6 samples, 6 of them right" in found

    run_by_forkserver(
        tmp_path, "train.py", *files, *workers, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "run"
    )
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1

    final = tmp_path / "run/final"
    options = (*workers, "--model", final, "--max-new-tokens", 1, "--out", tmp_path / "scores")
    run_by_forkserver(tmp_path, "eval.py", "data", world / "train.json", *options)
    assert json.loads((tmp_path / "scores/scores.json").read_text())["not_asked"] == 0
