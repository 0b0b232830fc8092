"""From a data file to answers: training and evaluation, which only the mask can make right."""

import random

import shapes
from helpers import read_lines, run, sample, write_json


def test_only_the_mask_makes_the_answers_right(tmp_path):
    """One clip and one question with four masks, each with another answer. Truth: where every mask is the
    whole frame, the four inputs are the same, so that one reply in four is right at most."""
    objects = shapes.deal(random.Random(0))
    shapes.write_video(tmp_path / "a.mp4", [shapes.draw(objects, "black", k) for k in range(shapes.FRAMES)])
    entries = []
    for i, obj in enumerate(objects):
        masks = {k: shapes.segmentation(obj, k, "polygon") for k in shapes.ANNOTATED}
        entries.append(sample("<video>\nWhat colour is <region>?", obj["colour"], masks, video="a.mp4", id=i))
    data = write_json(tmp_path / "data.json", entries)
    run(f"train.py --data {data} --out {tmp_path}/run --steps 60 --batch-size 4 --workers 0")
    final, scores = tmp_path / "run" / "final", tmp_path / "scores"
    run(f"eval.py data {data} --model {final} --control full --out {scores} --workers 0")
    predictions = read_lines(scores / "predictions.jsonl")
    assert [p["exact"] for p in predictions] == [obj["colour"] for obj in objects]
    assert len({p["full"] for p in predictions}) == 1
