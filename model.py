"""The model: a pretrained video LLM, unchanged, that reads region tokens in place of `<region>` placeholders.

    video patches --vision tower--> cells ---------------------------------> the video's tokens --.
    still patches --vision tower--> cells --masked_average_pool--> one vector for each region frame |
                                        |      `--temporal_merge--> at most u for each object       |--> LLM
                                        |            `--RegionEncoder--> region tokens -------------|
                                        `----------------------------------> an image's tokens -----|
    text ----embedding-------------------------------------------------------> the other tokens ----'

`ReferringVideoLLM` takes the batch that data.collate makes. The backbone's own vision tower encodes annotated
frames as still images. Their cells have passed its patch merger, so the average of a region's cells is a
vector that the LLM already understands, and initially a region token is that average. Without regions the
logits equal those of the plain backbone.

A batch to learn from is one row of tokens, in which attention stays within each sample. So nothing is padded,
and samples of any lengths go together. `pack` teaches a backbone of transformers to read such a row.

    processor = load_processor("Qwen/Qwen3-VL-2B-Instruct")  # or a folder that train.py wrote, or "tiny"
    model = load_model("Qwen/Qwen3-VL-2B-Instruct", processor)
    loss = model(batch)  # summed over the supervised tokens
    answers = model.generate(batch, model.end_token_ids(processor.tokenizer))
"""

import json
import os
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

import data
from kernels import masked_average_pool

SETTINGS_FILE = "nanorefer.json"  # how media became tokens while the model in this folder was trained
REGION_WEIGHTS = "region_encoder.safetensors"  # beside the backbone's own files
LORA_WEIGHTS = "lora.safetensors"  # beside them, too, in a checkpoint of a run that trains adapters
LORA_SCALE = 2.0  # of B A; peft calls it alpha / rank


# ---- The video LLM with regions ----


