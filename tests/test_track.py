"""From a click to masks on more frames: as transformers' own processor and loop give, on the right frames."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, make_sam
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import Sam2VideoInferenceSession, Sam2VideoProcessor

import data
import eval as evaluation

TOP = Path(__file__).resolve().parent.parent
H, W = 60, 90


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    return make_sam(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def sam(sam_folder):
    return evaluation.load_tracker(sam_folder, "cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of 20 frames, with a disc that moves and a background that changes."""
    folder = tmp_path_factory.mktemp("clip")
    rng = np.random.default_rng(0)
    for k in range(20):
        image = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)).resize((W, H), 3)
        ImageDraw.Draw(image).ellipse((3 * k, 20, 3 * k + 25, 45), fill=(255, 12 * k, 0))
        image.save(folder / f"{k}.png")
    return folder


def ell():
    """A mask that is no box."""
    mask = np.zeros((H, W), np.uint8)
    mask[10:50, 20:70] = 1
    mask[10:30, 40:70] = 0
    return mask


def masks_of_transformers(sam, clip, frames, prompts):
    """{frame: bool (H, W)} of one object by transformers' own processor and loop, on these frames.

    prompts: {frame: inputs of its add_inputs_to_inference_session}. The processor's two halves that need
    torchvision are left out: pictures are prepared by PIL, and masks are resized by it.
    """
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = []
    for frame in frames:
        picture = Image.open(clip / f"{frame}.png").resize((128, 128), Image.Resampling.BILINEAR)
        pixels.append((np.asarray(picture) / 255 - mean) / std)
    pixels = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
    processor = object.__new__(Sam2VideoProcessor)
    processor.target_size, processor.point_pad_value = 128, -10
    session = Sam2VideoInferenceSession(pixels, video_height=H, video_width=W, dtype=torch.float32)
    for frame, inputs in prompts.items():
        processor.add_inputs_to_inference_session(session, frames.index(frame), 7, **inputs)
        sam(session, frame_idx=frames.index(frame))
    masks = {}
    for reverse in (False, True):
        for output in sam.propagate_in_video_iterator(session, reverse=reverse):
            logits = Image.fromarray(output.pred_masks[0, 0].numpy())
            masks[frames[output.frame_idx]] = np.asarray(logits.resize((W, H), Image.Resampling.BILINEAR)) > 0
    return masks


def assert_same(masks, expected):
    """Two {frame: mask (H, W)}. A pixel may differ where a logit is 0 up to rounding."""
    assert list(masks) == list(expected)
    for frame, mask in masks.items():
        assert np.mean(mask != expected[frame]) < 1e-3, frame


POINT = {"input_points": [[[[40.0, 33.0]]]], "input_labels": [[[1]]]}
BOX = {"input_boxes": [[[20, 10, 60, 50]]]}


def test_masks_are_those_of_transformers_own_loop(sam, clip):
    """Of several objects, each tracked by itself, from its first prompt on forwards and backwards."""
    objects = [
        {7: (40.0, 33.0)},
        {15: evaluation.box(20, 10, 40, 40), 3: (40.0, 33.0)},
        {12: ell(), 15: evaluation.box(20, 10, 40, 40)},
    ]
    # 0, 4, 8, 11, 15 and 19 are evenly spread, and each frame with a prompt takes the place of the nearest.
    frames = [0, 3, 7, 12, 15, 19]
    prompts = [{7: POINT}, {3: POINT, 15: BOX}, {12: {"input_masks": ell()}, 15: BOX}]
    expected = [masks_of_transformers(sam, clip, frames, inputs) for inputs in prompts]
    tracked = evaluation.track(clip, objects, sam, region_frames=6)
    assert len(tracked) == 3
    for masks, masks_of_their_loop in zip(tracked, expected):
        assert_same(masks, dict(sorted(masks_of_their_loop.items())))
    assert (tracked[2][12] == ell()).all(), "what was drawn, not what SAM made of it"
    for frame in frames:  # so that a mask of another object or frame would be noticed
        assert np.mean(tracked[0][frame] != tracked[1][frame]) > 0.01
        assert all(np.mean(tracked[0][frame] != tracked[0][other]) > 0.01 for other in {*frames} - {frame})


