"""A row of samples without padding against the samples one at a time, in a model of transformers that nobody
has touched: its own attention, position ids, and division of the vision tower's patches into frames."""

import contextlib
import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from simulated_gpu import SimulatedGPU, to_cpu
from test_model import checkpoint, dataset, give_regions_weight, loaded, merged_by_hand, world  # noqa: F401
from transformers import AutoModelForImageTextToText

import data
import model as models

# Regions on several frames, an image, text, a video, a region of an image, a region on one frame of a video.
KINDS = [4, 1, 0, 2, 5, 3]


def pixels(patches, processor, repeat):
    """As transformers' image processor makes them of uint8 patches (test_model.py compares them with it)."""
    images = processor.image_processor
    mean, std = (np.array(x)[:, None] for x in (images.image_mean, images.image_std))
    values = (patches.reshape(len(patches), 3, -1) / 255 - mean) / std
    return torch.from_numpy(np.tile(values, repeat).reshape(len(patches), -1)).float()


def plain_inputs(encoded, processor):
    """The arguments of a plain model of transformers for an encoded sample."""
    config, ids = processor.config, torch.from_numpy(encoded["input_ids"])[None]
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id)
    inputs = {"input_ids": ids, "labels": torch.from_numpy(encoded["labels"])[None]}
    inputs["mm_token_type_ids"] = kinds.int()
    if encoded["kind"] == "image":
        inputs["pixel_values"] = pixels(encoded["still_patches"][0], processor, processor.temporal_patch_size)
        inputs["image_grid_thw"] = torch.tensor([encoded["prompt_grid"]])
    if encoded["kind"] == "video":
        inputs["pixel_values_videos"] = pixels(encoded["video_patches"], processor, 1)
        inputs["video_grid_thw"] = torch.tensor([encoded["prompt_grid"]])
        if not processor.timestamps:
            inputs["second_per_grid_ts"] = torch.tensor([encoded["seconds_per_pair"]])
    return inputs


def region_tokens(plain, encoder, encoded, processor):
    """The tokens (T, D) of a sample's regions, from a plain model's vision tower, one picture at a time."""
    pooled = []
    for weights, i in zip(encoded["coverage"], encoded["region_still"]):
        still = pixels(encoded["still_patches"][i], processor, processor.temporal_patch_size)
        grid = torch.tensor([(1, *encoded["still_grids"][i])])
        cells = plain.model.visual(still, grid_thw=grid).pooler_output
        weights = torch.from_numpy(weights).double()
        pooled.append((weights @ cells.double() / weights.sum()).float())
    pooled = torch.stack(pooled)
    share = merged_by_hand(pooled.tolist(), encoded["object_frames"], encoded["region_tokens"])
    share = torch.tensor(share, dtype=torch.float64)
    boxes = torch.tensor(encoded["boxes"], dtype=torch.float64)
    merged, boxes = (share @ pooled.double()).float(), (share @ boxes).float()
    return merged + encoder.mlp(merged) + encoder._position(boxes)


def plain_loss(plain, encoder, encoded, processor):
    """What `model(**inputs, labels=labels).loss` makes of a sample, summed over its supervised tokens."""
    inputs = plain_inputs(encoded, processor)
    is_region = inputs["input_ids"] == processor.region_token_id

    def put_regions(module, args, embeddings):
        if is_region.any():
            embeddings = embeddings.clone()
            embeddings[is_region] = region_tokens(plain, encoder, encoded, processor)
        return embeddings

    with plain.get_input_embeddings().register_forward_hook(put_regions):
        loss = plain(**inputs).loss
    return loss * (encoded["labels"] != data.IGNORE_INDEX).sum()


