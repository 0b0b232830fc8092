"""Training: one plain loop over torch.distributed.

    python train.py --data data.json                          # the tiny model, from scratch, on this machine
    torchrun --nproc_per_node 8 train.py --data data.json --model Qwen/Qwen3-VL-2B-Instruct --out stage1
    torchrun --nproc_per_node 8 train.py --data data.json --model stage1/final --train region,projector,llm \\
        --fsdp --out stage2
    torchrun --nproc_per_node 8 train.py --out stage2 --resume           # goes on with a run that was stopped
    python train.py --data data.json --check --preview preview.png       # reads the data, and trains nothing

    samples --order(seed, epoch)--> each rank's share --DataLoader--> micro-batches --backward--> gradients
        of the loss summed over all micro-batches of all ranks, divided once by the step's supervised tokens

It writes OUT/config.json (all options), OUT/metrics.jsonl (a line for each step, and one for each measurement
on --val data), OUT/bad_samples.jsonl (which samples could not be used, and why), OUT/step-NNNNNN (with
--save-every or on SIGTERM: what has been learned so far) and OUT/final (the model, for eval.py).

A step sees the same samples and, but for dropout, takes the same gradient whatever the number of ranks and
the size of the micro-batches. Everything random in it is a function of (seed, step, rank) or (seed, epoch,
sample), so that a resumed run continues as if it had never been interrupted.

torchrun passes a SIGTERM on, but kills after 30 s: --shutdown-timeout 1200 gives step and save 20 minutes.
For several machines, give it --nnodes 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 on each, HOST being
one of them, and an --out that all can write to. Docker needs --ipc=host, because workers hand over batches
in /dev/shm. On GPUs, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps memory whole where rows differ
in length.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

# While torch's threads wait for each other they spin, so that a step takes twice as long beside one busy
# neighbour. Passive threads sleep, which costs nothing on quiet cores. To be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models

FRAME_CACHE = 128 << 20  # bytes of decoded frames that the workers of a rank keep
DECAY = 0.3  # share of the steps, the last ones, in which the learning rate falls towards 0
HANGING = 3600  # seconds to wait for a batch; then the run ends, because some library's call must hang


# Defaults that depend on --model and --train. The model that train.py wrote has its own for the settings.
DEFAULTS = {
    "tiny": asdict(data.Settings()) | {"train": "region,projector,llm,vision", "lr": 1e-3, "region_lr": 3e-3},
    "pretrained": data.PRETRAINED_PIXELS | {"train": "region", "lr": 2e-5, "region_lr": 1e-3},
    "lora": {"lr": 2e-4, "lora_rank": 16},
}


def option(default, help, group=None):
    """A field of Config. group: the heading of this option and of those below it."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass
class Config:
    """The command line: each field is an option. None: see DEFAULTS, or what the help says."""

    data: list[str] = option(None, "data files: JSON arrays or JSONL", "data")
    media: str = option(None, "folder that media paths are relative to (default: each data file's own)")
    val: list[str] = option(None, "data files to measure the loss on, not to learn from; none may be bad")
    val_every: int = option(None, "steps between two measurements (default: at the start and the end)")
    max_bad: float = option(0.01, "stop when a larger share of the samples than this cannot be used")
    check: bool = option(False, "read all samples as the run would, say what is wrong with them, and end")
    problems: str = option(None, "with --check: a JSONL file for all problems")
    preview: str = option(None, "with --check: a PNG file in which some samples are drawn")

    model: str = option("tiny", "tiny (random weights), or a Qwen3.5, Qwen3-VL, Qwen2.5-VL", "model")
    train: str = option(None, "what learns: region (encoder), projector, llm, vision; lora adapts the llm")
    lora_rank: int = option(None, "rank of the adapters that lora adds to the LLM")

    num_frames: int = option(None, "frames sampled evenly from a video", "how media become tokens")
    frame_pixels: int = option(None, "pixels of such a frame at most")
    region_pixels: int = option(None, "pixels of an image, or of the cut-out that shows an object, at most")
    window: int = option(None, "side of the cut-out, in lengths of the object's box; 0: all of the frame")
    region_frames: int = option(None, "annotated frames per object at most, evenly spread")
    region_tokens: int = option(None, "tokens per object at most, similar frames being merged")
    max_length: int = option(None, "tokens per sample at most; a longer one is refused")
    single_frame: float = option(0.25, "share of objects cut to one random frame (the paper mixes the modes)")

    steps: int = option(560, "optimizer steps, unless --epochs is given", "optimizer")
    epochs: float = option(None, "passes over the data, in place of --steps")
    batch_size: int = option(None, "samples per step, over all ranks (default: about 16, all if fewer)")
    lr: float = option(None, "peak learning rate of all but region")
    region_lr: float = option(None, "peak learning rate of region")
    warmup: int = option(10, f"steps in which the learning rate rises; it falls in the last {DECAY:.0%}%")
    weight_decay: float = option(0.01, "weight decay of matrices; norms and biases have none")
    clip: float = option(1.0, "norm that the gradient is scaled down to; 0: no clipping")
    seed: int = option(0, "of the weights, the order and every random choice")

    out: str = option("out", "a new folder for all output, or with --resume that of the run", "run")
    save_every: int = option(None, "steps between checkpoints OUT/step-NNNNNN (default: only on SIGTERM)")
    keep: int = option(2, "how many checkpoints stay, the latest ones")
    resume: bool = option(False, "go on with the run in --out, or begin it")
    micro_batch: int = option(8, "samples per forward pass of a rank at most")
    workers: int = option(None, "processes per rank that load data (default: its cores, at most 16)")
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the ranks (FSDP2, not DDP)")
    grad_checkpoint: bool = option(False, "compute layers again in the backward pass rather than store them")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")


