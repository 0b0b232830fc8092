"""From a click to masks on more frames: as transformers' own processor and loop give, on the right frames."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, make_sam
from helpers import box, box_mask, read_lines, sample, write_json
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from transformers import Sam2VideoInferenceSession, Sam2VideoProcessor

import data
import eval as evaluation

H, W = 150, 225  # larger than the 128x128 that SAM sees, so that pictures must be made smaller
ELL = box_mask(H, W, 50, 25, 125, 100) - box_mask(H, W, 100, 25, 75, 50)  # a mask that is no box
POINT = {"input_points": [[[[100.0, 82.0]]]], "input_labels": [[[1]]]}
BOX = {"input_boxes": [[[50, 25, 150, 125]]]}


@pytest.fixture
def sam(tmp_path):
    return evaluation.load_tracker(make_sam(tmp_path / "sam"), "cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of 20 frames, with a disc that moves before noise."""
    folder, rng = tmp_path_factory.mktemp("clip"), np.random.default_rng(0)
    for k in range(20):
        image = Image.fromarray(rng.integers(0, 255, (H, W, 3), dtype=np.uint8))
        ImageDraw.Draw(image).ellipse((8 * k, 50, 8 * k + 62, 112), fill=(255, 12 * k, 0))
        image.save(folder / f"{k}.png")
    return folder