@pytest.mark.parametrize("window", [0, 2])
def test_a_row_learns_as_transformers_one_sample_at_a_time(checkpoint, loaded, world, window):  # noqa: F811
    model, processor = loaded
    give_regions_weight(model)
    processor.settings = replace(processor.settings, window=window)
    ds = dataset(world, processor)
    samples = [ds[0, i] for i in KINDS]
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    encoder = copy.deepcopy(model.region_encoder)
    losses = torch.stack([plain_loss(plain, encoder, encoded, processor) for encoded in samples])
    losses.sum().backward()
    expected = {"backbone." + name: p.grad for name, p in plain.named_parameters()}
    expected |= {"region_encoder." + name: p.grad for name, p in encoder.named_parameters()}

    loss = model(data.collate(samples, processor))
    loss.backward()
    assert loss.item() == pytest.approx(losses.sum().item(), rel=2e-6)
    for number, encoded, expected_loss in zip(KINDS, samples, losses.tolist()):
        with torch.no_grad():
            alone = model(data.collate([encoded], processor))
        assert alone.item() == pytest.approx(expected_loss, rel=2e-6), number
    found = {name: p.grad for name, p in model.named_parameters()}
    # All gradients together come to 0.5e-6 to 2.2e-6 (Qwen3.5), those of a single parameter to 3e-6 at most.
    assert relative_error(*(join(gradients, found) for gradients in (found, expected))) < 3e-6
    for name in found:
        assert relative_error(found[name], expected[name]) < 1e-5, name


def join(gradients, names):
    return torch.cat([gradients[name].flatten() for name in names])


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_what_a_sample_reads_changes_no_other_sample_of_its_row_by_a_bit(loaded, world):  # noqa: F811
    """Other words, pixels and masks of the same number between two samples, whose logits stay as they are. In
    a mixture of experts all samples of a row share the matrix products, and so their rounding."""
    model, processor = loaded
    give_regions_weight(model)
    tolerance = 1e-5 if hasattr(processor.config.text_config, "num_experts") else 0
    ds, rng = dataset(world, processor), np.random.default_rng(0)
    letters = processor.tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])
    for number in (1, 2, 4, 5):
        before, other, after = ds[0, 3], ds[0, number], ds[0, 5]
        changed = copy.deepcopy(other)
        is_letter = np.isin(other["input_ids"], letters)
        changed["input_ids"][is_letter] = rng.choice(letters, is_letter.sum())
        for patches in [*changed["still_patches"], changed["video_patches"]]:
            if patches is not None:
                patches[:] = rng.integers(0, 256, patches.shape)
        for cells in changed["coverage"]:
            cells[:] = rng.random(cells.shape)
        changed["boxes"] = [tuple(rng.random(5)) for _ in changed["boxes"]]
        with torch.no_grad():
            one, two = (
                model.logits(data.collate([before, sample, after], processor))[0]
                for sample in (other, changed)
            )
        first, last = len(before["input_ids"]), len(after["input_ids"])
        for rows in (slice(first), slice(-last, None)):
            torch.testing.assert_close(one[rows], two[rows], rtol=tolerance, atol=tolerance)
        assert is_letter.any() and not torch.equal(one[first:-last], two[first:-last])


# ---- attention


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [[7], [1, 1], [4, 4, 4, 1, 6, 6, 2], [1, 5, 1, 1, 5], [3, 0, 0, 2]])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_within_samples_is_that_with_a_block_mask(lengths, is_causal, heads, key_heads, on_gpu):
    """Truth: softmax in float64 over all pairs of tokens, but those of two samples. Also its gradients."""
    torch.manual_seed(0)
    L, size, scale = sum(lengths), 8, 0.3
    query, key, value = (
        torch.randn(1, n, L, size, requires_grad=True) for n in (heads, key_heads, key_heads)
    )
    grad = torch.randn(1, L, heads, size)

    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    visible = sample[:, None] == sample
    if is_causal:
        visible &= torch.arange(L)[:, None] >= torch.arange(L)
    group = heads // key_heads
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query.double() @ k.mT * scale).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad.double())

    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    arguments = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    if not is_causal:  # as the vision tower says; else it is as the module, here the LLM's, says
        arguments["is_causal"] = False
    inputs, llm_layer = (query, key, value), SimpleNamespace(is_causal=True)
    with SimulatedGPU(exact=True) if on_gpu else contextlib.nullcontext() as gpu:
        if on_gpu:
            *inputs, grad = (x.detach().to(gpu.device) for x in (query, key, value, grad))
            inputs = [x.requires_grad_() for x in inputs]
            arguments["cu_seq_lens_q"] = bounds.to(gpu.device)
        found, _ = models.attention_within_samples(llm_layer, *inputs, None, scale, **arguments)
        found_grads = torch.autograd.grad(found, inputs, grad)
    torch.testing.assert_close(to_cpu(found).double(), expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(found_grads, expected_grads):
        torch.testing.assert_close(to_cpu(one), other, atol=1e-5, rtol=1e-5)
