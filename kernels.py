"""Masked average pooling: one vector for each region, the average of its frame's cells weighted by the mask's coverage.

    out[r] = sum_i weights[ws[r] + i] * features[fs[r] + i] / sum_i weights[ws[r] + i]        ws = weight_start, fs = frame_start

`features` holds the cells of all frames of a batch one after another, `weights` the coverage grids of all regions, so frames may
differ in size and nothing is padded. `masked_average_pool` is what model.py calls: it checks its arguments, then takes the Triton
kernels on a CUDA device and the plain torch version elsewhere. NANOREFER_POOL=triton or =reference in the environment forces one.

    python kernels.py                       # check, then time. Without a GPU: the kernels in Triton's interpreter, the CPU's times
    python -m pytest -q tests/test_kernels.py

The file is meant to be read from top to bottom: the definition, why one kernel is worth having, the kernels, the function that
autograd sees, the switch, the benchmark. What it takes from Triton's own tutorials 01 (vector add) and 02 (softmax): a kernel is
written for one *program*, which handles blocks of numbers; the grid says how many programs run; masks keep blocks inside arrays.
"""

import os
import statistics
import time
import warnings
from collections import deque
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # Triton reads it while it is imported: kernels then run in numpy, on the CPU
try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton package, and without a GPU nobody needs it
    triton = None

# ------------------------------------------------------------------------------------------------ the definition


def masked_average_pool_reference(features, weights, frame_start, weight_start):
    """The definition, in plain torch: see masked_average_pool for shapes. Sums in float32, gradient for `features` by autograd."""
    R, D = len(frame_start), features.shape[1]
    region = torch.repeat_interleave(torch.arange(R, device=weights.device), weight_start.diff())
    cell = frame_start[region] + torch.arange(len(weights), device=weights.device) - weight_start[region]
    inside = weights > 0  # a cell of weight 0 is not read at all, so a NaN in it stays out of the sum
    region, cell, weight = region[inside], cell[inside], weights[inside].float()
    total = torch.zeros(R, D, device=features.device).index_add(
        0,
        region,
        weight[:, None] * features.float()[cell],  # float32 first: its gradient too is summed in float32
    )
    area = torch.zeros(R, device=features.device).index_add(0, region, weight)
    return (total / torch.where(area > 0, area, 1)[:, None]).to(features.dtype)


# ------------------------------------------------------------------------------------------------ why one kernel

# For each number read there is one multiplication and one addition, and a GPU can do tens of those in the time that it takes to
# read a number: what costs time is the bytes that go to and from memory. Take case (b) of the benchmark below: 64 frames of 27x27
# cells of 3584 bfloat16, together 334 MB, and 128 regions, two on a frame, that cover 38 % of their frames on average. The least
# that each version has to move, in MB, as `bytes_moved` counts it (what the caches save when a row is read twice is not in it):
#
#                                                                                          forward   forward + backward
#    fused          reads the rows that a mask touches, writes (R, D)                            257                  593
#    embedding_bag  the same rows, and a list of their numbers                                   257                  848
#    bmm            all rows once, for both regions of a frame                                   336                  671
#    compiled       all rows for each region, if everything fuses                                670                 1005
#    eager          (x * mask / area).sum(-1).sum(-1): three arrays of (R, D, h, w) or nearly   3060                 6071
#    reference      the touched rows copied, copied to float32, multiplied, added up            2812                 5958
#
# embedding_bag moves as little in the forward, but to list the non-zero weights the host must wait for the GPU to count them, and
# the backward sorts the list. bmm needs frames of one size: ragged ones would be copied into a padded batch first. The 334 MB of
# the gradient of all cells have to be written by every version.

# ------------------------------------------------------------------------------------------------ the kernels

