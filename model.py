"""The model: a pretrained video LLM, unchanged, with region tokens in the place of `<region>` placeholders.

    video patches --vision tower--> cells ----------------------------------------> the video's tokens --.
    still patches --vision tower--> cells --masked_average_pool--> (R, D) one row a region frame          |--> LLM --> answer
                                        `--> an image's tokens        |--temporal_merge--> at most u a region |
                                                                      `--RegionEncoder--> region tokens --'
    text -------embedding------------------------------------------------------------------------------'

`ReferringVideoLLM` takes the batch that data.collate makes. Annotated frames are encoded as still images by the backbone's own
vision tower; their cells have passed its patch merger, so a region token starts life as an average of vectors that the LLM
already understands (RegionEncoder adds zero to it on day one). Without regions the logits are the plain backbone's, bit for bit.

    model = ReferringVideoLLM.from_pretrained("Qwen/Qwen3-VL-2B-Instruct", region_token_id)   # or a folder that train.py wrote
    loss = model(batch)                                                                     # summed over supervised tokens
    tokens = model.generate(batch, end_token_id)                                            # greedy, with a KV cache
"""

import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

import data
from kernels import masked_average_pool

REGION_WEIGHTS = "region_encoder.safetensors"  # beside the backbone's own files in a saved folder


def temporal_merge(pooled, where, object_frames, region_tokens):
    """Joins the most alike neighbours in time until object o has region_tokens[o] rows (VideoRefer, section 3.2.2).

    pooled: (R, D), where: (R, W), one row a region frame, ordered by object, then time. object_frames: int64 (O,), rows of each
    object, summing to R. region_tokens: int64 (O,), rows to keep, from 1 to object_frames. -> (T, D), (T, W), T = their sum.
    Similarity is the cosine of two rows adjacent in time; the n - u most similar pairs are joined, ties going to the earlier
    pair, and each run of joined rows is replaced by its average.
    """
    R = len(pooled)
    owner = torch.repeat_interleave(torch.arange(len(object_frames), device=pooled.device), object_frames)
    similarity = F.cosine_similarity(
        pooled[:-1].float(), pooled[1:].float(), dim=-1
    ).detach()  # (R - 1,), pair i is rows i, i + 1
    similarity = similarity.masked_fill(
        owner[:-1] != owner[1:], -torch.inf
    )  # never across objects: these sort last
    by_similarity = torch.argsort(similarity, descending=True, stable=True)
    order = by_similarity[
        torch.argsort(owner[:-1][by_similarity], stable=True)
    ]  # by object, then similarity, then time
    first_pair = torch.cumsum(object_frames, 0) - object_frames  # an object's pairs begin where its rows do
    rank = (
        torch.empty_like(order).scatter_(0, order, torch.arange(R - 1, device=order.device))
        - first_pair[owner[:-1]]
    )
    joined = rank < (object_frames - region_tokens)[owner[:-1]]
    run_start = (
        torch.cat([joined.new_ones(1), ~joined]).nonzero().flatten()
    )  # rows that are not joined to the one before
    edges = torch.cat([run_start, run_start.new_tensor([R])])
    weight = torch.ones(R, device=pooled.device)
    return masked_average_pool(pooled, weight, run_start, edges), masked_average_pool(
        where, weight, run_start, edges
    )


