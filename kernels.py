"""Masked average pooling: one vector for each region, the average of its frame's cells weighted by the mask's coverage.

    out[r] = sum_i weights[ws[r] + i] * features[fs[r] + i] / sum_i weights[ws[r] + i]        ws = weight_start, fs = frame_start

`features` holds the cells of all frames of a batch one after another, `weights` the coverage grids of all regions, so frames may
differ in size and nothing is padded. `masked_average_pool` is what model.py calls: it checks its arguments, then takes the Triton
kernels on a CUDA device and the plain torch version elsewhere. NANOREFER_POOL=triton or =reference in the environment forces one.

    python kernels.py                       # check, then time. Without a GPU: Triton's interpreter is checked, the CPU is timed
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
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it while it is imported: kernels then run in numpy, on the CPU
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
    total = torch.zeros(R, D, device=features.device).index_add(0, region, weight[:, None] * features[cell].float())
    area = torch.zeros(R, device=features.device).index_add(0, region, weight)
    return (total / torch.where(area > 0, area, 1)[:, None]).to(features.dtype)


# ------------------------------------------------------------------------------------------------ why one kernel

# There is one multiplication and one addition for each number read, and a GPU can do a hundred in the time that it takes to read
# one: the time is the bytes moved to and from memory. Case (b) of the benchmark below has 64 frames of 27x27 cells of 3584 bfloat16,
# 334 MB, and 128 regions, two on a frame, that cover 38 % of their frames on average. `bytes_moved` counts, in MB:
#
#                                                                        forward   forward + backward
EXPECTED_ON_B = """
    fused           reads the rows that a mask touches, writes (R, D)        257                  593
    embedding_bag   the same rows, and a list of their numbers               257                 1183
    bmm             all rows, once for a frame's two regions                 336                  671
    compiled        all rows for each region, if everything fuses            670                 1675
    eager           x * mask and / area each write (R, D, h, w)             3061                 5736
    reference       the rows copied, copied to float32, multiplied          2810                 6900
