"""Held-out data: what --val measures, that training does not notice, and the curves that are drawn of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import curves
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_fsdp import two_ranks
from test_train import metrics, mixed, toy, train_here, write_texts  # noqa: F401 (fixtures)
from transformers import AutoModelForImageTextToText

import data
import eval as evaluation
import model as models
import train

OPTIONS = "--workers 0 --warmup 1".split()


def measured(folder, name="val_loss"):
    """{step: value} of what a run has measured."""
    return {m["step"]: m[name] for m in metrics(folder) if name in m}


def trained(folder):
    return [m for m in metrics(folder) if "loss" in m]


def what_is_logged(folder):
    timed = ("tokens_per_s", "samples_per_s")
    lines = [{name: value for name, value in m.items() if name not in timed} for m in metrics(folder)]
    files = (folder / "final" / name for name in ("model.safetensors", "region_encoder.safetensors"))
    return lines, *(path.read_bytes() for path in files)


@pytest.fixture(scope="module")
def held_out(mixed):  # noqa: F811
    """Nine samples: the four of `mixed`, of which a model can know the answers by heart, and five others."""
    others = json.loads((mixed.parent / "test.json").read_text())[:5]
    path = mixed.parent / "held_out.json"
    path.write_text(json.dumps(json.loads(mixed.read_text()) + others))
    return path


@pytest.fixture(scope="module")
def learned(mixed, held_out, tmp_path_factory):  # noqa: F811
    """A run that learns the samples of `mixed` by heart, measured every 20 steps."""
    out = tmp_path_factory.mktemp("learned") / "run"
    val = ["--val", held_out, "--val-every", 20]
    options = "--steps 50 --single-frame 0 --lr 2e-3 --save-every 20 --keep 9".split()
    train_here("--data", mixed, "--out", out, *OPTIONS, *options, *val)
    return out


def test_eval_measures_the_same_on_the_models_that_were_saved(held_out, learned, tmp_path):
    assert list(measured(learned)) == [0, 20, 40, 50]
    for step, folder in ((20, "step-000020"), (50, "final")):
        out = tmp_path / folder
        command = ["data", held_out, "--model", learned / folder, "--device", "cpu", "--workers", 0]
        evaluation.main([str(argument) for argument in (*command, "--out", out)])
        scores = json.loads((out / "scores.json").read_text())
        assert measured(learned)[step] == pytest.approx(scores["loss"], rel=1e-6)


def test_the_loss_is_that_of_transformers(tmp_path):
    """Its own model and loss, one sample at a time. Lengths differ, so a mean of means would be another."""
    path, val = (write_texts(tmp_path / f"{name}.json", count) for name, count in (("data", 4), ("val", 7)))
    train_here("--data", path, "--val", val, "--out", tmp_path / "run", "--steps", 3, *OPTIONS)
    final = tmp_path / "run" / "final"
    model = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32)
    dataset = data.ReferringDataset(data.read_samples(val), models.load_processor(final))
    loss_sum, tokens = 0.0, 0
    for i in range(7):
        ids, labels = (torch.from_numpy(dataset[0, i][name])[None] for name in ("input_ids", "labels"))
        count = int((labels != data.IGNORE_INDEX).sum())
        with torch.no_grad():
            loss_sum += count * float(model(input_ids=ids, labels=labels).loss)
        tokens += count
    assert measured(tmp_path / "run")[3] == pytest.approx(loss_sum / tokens, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_does_not_notice(mixed, held_out, tmp_path, workers):  # noqa: F811
    """Not by a bit, although a backbone with dropout draws random numbers."""

    def with_dropout(module, *_):
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5

    options = ["--data", mixed, *OPTIONS, "--steps", 3, "--workers", workers]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(with_dropout)
    try:
        train_here(*options, "--out", tmp_path / "without")
        val = ["--val", held_out, "--val-every", 2]
        train_here(*options, "--out", tmp_path / "with", *val)
    finally:
        hook.remove()
    assert list(measured(tmp_path / "with")) == [0, 2, 3]
    train_here(*options, "--out", tmp_path / "plain", *val, "--steps", 1)
    assert measured(tmp_path / "with")[0] == measured(tmp_path / "plain")[0], "measured without dropout"
    assert trained(tmp_path / "with")[0]["loss"] != trained(tmp_path / "plain")[0]["loss"]
    without, with_val = (what_is_logged(tmp_path / name) for name in ("without", "with"))
    assert [m for m in with_val[0] if "loss" in m] == without[0] and with_val[1:] == without[1:]


def test_what_is_measured_does_not_depend_on_micro_batches(learned, held_out, tmp_path):
    for micro_batch in (1, 4):
        options = ["--model", learned / "final", "--data", held_out, "--val", held_out]
        out = tmp_path / str(micro_batch)
        train_here(*options, "--out", out, "--steps", 1, *OPTIONS, "--micro-batch", micro_batch)
        assert measured(out)[0] == pytest.approx(measured(learned)[50], rel=1e-6)


def test_ranks_measure_together_and_sharded(learned, mixed, held_out, tmp_path):  # noqa: F811
    """Nine samples in micro-batches of one: the second rank has a forward pass less to do."""
    options = ["--model", learned / "final", "--data", mixed, *OPTIONS, "--steps", 2, "--micro-batch", 1]
    options += ["--train", "region,projector,llm,vision"]
    val = ["--val", held_out, "--val-every", 1]
    train_here(*options, *val, "--out", tmp_path / "one")
    absent = json.loads(held_out.read_text())
    absent[1]["image"] = "absent.png"
    bad = held_out.with_name("bad_held_out.json")
    bad.write_text(json.dumps(absent))
    jobs = {
        "ddp": [*options, *val],
        "fsdp": [*options, *val, "--fsdp"],
        "without": [*options, "--fsdp"],
        "bad": [*options, "--val", bad],
    }
    jobs = {name: [*job, "--out", tmp_path / name] for name, job in jobs.items()}
    (tmp_path / "meeting").mkdir()
    seen = two_ranks(jobs, tmp_path / "meeting")
    one = measured(tmp_path / "one")
    assert list(one) == [0, 1, 2]
    for name in ("ddp", "fsdp"):
        assert measured(tmp_path / name) == pytest.approx(one, rel=2e-5), name
    fsdp, without = (tmp_path / name / "final/model.safetensors" for name in ("fsdp", "without"))
    torch.testing.assert_close(load_file(fsdp), load_file(without), rtol=0, atol=0)
    assert all("bad_held_out.json: sample 1: " in seen["bad", rank]["exit"] for rank in range(2))


def test_a_resumed_run_measures_on(tmp_path):
    path, val = (write_texts(tmp_path / f"{name}.json", count) for name, count in (("data", 6), ("val", 5)))
    options = ["--data", path, *OPTIONS, "--batch-size", 3, "--steps", 6, "--save-every", 2]
    options += ["--val", val, "--val-every", 2]
    train_here(*options, "--out", tmp_path / "whole")
    out = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step-000006")  # of two checkpoints, the one after step 4 is left
    with pytest.raises(data.DataError, match="expected --val .* as in the run that is resumed"):
        train_here("--val", path, "--out", out, "--resume")
    train_here(*options, "--out", out, "--resume")
    assert what_is_logged(out) == what_is_logged(tmp_path / "whole")
    assert list(measured(out)) == [0, 2, 4, 6]


def test_what_is_measured_is_printed(tmp_path, capsys):
    path = write_texts(tmp_path / "data.json", 4)
    train_here("--data", path, "--val", path, "--out", tmp_path / "run", "--steps", 4, *OPTIONS)
    loss = measured(tmp_path / "run")
    assert list(loss) == [0, 4] and loss[4] < loss[0]
    output = capsys.readouterr().out
    for step in loss:
        assert f"after {step} steps: val_loss {loss[step]:.4f}\n" in output


def test_a_sharded_model_is_whole_for_no_longer_than_it_is_measured(learned, held_out, tmp_path):
    """FSDP would keep some weights for a backward pass, on a GPU in bfloat16: those must not be saved."""
    config = train.Config(micro_batch=8, workers=0, out=str(tmp_path))
    model, processor = evaluation.load(learned / "final", "cpu")
    dataset = data.ReferringDataset(data.read_samples(held_out), processor)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        train.shard(model, torch.device("cpu"))
        train.measure(model, dataset, config, 0)
        assert measured(tmp_path)[0] == pytest.approx(measured(learned)[50], rel=1e-6)
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_speeds_are_those_of_training(tmp_path, monkeypatch):
    """On a clock by which a step takes a second, and a measurement an hour."""
    clock, measure, backward = SimpleNamespace(now=0), train.measure, train.backward

    def measure_for_an_hour(*arguments):
        clock.now += 3600
        return measure(*arguments)

    def backward_for_a_second(*arguments):
        clock.now += 1
        return backward(*arguments)

    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(train, "measure", measure_for_an_hour)
    monkeypatch.setattr(train, "backward", backward_for_a_second)
    path = write_texts(tmp_path / "data.json", 4)
    options = ["--data", path, "--val", path, "--val-every", 1, "--steps", 2, *OPTIONS]
    train_here(*options, "--out", tmp_path / "run")
    assert list(measured(tmp_path / "run", "samples_per_s").values()) == [4, 4]


def test_compiled_variants_of_the_layers_are_all_for_training(tmp_path, monkeypatch):
    """torch compiles a few variants of a layer, then no more. Measured first, they would all be used up."""
    compile, measure, graphs, counts = torch.compile, train.measure, [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def watched(*arguments):
        before = len(graphs)
        found = measure(*arguments)
        counts.append((before, len(graphs)))
        return found

    monkeypatch.setattr(torch, "compile", lambda layer, **options: compile(layer, backend=backend, **options))
    monkeypatch.setattr(train, "measure", watched)
    path = write_texts(tmp_path / "data.json", 2)
    options = ["--data", path, "--val", path, "--compile", "--steps", 1, *OPTIONS]
    train_here(*options, "--out", tmp_path / "run")
    (none, first), (before, after) = counts
    assert none == first == 0 < before == after


def test_bad_held_out_data_ends_the_run_before_it_trains(mixed, tmp_path):  # noqa: F811
    samples = json.loads(mixed.read_text())
    samples[2]["video"] = "absent.mp4"
    path = mixed.with_name("absent.json")
    path.write_text(json.dumps(samples))
    options = ["--data", mixed, "--out", tmp_path / "run", "--val", path, "--steps", 1, *OPTIONS]
    with pytest.raises(data.DataError, match="absent.json: sample 2: .*absent.mp4"):
        train_here(*options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    path.write_text(mixed.read_text())
    train_here(*options, "--resume")
    assert list(measured(tmp_path / "run")) == [0, 1]


def test_options_that_do_nothing_are_refused(capsys):
    with pytest.raises(data.DataError, match="expected --val for --val-every"):
        train.parse(["--data", "d.json", "--val-every", "3"])
    with pytest.raises(SystemExit):
        train.parse(["--data", "d.json", "--val", "v.json", "--val-every", "0"])
    assert "--val-every: expected a number from 1, found 0" in capsys.readouterr().err


# ---- curves ----


def test_curves_show_what_was_logged(learned, tmp_path):
    other = tmp_path / "other"
    train_here("--data", write_texts(tmp_path / "d.json", 4), "--out", other, "--steps", 5, *OPTIONS)
    curves.main([str(learned), str(other), "--out", str(tmp_path / "p.png")])
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    (loss_axis,) = curves.draw([learned, other]).axes
    drawn = [dict(zip(line.get_xdata(), line.get_ydata())) for line in loss_axis.lines]
    assert drawn == [measured(learned, "loss"), measured(learned), measured(other, "loss")]
    first, held_out, second = [line.get_color() for line in loss_axis.lines]
    assert first == held_out != second
    assert len(curves.draw([other]).axes) == 1
    with pytest.raises(SystemExit, match="error: .*nowhere: the folder of a run"):
        curves.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "q.png")])
    assert not Path(tmp_path / "q.png").exists()
