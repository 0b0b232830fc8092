"""Times the pooling kernels against other ways to compute the same: `python tests/bench_kernels.py`.

On a GPU it prints for each case and version the median time, the least bytes that pooling has to move, and
these bytes in that time. Without a GPU it times a small case on the CPU, which says nothing about a GPU.

Pooling makes one multiplication and one addition for each number that it reads, so its time is that of the
bytes that go to and from memory. Take case "batch": 64 frames of 27 x 27 cells with 3584 columns of bfloat16,
together 334 MB, and 128 regions, two on each frame, that cover 38 % of their frames on average.

    fused          reads the rows that a mask touches and writes (R, D), together 257 MB
    embedding_bag  the same rows, and a list of their indices, which is sorted in the backward
    bmm            all rows once, for both regions of a frame, which needs frames of one size
    eager          (x * mask / area).sum(-1).sum(-1): two arrays of 669 MB, (R, D, h, w), and smaller ones

What a version needs beside features is made before its time is taken.
"""

import statistics
import sys
from collections import deque
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402

import kernels  # noqa: E402

CASES = {  # name -> frames, cells along a side, columns, regions on a frame, whether masks cover the frame
    "small": (8, 12, 512, 2, False),  # for a CPU. The others do not fit into the L2 cache of a GPU
    "batch": (64, 27, 3584, 2, False),
    "large": (256, 27, 4096, 1, True),  # 1.5 GB of features in bfloat16
}


def make_masks(frames, side, regions, full):
    """Returns float32 (frames * regions, side, side) of 0 and 1: scattered squares of 1/8 to 8/8 side."""
    masks = torch.zeros(frames * regions, side, side)
    for r, mask in enumerate(masks):
        size = side if full else max(1, side * (1 + r % 8) // 8)
        y, x = r * 7 % (side - size + 1), r * 11 % (side - size + 1)
        mask[y : y + size, x : x + size] = 1
    return masks


def least_bytes(case, itemsize):
    """Returns the bytes that pooling has to move, (in the forward, in forward and backward)."""
    frames, side, D, regions, full = CASES[case]
    masks, row = make_masks(frames, side, regions, full), D * itemsize
    weights, averages = 4 * masks.numel(), len(masks) * row
    touched, gradient = int(masks.sum()) * row, frames * side**2 * row
    forward = touched + weights + averages
    return forward, forward + averages + weights + gradient


def eager(features, mask, area):
    """VideoRefer's expression. mask: (frames, regions, 1, h, w). area: (frames, regions, 1, 1, 1)."""
    frames, regions, _, h, w = mask.shape
    x = features.view(frames, 1, h, w, -1).permute(0, 1, 4, 2, 3)  # (frames, 1, D, h, w)
    return (x * mask / area).sum(-1).sum(-1).view(frames * regions, -1)


def make_versions(case, device, dtype, copies):
    """Returns a list of `copies` features (N, D), and {name: function of features, which returns (R, D)}."""
    frames, side, D, regions, full = CASES[case]
    N, R = frames * side**2, frames * regions
    masks = make_masks(frames, side, regions, full).to(device)
    weights = masks.flatten()
    frame_start = torch.arange(frames, device=device).repeat_interleave(regions) * side**2
    weight_start = torch.arange(R + 1, device=device) * side**2
    area = masks.sum((1, 2))
    share = (masks / area[:, None, None]).to(dtype).view(frames, regions, side**2)
    region, cell = masks.flatten(1).nonzero(as_tuple=True)
    rows = frame_start[region] + cell
    offsets = torch.searchsorted(region, torch.arange(R, device=device))
    row_share = share.view(R, -1)[region, cell]
    shape, index = (frames, regions, 1), (weights, frame_start, weight_start)
    mask, area = masks.to(dtype).view(*shape, side, side), area.to(dtype).view(*shape, 1, 1)
    options = {"offsets": offsets, "mode": "sum", "per_sample_weights": row_share}
    versions = {
        "fused": lambda x: kernels.FusedMaskedAveragePool.apply(x, *index),
        "embedding_bag": partial(F.embedding_bag, rows, **options),
        "bmm": lambda x: torch.bmm(share, x.view(frames, side**2, D)).view(R, D),
        "eager": partial(eager, mask=mask, area=area),
    }
    # Averages near 1, whatever the size of the region.
    features = [torch.randn(N, D, device=device, dtype=dtype).add_(1) for _ in range(copies)]
    return [x.requires_grad_() for x in features], versions


def median_ms(call, device):
    """The median time of call(i) in ms. Two inputs i take turns, and results are kept: caches hold none."""
    if device == "cpu":
        return 1000 * Timer("call(0)", globals={"call": call}).blocked_autorange().median
    results, times = deque(maxlen=2), []
    for i in range(3):  # the first ones compile the kernels
        results.append(call(i % 2))
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # for about 10 ms, while the host queues all calls
        events = []
        for i in range(20):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            results.append(call(i % 2))
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) for start, stop in events]
    return statistics.median(times)


def bench(case, device, dtype):
    """Prints the lines of one case."""
    features, versions = make_versions(case, device, dtype, copies=2)
    if kernels.triton is None or device == "cpu":
        del versions["fused"]  # the time of Triton's interpreter says nothing
    for name, version in versions.items():
        forward = lambda i, version=version: version(features[i])  # noqa: E731
        grad = torch.ones_like(forward(0))
        both = lambda i, f=forward, grad=grad: torch.autograd.grad(f(i), features[i], grad)  # noqa: E731
        calls = {"forward": forward, "forward + backward": both}
        for (direction, call), size in zip(calls.items(), least_bytes(case, dtype.itemsize)):
            with torch.set_grad_enabled(call is both):
                ms = median_ms(call, device)
            print(f"{case:8}{name:15}{direction:19}{ms:9.4f}{size / 1e6:8.0f}{size / 1e6 / ms:7.0f}")


def main():
    if not torch.cuda.is_available():
        print("No GPU: a small case on the CPU, which says nothing about a GPU.")
    else:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        speed = 2 * len(source) / 1e6 / median_ms(lambda i: target.copy_(source), "cuda")
        print(f"{torch.cuda.get_device_name()}, where a copy makes {speed:.0f} GB/s")
    print(f"{'case':8}{'version':15}{'direction':19}{'ms':>9}{'MB':>8}{'GB/s':>7}")
    if not torch.cuda.is_available():
        bench("small", "cpu", torch.float32)
    else:
        bench("batch", "cuda", torch.bfloat16)
        bench("large", "cuda", torch.bfloat16)


if __name__ == "__main__":
    main()
