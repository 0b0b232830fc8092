"""Masked average pooling: one vector for each region, the average of its frame's cells weighted by the mask's coverage.

    out[r] = sum_i weights[ws[r] + i] * features[fs[r] + i] / sum_i weights[ws[r] + i]        ws = weight_start, fs = frame_start

`features` holds the cells of all frames of a batch one after another, `weights` the coverage grids of all regions, so frames may
differ in size and nothing is padded. `masked_average_pool` is what model.py calls; it checks its arguments. The plain torch
version below is the definition. The fused Triton kernel is not here yet: it will take its place behind the same function.
"""

import torch


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


def masked_average_pool(features, weights, frame_start, weight_start):
    """Average of each region's cells, weighted by coverage -> (R, D), in the dtype of features.

    features: float32, float16 or bfloat16 (N, D), the cells of all frames, one frame after another.
    weights: float32 (M,), >= 0, the coverage grids of all regions, one after another.
    frame_start: int64 (R,), the row of features where the frame of region r begins.
    weight_start: int64 (R + 1,), where region r's grid begins in weights; its last entry is M.
    A region with no weight gives zeros and no gradient. Raises ValueError for any other shape or dtype.
    """
    R, M, (N, D) = len(frame_start), len(weights), features.shape
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weights.dtype != torch.float32:
        raise ValueError(f"expected float features and float32 weights, found {features.dtype} and {weights.dtype}")
    if frame_start.dtype != torch.long or weight_start.dtype != torch.long or weight_start.shape != (R + 1,):
        raise ValueError(
            f"expected int64 frame_start (R,) and weight_start (R + 1,), found {frame_start.dtype} {tuple(frame_start.shape)} "
            f"and {weight_start.dtype} {tuple(weight_start.shape)}"
        )
    return masked_average_pool_reference(features, weights, frame_start, weight_start)