if triton:
    # Blocks are chosen by measuring: on a GPU the first call with a new D (or dtype) times each config below and keeps the best.
    # Forward: BLOCK_N cells x BLOCK_D columns are in flight at a time. Narrow blocks make many programs, which few regions need to
    # keep all of the GPU busy; wide ones read longer stretches of a row and read the weights less often. STAGES > 1 asks the
    # compiler to fetch the next tiles while it adds up this one; with 1, other programs on the same core have to hide the wait.
    # A choice of blocks is also an order of the forward's sums: processes that choose differently may differ in the last bit.
    FORWARD = [
        triton.Config({"BLOCK_N": n, "BLOCK_D": d, "STAGES": stages}, num_warps=warps)
        for n, d, warps in ((32, 64, 4), (16, 128, 4), (16, 256, 4), (8, 512, 4))
        for stages in (1, 4)
    ]
    # Backward: a program owns BLOCK_N rows and walks along them. Fewer rows make more programs, wider blocks fewer steps.
    BACKWARD = [
        triton.Config({"BLOCK_N": n, "BLOCK_D": d}, num_warps=4)
        for n, d in ((16, 256), (8, 512), (8, 256), (4, 256))
    ]
    TRIED = (
        slice(1) if triton.knobs.runtime.interpret else slice(None)
    )  # the interpreter has no speed, and no GPU to measure it on

    @triton.autotune(FORWARD[TRIED], key=["D"])
    @triton.jit(
        do_not_specialize=["N", "M"]
    )  # these change with each batch; D stays: a multiple of 16 allows wide loads
    def pool_forward(
        features,  # (N, D), row-major, float32, float16 or bfloat16: the cells of all frames
        weights,  # (M,) float32: the coverage grids of all regions
        frame_start,  # (R,) int64: the row of features where region r's frame begins
        weight_start,  # (R + 1,) int64: where region r's grid begins in weights
        out,  # (R, D), dtype of features: written
        area,  # (R,) float32: written, the sum of a region's weights, which the backward needs
        N,  # rows of features
        M,  # length of weights
        D,  # columns
        BLOCK_N: tl.constexpr,  # cells of a tile; constexpr: known when the kernel is compiled, as the sizes of blocks must be
        BLOCK_D: tl.constexpr,  # columns of a tile
        STAGES: tl.constexpr,  # tiles being fetched at a time
    ):
        """out[r, d] = sum_i weights[ws + i] * features[fs + i, d] / area[r],  area[r] = sum_i weights[ws + i];  0 where area is 0.

        Grid: R * ceil(D / BLOCK_D) programs in one dimension, the column blocks of a region side by side, since neighbours run at
        the same time and so read whole rows between them. Each loops over its region's cells, so nothing is added up across
        programs. A mask on a load is not a multiplication by zero: what it rules out is not fetched.
        """
        blocks = tl.cdiv(D, BLOCK_D)
        r = tl.program_id(0) // blocks
        column = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        first_row = tl.load(
            frame_start + r
        )  # int64, and with it every offset below: features may have more than 2**31 elements
        begin = tl.load(weight_start + r)
        end = tl.load(weight_start + r + 1)
        valid = (begin >= 0) & (begin <= end) & (end <= M)
        total = tl.zeros(
            (BLOCK_N, BLOCK_D), dtype=tl.float32
        )  # a sum for each row of the tile: added up once, after the loop
        weight_total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for i in tl.range(0, tl.where(valid, end - begin, 0), BLOCK_N, num_stages=STAGES):
            cell = i + tl.arange(0, BLOCK_N)
            weight = tl.load(weights + begin + cell, mask=begin + cell < end, other=0.0)
            inside = weight > 0
            row = first_row + cell
            # The host cannot look at indices without waiting for the GPU, and a kernel cannot raise. A weighted cell outside of
            # features is therefore not read, and counts as NaN, which training stops at.
            readable = inside & (row >= 0) & (row < N)
            x = tl.load(
                features + row[:, None] * D + column[None, :],
                mask=readable[:, None] & (column < D)[None, :],
                other=float("nan"),
            )
            total += tl.where(inside[:, None], weight[:, None] * x.to(tl.float32), 0.0)
            weight_total += tl.where(inside, weight, 0.0)
        weight_sum = tl.sum(weight_total, axis=0)
        average = tl.sum(total, axis=0) / tl.where(weight_sum > 0, weight_sum, 1.0)
        average = tl.where(valid, average, float("nan"))
        tl.store(out + r.to(tl.int64) * D + column, average.to(out.dtype.element_ty), mask=column < D)
        tl.store(area + r, weight_sum)  # the programs of one region all write the same number

    # The backward goes the other way: a row of features collects from all regions that cover it. Programs of regions that added to
    # shared rows would need atomics, whose order, and so whose rounding, changes from run to run. Instead each program owns rows,
    # and looks up the regions over them. A region covers the rows [fs, fs + its length), an interval, usually a frame, but any
    # other will do. With the regions sorted by their first row, those over rows [n0, n1) lie between two positions of the order:
    #     up to the number of regions whose first row is < n1: later ones begin too late;
    #     from the first whose reach is > n0, reach[k] being the furthest end of the regions up to position k: earlier ones all end
    #     too early. Reach never falls, so that is the number of positions with reach <= n0.
    # Between the two may be regions that miss the rows; their weight is then 0.

    BLOCK_R = 512  # regions looked at at a time, in both kernels of the backward

    @triton.jit(do_not_specialize=["R"])
    def sort_regions(
        frame_start,  # (R,) int64
        weight_start,  # (R + 1,) int64
        order,  # (R,) int32: written, the regions by first row, those with the same one by number
        reach,  # (R,) int64: written, the furthest end of the regions up to that position
        R,  # number of regions
        BLOCK_R: tl.constexpr,  # regions compared at a time
    ):
        """order[k] = r where k counts the j with (fs[j], j) < (fs[r], r);  reach[k] = max of the ends of these and of r.

        Grid: R programs, each of which compares one region with all. R * R comparisons are fewer than they sound (128 regions:
        16 thousand), and one launch takes the place of the six or so that torch.sort and torch.cummax need.
        """
        r = tl.program_id(0)
        start = tl.load(frame_start + r)
        position = 0
        furthest = start
        for i in range(0, R, BLOCK_R):
            other = i + tl.arange(0, BLOCK_R)
            exists = other < R
            other_start = tl.load(frame_start + other, mask=exists, other=0)
            length = tl.load(weight_start + other + 1, mask=exists, other=0) - tl.load(
                weight_start + other, mask=exists, other=0
            )
            before = exists & (
                (other_start < start) | ((other_start == start) & (other <= r))
            )  # r itself included
            position += tl.sum(before.to(tl.int32), axis=0)
            furthest = tl.maximum(furthest, tl.max(tl.where(before, other_start + length, start), axis=0))
        tl.store(order + position - 1, r)
        tl.store(reach + position - 1, furthest)

    @triton.autotune(BACKWARD[TRIED], key=["D"])
    @triton.jit(do_not_specialize=["N", "R"])
    def pool_backward(
        grad,  # (R, D), row-major, dtype of features: the gradient of out
        weights,  # (M,) float32
        frame_start,  # (R,) int64
        weight_start,  # (R + 1,) int64
        area,  # (R,) float32, from the forward
        order,  # (R,) int32, from sort_regions
        reach,  # (R,) int64, from sort_regions
        grad_features,  # (N, D), dtype of features: written, every element
        N,  # rows of features
        R,  # number of regions
        D,  # columns
        BLOCK_R: tl.constexpr,  # regions looked at at a time, to find those over the rows
        BLOCK_N: tl.constexpr,  # rows of a tile
        BLOCK_D: tl.constexpr,  # columns of a tile
    ):
        """grad_features[n, d] = sum over the regions r that cover n of weights[ws[r] + n - fs[r]] / area[r] * grad[r, d].

        Grid: ceil(N / BLOCK_N) programs. Each finds its regions once, then goes along its rows block by block of columns. A row
        without regions gets zeros. The sum runs in the order of sort_regions, whatever the blocks, so that two runs agree bit for bit.
        """
        n0 = tl.program_id(0).to(tl.int64) * BLOCK_N
        row = n0 + tl.arange(0, BLOCK_N)
        first = 0
        last = 0
        for i in range(0, R, BLOCK_R):
            k = i + tl.arange(0, BLOCK_R)
            first += tl.sum((tl.load(reach + k, mask=k < R, other=n0 + 1) <= n0).to(tl.int32), axis=0)
            last += tl.sum(
                (tl.load(frame_start + k, mask=k < R, other=n0 + BLOCK_N) < n0 + BLOCK_N).to(tl.int32), axis=0
            )
        for d0 in range(0, D, BLOCK_D):
            column = d0 + tl.arange(0, BLOCK_D)
            total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for k in range(first, last):
                r = tl.load(order + k).to(tl.int64)
                begin = tl.load(weight_start + r)
                region_area = tl.load(
                    area + r
                )  # 0 where the region is empty, or the forward found weight_start invalid
                end = tl.where(region_area > 0, tl.load(weight_start + r + 1), begin)
                cell = row - tl.load(frame_start + r)
                covers = (cell >= 0) & (begin + cell < end)
                weight = tl.load(weights + begin + cell, mask=covers, other=0.0)
                g = tl.load(grad + r * D + column, mask=column < D, other=0.0).to(tl.float32)
                share = weight / tl.where(region_area > 0, region_area, 1.0)
                # Not a product with 0, which an infinite gradient would turn into NaN in rows that the region leaves out.
                total += tl.where((weight > 0)[:, None], share[:, None] * g[None, :], 0.0)
            inside = (row < N)[:, None] & (column < D)[None, :]
            tl.store(
                grad_features + row[:, None] * D + column[None, :],
                total.to(grad_features.dtype.element_ty),
                mask=inside,
            )


