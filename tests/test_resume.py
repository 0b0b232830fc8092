"""Runs that are killed, stopped or damaged go on as if nothing had happened, or end with one error.

The truth is the promise itself: the losses and weights of a run that nothing disturbed, to the bit.
"""

import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from checkpoints import make_checkpoint
from helpers import Program, read_lines, refusal, run, sample, write_json, write_texts
from safetensors.torch import load_file

import train


@pytest.fixture(scope="module")
def options(toy):
    """A command without --out. Steps of 4 samples in micro-batches of 3, epochs of 7 samples: steps straddle
    epochs, and the last micro-batch is smaller. Objects are cut to random frames."""
    seven = write_json(toy / "seven.json", json.loads((toy / "train.json").read_text())[:7])
    files = f"--data {seven} --val {write_texts(toy / 'val.json', 5)} --val-every 4 --single-frame 0.5"
    return f"train.py {files} --steps 8 --batch-size 4 --micro-batch 3 --workers 1 --warmup 2 --num-frames 2"


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """OUT of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(f"{options} --out {out} --save-every 2 --keep 99")
    return out


def logged(out):
    """metrics.jsonl without the times that steps took."""
    times, lines = {"tokens_per_s", "samples_per_s"}, read_lines(out / "metrics.jsonl")
    return [{name: line[name] for name in line.keys() - times} for line in lines]


def losses(out):
    return [line["loss"] for line in read_lines(out / "metrics.jsonl") if "loss" in line]


def steps_logged(out):
    """How many steps a run that goes on has logged."""
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def saved(out):
    """After how many steps the checkpoints in OUT were saved."""
    return sorted(int(path.name[5:]) for path in out.glob("step-*[0-9]"))


def learned(out, step):
    """The weights and the optimizer's state of a checkpoint, a dict of each."""
    ckpt = torch.load(out / f"step-{step:06}" / "training.pt", weights_only=True)
    assert ckpt["step"] == step
    return ckpt["model"], ckpt["optimizer"]["state"]


def branch(out, step, to):
    """Copies a run as if it had been killed after the checkpoint of a step. Returns the new OUT."""
    shutil.copytree(out, to)
    shutil.rmtree(to / "final")
    for later in saved(to):
        if later > step:
            shutil.rmtree(to / f"step-{later:06}")
    return to


def assert_same_run(found, expected):
    assert logged(found) == logged(expected)
    for name in ("model.safetensors", "region_encoder.safetensors"):
        assert (found / "final" / name).read_bytes() == (expected / "final" / name).read_bytes()


# ---- killed and stopped ----
def test_killed_again_and_again_it_ends_with_the_same_bits(options, whole, tmp_path):
    """Before the first checkpoint, and when one is being written. The last two stay, by default."""
    out = tmp_path / "run"
    command = f"{options} --out {out} --save-every 2 --resume"
    for steps in (1, 4, 6):
        with Program(command) as program:  # killed at the end of the block
            program.wait_until(lambda steps=steps: steps_logged(out) >= steps)
    if not (out / "final").exists():  # on a very busy machine it may have ended before it was killed
        run(command)
    assert_same_run(out, whole)
    assert sorted(os.listdir(out)) == ["config.json", "final", "metrics.jsonl", "step-000006", "step-000008"]


@pytest.mark.parametrize("ranks, options_of_ranks", [(1, ""), (2, "--fsdp")])
def test_sigterm_saves_and_the_run_goes_on_with_the_same_bits(options, tmp_path, ranks, options_of_ranks):
    """To all processes, workers among them; or to one of two ranks: both end after the same step. The runs
    have no end, and are compared with one that was not stopped at a later checkpoint of both."""
    stopped, other = tmp_path / "stopped", tmp_path / "other"
    command = f"{options} --steps 100000 --keep 100000 {options_of_ranks} --out"
    with Program(f"{command} {stopped}", ranks) as program:
        program.wait_until(lambda: steps_logged(stopped) >= 1)
        program.send(signal.SIGTERM, rank=ranks - 1)
        assert "Traceback" not in program.wait(128 + signal.SIGTERM)
    [done] = saved(stopped)
    assert done == steps_logged(stopped) and not (stopped / "final").exists()
    end = done + 2
    for out in (stopped, other):
        with Program(f"{command} {out} --resume --save-every {end}", ranks) as program:
            program.wait_until(lambda out=out: end in saved(out))
    torch.testing.assert_close(learned(stopped, end), learned(other, end), rtol=0, atol=0)