# The options that a resumed run may change. The metrics depend on all the others.
MAY_CHANGE = set("media val_every max_bad check problems preview out save_every keep".split())
MAY_CHANGE |= set("resume micro_batch workers fsdp grad_checkpoint device".split())


# ---- the data of a step ----
def order(num_samples, batch_size, steps, seed, rank, world_size):
    """Yields for each of the steps (a range) the (epoch, sample index) pairs of this rank's samples.

    All epochs stand in one long row, each shuffled by (seed, epoch). Step s takes the s-th stretch of
    batch_size samples, and each rank an equal part of it. So there is no state to save.
    """
    share, epoch = batch_size // world_size, None
    for step in steps:
        first, keys = step * batch_size + rank * share, []
        for position in range(first, first + share):
            if position // num_samples != epoch:
                epoch = position // num_samples
                shuffled = np.random.default_rng((seed, epoch)).permutation(num_samples)
            keys.append((epoch, int(shuffled[position % num_samples])))
        yield keys


def read_batches(dataset, batches_of_keys, device, workers, **options):
    """Yields the batch (data.collate) of each list of the dataset's keys, on the device.

    A bad sample (DataError) keeps its place in the list, so that all ranks have as many batches: they wait
    for each other in each forward pass. A batch of bad samples alone holds a single token.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches_of_keys,
        num_workers=workers,
        collate_fn=partial(data.collate, processor=dataset.processor, **options),
        worker_init_fn=ignore_sigterm,
        pin_memory=device.type == "cuda",
        timeout=HANGING if workers else 0,
    )
    try:
        for batch in loader:
            yield to_device(batch, device)
    except (ConnectionError, EOFError) as error:  # of the sockets by which workers hand over tensors
        raise RuntimeError(f"DataLoader worker was killed while it handed over a batch: {error!r}") from None


def to_device(batch, device):
    """The same batch with its tensors on the device. From pinned memory, the copy runs by itself."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


