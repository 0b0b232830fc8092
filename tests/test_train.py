"""The training loop: what one step does, whatever the ranks; what it writes; and that it learns."""

import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench_data
import bench_step
import numpy as np
import pytest
import shapes
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import eval as evaluation
import model as models
import train

TOP = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    shapes.write_world(folder, train_clips=6, test_clips=2)
    return folder


def run(*command, **environment):
    """Runs a command at the top level. Returns both output streams as one; fails unless it exits with 0."""
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
    """Trains in this process. Returns what the optimizer was given in each step: {"norm": of all gradients,
    "lr": {part of the model: the learning rates of its parameters}}."""
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


COMMON = "--steps 3 --batch-size 4 --workers 0 --warmup 1".split()


@pytest.fixture(scope="session")
def mixed(toy):
    """Four samples for one step: text alone, an image without regions, a video, and a video with many
    regions. Dealt out to four ranks, half of them have no region and one has no media at all."""
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
    """One step's loss and gradient norm are sums over its supervised tokens divided once, however these are
    dealt out. With four ranks of one sample each, one rank has no media and two have no region."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks) if ranks > 1 else ()
    run(*launcher, "train.py", "--data", mixed, "--out", tmp_path / "run", "--micro-batch", micro, *COMMON)
    found = metrics(tmp_path / "run")
    assert [m["supervised_tokens"] for m in found] == [m["supervised_tokens"] for m in one_process]
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in found] == pytest.approx([m[name] for m in one_process], rel=2e-4), name


def test_the_order_is_shared_out_without_gaps_or_repeats():
    def keys(ranks):
        orders = [list(train.Order(10, 4, 5, seed=3, rank=r, world_size=ranks)) for r in range(ranks)]
        assert all(len(order) == 5 for order in orders)
        return [[key for order in orders for key in order[step]] for step in range(5)]

    plain = keys(1)
    assert plain == keys(2) == keys(4)
    row = [key for step in plain for key in step]
    assert row[:10] == [(0, i) for _, i in row[:10]] and sorted(i for _, i in row[:10]) == list(range(10))
    assert sorted(i for _, i in row[10:]) == list(range(10)) and {e for e, _ in row[10:]} == {1}
    assert [i for _, i in row[:10]] != [i for _, i in row[10:]]


def test_a_bad_sample_keeps_its_place_and_a_step_its_number_of_micro_batches():
    processor = models.load_processor("tiny", ["a text"])
    bad = data.DataError("unreadable")

    class Samples(list):
        pass

    one, two = ({**data.EMPTY_SAMPLE, "id": number} for number in (1, 2))
    samples = Samples([one, bad, bad, bad, two])
    samples.processor = processor
    keys = train.micro_batches_of([range(5), range(1, 4)], 2)
    batches = [*train.read_batches(samples, keys, torch.device("cpu"), workers=0)]
    assert [batch["ids"] for batch in batches] == [[1], [None], [2], [None], [None]]
    assert [batch["errors"] for batch in batches] == [[None, bad], [bad, bad], [None], [bad, bad], [bad]]
    assert batches[1]["num_tokens"] == 1 and not len(batches[1]["targets"])


def test_schedule_warms_up_and_follows_a_cosine_to_zero():
    config = train.Config(steps=110, warmup=10)
    assert [train.schedule(s, config) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert train.schedule(10, config) == 1 and train.schedule(60, config) == pytest.approx(0.5)
    assert train.schedule(110, config) == pytest.approx(0) and train.schedule(35, config) == pytest.approx(
        (1 + math.sqrt(0.5)) / 2
    )


def test_rates_follow_the_schedule_and_the_gradient_is_clipped(tmp_path):
    """The optimizer is given two steps of warm-up, then half a cosine over the other two; the region encoder
    has its own rate; gradients are no longer than --clip. The logged norm is the one before clipping."""
    options = ["--data", write_texts(tmp_path / "data.json", 4), "--out", tmp_path / "run", "--workers", 0]
    options += "--steps 4 --warmup 2 --lr 2e-4 --region-lr 3e-3 --clip 0.01".split()
    steps = watch(*options)
    for step, share in enumerate((0.5, 1, 1, 0.5)):
        for part, peak in (("region", 3e-3), ("projector", 2e-4), ("llm", 2e-4), ("vision", 2e-4)):
            assert [*steps[step]["lr"][part]] == pytest.approx([peak * share]), (step, part)
        assert steps[step]["norm"] == pytest.approx(0.01, rel=1e-3)
    logged = metrics(tmp_path / "run")
    assert [m["lr"] for m in logged] == pytest.approx([1e-4, 2e-4, 2e-4, 1e-4])
    assert all(m["grad_norm"] > 0.1 for m in logged)


@pytest.mark.parametrize("parts, logged", [("llm,region", 1e-3), ("region", 3e-3), ("vision", 1e-3)])
def test_the_logged_rate_is_that_of_lr_unless_region_alone_learns(tmp_path, parts, logged):
    """It was that of the part that --train names last."""
    options = ["--data", write_texts(tmp_path / "data.json", 2), "--out", tmp_path / "run", "--workers", 0]
    train_here(*options, "--steps", 1, "--warmup", 1, "--train", parts)
    (line,) = metrics(tmp_path / "run")
    assert line["lr"] == logged


def test_a_full_disk_ends_with_one_line(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "append_jsonl", no_space)
    options = ["--data", write_texts(tmp_path / "data.json", 2), "--out", tmp_path / "run", "--workers", 0]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options), "--steps", "1"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="^error: .*No space left on device$"):
        train.main()
    signal.signal(signal.SIGTERM, before)


def test_epochs_are_whole_passes_and_cut_no_sample(tmp_path):
    """7 samples in steps of 5: one pass takes 2 steps, and one step would miss 2 samples."""
    options = ["--data", write_texts(tmp_path / "data.json", 7), "--batch-size", 5, "--workers", 0]
    for epochs, steps in ((1, 2), (1.4, 2), (1.6, 3)):
        out = tmp_path / str(epochs)
        train_here(*options, "--out", out, "--epochs", epochs)
        assert [m["epoch"] for m in metrics(out)] == pytest.approx([0, 5 / 7, 10 / 7][:steps])


def test_single_frame_and_seed_reach_the_data_set(tmp_path, monkeypatch):
    seen, signature = [], inspect.signature(data.ReferringDataset)

    class Watched(data.ReferringDataset):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(signature.bind(*args, **kwargs).arguments)

    monkeypatch.setattr(data, "ReferringDataset", Watched)
    options = ["--data", write_texts(tmp_path / "data.json", 2), "--out", tmp_path / "run", "--workers", 0]
    train_here(*options, "--steps", 1, "--single-frame", 0.7, "--seed", 5)
    given = seen[0]  # the other is for held-out data
    assert (given["single_frame"], given["seed"]) == (0.7, 5)


@pytest.mark.parametrize(
    "names", ["region", "region,projector", "llm", "vision", "region,projector,llm,vision", "region,lora"]
)
def test_train_moves_what_it_names_and_nothing_else(mixed, tmp_path, names):
    config = train.parse(["--data", str(mixed), "--train", names, "--out", str(tmp_path)])
    samples = data.read_samples(mixed)
    processor = models.load_processor("tiny", data.sample_texts(samples))
    train.fill_in_defaults(config, processor, len(samples))
    model, groups = train.build_model(config, processor, torch.device("cpu"))
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    torch.nn.init.normal_(
        model.region_encoder.mlp[-1].weight
    )  # so that gradients reach all of the region encoder at once
    torch.nn.init.normal_(model.region_encoder.position[-1].weight)
    for p in model.parameter_groups()["lora"]:  # likewise
        torch.nn.init.normal_(p, std=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    dataset = data.ReferringDataset(samples, processor)
    model.train()(data.collate([dataset[0, i] for i in range(4)], processor)).backward()
    optimizer.step()
    group_of = {id(p): name for name, group in model.parameter_groups().items() for p in group}
    for name, p in model.named_parameters():
        moved, wanted = not torch.equal(p, before[name]), group_of[id(p)] in names.split(",")
        assert moved == wanted == p.requires_grad, name


def test_an_unknown_part_is_refused(tmp_path):
    expected = "--train: names out of region,projector,llm,vision,lora, .*, found 'regions'"
    with pytest.raises(data.DataError, match=expected):
        train_here("--data", write_texts(tmp_path / "data.json", 2), "--out", tmp_path, "--train", "regions")


@pytest.mark.parametrize(
    "options, complaint",
    [
        ("--train region --lr 1e-4", "that uses (--)?lr, found 'region'"),
        ("--train llm --region-lr 1e-4", "that uses (--)?region.lr, found 'llm'"),
    ],
)
def test_a_learning_rate_of_nothing_that_learns_is_refused(tmp_path, options, complaint):
    """It was ignored without a word."""
    with pytest.raises(data.DataError, match=complaint):
        train_here("--data", write_texts(tmp_path / "data.json", 2), "--out", tmp_path, *options.split())


def test_lr_needs_more_than_what_a_pretrained_model_trains_by_default():
    with pytest.raises(data.DataError, match="that uses (--)?lr, found 'region'"):
        train.parse(["--data", "d.json", "--model", "published", "--lr", "1e-4"])


def test_bad_data_ends_with_one_message_and_no_traceback(toy, tmp_path):
    path = toy / "broken.json"
    path.write_text('[{"id": 1},\n oops]')
    done = launch("train.py", "--data", path, "--out", tmp_path / "run", *COMMON)
    assert (
        done.returncode == 1
        and "broken.json: line 2, byte 13 of the file" in done.stdout
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
    assert line["places"][1] == "sample 2" and "absent.mp4" in str(line)
    assert (
        all(math.isfinite(m["loss"]) for m in metrics(out)) and (out / "final" / "model.safetensors").exists()
    )


def test_an_earlier_run_is_not_overwritten(tmp_path):
    options = ["--data", write_texts(tmp_path / "data.json", 4), "--out", tmp_path / "run", *COMMON]
    train_here(*options)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(data.DataError, match="--out .*: a folder without a finished run, found"):
        train_here(*options)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "left, remedy",
    [("final", "a folder without a finished run"), ("step-000001/training.pt", "a new folder, or --resume")],
)
def test_a_copied_model_is_not_written_over(tmp_path, left, remedy):
    """The run went on until it was to be saved, and was lost then, because that folder was there."""
    (tmp_path / "run" / left).mkdir(parents=True)
    options = ["--data", write_texts(tmp_path / "data.json", 4), "--out", tmp_path / "run", *COMMON]
    with pytest.raises(data.DataError, match=f"--out .*: {remedy}"):
        train_here(*options, "--save-every", 1)


def test_no_clipping_with_clip_0(tmp_path):
    """It used to scale every gradient to 0."""
    options = ["--data", write_texts(tmp_path / "data.json", 4), "--out", tmp_path / "run", *COMMON]
    norms = [step["norm"] for step in watch(*options, "--clip", 0)]
    assert norms == pytest.approx([m["grad_norm"] for m in metrics(tmp_path / "run")], rel=1e-4)
    assert norms[0] > 1


def test_weight_decay_is_for_matrices_alone(tmp_path):
    """Samples of text alone give the vision tower gradients of 0. A step of AdamW then multiplies what decays
    by 1 - lr * weight_decay, and leaves alone what does not."""
    options = ["--data", write_texts(tmp_path / "data.json", 2), "--steps", 1, "--warmup", 0, "--workers", 0]
    options += ["--train", "vision", "--weight-decay", 0.5]
    train_here(*options, "--out", tmp_path / "before", "--lr", 0)
    train_here(*options, "--out", tmp_path / "after", "--lr", 0.1)
    before, after = (load_file(tmp_path / name / "final/model.safetensors") for name in ("before", "after"))
    unlike_zero = [name for name in before if before[name].any()]  # new biases are zeros, which tell nothing
    for name in unlike_zero:
        decays = "visual" in name and "merger" not in name and before[name].ndim >= 2
        expected = 0.95 * before[name] if decays else before[name]
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=0)
    for name in ("norm1.weight", "attn.qkv.weight", "mlp.linear_fc1.weight"):
        assert f"model.visual.blocks.0.{name}" in unlike_zero


def test_what_is_not_given_comes_from_the_settings_that_were_saved_with_the_model(tmp_path):
    """The second stage of a training used to drop the first one's --num-frames and --region-tokens."""
    texts = write_texts(tmp_path / "data.json", 2)
    common = ["--data", texts, "--steps", 1, "--workers", 0]

    def settings(out):
        return json.loads((out / "final" / "nanorefer.json").read_text())

    chosen = {"num_frames": 3, "frame_pixels": 2048, "region_pixels": 4096, "region_frames": 5}
    chosen |= {"window": 2, "region_tokens": 2, "max_length": 999}
    options = [x for name, value in chosen.items() for x in ("--" + name.replace("_", "-"), value)]
    train_here(*common, "--out", tmp_path / "one", *options)
    assert settings(tmp_path / "one") == chosen
    second = [*common, "--model", tmp_path / "one" / "final"]
    train_here(*second, "--out", tmp_path / "two", "--save-every", 1)
    assert settings(tmp_path / "two") == chosen
    train_here(*second, "--out", tmp_path / "three", "--num-frames", 4, "--window", 0)
    assert settings(tmp_path / "three") == chosen | {"num_frames": 4, "window": 0}
    shutil.rmtree(tmp_path / "two" / "final")
    complaint = "expected --region-tokens 2,? as in the run that is resumed, found 3"
    with pytest.raises(data.DataError, match=complaint):
        train_here("--out", tmp_path / "two", "--resume", "--region-tokens", 3)


