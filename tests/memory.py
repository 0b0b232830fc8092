"""How much GPU memory a rank needs, by formula: nothing is allocated, and nothing is measured.

    python tests/memory.py

Bytes a weight during a step, all but the activations:

    DDP    trained: 18 (weight, gradient and two moments in float32; autocast's copy in bfloat16)
           frozen:   2 (bfloat16)
    FSDP   trained: 16 / ranks, frozen: 4 / ranks (float32)
           and in bfloat16, 2: what is outside of layers (embeddings, mergers, region encoder), which stays
           gathered, its gradients if it learns, and two layers, one of which is gathered ahead
"""

import os
import sys
from types import SimpleNamespace

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))

import torch  # noqa: E402
from bench_step import SIZES, published_config  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402

import model as models  # noqa: E402

RANKS = 8
TRAIN = ("region", "region,lora", "region,projector,llm,vision")


def build(size):
    """Returns the ReferringVideoLLM of a published size, whose weights have shapes but no memory."""
    images = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with torch.device("meta"):
        backbone = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**published_config(size)))
        processor = SimpleNamespace(region_token_id=0, image_processor=images)
        return models.ReferringVideoLLM(backbone, processor)


def numel(parameters):
    return sum(p.numel() for p in parameters)


def bytes_by_formula(size, train, ranks=RANKS):
    """Returns (bytes of a rank with DDP, bytes of a rank with FSDP on so many ranks)."""
    model = build(size)
    if "lora" in train:
        model.add_lora(16)
    groups = model.parameter_groups()
    learns = {id(p) for name in train.split(",") for p in groups[name]}
    everything = list(model.parameters())
    trained = numel(p for p in everything if id(p) in learns)
    frozen = numel(everything) - trained

    layers = [list(layer.parameters()) for layer in model.layers()]
    in_layers = {id(p) for parameters in layers for p in parameters}
    outside = [p for p in everything if id(p) not in in_layers]
    gathered = numel(outside) + numel(p for p in outside if id(p) in learns)
    gathered += 2 * max(numel(parameters) for parameters in layers)
    return 18 * trained + 2 * frozen, (16 * trained + 4 * frozen) / ranks + 2 * gathered


def main():
    print(f"| GB of a rank | --train | DDP | FSDP on {RANKS} |\n|---|---|---|---|")
    for size in SIZES:
        for train in TRAIN:
            ddp, fsdp = (n / 1e9 for n in bytes_by_formula(size, train))
            print(f"| Qwen3-VL-{size.upper()} | {train} | {ddp:.1f} | {fsdp:.1f} |")


if __name__ == "__main__":
    main()