def ignore_sigterm(worker_id):
    """Keeps the workers alive on a SIGTERM to all processes, so that the run can still save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---- model and optimizer ----
def choose_parameters(model, config):
    """Freezes what --train does not name. Returns AdamW's parameter groups, each with its "peak_lr".

    As in nanoGPT, weights of two dimensions or more have weight decay, norms and biases have none.
    """
    groups, counts = [], []
    for name, parameters in model.parameter_groups().items():
        learns = name in config.train.split(",")
        for p in parameters:
            p.requires_grad_(learns)
        if parameters:  # most models have no adapters
            millions = sum(p.numel() for p in parameters) / 1e6
            counts.append(f"{name} {millions:.2f} M" + ("" if learns else " (frozen)"))
        if learns:
            peak_lr = config.region_lr if name == "region" else config.lr
            matrices = [p for p in parameters if p.ndim >= 2]
            vectors = [p for p in parameters if p.ndim < 2]
            groups.append({"params": matrices, "peak_lr": peak_lr, "weight_decay": config.weight_decay})
            groups.append({"params": vectors, "peak_lr": peak_lr, "weight_decay": 0.0})
    print0("parameters: " + ", ".join(counts))
    return [group for group in groups if group["params"]]


def schedule(step, config):
    """Returns the share of the peak learning rate that a step takes. It rises for --warmup steps, stays, and
    falls to 0 in the last steps. (A cosine is small when directions of small objects begin to be learned.)
    """
    rise = (step + 1) / max(1, config.warmup)
    fall = (config.steps - step) / (DECAY * config.steps)
    return min(rise, 1.0, fall)


def backward(model, micro_batches):
    """Adds the gradient of the loss, summed over the supervised tokens of all ranks, to .grad. Returns the
    summed loss of this rank, a float32 scalar tensor.

    A sum does not depend on how it is divided: neither the number of ranks nor the size of the micro-batches
    changes it. (A mean for each micro-batch would weigh a token by how few others stand beside it.)
    """
    losses = []
    for micro_step, batch in enumerate(micro_batches):
        if isinstance(model, DistributedDataParallel):
            # In DDP training we only need to exchange gradients after the last micro-batch. FSDP does so
            # after each one: to wait, each rank would have to keep the whole gradient.
            model.require_backward_grad_sync = micro_step == len(micro_batches) - 1
        loss = model(batch)
        # DDP and FSDP average the gradients of the ranks. We want their sum, hence the world size.
        (loss * world_size()).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


# ---- the loop ----
def train(config):
    device = init_distributed(config.device)
    data.expect(dist.is_initialized() or not config.fsdp, "torchrun with --fsdp, which shards", "one process")
    samples = data.read_samples(config.data, config.media)
    val_samples = data.read_samples(config.val, config.media) if config.val else []
    ckpt_path, ckpt = read_checkpoint(config, len(samples), len(val_samples))
    settings = {f.name: getattr(config, f.name) for f in fields(data.Settings)}
    texts = data.sample_texts(samples) if config.model == "tiny" else ()
    processor = models.load_processor(ckpt_path or config.model, texts, **settings)
    fill_in_defaults(config, processor, len(samples))
    if config.check:
        samples = data.read_samples([*config.data, *(config.val or [])], config.media)
        return check(config, samples, processor) if rank() == 0 else None
    first_step = ckpt["step"] if ckpt else 0
    model, groups = build_model(config, processor, device)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if ckpt:
        load_checkpoint(model, optimizer, ckpt)
    prepare_out(config, first_step)
    ddp_model = model
    if world_size() > 1 and not config.fsdp:
        ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    steps, size = range(first_step, config.steps), config.micro_batch
    shares = order(len(samples), config.batch_size, steps, config.seed, rank(), world_size())
    keys = (share[i : i + size] for share in shares for i in range(0, len(share), size))
    micro_steps = math.ceil(config.batch_size / world_size() / size)
    cache = FRAME_CACHE // max(config.workers, 1)
    dataset = data.ReferringDataset(samples, processor, config.single_frame, config.seed, cache)
    batches = read_batches(dataset, keys, device, config.workers)
    held_out = data.ReferringDataset(val_samples, processor, cache_bytes=cache)
    bad = {tuple(line["places"][:2]) for line in read_jsonl(f"{config.out}/bad_samples.jsonl")}
    plan = f"{config.steps} steps of {config.batch_size} samples out of {len(samples)}"
    print0(f"{config.model}: {plan}, on {world_size()} x {device.type}")

    sigterms, num_sigterms = [], 0  # of this rank, and of all
    signal.signal(signal.SIGTERM, lambda *_: sigterms.append(True))
    progress = tqdm(steps, initial=first_step, total=config.steps, disable=rank() > 0)
    for step in progress:
        # Measure on held-out data what the steps before this one have learned.
        if config.val and step % config.val_every == 0:
            measure(model, held_out, config, step, sigterms)

        # ---- one step ----
        # Forward and backward. The DataLoader draws from torch's generator when it begins, so fetch the
        # batches first, then seed: dropout, if the backbone has any, draws from it, too.
        started = time.time()
        micro_batches = [next(batches) for _ in range(micro_steps)]
        torch.manual_seed(config.seed + 1_000_003 * (step * world_size() + rank()))
        loss_sum = backward(ddp_model, micro_batches)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Here the CPU waits for the GPU, once a step.
        loss_of_rank, norm_of_sum = torch.stack([loss_sum, norm]).tolist()

        # Sum what the ranks counted. SIGTERMs are among it, so that all ranks stop after the same step.
        errors = [error for batch in micro_batches for error in batch["errors"] if error is not None]
        supervised_tokens = sum(len(batch["targets"]) for batch in micro_batches)
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
        counts = np.array([loss_of_rank, supervised_tokens, tokens, len(sigterms)])
        counts, errors = zip(*gather_over_ranks((counts, errors)))
        loss_sum, supervised_tokens, tokens, num_sigterms = sum(counts).tolist()
        errors = sum(errors, [])
        leave_out(errors, bad, step, config, len(samples))

        # From sums to means, clip the gradient, and take one step of the optimizer.
        loss, grad_norm = (x / max(supervised_tokens, 1) for x in (loss_sum, norm_of_sum))
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            ids = [sample_id for batch in micro_batches for sample_id in batch["ids"]]
            found = f"loss {loss}, gradient norm {grad_norm}"
            raise SystemExit(f"stopped at step {step}: {found}; rank {rank()} had samples {ids}")
        scale = 1 / max(supervised_tokens, 1)
        if config.clip and grad_norm > config.clip:
            scale *= config.clip / grad_norm
        torch._foreach_mul_([p.grad for p in parameters], scale)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ---- end of the step ----

        # lr is the rate that --lr sets, or --region-lr if the region encoder alone learns.
        seconds = time.time() - started
        line = {
            "step": step,
            "epoch": step * config.batch_size / len(samples),
            "loss": loss,
            "lr": schedule(step, config) * (config.region_lr if config.train == "region" else config.lr),
            "grad_norm": grad_norm,
            "supervised_tokens": int(supervised_tokens),
            "tokens_per_s": tokens / seconds,
            "samples_per_s": (config.batch_size - len(errors)) / seconds,
        }
        log(config, "metrics.jsonl", line)
        progress.set_postfix(loss=loss)

        steps_done = step + 1
        if num_sigterms or (config.save_every and steps_done % config.save_every == 0):
            save_checkpoint(model, processor, optimizer, config, len(samples), steps_done)
        if num_sigterms:
            break

    if num_sigterms:
        print0(f"stopped by SIGTERM after {steps_done} steps, which are saved; --resume goes on")
    else:
        save_final(model, processor, config)
        if config.val:
            measure(model, held_out, config, config.steps, sigterms)
        final = f"{config.out}/final"
        print0(f"saved {final}; next: python eval.py data HELD_OUT.json --model {final} --out scores")
    if dist.is_initialized():
        # As the last owner of the process group, DDP would wait for gloo's threads while it holds
        # the GIL, which they need to free the tensors they sent.
        del ddp_model
        dist.barrier()
        dist.destroy_process_group()
    if num_sigterms:
        raise SystemExit(128 + signal.SIGTERM)


# ---- A first reading may end here. Below: building, ranks, held-out data, files, the check, options. ----
def fill_in_defaults(config, processor, num_samples):
    """Sets the options that are None. Raises DataError for those that do not fit."""
    parts = "region", "projector", "llm", "vision", "lora"
    defaults = DEFAULTS["tiny" if config.model == "tiny" else "pretrained"] | asdict(processor.settings)
    learn = set((config.train or defaults["train"]).split(","))
    fits = learn <= set(parts) and not {"llm", "lora"} <= learn  # matrices that learn need no adapters
    data.expect(fits, f"--train: names out of {','.join(parts)}, not both llm and lora", config.train)
    if "lora" in learn:
        defaults |= DEFAULTS["lora"]
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    largest_batch = min(16, num_samples)
    config.batch_size = config.batch_size or largest_batch - largest_batch % world_size()
    fits = config.batch_size > 0 and config.batch_size % world_size() == 0
    data.expect(fits, f"--batch-size: a multiple of the {world_size()} ranks", config.batch_size)
    if config.epochs is not None:
        # 1e-9: 1.1 * 10 is a bit more than 11.
        config.steps = math.ceil(config.epochs * num_samples / config.batch_size - 1e-9)
    config.val_every = config.val_every or config.steps
    if config.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        config.workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def build_model(config, processor, device):
    """Returns the model on the device, and AdamW's parameter groups."""
    torch.manual_seed(config.seed)
    model = models.load_model(config.model, processor)
    if config.lora_rank:
        model.add_lora(config.lora_rank)
    if config.grad_checkpoint:
        for layer in model.layers():  # only forward is replaced, so that FSDP's hooks stay outside
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if config.fsdp:
        shard(model, device)  # before the optimizer is made, because a sharded model has new parameters
    groups = choose_parameters(model, config)
    if device.type == "cuda" and not config.fsdp:  # FSDP cannot mix types
        halve_frozen(model)
    return model.to(device).train(), groups


