"""The model: a pretrained video LLM that reads region tokens in place of `<region>` placeholders.

    text, frames --Processor--> token ids, patches, positions (in the workers that load data)

    video patches --vision tower--> cells ----------------------------> the video's tokens --.
    still patches --vision tower--> cells --masked_average_pool--> a vector per region frame |
                                        |      `--temporal_merge--> at most u per object     |--> LLM
                                        |            `--RegionEncoder--> region tokens ------|
                                        `-----------------------------> an image's tokens ---|
    text ----embedding------------------------------------------------> the other tokens ----'

The backbone's own vision tower encodes annotated frames as still images. Cells are what its patch merger
gives to the LLM, which therefore understands the average of a region's cells. Initially a region token is
that average. Without regions the logits equal those of the plain backbone.

A batch to learn from (data.collate) is one row of tokens without padding, in which attention stays within
each sample. `pack` teaches a backbone to read it.

    processor = load_processor("Qwen/Qwen3-VL-2B-Instruct")  # or a folder that train.py wrote, or "tiny"
    model = load_model("Qwen/Qwen3-VL-2B-Instruct", processor)
    loss = model(batch)  # summed over the supervised tokens
    answers = model.generate(questions)  # collated for_generation
"""

import copy
import json
import math
import pickle
import re
import shutil
from dataclasses import asdict
from functools import partial
from itertools import chain, groupby, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jinja2 import TemplateError
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoTokenizer, vision_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

import data
from kernels import masked_average_pool

REGION_TOKEN = "<|region_pad|>"  # the placeholder of a region token
SETTINGS_FILE = "nanorefer.json"  # the data.Settings that a model was trained with
REGION_WEIGHTS = "region_encoder.safetensors"
UNREAD_FILES = ("video_preprocessor_config.json", "processor_config.json")  # kept for AutoProcessor alone
CHECKPOINT = "training.pt"  # what a run has learned so far, without frozen weights
LORA_SCALE = 2.0  # of B A; peft calls it alpha / rank


# ---- Text and pictures as the backbone reads them ----
END_OF_TURN = "<|im_end|>"
SYSTEM = f"<|im_start|>system\nYou are a helpful assistant.{END_OF_TURN}\n"
# What a conversation begins with, what an answer begins with, and whether a timestamp stands before each pair
# of frames (in Qwen2.5-VL, position ids tell the time). All families chat in ChatML.
FAMILIES = {
    "qwen2_5_vl": (SYSTEM, "", False),
    "qwen3_vl": ("", "", True),
    "qwen3_5": ("", "<think>\n\n</think>\n\n", True),
}


