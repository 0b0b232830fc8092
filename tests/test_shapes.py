"""The toy world: every form of mask covers the same pixels, and only the mask can decide an answer."""

import json

import numpy as np
import pytest
import shapes
from pycocotools import mask as coco_mask

import data
import model as models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, train_clips=12, test_clips=6)
    return folder


def test_all_kinds_of_sample_and_all_forms_of_mask_occur(world):
    entries = json.loads((world / "train.json").read_text())
    samples = data.read_samples(world / "train.json")
    kinds = set()
    for i in range(len(samples)):
        sample = samples[i]
        if sample.media is None:
            media = "text"
        else:
            media = "image" if data.open_media(sample.media).info.is_image else "video"
        frames = max((len(o) for o in sample.objects), default=0)
        kinds.add((media, min(frames, 2)))
    assert {("video", 2), ("video", 1), ("image", 1)} <= kinds
    text = json.dumps(entries)
    assert (
        '"masks"' in text and '"annotation"' in text and '"segmentation": null' in text and '"height"' in text
    )
    forms = {
        type(m.get("counts", None)) if isinstance(m, dict) else type(m[0]) for m in _segmentations(entries)
    }
    assert forms == {str, list, float} or forms == {str, list, float, int}
    assert {tuple(m["size"]) for m in _segmentations(entries) if isinstance(m, dict)} == {
        (96, 96),
        (192, 192),
    }


def _segmentations(entries):
    for entry in entries:
        for frames in entry.get("annotation", []):
            yield from (m["segmentation"] for m in frames.values() if m.get("segmentation"))


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("form", shapes.FORMS)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_form_of_mask_lies_over_the_drawn_object(shape, form, scale):
    """Truth: the pixels that carry the object's colour in the picture."""
    obj = {"colour": "red", "shape": shape, "r": 13.3 / scale, "path": [(40.2, 51.7)]}
    drawn = (shapes.draw([obj], "black", 0, scale)[:, :, 0] > 115).astype(np.uint8)
    side = 96 * scale
    assert drawn.shape == (side, side)
    mask = data.decode_mask(shapes.segmentation(obj, 0, form, scale), side, side)
    inside, outside = data.coverage(mask, side, side)[drawn == 1], data.coverage(mask, side, side)[drawn == 0]
    assert inside.sum() > 0.93 * drawn.sum() and outside.sum() < 0.12 * drawn.sum()


def test_the_picture_without_the_mask_decides_nothing(world):
    """Each clip shows each colour, shape and direction exactly once, and train and test share no clip."""
    import random

    rng = random.Random(5)
    for _ in range(5):
        objects = shapes.deal(rng)
        for name, values in (
            ("colour", shapes.COLOURS),
            ("shape", shapes.SHAPES),
            ("direction", shapes.DIRECTIONS),
        ):
            assert sorted(o[name] for o in objects) == sorted(values)
    media = [
        {e.get("video") or e.get("image") for e in json.loads((world / f).read_text())} - {None}
        for f in ("train.json", "test.json")
    ]
    assert not media[0] & media[1]


def test_the_objects_of_the_small_world_are_of_5_percent_of_its_frames(tmp_path):
    """In each form that a mask may have. Truth: COCO's own boxes. All samples can be read."""
    shapes.write_world(tmp_path, train_clips=4, test_clips=2, small=True)
    processor, sides = models.load_processor("tiny", ["a"]), set()
    for name in ("train.json", "test.json"):
        samples = data.read_samples(tmp_path / name)
        dataset = data.ReferringDataset(samples, processor)
        for i in range(len(samples)):
            assert isinstance(dataset[0, i], dict)
            if samples[i].media:
                info = data.open_media(samples[i].media).info
                assert (info.height, info.width) == (384, 384) and samples[i].size in (None, (384, 384))
            for masks in samples[i].objects:
                for segmentation in masks.values():
                    mask = data.decode_mask(segmentation, 384, 384)
                    sides |= {*mask.shape}
                    _, _, width, height = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask)))
                    assert 0.04 < max(width, height) / mask.shape[0] < 0.062
    assert sides == {384, 768}


def test_relations_are_what_the_paths_say():
    a, b = {"path": [(10, 50), (10, 50)]}, {"path": [(60, 52), (60, 48)]}
    assert shapes.relation(a, b, (0, 1)) == "left" and shapes.relation(b, a, (0, 1)) == "right"
    c = {"path": [(12, 10), (12, 10)]}
    assert shapes.relation(c, a, (0, 1)) == "above" and shapes.relation(a, c, (0, 1)) == "below"
    assert shapes.relation(a, {"path": [(60, 52), (-40, 50)]}, (0, 1)) is None  # it changes sides
    assert shapes.relation(a, {"path": [(50, 92), (50, 92)]}, (0, 1)) is None  # neither axis decides


def test_bench_q_entries_ask_what_the_test_file_asks(world):
    bench, test = (json.loads((world / name).read_text()) for name in ("bench_q.json", "test.json"))
    about_regions = [e for e in test if e["type"] != "background"]
    assert len(bench) == len(about_regions)
    for question, entry in zip(bench, about_regions):
        assert question["type"] == entry["type"] and question["video"] == entry["video"]
        assert (
            question["Answer"][4:] == entry["conversations"][1]["value"]
            and question["Answer"] in question["options"]
        )
        assert (
            len(question["annotation"]) == question["Question"].count("<region>") == len(entry["annotation"])
        )
        assert question["frame_idx"] in question["annotation"][0]


def test_the_same_seed_gives_the_same_files(tmp_path):
    """x264's macroblock tree gave other bytes, and other pixels, in about every second clip."""
    digests = []
    for name in ("one", "two"):
        shapes.write_world(tmp_path / name, train_clips=8, test_clips=4)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents = [(path.relative_to(tmp_path / name), path.read_bytes()) for path in files]
        digests.append(contents)
    assert digests[0] == digests[1] and len(digests[0]) == 12 * 3 + 3


def test_a_new_kind_is_asked_in_a_file_of_its_own(tmp_path):
    """What --new-kind leaves out of train.json, new.json asks about the same clips; test.json asks it all."""
    shapes.write_world(tmp_path, train_clips=3, test_clips=1, new_kind="direction")
    train, new, test = ((tmp_path / f"{name}.json").read_text() for name in ("train", "new", "test"))
    asked = [turn["value"] for entry in json.loads(new) for turn in entry["conversations"][::2]]
    assert len(asked) == 3 * 4 and all("Which way does <region> move?" in question for question in asked)
    assert "Which way" not in train and "Which way" in test
    for kind in ("What colour is <region>", "What shape", "Where is", "background"):
        assert kind in train and kind not in new
    samples = data.read_samples(tmp_path / "new.json")
    assert all(len(samples[i].objects) == 4 for i in range(len(samples)))
