"""Two gloo processes. --fsdp and --grad-checkpoint change where things lie and when they are computed, never
what; and whatever happens on one rank alone, all ranks continue or stop together."""

import contextlib
import gc
import json
import queue
import shutil
import signal
import time
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from checkpoints import make_checkpoint
from safetensors.torch import load_file
from test_resume import branch, steps_saved
from test_train import COMMON, metrics, mixed, toy, write_texts  # noqa: F401 (fixtures)
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import train

MLPS = {"Qwen3VLTextMLP", "Qwen3VLVisionMLP"}  # one inside each layer that is sharded and recomputed


def observe(arguments, sigterm=False):
    """Trains in this process. Returns what a rank can tell: the share of the weights that it keeps, its
    gradient exchanges, forward passes of the layers' insides, and how training exited if it did. sigterm:
    this process gets one during its first step."""
    seen = {"reduce_scatters": 0, "forwards": 0}

    def count(name, function):
        def counted(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        return counted

    def count_forward(module, *_):
        seen["forwards"] += type(module).__name__ in MLPS

    def choose(model, config):
        numbers = [(p.to_local() if config.fsdp else p).numel() for p in model.parameters()]
        seen["share"] = sum(numbers) / sum(p.numel() for p in model.parameters())
        return choose_parameters(model, config)

    def send_sigterm(*_):
        if sigterm:
            signal.raise_signal(signal.SIGTERM)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count_forward)
    step_hook = register_optimizer_step_post_hook(send_sigterm)
    before, choose_parameters = signal.getsignal(signal.SIGTERM), train.choose_parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "choose_parameters", choose)
        name = (
            "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        )  # torch 2.13 renamed it
        patch.setattr(dist, name, count("reduce_scatters", getattr(dist, name)))
        try:
            train.train(train.parse([str(a) for a in arguments]))
        except SystemExit as error:
            seen["exit"] = error.code
        except data.DataError as error:
            seen["exit"] = str(error)
    if dist.is_initialized():  # not in the except block, where the error still holds DDP, and DDP the group
        gc.collect()
        dist.destroy_process_group()
    signal.signal(signal.SIGTERM, before)
    hook.remove()
    step_hook.remove()
    return seen


def rank_main(rank, jobs, meeting, results):
    torch.set_num_threads(1)
    initialise = dist.init_process_group
    for name, arguments in jobs.items():
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # ranks meet in a file: a port could be another program's by then
            place = (meeting / name.replace("/", "-")).as_uri()
            patch.setattr(
                dist, "init_process_group", partial(initialise, init_method=place, rank=rank, world_size=2)
            )
            patch.setenv("RANK", str(rank))
            arguments = [str(argument).replace("{rank}", str(rank)) for argument in arguments]
            results.put((name, rank, observe(arguments, sigterm=name == f"sigterm-to-{rank}")))


def two_ranks(jobs, meeting, patience=180):
    """jobs: {name: arguments of train.py}, which two ranks run one after another. Returns {(name, rank): what
    observe tells}. A hang fails the test."""
    context, found = get_context("spawn"), {}
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, jobs, meeting, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + patience
    try:
        while len(found) < 2 * len(jobs):
            with contextlib.suppress(queue.Empty):
                name, rank, seen = results.get(timeout=1)
                found[name, rank] = seen
            assert time.monotonic() < deadline, f"hangs after {list(found)}"
            assert not any(process.exitcode for process in ranks), f"died after {list(found)}"
    finally:
        for process in ranks:
            process.kill()
    return found


@pytest.fixture(scope="module")
def runs(mixed, tmp_path_factory):  # noqa: F811
    """Makes every run of this file. Returns a folder with an OUT for each, and {(name, rank): what observe
    tells}. With micro-batches of one sample, a rank computes on text alone while the other has pictures."""
    top = tmp_path_factory.mktemp("fsdp")
    samples = json.loads(mixed.read_text())
    samples[3]["video"] = "absent.mp4"
    one_bad = mixed.parent / "bad_for_fsdp.json"
    one_bad.write_text(json.dumps(samples))
    parts = {
        "region": ["--train", "region"],
        "projector,llm": ["--train", "projector,llm"],
        "vision": ["--train", "vision"],
    }
    parts["bad"] = ["--data", one_bad, "--max-bad", 0.5]
    for family in ("qwen2_5_vl", "qwen3_5_moe"):
        checkpoint = make_checkpoint(top / family, family)
        parts[family] = ["--model", checkpoint, "--train", "region,projector,llm,vision", "--lr", 1e-3]
        parts[family] += ["--frame-pixels", 3136, "--region-pixels", 3136]

    def job(name, *arguments):
        part = parts.get(name.split("/")[0], [])
        return ["--data", mixed, *COMMON, *part, "--out", top / name, *arguments]

    def resume(name, to):
        branch(top / name, 1, top / to)
        return "--resume"

    save = ["--save-every", 1, "--keep", 3]
    seen = {
        ("one", 0): observe(job("one", *save)),
        ("one-recomputed", 0): observe(job("one-recomputed", "--grad-checkpoint")),
    }
    for name in parts:
        observe(job(f"{name}/one"))
    jobs = {
        "ddp-recomputed": job("ddp-recomputed", "--grad-checkpoint", "--micro-batch", 1),
        "fsdp": job("fsdp", "--fsdp", "--micro-batch", 1, *save),
        "fsdp-recomputed": job("fsdp-recomputed", "--fsdp", "--grad-checkpoint"),
        "one-to-fsdp": job("one-to-fsdp", "--fsdp", resume("one", "one-to-fsdp")),
    }
    # OUT is a folder of each rank's own, as on two machines without a shared disk; one of them is empty.
    shutil.copytree(top / "one" / "step-000001", top / "out-of-rank-0" / "step-000001")
    jobs["not-shared"] = [*job("not-shared"), "--out", top / "out-of-rank-{rank}", "--resume"]
    five = write_texts(top / "five.json", 5)
    (_, bad), *_ = next(iter(train.Order(5, 4, 1, seed=0, rank=1, world_size=2)))
    jobs |= {
        "sigterm-to-1": job("sigterm-to-1"),
        "bad-on-1": job("bad-on-1", "--data", write_texts(top / "bad.json", 5, bad=[bad]), "--max-bad", 0),
        "batch-of-3": job("batch-of-3", "--data", five, "--batch-size", 3),
        "default-batch": ["--data", five, "--out", top / "default-batch", "--workers", 0, "--steps", 2],
    }
    jobs |= {f"{name}/fsdp": job(f"{name}/fsdp", "--fsdp", "--micro-batch", 1) for name in parts}
    seen |= two_ranks(jobs, tmp_path_factory.mktemp("meeting"))
    jobs = {"fsdp-to-fsdp": job("fsdp-to-fsdp", resume("fsdp", "fsdp-to-fsdp"))}
    seen |= two_ranks(jobs, tmp_path_factory.mktemp("meeting"))
    observe(job("fsdp-to-one", "--no-fsdp", resume("fsdp", "fsdp-to-one")))
    return top, seen


def agree(found, expected):
    for name in ("step", "loss", "grad_norm", "supervised_tokens"):
        assert [m[name] for m in found] == pytest.approx([m[name] for m in expected], rel=2e-5), name


@pytest.mark.parametrize("name", ["one-recomputed", "ddp-recomputed", "fsdp", "fsdp-recomputed"])
def test_losses_and_gradient_norms_are_those_of_one_process(runs, name):
    agree(metrics(runs[0] / name), metrics(runs[0] / "one"))


@pytest.mark.parametrize("parts", ["region", "projector,llm", "vision", "bad", "qwen2_5_vl", "qwen3_5_moe"])
def test_so_they_are_with_frozen_parts_a_rank_that_has_nothing_and_weights_that_are_not_tied(runs, parts):
    agree(metrics(runs[0] / parts / "fsdp"), metrics(runs[0] / parts / "one"))


@pytest.mark.parametrize("name", ["one-to-fsdp", "fsdp-to-one", "fsdp-to-fsdp"])
def test_a_checkpoint_goes_on_with_and_without_fsdp(runs, name):
    """Two steps of three. The last loss depends on the moments that were taken from the checkpoint."""
    found = metrics(runs[0] / name)
    assert found[0] == metrics(runs[0] / name.split("-")[0])[0], "with its times: it did not begin anew"
    agree(found, metrics(runs[0] / "one"))


def test_the_files_do_not_tell_that_the_model_was_sharded(runs):
    top, _ = runs
    for folder in ("final", "step-000002"):
        one, fsdp = top / "one" / folder, top / "fsdp" / folder
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in fsdp.iterdir())
        assert (one / "config.json").read_bytes() == (fsdp / "config.json").read_bytes()
    for file in ("model.safetensors", "region_encoder.safetensors"):
        one, fsdp = (load_file(top / name / "final" / file) for name in ("one", "fsdp"))
        torch.testing.assert_close(fsdp, one, rtol=0, atol=1e-4)
    one, fsdp = (
        torch.load(top / name / "step-000002" / "training.pt", weights_only=True) for name in ("one", "fsdp")
    )
    differ = {name for name, value in one["config"].items() if fsdp["config"][name] != value}
    assert differ == {"out", "fsdp", "micro_batch"}
    assert fsdp["optimizer"]["param_groups"] == one["optimizer"]["param_groups"]
    torch.testing.assert_close(fsdp["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(fsdp["model"], one["model"], rtol=0, atol=1e-4)


def test_fsdp_keeps_half_of_the_weights_on_each_of_two_ranks_and_never_a_whole_gradient(runs):
    _, seen = runs
    for rank in range(2):
        assert seen["fsdp", rank]["share"] == pytest.approx(0.5, abs=0.01)
        assert seen["ddp-recomputed", rank]["share"] == 1
        # 3 steps of 2 micro-batches. A unit's gradient is cut up at once; the units are 2 blocks of the
        # vision tower, 3 layers of the LLM, and what is left.
        assert seen["fsdp", rank]["reduce_scatters"] == 3 * 2 * 6


def test_grad_checkpoint_computes_each_layer_twice(runs):
    _, seen = runs
    layers = 2 + 3
    assert (
        seen["one", 0]["forwards"] == 3 * layers and seen["one-recomputed", 0]["forwards"] == 3 * 2 * layers
    )
    for rank in range(2):
        assert seen["fsdp", rank]["forwards"] == 3 * 2 * layers  # two micro-batches
        assert seen["fsdp-recomputed", rank]["forwards"] == 3 * 2 * layers  # one
        assert seen["ddp-recomputed", rank]["forwards"] == 3 * 2 * 2 * layers


def test_sigterm_to_one_rank_stops_all_after_the_same_step(runs):
    """Only rank 1 gets it, during step 0; all hear of it in step 1, finish that and save."""
    top, seen = runs
    assert seen["sigterm-to-1", 0]["exit"] == seen["sigterm-to-1", 1]["exit"] == 128 + signal.SIGTERM
    assert steps_saved(top / "sigterm-to-1") == [2]


def test_a_bad_sample_of_one_rank_stops_all(runs):
    top, seen = runs
    for rank in range(2):
        assert (
            "stopped: 1 of 5 samples cannot be used, more than --max-bad 0" in seen["bad-on-1", rank]["exit"]
        )
    assert len(train.read_jsonl(top / "bad-on-1" / "bad_samples.jsonl")) == 1


def test_the_batch_is_a_multiple_of_the_ranks(runs):
    """5 samples: by default, 2 ranks take 4 of them in a step. A batch of 3 cannot be shared out."""
    top, seen = runs
    for rank in range(2):
        assert seen["batch-of-3", rank]["exit"] == "expected --batch-size: a multiple of the 2 ranks, found 3"
    assert [m["epoch"] for m in metrics(top / "default-batch")] == pytest.approx([0, 4 / 5])


def test_ranks_that_would_begin_at_different_steps_stop(runs):
    """They waited for each other for ever."""
    _, seen = runs
    for rank in range(2):
        assert seen["not-shared", rank]["exit"].endswith("on all ranks, found [(1, 4, 0), (None, 4, 0)]")


def test_fsdp_without_ranks_is_refused(mixed, tmp_path):  # noqa: F811
    with pytest.raises(data.DataError, match="expected torchrun with --fsdp"):
        train.train(train.parse(["--data", str(mixed), "--out", str(tmp_path / "run"), "--fsdp"]))
