"""Times the pooling kernels against other ways to compute the same: `python tests/bench_kernels.py`.

On a GPU it runs all CASES with all versions, and prints for each its time, the least bytes that it can move,
the resulting speed, and that speed's share of a plain copy on the same device. Without a GPU it times a small
case on the CPU, which says nothing about a GPU.

Pooling makes one multiplication and one addition for each number that it reads, so its time is that of the
bytes that go to and from memory. Take case "batch": 64 frames of 27 x 27 cells with 3584 columns of bfloat16,
together 334 MB, and 128 regions, two on each frame, that cover 38 % of their frames on average. The least
that each version has to move, in MB (`bytes_moved`, which ignores what caches save):

                                                                               forward   forward + backward
    fused          reads the rows that a mask touches and writes (R, D)                257          593
    embedding_bag  the same rows, and a list of their indices                          257          848
    bmm            all rows once, for both regions of a frame                          336          671
    compiled       all rows for each region, if everything is fused                    670         1005
    eager          (x * mask / area).sum(-1).sum(-1): three arrays (R, D, h, w)       3060         6071
    reference      the touched rows copied, converted to float32, multiplied, added   3559         8299

embedding_bag has to list the cells with a weight, for which the host waits until the GPU has counted them,
and to sort that list in the backward. bmm needs frames of one size. What a version needs beside features is
made before its time is taken.
"""

import statistics
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import kernels  # noqa: E402

CASES = {  # name -> frames, cells along a side, columns, regions on a frame, whether masks cover the frame
    "small": (8, 12, 512, 2, False),
    "sample": (8, 24, 2048, 1, False),
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


def bytes_moved(case, itemsize):
    """Returns {version: (bytes of the forward, of forward and backward)}, the least that each can move."""
    frames, side, D, regions, full = CASES[case]
    masks, row = make_masks(frames, side, regions, full), D * itemsize
    M, covered = masks.numel(), int(masks.sum())
    features, out = frames * side**2 * row, len(masks) * row  # (N, D), (R, D)
    product, touched = M * row, covered * row  # (R, D, h, w), (covered, D)
    features_float32, touched_float32 = (4 * size // itemsize for size in (features, touched))
    # eager: the product, the quotient, the sum over a row and the sum over the rest, each read and written.
    sums = product + 2 * (product // side) + out
    # reference: all rows in float32, the touched ones selected, multiplied and added up. Backward: a gradient
    # for each touched row, multiplied, and added to zeros, which are converted in the end.
    both = {
        "fused": (touched + out + 4 * M, out + features + 4 * M),
        # Backward: zeros everywhere, then the rows of its list.
        "embedding_bag": (touched + out + covered * (8 + itemsize), out + features + touched),
        "bmm": (features + out + M * itemsize, out + features + M * itemsize),
        "compiled": (product + out + M * itemsize, out + features + M * itemsize),
        "eager": (features + 3 * product + sums, out + 3 * product + (product + features) * (regions > 1)),
        "reference": (
            features + features_float32 + 5 * touched_float32 + out,
            out + 6 * touched_float32 + 2 * features_float32 + features,
        ),
    }
    return {name: (forward, forward + backward) for name, (forward, backward) in both.items()}


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
        "reference": lambda x: kernels.masked_average_pool_reference(x, *index),
    }
    # Averages near 1, whatever the size of the region.
    features = [torch.randn(N, D, device=device, dtype=dtype).add_(1) for _ in range(copies)]
    return [x.requires_grad_() for x in features], versions


def median_ms(call, copies, device):
    """The median time of call(i) in ms. i goes round `copies` inputs, and the last results are kept, so that
    caches hold neither.
    """
    results, times = deque(maxlen=copies), []
    for i in range(3):  # these compile and, on a GPU, tune the block sizes
        results.append(call(i % copies))
    for _ in range(5):
        if device == "cpu":
            start = time.perf_counter()
            results.append(call(0))
            times.append(1000 * (time.perf_counter() - start))
            continue
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # for about 10 ms, while the host queues all calls
        events = []
        for i in range(20):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            results.append(call(i % copies))
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) for start, stop in events]
    return statistics.median(times)


def bench(case, device, dtype, speed_of_copy=None):
    """Prints the lines of one case."""
    frames, side, D, *_ = CASES[case]
    itemsize = dtype.itemsize
    copies = 1
    if device == "cuda":  # together the inputs fill the L2 cache more than twice
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = 2 + 2 * cache // (frames * side**2 * D * itemsize)
    features, versions = make_versions(case, device, dtype, copies)
    if device == "cuda":
        torch.compiler.reset()  # so that the expression is compiled for this case's own shape
        versions["compiled"] = torch.compile(versions["eager"])
    if kernels.triton is None or device == "cpu":
        del versions["fused"]  # the time of Triton's interpreter says nothing
    with torch.no_grad():
        expected = versions["reference"](features[0]).float()
    for name, version in versions.items():
        grad = torch.randn_like(expected, dtype=dtype)
        forward = lambda i, version=version: version(features[i])  # noqa: E731
        both = lambda i, f=forward, grad=grad: torch.autograd.grad(f(i), features[i], grad)  # noqa: E731
        try:
            with torch.no_grad():
                error = float((forward(0).float() - expected).abs().max())
                assert error < 0.05, f"expected an error below 0.05, found {error}"
                times = [median_ms(forward, copies, device)]
            times.append(median_ms(both, copies, device))
        except torch.cuda.OutOfMemoryError:
            print(f"{case:8}{name:15}out of memory")
            continue
        directions = ("forward", "forward + backward")
        for direction, ms, moved in zip(directions, times, bytes_moved(case, itemsize)[name]):
            speed = moved / 1e6 / ms
            of_copy = f"{speed / speed_of_copy:9.0%}" if speed_of_copy else ""
            print(f"{case:8}{name:15}{direction:19}{ms:9.4f}{moved / 1e6:8.0f}{speed:7.0f}{of_copy}")
    if "fused" in versions:
        chosen = [kernel.best_config.kwargs for kernel in (kernels.pool_forward, kernels.pool_backward)]
        print("        block sizes chosen:", *chosen)


def main():
    header = f"{'case':8}{'version':15}{'direction':19}{'ms':>9}{'MB':>8}{'GB/s':>7}"
    if not torch.cuda.is_available():
        print("No GPU: a small case in float32 on the CPU, which says nothing about a GPU.")
        print(header)
        bench("small", "cpu", torch.float32)
        return
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    speed_of_copy = 2 * len(source) / 1e6 / median_ms(lambda i: target.copy_(source), 1, "cuda")  # GB/s
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, bfloat16. A copy on the device: {speed_of_copy:.0f} GB/s.")
    print(f"{header}{'of copy':>9}   (MB: the least that it can move)")
    for case in CASES:
        bench(case, "cuda", torch.bfloat16, speed_of_copy)


if __name__ == "__main__":
    main()