def halve_frozen(model):
    """Keeps frozen weights in bfloat16 where it holds them exactly, as it does those of published models.

    Embeddings that grew by a row for the placeholder stay in float32, because that row is random.
    """
    for p in model.parameters():
        if not p.requires_grad and torch.equal(p.bfloat16().float(), p):
            p.data = p.data.bfloat16()


def shard(model, device):
    """--fsdp: shards the model in place (FSDP2). All ranks must then run the same layers in the same order.

    A rank keeps its share of each weight. The weights of a layer are gathered while it computes, those
    outside of layers (embeddings, mergers, region encoder) throughout a step. Layers move to the device one
    by one, so that it never holds the whole model.

    In CPU memory each rank loads a whole model first, 4 bytes a weight, and saving gathers 12 bytes a trained
    weight on rank 0. Gradients are exchanged after each micro-batch: have few large ones.
    """
    # The inputs are not cast, because autocast handles them, and positions in time need float32.
    dtype = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in [*model.layers(), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


# ---- ranks ----
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text):
    if rank() == 0:
        tqdm.write(text)


def init_distributed(name):
    """Joins the ranks that torchrun started, if it did. Returns this rank's torch.device."""
    exists = name == "cpu" or (name == "cuda" and torch.cuda.is_available())
    data.expect(exists, "--device: cpu, or cuda where there is one", name)
    # Each tensor that a worker hands over is an open file, of which often only 1024 are allowed.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if "RANK" in os.environ:
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if name == "cuda" else None
        if gpu:
            torch.cuda.set_device(gpu)
        # While rank 0 writes a checkpoint, the others may wait longer than the default of 10 minutes.
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2), device_id=gpu)
    return torch.device(name)


