"""tests/ablate.py: what an arm trains, which runs are missing, and the numbers of its tables."""

import json
import pickle
from types import SimpleNamespace

import ablate
import pytest
import shapes
import torch
from safetensors.torch import load_file

import data
import train


def rows(right, **columns):
    """The table of an evaluation, in which every row has so many of 200 right."""
    counts = {"exact": right, **columns, "constant": 50}
    row = {column: {"right": n, "asked": 200} for column, n in counts.items()}
    return {kind: {"questions": 200} | row for kind in (*ablate.KINDS, "about regions")}


def result(arm, seed, all_masks, **evaluations):
    evaluations = {"all masks": all_masks} | {k.replace("_", " "): v for k, v in evaluations.items()}
    return {"arm": arm, "seed": seed, "evaluations": evaluations, "seconds": 60}


def test_the_tables_show_mean_and_spread_of_the_seeds(capsys):
    controls = dict.fromkeys(ablate.CONTROLS, 40)
    results = [result("toy: no MLP", seed, rows(right)) for seed, right in enumerate((180, 150, 150))]
    results += [result("toy: all parts", 0, rows(200, **controls), first_mask=rows(100))]
    ablate.print_tables(results)
    lines = capsys.readouterr().out.splitlines()
    assert "| toy: no MLP | all masks | 3 |" + " 80.0 |" * 4 + " 80.0 (75-90) |" in lines
    assert "| toy: all parts | all masks | 1 |" + " 100.0 |" * 4 + " 100.0 (100-100) |" in lines
    assert "| toy: all parts | first mask | 1 |" + " 50.0 |" * 4 + " 50.0 (50-50) |" in lines
    assert "| toy: all parts |" + " 20.0 (20-20) |" * 4 + " 25.0 (25-25) |" in lines
    assert lines[-1] == "4 runs, which took 4 minutes in sum"


def test_runs_that_have_their_lines_are_not_missing():
    results = [result("toy: all parts", 0, rows(200)), result("small: all parts", 1, rows(200))]
    missing = ablate.missing_runs(results, 2)
    assert missing[:3] == [("toy: all parts", 1), ("toy: whole frames", 0), ("toy: whole frames", 1)]
    assert ("small: all parts", 0) in missing and ("small: all parts", 1) not in missing
    assert len(missing) == 2 * len(ablate.ARMS) - 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    shapes.write_world(folder / "toy", 6, 2)
    return folder


@pytest.mark.parametrize("without", ["mlp", "position"])
def test_a_part_that_an_arm_leaves_out_adds_nothing(folder, monkeypatch, without):
    arm = ablate.Arm("toy", "--steps 2", without=without, asks=ablate.BOTH)
    monkeypatch.setitem(ablate.ARMS, "arm", arm)
    ablate.main([str(folder), "--run", "arm", "3"])
    out = ablate.run_folder(folder, "arm", 3)
    weights = load_file(out / "final" / "region_encoder.safetensors")
    last = {"mlp": weights["mlp.3.weight"], "position": weights["position.2.weight"]}
    assert not last.pop(without).any() and all(weight.any() for weight in last.values())
    line = train.read_jsonl(folder / "results.jsonl")[-1]
    assert line["arm"] == "arm" and line["seed"] == 3
    all_masks, first_mask = (line["evaluations"][asked] for asked in ablate.BOTH)
    assert all_masks["all"]["questions"] == first_mask["all"]["questions"] > 10
    # The second evaluation reads each object's first mask alone.
    settings = json.loads((out / "final" / "nanorefer.json").read_text())
    assert settings["region_frames"] == 1


def test_an_arm_trains_with_other_masks_and_is_asked_with_the_right_ones(folder, monkeypatch):
    controls = []
    encode = data.ReferringDataset.encode

    def spy(dataset, sample, rng, for_generation=False):
        controls.append((getattr(dataset, "control", "none"), for_generation))
        return encode(dataset, sample, rng, for_generation)

    monkeypatch.setattr(data.ReferringDataset, "encode", spy)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", without_workers)
    monkeypatch.setitem(ablate.ARMS, "arm", ablate.Arm("toy", "--steps 1", masks="box"))
    ablate.run("arm", 0, folder)
    first_evaluated = controls.index(("none", False))
    assert set(controls[:first_evaluated]) == {("box", False)}  # the training
    assert set(controls[first_evaluated:]) == {("none", False), ("none", True)}  # the loss and the questions


loader = torch.utils.data.DataLoader.__init__


def without_workers(self, *arguments, num_workers, timeout, **options):
    """DataLoader.__init__, but this process reads, so that a test sees what is read."""
    loader(self, *arguments, num_workers=0, **options)


def test_workers_may_unpickle_the_dataset_of_an_arm(monkeypatch):
    """They do where they are not forked. A class in place of data.ReferringDataset could not be found."""
    processor, made = SimpleNamespace(settings=None), []

    def make(config):
        made.append(pickle.loads(pickle.dumps(data.ReferringDataset([], processor))))

    monkeypatch.setattr(train, "train", make)
    ablate.train_arm(ablate.Arm("toy", masks="box"), ["--data", "train.json"])
    assert [dataset.control for dataset in made] == ["box"]
    assert type(data.ReferringDataset([], processor)) is data.ReferringDataset


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (["--jobs", "0"], "--jobs: expected 1 or more, found 3 and 0"),
        (["--run", "no such arm", "0"], "and a seed, found ['no such arm', '0']"),
        (["--run", "toy: no MLP", "x"], "and a seed, found ['toy: no MLP', 'x']"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, capsys, wrong, complaint):
    with pytest.raises(SystemExit):
        ablate.main([str(tmp_path / "new"), *wrong])
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
