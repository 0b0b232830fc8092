"""Times the pooling kernels against other ways to compute the same: `python tests/bench_kernels.py`.

On a GPU it runs all CASES with all versions, and prints for each its time, the least bytes that it can move,
the resulting speed, and that speed's share of a plain copy on the same device. Without a GPU it times a small
case on the CPU, which says nothing about a GPU.

Pooling makes one multiplication and one addition for each number that it reads, so its time is that of the
bytes that go to and from memory. Take case "batch": 64 frames of 27 x 27 cells with 3584 columns of bfloat16,
together 334 MB, and 128 regions, two on each frame, that cover 38 % of their frames on average. The least
that each version has to move, in MB, as `bytes_moved` counts it (it ignores what caches save when a row is
read twice):

                                                                               forward   forward + backward
    fused          reads the rows that a mask touches and writes (R, D)                257          593
    embedding_bag  the same rows, and a list of their indices                          257          848
    bmm            all rows once, for both regions of a frame                          336          671
    compiled       all rows for each region, if everything is fused                    670         1005
    eager          (x * mask / area).sum(-1).sum(-1): three arrays (R, D, h, w)       3060         6071
    reference      the touched rows copied, converted to float32, multiplied, added   3559         8299

In the forward, embedding_bag moves as little as the kernel. But to list the cells with a weight the host has
to wait until the GPU has counted them, and the backward sorts that list. bmm needs frames of one size, so
ragged ones would first be copied into a padded batch. Every version has to write the 334 MB of the gradient
of all cells.
"""

import os
import statistics
import sys
import time
from collections import deque
from functools import partial

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))

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
    masks = make_masks(frames, side, regions, full)
    M, covered, row = masks.numel(), int(masks.sum()), D * itemsize
    features = frames * side**2 * row  # (N, D)
    product = M * row  # (R, D, h, w)
    touched = covered * row  # (covered, D)
    touched_float32 = covered * D * 4
    features_float32 = frames * side**2 * D * 4
    out = len(masks) * row
    forward = {
        "fused": touched + out + 4 * M,
        "embedding_bag": touched + out + covered * (8 + itemsize),
        "bmm": features + out + M * itemsize,
        "compiled": product + out + M * itemsize,
        # The product, the quotient, the sum over a row and the sum over the rest, each read and written.
        "eager": (features + product) + 2 * product + (product + product // side) + (product // side + out),
        # All rows in float32, the touched ones selected, multiplied and added up.
        "reference": features + features_float32 + 5 * touched_float32 + out,
    }
    backward = {
        "fused": out + features + 4 * M,
        "embedding_bag": out + features + touched,  # zeros everywhere, then the rows of its list
        "bmm": out + features + M * itemsize,
        "compiled": out + features + M * itemsize,
        "eager": out + product + 2 * product + (product + features if regions > 1 else 0),
        # A gradient for each touched row, multiplied, and added to zeros, which are converted in the end.
        "reference": out + 6 * touched_float32 + 2 * features_float32 + features,
    }
    return {name: (forward[name], forward[name] + backward[name]) for name in forward}


def fused(features, weights, frame_start, weight_start):
    """The kernels of this project, whatever NANOREFER_POOL says."""
    return kernels.FusedMaskedAveragePool.apply(features, weights, frame_start, weight_start)


def eager(features, mask, area):
    """VideoRefer's expression.

    features: (N, D). mask: (frames, regions, 1, h, w). area: (frames, regions, 1, 1, 1).
    """
    frames, regions, _, h, w = mask.shape
    x = features.view(frames, 1, h, w, -1).permute(0, 1, 4, 2, 3)  # (frames, 1, D, h, w)
    return (x * mask / area).sum(-1).sum(-1).view(frames * regions, -1)


def bmm(features, share):
    """One matrix product for each frame.

    features: (N, D). share: (frames, regions, h * w), rows that sum to 1.
    """
    frames, regions, cells = share.shape
    return torch.bmm(share, features.view(frames, cells, -1)).view(frames * regions, -1)


def embedding_bag(features, rows, offsets, share):
    """Weighted sums of listed rows.

    features: (N, D). rows, share: (covered,). offsets: (R,), where each list begins.
    """
    return F.embedding_bag(rows, features, offsets, mode="sum", per_sample_weights=share)


def make_versions(case, device, dtype, copies):
    """Returns a list of `copies` features (N, D), and {name: function of features, which returns (R, D)}.

    What a version needs beside features is made here, so it is not timed: for embedding_bag the list of
    cells, for bmm and the eager expression masks in the dtype of features. All frames have one size, so bmm
    needs no padding, and the eager expression broadcasts a frame over its regions without a copy.
    """
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
    mask = masks.to(dtype).view(frames, regions, 1, side, side)
    area = area.to(dtype).view(frames, regions, 1, 1, 1)

    index = {"weights": weights, "frame_start": frame_start, "weight_start": weight_start}
    versions = {
        "fused": partial(fused, **index),
        "embedding_bag": partial(embedding_bag, rows=rows, offsets=offsets, share=row_share),
        "bmm": partial(bmm, share=share),
        "eager": partial(eager, mask=mask, area=area),
        "reference": partial(kernels.masked_average_pool_reference, **index),
    }
    features = []
    for _ in range(copies):
        x = torch.randn(N, D, device=device, dtype=dtype)
        x += 1  # averages near 1, whatever the size of the region
        features.append(x.requires_grad_())
    return features, versions


def median_ms(call, copies, device):
    """Returns the median time of call(i) in ms.

    i goes round `copies` inputs, and the last results are kept, so that caches hold neither.
    """
    results = deque(maxlen=copies)
    for i in range(3):  # these compile and, on a GPU, tune the block sizes
        results.append(call(i % copies))
    times = []
    if device == "cpu":
        for i in range(5):
            start = time.perf_counter()
            results.append(call(i % copies))
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)
    for _ in range(5):
        torch.cuda.synchronize()
        # The GPU sleeps for about 10 ms. Meanwhile the host queues all calls, so that its own time is not
        # measured.
        torch.cuda._sleep(20_000_000)
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


def copy_speed(device):
    """Returns the speed of copying 1 GiB on the device in GB/s, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / 1e6 / median_ms(lambda i: target.copy_(source), 1, device)


def time_version(version, features, expected, device):
    """Returns (ms of the forward, ms of forward and backward), after a comparison with expected (R, D)."""
    grad = torch.randn_like(expected, dtype=features[0].dtype)
    with torch.no_grad():
        error = float((version(features[0]).float() - expected).abs().max())
        assert error < 0.05, f"expected an error below 0.05, found {error}"
        forward = median_ms(lambda i: version(features[i]), len(features), device)
    both = median_ms(
        lambda i: torch.autograd.grad(version(features[i]), features[i], grad), len(features), device
    )
    return forward, both


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
        try:
            times = time_version(version, features, expected, device)
        except torch.cuda.OutOfMemoryError:
            print(f"{case:8}{name:15}out of memory")
            continue
        for direction, ms, moved in zip(
            ("forward", "forward + backward"), times, bytes_moved(case, itemsize)[name]
        ):
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
    speed_of_copy = copy_speed("cuda")
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, bfloat16. A copy on the device: {speed_of_copy:.0f} GB/s.")
    print(f"{header}{'of copy':>9}   (MB: the least that it can move)")
    for case in CASES:
        bench(case, "cuda", torch.bfloat16, speed_of_copy)


if __name__ == "__main__":
    main()