def test_it_goes_on_on_another_number_of_ranks_with_and_without_fsdp(whole, tmp_path):
    """From one process to DDP, to FSDP, and from that to one process. Its losses depend on the moments."""
    ddp, fsdp = (branch(whole, 4, tmp_path / name) for name in ("ddp", "fsdp"))
    run(f"train.py --out {ddp} --resume --workers 0", ranks=2)
    run(f"train.py --out {fsdp} --resume --workers 0 --fsdp", ranks=2)
    one = branch(fsdp, 6, tmp_path / "one")
    run(f"train.py --out {one} --resume --no-fsdp")
    for out, before, steps in ((ddp, whole, 4), (fsdp, whole, 4), (one, fsdp, 6)):
        assert losses(out)[:steps] == losses(before)[:steps], "it did not begin anew"
        assert losses(out) == pytest.approx(losses(whole), rel=2e-4)


def test_what_a_kill_left_half_written_is_gone_when_the_run_goes_on(whole, tmp_path):
    """Half a line, lines of steps that are done again, half a checkpoint, temporary files. The run was moved:
    --out has a default, and that of before, which stands in config.json, is left alone."""
    out, before = branch(whole, 6, tmp_path / "out"), sorted(os.listdir(whole))
    line = {"step": 5, "places": ["a", "b"], "reason": "c"}
    later = json.dumps(line | {"step": 6})
    (out / "bad_samples.jsonl").write_text(f"{json.dumps(line)}\n{later}\n{later[:20]}")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    write_json(out / "step-000008.tmp" / "training.pt", "half")
    write_json(out / "step-000009" / "config.json", "half")  # its weights are removed first
    (out / "mine.tmp").write_text("a file of the user")
    run("train.py --resume --max-bad 0.5", folder=tmp_path)
    assert_same_run(out, whole)
    assert read_lines(out / "bad_samples.jsonl") == [line]
    assert [path.name for path in out.glob("*.tmp")] == ["mine.tmp"] and sorted(os.listdir(whole)) == before


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path):
    """The samples of the step are named, here all of them."""
    out = tmp_path / "run"
    command = f"train.py --data {write_texts(tmp_path / 'data.json', 3)} --out {out} --workers 0 --steps 12"
    text = run(f"{command} --batch-size 3 --save-every 1 --lr 1e30 --clip 0", code=1)
    steps = steps_logged(out)
    assert learned(out, steps) and all(map(math.isfinite, losses(out))) and not (out / "final").exists()
    assert f"step {steps}" in text.splitlines()[-1] and "Traceback" not in text
    assert sorted(re.search(r"\[(.*)\]", text.splitlines()[-1])[1].split(", ")) == ["0", "1", "2"]


# ---- what may change ----
REFUSED = """--seed 1, --lr 0.5, --region-lr 0.5, --num-frames 3, --frame-pixels 4096, --region-pixels 1024,
    --window 3, --region-frames 3, --region-tokens 3, --max-length 99, --single-frame 0.75, --steps 5,
    --epochs 9, --batch-size 2, --warmup 5, --weight-decay 0.5, --clip 0.5, --train region, --lora-rank 3,
    --model other, --data other, --val other"""


def error_of(arguments):
    return str(refusal(lambda: train.train(train.parse(arguments.split()))))


def test_what_may_change_at_resume(whole, tmp_path):
    """Losses would not be those of the run with another seed; where and how they are computed is free."""
    out = branch(whole, 6, tmp_path / "run")
    [before] = read_lines(out / "config.json")
    for change in REFUSED.split(","):
        name, value = change.split()
        expected, found = error_of(f"--out {out} --resume {name} {value}").split("found")
        assert name in expected and str(before[name[2:].replace("-", "_")]) in expected and value in found
    allowed = {"media": "other", "val_every": 3, "max_bad": 0.5, "save_every": 5, "keep": 3, "micro_batch": 1}
    allowed |= {"workers": 9, "device": "cuda", "fsdp": True, "grad_checkpoint": True}
    arguments = ["--out", str(out), "--resume"]
    for name, value in allowed.items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    assert vars(train.parse(arguments)) == before | allowed | {"out": str(out), "resume": True}
    run(f"train.py --out {out} --resume --micro-batch 1 --grad-checkpoint --keep 1 --save-every 1")
    assert losses(out) == pytest.approx(losses(whole), rel=2e-4) and saved(out) == [8]