class Processor:
    """Turns a conversation and its frames into token ids and patches, in place of AutoProcessor, whose video
    half needs torchvision. settings: data.Settings.
    """

    def __init__(self, tokenizer, image_processor, config, settings):
        family = config.model_type.removesuffix("_moe")  # mixtures of experts read the same text
        expected = f"a model of one of the families {list(FAMILIES)}, dense or with _moe"
        data.expect(family in FAMILIES, expected, config.model_type)
        is_plain = getattr(config, "quantization_config", None) is None
        data.expect(is_plain, "weights that are not quantised", "quantization_config in config.json")
        layers = getattr(config.text_config, "layer_types", None) or ()
        data.expect("sliding_attention" not in layers, "attention to the whole sample", "use_sliding_window")
        self.system, self.thoughts, self.timestamps = FAMILIES[family]
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.config, self.settings = config, settings
        self.unread_files = {}  # name: text
        vision = config.vision_config
        self.patch_size, self.temporal_patch_size = vision.patch_size, vision.temporal_patch_size
        self.merge_size = vision.spatial_merge_size
        self.factor = self.patch_size * self.merge_size  # pixels along the side of a cell
        # Limits of a still's area in pixels. Despite their names, both edges are areas.
        least, most = (image_processor.size.get(edge) for edge in ("shortest_edge", "longest_edge"))
        expected = "size: shortest_edge and longest_edge in preprocessor_config.json"
        data.expect(least and most, expected, dict(image_processor.size))
        self.max_pixels = min(most, settings.region_pixels)
        self.min_pixels = min(least, self.max_pixels)
        names = ("image", "video", "vision_start", "vision_end")
        ids = [getattr(config, f"{name}_token_id") for name in names]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        # Where its file is missing, transformers makes an empty tokenizer for some families.
        data.expect(None not in tokens, f"a tokenizer that knows the ids {ids} of config.json", tokens)
        self.image_pad, self.video_pad, self.vision_start, self.vision_end = tokens
        tokenizer.add_tokens([REGION_TOKEN], special_tokens=True)
        self.region_token_id = tokenizer.convert_tokens_to_ids(REGION_TOKEN)
        # What no text may contain: control tokens and, where a prompt has empty ones, thoughts. (Some models
        # have our tags as tokens.)
        refused = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        refused = sorted(refused - {data.REGION_TAG, "<image>", "<video>"})
        self.refused = re.compile("|".join(map(re.escape, refused + self.thoughts.split())))
        # A backbone without layers and without memory for weights, which knows how positions count.
        config = copy.deepcopy(config)
        config.text_config.num_hidden_layers = config.vision_config.depth = 0
        with torch.device("meta"):
            self.empty_backbone = AutoModel.from_config(config)
        self._check_template()

    def save_pretrained(self, folder):
        """Writes all that load_processor reads."""
        for part in (self.config, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)
        Path(folder, SETTINGS_FILE).write_text(json.dumps(asdict(self.settings), indent=2))
        for name, text in self.unread_files.items():
            Path(folder, name).write_text(text)

    def still_size(self, height, width):
        """The (height, width) that an image or a whole frame is resized to."""
        return self._smart_resize(height, width, self.min_pixels, self.max_pixels)

    def frame_size(self, height, width):
        """The (height, width) that a video's sampled frames are resized to."""
        return self._smart_resize(height, width, self.factor**2, self.settings.frame_pixels)

    def _smart_resize(self, height, width, min_pixels, max_pixels):
        with data.readable("a picture of the usual proportions", f"{width}x{height} (width x height)"):
            return smart_resize(height, width, self.factor, min_pixels, max_pixels)

    def window_size(self, height, width):
        """The (height, width) that a window is resized to: as large as a still may be. (smart_resize may give
        80 x 80 pixels to a square where 96 x 96 fit exactly.)
        """
        rows = math.isqrt(self.max_pixels * height // (width * self.factor**2))
        columns = math.isqrt(self.max_pixels * width // (height * self.factor**2))
        # Of a thin window, one side is less than a cell and becomes one. The other may then have all cells.
        most = self.max_pixels // self.factor**2
        rows, columns = (max(1, min(cells, most)) for cells in (rows, columns))
        return rows * self.factor, columns * self.factor

    def patches(self, frames, depth):
        """uint8 (T, H, W, 3) -> uint8 (P, 3 * depth * patch * patch), an odd last frame being repeated.

        The patches of a cell stand side by side, as the vision tower's patch merger expects them. depth: the
        frames in a patch, temporal_patch_size in a video, and 1 in a still, which the model repeats.
        """
        p, m = self.patch_size, self.merge_size
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % depth, axis=0)])
        pattern = "(t a) (gh m ph) (gw n pw) c -> (t gh gw m n) (c a ph pw)"
        return rearrange(frames, pattern, a=depth, m=m, n=m, ph=p, pw=p)

    def image_prompt(self, cells):
        """The text that stands for an image of this many cells."""
        return self.vision_start + self.image_pad * cells + self.vision_end

    def video_prompt(self, times, cells):
        """The text that stands for a video. times: seconds of its frames. cells: of a pair of frames."""
        starts = range(0, len(times), self.temporal_patch_size)
        if not self.timestamps:
            return self.vision_start + self.video_pad * (cells * len(starts)) + self.vision_end
        # vision_start and vision_end enclose pairs alone, as in transformers 4.57 and 5.2, when Qwen3-VL and
        # Qwen3.5 came out. (5.10 encloses the whole video, too.)
        text = ""
        for start in starts:
            pair = times[start : start + self.temporal_patch_size]  # or an odd last frame alone
            text += f"<{(pair[0] + pair[-1]) / 2:.1f} seconds>"
            text += self.vision_start + self.video_pad * cells + self.vision_end
        return text

    def chat(self, turns, media_prompt):
        """A conversation in pieces: prompt, answer (with its end token), prompt, answer, ..., line break.

        Empty thoughts stay in all turns, as in trl's template for training Qwen3.5, so that training shows
        each turn as it is asked. (Qwen3.5's own template keeps them in the last one alone.)
        """
        pieces, before = [], self.system
        for question, answer in turns:
            question = data.MEDIA_TAG.sub(lambda _: media_prompt, question)
            prompt = f"<|im_start|>user\n{question}{END_OF_TURN}\n<|im_start|>assistant\n{self.thoughts}"
            pieces += [before + prompt, answer + END_OF_TURN]
            before = "\n"
        return [*pieces, before]

    def _check_template(self):
        """Raises DataError unless the checkpoint's own template writes a conversation as chat does."""
        pieces = self.chat([("<image>\nA?", "B."), ("C?", "")], self.image_prompt(1))
        ours = "".join(pieces[:3])
        first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]}
        messages = [first, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        with data.readable("a chat template", errors=(TemplateError, TypeError, ValueError)):
            theirs = self.tokenizer.apply_chat_template(messages, **options)
        # Qwen3.5's own leaves empty thoughts out of earlier answers.
        if theirs not in (ours, ours.replace(self.thoughts, "", 1)):
            raise data.DataError(f"expected a chat template that writes {ours!r}, found {theirs!r}")

    def encode(self, turns, shown, for_generation=False):
        """The "input_ids", "labels" and "position_ids" of a conversation, as data.EMPTY_SAMPLE has them.

        shown: the fields of EMPTY_SAMPLE about media and objects. for_generation: stop where the last answer
        would begin.
        """
        found = self.refused.search("\n".join(chain.from_iterable(turns)))
        data.expect(not found, "text without the tokenizer's control tokens", found and found.group())
        pieces = self.chat(turns, shown["media_prompt"])
        if for_generation:
            pieces = pieces[:-2]
        token_counts = iter(shown["region_tokens"])
        input_ids, labels = [], []
        for i, text in enumerate(pieces):
            text = re.sub(data.REGION_TAG, lambda tag: REGION_TOKEN * next(token_counts), text)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            input_ids += ids
            is_answer = i % 2 == 1
            labels += ids if is_answer else [data.IGNORE_INDEX] * len(ids)
        row = torch.tensor(input_ids)[None]
        is_image, is_video = row == self.config.image_token_id, row == self.config.video_token_id
        most = self.settings.max_length
        found = f"{len(input_ids)} ({(is_image | is_video).sum()} of them visual)"
        data.expect(len(input_ids) <= most, f"at most {most} tokens (max_length)", found)
        options = {"mm_token_type_ids": is_image.int() + 2 * is_video.int()}
        options["second_per_grid_ts"] = torch.tensor([shown["seconds_per_pair"]])  # read by Qwen2.5-VL alone
        if shown["kind"]:
            options[f"{shown['kind']}_grid_thw"] = torch.tensor([shown["prompt_grid"]])
        positions, _ = self.empty_backbone.get_rope_index(row, **options)
        encoded = {"input_ids": np.array(input_ids), "labels": np.array(labels)}
        return encoded | {"position_ids": positions[:, 0].numpy()}

    def tower_indices(self, grids):
        """What the vision tower computes from grids, (time, rows, columns) in patches, as keyword arguments.
        Left to itself, it does so in each forward pass on the GPU, and waits for it.
        """
        tower, grids, merge = self.empty_backbone.visual, torch.tensor(grids), self.merge_size
        bounds = vision_utils.get_vision_cu_seqlens(grids)
        indices = {
            "grid_thw": grids,
            "position_ids": vision_utils.get_vision_position_ids(grids, merge),
            "cu_seqlens": bounds,  # attention stays within a frame
            "max_seqlen": int(bounds.diff().max()),
        }
        if hasattr(tower, "window_size"):  # Qwen2.5-VL: in most layers it stays within a window of a frame
            size, patch = tower.window_size, self.patch_size
            windows, bounds = vision_utils.get_vision_window_index(grids, merge, size, patch)
            indices |= {"window_index": windows, "cu_window_seqlens": bounds}
            return indices | {"max_window_seqlen": int(bounds.diff().max())}
        # The others interpolate learned positions to the size of the grid.
        rows, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, merge
        )
        return indices | {"interp_indices": rows, "interp_weights": weights}


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

    def forward(self, cells, coverage, coverage_start, frame_start, boxes, object_frames, region_tokens):
        """The region tokens, (T, D). cells: (C, D). The others: see data.collate."""
        pooled = masked_average_pool(cells, coverage, frame_start, coverage_start)  # (R, D)
        share = temporal_merge(pooled, object_frames, region_tokens, sum(region_tokens))  # (T, R)
        # In float32 also under autocast and FSDP, because bfloat16 would give times in steps of 1/256.
        with torch.autocast(cells.device.type, enabled=False):
            merged = (share @ pooled.float()).to(pooled.dtype)  # (T, D)
            position = self._position(share @ boxes)
        return merged + self.mlp(merged) + position

    def _position(self, boxes):
        """P(box), float32 (T, D). boxes: float32 (T, 5) of (cx, cy, w, h, t) in [0, 1].

        From sinusoids alone, the direction of a motion takes several times as long to learn.
        """
        scaled = 2 * boxes - 1
        frequencies = 2 ** torch.arange(self.FREQUENCIES, device=boxes.device)
        angles = torch.pi * boxes[:, :, None] * frequencies  # (T, 5, FREQUENCIES)
        code = [scaled, scaled * scaled[:, 4:], angles.sin().flatten(1), angles.cos().flatten(1)]
        first, last = self.position[0], self.position[2]
        hidden = F.gelu(F.linear(torch.cat(code, dim=1), first.weight.float(), first.bias.float()))
        return F.linear(hidden, last.weight.float(), last.bias.float())