def gather_over_ranks(value):
    """Returns the values of all ranks, on every rank. Every rank must call it."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def shared_out(keys, batch_size):
    """Deals a list of keys out to the ranks. Returns this rank's batches, lists of batch_size keys at most.

    All ranks have as many, though some may be empty: FSDP needs as many forward passes of each rank.
    """
    share = keys[rank() :: world_size()]
    num_batches = math.ceil(len(keys) / world_size() / batch_size)
    return [share[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]


@contextmanager
def errors_in_one_line():
    """Ends the program with one line for an error that the user can mend, and leaves no worker behind."""
    try:
        yield
    except (data.DataError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):  # of its workers
            raise
        raise SystemExit(f"error: {error}") from None
    finally:
        # Workers ignore the SIGTERM that Python sends them at its end, and it would wait for them for ever.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each
        for worker in multiprocessing.active_children():
            worker.kill()


def leave_out(errors, bad, step, config, num_samples):
    """Prints the errors of samples that are not yet in bad, a set of (file, sample), writes them to
    OUT/bad_samples.jsonl, and adds the samples to bad. (A resumed run goes on counting.) Too many end the
    run. All ranks have the same errors.
    """
    for error in errors:
        reason, *places = error.args  # what follows on file and sample can change with the epoch
        if tuple(places[:2]) not in bad:
            bad.add(tuple(places[:2]))
            print0(f"left out: {error}")
            log(config, "bad_samples.jsonl", {"step": step, "places": places, "reason": reason})
    if len(bad) > config.max_bad * num_samples:
        found = f"{len(bad)} of {num_samples} samples cannot be used, more than --max-bad {config.max_bad:g}"
        raise SystemExit(f"stopped: {found}; see {config.out}/bad_samples.jsonl")


# ---- held-out data ----
@torch.no_grad()
def mean_loss(model, dataset, batch_size, workers, sigterms=()):
    """Returns the cross-entropy of the right answers: the mean over all supervised tokens of all ranks.

    dataset: a data.ReferringDataset. Raises data.DataError if a sample is bad, on all ranks. sigterms: once
    a rank has one, all give up and return None.
    """
    keys = shared_out([(0, i) for i in range(len(dataset))], batch_size)
    loss_sum, tokens, errors = 0.0, 0, []
    batches = read_batches(dataset, keys, next(model.parameters()).device, workers)
    for batch in tqdm(batches, "loss", len(keys), leave=False, disable=rank() > 0):
        loss_sum += model(batch).item()
        tokens += len(batch["targets"])
        errors += filter(None, batch["errors"])
        if any(gather_over_ranks(bool(sigterms))):
            return None
    loss_sums, tokens, errors = zip(*gather_over_ranks((loss_sum, tokens, errors)))
    for error in sum(errors, []):
        raise error
    return sum(loss_sums) / sum(tokens)


def measure(model, held_out, config, step, sigterms):
    """Logs the loss on held-out data, unless a SIGTERM comes. Every rank must call it.

    Training does not notice, because the random numbers of a step begin at a seed of its own.
    """
    model.eval()
    loss = mean_loss(model, held_out, config.micro_batch, config.workers, sigterms)
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()  # after a forward pass, it keeps weights for a backward pass
    if loss is not None:
        print0(f"after {step} steps: val_loss {loss:.4f}")
        log(config, "metrics.jsonl", {"step": step, "val_loss": loss})


# ---- files ----
@contextmanager
def atomic_write(path):
    """Yields a temporary path beside path, at which the caller writes a file or makes a folder.

    It is then renamed, so that path appears whole or not at all. What a kill leaves is overwritten next time.
    """
    temporary = f"{os.path.abspath(path)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with data.readable("a file that can be written", os.fspath(path), errors=(OSError, SafetensorError)):
            try:
                yield temporary
            except RuntimeError as error:  # of torch.save, which does not say what the disk said
                disk = error.__context__
                raise (disk if isinstance(disk, OSError) else error) from None
        if os.path.isdir(temporary):
            os.sync()  # a checkpoint must outlive a power cut
        os.replace(temporary, path)
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif os.path.exists(temporary):
            os.remove(temporary)


def append_jsonl(path, line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_jsonl(path):
    """Returns the lines of a file that append_jsonl wrote, or none if there is no such file.

    A last line that a kill cut short is left out.
    """
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def write_jsonl(path, lines):
    """Replaces a file. A kill leaves the old lines or the new ones, and none that is cut short."""
    with atomic_write(path) as temporary, open(temporary, "w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


def log(config, name, line):
    if rank() == 0:
        append_jsonl(f"{config.out}/{name}", line)


def checkpoints(out):
    """Returns the folders of the checkpoints in OUT, oldest first."""
    found = [path.parent for path in Path(out).glob(f"step-*/{models.CHECKPOINT}")]
    found = [path for path in found if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def prepare_out(config, first_step):
    """Writes OUT/config.json, and removes what a killed run has logged for steps that will be done again."""
    if rank() == 0:
        os.makedirs(config.out, exist_ok=True)
        for path in (f"{config.out}/metrics.jsonl", f"{config.out}/bad_samples.jsonl"):
            if os.path.exists(path):
                write_jsonl(path, [line for line in read_jsonl(path) if line["step"] < first_step])
        write_jsonl(f"{config.out}/config.json", [asdict(config)])
    gather_over_ranks(None)  # the others wait for rank 0


def save_final(model, processor, config):
    """Writes OUT/final: the whole model, adapters merged. Every rank must call it."""
    weights, _ = get_state_dict(model, (), options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        with atomic_write(f"{config.out}/final") as folder:
            model.save_pretrained(folder, processor, weights)


def save_checkpoint(model, processor, optimizer, config, num_samples, steps_done):
    """Writes OUT/step-NNNNNN: what has been learned, and the optimizer's state, but no frozen weights. The
    files do not depend on the number of ranks, nor on --fsdp. Every rank must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    # ignore_frozen_params leaves a frozen weight's second name in (an lm_head that shares the embeddings).
    for name, p in model.named_parameters(remove_duplicate=False):
        if not p.requires_grad:
            weights.pop(name, None)
    if rank() > 0:
        return
    is_folder = config.model != "tiny" and os.path.exists(config.model)
    base = os.path.abspath(config.model) if is_folder else config.model
    ckpt = {"step": steps_done, "samples": num_samples, "model": weights, "optimizer": moments}
    with atomic_write(f"{config.out}/step-{steps_done:06}") as folder:
        processor.save_pretrained(folder)
        ckpt["config"] = asdict(config) | {"model": base}
        with open(f"{folder}/{models.CHECKPOINT}", "wb") as file:  # whose errors say what is wrong
            torch.save(ckpt, file)
    for folder in checkpoints(config.out)[: -config.keep]:
        os.remove(folder / models.CHECKPOINT)  # first, so that a kill leaves nothing that looks whole
        shutil.rmtree(folder)


