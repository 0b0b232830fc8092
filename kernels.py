"""Masked average pooling: one vector for each region, the average of its frame's cells weighted by coverage.

    out[r] = sum_i weights[ws[r] + i] * features[fs[r] + i] / sum_i weights[ws[r] + i]
                                                                       fs = frame_start, ws = weight_start

    features (N, D)    the cells of all frames of a batch, one frame after another; frames may differ in size
    weights (M,)       the coverage grids of all regions, one grid after another
    out (R, D)         one row for each region

In this file a region is one object on one frame, which data.py and model.py call a region frame. What is
called weights and weight_start here is `coverage` and `coverage_start` there.

model.py calls `masked_average_pool`. On a CUDA device it runs the Triton kernels of this file, elsewhere the
plain torch version, which is also their reference. NANOREFER_POOL in the environment chooses one of them:
"triton" (on a CPU it needs TRITON_INTERPRET=1), "reference", or "auto", the default.

    python kernels.py                            # compare the kernels with the reference
    python tests/bench_kernels.py                # time both, and other ways to compute the same
    python -m pytest -q tests/test_kernels.py

To learn Triton, first read its tutorials 01 (vector add) and 02 (softmax). A kernel describes one *program*,
which computes blocks of numbers; the *grid* says how many programs run, and masks keep the blocks inside the
arrays.
"""

import os
import warnings

import torch
from torch.autograd.function import once_differentiable

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it on import: its kernels then run in numpy
try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton package for macOS and Windows
    triton = None


# ---- The function, and its definition in plain torch ----


def masked_average_pool(features, weights, frame_start, weight_start):
    """Returns (R, D) in the dtype of features: the average of each region's cells, weighted by coverage.

    features: float32, float16 or bfloat16 (N, D), the cells of all frames, one frame after another.
    weights: float32 (M,), not negative, the coverage grids of all regions, one grid after another.
    frame_start: int64 (R,), the row of features where the frame of region r begins.
    weight_start: int64 (R + 1,), where region r's grid begins in weights; its first entry is 0, its last M.

    Regions may share a frame, and may overlap in any other way. Sums are made in float32. A region without
    weight gives zeros and passes no gradient on. A cell of weight 0 is not read, so a NaN in it does no harm.
    Where frame_start or weight_start point outside of features or weights, the reference raises an error and
    the kernels return NaN. Raises AssertionError for other shapes, dtypes and devices.
    """
    check_arguments(features, weights, frame_start, weight_start)
    if choose_implementation(features) == "triton":
        return FusedMaskedAveragePool.apply(features, weights, frame_start, weight_start)
    return masked_average_pool_reference(features, weights, frame_start, weight_start)


def masked_average_pool_reference(features, weights, frame_start, weight_start):
    """The definition in plain torch; arguments as for masked_average_pool. Autograd makes its gradient."""
    R, D = len(frame_start), features.shape[1]
    ends = weight_start[[0, -1]].tolist()
    assert ends == [0, len(weights)], f"weight_start: expected to run from 0 to {len(weights)}, found {ends}"
    # For each weight: the region that it belongs to, and the row of features that it belongs to.
    region = torch.repeat_interleave(torch.arange(R, device=weights.device), weight_start.diff())
    row = frame_start[region] + torch.arange(len(weights), device=weights.device) - weight_start[region]
    inside = weights > 0  # other cells are left out, because 0 * NaN would be NaN
    region, row, weight = region[inside], row[inside], weights[inside]
    # Converting before selecting also sums the gradient in float32, where several regions share a row. Unlike
    # an index in brackets, index_select refuses negative rows.
    weighted = weight[:, None] * features.float().index_select(0, row)
    total = torch.zeros(R, D, device=features.device).index_add(0, region, weighted)
    area = torch.zeros(R, device=features.device).index_add(0, region, weight)
    return (total / torch.where(area > 0, area, 1)[:, None]).to(features.dtype)