@torch.no_grad()
def temporal_merge(pooled, object_frames, region_tokens, num_tokens):
    """Makes u tokens of an object's n frames (VideoRefer, section 3.2.2): the n - u most similar pairs of
    neighbours are joined (by cosine; of equal ones the earlier), and each run of joined frames is averaged.

    pooled: (R, D), a row for each region frame, ordered by object, then time. object_frames, region_tokens:
    n and u of each object. num_tokens: T, the sum of u. Returns float32 (T, R): share[t, r], that of region
    frame r in token t.
    """
    share = torch.zeros(num_tokens, len(pooled), device=pooled.device)
    row = token = 0  # where the object begins
    for n, u in zip(object_frames, region_tokens):
        own = pooled[row : row + n].float()
        similarity = F.cosine_similarity(own[:-1], own[1:], dim=-1)  # (n - 1,), of each pair
        most_similar = similarity.sort(descending=True, stable=True).indices[: n - u]
        begins_token = torch.ones(n, dtype=torch.long, device=pooled.device)
        begins_token[most_similar + 1] = 0
        token_of_row = begins_token.cumsum(0) - 1  # (n,)
        belongs = token_of_row == torch.arange(u, device=pooled.device)[:, None]  # (u, n)
        share[token : token + u, row : row + n] = belongs / belongs.sum(1, keepdim=True)
        row, token = row + n, token + u
    return share


