"""The training loop: what one step does, whatever the ranks; what it writes; and that it learns."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import model as models
import train

TOP = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    shapes.write_world(folder, train_clips=6, test_clips=2)
    return folder


def run(*command, **environment):
    """Runs a command at the top level; -> its output, both streams. Fails the test unless it exits with 0."""
    done = launch(*command, **environment)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def launch(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=TOP,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def train_here(*arguments):
    """Trains in this process, which is much quicker than a new one, and gives back the SIGTERM handler."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        train.train(train.parse([str(argument) for argument in arguments]))
    finally:
        signal.signal(signal.SIGTERM, before)


def watch(*arguments):
    """Trains in this process -> for each optimizer step, what the optimizer was given: {"norm": of all gradients, "lr": {part of
    the model: the learning rates of its parameters}}."""
    steps, found = [], []

    def find_model(module, *_):
        if isinstance(module, models.ReferringVideoLLM) and not found:
            found.append(module)

    def before_step(optimizer, *_):
        lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        squares = sum(float((p.grad**2).sum()) for group in optimizer.param_groups for p in group["params"])
        parts = found[0].parameter_groups().items()
        rates = {part: {lr[id(p)] for p in parameters if id(p) in lr} for part, parameters in parts}
        steps.append({"norm": math.sqrt(squares), "lr": rates})

    hooks = [torch.nn.modules.module.register_module_forward_pre_hook(find_model)]
    hooks.append(register_optimizer_step_pre_hook(before_step))
    try:
        train_here(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return steps


def write_texts(path, count, bad=()):
    """A data file of samples that are text alone, which train quickly; those in bad have no conversation."""
    samples = []
    for i in range(count):
        question, answer = f"What is {i} + {i}?", f"{2 * i}, of course" * (i % 3 + 1)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        samples.append({"id": i, "conversations": [] if i in bad else turns})
    path.write_text(json.dumps(samples))
    return path


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


COMMON = ("--steps", 3, "--batch-size", 4, "--log-every", 1, "--workers", 0, "--warmup", 1)


@pytest.fixture(scope="session")
def mixed(toy):
    """Four samples for one step: text alone, an image without regions, a video, and a video with many regions; in this order of
    kinds, half of the ranks have no region and one has no media at all."""
    samples = json.loads((toy / "train.json").read_text())
    image = next(s for s in samples if "image" in s)
    video = next(s for s in samples if "video" in s and ("annotation" in s or "masks" in s))
    text = [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red"}]
    ask = [
        {"from": "human", "value": "What colour is the background?"},
        {"from": "gpt", "value": "a very long answer"},
    ]
    chosen = [
        {"conversations": text},
        {"image": image["image"], "conversations": ask},
        {"video": video["video"], "conversations": ask},
        video,
    ]
    path = toy / "mixed.json"
    path.write_text(json.dumps(chosen))
    return path


@pytest.fixture(scope="session")
def one_process(mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    run("train.py", "--data", mixed, "--out", out, *COMMON)
    return metrics(out)


@pytest.mark.parametrize("ranks, micro", [(1, 1), (1, 3), (2, 2), (2, 1), (4, 1)])
def test_ranks_and_micro_batches_do_not_change_the_losses(mixed, one_process, tmp_path, ranks, micro):
    """One step's loss and gradient norm are sums over its supervised tokens divided once, however they are dealt out. With four
    ranks of one sample each, one rank has no media and two have no region."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks) if ranks > 1 else ()
    run(*launcher, "train.py", "--data", mixed, "--out", tmp_path / "run", "--micro-batch", micro, *COMMON)
    found = metrics(tmp_path / "run")
    assert [m["supervised_tokens"] for m in found] == [m["supervised_tokens"] for m in one_process]
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in found] == pytest.approx([m[name] for m in one_process], rel=2e-4), name


def test_the_order_is_shared_out_without_gaps_or_repeats():
    def keys(ranks):
        orders = [list(train.Order(10, 4, 5, seed=3, rank=r, world=ranks)) for r in range(ranks)]
        assert all(len(order) == 5 == len(train.Order(10, 4, 5, 3, 0, ranks)) for order in orders)
        return [[key for order in orders for key in order[step]] for step in range(5)]

    plain = keys(1)
    assert plain == keys(2) == keys(4)
    row = [key for step in plain for key in step]
    assert row[:10] == [(0, i) for _, i in row[:10]] and sorted(i for _, i in row[:10]) == list(range(10))
    assert sorted(i for _, i in row[10:]) == list(range(10)) and {e for e, _ in row[10:]} == {1}
    assert [i for _, i in row[:10]] != [i for _, i in row[10:]]


def test_a_step_is_grouped_by_length_and_keeps_its_number_of_micro_batches():
    def sample(length):
        return (
            data.EMPTY_SAMPLE
            | {"id": length}
            | {name: np.ones(length, int) for name in ("input_ids", "labels", "attention_mask")}
        )

    lengths = [9, 2, 7, 3, 8]
    batches, errors = train.micro_batches([sample(n) for n in lengths], 2, pad_token_id=0)
    assert [batch["ids"] for batch in batches] == [[2, 3], [7, 8], [9]] and not errors
    bad = data.DataError("unreadable")
    batches, errors = train.micro_batches([sample(9), bad, bad, sample(2), bad], 2, pad_token_id=0)
    assert [batch["ids"] for batch in batches] == [[2, 9], [None], [None]] and errors == [bad] * 3


def test_schedule_warms_up_and_follows_a_cosine_to_zero():
    config = train.Config(steps=110, warmup=10)
    assert [train.schedule(s, config) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert train.schedule(10, config) == 1 and train.schedule(60, config) == pytest.approx(0.5)
    assert train.schedule(110, config) == pytest.approx(0) and train.schedule(35, config) == pytest.approx(
        (1 + math.sqrt(0.5)) / 2
    )


def test_rates_follow_the_schedule_and_the_gradient_is_clipped(tmp_path):
    """What the optimizer is given: two steps of warm-up, then half a cosine over the other two; the region encoder at its own rate;
    gradients that are never longer than --clip. The norm that is logged is the one before clipping."""
    options = ["--data", write_texts(tmp_path / "data.json", 4), "--out", tmp_path / "run", "--workers", 0]
    options += [
        "--steps",
        4,
        "--warmup",
        2,
        "--lr",
        2e-4,
        "--region-lr",
        3e-3,
        "--log-every",
        1,
        "--clip",
        0.01,
    ]
    steps = watch(*options)
    for step, share in enumerate((0.5, 1, 1, 0.5)):
        for part, peak in (("region", 3e-3), ("projector", 2e-4), ("llm", 2e-4), ("vision", 2e-4)):
            assert [*steps[step]["lr"][part]] == pytest.approx([peak * share]), (step, part)
        assert steps[step]["norm"] == pytest.approx(0.01, rel=1e-3)
    logged = metrics(tmp_path / "run")
    assert [m["lr"] for m in logged] == pytest.approx([1e-4, 2e-4, 2e-4, 1e-4])
    assert all(m["grad_norm"] > 0.1 for m in logged)


def test_epochs_are_whole_passes_and_cut_no_sample(tmp_path):
    """7 samples in steps of 5: one pass takes 2 steps, and one step would miss 2 samples."""
    options = ["--data", write_texts(tmp_path / "data.json", 7), "--batch-size", 5, "--workers", 0]
    for epochs, steps in ((1, 2), (1.4, 2), (1.5, 3)):
        out = tmp_path / str(epochs)
        train_here(*options, "--out", out, "--epochs", epochs, "--log-every", 1)
        assert [m["epoch"] for m in metrics(out)] == pytest.approx([0, 5 / 7, 10 / 7][:steps])


def test_single_frame_and_seed_reach_the_data_set(tmp_path, monkeypatch):
    seen = []

    class Watched(data.ReferringDataset):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

    monkeypatch.setattr(data, "ReferringDataset", Watched)
    options = ["--data", write_texts(tmp_path / "data.json", 2), "--out", tmp_path / "run", "--workers", 0]
    train_here(*options, "--steps", 1, "--single-frame", 0.7, "--seed", 5, "--timeout", 7)
    assert [(d.single_frame, d.seed, d.timeout) for d in seen] == [(0.7, 5, 7.0)]


@pytest.mark.parametrize(
    "names", ["region", "region,projector", "llm", "vision", "region,projector,llm,vision"]
)
def test_train_moves_what_it_names_and_nothing_else(mixed, tmp_path, names):
    config = train.parse(["--data", str(mixed), "--train", names, "--out", str(tmp_path)])
    samples = data.read_samples(mixed)
    model, processor = train.build(config, samples)
    groups = train.choose_parameters(model, config)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    torch.nn.init.normal_(
        model.region_encoder.mlp[-1].weight
    )  # so that gradients reach all of the region encoder at once
    torch.nn.init.normal_(model.region_encoder.position[-1].weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    dataset = data.ReferringDataset(samples, processor)
    model.train()(data.collate([dataset[0, i] for i in range(4)], 0)).backward()
    optimizer.step()
    group_of = {id(p): name for name, group in model.parameter_groups().items() for p in group}
    for name, p in model.named_parameters():
        moved, wanted = not torch.equal(p, before[name]), group_of[id(p)] in names.split(",")
        assert moved == wanted == p.requires_grad, name


def test_an_unknown_part_is_refused(mixed, tmp_path):
    done = launch("train.py", "--data", mixed, "--out", tmp_path / "a", "--train", "regions", *COMMON)
    assert (
        done.returncode == 1
        and "--train: expected names out of region,projector,llm,vision, found regions" in done.stdout
    )
    assert "Traceback" not in done.stdout


def test_bad_data_ends_with_one_message_and_no_traceback(toy, tmp_path):
    path = toy / "broken.json"
    path.write_text('[{"id": 1},\n oops]')
    done = launch("train.py", "--data", path, "--out", tmp_path / "run", *COMMON)
    assert (
        done.returncode == 1
        and "broken.json: line 2, column 2" in done.stdout
        and "Traceback" not in done.stdout
    )


def test_a_bad_sample_is_left_out_recorded_and_never_replaced(mixed, tmp_path):
    samples = json.loads(mixed.read_text())
    samples[2]["video"] = "videos/absent.mp4"
    path = mixed.parent / "one_bad.json"
    path.write_text(json.dumps(samples))
    done = launch("train.py", "--data", path, "--out", tmp_path / "strict", *COMMON)
    assert done.returncode == 1 and "--max-bad" in done.stdout and "Traceback" not in done.stdout
    out = tmp_path / "lenient"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 4)
    run(*launcher, "train.py", "--data", path, "--out", out, "--max-bad", 0.5, *COMMON)
    (line,) = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert line["places"][1] == "sample 2" and "absent.mp4" in line["reason"]
    assert (
        all(math.isfinite(m["loss"]) for m in metrics(out)) and (out / "final" / "model.safetensors").exists()
    )


def test_an_earlier_run_is_not_overwritten(mixed, tmp_path):
    run("train.py", "--data", mixed, "--out", tmp_path / "run", *COMMON)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    done = launch("train.py", "--data", mixed, "--out", tmp_path / "run", *COMMON)
    assert done.returncode == 1 and "holds an earlier run" in done.stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fails(folder):
        Path(folder, "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.write_whole(str(tmp_path / "final"), fails)
    assert not (tmp_path / "final").exists()
    train.write_whole(str(tmp_path / "final"), lambda folder: Path(folder, "whole").write_text("x"))
    assert os.listdir(tmp_path / "final") == ["whole"]


def test_it_learns_four_samples_by_heart_and_eval_hears_them_back(mixed, tmp_path):
    """The path of the quick start in small: train.py to a folder, eval.py from it."""
    out = tmp_path / "run"
    run(
        "train.py",
        "--data",
        mixed,
        "--out",
        out,
        "--steps",
        60,
        "--single-frame",
        0,
        "--workers",
        0,
        "--lr",
        2e-3,
    )
    losses = [m["loss"] for m in metrics(out)]
    assert losses[-1] < losses[0] / 10
    table = run(
        "eval.py",
        "--model",
        out / "final",
        "--data",
        mixed,
        "--workers",
        0,
        "--out",
        tmp_path / "scores",
        "--control",
        "full",
    )
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    answers = [
        json.loads(line) for line in (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()
    ]
    asked = sum(len(s["conversations"]) // 2 for s in json.loads(mixed.read_text()))
    assert len(answers) == asked == scores["rows"]["all"]["questions"] and "about regions" in table
    assert sum(a["exact"] == a["answer"] for a in answers) == scores["rows"]["all"]["exact"]["right"]
    assert scores["rows"]["all"]["exact"]["right"] >= 0.8 * asked
    assert all(("full" in a) == a["regions"] for a in answers)


# ------------------------------------------------------------------------------------------------ --bench


def test_bench_prints_its_tables_and_writes_nothing(toy, tmp_path):
    output = run(
        "train.py",
        "--data",
        toy / "train.json",
        "--bench",
        "--workers",
        0,
        "--batch-size",
        4,
        "--out",
        tmp_path / "out",
    )
    for row in ("open, decode, ms", "handed over, MB", "wait for data, ms", "backward, ms", "tokens/s"):
        (line,) = [line for line in output.splitlines() if line.strip().startswith(row)]
        ours, straightforward, ratio = map(float, line.split()[-3:])
        assert ours >= 0 and straightforward >= 0 and math.isfinite(ratio)
    assert not (tmp_path / "out").exists()


def test_bench_compares_with_the_same_work(toy):
    """The straightforward path reads the same pixels, masks and tokens as ours; the straightforward step has the same gradient."""
    samples = data.read_samples(toy / "train.json")
    config = train.parse(["--data", str(toy / "train.json")])
    model, processor = train.build(config, samples)
    dataset = data.ReferringDataset(samples, processor)
    number = next(
        i for i in range(len(samples)) if len(samples[i].objects) > 1 and samples[i].media.endswith(".mp4")
    )
    ours = dataset[0, number]
    video, stills, masks, (input_ids, labels) = train.straightforward_sample(dataset, samples[number])
    assert np.abs(video * 0.5 + 0.5 - ours["video_patches"] / 255).mean() < 0.01  # another decoder
    assert np.abs(np.stack(stills) * 0.5 + 0.5 - np.stack(ours["still_patches"]) / 255).mean() < 0.01
    cells = [
        data.coverage(mask.astype(np.uint8), *(side // 2 for side in ours["still_grid"])).ravel()
        for mask in masks
    ]
    np.testing.assert_array_equal(cells, ours["coverage"])
    assert (input_ids == ours["input_ids"]).all() and (labels == ours["labels"]).all()

    encoded, pad, device = (
        [dataset[0, i] for i in range(6)],
        processor.tokenizer.pad_token_id,
        torch.device("cpu"),
    )
    gradients = []
    for collate, run_backward in (
        (lambda s: train.micro_batches(s, 4, pad), train.backward),
        (lambda s: train.straightforward_batches(s, pad), train.straightforward_backward),
    ):
        micro, _ = collate(encoded)
        total = sum(int((batch["labels"][:, 1:] != data.IGNORE_INDEX).sum()) for batch in micro)
        model.zero_grad(set_to_none=True)
        run_backward(model, micro, total, device)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_file_that_hangs_its_decoder_does_not_hang_the_run(toy, tmp_path, monkeypatch):
    samples = json.loads((toy / "train.json").read_text())
    videos = sorted(
        {s["video"] if isinstance(s["video"], str) else s["video"][0] for s in samples if "video" in s}
    )
    (tmp_path / "data.json").write_text(
        json.dumps([s for s in samples if videos[0] in json.dumps(s)][:1] + samples[-7:])
    )
    never, _ = os.pipe()
    real = data.read_media
    monkeypatch.setattr(
        data,
        "read_media",
        lambda path, frames: os.read(never, 1) if path.endswith(videos[0]) else real(path, frames),
    )
    handler = signal.getsignal(signal.SIGTERM)
    options = [
        "--data",
        tmp_path / "data.json",
        "--media",
        toy,
        "--out",
        tmp_path / "out",
        "--timeout",
        1,
        "--max-bad",
        1,
        "--workers",
        1,
    ]
    train.train(
        train.parse(
            [
                str(option)
                for option in [*options, "--steps", 3, "--batch-size", 8, "--log-every", 1, "--device", "cpu"]
            ]
        )
    )
    signal.signal(signal.SIGTERM, handler)
    assert (tmp_path / "out/final").is_dir() and len(metrics(tmp_path / "out")) == 3
    bad = [line["reason"] for line in train.read_jsonl(tmp_path / "out/bad_samples.jsonl")]
    assert bad and all("expected to be read within 1 s (--timeout)" in reason for reason in bad)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "option, least",
    [("batch-size", 1), ("micro-batch", 1), ("log-every", 1), ("num-frames", 1), ("keep", 1), ("workers", 0)],
)
def test_numbers_that_mean_nothing_are_refused(option, least, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--data", "d.json", f"--{option}", str(least - 1)])
    assert f"--{option}: expected a whole number from {least}, found {least - 1}" in capsys.readouterr().err
    assert (
        getattr(train.parse(["--data", "d.json", f"--{option}", str(least)]), option.replace("-", "_"))
        == least
    )