# ---- The kernels ----
#
# Why write a kernel? Pooling makes one multiplication and one addition for each number that it reads. A GPU
# can do tens of those in the time that reading the number takes, so the time goes into moving bytes. The
# eager expression (x * mask / area).sum(-1).sum(-1), which VideoRefer uses, writes several arrays of R whole
# frames and reads them again. One kernel reads each row that a mask touches once and writes (R, D), which is
# about a tenth of the bytes. tests/bench_kernels.py counts them for this and for other versions.

if triton:
    # Triton tunes the block sizes: the first call with a new D or dtype times each of these configurations on
    # the GPU and keeps the fastest. A small BLOCK_D makes many programs, which keeps the whole GPU busy when
    # there are few regions; a large one reads longer stretches of a row. STAGES > 1 lets the compiler fetch
    # the next tiles while it adds up the current one. The block sizes also decide in which order the forward
    # adds, so two processes that choose differently may differ in the last bit.
    FORWARD_CONFIGS = [
        triton.Config({"BLOCK_N": n, "BLOCK_D": d, "STAGES": stages}, num_warps=warps)
        for n, d, warps in ((32, 64, 4), (16, 128, 4), (16, 256, 4), (8, 512, 4))
        for stages in (1, 4)
    ]
    BACKWARD_CONFIGS = [
        triton.Config({"BLOCK_N": n, "BLOCK_D": d}, num_warps=4)
        for n, d in ((16, 256), (8, 512), (8, 256), (4, 256))
    ]
    # The interpreter has no speed to compare, so there it takes the first configuration.
    CONFIGS_TO_TRY = slice(1) if triton.knobs.runtime.interpret else slice(None)

    # N and M change with each batch; without do_not_specialize, some values would compile the kernel anew.
    @triton.autotune(FORWARD_CONFIGS[CONFIGS_TO_TRY], key=["D"])
    @triton.jit(do_not_specialize=["N", "M"])
    def pool_forward(
        features,  # (N, D), float32, float16 or bfloat16
        weights,  # (M,) float32
        frame_start,  # (R,) int64
        weight_start,  # (R + 1,) int64
        out,  # (R, D), dtype of features; written
        area,  # (R,) float32; written: the sum of each region's weights, which the backward needs
        N,  # rows of features
        M,  # length of weights
        D,  # columns of features
        BLOCK_N: tl.constexpr,  # rows of a tile
        BLOCK_D: tl.constexpr,  # columns of a tile
        STAGES: tl.constexpr,  # tiles that are fetched at a time
    ):
        """out[r, d] = sum_i weights[ws + i] * features[fs + i, d] / area[r]; area[r] = sum_i weights[ws + i]

        Grid: R * ceil(D / BLOCK_D) programs. Each computes BLOCK_D columns of one region in a loop over the
        region's cells, so nothing has to be added up across programs. The programs of one region are
        neighbours: they run at about the same time, and together they read whole rows.
        """
        column_blocks = tl.cdiv(D, BLOCK_D)
        r = tl.program_id(0) // column_blocks
        column = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        # These are int64, and so are all offsets that follow: features may have more than 2**31 elements.
        start = tl.load(frame_start + r)
        begin = tl.load(weight_start + r)
        end = tl.load(weight_start + r + 1)
        valid = (begin >= 0) & (begin <= end) & (end <= M)

        # One sum for each row of a tile; the rows are added up once, after the loop.
        total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        weight_total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for i in tl.range(0, tl.where(valid, end - begin, 0), BLOCK_N, num_stages=STAGES):
            cell = i + tl.arange(0, BLOCK_N)
            weight = tl.load(weights + begin + cell, mask=begin + cell < end, other=0.0)
            inside = weight > 0
            row = start + cell
            # A kernel cannot raise, and the host cannot look at the indices without waiting for the GPU. A
            # row outside of features is therefore not read but counted as NaN, and training stops at a loss
            # that is not finite.
            readable = inside & (row >= 0) & (row < N)
            # What a mask rules out is not fetched from memory at all.
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
        tl.store(area + r, weight_sum)  # all programs of a region write the same number

    @triton.autotune(BACKWARD_CONFIGS[CONFIGS_TO_TRY], key=["D"])
    @triton.jit(do_not_specialize=["N"])
    def pool_backward(
        grad,  # (R, D), dtype of features: the gradient of out
        weights,  # (M,) float32
        frame_start,  # (R,) int64
        weight_start,  # (R + 1,) int64
        area,  # (R,) float32, from pool_forward
        order,  # (R,) int64: the regions, sorted by frame_start
        first,  # (N,) int32: position in order of the first region that may cover row n
        last,  # (N,) int32: position behind the last one
        grad_features,  # (N, D), dtype of features; written
        N,  # rows of features
        D,  # columns of features
        BLOCK_N: tl.constexpr,  # rows of a tile
        BLOCK_D: tl.constexpr,  # columns of a tile
    ):
        """grad_features[n, d] = sum_r weights[ws + n - fs] / area[r] * grad[r, d], over the r that cover n

        Grid: ceil(N / BLOCK_N) programs. Each computes BLOCK_N rows, and adds up what their regions
        contribute. If instead each region added to its rows, regions with shared rows would need atomic
        additions, whose order, and with it the rounding, changes from run to run. Here the order is that of
        the regions, whatever the block sizes.
        """
        n = tl.program_id(0).to(tl.int64) * BLOCK_N
        row = n + tl.arange(0, BLOCK_N)
        first_region = tl.load(first + n)
        last_region = tl.load(last + tl.minimum(n + BLOCK_N, N) - 1)
        for d in range(0, D, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for k in range(first_region, last_region):
                r = tl.load(order + k)
                region_area = tl.load(area + r)  # 0 where a region has no weight, or an invalid weight_start
                begin = tl.load(weight_start + r)
                end = tl.where(region_area > 0, tl.load(weight_start + r + 1), begin)
                cell = row - tl.load(frame_start + r)
                weight = tl.load(weights + begin + cell, mask=(cell >= 0) & (begin + cell < end), other=0.0)
                share = weight / tl.where(region_area > 0, region_area, 1.0)
                g = tl.load(grad + r * D + column, mask=column < D, other=0.0).to(tl.float32)
                # Chosen by tl.where, because an infinite gradient times a weight of 0 would be NaN.
                total += tl.where((weight > 0)[:, None], share[:, None] * g[None, :], 0.0)
            tl.store(
                grad_features + row[:, None] * D + column[None, :],
                total.to(grad_features.dtype.element_ty),
                mask=(row < N)[:, None] & (column < D)[None, :],
            )


def regions_over_rows(frame_start, weight_start, N):
    """Returns order int64 (R,), first int32 (N,) and last int32 (N,), which pool_backward describes.

    A region covers an interval of rows. Once the regions are sorted by their first row, those that begin at
    or before row n are order[:last[n]]. Of these, the ones in front of order[first[n]] all end at or before
    row n. Regions that share a frame have the same first row, so they stand side by side in order.
    """
    start, order = frame_start.sort(stable=True)
    furthest_end = (start + weight_start.diff()[order]).cummax(0).values  # of the regions up to each position
    rows = torch.arange(N, device=frame_start.device)
    last = torch.searchsorted(start, rows, right=True, out_int32=True)
    first = torch.searchsorted(furthest_end, rows, right=True, out_int32=True)
    return order, first, last


class FusedMaskedAveragePool(torch.autograd.Function):
    """The two kernels as one differentiable function, with the arguments of masked_average_pool."""

    @staticmethod
    def forward(ctx, features, weights, frame_start, weight_start):
        (N, D), R = features.shape, len(frame_start)
        out = torch.empty(R, D, dtype=features.dtype, device=features.device)
        area = torch.empty(R, dtype=torch.float32, device=features.device)
        if out.numel():
            # Triton launches on the current GPU, which need not be the one that holds the tensors.
            with torch.cuda.device_of(features):
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
        grad = grad.contiguous()  # the gradient of a sum, for one, is a single number with strides of 0
        grad_features = torch.empty(N, D, dtype=grad.dtype, device=grad.device)
        order, first, last = regions_over_rows(frame_start, weight_start, N)
        # Autograd already runs this on the GPU of grad, so no device has to be chosen.
        pool_backward[lambda config: (triton.cdiv(N, config["BLOCK_N"]),)](
            grad, weights, frame_start, weight_start, area, order, first, last, grad_features, N, D
        )
        return grad_features, None, None, None


# ---- A first reading may end here. Below stand checks of arguments, the choice between the two versions, and
# the program that compares them. ----


def check_arguments(features, weights, frame_start, weight_start):
    """Raises AssertionError, with what was expected and found, for anything that cannot be pooled."""
    for name, tensor, ndim in (
        ("features", features, 2),
        ("weights", weights, 1),
        ("frame_start", frame_start, 1),
        ("weight_start", weight_start, 1),
    ):
        assert tensor.ndim == ndim, f"{name}: expected {ndim} dimensions, found shape {tuple(tensor.shape)}"
        assert tensor.device == features.device, f"{name}: expected {features.device}, found {tensor.device}"
        assert tensor.is_contiguous(), f"{name}: expected contiguous memory, found strides {tensor.stride()}"
    floats = (torch.float32, torch.float16, torch.bfloat16)
    assert features.dtype in floats, f"features: expected one of {floats}, found {features.dtype}"
    assert weights.dtype == torch.float32, f"weights: expected torch.float32, found {weights.dtype}"
    assert not weights.requires_grad, "weights: expected requires_grad False, found True"
    for name, tensor in (("frame_start", frame_start), ("weight_start", weight_start)):
        assert tensor.dtype == torch.int64, f"{name}: expected torch.int64, found {tensor.dtype}"
    R = len(frame_start)
    assert len(weight_start) == R + 1, f"weight_start: expected {R + 1} entries, found {len(weight_start)}"


def choose_implementation(features):
    """Returns "triton" or "reference", as NANOREFER_POOL says or, for "auto", as the device of features does.

    Raises ValueError for any other value of NANOREFER_POOL, and RuntimeError where Triton is asked for but
    cannot run.
    """
    choice = os.environ.get("NANOREFER_POOL", "auto")
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"expected NANOREFER_POOL to be auto, triton or reference, found {choice!r}")
    if choice == "auto":
        if features.is_cuda and triton is None:
            message = "Triton cannot be imported: pooling runs as plain torch, which is slower"
            warnings.warn(message, stacklevel=3)
        return "triton" if features.is_cuda and triton is not None else "reference"
    can_run = triton is not None and (features.is_cuda or triton.knobs.runtime.interpret)
    if choice == "triton" and not can_run:
        found = "no Triton" if triton is None else features.device
        raise RuntimeError(f"NANOREFER_POOL=triton: expected Triton and a CUDA device, found {found}")
    return choice