# ---- The video LLM with regions ----
class ReferringVideoLLM(nn.Module):
    """A video LLM of transformers, and a RegionEncoder. Shapes: rows of L tokens (one to learn from, B for
    generation), width D of the LLM, vocabulary V.
    """

    def __init__(self, backbone, processor):
        super().__init__()
        self.backbone = backbone
        self.region_token_id = processor.region_token_id
        # Most published checkpoints have spare rows.
        if self.region_token_id >= backbone.get_input_embeddings().num_embeddings:
            backbone.resize_token_embeddings(self.region_token_id + 1)
        pack(backbone)
        # What ends an answer: in published generation_config.json one id, or several.
        listed, tokenizer = backbone.generation_config.eos_token_id, processor.tokenizer
        self.end_token_ids = set(listed if isinstance(listed, list) else [listed])
        self.end_token_ids |= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)}
        self.region_encoder = RegionEncoder(backbone.config.text_config.hidden_size)
        images = processor.image_processor
        self.register_buffer("image_mean", torch.tensor(images.image_mean)[:, None], persistent=False)
        self.register_buffer("image_std", torch.tensor(images.image_std)[:, None], persistent=False)

    def forward(self, batch):
        """The cross-entropy of a batch, summed over its supervised tokens (float32 scalar)."""
        # Not of all positions, which would take much memory: the vocabulary has 150,000 tokens.
        logits = self.logits(batch, batch["target_index"])
        return F.cross_entropy(logits.float(), batch["targets"], reduction="sum")

    def logits(self, batch, index=None):
        """The logits of every position, (rows, L, V), or of one row's positions in index (S,), (S, V)."""
        llm = self.backbone.model.language_model
        with self._mixed_precision():
            hidden = llm(**self._inputs(batch), use_cache=False).last_hidden_state  # (rows, L, D)
            return self.backbone.lm_head(hidden if index is None else hidden[0].index_select(0, index))

    def _mixed_precision(self):
        """On a GPU, matrices are multiplied in bfloat16; weights that learn stay in float32."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.image_mean.is_cuda)

    def _inputs(self, batch):
        """What the LLM reads, as its keyword arguments."""
        vision = self.backbone.model.visual(self._pixels(batch), **batch["tower"])
        cells = vision.pooler_output  # (C, D)
        # It runs even without regions, because DDP waits for a gradient of each of its weights.
        tokens = self.region_encoder(cells, **batch["regions"])  # (T, D)
        # Each layer adds to them, which needs float32, also where they are frozen and kept in bfloat16.
        embeddings = self.backbone.get_input_embeddings()(batch["input_ids"]).float()  # (rows, L, D)
        flat = embeddings.flatten(0, 1)  # all rows in one, as the indices count
        shown = batch["prompt_cells"]  # those of images and videos, not of the views of regions
        flat = flat.index_copy(0, batch["visual_index"], cells.index_select(0, shown).float())
        flat = flat.index_copy(0, batch["region_index"], tokens.float())
        inputs = {"inputs_embeds": flat.view_as(embeddings), "position_ids": batch["position_ids"]}
        if hasattr(vision, "deepstack_features"):  # Qwen3-VL's first layers add them to the visual tokens
            inputs["visual_pos_masks"] = batch["visual_index"]
            inputs["deepstack_visual_embeds"] = [x.index_select(0, shown) for x in vision.deepstack_features]
        return inputs | batch["attention"]

    def _pixels(self, batch):
        """Normalises the patches of all stills, then all videos, as the checkpoint's image processor does."""
        copies = self.backbone.config.vision_config.temporal_patch_size  # of a still
        pixels = []
        for patches, repeats in ((batch["still_patches"], copies), (batch["video_patches"], 1)):
            if len(patches):
                values = patches.view(len(patches), 3, -1).float() / 255  # (P, 3, n)
                values = (values - self.image_mean) / self.image_std
                pixels.append(values.repeat(1, 1, repeats).flatten(1))
        return torch.cat(pixels).to(self.backbone.model.visual.dtype)

    @torch.no_grad()
    def generate(self, batch, max_new_tokens=128):
        """Answers a batch collated for generation, greedily, by B lists of token ids without end tokens."""
        llm = self.backbone.model.language_model
        mask = batch["attention"]["attention_mask"]
        answers = [[] for _ in mask]
        with self._mixed_precision():
            inputs = self._inputs(batch)
            for step in range(max_new_tokens):
                output = llm(**inputs, use_cache=True)
                scores = self.backbone.lm_head(output.last_hidden_state[:, -1])
                scores[:, self.region_token_id] = -torch.inf  # a placeholder is not an answer
                token = scores.argmax(-1)
                for answer, token_id in zip(answers, token.tolist()):
                    answer.append(token_id)
                if all(self.end_token_ids.intersection(answer) for answer in answers):
                    break
                # The cache holds what came before, so from here on the LLM reads only the new token.
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                # A prompt ends in text, whose three positions are equal.
                positions = batch["position_ids"][:, :, -1:] + 1 + step  # (3, B, 1)
                embeddings = self.backbone.get_input_embeddings()(token[:, None]).float()
                inputs = {"inputs_embeds": embeddings, "position_ids": positions, "attention_mask": mask}
                inputs["past_key_values"] = output.past_key_values
        # A row went on behind its end token until all had one.
        return [list(takewhile(lambda x: x not in self.end_token_ids, answer)) for answer in answers]

    # A first reading may skip the rest of the class: adapters, what learns, what is saved.
    def add_lora(self, rank):
        """Adds adapters of peft to the LLM's matrices, but for experts (which are no nn.Linear). W x becomes
        W x + 2 B A x (LoRA, https://arxiv.org/abs/2106.09685), where B, (out, rank), is zero at first.
        """
        adapters = [name for name, _ in self.named_parameters() if ".lora_" in name]
        data.expect(not adapters, "--train lora: a model without adapters, as OUT/final is", adapters)
        settings = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules="all-linear")
        inject_adapter_in_model(settings, self.backbone.model.language_model)

    def layers(self):
        """The layers of tower and LLM: FSDP gathers, and checkpointing recomputes, one at a time."""
        return [*self.backbone.model.visual.blocks, *self.backbone.model.language_model.layers]

    def parameter_groups(self):
        """{"region", "projector", "llm", "vision", "lora": list of parameters}, each once."""
        groups = {part: [] for part in ("region", "projector", "llm", "vision", "lora")}
        for name, p in self.named_parameters():  # lm_head may share the embeddings, which come once
            if ".lora_" in name:
                part = "lora"
            elif name.startswith("region_encoder."):
                part = "region"
            elif ".visual." in name:
                part = "projector" if "merger" in name else "vision"
            else:
                part = "llm"
            groups[part].append(p)
        return groups

    def save_pretrained(self, folder, processor, weights=None):
        """Writes the backbone so that it loads with transformers alone, and the rest beside it. Adapters are
        merged, W + 2 B A, in float32. (peft would do so in place, and round a W that is frozen in bfloat16.)
        weights: {name: tensor} to save in place of the parameters.
        """
        weights = weights or self.state_dict()
        saved = {"backbone": {}, "region_encoder": {}}
        for name, _ in self.named_parameters():  # each once, also where lm_head shares the embeddings
            if ".lora_" in name:
                continue
            weight = weights[name].detach().float()
            if ".base_layer.weight" in name:  # what peft calls a matrix that it adapts
                layer = name.removesuffix(".base_layer.weight")
                a, b = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
                weight = weight + LORA_SCALE * (b @ a)
            part, name_in_part = name.replace(".base_layer.", ".").split(".", maxsplit=1)
            saved[part][name_in_part] = weight
        expected = sum(weight.numel() for part in saved.values() for weight in part.values())
        processor.save_pretrained(folder)  # and a config.json, which is replaced below
        self.backbone.save_pretrained(folder, state_dict=saved["backbone"])
        save_file(saved["region_encoder"], Path(folder, REGION_WEIGHTS))
        config = self.backbone.config
        # transformers has written the dtype of one weight, which may be frozen in bfloat16.
        config.dtype = torch.float32
        # It does not load the layers that guess further tokens, so that others should not look for them.
        for part in (config, config.text_config):
            part.__dict__.pop("mtp_num_hidden_layers", None)
        config.save_pretrained(folder)
        # transformers may name and cut the weights in another way, but none may be missing.
        written = 0
        for path in Path(folder).glob("*.safetensors"):
            shutil.copymode(Path(folder, "config.json"), path)  # safetensors hides it from all other users
            with safe_open(path, "pt") as file:
                written += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        data.expect(written == expected, f"{folder} with {expected} weights", written)