def test_a_mask_may_have_another_resolution_and_any_form(sam, clip):
    """RLE, polygons and arrays are one prompt. A box that leaves the picture ends at its edge."""
    box = np.zeros((2 * H, 2 * W), np.uint8)
    box[20:100, 40:120] = 255
    forms = [evaluation.box(20, 10, 40, 40), box, evaluation.to_segmentation(box)]
    tracked = evaluation.track(clip, [{15: form} for form in forms], sam, region_frames=3)
    expected = masks_of_transformers(sam, clip, [0, 10, 15], {15: BOX})
    for masks in tracked:
        assert_same(masks, dict(sorted(expected.items())))
    beyond, inside = evaluation.box(60, 30, 50, 50), evaluation.box(60, 30, 30, 30)
    one, other = evaluation.track(clip, [{15: beyond}, {15: inside}], sam, region_frames=3)
    assert_same(one, other)
    doubled = np.kron(ell(), np.ones((2, 2), np.uint8))
    one, other = evaluation.track(clip, [{15: doubled}, {15: ell()}], sam, region_frames=3)
    assert (one.pop(15) == doubled).all() and (other.pop(15) == ell()).all()
    assert [np.mean(one[frame] != other[frame]) < 0.02 for frame in (0, 10)] == [True, True]


@pytest.mark.parametrize(
    "pointed, num_frames, count, expected",
    [
        ([0], 100, 5, [0, 25, 50, 74, 99]),
        ([51], 100, 5, [0, 25, 51, 74, 99]),
        ([98, 99], 100, 5, [0, 25, 50, 98, 99]),
        ([3], 4, 8, [0, 1, 2, 3]),
        ([30], 100, 1, [30]),
        ([30, 60, 90], 100, 2, [30, 60, 90]),  # all that the user drew is kept
        ([0], 1, 8, [0]),
    ],
)
def test_frames_are_spread_over_the_video(pointed, num_frames, count, expected):
    assert evaluation.frames_to_track([{frame: ...} for frame in pointed], num_frames, count) == expected
    assert evaluation.frames_to_track([dict.fromkeys(pointed)], num_frames, count) == expected


def test_only_the_frames_that_are_tracked_are_read(sam, clip, monkeypatch):
    """Of ten minutes at 24 frames a second: as many as of a short clip."""
    loaded, held = [], []
    read, session_of = data.Images.read, evaluation.Sam2VideoInferenceSession

    def session(video, *size, **options):
        held.append(len(video))
        return session_of(video, *size, **options)

    monkeypatch.setattr(data.Images, "read", lambda self, frames: loaded.extend(frames) or read(self, frames))
    monkeypatch.setattr(evaluation, "Sam2VideoInferenceSession", session)
    files = [clip / f"{k % 20}.png" for k in range(14_400)]
    [masks] = evaluation.track(files, [{7203: (40, 33)}], sam, region_frames=4)
    assert list(masks) == loaded == [0, 4800, 7203, 14_399]
    assert held == [4]


def test_frames_on_which_sam_sees_nothing_are_left_out(sam, clip, monkeypatch):
    propagate = sam.propagate_in_video_iterator

    def blind(frames):
        def iterate(*args, **kwargs):
            for output in propagate(*args, **kwargs):
                if output.frame_idx in frames:
                    # What it says where there is no object.
                    output.pred_masks = torch.full_like(output.pred_masks, -1024.0)
                yield output

        monkeypatch.setattr(sam, "propagate_in_video_iterator", iterate)

    blind({0, 3})
    [masks] = evaluation.track(clip, [{7: (40, 33)}], sam, region_frames=4)
    assert list(masks) == [7, 13]
    blind({0, 1, 2, 3})
    with pytest.raises(
        data.DataError, match="object 0: expected an object that SAM 2 sees .*one frame, found"
    ):
        evaluation.track(clip, [{7: (40, 33)}], sam, region_frames=4)
    [masks] = evaluation.track(clip, [{7: ell()}], sam, region_frames=4)
    assert list(masks) == [7], "what was drawn stays"


def test_an_image_has_one_frame(sam, clip):
    [masks] = evaluation.track(clip / "5.png", [{0: (40.0, 33.0)}], sam)
    assert_same(masks, {0: masks_of_transformers(sam, clip, [5], {5: POINT})[5]})