def test_it_learns_four_samples_by_heart_and_eval_hears_them_back(mixed, tmp_path):
    """The path of the quick start in small: train.py to a folder, eval.py from it."""
    out = tmp_path / "run"
    train_here("--data", mixed, "--out", out, *"--steps 60 --single-frame 0 --workers 0 --lr 2e-3".split())
    losses = [m["loss"] for m in metrics(out)]
    assert losses[-1] < losses[0] / 10
    scores = tmp_path / "scores"
    options = ["--model", out / "final", "--workers", 0, "--control", "full", "--out", scores]
    table = run("eval.py", "data", mixed, *options)
    answers = train.read_jsonl(scores / "predictions.jsonl")
    scores = json.loads((scores / "scores.json").read_text())
    asked = sum(len(s["conversations"]) // 2 for s in json.loads(mixed.read_text()))
    assert len(answers) == asked == scores["rows"]["all"]["questions"] and "about regions" in table
    assert sum(a["exact"] == a["answer"] for a in answers) == scores["rows"]["all"]["exact"]["right"]
    assert scores["rows"]["all"]["exact"]["right"] >= 0.8 * asked
    assert all(("full" in a) == a["regions"] for a in answers)


def test_bench_data_times_both_ways_and_writes_nothing(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench_data.main([str(toy / "train.json")])
    ours, plain, ratio = capsys.readouterr().out.splitlines()[-3:]
    times = [float(re.fullmatch(r" *(ours|plain): +([0-9.]+) ms, .*", line)[2]) for line in (ours, plain)]
    ratio = float(re.fullmatch(r"ours is ([0-9.]+) times as fast", ratio)[1])
    assert min(times) > 0 and ratio == pytest.approx(times[1] / times[0], rel=0.1)
    assert not list(tmp_path.iterdir())


def test_bench_data_reads_the_same_in_both_ways(toy):
    samples = data.read_samples(toy / "train.json")
    processor = models.load_processor("tiny", data.sample_texts(samples), window=0)
    several = (i for i, s in enumerate(samples) if len(s.objects) > 1 and s.media.endswith(".mp4"))
    i = next(several)
    ours = data.ReferringDataset(samples, processor)[0, i]
    video, stills, masks, (input_ids, labels) = bench_data.plain_sample(processor, samples[i])
    # The pixels come from another decoder.
    assert np.abs(video * 0.5 + 0.5 - ours["video_patches"] / 255).mean() < 0.01
    assert np.abs(np.stack(stills) * 0.5 + 0.5 - np.stack(ours["still_patches"]) / 255).mean() < 0.01
    gh, gw = (side // processor.merge_size for side in ours["still_grids"][0])
    cells = [data.coverage(mask.astype(np.uint8), gh, gw).ravel() for mask in masks]
    np.testing.assert_array_equal(cells, ours["coverage"])
    np.testing.assert_array_equal(input_ids, ours["input_ids"])
    np.testing.assert_array_equal(labels, ours["labels"])


def test_bench_step_learns_the_same_in_both_ways():
    """All kinds of samples, with as many padded as not. The plain way has two loops over region frames."""
    options = bench_step.parse(["--batch-size", "12", "--micro-batch", "7"])
    model, processor = bench_step.build("tiny", "region,projector,llm,vision", torch.device("cpu"))
    for p in model.region_encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for samples in bench_step.encode_steps(options, processor)[:2]:
        train.backward(model, [data.collate(some, processor) for some in samples])
        tokens = sum((sample["labels"] != data.IGNORE_INDEX).sum() for some in samples for sample in some)
        ours = torch.cat([p.grad.flatten() for p in model.parameters()]) / tokens
        model.zero_grad()
        padded = [bench_step.plain_batch(some, processor) for some in samples]
        plain = bench_step.plain_twin(model)
        bench_step.plain_backward(plain, model.region_encoder, padded, torch.device("cpu"))
        theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        assert all((batch["inputs"]["attention_mask"] == 0).any() for batch in padded)
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("size, billions", [("2b", 2.13), ("8b", 8.77)])
def test_bench_step_builds_models_of_the_published_sizes(size, billions):
    model, _ = bench_step.build(size, "region", torch.device("meta"))
    found = sum(p.numel() for p in model.backbone.parameters())
    assert found / 1e9 == pytest.approx(billions, abs=0.005)


def test_bench_step_runs_without_what_reads_files(tmp_path):
    """Where only torch and transformers are. It times both ways, and says where the time goes."""
    absent = dict.fromkeys(["av", "pycocotools", "peft"])  # importing them raises ImportError
    command = f"import sys; sys.modules |= {absent}; import bench_step; bench_step.main()"
    options = "--batch-size 4 --micro-batch 2 --rounds 1 --grad-checkpoint --profile".split()
    out = run("-c", command, *options, tmp_path / "trace.json", PYTHONPATH=str(TOP / "tests"))
    ours, plain, ratio = out.splitlines()[-3:]
    times = []
    for row, way in ((ours, "ours"), (plain, "plain")):
        name, milliseconds, samples, _, mfu, memory, vision, llm, optimizer, waiting = row.split()
        assert (name, memory, waiting) == (way, "-", "-") and float(mfu.rstrip("%")) > 0
        assert sum(float(share.rstrip("%")) for share in (vision, llm, optimizer)) == pytest.approx(
            100, abs=2
        )
        times.append(float(milliseconds))
        assert float(samples) == pytest.approx(4000 / times[-1], rel=0.02)
    ratio = float(re.fullmatch(r"ours is ([0-9.]+) times as fast", ratio)[1])
    assert ratio == pytest.approx(times[1] / times[0], rel=0.02)
    assert (tmp_path / "trace.json").stat().st_size > 1000


def test_bench_step_counts_what_overlaps_once():
    assert bench_step.covered([(5, 7), (0, 2), (1, 3), (6, 6.5), (9, 10)]) == 6
    assert bench_step.covered([]) == 0


def test_a_file_that_hangs_its_decoder_does_not_hang_the_run(tmp_path, monkeypatch):
    """A video whose first frame is a pipe that nobody writes to: who opens it waits for ever."""
    (tmp_path / "hangs").mkdir()
    os.mkfifo(tmp_path / "hangs" / "0.png")
    path = write_texts(tmp_path / "data.json", 4)
    samples = json.loads(path.read_text())
    samples[1]["video"] = "hangs"
    path.write_text(json.dumps(samples))
    monkeypatch.setattr(data, "READ_SECONDS", 0.2)
    options = ["--data", path, "--out", tmp_path / "out", "--max-bad", 0.25, "--workers", 1]
    train_here(*options, "--steps", 3, "--batch-size", 4)
    assert (tmp_path / "out/final").is_dir() and len(metrics(tmp_path / "out")) == 3
    (bad,) = train.read_jsonl(tmp_path / "out/bad_samples.jsonl")
    assert "sample 1" in bad["places"][1]
    assert "expected to be read within 0.2 s" in bad["reason"]


# ---- feeding a device ----


@pytest.mark.parametrize(
    "cores, ranks, expected", [(12, 4, 3), (3, 8, 1), (64, 1, 64), (7, 2, 3), (5, None, 5)]
)
def test_the_cores_of_a_machine_are_divided_among_its_ranks(monkeypatch, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    config = train.Config()
    train.fill_in_defaults(config, models.load_processor("tiny", ["a"]), num_samples=4)
    assert config.workers == min(expected, 16)


def test_compiled_layers_learn_the_same_and_are_compiled_once(monkeypatch):
    """Rows of other lengths, and of other numbers of samples and frames, need no new code, nor do layers of
    the same kind. What torch.compile makes of them runs as it is: to turn it into C++ would take minutes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = bench_step.parse(["--batch-size", "6", "--micro-batch", "3"])
    texts = [bench_step.WORDS] * 9
    processor = models.load_processor("tiny", texts)
    encoded = bench_step.encode_steps(options, processor)
    rows = [data.collate(samples, processor) for step in encoded for samples in step]

    def gradients(*arguments):
        config = train.parse(["--data", "d.json", *arguments])
        fresh = models.load_processor("tiny", texts)  # because building a model changes its config
        train.fill_in_defaults(config, fresh, 6)
        model, _ = train.build_model(config, fresh, torch.device("cpu"))
        for row in rows:
            loss = train.backward(model, [row]).item()
            yield loss, torch.cat([p.grad.flatten() for p in model.parameters()])
            model.zero_grad()

    plain = [*gradients()]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled, counts = [], []
    for found in gradients("--compile"):
        compiled.append(found)
        counts.append(len(graphs))
    for (loss, gradient), (expected_loss, expected) in zip(compiled, plain):
        assert loss == pytest.approx(expected_loss, rel=2e-6)
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert counts[0] > 0 and set(counts) == {counts[0]}


# ---- options ----


@pytest.mark.parametrize(
    "option, least",
    [
        ("batch-size", 1),
        ("micro-batch", 1),
        ("num-frames", 1),
        ("keep", 1),
        ("workers", 0),
        ("window", 0),
    ],
)
def test_numbers_that_mean_nothing_are_refused(option, least, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--data", "d.json", f"--{option}", str(least - 1)])
    assert f"--{option}: expected a number from {least}, found {least - 1}" in capsys.readouterr().err
    assert (
        getattr(train.parse(["--data", "d.json", f"--{option}", str(least)]), option.replace("-", "_"))
        == least
    )


@pytest.mark.parametrize("option", ["clip", "weight-decay", "lr", "max-bad", "epochs"])
@pytest.mark.parametrize("value", ["-1e-3", "nan", "inf"])
def test_rates_and_shares_are_finite_and_not_negative(option, value, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--data", "d.json", f"--{option}={value}"])
    limits = "from 0 to 1" if option == "max-bad" else "from 0"
    assert f"--{option}: expected a number {limits}, found {float(value)}" in capsys.readouterr().err
    assert getattr(train.parse(["--data", "d.json", f"--{option}", "0"]), option.replace("-", "_")) == 0


@pytest.mark.parametrize("option, value", [("single-frame", 1.5), ("max-bad", 2.0)])
def test_shares_have_limits(option, value, capsys):
    """--single-frame 5 was taken for 1."""
    with pytest.raises(SystemExit):
        train.parse(["--data", "d.json", f"--{option}", str(value)])
    assert f"--{option}: expected a number from 0 to 1, found {value}" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "cuda"])
@pytest.mark.parametrize(
    "main, options",
    [
        (train.main, ["--data", "absent.json"]),
        (evaluation.main, ["data", "absent.json", "--model", "tiny", "--out", "scores"]),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(main, options, device, monkeypatch):
    """--device gpu was a traceback, and cuda:1 was taken for a CPU in places."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["", *options, "--device", device])
    complaint = f"expected --device: cpu, or cuda where there is one, found '{device}'"
    with pytest.raises((SystemExit, data.DataError), match=complaint):
        main()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands tensors over as open files")
def test_as_many_files_may_be_open_as_the_system_allows():
    """With the usual 1024, a step of 16 micro-batches could not be handed over by the workers."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        train.init_distributed("cpu")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