# ---- Attention within a sample ----
# transformers hands the bounds of samples and frames only to an attention whose name contains "flash".
ATTENTION = "flash_within_samples"


def attention_within_samples(module, query, key, value, attention_mask, scaling, dropout=0.0, **options):
    """Attention within each sample of a row (in the vision tower: within each frame or window).

    query, key, value: (1, heads, L, size); key and value may have fewer heads. cu_seq_lens_q: int32, 0 and
    the end of each sample (none in a padded batch). max_length_q: int. Returns (1, L, heads, size) and None.
    """
    bounds, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    is_causal = options.get("is_causal", module.is_causal)  # the tower gives it, the LLM does not
    # varlen_attn of torch 2.11 knows no groups of query heads that share a key.
    key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, size)
    if query.is_cuda:
        assert not dropout, f"varlen_attn has no dropout, found {dropout}"
        # Autocast does not know varlen_attn, and q_norm leaves query and key in float32.
        q, k, v = query.bfloat16(), key.bfloat16(), value.bfloat16()
        seen = (-1, 0) if is_causal else (-1, -1)
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=seen)
        return out.to(query.dtype)[None], None
    # On a CPU one after another, but neighbours of equal length (frames of a video) are one batch.
    outputs, start = [], 0
    for length, group in groupby(bounds.diff().tolist()):
        count = len(list(group))
        rows = slice(start, start + count * length)
        start = rows.stop
        q, k, v = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_within_samples)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
