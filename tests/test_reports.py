"""Inputs after public reports about programs like this one, each of which was once read wrongly or ended in a
traceback here. A test for each kind; the right value comes from the standard, or from another library."""

import json
import os
import resource
import shutil
import signal
import stat
import struct
import unicodedata

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from clips import draw_number, read_number, write_video
from helpers import Program, box_mask, read_lines, run, sample, write_json, write_texts
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import data
import eval as evaluation
import model as models
import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3_vl")


@pytest.fixture
def changed(checkpoint, tmp_path):
    """changed(name, **values) -> a copy of the checkpoint with other values in this JSON file."""

    def changed(name, **values):
        folder = shutil.copytree(checkpoint, tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
        content = json.loads((folder / name).read_text())
        return write_json(folder / name, content | values).parent

    return changed


# ---- pictures and videos ----
def test_pictures_of_16_bits_keep_their_levels(tmp_path):
    """Truth: the upper byte of each value. PIL clips at 255, which leaves 2 of 256 levels."""
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert (data.open_media(tmp_path / "a.png").read([0])[0] == (ramp >> 8)[:, :, None]).all()
    for values in (ramp.astype(np.int32), ramp.astype(np.float32)):  # which no rule brings to 8 bits
        Image.fromarray(values).save(tmp_path / "b.tif")
        with pytest.raises(data.DataError, match="b.tif.*mode [IF]"):
            data.open_media(tmp_path / "b.tif").read([0])


def test_videos_are_turned_and_mirrored_as_their_matrix_says(tmp_path):
    """Truth: QuickTime's definition, that the pixel (x, y) is shown at (ax + cy, bx + dy)."""
    upright = draw_number(5)
    turned = upright.transpose(1, 0, 2)
    stored = {
        (0, 1, -1, 0): np.rot90(upright),
        (-1, 0, 0, -1): np.rot90(upright, 2),
        (0, -1, 1, 0): np.rot90(upright, 3),
        (-1, 0, 0, 1): upright[:, ::-1],
        (1, 0, 0, -1): upright[::-1],
        (0, 1, 1, 0): turned,
        (0, -1, -1, 0): turned[::-1, ::-1],
    }
    for (a, b, c, d), pixels in stored.items():
        path = write_video(tmp_path / "a.mp4", pictures=[pixels] * 3)
        content = bytearray(path.read_bytes())
        struct.pack_into(">5i", content, content.find(b"tkhd") + 44, a << 16, b << 16, 0, c << 16, d << 16)
        path.write_bytes(content)
        picture = data.open_media(path).read([1])[1]
        assert picture.shape == upright.shape and read_number(picture) == 5


def test_masks_that_are_pictures(tmp_path):
    """Truth: the pixels that were drawn."""
    truth = box_mask(60, 80, 20, 10, 40, 30).astype(bool)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3))
    numbers = truth * np.uint8(2)
    numbers[50:, :10] = 1
    two_objects = Image.fromarray(numbers)
    two_objects.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    pictures = {
        "cut-out.png": Image.fromarray(np.dstack([noise, truth * 255]).astype(np.uint8)),
        "two.png:2": two_objects,
        "soft.png": Image.fromarray(truth * np.uint8(255)).filter(ImageFilter.GaussianBlur(1)),
        "lossy.jpg": Image.fromarray(truth * np.uint8(255)),
        "one.png": Image.fromarray(truth * np.uint8(2)).convert("P"),
        "dark blue.png": Image.fromarray(truth[:, :, None] * np.uint8([0, 0, 100])),
        "16.png": Image.fromarray((truth * 40000).astype(np.uint16)),
    }
    info = data.MediaInfo(1, 24.0, 60, 80, is_image=True)
    for name, picture in pictures.items():
        picture.save(tmp_path / name.removesuffix(":2"))
        mask = evaluation.read_object([f"{tmp_path}/{name}"], info)[0]
        assert (mask & truth).sum() > 0.95 * (mask | truth).sum(), name
    for pointed in ("two.png", "two.png:3"):
        with pytest.raises(data.DataError, match=r"\[1, 2\]"):
            evaluation.read_object([f"{tmp_path}/{pointed}"], info)


# ---- models ----
def test_configs_that_cannot_be_trained_are_one_error(changed, checkpoint, tmp_path):
    """Before anything is loaded. The error names the key."""
    text_config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    slides = text_config | {"layer_types": ["sliding_attention"] * 3}
    for file, values, key in (
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("config.json", {"text_config": slides}, "use_sliding_window"),
        ("preprocessor_config.json", {"size": {"min_pixels": 4096, "max_pixels": 65536}}, "shortest_edge"),
    ):
        with pytest.raises(data.DataError, match=key):
            models.load_processor(str(changed(file, **values)))
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(data.DataError, match="run/final"):
        models.load_processor(str(tmp_path / "run"))


