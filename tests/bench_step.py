"""Prints what a training step costs, beside the plain loop: `python tests/bench_step.py DATA.json [OPTIONS]`.

OPTIONS are those of train.py (--model, --train, --batch-size, --micro-batch, --device ...). "ours" is the
step of train.py: micro-batches of similar length, logits for supervised tokens alone, a fused optimizer.
"plain" is what most training scripts do: one batch padded to the longest sample, and the loss that
`model(**batch, labels=labels).loss` computes in transformers, from float32 logits at every position. Both
learn the same from the same samples (tests/test_train.py compares their gradients). The data are read before
the clock starts.
"""

import os
import statistics
import sys
import time

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

STEPS = 4  # different steps, each of other samples
ROUNDS = 6  # how often both ways run all of them; the first round only warms up


def plain_backward(model, batch, device):
    """The gradient of one padded batch, as `model(**batch, labels=labels).loss.backward()` makes it."""
    batch = data.to_device(batch, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model.logits(batch).float()
    labels = batch["labels"][:, 1:].flatten()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=data.IGNORE_INDEX).backward()


def our_backward(model, batches, device):
    train.backward(model, batches, sum(batch["supervised_tokens"] for batch in batches), device)


def encode_steps(config, samples, processor):
    """Returns (micro-batches of train.py, one padded batch) for each of STEPS steps."""
    dataset = data.ReferringDataset(samples, processor, config.single_frame, config.seed)
    pad = processor.tokenizer.pad_token_id
    steps = []
    for keys in train.Order(len(samples), config.batch_size, STEPS, config.seed, rank=0, world_size=1):
        encoded = [dataset[key] for key in keys]
        micro_batches = train.split_into_micro_batches(encoded, config.micro_batch, pad)
        steps.append((micro_batches, data.collate(encoded, pad)))
    return steps


def main(arguments):
    config = train.parse(["--data", *arguments])
    device = torch.device(config.device)
    samples = data.read_samples(config.data, config.media, config.outside_paths)
    model, processor = train.build(config, samples)
    groups = train.choose_parameters(model, config)
    model.to(device).train()
    parameters = [p for group in groups for p in group["params"]]
    steps = encode_steps(config, samples, processor)

    # The learning rate is 0, so that all rounds do the same work.
    optimizers = {
        "ours": torch.optim.AdamW(parameters, lr=0.0, fused=True),
        "plain": torch.optim.AdamW(parameters, lr=0.0),
    }
    seconds = {way: [] for way in optimizers}
    peak_memory = dict.fromkeys(optimizers, 0)
    for round_index in range(ROUNDS):
        for way, optimizer in optimizers.items():
            for micro_batches, padded_batch in steps:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                if way == "ours":
                    our_backward(model, micro_batches, device)
                else:
                    plain_backward(model, padded_batch, device)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    peak_memory[way] = max(peak_memory[way], torch.cuda.max_memory_allocated())
                if round_index > 0:
                    seconds[way].append(time.perf_counter() - start)

    tokens = statistics.mean(int(batch["attention_mask"].sum()) for _, batch in steps)
    print(f"a step of {config.batch_size} samples on {device.type}: medians of {len(seconds['ours'])} steps")
    for way in seconds:
        median = statistics.median(seconds[way])
        line = f"{way:>6}: {1000 * median:8.1f} ms, {tokens / median:9.0f} tokens/s"
        print(line + (f", {peak_memory[way] / 1e9:.2f} GB" if device.type == "cuda" else ""))
    ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["ours"])
    print(f"ours is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main(sys.argv[1:])