# Experts multiply with _grouped_mm, which autocast does not know. In float32 it waits for the GPU.
torch.library.register_autocast("aten::_grouped_mm", "cuda", torch.bfloat16)


def pack(backbone):
    """Makes a backbone read rows of several samples, and never wait for the GPU in a training step."""
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
    """Adds rows (V, D) at index (V,) of hidden (B, L, D). transformers' own waits for the size of a mask."""
    return hidden.flatten(0, 1).index_add(0, index, rows.to(hidden.dtype)).view_as(hidden)


# ---- A first reading may end here. Below stand the files of models, and the tiny model. ----
disable_progress_bar()  # "Loading weights" of each file

MODEL_FILES = '"tiny", a Hugging Face name, or a folder with config.json, weights and tokenizer'
# RuntimeError: names or shapes that do not fit. KeyError, UnpicklingError: no checkpoint, but named as one.
MODEL_ERRORS = (*data.FILE_ERRORS, SafetensorError, RuntimeError, KeyError, pickle.UnpicklingError)


def find_file(path, name):
    """The path of a file that not every model has, or None. path: Hugging Face name or folder."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)


def load_processor(path, texts=(), **settings):
    """The Processor of "tiny", a Hugging Face name, or a folder. Raises data.DataError.

    settings: fields of data.Settings. What is None or not given is as the model was trained, or a default.
    texts: what the tiny model's tokenizer learns its words from.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if path == "tiny":
        config, tokenizer, image_processor = build_tiny(texts)
        return Processor(tokenizer, image_processor, config, data.Settings(**given))
    with data.readable(MODEL_FILES, f"--model {path}", errors=MODEL_ERRORS):
        is_named = "/" in str(path) or Path(path).is_dir()
        data.expect(is_named, MODEL_FILES, path)  # transformers would try for 40 s
        data.expect(not Path(path, "final").is_dir(), f"a model, such as {path}/final", f"the run {path}")
        saved = data.PRETRAINED_PIXELS
        if file := find_file(path, SETTINGS_FILE):
            saved = json.loads(Path(file).read_text())
            # A missing one gets no default, because the model may have been trained with another.
            names = asdict(data.Settings()).keys()
            fits = isinstance(saved, dict) and saved.keys() == names
            data.expect(fits, f"{SETTINGS_FILE} with the settings {', '.join(names)}", saved)
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if file := find_file(path, "chat_template.json"):  # of older checkpoints, for images and videos
            tokenizer.chat_template = json.loads(Path(file).read_text())["chat_template"]
        # All families use this class; AutoImageProcessor may choose one that needs torchvision.
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        processor = Processor(tokenizer, image_processor, config, data.Settings(**saved | given))
        for name in UNREAD_FILES:
            if file := find_file(path, name):
                processor.unread_files[name] = Path(file).read_text()
        return processor


