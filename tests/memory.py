"""How much GPU memory a rank needs, and how long a stage takes, by formula: nothing is measured.

    python tests/memory.py

Bytes a weight during a step, all but the activations:

    DDP    trained: 18 (weight, gradient and two moments in float32; autocast's copy in bfloat16)
           frozen:   2 (bfloat16)
    FSDP   trained: 16 / ranks, frozen: 4 / ranks (float32)
           and in bfloat16, 2: what is outside of layers (embeddings, mergers, region encoder), which stays
           gathered, its gradients if it learns, and two layers, one of which is gathered ahead

Operations for each weight and each token or patch: 2 in the forward pass, 2 to hand the gradient back if
anything in front of this weight learns, and 2 for the weight's own gradient if it learns. Attention and
adapters are left out, and nothing is computed twice, as --grad-checkpoint does.
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
TRAIN = ("region", "region,lora", "region,projector,llm", "region,projector,llm,vision")

# A sample: a video of which 8 frames are in the prompt, an object on 8 frames, 384 x 384 pixels each; text.
PATCHES_OF_PICTURE, CELLS_OF_PICTURE = (384 // 16) ** 2, (384 // 32) ** 2
PATCHES, TOKENS = (8 // 2 + 8) * PATCHES_OF_PICTURE, 8 // 2 * CELLS_OF_PICTURE + 200
SPEED = 0.4 * 989e12  # operations a second: 40 %, an assumption, of an H100's bfloat16
SAMPLES = 100_000


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


def operations(size, train):
    """Returns how many operations (additions and multiplications) a sample takes in training."""
    backbone, trains = build(size).backbone.model, train.split(",")
    blocks = numel(backbone.visual.blocks.parameters())
    mergers = numel(backbone.visual.parameters()) - blocks  # which see four patches as one
    vision, llm = blocks + mergers / 4, numel(backbone.language_model.layers.parameters())
    # The region tokens come before the LLM, so that it hands their gradient back whatever learns.
    return PATCHES * vision * (6 if "vision" in trains else 2) + TOKENS * llm * (6 if "llm" in trains else 4)


def main():
    print(f"| --train | DDP, GB | FSDP on {RANKS}, GB | hours for {SAMPLES:,} samples |\n|---|---|---|---|")
    for size in SIZES:
        for train in TRAIN:
            ddp, fsdp = (n / 1e9 for n in bytes_by_formula(size, train))
            hours = SAMPLES * operations(size, train) / (RANKS * SPEED) / 3600
            print(f"| {size.upper()}: {train} | {ddp:.1f} | {fsdp:.1f} | {hours:.2f} |")


if __name__ == "__main__":
    main()
