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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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
    """Returns the patches of a video and of its annotated frames, the masks, and (input_ids, labels)."""
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
        decoded = [data.decode_mask(segmentations[frame], height, width) for frame in frames]
        masks += [mask.astype(np.float32) for mask in decoded]
    cells = math.prod(processor.frame_size(height, width)) // processor.factor**2
    prompt = processor.video_prompt([frame / reader.get_avg_fps() for frame in sampled], cells)
    tokens = [min(len(frames), settings.region_tokens) for frames in annotated]
    still_patches = [processor.still_patches(picture) for picture in pictures]
    encoded = processor.encode(sample.turns, prompt, tokens)
    return processor.video_patches(video), still_patches, masks, encoded


def num_bytes(value):
    """The bytes of all arrays in nested lists, tuples and dicts."""
    value = list(value.values()) if isinstance(value, dict) else value
    return sum(map(num_bytes, value)) if isinstance(value, (list, tuple)) else getattr(value, "nbytes", 0)


def choose_samples(samples):
    """The indices of up to SAMPLES samples with regions in a video."""

    def is_usable(sample):
        return sample.objects and not data.open_media(sample.media).info.is_image

    usable = [i for i in data.evenly(range(len(samples)), 100) if is_usable(samples[i])]
    return data.evenly(usable, SAMPLES) if usable else sys.exit("expected regions in a video, found none")


def main(arguments):
    config = train.parse(["--check", "--data", *arguments])  # which, unlike a run, needs no new folder
    if config.window:
        sys.exit(f"--window: expected none, as both ways read whole frames; found {config.window}")
    samples = data.read_samples(config.data, config.media)
    given = {name: getattr(config, name) for name in vars(data.Settings())} | {"window": 0}
    processor = models.load_processor(config.model, data.sample_texts(samples), **given)
    dataset = data.ReferringDataset(samples, processor, cache_bytes=0)
    chosen = choose_samples(samples)

    torch.set_num_threads(1)  # as in a worker
    milliseconds, megabytes = {"ours": [], "plain": []}, {"ours": [], "plain": []}
    for i in [*chosen] * math.ceil(RUNS / len(chosen)):
        for way in milliseconds:
            start = time.process_time()
            sample = dataset[0, i] if way == "ours" else plain_sample(processor, samples[i])
            milliseconds[way].append(1000 * (time.process_time() - start))
            if isinstance(sample, data.DataError):
                raise sample
            megabytes[way].append(num_bytes(sample) / 1e6)

    print(f"a sample: medians of {len(milliseconds['ours'])} runs over {len(chosen)} samples, on one core")
    cost = {way: statistics.median(times) for way, times in milliseconds.items()}
    for way in cost:
        print(f"{way:>6}: {cost[way]:8.1f} ms, {statistics.median(megabytes[way]):8.2f} MB")
    print(f"ours is {cost['plain'] / cost['ours']:.2f} times as fast")


if __name__ == "__main__":
    main(sys.argv[1:])