# ------------------------------------------------------------------------------------------------ what autograd and model.py see


class FusedMaskedAveragePool(torch.autograd.Function):
    """The kernels as one differentiable function.

    An autograd.Function and not a torch.library operator, because it is shorter. An operator would help torch.compile to keep a
    model in one graph, but training here is not compiled; to FSDP, which shards parameters, it is all one.
    """

    @staticmethod
    def forward(ctx, features, weights, frame_start, weight_start):
        (N, D), R = features.shape, len(frame_start)
        out = torch.empty(R, D, dtype=features.dtype, device=features.device)
        area = torch.empty(R, dtype=torch.float32, device=features.device)
        if out.numel():
            with torch.cuda.device_of(
                features
            ):  # Triton launches on the current GPU, which need not be that of the tensors
                pool_forward[lambda config: (R * triton.cdiv(D, config["BLOCK_D"]),)](
                    features, weights, frame_start, weight_start, out, area, N, len(weights), D
                )
        ctx.save_for_backward(weights, frame_start, weight_start, area)
        ctx.rows = N
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, frame_start, weight_start, area = ctx.saved_tensors
        N, (R, D) = ctx.rows, grad.shape
        if 0 in (N, R, D):
            return grad.new_zeros(N, D), None, None, None
        grad = grad.contiguous()  # that of out.sum() is a single number, seen (R, D) times
        grad_features = torch.empty(N, D, dtype=grad.dtype, device=grad.device)
        order = torch.empty(R, dtype=torch.int32, device=grad.device)
        reach = torch.empty(R, dtype=torch.int64, device=grad.device)
        sort_regions[(R,)](frame_start, weight_start, order, reach, R, BLOCK_R=BLOCK_R)
        pool_backward[lambda config: (triton.cdiv(N, config["BLOCK_N"]),)](
            grad,
            weights,
            frame_start,
            weight_start,
            area,
            order,
            reach,
            grad_features,
            N,
            R,
            D,
            BLOCK_R=BLOCK_R,
        )
        return grad_features, None, None, None