def masks_of_transformers(sam, clip, frames, prompts):
    """{frame: bool (H, W)} of one object by transformers' own processor and loop. Its halves that need
    torchvision are left out: PIL prepares pictures and resizes masks. prompts: {frame: its inputs}."""
    pixels = [Image.open(clip / f"{k}.png").resize((128, 128), Image.Resampling.BILINEAR) for k in frames]
    pixels = (np.stack(pixels) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    processor = object.__new__(Sam2VideoProcessor)
    processor.target_size, processor.point_pad_value = 128, -10
    session = Sam2VideoInferenceSession(torch.tensor(pixels).float().movedim(3, 1), H, W, dtype=torch.float32)
    for frame, inputs in prompts.items():
        processor.add_inputs_to_inference_session(session, frames.index(frame), 7, **inputs)
        sam(session, frame_idx=frames.index(frame))
    masks = {}
    for reverse in (False, True):
        for output in sam.propagate_in_video_iterator(session, reverse=reverse):
            logits = Image.fromarray(output.pred_masks[0, 0].numpy())
            masks[frames[output.frame_idx]] = np.asarray(logits.resize((W, H), Image.Resampling.BILINEAR)) > 0
    return {frame: mask for frame, mask in sorted(masks.items()) if mask.any()}


def assert_same(masks, expected):
    """Two {frame: mask (H, W)}. Pixels may differ where a logit is near 0: torch and PIL round otherwise."""
    assert list(masks) == list(expected)
    assert max(np.mean(mask != expected[frame]) for frame, mask in masks.items()) < 0.005


def test_masks_are_those_of_transformers_own_loop(sam, clip):
    """Of several objects, each tracked by itself, from its first prompt on forwards and backwards."""
    corners = evaluation.box(50, 25, 100, 100)
    objects = [{7: (100.0, 82.0)}, {15: corners, 3: (100.0, 82.0)}, {12: ELL, 15: corners}]
    prompts = [{7: POINT}, {3: POINT, 15: BOX}, {12: {"input_masks": ELL}, 15: BOX}]
    # 0, 4, 8, 11, 15 and 19 are evenly spread, and each frame with a prompt takes the place of the nearest.
    frames = [0, 3, 7, 12, 15, 19]
    tracked = evaluation.track(clip, objects, sam, region_frames=6)
    drawn = [{}, {}, {12: ELL}]  # it stays, whatever SAM makes of it
    for masks, inputs, kept in zip(tracked, prompts, drawn, strict=True):
        assert_same(masks, masks_of_transformers(sam, clip, frames, inputs) | kept)
    for frame, other in zip(frames, frames[1:]):  # a mask of another object or frame would be noticed
        assert np.mean(tracked[0][frame] != tracked[1][frame]) > 0.01
        assert np.mean(tracked[0][frame] != tracked[0][other]) > 0.01
    # RLE, polygons and arrays of any resolution are one prompt.
    double = box_mask(2 * H, 2 * W, 100, 50, 200, 200)
    forms = [box(50, 25, 100, 100), 0.2 * double, evaluation.to_segmentation(double), box(125, 60, 100, 90)]
    tracked = evaluation.track(clip, [{15: form} for form in forms], sam, region_frames=3)
    for masks, prompt in zip(tracked, [BOX, BOX, BOX, {"input_boxes": [[[125, 60, 225, 150]]]}], strict=True):
        assert_same(masks, masks_of_transformers(sam, clip, [0, 10, 15], {15: prompt}))
    [masks] = evaluation.track(clip / "5.png", [{0: (100.0, 82.0)}], sam)  # an image has one frame
    assert_same(masks, {0: masks_of_transformers(sam, clip, [5], {5: POINT})[5]})


def test_frames_on_which_sam_sees_nothing_are_left_out(sam, clip):
    """As by transformers, where the score of there being an object is low. What was drawn stays."""
    torch.nn.init.constant_(sam.mask_decoder.pred_obj_score_head.proj_out.bias, -2)
    assert list(masks_of_transformers(sam, clip, [0, 7, 13, 19], {7: {"input_masks": ELL}})) == [7]
    [masks] = evaluation.track(clip, [{7: ELL}], sam, region_frames=4)
    assert list(masks) == [7] and (masks[7] == ELL).all()
    with pytest.raises(data.DataError, match="object 0"):  # a click alone leaves none
        evaluation.track(clip, [{7: (100, 82)}], sam, region_frames=4)


def test_frames_are_spread_over_the_video(sam, clip, tmp_path):
    """Indices worked by hand; and of ten minutes, of which only these frames are there, no other is read."""
    for pointed, expected in (
        ([51], [0, 25, 51, 74, 99]),
        ([98, 99], [0, 25, 50, 98, 99]),
        ([*range(30, 37)], [*range(30, 37)]),  # all that the user drew is kept
    ):
        assert evaluation.fill_up(pointed, 100, 5) == expected
    assert evaluation.fill_up([3], 4, 8) == [0, 1, 2, 3]
    files = [tmp_path / f"{k}.png" for k in range(14_400)]
    for k in (0, 4800, 7203, 14_399):
        files[k].symlink_to(clip / f"{k % 20}.png")
    [masks] = evaluation.track(files, [{7203: (100, 82)}], sam, region_frames=4)
    assert list(masks) == [0, 4800, 7203, 14_399]


def test_what_is_wrong_gets_one_error(sam, clip, tmp_path):
    """A DataError that names the media, object and frame, or the tracker."""
    for objects, named in (
        ([{20: (1, 1)}], "20"),
        ([{3: (W, 1)}], "object 0: frame 3"),
        ([{3: (1, H)}], "object 0: frame 3"),
        ([{3: (1, 1)}, {4: (1, -1)}], "object 1: frame 4"),
        ([{3: (1, 1)}, {}], "object 1"),
    ):
        with pytest.raises(data.DataError, match=f"^{clip}.*: .*{named}"):
            evaluation.track(clip, objects, sam)
    with pytest.raises(data.DataError, match=f"--track {tmp_path}/qwen"):  # no SAM 2
        evaluation.load_tracker(make_checkpoint(tmp_path / "qwen", "qwen3_vl"), "cpu")


def test_a_click_is_tracked_saved_and_asked_about(sam, clip, tmp_path, capsys):
    """What --save-masks writes are transformers' masks, on 4 frames; the reply is that to such data."""
    model, processor = evaluation.load(make_checkpoint(tmp_path / "qwen", "qwen3_vl"), "cpu")
    processor.settings = replace(processor.settings, region_frames=4)
    model.save_pretrained(tmp_path / "final", processor)
    common = f"--model {tmp_path}/final --max-new-tokens 6 --device cpu"
    ask = f"ask Is<region><region> {common} --video {clip} --save-masks {tmp_path}/masks.json"
    evaluation.main(f"{ask} --track {tmp_path}/sam --object 7:100,82 --object 7:50,25,100,100".split())
    reply = capsys.readouterr().out.removesuffix("\n")
    [saved] = read_lines(tmp_path / "masks.json")
    for masks, prompt in zip(saved["annotation"], (POINT, BOX), strict=True):
        masks = {int(frame): coco_mask.decode(mask["segmentation"]) for frame, mask in masks.items()}
        assert_same(masks, masks_of_transformers(sam, clip, [0, 7, 13, 19], {7: prompt}))
    file = write_json(tmp_path / "d.json", [sample("Is<region><region>", "x") | saved])
    evaluation.main(f"data {file} {common} --out {tmp_path}/out --workers 0".split())
    assert read_lines(tmp_path / "out/predictions.jsonl")[0]["exact"] == reply