def load_model(path, processor):
    """The ReferringVideoLLM of a path as for load_processor, in float32, on the CPU. Raises data.DataError.

    The tiny one has random weights, from torch's global seed. A checkpoint of a run (OUT/step-NNNNNN) holds
    what learned; the rest comes from the model that the run began with.
    """
    if path == "tiny":
        config = copy.deepcopy(processor.config)  # because pack changes it
        return ReferringVideoLLM(AutoModelForImageTextToText.from_config(config), processor)
    with data.readable(MODEL_FILES, f"--model {path}", errors=MODEL_ERRORS):
        if file := find_file(path, CHECKPOINT):
            ckpt = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            torch.manual_seed(ckpt["config"]["seed"])  # as in the run, for what is random at its beginning
            model = load_model(ckpt["config"]["model"], processor)
            if ckpt["config"]["lora_rank"]:
                model.add_lora(ckpt["config"]["lora_rank"])
            model.load_state_dict(model.state_dict() | ckpt["model"])
            return model
        model = ReferringVideoLLM(load_weights(AutoModelForImageTextToText, path), processor)
        if find_file(path, SETTINGS_FILE):  # train.py wrote this model
            model.region_encoder.load_state_dict(load_file(cached_file(path, REGION_WEIGHTS)))
    return model