class RegionEncoder(nn.Module):
    """Cells and coverage -> region tokens: token = merged + MLP(merged) + P(where).

    The MLP and P end in zeros, so that training starts from the plain average of the region's cells. P sees (cx, cy, w, h, t) both
    raw and as sinusoids: with the sinusoids alone, the direction of a motion takes several times as long to learn.
    """

    FREQUENCIES = 4  # sinusoids of 1/2, 1, 2 and 4 periods over the picture or the video

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.position = nn.Sequential(
            nn.Linear(5 * (2 + 2 * self.FREQUENCIES), dim), nn.GELU(), nn.Linear(dim, dim)
        )
        for last in (self.mlp[-1], self.position[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, cells, frame_start, coverage, coverage_start, where, object_frames, region_tokens):
        """cells: (N, D). frame_start: (R,), the row of cells where each region frame's picture begins. The rest as data.collate
        makes it. -> (T, D), T the sum of region_tokens."""
        pooled = masked_average_pool(cells, coverage, frame_start, coverage_start)
        merged, where = temporal_merge(pooled, where, object_frames, region_tokens)
        angles = torch.pi * where[:, :, None] * 2 ** torch.arange(self.FREQUENCIES, device=where.device)
        raw = 2 * where - 1
        place = torch.cat(
            [raw, raw * raw[:, 4:], angles.sin().flatten(1), angles.cos().flatten(1)], dim=1
        ).to(merged.dtype)
        return merged + self.mlp(merged) + self.position(place)


class ReferringVideoLLM(nn.Module):
    """A Hugging Face Qwen3-VL or Qwen2.5-VL and a RegionEncoder. Everything inside transformers stays as it is."""

    def __init__(self, backbone, region_token_id, image_mean, image_std):
        super().__init__()
        self.backbone, self.region_token_id = backbone, region_token_id
        if (
            region_token_id >= backbone.get_input_embeddings().num_embeddings
        ):  # published checkpoints have spare rows
            backbone.resize_token_embeddings(region_token_id + 1)
        self.region_encoder = RegionEncoder(backbone.config.text_config.hidden_size)
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1), persistent=False)

    # -------------------------------------------------------------------------------------------- forward

    def forward(self, batch):
        """batch -> the summed cross-entropy of its supervised tokens (float32 scalar). Logits are made for these alone."""
        hidden = self._hidden(batch)
        targets = batch["labels"][:, 1:]
        supervised = targets != -100
        logits = self.backbone.lm_head(hidden[:, :-1][supervised])
        return F.cross_entropy(logits.float(), targets[supervised], reduction="sum")

    def logits(self, batch):
        """batch -> float (B, L, V): the logits of every position."""
        return self.backbone.lm_head(self._hidden(batch))

    def _hidden(self, batch):
        embeddings, positions, _, deepstack = self._inputs(batch)
        mask = batch["attention_mask"]
        language_model = self.backbone.model.language_model
        output = language_model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            **deepstack,
        )
        return output.last_hidden_state

    def _inputs(self, batch):
        """Everything that the LLM reads: embeddings (B, L, D) with cells and region tokens in place, position ids (3, B, L), how
        far positions run ahead of the token count (B, 1), and Qwen3-VL's deepstack features, which its first layers add."""
        ids = batch["input_ids"]
        config = self.backbone.config
        embeddings = self.backbone.get_input_embeddings()(ids)
        is_image, is_video, is_region = (
            ids == config.image_token_id,
            ids == config.video_token_id,
            ids == self.region_token_id,
        )
        merge = config.vision_config.spatial_merge_size**2
        still_cells = batch["still_grid_thw"].prod(1) // merge  # (S,), cells of each still
        stills, videos = (
            len(batch["still_patches"]) // merge,
            len(batch["video_patches"]) // merge,
        )  # cells of all
        output, deepstack = self._vision(batch), {}
        if output is not None:
            image, video = (
                slice(int(still_cells[: batch["prompt_images"]].sum())),
                slice(stills, stills + videos),
            )
            embeddings = _place(embeddings, is_image, output.pooler_output[image])
            embeddings = _place(embeddings, is_video, output.pooler_output[video])
            deepstack = self._deepstack(
                is_image, is_video, [(f[image], f[video]) for f in getattr(output, "deepstack_features", [])]
            )
        if len(batch["object_frames"]):
            frame_start = (still_cells.cumsum(0) - still_cells)[batch["region_still"]]
            names = ("coverage", "coverage_start", "boxes", "object_frames", "region_tokens")
            tokens = self.region_encoder(output.pooler_output, frame_start, *(batch[name] for name in names))
            embeddings = _place(embeddings, is_region, tokens)
        elif self.training:
            embeddings = embeddings + sum(
                p[:0].sum() for p in self.region_encoder.parameters()
            )  # 0, for the reason that _vision gives
        positions, ahead = self._positions(batch, is_image, is_video)
        return embeddings, positions, ahead, deepstack

    def _vision(self, batch):
        """The vision tower's output for all stills, then all videos; None without media. While training it is called exactly once: ranks
        wait for each other's gradients (under FSDP, weights too) of every part, whatever is in their batches. For a batch without media
        it encodes one black picture of a single cell that is read nowhere: the gradients are 0, but there are gradients."""
        pixels = [
            self._pixels(batch[name], name == "still_patches")
            for name in ("still_patches", "video_patches")
            if len(batch[name])
        ]
        grids = torch.cat([batch["still_grid_thw"], batch["video_grid_thw"]])
        if not pixels and self.training:
            config = self.backbone.config.vision_config
            side = config.spatial_merge_size
            pixels = [
                self._pixels(batch["still_patches"].new_zeros(side**2, 3 * config.patch_size**2), repeat=True)
            ]
            grids = grids.new_tensor([[1, side, side]])
        return self.backbone.model.visual(torch.cat(pixels), grid_thw=grids) if pixels else None

    def _pixels(self, patches, repeat=False):
        """uint8 (P, 3 * n) -> normalised (P, 3 * n) as the checkpoint's image processor makes it. repeat: a still fills its
        temporal patch with copies of itself."""
        pixels = (patches.view(len(patches), 3, -1).float() / 255 - self.image_mean) / self.image_std
        copies = self.backbone.config.vision_config.temporal_patch_size if repeat else 1
        return pixels.repeat(1, 1, copies).flatten(1).to(self.backbone.model.visual.dtype)

    def _positions(self, batch, is_image, is_video):
        """The backbone's own 3-axis position ids, (3, B, L), and how far they run ahead of the number of tokens, (B, 1)."""
        images, videos = batch["still_grid_thw"][: batch["prompt_images"]], batch["video_grid_thw"]
        return self.backbone.model.get_rope_index(
            batch["input_ids"],
            mm_token_type_ids=is_image.int() + 2 * is_video.int(),
            image_grid_thw=images if len(images) else None,
            video_grid_thw=videos if len(videos) else None,
            second_per_grid_ts=batch[
                "seconds_per_pair"
            ],  # Qwen3-VL ignores it: its prompt carries timestamps
            attention_mask=batch["attention_mask"],
        )

    def _deepstack(self, is_image, is_video, layers):
        """The extra arguments of Qwen3-VL's LLM: where visual tokens stand, and for each early layer what to add to them. layers: the
        features of images and of videos for each of these; none for Qwen2.5-VL."""
        if not layers:
            return {}
        visual = is_image | is_video
        added = []
        for image, video in layers:
            rows = image.new_empty(len(image) + len(video), image.shape[1])
            rows = rows.masked_scatter(is_image[visual][:, None], image)
            added.append(rows.masked_scatter(is_video[visual][:, None], video))
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": added}

    # -------------------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def generate(self, batch, end_token_id, max_new_tokens=128):
        """Greedy answers to a batch that is padded on the left -> B lists of token ids, without the end token."""
        embeddings, positions, ahead, deepstack = self._inputs(batch)
        mask, cache = batch["attention_mask"], DynamicCache(config=self.backbone.config.text_config)
        language_model = self.backbone.model.language_model
        answers, alive = [], torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        for _ in range(max_new_tokens):
            output = language_model(
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
            alive = alive & (token != end_token_id)
            if not alive.any():
                break
            answers.append(torch.where(alive, token, -1))
            embeddings = self.backbone.get_input_embeddings()(token[:, None])
            positions = (mask.sum(1, keepdim=True) + ahead).expand(3, -1, -1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            deepstack = {}
        rows = torch.stack(answers, dim=1).tolist() if answers else [[] for _ in mask]
        return [[token for token in row if token >= 0] for row in rows]

    # -------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, path, region_token_id):
        """path: a Hugging Face name or folder of a backbone, or a folder that save_pretrained wrote. Loads strictly: raises
        ValueError when weights are missing, left over, or of another shape."""
        backbone, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        if wrong:
            raise ValueError(f"{path}: expected weights that fit the model exactly, found {wrong}")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model = cls(backbone, region_token_id, image_processor.image_mean, image_processor.image_std)
        if os.path.exists(os.path.join(path, SETTINGS_FILE)):
            model.region_encoder.load_state_dict(load_file(os.path.join(path, REGION_WEIGHTS)))
        return model

    def save_pretrained(self, folder, settings, weights=None):
        """Writes the backbone in Hugging Face's own layout (it loads with transformers alone), the region encoder beside it, and
        settings (a dict) in nanorefer.json. weights: {name: tensor}, tied ones once, in place of the model's own parameters."""
        parts = {"backbone": {}, "region_encoder": {}}
        for name, weight in (weights or dict(self.named_parameters())).items():
            part, _, inner = name.partition(".")
            parts[part][inner] = weight.detach()
        self.backbone.save_pretrained(folder, state_dict=parts["backbone"])
        save_file(parts["region_encoder"], os.path.join(folder, REGION_WEIGHTS))
        with open(os.path.join(folder, SETTINGS_FILE), "w") as file:
            json.dump(settings, file, indent=2)

    def layers(self):
        """The vision tower's blocks and the LLM's layers: what FSDP gathers, and checkpointing recomputes, one at a time."""
        return [*self.backbone.model.visual.blocks, *self.backbone.model.language_model.layers]

    def parameter_groups(self):
        """{"region", "projector", "llm", "vision"} -> lists of parameters, together each parameter of the model once."""
        visual = self.backbone.model.visual
        groups = {"region": list(self.region_encoder.parameters())}
        projectors = [visual.merger, *getattr(visual, "deepstack_merger_list", [])]
        groups["projector"] = [p for module in projectors for p in module.parameters()]
        groups["llm"] = [
            *self.backbone.model.language_model.parameters(),
            *self.backbone.lm_head.parameters(),
        ]
        in_projector = set(map(id, groups["projector"]))
        groups["vision"] = [p for p in visual.parameters() if id(p) not in in_projector]
        return {
            name: list(dict.fromkeys(parameters)) for name, parameters in groups.items()
        }  # tied weights once


def _place(embeddings, where, rows):
    """Writes rows (T, D) into embeddings (B, L, D) at the True positions of where (B, L), in order."""
    found, wanted = int(where.sum()), len(rows)
    assert found == wanted, f"{found} placeholders for {wanted} rows"
    return embeddings.masked_scatter(where[:, :, None], rows.to(embeddings.dtype))


# ------------------------------------------------------------------------------------------------ loading

SETTINGS_FILE = "nanorefer.json"  # how media became tokens while the model in this folder was trained


def load_processor(path, texts=(), **settings):
    """path: "tiny", a Hugging Face name, or a folder (also one that save_pretrained wrote) -> data.Processor.

    settings: fields of data.Settings; those that are None or not given are the ones that the folder's model was trained with, or
    else the defaults for the tiny model or a pretrained one. texts: what the tiny model's tokenizer learns its words from.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if path == "tiny":
        config, tokenizer, image_processor = build_tiny(texts)
        return data.Processor(tokenizer, image_processor, config, data.Settings(**given))
    saved = data.PRETRAINED_PIXELS
    settings_file = os.path.join(path, SETTINGS_FILE)
    if os.path.exists(settings_file):
        with open(settings_file) as file:
            saved = json.load(file)
    return data.Processor.from_pretrained(path, data.Settings(**saved | given))


def load_model(path, processor):
    """path: as for load_processor, which made the processor -> ReferringVideoLLM, float32 on the CPU. The tiny one has random weights,
    from torch's global seed; others are loaded strictly."""
    if path == "tiny":
        images = processor.image_processor
        backbone = Qwen3VLForConditionalGeneration(processor.config)
        return ReferringVideoLLM(backbone, processor.region_token_id, images.image_mean, images.image_std)
    return ReferringVideoLLM.from_pretrained(path, processor.region_token_id)


# ------------------------------------------------------------------------------------------------ --model tiny

TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny(texts):
    """What a small Qwen3-VL with random weights is made of: no download.

    It has the class, the inputs and the files of a published checkpoint, so that it takes the path that those take. The tokenizer
    is byte-level BPE, its merges learned from texts (an iterable of str): their frequent words become one token each, and any other
    text still has its bytes. -> (config, tokenizer, image_processor)
    """
    names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    byte_level = Tokenizer(tokenizer_models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        texts, BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token=names[2], pad_token=names[0])
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.add_tokens(["user", "assistant", " seconds"])  # the words of every prompt
    tokenizer.chat_template = TINY_TEMPLATE
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names)))
    text = Qwen3VLTextConfig(
        vocab_size=512,  # at most 500 for the texts, 7 control tokens, 3 words, room for the region placeholder
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    )
    vision = Qwen3VLVisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=192,
        initializer_range=0.06,
        num_heads=2,
        patch_size=8,
        out_hidden_size=128,
        num_position_embeddings=144,
        deepstack_visual_indexes=[0],
    )
    config = Qwen3VLConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 16 * 16, "longest_edge": 1 << 20}
    image_processor = Qwen2VLImageProcessorPil(size=size, image_mean=half, image_std=half, patch_size=8)
    return config, tokenizer, image_processor
