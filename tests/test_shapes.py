"""The toy world: every form of mask covers the drawn pixels, and only the mask can decide an answer."""

import json
import random
from itertools import product

import numpy as np
import shapes
from pycocotools import mask as coco_mask

import data
import model as models


def test_every_form_of_mask_lies_over_the_drawn_object():
    """Truth: the pixels that carry the object's colour in the picture."""
    for shape, form, scale in product(shapes.SHAPES, shapes.FORMS, (1, 4)):
        obj = {"colour": "red", "shape": shape, "r": 13.3 / scale, "path": [(40.2, 51.7)]}
        drawn, side = shapes.draw([obj], "black", 0, scale)[:, :, 0] > 115, 96 * scale
        mask = data.decode_mask(shapes.segmentation(obj, 0, form, scale), side, side)
        covered = data.coverage(mask, side, side)
        assert covered[drawn].sum() > 0.93 * drawn.sum(), (shape, form, scale)
        assert covered[~drawn].sum() < 0.12 * drawn.sum(), (shape, form, scale)


def test_the_picture_without_the_mask_decides_nothing(toy):
    """Each clip shows each colour, shape and direction exactly once, and train and test share no clip."""
    objects = shapes.deal(random.Random(5))
    for name, values in zip(shapes.ASK, (shapes.COLOURS, shapes.SHAPES, shapes.DIRECTIONS)):
        assert sorted(o[name] for o in objects) == sorted(values)
    media = []
    for name in ("train", "test"):
        entries = json.loads((toy / f"{name}.json").read_text())
        media.append({entry.get("video") or entry.get("image") for entry in entries} - {None})
    assert media[0] and media[1] and not media[0] & media[1]


def test_the_objects_of_the_small_world_are_of_5_percent_of_its_frames(tmp_path):
    """Truth: COCO's own boxes. All samples of the world can be read, and hold every form of mask."""
    shapes.write_world(tmp_path, train_clips=4, test_clips=2, small=True)
    processor, sides, forms = models.load_processor("tiny", ["a"]), set(), set()
    for name in ("train.json", "test.json"):
        samples = data.read_samples(tmp_path / name)
        dataset = data.ReferringDataset(samples, processor)
        for i in range(len(samples)):
            assert isinstance(dataset[0, i], dict)
            for mask in (mask for masks in samples[i].objects for mask in masks.values()):
                forms.add(type(mask["counts"] if isinstance(mask, dict) else mask[0]))
                mask = data.decode_mask(mask, 384, 384)
                sides.add(mask.shape)
                _, _, width, height = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask)))
                assert 0.04 < max(width, height) / mask.shape[0] < 0.062
    assert sides == {(384, 384), (768, 768)} and {str, list, float} <= forms


def test_a_new_kind_is_asked_in_a_file_of_its_own(tmp_path):
    """What --new-kind leaves out of train.json, new.json asks; test.json asks all."""
    shapes.write_world(tmp_path, train_clips=3, test_clips=1, new_kind="direction")
    for name in ("train", "new", "test"):
        assert ("Which way" in (tmp_path / f"{name}.json").read_text()) == (name != "train")


def test_relations_are_what_the_paths_say():
    """Truth: worked by hand."""
    a, b = {"path": [(10, 50), (10, 50)]}, {"path": [(60, 52), (60, 48)]}
    c = {"path": [(12, 10), (12, 10)]}
    assert shapes.relation(a, b, (0, 1)) == "left" and shapes.relation(b, a, (0, 1)) == "right"
    assert shapes.relation(c, a, (0, 1)) == "above" and shapes.relation(a, c, (0, 1)) == "below"
    assert shapes.relation(a, {"path": [(60, 52), (-40, 50)]}, (0, 1)) is None  # it changes sides
    assert shapes.relation(a, {"path": [(50, 92), (50, 92)]}, (0, 1)) is None  # neither axis decides


def test_the_same_seed_gives_the_same_files(toy, tmp_path):
    """Byte for byte. (x264's macroblock tree gave other pixels in about every second clip.)"""
    shapes.write_world(tmp_path, train_clips=6, test_clips=2)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(files) == 8 * 3 + 2
    for file in files:
        assert (tmp_path / file).read_bytes() == (toy / file).read_bytes(), file
    # The clips of the test are the same beside fewer to learn from; a line of a file is a sample.
    shapes.write_world(tmp_path / "fewer", train_clips=2, test_clips=2)
    for file in ("test.json", "videos/test0001.mp4"):
        assert (tmp_path / "fewer" / file).read_bytes() == (toy / file).read_bytes()
    lines = (toy / "test.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == json.loads("\n".join(lines))