@cache
def _warn_without_triton():
    """Says once that the kernels are missing."""
    warnings.warn(
        "Triton cannot be imported: masked_average_pool runs as plain torch on this GPU, which is slower",
        stacklevel=3,
    )


def masked_average_pool(features, weights, frame_start, weight_start):
    """Average of each region's cells, weighted by coverage -> (R, D), in the dtype of features.

    features: float32, float16 or bfloat16 (N, D), the cells of all frames, one frame after another.
    weights: float32 (M,), >= 0, the coverage grids of all regions, one after another. They get no gradient.
    frame_start: int64 (R,), the row of features where the frame of region r begins.
    weight_start: int64 (R + 1,), where region r's grid begins in weights; its first entry is 0, its last is M.
    A region with no weight gives zeros and no gradient. Regions may share rows, in part too. Raises ValueError for any other shape or
    dtype, for tensors that are not contiguous or on several devices, and for weights that want a gradient. Where the numbers in
    frame_start and weight_start are wrong, the reference raises, and the kernels give NaN.

    NANOREFER_POOL in the environment: "triton" (on a CPU it needs TRITON_INTERPRET=1), "reference", or "auto", the default: Triton
    on a CUDA device, the reference elsewhere.
    """
    tensors = {
        "features": features,
        "weights": weights,
        "frame_start": frame_start,
        "weight_start": weight_start,
    }
    if not (
        [x.ndim for x in tensors.values()] == [2, 1, 1, 1]
        and features.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (weights.dtype, frame_start.dtype, weight_start.dtype)
        == (torch.float32, torch.int64, torch.int64)
        and len(weight_start) == len(frame_start) + 1
        and all(x.device == features.device and x.is_contiguous() for x in tensors.values())
        and not weights.requires_grad
    ):
        found = ", ".join(
            f"{name} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
            + (" (not contiguous)" if not x.is_contiguous() else "")
            + (" (requires grad)" if name == "weights" and x.requires_grad else "")
            for name, x in tensors.items()
        )
        raise ValueError(
            "masked_average_pool expected contiguous tensors on one device: features float32, float16 or bfloat16 (N, D), weights "
            f"float32 (M,) without gradient, frame_start int64 (R,), weight_start int64 (R + 1,); found {found}"
        )
    choice = os.environ.get("NANOREFER_POOL", "auto")
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"expected NANOREFER_POOL to be auto, triton or reference, found {choice!r}")
    runs = triton is not None and (features.is_cuda or triton.knobs.runtime.interpret)
    if choice == "triton" and not runs:
        found = "no Triton" if triton is None else f"tensors on {features.device}, without TRITON_INTERPRET=1"
        raise RuntimeError(f"NANOREFER_POOL=triton needs Triton and a CUDA device; found {found}")
    if choice == "auto" and features.is_cuda and triton is None:
        _warn_without_triton()
    if choice == "triton" or (choice == "auto" and features.is_cuda and runs):
        return FusedMaskedAveragePool.apply(features, weights, frame_start, weight_start)
    return masked_average_pool_reference(features, weights, frame_start, weight_start)


