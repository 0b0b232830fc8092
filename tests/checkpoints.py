"""Small random checkpoints of all families and of SAM 2, written by transformers as published ones are."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.sam2_video.configuration_sam2_video import (
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
)
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoModel
from transformers.video_utils import VideoMetadata

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")

# The published templates, without tools. Qwen2.5-VL's begins with a system turn of its own.
SYSTEM = "{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
TEMPLATE = (
    "{% for message in messages %}@SYSTEM@<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3.5's strips every message, begins the answers behind the last question with thoughts, and is asked with
# enable_thinking=False for none, which is the default of the smaller models, not of the larger ones, as here.
# It was compared with the copies of the published ones in trl (trl/chat_templates/qwen3_5_*.jinja).
THINKING_TEMPLATE = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% set last = namespace(question=-1) %}{% for message in messages if message.role == 'user' %}"
    "{% set last.question = 2 * loop.index0 %}{% endfor %}"
    "{% if last.question < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}"
    "{% for message in messages %}{% set text = show(message.content) | trim %}{% set thoughts = '' %}"
    "{% if message.role == 'assistant' and '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > last.question %}"
    "<think>\n{{ thoughts }}\n</think>\n\n{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
names = "endoftext im_start im_end vision_start vision_end image_pad video_pad"
SPECIAL = [f"<|{name}|>" for name in names.split()]


def make_tokenizer(template):
    """Bytes, with a few merges, so that tokens and characters differ in number."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("e", "r"), ("o", "n")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    fast.add_tokens(SPECIAL, special_tokens=True)
    fast.chat_template = template
    return fast


def make_checkpoint(folder, family, spare_rows=8):
    """Writes a checkpoint to folder. spare_rows: embedding rows that the tokenizer does not use."""
    hybrid = family.startswith("qwen3_5")  # with layers of linear attention
    template = TEMPLATE.replace("@SYSTEM@", SYSTEM if family == "qwen2_5_vl" else "")
    tokenizer = make_tokenizer(THINKING_TEMPLATE if hybrid else template)
    patch, mean, std = 16, [0.5] * 3, [0.5] * 3
    rope = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 2, 2]}
    text = {"vocab_size": len(tokenizer) + spare_rows, "hidden_size": 64, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    text["rope_parameters"] = rope
    vision = {"depth": 3, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "out_hidden_size": 64}
    if family == "qwen2_5_vl":
        patch = 14
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        # The published have 2 position ids a second; more tell times apart that differ by a frame.
        vision |= {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 7}
    else:
        text["head_dim"], vision["num_position_embeddings"] = 16, 64
        rope["mrope_interleaved"] = True
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        vision["deepstack_visual_indexes"] = [0, 1]
    if hybrid:
        text["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 32}
        # Of a head's 32 numbers a quarter is rotated, by 4 frequencies.
        rope |= {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
    if family.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2}
        text |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    names = "vision_start_token_id vision_end_token_id image_token_id video_token_id".split()
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(SPECIAL[3:])))
    parts = {"text_config": text, "vision_config": vision | {"patch_size": patch}}
    config = AutoConfig.for_model(family, **parts, **ids, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, p in model.named_parameters():
        if p.ndim > 1:  # transformers starts with 0.02; larger weights make every input matter
            torch.nn.init.normal_(p, std=0.1)
        elif name.endswith("A_log"):  # so does a slower decay: states then reach from sample to sample
            torch.nn.init.uniform_(p, -5, -2)
    cell = (2 * patch) ** 2  # pixels
    size = {"shortest_edge": 4 * cell, "longest_edge": 64 * cell}
    processor = Qwen2VLImageProcessorPil(size=size, patch_size=patch, image_mean=mean, image_std=std)
    for part in (model.eval(), tokenizer, processor):
        part.save_pretrained(folder)
    return Path(folder)


def make_sam(folder):
    """Writes a SAM 2 video model that sees pictures of 128x128 pixels, and an object on most of them."""
    size, sides = 128, [[32, 32], [16, 16], [8, 8]]
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [size, size]}
    backbone |= {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128]}
    backbone |= {"num_attention_heads_per_stage": [1, 2, 2, 2], "global_attention_blocks": [3]}
    vision = {"backbone_config": backbone, "fpn_hidden_size": 128}
    vision |= {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": sides}
    memory = {"memory_attention_hidden_size": 128, "memory_attention_num_layers": 2}
    memory |= {"memory_attention_feed_forward_hidden_size": 64, "memory_attention_rope_feat_sizes": [8, 8]}
    memory |= {"memory_encoder_hidden_size": 128, "mask_downsampler_embed_dim": 128}
    memory |= {"memory_fuser_embed_dim": 128, "memory_fuser_intermediate_dim": 64}
    # Not as a dict, because transformers 5.17 takes that for a config of the prompt encoder.
    sizes = {"hidden_size": 128, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 64}
    decoder = Sam2VideoMaskDecoderConfig(**sizes)
    memory["prompt_encoder_config"] = {"hidden_size": 128, "image_size": size, "mask_input_channels": 4}
    config = Sam2VideoConfig(image_size=size, vision_config=vision, mask_decoder_config=decoder, **memory)
    torch.manual_seed(0)
    model = Sam2VideoModel(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.12)
    torch.nn.init.constant_(model.mask_decoder.pred_obj_score_head.proj_out.bias, 6.0)  # above 0: it sees one
    model.eval().save_pretrained(folder)
    return Path(folder)


def transformers_processor(folder, family, num_frames, frame_pixels, region_pixels):
    """transformers' own, for videos of 24 frames a second. Between its own sampling and its own patches, PIL
    resizes frames as there it does images; for videos, transformers would need torchvision."""
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images.size = dict(images.size) | {"longest_edge": region_pixels}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|region_pad|>"], special_tokens=True)

    class VideoProcessor(Qwen3VLVideoProcessor):
        def __init__(self):
            self.patch_size = images.patch_size

        def __call__(self, videos, **options):
            metadata = VideoMetadata(total_num_frames=len(videos[0]), fps=24.0)
            metadata.frames_indices = self.sample_frames(metadata, num_frames=num_frames).tolist()
            factor = self.patch_size * self.merge_size
            size = smart_resize(*videos[0].shape[1:3], factor, factor**2, frame_pixels)
            frames = [Image.fromarray(videos[0][k]).resize(size[::-1]) for k in metadata.frames_indices]
            values = (np.stack(frames) / 255 - images.image_mean) / images.image_std
            values = torch.tensor(values, dtype=torch.float32).permute(0, 3, 1, 2)[None]
            patches, *grid = self.patchify(values, self.patch_size, self.merge_size, self.temporal_patch_size)
            patches = {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}
            return patches | {"video_metadata": [metadata]}

    class Processor(Qwen2_5_VLProcessor if family == "qwen2_5_vl" else Qwen3VLProcessor):
        def check_argument_for_proper_class(self, name, part):
            """Would look for the class of part, and for that in torchvision."""

    return Processor(images, tokenizer, VideoProcessor())