def read_checkpoint(config, num_samples, num_val_samples):
    """Returns (folder, content) of the checkpoint to resume, or (None, None). Raises DataError if the data or
    the ranks do not fit.
    """
    path, ckpt = None, None
    if config.resume and checkpoints(config.out):
        path = str(checkpoints(config.out)[-1])
        with data.readable("a whole checkpoint", path, errors=models.MODEL_ERRORS):
            # With mmap, the ranks of a machine share the memory that it is read into.
            ckpt = torch.load(f"{path}/{models.CHECKPOINT}", "cpu", weights_only=True, mmap=True)
        data.expect(ckpt["samples"] == num_samples, f"{ckpt['samples']} samples, as before", num_samples)
        print0(f"resumed: {path}")
    # On disks of their own, ranks would see other files, and wait for each other for ever.
    seen = gather_over_ranks((ckpt and ckpt["step"], num_samples, num_val_samples))
    data.expect(len(set(seen)) == 1, "the same checkpoint, samples and --val samples on all ranks", seen)
    return path, ckpt


def load_checkpoint(model, optimizer, ckpt):
    """Each rank reads the whole of what save_checkpoint wrote, and takes its share."""
    missing = {name for name, p in model.named_parameters() if p.requires_grad} - ckpt["model"].keys()
    data.expect(not missing, "a checkpoint with all weights that learn", f"none for {sorted(missing)}")
    state = {"model_state_dict": ckpt["model"], "optim_state_dict": ckpt["optimizer"]}
    options = StateDictOptions(full_state_dict=True, strict=False)  # frozen weights are not in it
    set_state_dict(model, optimizer, **state, options=options)