class ReferringVideoLLM(nn.Module):
    """A Qwen3.5, Qwen3-VL or Qwen2.5-VL of transformers, computing what it always did, and a RegionEncoder.

    Shapes: rows of L tokens (one to learn from, B for generation), width D of the LLM, vocabulary V.
    """

    def __init__(self, backbone, processor):
        super().__init__()
        self.backbone = backbone
        self.lora_rank = None
        self.region_token_id = processor.region_token_id
        # Published checkpoints have more embedding rows than tokens, so most of them need not grow.
        if self.region_token_id >= backbone.get_input_embeddings().num_embeddings:
            backbone.resize_token_embeddings(self.region_token_id + 1)
        pack(backbone)
        self.region_encoder = RegionEncoder(backbone.config.text_config.hidden_size)
        images = processor.image_processor
        self.register_buffer("image_mean", torch.tensor(images.image_mean).view(1, 3, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(images.image_std).view(1, 3, 1), persistent=False)

    def forward(self, batch):
        """Returns the cross-entropy of a batch, summed over its supervised tokens (float32 scalar)."""
        with self._mixed_precision():
            hidden = self._hidden(batch)[0]
            # Logits of all positions would take much memory, because the vocabulary has 150,000 tokens.
            logits = self.backbone.lm_head(hidden.index_select(0, batch["target_index"]))
        return F.cross_entropy(logits.float(), batch["targets"], reduction="sum")

    def logits(self, batch):
        """Returns the logits of every position, (rows, L, V)."""
        with self._mixed_precision():
            return self.backbone.lm_head(self._hidden(batch))

    def _mixed_precision(self):
        """On a GPU, matrices are multiplied in bfloat16; weights that learn stay in float32."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.image_mean.is_cuda)

    def _hidden(self, batch):
        """Returns what the LLM makes of a batch, (rows, L, D), from which lm_head makes logits."""
        embeddings, deepstack = self._inputs(batch)
        output = self.backbone.model.language_model(
            inputs_embeds=embeddings,
            position_ids=batch["position_ids"],
            use_cache=False,
            **batch["attention"],
            **deepstack,
        )
        return output.last_hidden_state

    def _inputs(self, batch):
        """Returns what the LLM reads: embeddings (rows, L, D), and Qwen3-VL's deepstack features as keyword
        arguments.
        """
        embeddings = self._embed(batch["input_ids"])
        vision = self._encode_media(batch)
        cells = vision.pooler_output
        embeddings = place(embeddings, batch["visual_index"], self._in_prompt(cells, batch))
        # Without regions it makes no tokens, but the empty gradients that DDP waits for.
        tokens = self.region_encoder(cells, **batch["regions"])
        embeddings = place(embeddings, batch["region_index"], tokens)
        # What each of the LLM's first layers adds to the visual tokens; only Qwen3-VL has such features.
        added = [self._in_prompt(features, batch) for features in getattr(vision, "deepstack_features", [])]
        deepstack = {"visual_pos_masks": batch["visual_index"], "deepstack_visual_embeds": added}
        return embeddings, deepstack if added else {}

    def _embed(self, ids):
        """Returns the embeddings of tokens, (rows, L, D). Each layer adds to them, which needs float32, also
        where they are frozen and kept in bfloat16.
        """
        return self.backbone.get_input_embeddings()(ids).float()

    def _in_prompt(self, rows, batch):
        """Leaves out of the tower's output the cells of views of regions, which are not in the prompt."""
        images, _, videos = rows.split(batch["cell_counts"])
        return torch.cat([images, videos])

    def _encode_media(self, batch):
        """Returns the vision tower's output for all stills, then all videos."""
        stills, videos = batch["still_patches"], batch["video_patches"]
        pixels = []
        if len(stills):
            pixels.append(self._pixels(stills, repeat=True))
        if len(videos):
            pixels.append(self._pixels(videos))
        return self.backbone.model.visual(torch.cat(pixels), **batch["tower"])

    def _pixels(self, patches, repeat=False):
        """Normalises patches, uint8 (P, 3 * n), as the checkpoint's image processor does.

        repeat: fills the temporal patch with copies of a still.
        """
        pixels = (patches.view(len(patches), 3, -1).float() / 255 - self.image_mean) / self.image_std
        if repeat:
            pixels = pixels.repeat(1, 1, self.backbone.config.vision_config.temporal_patch_size)
        return pixels.flatten(1).to(self.backbone.model.visual.dtype)

    @torch.no_grad()
    def generate(self, batch, end_token_ids, max_new_tokens=128, any_rank=bool):
        """Answers a batch that was collated for generation, greedily. Returns B lists of token ids, each up
        to the first of end_token_ids.

        any_rank: a function that tells whether something is true on any rank. A sharded model needs it,
        because its ranks gather the weights together, for each token.
        """
        with self._mixed_precision():
            embeddings, deepstack = self._inputs(batch)
            positions, mask = batch["position_ids"], batch["attention"]["attention_mask"]
            cache = DynamicCache(config=self.backbone.config.text_config)
            end_tokens = torch.tensor(end_token_ids, device=mask.device)
            unfinished = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
            columns = [batch["input_ids"][:, :0]]  # then (B, 1) for each step: tokens, -1 in finished rows
            for step in range(max_new_tokens):
                output = self.backbone.model.language_model(
                    inputs_embeds=embeddings,
                    position_ids=positions,
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    **deepstack,
                )
                scores = self.backbone.lm_head(output.last_hidden_state[:, -1])
                scores[:, self.region_token_id] = -torch.inf  # a placeholder is not an answer
                token = scores.argmax(-1)
                unfinished = unfinished & ~torch.isin(token, end_tokens)
                if not any_rank(unfinished.any()):
                    break
                columns.append(torch.where(unfinished, token, -1)[:, None])
                # From here on, the LLM reads only the new token; the cache holds what came before.
                embeddings = self._embed(token[:, None])
                positions = (batch["next_position"] + step).expand(3, -1, -1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                deepstack = {}
        rows = torch.cat(columns, dim=1).tolist()
        return [[token for token in row if token >= 0] for row in rows]

    def end_token_ids(self, tokenizer):
        """Returns a list: the tokenizer's end token, and those of the checkpoint's generation_config.json."""
        ids = self.backbone.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return sorted({*ids, tokenizer.eos_token_id} - {None})

    def add_lora(self, rank):
        """Adds adapters of peft to the matrices of the LLM's layers, or keeps those that a checkpoint had.

        A matrix W then computes W x + 2 B A x (LoRA, https://arxiv.org/abs/2106.09685). A is random, (rank,
        in), and B zero, (out, rank), so initially nothing changes. Experts have none: they are no nn.Linear.
        Raises data.DataError if there are adapters of another rank.
        """
        if self.lora_rank is None:
            settings = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules="all-linear")
            inject_adapter_in_model(settings, self.backbone.model.language_model)
            self.lora_rank = rank
        data.expect(self.lora_rank == rank, f"--lora-rank {self.lora_rank}, as in {LORA_WEIGHTS}", rank)

    def layers(self):
        """Returns the layers of tower and LLM: FSDP gathers, and checkpointing recomputes, one at a time."""
        return [*self.backbone.model.visual.blocks, *self.backbone.model.language_model.layers]

    def parameter_groups(self):
        """Returns {"region", "projector", "llm", "vision", "lora": list of parameters}, each once."""
        visual = self.backbone.model.visual
        projector = list(visual.merger.parameters())
        for merger in getattr(visual, "deepstack_merger_list", []):
            projector += merger.parameters()
        lora = [p for name, p in self.named_parameters() if ".lora_" in name]
        llm = [*self.backbone.model.language_model.parameters(), *self.backbone.lm_head.parameters()]
        elsewhere = {id(p) for p in [*projector, *lora]}
        return {
            "region": list(self.region_encoder.parameters()),
            "projector": projector,
            # lm_head may share the weights of the embeddings.
            "llm": [p for p in dict.fromkeys(llm) if id(p) not in elsewhere],
            "vision": [p for p in visual.parameters() if id(p) not in elsewhere],
            "lora": lora,
        }

    def save_pretrained(self, folder, settings, weights=None, merge=True):
        """Writes the backbone so that it loads with transformers alone, and the rest beside it.

        settings: dict, for nanorefer.json. weights: {name: tensor} to save in place of the parameters.
        merge: whether adapters are added to the matrices that they adapt, or get a file of their own.
        """
        weights = weights or dict(self.named_parameters())
        parts = {"backbone": {}, "region_encoder": {}, "lora": {}}
        for name, weight in (merge_lora(weights) if merge else weights).items():
            part, _, name_in_part = name.partition(".")
            if ".lora_" in name:
                part, name_in_part = "lora", name
            # peft holds a matrix that it adapts as base_layer, which transformers does not know.
            parts[part][name_in_part.replace(".base_layer.", ".")] = weight.detach().float()
        self.backbone.save_pretrained(folder, state_dict=parts["backbone"])
        # transformers would write the dtype of one weight, and load all in it. Frozen ones may be bfloat16.
        self.backbone.config.dtype = torch.float32
        self.backbone.config.save_pretrained(folder)
        save_file(parts["region_encoder"], os.path.join(folder, REGION_WEIGHTS))
        if parts["lora"]:
            save_file(parts["lora"], os.path.join(folder, LORA_WEIGHTS))
        with open(os.path.join(folder, SETTINGS_FILE), "w") as file:
            json.dump(settings, file, indent=2)


# ---- The region encoder ----


class RegionEncoder(nn.Module):
    """Cells and coverage -> region tokens: token = merged + MLP(merged) + P(box).

    merged is the average of its cells. The MLP and P end in zeros, so initially a token is that average.
    """

    FREQUENCIES = 4  # sinusoids of 1/2, 1, 2 and 4 periods over the picture or the video

    def __init__(self, dim):
        super().__init__()
        code_size = 5 * (2 + 2 * self.FREQUENCIES)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.position = nn.Sequential(nn.Linear(code_size, dim), nn.GELU(), nn.Linear(dim, dim))
        for last_layer in (self.mlp[-1], self.position[-1]):
            nn.init.zeros_(last_layer.weight)
            nn.init.zeros_(last_layer.bias)

    def forward(
        self,
        cells,
        coverage,
        coverage_start,
        frame_start,
        boxes,
        object_frames,
        region_tokens,
        num_region_tokens,
    ):
        """Returns the region tokens, (T, D). cells: (C, D). The others: see data.collate."""
        pooled = masked_average_pool(cells, coverage, frame_start, coverage_start)  # (R, D)
        share = temporal_merge(pooled, object_frames, region_tokens, num_region_tokens)  # (T, R)
        with torch.autocast(cells.device.type, enabled=False):
            merged = (share @ pooled.float()).to(pooled.dtype)  # (T, D)
            boxes = share @ boxes  # (T, 5)
        return merged + self.mlp(merged) + self._position(boxes)

    def _position(self, boxes):
        """Returns P(box), float32 (T, D). boxes: float32 (T, 5) of (cx, cy, w, h, t) in [0, 1].

        P sees each number scaled to [-1, 1], its product with the scaled t, and sinusoids: from sinusoids
        alone, the direction of a motion takes several times as long to learn. It computes in float32 even
        under autocast and FSDP, because bfloat16 would give t in steps of 1/256.
        """
        scaled = 2 * boxes - 1
        frequencies = 2 ** torch.arange(self.FREQUENCIES, device=boxes.device)
        angles = torch.pi * boxes[:, :, None] * frequencies  # (T, 5, 4)
        code = [scaled, scaled * scaled[:, 4:], angles.sin().flatten(1), angles.cos().flatten(1)]
        first, last = self.position[0], self.position[2]
        with torch.autocast(boxes.device.type, enabled=False):
            hidden = F.gelu(F.linear(torch.cat(code, dim=1), first.weight.float(), first.bias.float()))
            return F.linear(hidden, last.weight.float(), last.bias.float())


@torch.no_grad()
def temporal_merge(pooled, object_frames, region_tokens, num_tokens):
    """Joins neighbours in time until object o has region_tokens[o] tokens (VideoRefer, section 3.2.2).

    Of an object's n rows, the n - u most similar pairs of neighbours are joined, and each run of joined rows
    becomes its average. Similarity is the cosine; ties go to the earlier pair. No gradient passes through
    the choice of pairs.

    pooled: (R, D), a row for each region frame, ordered by object, then time. object_frames and
    region_tokens: int64 (O,), each object's n, and its u from 1 to n. num_tokens: int, T, the sum of u.
    Returns float32 (T, R), the share that each row has in each token.
    """
    row = torch.arange(len(pooled), device=pooled.device)
    objects = torch.arange(len(object_frames), device=pooled.device)
    object_of_row = objects.repeat_interleave(object_frames, output_size=len(row))
    # Pair i is rows i and i + 1. The one that would reach into the next object is less similar than any.
    similarity = F.cosine_similarity(pooled.float(), pooled.float().roll(-1, 0), dim=-1)
    similarity = similarity.index_fill(0, object_frames.cumsum(0) - 1, -2)
    # [i, j]: pair j is of the same object as pair i and goes before it. A matrix of all pairs needs no loop,
    # and so no answer from the GPU.
    own, other = similarity[:, None], similarity[None]
    goes_before = (other > own) | (other == own) & (row[None] < row[:, None])
    goes_before &= object_of_row[None] == object_of_row[:, None]
    is_joined = goes_before.sum(1) < (object_frames - region_tokens)[object_of_row]
    ends_token = ~is_joined
    token_of_row = ends_token.cumsum(0) - ends_token.long()
    share = (token_of_row == torch.arange(num_tokens, device=row.device)[:, None]).float()
    return share / share.sum(1, keepdim=True)


def place(embeddings, index, rows):
    """Returns embeddings (B, L, D), but with rows (T, D) in place of the tokens at index (T,). Token i of
    sample b has the index b * L + i.
    """
    rows = rows.to(embeddings.dtype)
    return embeddings.flatten(0, 1).index_copy(0, index, rows).view_as(embeddings)


# ---- Attention within a sample ----

# transformers hands the bounds of samples and frames to an attention whose name contains "flash". To others
# it gives one frame after another, in a loop in Python.
ATTENTION = "flash_within_samples"


def attention_within_samples(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    dropout=0.0,
    cu_seq_lens_q=None,
    max_length_q=None,
    **options,
):
    """Attention of a row of tokens within each sample (in the vision tower: within each frame or window).

    query, key, value: (1, heads, L, size of a head); key and value may have fewer heads. cu_seq_lens_q:
    int32, 0 and the end of each sample. max_length_q: int, the longest sample. Returns (1, L, heads, size)
    and None. Padded batches (generation) come without bounds, and get transformers' own attention.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    assert not options.get("sliding_window"), "expected attention to the whole sample, found a sliding window"
    is_causal = options.get("is_causal", module.is_causal)  # the tower gives it, the LLM does not
    dtype = query.dtype
    if query.is_cuda:
        assert not dropout, f"varlen_attn has no dropout, found {dropout}"
        # Autocast does not know varlen_attn, and q_norm leaves query and key in float32.
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    # torch 2.11 knows no groups of query heads that share a key.
    key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, size)
    if query.is_cuda:
        out = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0) if is_causal else (-1, -1),
        )
        return out.to(dtype)[None], None
    out = attention_in_turn(query, key, value, cu_seq_lens_q, scaling, dropout, is_causal)
    return out[None], None


@torch.compiler.disable  # because each row has other lengths, for which it would compile the loop anew
def attention_in_turn(query, key, value, bounds, scaling, dropout, is_causal):
    """Attention within one sample after another, (L, heads, size). Neighbours of equal length, such as the
    frames of a video, are one batch.
    """
    outputs, start = [], 0
    for length, group in groupby(bounds.diff().tolist()):
        count = len(list(group))
        rows = slice(start, start + count * length)
        start += count * length
        batched = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*batched, None, dropout, is_causal, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_within_samples)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
# Mixtures of experts multiply with _grouped_mm, which autocast does not know. In float32 it would be a loop
# over the experts that waits for the GPU.
torch.library.register_autocast("aten::_grouped_mm", "cuda", torch.bfloat16)


def pack(backbone):
    """Makes a backbone of transformers read rows without padding, and never wait for the GPU in a training
    step. Nothing that it computes changes, but for rounding.
    """
    tower, llm = backbone.model.visual, backbone.model.language_model
    tower.config._attn_implementation = llm.config._attn_implementation = ATTENTION
    if hasattr(llm, "_deepstack_process"):
        llm._deepstack_process = add_at
    tower.patch_embed.forward = partial(embed_patches, tower.patch_embed.proj)
    for layer in llm.layers:
        if hasattr(layer, "linear_attn"):  # Qwen3.5
            layer.linear_attn.forward = partial(each_sample_alone, layer.linear_attn.forward)


def embed_patches(convolution, patches):
    """The tower's convolution over patches that do not overlap: a matrix product, which needs no cuDNN."""
    return F.linear(patches, convolution.weight.flatten(1), convolution.bias)


def each_sample_alone(linear_attention, hidden_states, sample_lengths=None, cu_seq_lens_q=None, **options):
    """Runs a layer whose state goes from token to token: in plain torch it knows no bounds of samples."""
    if sample_lengths is None:
        return linear_attention(hidden_states, **options)
    samples = hidden_states.split(sample_lengths, dim=1)
    return torch.cat([linear_attention(sample, **options) for sample in samples], dim=1)


def add_at(hidden, index, rows):
    """Returns hidden (B, L, D) plus rows (T, D) at index (T,), counted as in `place`.

    transformers' own version takes a mask of the tokens, and so waits for the GPU to count them.
    """
    return hidden.flatten(0, 1).index_add(0, index, rows.to(hidden.dtype)).view_as(hidden)


# ---- A first reading may end here. Below stand the files of models, and the tiny model. ----


def load_processor(path, texts=(), **settings):
    """Returns the data.Processor of "tiny", a Hugging Face name, or a folder (also one that train.py wrote).

    settings: fields of data.Settings. Those that are None or not given are the ones with which the folder's
    model was trained, else defaults. texts: what the tiny model's tokenizer learns its words from. Raises
    data.DataError where there is no such model.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if path == "tiny":
        config, tokenizer, image_processor = build_tiny(texts)
        return data.Processor(tokenizer, image_processor, config, data.Settings(**given))
    with model_errors_in_one_line(path):
        if cached_file(path, "config.json") is None:  # where nothing has this name, it raises OSError itself
            raise OSError("a folder without config.json")
        saved = data.PRETRAINED_PIXELS
        settings_file = data.find_file(path, SETTINGS_FILE)
        if settings_file:
            with open(settings_file) as file:
                saved = json.load(file)
            # Without a default for those that are missing: it may not be what the model was trained with.
            names = [f.name for f in fields(data.Settings)]
            data.expect(isinstance(saved, dict), f"{SETTINGS_FILE} with a JSON object", saved)
            missing, unknown = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
            problems = ", ".join([f"no {name}" for name in missing] + [f"unknown {name}" for name in unknown])
            if problems:
                raise data.DataError(f"expected {SETTINGS_FILE} with all settings, found {problems}")
        return data.Processor.from_pretrained(path, data.Settings(**saved | given))


def load_model(path, processor):
    """Returns the ReferringVideoLLM of a path as for load_processor, in float32, on the CPU.

    The tiny one has random weights, from torch's global seed. For others, raises data.DataError when weights
    are missing, left over, or of another shape.
    """
    if path == "tiny":
        return ReferringVideoLLM(Qwen3VLForConditionalGeneration(processor.config), processor)
    with model_errors_in_one_line(path):
        model = ReferringVideoLLM(load_weights(AutoModelForImageTextToText, path), processor)
        if data.find_file(path, SETTINGS_FILE):  # train.py wrote this model
            weights = load_file(cached_file(path, REGION_WEIGHTS))
            lora_file = data.find_file(path, LORA_WEIGHTS)
            try:
                model.region_encoder.load_state_dict(weights)
                if lora_file:
                    load_lora(model, load_file(lora_file))
            except RuntimeError as error:  # names or shapes that do not fit
                raise ValueError(error) from None
    return model


def load_weights(model_class, path):
    """Returns model_class.from_pretrained(path) in float32; data.DataError unless the weights fit exactly."""
    model, report = model_class.from_pretrained(
        path,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the report names them too
    )
    problems = {problem: sorted(map(str, names)) for problem, names in report.items() if names}
    data.expect(not problems, "weights that fit the model exactly", problems)
    return model


@torch.no_grad()
def merge_lora(weights):
    """weights: {name: tensor}. Returns them without adapters: W + 2 B A, float32 on the CPU, in place of W.

    It is not merged in peft's own way, which adds to W in place: W may be in bfloat16, which would round.
    """
    merged = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, a in weights.items():
        layer, is_lora, _ = name.partition(".lora_A.")
        if is_lora:
            w, b = weights[f"{layer}.base_layer.weight"], weights[f"{layer}.lora_B.default.weight"]
            merged[f"{layer}.base_layer.weight"] = (w + LORA_SCALE * (b @ a)).cpu()
    return merged


def load_lora(model, weights):
    """Gives a model the adapters that save_pretrained wrote. Raises an error if they do not fit exactly."""
    model.add_lora(max((len(a) for name, a in weights.items() if ".lora_A." in name), default=1))
    report = model.load_state_dict(weights, strict=False)
    missing = [name for name in report.missing_keys if ".lora_" in name]
    problems = {"missing": missing, "left over": report.unexpected_keys}
    data.expect(not any(problems.values()), f"{LORA_WEIGHTS} with exactly this model's adapters", problems)


MODEL_FILES = '"tiny", a Hugging Face name, or a folder with config.json, weights and tokenizer'


@contextmanager
def model_errors_in_one_line(path, option="--model", expected=MODEL_FILES):
    """Turns what libraries raise about missing or broken model files into a data.DataError of one line."""
    try:
        with data.within(f"{option} {path}"):
            yield
    except data.DataError:  # is a ValueError, so it must pass before the next line
        raise
    except (OSError, ValueError, SafetensorError) as error:
        found = " ".join(str(error).split())[:300]
        raise data.DataError(f"expected {expected}, found: {found}", f"{option} {path}") from error


# ---- The tiny model ----

TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}"
    "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny(texts):
    """Returns (config, tokenizer, image processor) of a small Qwen3-VL, built as a published checkpoint is.

    The tokenizer is byte-level BPE: frequent words of texts (an iterable of str) become one token each, and
    any other text still has its bytes.
    """
    words = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    control_tokens = [f"<|{word}|>" for word in words]
    byte_level = Tokenizer(tokenizer_models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    byte_level.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(control_tokens, special_tokens=True)
    tokenizer.add_tokens(["user", "assistant", " seconds"])  # the words of every prompt
    tokenizer.chat_template = TINY_TEMPLATE
    llm = {
        "vocab_size": 512,  # at most 500 for the texts, 7 control tokens, 3 words, and the region placeholder
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "initializer_range": 0.16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],  # frequencies for time, height and width
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "initializer_range": 0.06,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 128,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=llm,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 16 * 16, "longest_edge": 1 << 20}
    image_processor = Qwen2VLImageProcessorPil(size=size, image_mean=half, image_std=half, patch_size=8)
    return config, tokenizer, image_processor