# ------------------------------------------------------------------------------------------------ python kernels.py

CASES = {  # name -> frames, cells along a side, columns, regions on a frame, whether masks cover the frame
    "a": (8, 24, 2048, 1, False),  # one sample
    "b": (64, 27, 3584, 2, False),  # a batch, its regions of mixed size
    "c": (256, 27, 4096, 1, True),  # 1.5 GB in bfloat16
}


def make_masks(frames, side, regions, full):
    """-> float32 (frames * regions, side, side) of 0 and 1: squares of 1/8 to 8/8 of the side at scattered places, or all ones."""
    masks = torch.ones(frames * regions, side, side)
    for r in range(0 if full else len(masks)):
        size = max(1, side * (1 + r % 8) // 8)
        y, x = r * 7 % (side - size + 1), r * 11 % (side - size + 1)
        masks[r] = 0
        masks[r, y : y + size, x : x + size] = 1
    return masks


def bytes_moved(case, itemsize):
    """The least that each version can read and write, -> {name: (bytes of the forward, bytes of forward and backward)}."""
    frames, side, D, regions, full = CASES[case]
    masks = make_masks(frames, side, regions, full)
    M, covered, row = masks.numel(), int(masks.sum()), D * itemsize
    everything, product, touched = (
        frames * side**2 * row,
        M * row,
        covered * row,
    )  # (N, D), (R, D, h, w), (covered, D)
    wide = touched * 4 // itemsize  # the same in float32
    out = len(masks) * row
    forward = {
        "fused": touched + out + 4 * M,
        "embedding_bag": touched + out + covered * (8 + itemsize),
        "bmm": everything + out + M * itemsize,
        "compiled": product + out + M * itemsize,
        "eager": (everything + product) + 2 * product + (product + product // side) + (product // side + out),
        "reference": 2 * touched + (touched + wide) + 2 * wide + wide + out,
    }
    backward = {
        "fused": out + everything + 4 * M,
        "embedding_bag": out + everything + touched,  # zeros everywhere, then the rows of its list
        "bmm": out + everything + M * itemsize,
        "compiled": out + everything + M * itemsize,
        "eager": out + product + 2 * product + (product + everything if regions > 1 else 0),
        "reference": out + 3 * wide + (wide + touched) + everything + 2 * touched,
    }
    return {name: (forward[name], forward[name] + backward[name]) for name in forward}


def make_versions(case, device, dtype, copies):
    """-> (list of `copies` features (N, D) that need a gradient, {name: function of one of them -> (R, D)}).

    What the versions need beside features is made here, outside of what is timed: for embedding_bag the list of cells, for bmm and
    the eager expression masks in the dtype of features. All frames have one size, so that bmm needs no padding and the others no
    copy of a frame for each region: broadcasting does it.
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
    bags = torch.searchsorted(region, torch.arange(R, device=device))
    row_share = share.view(R, -1)[region, cell]
    mask = masks.to(dtype).view(frames, regions, 1, side, side)
    area = area.to(dtype).view(frames, regions, 1, 1, 1)

    def eager(features):
        x = features.view(frames, 1, side, side, D).permute(0, 1, 4, 2, 3)  # (frames, 1, D, h, w)
        return (x * mask / area).sum(-1).sum(-1).view(R, D)

    versions = {
        "fused": lambda x: FusedMaskedAveragePool.apply(x, weights, frame_start, weight_start),
        "embedding_bag": lambda x: F.embedding_bag(rows, x, bags, mode="sum", per_sample_weights=row_share),
        "bmm": lambda x: torch.bmm(share, x.view(frames, side**2, D)).view(R, D),
        "eager": eager,
        "reference": lambda x: masked_average_pool_reference(x, weights, frame_start, weight_start),
    }
    features = [
        torch.randn(N, D, device=device, dtype=dtype).add_(1).requires_grad_() for _ in range(copies)
    ]  # averages near 1
    return features, versions


def median_ms(call, copies, device):
    """Median time of call(i), in ms, i going round `copies` inputs. The last results are kept, so that outputs go round as well."""
    kept = deque(maxlen=copies)
    for i in range(3):  # compiles, and on a GPU chooses the blocks
        kept.append(call(i % copies))
    times = []
    if device == "cpu":
        for i in range(5):
            start = time.perf_counter()
            kept.append(call(i % copies))
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(
            20_000_000
        )  # cycles, some 10 ms: the host queues all calls meanwhile, and so is not what is measured
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)
        ]
        for i, (start, stop) in enumerate(events):
            start.record()
            kept.append(call(i % copies))
            stop.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) for start, stop in events]
    return statistics.median(times)


def check(device):
    """Compares kernels and reference, forward and backward, on shared, overlapping, short and empty regions."""
    torch.manual_seed(0)
    length = torch.tensor([91, 1, 0, 91, 40, 64], device=device)
    frame_start = torch.tensor([1, 0, 5, 1, 80, 92], device=device)
    weight_start = F.pad(length.cumsum(0), (1, 0))
    weights = (torch.rand(int(length.sum()), device=device) - 0.3).clamp(min=0)
    weights[-64:] = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        for D in (1, 63, 200):
            features = torch.randn(160, D, device=device, dtype=dtype, requires_grad=True)
            grad = torch.randn(6, D, device=device, dtype=dtype)
            found, wanted = (
                (out, *torch.autograd.grad(out, features, grad))
                for out in (
                    FusedMaskedAveragePool.apply(features, weights, frame_start, weight_start),
                    masked_average_pool_reference(features, weights, frame_start, weight_start),
                )
            )
            for name, a, b in zip(("output", "gradient"), found, wanted):
                error = float((a.detach().float() - b.detach().float()).abs().max())
                assert error < tolerance, (
                    f"{name} in {dtype}, D {D}: off by {error}, expected less than {tolerance}"
                )
    where = "on the GPU" if device == "cuda" else "under Triton's interpreter"
    print(f"kernels and reference agree {where}: output and gradient, 3 dtypes, D of 1, 63 and 200")


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if triton is None:
        print("Triton cannot be imported: nothing to check")
    else:
        check(device)
    if device == "cpu":
        print("no GPU: case (a) in float32 on the CPU, which says nothing about a GPU")
        (x, *_), versions = make_versions("a", device, torch.float32, 1)
        for name in ("reference", "eager"):
            out = partial(versions[name], x)
            both = median_ms(lambda i: torch.autograd.grad(out().sum(), x), 1, device)
            with torch.no_grad():
                print(
                    f"{name:14}{median_ms(lambda i: out(), 1, device):9.1f} ms forward{both:9.1f} ms forward + backward"
                )
        return
    properties = torch.cuda.get_device_properties(device)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_speed = 2 * len(source) / 1e6 / median_ms(lambda i: target.copy_(source), 1, device)  # GB/s
    del source, target
    print(
        f"{properties.name}, torch {torch.__version__}, bfloat16. Copying 1 GiB on the device: {copy_speed:.0f} GB/s, read and written"
    )
    print(
        f"{'case':5}{'version':15}{'direction':19}{'ms':>9}{'MB':>8}{'GB/s':>7}{'of copy':>9}   (MB: the least that it can move)"
    )
    for case, (frames, side, D, *_) in CASES.items():
        copies = 2 + 2 * properties.L2_cache_size // (
            frames * side**2 * D * 2
        )  # together more than twice the L2 cache
        torch.compiler.reset()  # the expression is compiled for each case's own shape
        features, versions = make_versions(case, device, torch.bfloat16, copies)
        versions["compiled"] = torch.compile(versions["eager"])
        if triton is None:
            del versions["fused"]
        with torch.no_grad():
            wanted = versions["reference"](features[0]).float()
        grad = torch.randn_like(wanted, dtype=torch.bfloat16)
        for name, version in versions.items():
            try:
                with torch.no_grad():
                    error = float((version(features[0]).float() - wanted).abs().max())
                    assert error < 0.05, f"{name} is off by {error} in case ({case})"
                    forward = median_ms(lambda i: version(features[i]), copies, device)
                both = median_ms(
                    lambda i: torch.autograd.grad(version(features[i]), features[i], grad), copies, device
                )
            except torch.cuda.OutOfMemoryError:
                print(f"{case:5}{name:15}out of memory")
                continue
            for direction, ms, moved in zip(
                ("forward", "forward + backward"), (forward, both), bytes_moved(case, 2)[name]
            ):
                speed = moved / 1e6 / ms
                print(
                    f"{case:5}{name:15}{direction:19}{ms:9.4f}{moved / 1e6:8.0f}{speed:7.0f}{speed / copy_speed:9.0%}"
                )
        if triton:
            chosen = [kernel.best_config for kernel in (pool_forward, pool_backward)]
            print("     blocks chosen:", *(f"{config.kwargs}" for config in chosen))


if __name__ == "__main__":
    main()