# ---- python train.py --check ----
def facts_of(encoded):
    """What --check tells of a sample as the run uses it, {statistic: value}, or its DataError."""
    if isinstance(encoded, data.DataError):
        return encoded
    most_frames = max(encoded["object_frames"], default=0)
    regions = ("no regions", "regions on one frame", "regions on several frames")[min(most_frames, 2)]
    facts = {"kinds": f"{encoded['kind'] or 'text only'}, {regions}"}
    facts |= {"tokens": len(encoded["input_ids"]), "objects": len(encoded["object_frames"])}
    info = encoded["info"]
    if info:
        facts |= {"sizes": f"{info.width}x{info.height}", "frames": info.num_frames}
    return facts


def check(config, samples, processor):
    """Reads all samples as the run with these options would, and prints what it finds. Raises SystemExit if a
    sample is bad.
    """
    dataset, usable = data.ReferringDataset(samples, processor, cache_bytes=1 << 20), []
    facts, problems = defaultdict(list), defaultdict(list)
    keys = [(0, i) for i in range(len(samples))]
    options = {"num_workers": config.workers, "timeout": HANGING if config.workers else 0}
    loader = DataLoader(dataset, None, sampler=keys, collate_fn=facts_of, **options)
    with open(config.problems or os.devnull, "w", buffering=1) as file:
        for i, found in enumerate(tqdm(loader, "check", unit="sample", leave=False)):
            if isinstance(found, data.DataError):
                reason, *places = found.args
                kind = re.sub("[0-9]+", "#", reason.split(", found")[0])  # problems alike up to numbers
                problems[kind].append(str(found))
                file.write(json.dumps({"places": places, "reason": reason}) + "\n")
            else:
                usable.append(i)
                for name, value in found.items():
                    facts[name].append(value)
    print(f"{len(samples)} samples, {len(usable)} of them right")
    for name, values in facts.items():
        if isinstance(values[0], str):
            print(f"{name}: " + "; ".join(f"{value} {n}" for value, n in Counter(values).most_common(8)))
        else:
            print(f"{name}: min {min(values)}, median {sorted(values)[len(values) // 2]}, max {max(values)}")
    for kind, errors in sorted(problems.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(errors)} x {kind}", *errors[:3], sep="\n    ")
    if config.preview and usable:
        with_objects = [i for i in data.evenly(usable, 200) if samples[i].objects]
        preview(dataset, data.evenly(with_objects or usable, 5), config.preview)
    if problems:
        raise SystemExit(1)


def preview(dataset, sample_indices, path, frames_shown=3):
    """Draws samples to a PNG file: the conversation, some annotated frames with their objects, and for each
    object what the vision tower sees of it there, its cells as bright as they are covered.
    """
    rows = []
    for i in sample_indices:
        sample, numbers = dataset.samples[i], count(1)
        names = [*sample.place, data.media_name(sample.media or "text only")]
        lines = [", ".join(dict.fromkeys(names))]  # ask has the media as its place
        for question, answer in sample.turns:
            question = re.sub(data.REGION_TAG, lambda tag, n=numbers: f"<region {next(n)}>", question)
            lines.append(f"Q: {question}  A: {answer}")
        text = "\n".join(textwrap.fill(" ".join(line.split()), 150) for line in lines)
        with data.within(*sample.place):
            rows.append((text, _tiles(dataset, sample, frames_shown) if sample.media else []))
    draw(rows, path)


def _tiles(dataset, sample, frames_shown):
    """Returns (title, picture, masks) tiles: frames, and behind each its objects' views (masks: None)."""
    media, tiles = dataset.media_of(sample), []
    objects = dataset.choose_objects(sample, media.info, np.random.default_rng(0))
    frames = data.evenly(sorted(set().union(*objects)) or [0], frames_shown)
    for frame, picture in media.read(frames).items():
        masks_here = {k: masks[frame] for k, masks in enumerate(objects) if frame in masks}
        tiles.append((f"frame {frame}", picture, masks_here))
        for k, mask in masks_here.items():
            view, cells = dataset.region_view(frame, mask, media.info)
            top, bottom, left, right = view.part
            part = np.asarray(Image.fromarray(picture[top:bottom, left:right]).resize(view.size[::-1]))
            light = np.kron(0.15 + 0.85 * cells / cells.max(), np.ones((dataset.processor.factor,) * 2))
            tiles.append((f"what the tower sees of {k + 1}", np.uint8(part * light[:, :, None]), None))
    return tiles


