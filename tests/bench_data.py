"""Prints what reading a sample costs, beside the plain way: `python tests/bench_data.py [DATA.json]`.

Without a file, the sample is a clip of 10 s of 720p, with an object on 8 frames.

"ours" is data.ReferringDataset with an empty cache. "plain" is how VideoRefer's own code reads a sample:
decord decodes the sampled frames, then opens the video again for the annotated ones; pixels become float32,
and masks float32 at the video's resolution. Both encode whole frames (--window 0) with the tiny model's
settings. Times are those of one core, because a DataLoader runs a worker for each.
"""

import os
import statistics
import sys
import tempfile
import time
from itertools import cycle, islice

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import decord  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from clips import write_video  # noqa: E402
from helpers import box_mask, rle, sample, write_json  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402

RUNS = 24  # how often each way reads a sample; all samples equally often


def write_clip(folder):
    """A textured scene that the camera pans over. Returns the path of the data file."""
    rng, (height, width) = np.random.default_rng(0), (720, 1280)
    noise = [Image.fromarray(rng.integers(0, 256, (2000 // s, 2000 // s, 3), np.uint8)) for s in (4, 16, 64)]
    scene = np.mean([layer.resize((2000, 2000)) for layer in noise], axis=0).astype(np.uint8)
    pictures = [scene[k : k + height, 2 * k : 2 * k + width] for k in range(300)]
    write_video(f"{folder}/clip.mp4", pictures=pictures, rate=30)
    masks = {k: rle(box_mask(height, width, 900 - 2 * k, 400 - k, 220, 220)) for k in range(20, 300, 37)}
    entry = sample("What is <region> doing?", "It moves to the left.", masks, video="clip.mp4")
    return write_json(f"{folder}/data.json", [entry])


def resize(frames, size):
    """uint8 (N, H, W, 3) -> float32 (N, h, w, 3) in [-1, 1]."""
    images = [Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC) for frame in frames]
    return (np.stack(images).astype(np.float32) / 255 - 0.5) / 0.5


def plain_sample(processor, entry):
    """Returns the patches of a video and of its annotated frames, the masks, and the tokens."""
    settings = processor.settings
    annotated = [data.evenly(sorted(masks), settings.region_frames) for masks in entry.objects]
    stills = sorted(set().union(*annotated))
    reader = decord.VideoReader(entry.media, num_threads=1)
    sampled = data.evenly(range(len(reader)), settings.num_frames)
    frames = reader.get_batch(sampled).asnumpy()
    height, width = frames.shape[1:3]
    rows, columns = processor.frame_size(height, width)
    video = resize(frames, (rows, columns))
    annotated_frames = decord.VideoReader(entry.media, num_threads=1).get_batch(stills).asnumpy()
    pictures = resize(annotated_frames, processor.still_size(height, width))

    masks = []
    for segmentations, frames in zip(entry.objects, annotated):
        decoded = [data.decode_mask(segmentations[frame], height, width) for frame in frames]
        masks += [mask.astype(np.float32) for mask in decoded]
    times = [frame / reader.get_avg_fps() for frame in sampled]
    patch, depth = processor.patch_size, processor.temporal_patch_size
    shown = {"kind": "video", "prompt_grid": (-(-len(times) // depth), rows // patch, columns // patch)}
    shown["media_prompt"] = processor.video_prompt(times, rows * columns // processor.factor**2)
    shown["region_tokens"] = [min(len(frames), settings.region_tokens) for frames in annotated]
    encoded = processor.encode(entry.turns, data.EMPTY_SAMPLE | shown)
    return processor.patches(video, depth), [processor.patches(p[None], 1) for p in pictures], masks, encoded


def main(path):
    samples = data.read_samples(path)
    processor = models.load_processor("tiny", data.sample_texts(samples), window=0)
    dataset = data.ReferringDataset(samples, processor, cache_bytes=0)
    # Of a hundred, eight at most with regions in a video.
    chosen = [i for i in data.evenly(range(len(samples)), 100) if samples[i].objects]
    chosen = [i for i in chosen if not data.open_media(samples[i].media).info.is_image][:8]
    torch.set_num_threads(1)  # as in a worker
    ways = {"ours": lambda i: dataset[0, i], "plain": lambda i: plain_sample(processor, samples[i])}
    milliseconds = {"ours": [], "plain": []}
    for i in islice(cycle(chosen), RUNS // len(chosen) * len(chosen)):
        found = {}
        for way, read in ways.items():
            start = time.process_time()
            found[way] = read(i)
            milliseconds[way].append(1000 * (time.process_time() - start))
        ours, (video, _, _, encoded) = found["ours"], found["plain"]
        assert np.array_equal(ours["input_ids"], encoded["input_ids"])
        np.testing.assert_allclose((ours["video_patches"] / 255 - 0.5) / 0.5, video, atol=1e-6)

    print(f"a sample: medians of {len(milliseconds['ours'])} runs over {len(chosen)} samples, on one core")
    cost = {way: statistics.median(times) for way, times in milliseconds.items()}
    for way in cost:
        print(f"{way:>6}: {cost[way]:8.1f} ms")
    print(f"ours is {cost['plain'] / cost['ours']:.2f} times as fast")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else write_clip(folder))