def load_weights(model_class, path):
    """model_class.from_pretrained(path) in float32. Raises data.DataError unless the weights fit exactly."""
    # A weight of another size would raise an error of its own. "Ignored", it comes into the report.
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = model_class.from_pretrained(path, **options)
    problems = {problem: sorted(map(str, names)) for problem, names in report.items() if names}
    data.expect(not problems, "weights that fit the model exactly", problems)
    # transformers attaches those that lie beside a model, and would not save them.
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    data.expect(not adapters, "a model without adapters (merge them first)", adapters)
    return model


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
    """(config, tokenizer, image processor) of a small Qwen3-VL, whose tokenizer learns from texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=500, min_frequency=0, show_progress=False)
    ends = {"eos_token": END_OF_TURN, "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **ends)
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    control_tokens = [f"<|{name}|>" for name in names]
    tokenizer.add_tokens(control_tokens, special_tokens=True)
    tokenizer.add_tokens(["user", "assistant", " seconds"])  # the words of every prompt
    tokenizer.chat_template = TINY_TEMPLATE
    # The vocabulary: at most 500 of the texts, 7 control tokens, 3 words, and the region placeholder.
    llm = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    llm |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "initializer_range": 0.16}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_interleaved": True}
    llm["rope_parameters"] = rope | {"mrope_section": [6, 5, 5]}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 128, "num_position_embeddings": 144, "deepstack_visual_indexes": [0]}
    vision["initializer_range"] = 0.06
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    keys = dict(zip(names, tokenizer.convert_tokens_to_ids(control_tokens[3:])))
    keys |= {"text_config": llm, "vision_config": vision, "tie_word_embeddings": True}
    config = AutoConfig.for_model("qwen3_vl", **keys)
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 16 * 16, "longest_edge": 1 << 20}
    image_processor = Qwen2VLImageProcessorPil(size=size, image_mean=half, image_std=half, patch_size=8)
    return config, tokenizer, image_processor