def draw(rows, path):
    """Draws rows of a text and (title, picture, masks) tiles to a PNG file, and prints its path.

    masks: {object: mask} to outline and number on a picture with a scale of pixels; None: the picture alone.
    """
    from matplotlib.figure import Figure  # takes a second, which each run would wait for

    columns = min(6, max(len(tiles) for _, tiles in rows) or 1)
    parts, heights = [], []  # (text, tiles, their relative widths), and inches
    for text, tiles in rows:
        for start in range(0, len(tiles) or 1, columns):
            shown = tiles[start : start + columns]
            widths = [1 if masks is None else 2 for _, _, masks in shown] + [1] * (columns - len(shown))
            parts.append((text if start == 0 else "", shown, widths))
            tallest = max([w * len(tile[1]) / tile[1].shape[1] for w, tile in zip(widths, shown)], default=0)
            heights.append(0.6 + 0.2 * text.count("\n") + min(10, 14 * tallest / sum(widths)))
    figure = Figure((14, sum(heights)), layout="constrained")
    subfigures = figure.subfigures(len(parts), height_ratios=heights, squeeze=False)[:, 0]
    for (text, tiles, widths), part in zip(parts, subfigures):
        part.suptitle(text, x=0, ha="left", fontsize=9, parse_math=False)
        axes = part.subplots(1, columns, squeeze=False, width_ratios=widths)[0]
        for ax in axes[len(tiles) :]:
            ax.set_axis_off()
        for ax, (title, picture, masks) in zip(axes, tiles):
            height, width, _ = picture.shape
            ax.imshow(picture, extent=(0, width, height, 0))
            ax.set_title(title, fontsize=8)
            ax.tick_params(labelsize=6)
            if masks is None:
                ax.set_axis_off()
                continue
            for k, mask in masks.items():
                inside, colour = data.coverage(mask, height, width), f"C{k % 10}"
                if min(height, width) > 1:
                    middles = np.arange(width) + 0.5, np.arange(height) + 0.5
                    ax.contour(*middles, inside, [min(0.5, inside.max() / 2)], colors=colour, linewidths=1.5)
                top, _, left, _ = data.mask_bounds(inside > 0)
                place = left, max(top, height // 8)
                ax.text(*place, k + 1, color="white", backgroundcolor=colour, fontsize=7, va="bottom")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    print(f"drawn: {path}")


# ---- command line ----
def parse(argv=None):
    """Returns the Config of a command line, or exits with a message on a wrong option."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, list[str]: {"nargs": "+"}}
    for f in fields(Config):
        if f.metadata["group"]:
            add = parser.add_argument_group(f.metadata["group"]).add_argument
        kind = kinds.get(f.type, {"type": f.type})
        defaults = [f"{values[f.name]} if {who}" for who, values in DEFAULTS.items() if f.name in values]
        default = ", ".join(defaults) if defaults else f.default
        shown = "" if default in (None, False) else f" (default: {default})"
        name = "--" + f.name.replace("_", "-")
        # SUPPRESS: what is not given is not in `given` either.
        add(name, help=f.metadata["help"] + shown, default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    for f in fields(Config):
        if f.type not in (int, float) or f.name not in given:
            continue
        least = 0 if f.type is float or f.name in ("warmup", "workers", "seed", "window") else 1
        most = 1 if f.name in ("single_frame", "max_bad") else math.inf
        value = given[f.name]
        if not (least <= value <= most and value < math.inf):  # or NaN
            expected = f"a number from {least}" + (" to 1" if most == 1 else "")
            parser.error(f"--{f.name.replace('_', '-')}: expected {expected}, found {value}")
    return open_run(given)


def open_run(given):
    """Returns the Config of the given options, {name: value}, and with --resume of OUT/config.json.

    A folder holds one run, so that none is lost or mixed with another. Raises DataError otherwise.
    """
    config = Config(**given)
    names = ("final", "config.json", "metrics.jsonl")
    found = [name for name in names if os.path.exists(f"{config.out}/{name}")]
    found += [path.name for path in checkpoints(config.out)]
    if not config.check:
        data.expect("final" not in found, f"--out {config.out}: a folder without a finished run", found)
        data.expect(config.resume or not found, f"--out {config.out}: a new folder, or --resume", found)
    if config.resume and "config.json" in found:
        [saved] = read_jsonl(f"{config.out}/config.json")
        for name in given.keys() - MAY_CHANGE:
            same = f"--{name.replace('_', '-')} {saved[name]}, as in the run that is resumed"
            data.expect(given[name] == saved[name], same, given[name])
        config = Config(**saved | given | {"out": config.out})
    data.expect(config.data, "--data: files to learn from", config.data)
    learn = config.train or DEFAULTS["tiny" if config.model == "tiny" else "pretrained"]["train"]
    is_used = {"lr": learn != "region", "region_lr": "region" in learn, "lora_rank": "lora" in learn}
    is_used |= {"val_every": config.val, "preview": config.check, "problems": config.check}
    for name, used in is_used.items():
        unused = f"no {name}, which nothing here uses (see --train, --val and --check)"
        data.expect(used or name not in given, unused, given.get(name))
    for path in filter(None, (config.preview, config.problems)):
        data.expect(os.path.isdir(os.path.dirname(os.path.abspath(path))), "a folder that exists", path)
    return config


if __name__ == "__main__":
    with errors_in_one_line():
        train(parse())