@pytest.mark.parametrize(
    "objects, complaint",
    [
        ([{20: (1, 1)}], "a frame index from 0 to 19, found 20"),
        ([{-1: (1, 1)}], "a frame index from 0 to 19, found -1"),
        ([{"3": (1, 1)}], "a frame index from 0 to 19, found '3'"),
        ([{3: (90, 1)}], "object 0: frame 3: expected a point x,y inside the picture, 90x60"),
        ([{3: (1, float("nan"))}], "object 0: frame 3: expected a point x,y inside the picture"),
        ([{3: (1, 2, 3, 4)}], "object 0: frame 3: expected a point x,y inside the picture"),
        ([{3: (1, 1)}, {4: (1, -1)}], "object 1: frame 4: expected a point x,y inside the picture"),
        (
            [{3: evaluation.box(95, 5, 10, 10)}],
            "object 0: frame 3: expected a mask that is not empty inside the",
        ),
        ([{3: np.zeros((H, W))}], "object 0: frame 3: expected a mask that is not empty inside the picture"),
        ([{3: np.ones((W, H))}], "object 0: frame 3: expected a mask of the frame's shape, 90x60"),
        ([{3: [1, 2, 3]}], "object 0: frame 3: expected [x1, y1, x2, y2, ...]: at least 3 points"),
        ([{3: (1, 1)}, {}], "object 1: expected an object that SAM 2 sees on at least one frame"),
    ],
)
def test_what_is_wrong_with_an_object_gets_one_error(sam, clip, objects, complaint):
    with pytest.raises(data.DataError) as error:
        evaluation.track(clip, objects, sam)
    assert f"{clip}: {complaint}" in str(error.value) or f"{clip}: expected {complaint}" in str(error.value)
    assert str(error.value).count(str(clip)) == 1 and "\n" not in str(error.value)