"""
# embedding_bag is as good in the forward, but making its list means finding the non-zero weights, whose number the host has to
# wait for, and its backward sorts the list. bmm is good where all frames have one size: others must be copied into a padded
# batch first. Backward, every version has to write the 334 MB gradient of all cells.

# ------------------------------------------------------------------------------------------------ the kernels

if triton:
    # Blocks are chosen by measuring: on a GPU the first call with a new D (or dtype) times each config below and keeps the best.
    # Forward: BLOCK_N cells x BLOCK_D columns are in flight at a time. Narrow blocks make many programs, which few regions need to
    # keep all of the GPU busy; wide ones read longer stretches of a row and read the weights less often. STAGES > 1 asks the
    # compiler to fetch the next tiles while it adds up this one; with 1, other programs on the same core have to hide the wait.
    FORWARD = [
        triton.Config({"BLOCK_N": n, "BLOCK_D": d, "STAGES": stages}, num_warps=warps)
        for n, d, warps in ((32, 64, 4), (16, 128, 4), (16, 256, 4), (8, 512, 4))
        for stages in (1, 4)
    ]
    # Backward: a program owns BLOCK_N rows and walks along them. Fewer rows make more programs, wider blocks fewer steps.
    BACKWARD = [triton.Config({"BLOCK_N": n, "BLOCK_D": d}, num_warps=4) for n, d in ((4, 256), (8, 256), (8, 512), (16, 256))]
    if triton.knobs.runtime.interpret:  # nothing to measure, and the tuner would look for a GPU
        FORWARD, BACKWARD = FORWARD[:1], BACKWARD[:1]

    @triton.autotune(FORWARD, key=["D"])
    @triton.jit
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
        first_row = tl.load(frame_start + r)  # int64, and with it every offset below: features may have more than 2**31 elements
        begin = tl.load(weight_start + r)
        end = tl.load(weight_start + r + 1)
        valid = (begin >= 0) & (begin <= end) & (end <= M)
        total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # a sum for each row of the tile: added up once, after the loop
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

    @triton.jit
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
            length = tl.load(weight_start + other + 1, mask=exists, other=0) - tl.load(weight_start + other, mask=exists, other=0)
            before = exists & ((other_start < start) | ((other_start == start) & (other <= r)))  # r itself included
            position += tl.sum(before.to(tl.int32), axis=0)
            furthest = tl.maximum(furthest, tl.max(tl.where(before, other_start + length, start), axis=0))
        tl.store(order + position - 1, r)
        tl.store(reach + position - 1, furthest)

    @triton.autotune(BACKWARD, key=["D"])
    @triton.jit
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
        without regions gets zeros. The sum runs in the order of sort_regions, whatever the blocks: two runs agree bit for bit.
        """
        n0 = tl.program_id(0).to(tl.int64) * BLOCK_N
        row = n0 + tl.arange(0, BLOCK_N)
        first = 0
        last = 0
        for i in range(0, R, BLOCK_R):
            k = i + tl.arange(0, BLOCK_R)
            first += tl.sum((tl.load(reach + k, mask=k < R, other=n0 + 1) <= n0).to(tl.int32), axis=0)
            last += tl.sum((tl.load(frame_start + k, mask=k < R, other=n0 + BLOCK_N) < n0 + BLOCK_N).to(tl.int32), axis=0)
        for d0 in range(0, D, BLOCK_D):
            column = d0 + tl.arange(0, BLOCK_D)
            total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for k in range(first, last):
                r = tl.load(order + k).to(tl.int64)
                begin = tl.load(weight_start + r)
                region_area = tl.load(area + r)  # 0 or NaN for a region that is empty, or that the forward found invalid: no cells
                end = tl.where(region_area > 0, tl.load(weight_start + r + 1), begin)
                cell = row - tl.load(frame_start + r)
                covers = (cell >= 0) & (begin + cell < end)
                weight = tl.load(weights + begin + cell, mask=covers, other=0.0)
                g = tl.load(grad + r * D + column, mask=column < D, other=0.0).to(tl.float32)
                term = (weight / region_area)[:, None] * g[None, :]
                total += tl.where((weight > 0)[:, None], term, 0.0)  # an infinite gradient stays with the cells of its region
            inside = (row < N)[:, None] & (column < D)[None, :]
            tl.store(grad_features + row[:, None] * D + column[None, :], total.to(grad_features.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------ what autograd and model.py see


class FusedMaskedAveragePool(torch.autograd.Function):
    """The kernels as one differentiable function.

    An autograd.Function and not a torch.library operator: it is the shorter of the two to write, read and call. An operator would
    help torch.compile to keep a model in one graph, but training here is not compiled, and FSDP shards parameters, of which there
    are none.
    """

    @staticmethod
    def forward(ctx, features, weights, frame_start, weight_start):
        (N, D), R = features.shape, len(frame_start)
        out = torch.empty(R, D, dtype=features.dtype, device=features.device)
        area = torch.empty(R, dtype=torch.float32, device=features.device)
        if out.numel():
            with torch.cuda.device_of(features):  # Triton launches on the current GPU, which need not be that of the tensors
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
        sort_regions[(R,)](frame_start, weight_start, order, reach, R, BLOCK_R=512)
        pool_backward[lambda config: (triton.cdiv(N, config["BLOCK_N"]),)](
            grad, weights, frame_start, weight_start, area, order, reach, grad_features, N, R, D, BLOCK_R=512
        )
        return grad_features, None, None, None


@cache
def _warn_without_triton():
    """Says once that the kernels are missing."""
    warnings.warn("Triton cannot be imported: masked_average_pool runs as plain torch on this GPU, which is slower", stacklevel=3)


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
    tensors = {"features": features, "weights": weights, "frame_start": frame_start, "weight_start": weight_start}
    if not (
        [x.ndim for x in tensors.values()] == [2, 1, 1, 1]
        and features.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (weights.dtype, frame_start.dtype, weight_start.dtype) == (torch.float32, torch.int64, torch.int64)
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
