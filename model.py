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
logits equal those of the plain backbone, bit for bit.

    processor = load_processor("Qwen/Qwen3-VL-2B-Instruct")  # or a folder that train.py wrote, or "tiny"
    model = load_model("Qwen/Qwen3-VL-2B-Instruct", processor)
    loss = model(batch)  # summed over the supervised tokens
    answers = model.generate(batch, model.end_token_ids(processor.tokenizer))
"""

import json
import os
from contextlib import contextmanager
from dataclasses import fields

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
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
from transformers.utils import cached_file

import data
from kernels import masked_average_pool

SETTINGS_FILE = "nanorefer.json"  # how media became tokens while the model in this folder was trained
REGION_WEIGHTS = "region_encoder.safetensors"  # beside the backbone's own files


# ---- The video LLM with regions ----


class ReferringVideoLLM(nn.Module):
    """A Qwen3.5, Qwen3-VL or Qwen2.5-VL of transformers, unchanged, and a RegionEncoder.

    Shapes: B samples of L tokens (padded), width D of the LLM, vocabulary V.
    """

    def __init__(self, backbone, processor):
        super().__init__()
        self.backbone = backbone
        self.region_token_id = processor.region_token_id
        # Published checkpoints have more embedding rows than tokens, so most of them need not grow.
        if self.region_token_id >= backbone.get_input_embeddings().num_embeddings:
            backbone.resize_token_embeddings(self.region_token_id + 1)
        self.region_encoder = RegionEncoder(backbone.config.text_config.hidden_size)
        images = processor.image_processor
        self.register_buffer("image_mean", torch.tensor(images.image_mean).view(1, 3, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(images.image_std).view(1, 3, 1), persistent=False)

    def forward(self, batch):
        """Returns the cross-entropy of a batch, summed over its supervised tokens (float32 scalar)."""
        hidden = self._hidden(batch)
        targets = batch["labels"][:, 1:]
        supervised = targets != data.IGNORE_INDEX
        # Logits of all positions would take much memory, because the vocabulary has 150,000 tokens.
        logits = self.backbone.lm_head(hidden[:, :-1][supervised])
        return F.cross_entropy(logits.float(), targets[supervised], reduction="sum")

    def logits(self, batch):
        """Returns the logits of every position, (B, L, V)."""
        return self.backbone.lm_head(self._hidden(batch))

    def _hidden(self, batch):
        """Returns what the LLM makes of a batch, (B, L, D), from which lm_head makes logits."""
        embeddings, positions, _, deepstack = self._inputs(batch)
        output = self.backbone.model.language_model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=batch["attention_mask"],
            use_cache=False,
            **deepstack,
        )
        return output.last_hidden_state

    def _inputs(self, batch):
        """Returns what the LLM reads: embeddings (B, L, D), position ids (3, B, L), the next position minus
        the number of tokens (B, 1), and Qwen3-VL's deepstack features as keyword arguments.
        """
        ids = batch["input_ids"]
        config = self.backbone.config
        is_image = ids == config.image_token_id
        is_video = ids == config.video_token_id
        is_visual = is_image | is_video
        embeddings = self.backbone.get_input_embeddings()(ids)

        # The rows of the vision tower: prompt images, then annotated frames, then videos.
        patches_per_cell = config.vision_config.spatial_merge_size**2
        still_cells = batch["still_grid_thw"].prod(1) // patches_per_cell  # (S,), cells of each still
        num_image_cells = int(still_cells[: batch["prompt_images"]].sum())
        num_video_cells = len(batch["video_patches"]) // patches_per_cell
        videos_begin = len(batch["still_patches"]) // patches_per_cell
        vision = self._encode_media(batch)
        cells = vision.pooler_output
        rows = torch.arange(len(cells), device=ids.device)[:, None]
        row_of = torch.zeros_like(ids)[:, :, None]  # (B, L, 1), the row that each visual token takes
        row_of = place(row_of, is_image, rows[:num_image_cells])
        row_of = place(row_of, is_video, rows[videos_begin : videos_begin + num_video_cells])
        visual_rows = row_of[is_visual][:, 0]
        embeddings = place(embeddings, is_visual, cells[visual_rows])

        # What each of the LLM's first layers adds to the visual tokens; only Qwen3-VL has such features.
        added = [features[visual_rows] for features in getattr(vision, "deepstack_features", [])]
        deepstack = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": added} if added else {}

        if len(batch["object_frames"]):
            frame_start = (still_cells.cumsum(0) - still_cells)[batch["region_still"]]
            names = ("coverage", "coverage_start", "boxes", "object_frames", "region_tokens")
            tokens = self.region_encoder(cells, frame_start, **{name: batch[name] for name in names})
            embeddings = place(embeddings, ids == self.region_token_id, tokens)
        elif self.training:
            # Add an empty sum of each parameter: DDP needs its gradient on ranks without regions, too.
            embeddings = embeddings + sum(p[:0].sum() for p in self.region_encoder.parameters())

        images, videos = batch["still_grid_thw"][: batch["prompt_images"]], batch["video_grid_thw"]
        positions, ahead = self.backbone.model.get_rope_index(
            ids,
            mm_token_type_ids=is_image.int() + 2 * is_video.int(),
            image_grid_thw=images if len(images) else None,
            video_grid_thw=videos if len(videos) else None,
            second_per_grid_ts=batch["seconds_per_pair"],  # for Qwen2.5-VL; others have timestamps
            attention_mask=batch["attention_mask"],
        )
        return embeddings, positions, ahead, deepstack

    def _encode_media(self, batch):
        """Returns the vision tower's output for all stills, then all videos, or else for one black cell.

        Without media the tower runs all the same, because in training the ranks wait for each other's
        gradients of every parameter, and under FSDP also for its weights.
        """
        stills, videos = batch["still_patches"], batch["video_patches"]
        grids = torch.cat([batch["still_grid_thw"], batch["video_grid_thw"]])
        if not len(grids):
            config = self.backbone.config.vision_config
            side = config.spatial_merge_size
            stills = stills.new_zeros(side**2, 3 * config.patch_size**2)
            grids = grids.new_tensor([[1, side, side]])
        pixels = []
        if len(stills):
            pixels.append(self._pixels(stills, repeat=True))
        if len(videos):
            pixels.append(self._pixels(videos))
        return self.backbone.model.visual(torch.cat(pixels), grid_thw=grids)

    def _pixels(self, patches, repeat=False):
        """Normalises patches, uint8 (P, 3 * n), as the checkpoint's image processor does.

        repeat: fills the temporal patch with copies of a still.
        """
        pixels = (patches.view(len(patches), 3, -1).float() / 255 - self.image_mean) / self.image_std
        if repeat:
            pixels = pixels.repeat(1, 1, self.backbone.config.vision_config.temporal_patch_size)
        return pixels.flatten(1).to(self.backbone.model.visual.dtype)

    @torch.no_grad()
    def generate(self, batch, end_token_ids, max_new_tokens=128):
        """Answers a batch that is padded on the left, greedily. Returns B lists of token ids, each up to the
        first of end_token_ids.
        """
        embeddings, positions, ahead, deepstack = self._inputs(batch)
        mask = batch["attention_mask"]
        cache = DynamicCache(config=self.backbone.config.text_config)
        end_tokens = torch.tensor(end_token_ids, device=mask.device)
        unfinished = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        columns = [batch["input_ids"][:, :0]]  # then (B, 1) for each step: its tokens, -1 in finished rows
        for _ in range(max_new_tokens):
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
            if not unfinished.any():
                break
            columns.append(torch.where(unfinished, token, -1)[:, None])
            # From here on, the LLM reads only the new token; the cache holds what came before.
            embeddings = self.backbone.get_input_embeddings()(token[:, None])
            positions = (mask.sum(1, keepdim=True) + ahead).expand(3, -1, -1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            deepstack = {}
        rows = torch.cat(columns, dim=1).tolist()
        return [[token for token in row if token >= 0] for row in rows]

    def end_token_ids(self, tokenizer):
        """Returns a list: the tokenizer's end token, and those of the checkpoint's generation_config.json."""
        ids = self.backbone.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return sorted({*ids, tokenizer.eos_token_id} - {None})

    def layers(self):
        """Returns the layers of tower and LLM: FSDP gathers, and checkpointing recomputes, one at a time."""
        return [*self.backbone.model.visual.blocks, *self.backbone.model.language_model.layers]

    def parameter_groups(self):
        """Returns {"region", "projector", "llm", "vision": list of parameters}, each once."""
        visual = self.backbone.model.visual
        projector = list(visual.merger.parameters())
        for merger in getattr(visual, "deepstack_merger_list", []):
            projector += merger.parameters()
        llm = [*self.backbone.model.language_model.parameters(), *self.backbone.lm_head.parameters()]
        in_projector = {id(p) for p in projector}
        return {
            "region": list(self.region_encoder.parameters()),
            "projector": projector,
            "llm": list(dict.fromkeys(llm)),  # lm_head may share the weights of the embeddings
            "vision": [p for p in visual.parameters() if id(p) not in in_projector],
        }

    def save_pretrained(self, folder, settings, weights=None):
        """Writes the backbone so that it loads with transformers alone, and the rest beside it.

        settings: dict, for nanorefer.json. weights: {name: tensor} to save in place of the parameters.
        """
        parts = {"backbone": {}, "region_encoder": {}}
        for name, weight in (weights or dict(self.named_parameters())).items():
            part, _, name_in_part = name.partition(".")
            parts[part][name_in_part] = weight.detach()
        self.backbone.save_pretrained(folder, state_dict=parts["backbone"])
        save_file(parts["region_encoder"], os.path.join(folder, REGION_WEIGHTS))
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

    def forward(self, cells, frame_start, coverage, coverage_start, boxes, object_frames, region_tokens):
        """Returns the region tokens, (T, D), where T is the sum of region_tokens.

        cells: (N, D). frame_start: int64 (R,), the row of cells where each region frame begins. The others
        are as data.collate makes them.
        """
        pooled = masked_average_pool(cells, coverage, frame_start, coverage_start)  # (R, D)
        merged, boxes = temporal_merge(pooled, boxes, object_frames, region_tokens)  # (T, D), (T, 5)
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


def temporal_merge(pooled, boxes, object_frames, region_tokens):
    """Joins neighbours in time until object o has region_tokens[o] rows (VideoRefer, section 3.2.2).

    Of an object's n rows, the n - u most similar pairs of neighbours are joined, and each run of joined rows
    becomes its average. Similarity is the cosine; ties go to the earlier pair.

    pooled: (R, D) and boxes: (R, 5), a row for each region frame, ordered by object, then time. object_frames
    and region_tokens: int64 (O,), each object's n, and its u from 1 to n. Returns (T, D) and (T, 5), where T
    is the sum of region_tokens.
    """
    frame_counts, token_counts = object_frames.tolist(), region_tokens.tolist()
    assert sum(frame_counts) == len(pooled), f"{sum(frame_counts)} region frames, but {len(pooled)} rows"
    # Pair i is rows i and i + 1. Which pairs are joined is decided without gradients.
    similarity = F.cosine_similarity(pooled[:-1].float(), pooled[1:].float(), dim=-1).tolist()
    ends = []  # of all runs of all objects: the row behind each
    start = 0
    for n, u in zip(frame_counts, token_counts):
        pairs = range(start, start + n - 1)
        most_similar = sorted(pairs, key=lambda i: similarity[i], reverse=True)  # leaves ties in order
        apart = sorted(most_similar[n - u :])
        start += n
        ends += [*(i + 1 for i in apart), start]
    merged = [run.mean(0) for run in pooled.tensor_split(ends[:-1])]
    merged_boxes = [run.mean(0) for run in boxes.tensor_split(ends[:-1])]
    return torch.stack(merged), torch.stack(merged_boxes)


def place(embeddings, is_placeholder, rows):
    """Returns embeddings (B, L, D) with rows (T, D), in order, where is_placeholder (B, L) is True."""
    found, expected = int(is_placeholder.sum()), len(rows)
    assert found == expected, f"{found} placeholders for {expected} rows"
    return embeddings.masked_scatter(is_placeholder[:, :, None], rows.to(embeddings.dtype))


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
        if os.path.exists(os.path.join(path, SETTINGS_FILE)):
            with open(os.path.join(path, SETTINGS_FILE)) as file:
                saved = json.load(file)
            known = [f.name for f in fields(data.Settings)]
            fits = isinstance(saved, dict) and set(saved) <= set(known)
            data.expect(fits, f"{SETTINGS_FILE} with settings out of {', '.join(known)}", saved)
        return data.Processor.from_pretrained(path, data.Settings(**saved | given))


def load_model(path, processor):
    """Returns the ReferringVideoLLM of a path as for load_processor, in float32, on the CPU.

    The tiny one has random weights, from torch's global seed. For others, raises data.DataError when weights
    are missing, left over, or of another shape.
    """
    if path == "tiny":
        return ReferringVideoLLM(Qwen3VLForConditionalGeneration(processor.config), processor)
    with model_errors_in_one_line(path):
        backbone, report = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them too
        )
        problems = {problem: sorted(map(str, names)) for problem, names in report.items() if names}
        data.expect(not problems, "weights that fit the model exactly", problems)
        model = ReferringVideoLLM(backbone, processor)
        if os.path.exists(os.path.join(path, SETTINGS_FILE)):  # train.py wrote this folder
            weights = load_file(os.path.join(path, REGION_WEIGHTS))
            try:
                model.region_encoder.load_state_dict(weights)
            except RuntimeError as error:  # names or shapes that do not fit
                raise ValueError(error) from None
    return model


@contextmanager
def model_errors_in_one_line(path):
    """Turns what libraries raise about missing or broken model files into a data.DataError of one line."""
    try:
        with data.within(f"--model {path}"):
            yield
    except data.DataError:  # is a ValueError, so it must pass before the next line
        raise
    except (OSError, ValueError, SafetensorError) as error:
        expected = '"tiny", a Hugging Face name, or a folder with config.json, weights and tokenizer'
        found = " ".join(str(error).split())[:300]
        raise data.DataError(f"expected {expected}, found: {found}", f"--model {path}") from error


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