def check(device):
    """Asserts that kernels and reference agree on shared, overlapping, short and empty regions."""
    torch.manual_seed(0)
    length = torch.tensor([91, 1, 0, 91, 40, 64], device=device)
    frame_start = torch.tensor([1, 0, 5, 1, 80, 92], device=device)
    weight_start = torch.cat([length.new_zeros(1), length.cumsum(0)])
    weights = (torch.rand(int(length.sum()), device=device) - 0.3).clamp(min=0)
    weights[-64:] = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        for D in (1, 63, 200):
            features = torch.randn(160, D, device=device, dtype=dtype, requires_grad=True)
            grad = torch.randn(6, D, device=device, dtype=dtype)
            results = []
            for pool in (FusedMaskedAveragePool.apply, masked_average_pool_reference):
                out = pool(features, weights, frame_start, weight_start)
                results.append((out.detach(), *torch.autograd.grad(out, features, grad)))
            for name, found, expected in zip(("output", "gradient"), *results):
                error = float((found.float() - expected.float()).abs().max())
                assert error < tolerance, f"{name}, {dtype}, D {D}: error {error}, expected < {tolerance}"
    place = "on the GPU" if device == "cuda" else "in Triton's interpreter"
    print(f"Kernels and reference agree {place}: output and gradient, 3 dtypes, D of 1, 63 and 200.")


def main():
    if triton is None:
        print("Triton cannot be imported, so there are no kernels to check.")
    else:
        check("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