def test_what_cannot_go_on_is_one_error_and_changes_nothing(tmp_path):
    path, out = write_texts(tmp_path / "data.json", 4), tmp_path / "run"
    arguments = f"--data {path} --out {out} --workers 0 --steps 2 --save-every 1"
    run(f"train.py {arguments}")
    log = (out / "metrics.jsonl").read_bytes()
    assert "final" in error_of(arguments) and "final" in error_of(f"--out {out} --resume")
    shutil.rmtree(out / "final")
    assert "--resume" in error_of(arguments)
    write_texts(path, 5)
    assert "found 5" in error_of(f"--out {out} --resume")
    write_texts(path, 4)
    os.truncate(out / "step-000002" / "training.pt", 9999)
    assert "step-000002" in error_of(f"--out {out} --resume")
    assert (out / "metrics.jsonl").read_bytes() == log


# ---- bad samples ----
def test_bad_samples_from_before_an_interruption_count_on_and_each_counts_once(toy, tmp_path):
    """One of 10 may be bad, in steps of one sample. One is bad in several ways: in each epoch its object is
    cut to another frame, none of which has a polygon."""
    entries = json.loads(write_texts(tmp_path / "data.json", 10, bad=[2]).read_text())
    objects, clip = {k: [1, 2, 3] for k in range(4)}, str(next(toy.glob("videos/*.mp4")))
    entries[7] = sample("What is <region>?", "It.", objects, video=clip)
    path, out = write_json(tmp_path / "data.json", entries), tmp_path / "run"
    command = f"train.py --data {path} --workers 0 --single-frame 1 --batch-size 1 --steps 30 --resume --out"
    for _ in range(2):
        run(f"{command} {out} --max-bad 0.1 --save-every 1", code=1)
        first, second = read_lines(out / "bad_samples.jsonl")
        assert first["step"] < second["step"] == saved(out)[-1]
    run(f"{command} {out} --max-bad 0.2 --save-every 99")
    bad = [line["places"][1] for line in read_lines(out / "bad_samples.jsonl")]
    assert sorted(bad) == ["sample 2 (id 2)", "sample 7"]


# ---- what a checkpoint holds ----
@pytest.mark.parametrize("part", [".visual.", "region_encoder."])
def test_a_checkpoint_holds_what_learns_and_eval_takes_the_rest_from_the_base(tmp_path, part):
    """Compared with the names and the loss of OUT/final, which is whole. The tiny model's frozen weights are
    random; without a spare row, so is one of the embeddings of the base, which a relative path names."""
    parts = {".visual.": "projector,vision", "region_encoder.": "region,lora"}[part]
    base = "tiny" if part == ".visual." else make_checkpoint(tmp_path / "base", "qwen3_vl", spare_rows=0).name
    write_texts(tmp_path / "data.json", 4)
    command = f"train.py --data data.json --model {base} --train {parts} --seed 3 --workers 0 --steps 2"
    run(f"{command} --save-every 1 --out whole", folder=tmp_path)
    whole = tmp_path / "whole"
    weights, moments = learned(whole, 2)
    names = ["backbone." + name for name in load_file(whole / "final" / "model.safetensors")]
    names += ["region_encoder." + name for name in load_file(whole / "final" / "region_encoder.safetensors")]
    assert {name for name in weights if ".lora_" not in name} == {name for name in names if part in name}
    assert weights.keys() == moments.keys()
    assert not list((whole / "step-000002").glob("*.safetensors"))
    found = []
    for folder in ("final", "step-000002"):
        command = f"eval.py data {tmp_path}/data.json --model {whole / folder} --out {tmp_path}/{folder}"
        run(f"{command} --max-new-tokens 1 --workers 0 --device cpu")
        found += [json.loads((tmp_path / folder / "scores.json").read_text())["loss"]]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    resumed = branch(whole, 1, tmp_path / "resumed")
    run(f"train.py --out {resumed} --resume", folder=tmp_path)
    assert_same_run(resumed, whole)


def test_a_resumed_run_draws_the_same_dropout(tmp_path):
    """And each step another, which shows where nothing learns. No published backbone has dropout."""
    base = make_checkpoint(tmp_path / "base", "qwen3_vl")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.5
    write_json(base / "config.json", config)
    command = f"train.py --data {write_texts(tmp_path / 'data.json', 1)} --model {base} --workers 0"
    command += " --train region,llm --steps 4 --save-every 2"
    run(f"{command} --out {tmp_path / 'whole'}")
    resumed = branch(tmp_path / "whole", 2, tmp_path / "resumed")
    run(f"train.py --out {resumed} --resume")
    assert_same_run(resumed, tmp_path / "whole")
    run(f"{command} --out {tmp_path / 'still'} --lr 0 --region-lr 0")
    assert len(set(losses(tmp_path / "still"))) == 4