def test_fields_of_a_tokenizer_that_fine_tunes_change(changed, tmp_path):
    """Without a pad token, or with a placeholder as one, replies are the same; our tags may be tokens."""
    predictions = []  # to questions of two lengths, so that one is padded
    texts = write_json(tmp_path / "d.json", [sample("Why?", "So."), sample("What is it for?", "Fun.")])
    for pad in ("<|endoftext|>", None, "<|video_pad|>"):
        folder, out = changed("tokenizer_config.json", pad_token=pad), tmp_path / f"out{len(predictions)}"
        run(f"eval.py data {texts} --model {folder} --out {out} --workers 0 --max-new-tokens 4")
        predictions.append((out / "predictions.jsonl").read_text())
    assert predictions[0] == predictions[1] == predictions[2]
    folder = changed("tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<region>", "<image>", "<video>"]})
    tokenizer.save_pretrained(folder)
    processor = models.load_processor(str(folder))
    shown = data.EMPTY_SAMPLE | {"region_tokens": [2]}
    ids = processor.encode([("<video>\nIs <region> red?", "Yes.")], shown)["input_ids"]
    assert (ids == processor.region_token_id).sum() == 2


def test_adapters_beside_a_model_are_refused(checkpoint, tmp_path):
    """transformers attaches those that peft wrote into a model's folder, and would not save them."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(data.DataError, match="lora"):
        models.load_model(str(folder), models.load_processor(str(folder)))


def test_final_has_what_the_base_had(changed, checkpoint, tmp_path):
    """Settings that we do not read, modes as of any new file, and no key of weights that are not there."""
    text_config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    base = changed("config.json", text_config=text_config | {"mtp_num_hidden_layers": 1})
    video = write_json(base / "video_preprocessor_config.json", {"fps": 3}).read_text()
    texts, out = write_texts(tmp_path / "d.json", 2), tmp_path / "run"
    run(f"train.py --data {texts} --model {base} --out {out} --steps 1 --workers 0 --train region")
    assert (out / "final/video_preprocessor_config.json").read_text() == video
    assert "mtp_num_hidden_layers" not in (out / "final/config.json").read_text()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (out / "final").iterdir()}
    assert modes == {stat.S_IMODE(texts.stat().st_mode)}


def test_a_full_disk_is_one_error_with_its_path(tmp_path):
    """Truth: what the system says. A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = {"w": torch.zeros(10_000)}

    def by_torch(path):
        with open(path, "wb") as file:
            torch.save(weights, file)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        for write in (by_torch, lambda path: save_file(weights, path)):
            with pytest.raises(data.DataError, match="out.*File too large"):
                with train.atomic_write(tmp_path / "out") as path:
                    os.mkdir(path)
                    write(f"{path}/weights")
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- runs ----
def test_a_measurement_ends_on_sigterm(tmp_path):
    """What has been learned is saved, and no loss is logged that was measured on a part of the data."""
    texts, val = write_texts(tmp_path / "d.json", 4), write_texts(tmp_path / "v.json", 3000)
    options = "--steps 9 --workers 0 --micro-batch 1"
    with Program(f"train.py --data {texts} --val {val} --out {tmp_path}/run {options}") as program:
        program.wait_until(lambda: "loss:" in program.text)
        program.send(signal.SIGTERM)
        program.wait(128 + signal.SIGTERM)
    assert (tmp_path / "run/step-000001").exists()
    assert not any("val_loss" in line for line in read_lines(tmp_path / "run/metrics.jsonl"))


def test_a_lower_max_bad_ends_a_resumed_run_at_once(tmp_path):
    """Truth: README's "stops where more than 1 % are bad"."""
    texts, out = write_texts(tmp_path / "d.json", 4, bad=[1]), tmp_path / "run"
    command = f"train.py --data {texts} --out {out} --workers 0 --steps 3 --save-every 1 --max-bad 0.5"
    run(command)
    for folder in ("final", "step-000003"):
        shutil.rmtree(out / folder)
    assert "max-bad" in run(f"train.py --out {out} --resume --max-bad 0.1", code=1)
    assert len(read_lines(out / "metrics.jsonl")) == 2


def test_answers_are_compared_in_the_form_of_replies(changed, tmp_path):
    """Truth: the tokenizer's normaliser, NFC, as unicodedata applies it."""
    base = changed("tokenizer.json", normalizer={"type": "NFC"})
    texts = write_json(tmp_path / "d.json", [sample("What?", "cafe\u0301")])
    run(f"eval.py data {texts} --model {base} --out {tmp_path}/out --workers 0 --max-new-tokens 1")
    [line] = read_lines(tmp_path / "out/predictions.jsonl")
    assert line["answer"] == unicodedata.normalize("NFC", "cafe\u0301")
