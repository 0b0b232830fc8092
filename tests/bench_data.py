"""Prints what reading a sample costs, beside the plain way: `python tests/bench_data.py DATA.json [OPTIONS]`.

OPTIONS are those of train.py (--model, --num-frames, --region-pixels ...) but --window: both ways encode
whole frames, as VideoRefer does. "ours" is data.ReferringDataset with an empty cache. "plain" is how
VideoRefer's own code reads a sample: decord decodes the sampled frames, then opens the video again for the
annotated ones; pixels become float32, and masks float32 at the video's resolution. Both give the same pixels,
masks and tokens (tests/test_train.py compares them). Times are those of one core, because a DataLoader runs a
worker for each.
"""

import math
import os
import statistics
import sys
import time

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))

import decord  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402

SAMPLES = 8  # different samples at most, spread over the data file
RUNS = 24  # how often each way reads a sample; all samples equally often


def resize(frames, size):
    """uint8 (N, H, W, 3) -> float32 (N, h, w, 3) in [-1, 1]."""
    height, width = size
    images = [Image.fromarray(frame) for frame in frames]
    resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
    return (np.stack(resized).astype(np.float32) / 255 - 0.5) / 0.5


def plain_sample(processor, sample):
    """Reads a sample of a video plainly. Returns the patches of the video and of the annotated frames,
    the masks, and (input_ids, labels)."""
    settings = processor.settings
    annotated = [data.evenly(sorted(masks), settings.region_frames) for masks in sample.objects]
    stills = sorted(set().union(*annotated))

    reader = decord.VideoReader(sample.media, num_threads=1)
    sampled = data.evenly(range(len(reader)), settings.num_frames)
    frames = reader.get_batch(sampled).asnumpy()
    height, width = frames.shape[1:3]
    video = resize(frames, processor.frame_size(height, width))
    annotated_frames = decord.VideoReader(sample.media, num_threads=1).get_batch(stills).asnumpy()
    pictures = resize(annotated_frames, processor.still_size(height, width))

    masks = []
    for segmentations, frames in zip(sample.objects, annotated):
        masks += [
            data.decode_mask(segmentations[frame], height, width).astype(np.float32) for frame in frames
        ]

    cells = math.prod(processor.frame_size(height, width)) // processor.factor**2
    prompt = processor.video_prompt([frame / reader.get_avg_fps() for frame in sampled], cells)
    tokens = [min(len(frames), settings.region_tokens) for frames in annotated]
    still_patches = [processor.still_patches(picture) for picture in pictures]
    encoded = processor.encode(sample.turns, prompt, tokens)
    return processor.video_patches(video), still_patches, masks, encoded


def num_bytes(value):
    """Returns the bytes of all arrays in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(num_bytes(item) for item in value)
    return getattr(value, "nbytes", 0)


def choose_samples(samples):
    """Returns the indices of up to SAMPLES samples with regions in a video."""
    usable = []
    for i in data.evenly(range(len(samples)), 100):
        sample = samples[i]
        if sample.objects and not data.open_media(sample.media).info.is_image:
            usable.append(i)
    if not usable:
        raise SystemExit("expected samples with regions in a video, found none")
    return data.evenly(usable, SAMPLES)


def main(arguments):
    config = train.parse(["--check", "--data", *arguments])  # which, unlike a run, needs no new folder
    if config.window:
        raise SystemExit(f"--window: expected none, as both ways read whole frames; found {config.window}")
    samples = data.read_samples(config.data, config.media)
    given = {name: getattr(config, name) for name in vars(data.Settings())}
    given["window"] = 0
    processor = models.load_processor(config.model, data.sample_texts(samples), **given)
    dataset = data.ReferringDataset(samples, processor, cache_bytes=0)
    chosen = choose_samples(samples)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    milliseconds, megabytes = {"ours": [], "plain": []}, {"ours": [], "plain": []}
    for _ in range(math.ceil(RUNS / len(chosen))):
        for i in chosen:
            for way in milliseconds:
                start = time.process_time()
                sample = dataset[0, i] if way == "ours" else plain_sample(processor, samples[i])
                milliseconds[way].append(1000 * (time.process_time() - start))
                megabytes[way].append(num_bytes(sample) / 1e6)
                if isinstance(sample, data.DataError):
                    raise sample

    torch.set_num_threads(threads)

    print(f"a sample: medians of {len(milliseconds['ours'])} runs over {len(chosen)} samples, on one core")
    for way in milliseconds:
        cost, size = statistics.median(milliseconds[way]), statistics.median(megabytes[way])
        print(f"{way:>6}: {cost:8.1f} ms, {size:8.2f} MB")
    ratio = statistics.median(milliseconds["plain"]) / statistics.median(milliseconds["ours"])
    print(f"ours is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main(sys.argv[1:])
