"""Small random checkpoints of all families and of SAM 2, written by transformers as published ones are."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")

# The published templates, without tools. Qwen2.5-VL's begins with a system turn of its own.
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
TEMPLATE = (
    "{% for message in messages %}@SYSTEM@<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
    "{% set text = show(message.content) | trim %}"
    "{% if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}"
    "{% set last.question = 2 * loop.index0 %}{% endif %}{% endfor %}"
    "{% if last.question < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}"
    "{% for message in messages %}{% set text = show(message.content) | trim %}{% set thoughts = '' %}"
    "{% if message.role == 'assistant' and '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > last.question %}"
    "<think>\n{{ thoughts }}\n</think>\n\n{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def make_tokenizer(template):
    """Bytes, with a few merges, so that tokens and characters differ in number."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("e", "r"), ("o", "n")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_tokens(list(SPECIAL), special_tokens=True)
    fast.chat_template = template
    return fast


def make_checkpoint(folder, family, seed=0, spare_rows=8):
    """Writes a checkpoint to folder. spare_rows: embedding rows that the tokenizer does not use."""
    system = SYSTEM if family == "qwen2_5_vl" else ""
    hybrid = family.startswith("qwen3_5")  # with layers of linear attention
    template = THINKING_TEMPLATE if hybrid else TEMPLATE.replace("@SYSTEM@", system)
    tokenizer = make_tokenizer(template)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    patch, mean, std = 16, [0.5] * 3, [0.5] * 3
    text = {
        "vocab_size": len(tokenizer) + spare_rows,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "patch_size": patch,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
    }
    if family == "qwen2_5_vl":
        patch = 14
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        vision |= {"patch_size": patch, "window_size": 56, "fullatt_block_indexes": [1]}
        vision |= {"tokens_per_second": 2}
        del text["head_dim"], vision["num_position_embeddings"]
    else:
        text["rope_parameters"] |= {"mrope_interleaved": True}
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        vision |= {"deepstack_visual_indexes": [0, 1]}
    if hybrid:
        text |= {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "head_dim": 32,
        }
        # Of a head's 32 numbers a quarter is rotated, by 4 frequencies.
        text["rope_parameters"] |= {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
    if family.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if family == "qwen3_5_moe":
        text |= {"shared_expert_intermediate_size": 24}
        del text["intermediate_size"]
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for name, p in model.named_parameters():
        if p.ndim > 1:  # transformers starts with 0.02; larger weights make every input matter
            torch.nn.init.normal_(p, std=0.1)
        elif name.endswith("A_log"):  # so does a slower decay: states then reach from sample to sample
            torch.nn.init.uniform_(p, -5, -2)
    factor = patch * 2
    size = {"shortest_edge": 4 * factor**2, "longest_edge": 64 * factor**2}
    processor = Qwen2VLImageProcessorPil(size=size, patch_size=patch, image_mean=mean, image_std=std)
    folder = Path(folder)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_sam(folder, seed=0):
    """Writes a SAM 2 video model that sees pictures of 128x128 pixels, and an object on most of them."""
    size = 128
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 16,
        "image_size": [size, size],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 2, 2],
        "global_attention_blocks": [3],
    }
    config = Sam2VideoConfig(
        image_size=size,
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 128,
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": size, "mask_input_channels": 4},
        # Not as a dict, because transformers 5.17 takes that for a config of the prompt encoder.
        mask_decoder_config=Sam2VideoMaskDecoderConfig(
            hidden_size=128, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=64
        ),
        memory_attention_hidden_size=128,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=128,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=64,
    )
    torch.manual_seed(seed)
    model = Sam2VideoModel(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.12)
    torch.nn.init.constant_(model.mask_decoder.pred_obj_score_head.proj_out.bias, 6.0)  # above 0: it sees one
    model.eval().save_pretrained(folder)
    return Path(folder)