def test_weights_that_are_missing_get_one_line(sam_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(sam_folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["mask_downsample.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    empty = tmp_path / "empty"
    shutil.copytree(sam_folder, empty)
    (empty / "model.safetensors").unlink()
    another = make_checkpoint(tmp_path / "another", "qwen3_vl")
    for path, complaint in (
        (broken, "weights that fit the model exactly, found {'missing_keys': ['mask_downsample.weight']}"),
        (empty, "no file named model.safetensors"),
        (another, "a SAM 2 video model (sam2_video), found 'qwen3_vl'"),
        (tmp_path / "absent", "a Hugging Face name or a folder with config.json and weights"),
    ):
        with pytest.raises(data.DataError) as error:
            evaluation.load_tracker(path, "cpu")
        assert complaint in str(error.value), error.value
        assert str(error.value).startswith(f"--track {path}: ") and "\n" not in str(error.value)


def test_large_pictures_are_made_smaller_as_pil_does(sam, tmp_path, monkeypatch):
    """Antialiased, and rounded to uint8 as by Sam2VideoVideoProcessor; PIL rounds a few pixels otherwise."""
    pictures = np.random.default_rng(0).integers(0, 255, (2, 300, 410, 3), dtype=np.uint8)
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    shown, session_of = [], evaluation.Sam2VideoInferenceSession

    def session(video, *size, **options):
        shown.append(video)
        return session_of(video, *size, **options)

    monkeypatch.setattr(evaluation, "Sam2VideoInferenceSession", session)
    evaluation.track(tmp_path, [{0: (205.0, 150.0)}], sam)
    [pixels] = shown
    assert pixels.shape == (2, 3, 128, 128) and pixels.dtype == torch.float32
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    levels = (pixels.permute(0, 2, 3, 1).double().numpy() * std + mean) * 255
    expected = np.stack([Image.fromarray(p).resize((128, 128), Image.Resampling.BILINEAR) for p in pictures])
    difference = np.abs(levels - expected)
    assert difference.max() < 1.001 and (difference > 0.001).mean() < 0.05


# ---- the command line ----


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model to ask, trained with at most 4 frames of an object."""
    model, processor = evaluation.load(make_checkpoint(tmp_path_factory.mktemp("llm"), "qwen3_vl"), "cpu")
    processor.settings = replace(processor.settings, region_frames=4)
    return model, processor


def test_a_click_is_tracked_shown_saved_and_asked_about(
    sam, sam_folder, clip, loaded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    saved, preview = tmp_path / "masks.json", tmp_path / "p.png"
    arguments = ["ask", "Is <region> on <region>?", "--model", "m", "--video", clip, "--track", sam_folder]
    arguments += ["--object", "7:40,33", "--object", "7:20,10,40,40", "--save-masks", saved]
    arguments += ["--preview", preview, "--max-new-tokens", 4, "--device", "cpu"]
    evaluation.main([str(a) for a in arguments])
    reply = capsys.readouterr().out.rstrip("\n")

    objects = [{7: (40.0, 33.0)}, {7: evaluation.box(20, 10, 40, 40)}]
    tracked = evaluation.track(clip, objects, sam, region_frames=4)
    assert [list(masks) for masks in tracked] == [[0, 7, 13, 19]] * 2
    question = "Is <region> on <region>?"
    assert reply == evaluation.ask(*loaded, clip, question, tracked, 4, preview=tmp_path / "q.png")
    assert preview.read_bytes() == (tmp_path / "q.png").read_bytes()
    # What was saved is a sample of a data file, but for the conversation.
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    entry = json.loads(saved.read_text()) | {"conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    [sample] = list(data.read_samples(tmp_path / "data.json"))
    assert sample.media == str(clip) and len(sample.objects) == 2
    for masks, segmentations in zip(tracked, sample.objects):
        assert_same(masks, {frame: data.decode_mask(rle, H, W) for frame, rle in segmentations.items()})
    assert not list(tmp_path.glob("*.tmp"))


def test_a_question_about_a_list_of_frame_files(clip, loaded):
    files = [clip / f"{k}.png" for k in range(20)]
    asked = [evaluation.ask(*loaded, media, "What is <region>?", [{12: ell()}], 4) for media in (clip, files)]
    assert asked[0] == asked[1] and asked[0]
    with pytest.raises(data.DataError, match=r"^/.*0.png to /.*19.png \(20 frames\): object 0: .*found 20"):
        evaluation.ask(*loaded, files, "What is <region>?", [{20: ell()}])


def test_masks_are_saved_without_a_tracker_too(clip, loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    Image.fromarray(ell() * 255).save(tmp_path / "m.png")
    arguments = ["ask", "What is <region>?", "--model", "m", "--video", clip, "--device", "cpu"]
    arguments += ["--object", f"7:{tmp_path / 'm.png'}", "--save-masks", tmp_path / "masks.json"]
    evaluation.main([str(a) for a in arguments])
    [masks] = json.loads((tmp_path / "masks.json").read_text())["annotation"]
    assert list(masks) == ["7"] and (data.decode_mask(masks["7"]["segmentation"], H, W) == ell()).all()


def test_a_click_needs_a_tracker(clip, monkeypatch):
    with pytest.raises(data.DataError, match=r"expected --track for a click, found \[\(40.0, 33.0\)\]"):
        main_ask(clip, "--object", "7:20,10,40,40", "--object", "3:40,33")


def test_tracking_without_a_question_is_refused(capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["data", "d.json", "--model", "m", "--out", "o", "--track", "sam"])
    assert "unrecognized arguments: --track" in capsys.readouterr().err


def main_ask(clip, *options):
    arguments = ("ask", "What is <region>?", "--model", "m", "--video", clip, "--device", "cpu", *options)
    evaluation.main([str(a) for a in arguments])


def test_a_point_outside_the_picture_is_refused(clip, sam_folder, loaded, monkeypatch):
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    for pointed, complaint in (
        ("3:1,61", "expected --object inside the picture, 90x60 (width x height), found '3:1,61'"),
        ("3:1,60", "object 0: frame 3: expected a point x,y inside the picture, 90x60"),
        ("20:1,2", "expected a frame index from 0 to 19, found 20"),
        ("3:80,5,20,20", "expected --object inside the picture, 90x60 (width x height)"),
    ):
        with pytest.raises(data.DataError) as error:
            main_ask(clip, "--track", sam_folder, "--object", pointed)
        assert complaint in str(error.value)


def test_the_readme_makes_a_data_file_from_clicks(clip, sam_folder, tmp_path, monkeypatch):
    program = (TOP / "README.md").read_text().split("```python\n")[2].split("```")[0]
    for shown, here in (
        ("facebook/sam2.1-hiera-tiny", sam_folder),
        ("a.mp4", clip),
        ("36, (180, 90)", "7, (40, 33)"),
    ):
        assert program.count(shown) == 1
        program = program.replace(shown, str(here))
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    [sample] = list(data.read_samples("data.json"))
    assert sample.media == str(clip) and sample.turns[0][1] == "It licks its nose."
    assert list(sample.objects[0]) == [0, 3, 5, 7, 11, 14, 16, 19]
