"""The pooling kernels, and their definition in plain torch, against float64 loops over regions and cells.

On a GPU they run there, elsewhere on the CPU in Triton's interpreter, which is slow: hence the small shapes.
"""

import importlib
import re
import sys

import numpy as np
import pytest
import torch
from helpers import run

import kernels

triton = pytest.importorskip("triton", reason="Triton is not installed here, so there are no kernels to test")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# float32 differs by the order of its sums; the others by the one rounding at the end, half a unit in the last
# place, and no more. (The interpreter cuts bfloat16 off instead of rounding it: a whole unit.)
RELATIVE = {torch.float32: 1e-5, torch.float16: 0.55 * 2**-10}
RELATIVE[torch.bfloat16] = (0.55 if GPU else 1.05) * 2**-7
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy computes what tl.where leaves out
POOLS = {"triton": kernels.FusedMaskedAveragePool.apply, "reference": kernels.masked_average_pool_reference}
both = pytest.mark.parametrize("choice", POOLS)


def truth(features, weights, frame_start, weight_start, grad):
    """float64 (R, D), and its gradient for features (N, D)."""
    x, w, g = (tensor.cpu().double().numpy() for tensor in (features, weights, grad))
    first, begin = frame_start.tolist(), weight_start.tolist()
    out, gradient = np.zeros(g.shape), np.zeros(x.shape)
    for r in range(len(first)):
        own = w[begin[r] : begin[r + 1]]
        for i in np.flatnonzero(own):
            out[r] += own[i] / own.sum() * x[first[r] + i]
            gradient[first[r] + i] += own[i] / own.sum() * g[r]
    return torch.from_numpy(out), torch.from_numpy(gradient)


def pool(choice, features, weights, frame_start, weight_start, grad=None):
    """Returns the output of POOLS[choice] and its gradient for features."""
    features = features.detach().requires_grad_()
    out = POOLS[choice](features, weights, frame_start, weight_start)
    grad = out.new_ones(1).expand_as(out) if grad is None else grad  # as out.sum() gives it
    (gradient,) = torch.autograd.grad(out, features, grad)
    assert out.dtype == gradient.dtype == features.dtype
    return out.detach(), gradient


def regions_of(starts, lengths, weights):
    """The arguments of the pool that come after features."""
    return (
        torch.tensor(np.asarray(weights), dtype=torch.float32, device=DEVICE),
        torch.tensor(starts, dtype=torch.int64, device=DEVICE),
        torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int64, device=DEVICE),
    )


def draw(N, D, starts, lengths, dtype=torch.float32):
    """Features, regions of large and tiny weights (the second has none at all), and a gradient."""
    rng = np.random.default_rng(0)
    features, grad = (torch.from_numpy(rng.normal(size=(n, D))) for n in (N, len(starts)))
    weights = [rng.random(n) * (rng.random(n) < 0.7) * (1, 0, 1e-30)[r % 3] for r, n in enumerate(lengths)]
    read = np.zeros(N, bool)
    for start, own in zip(starts, weights):
        read[start : start + len(own)] |= own > 0
    features[~read] = torch.nan  # what lies in cells without weight does no harm
    features[~read, ::2] = torch.inf
    grad[:1, :1] = torch.inf  # and this stays with the cells of region 0
    regions = regions_of(starts, lengths, np.concatenate([*weights, []]))
    return features.to(DEVICE, dtype), regions, grad.to(DEVICE, dtype)


def assert_close(found, expected, dtype=torch.float32):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=RELATIVE[dtype], atol=1e-6)


# N, D, the regions' first rows, and their lengths. A tile has 16 rows and 128 columns.
RANDOM = np.random.default_rng(3).integers(0, 100, size=12)
CASES = {
    "one cell": (1, 1, [0], [1]),
    "several tiles, none of them full": (60, 300, [0, 3, 20], [50, 47, 40]),
    "full tiles": (64, 256, [0, 32, 0], [32, 32, 64]),
    "frames that are shared, in no order, and one that no region is on": (51, 7, [33, 13, 33], [18, 20, 18]),
    "the earlier in the list, the later in features": (41, 20, [30, 20, 10, 0], [10, 15, 25, 8]),
    "long ones, and short ones that end before them": (99, 5, [0, 9, 5, 40, 3, 0], [90, 2, 2, 30, 50, 3]),
    "one beginning, one of no cells": (41, 20, [7, 7, 7, 7], [1, 3, 30, 0]),
    "the first row, the last row": (41, 20, [0, 9, 40, 0], [1, 1, 1, 41]),
    "overlaps of all kinds": (100, 17, RANDOM, RANDOM[::-1] % (101 - RANDOM)),
    "many on few rows": (33, 5, RANDOM.repeat(3) % 30, RANDOM.repeat(3) % 4),
    "no regions": (5, 3, [], []),
    "no rows": (0, 3, [0, 0], [0, 0]),
    "no columns": (5, 0, [0], [5]),
}


@both
@pytest.mark.parametrize("dtype", RELATIVE)
def test_averages_and_gradients(dtype, choice):
    for name, case in CASES.items():
        print(name)  # which pytest shows if it fails
        features, regions, grad = draw(*case, dtype)
        assert_close(pool(choice, features, *regions, grad), truth(features, *regions, grad), dtype)


def test_the_kernels_write_every_element_and_no_other(monkeypatch):
    """Memory that they are given holds NaN, and so does what lies around it."""
    features, regions, grad = draw(70, 65, [3, 40, 3, 0], [30, 9, 30, 2])
    expected, margin, buffers = truth(features, *regions, grad), 100, []

    def poisoned(*shape, **options):
        buffers.append(torch.full((np.prod(shape) + 2 * margin,), torch.nan, **options))
        return buffers[-1][margin:-margin].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert_close(pool("triton", features, *regions, grad), expected)
    assert len(buffers) == 3  # out, area, and the gradient
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()


def test_kernels_give_nan_where_starts_lie_outside():
    """They cannot raise. The other region's average, and all gradients, are counted by hand."""
    weights, frame_start, _ = regions_of([0, 97, -3, 0, 2], [4] * 5, np.ones(20))
    # Region 3 would end past weights, and region 4 before it begins.
    weight_start = torch.tensor([0, 4, 8, 12, 99, 20], device=DEVICE)
    features, expected = torch.ones(100, 3, device=DEVICE), torch.zeros(100, 3, dtype=torch.float64)
    out, gradient = pool("triton", features, weights, frame_start, weight_start)
    assert out.isnan().all(1).tolist() == [False, True, True, True, True] and (out[0] == 1).all()
    expected[:4] = expected[97:] = 0.25  # of region 0, and of what lies inside of region 1 ...
    expected[0] += 0.25  # ... and of region 2
    assert_close([gradient], [expected])


def test_the_reference_raises_where_starts_lie_outside():
    """A negative row would count from the end of features, as an index in Python does."""
    features, weights = torch.zeros(100, 3), torch.ones(4)  # a GPU would end all work of this process
    for frame_start, weight_start in (
        *(([-3], [0, 4]), ([97], [0, 4]), ([0], [0, 9])),
        *(([0, 0], [0, 5, 4]), ([1], [1, 5]), ([1], [-1, 3])),
    ):
        with pytest.raises((IndexError, RuntimeError, AssertionError)):
            pool("reference", features, weights, torch.tensor(frame_start), torch.tensor(weight_start))


def test_wrong_arguments_are_refused():
    """Each with what the message must show."""
    with torch.device(DEVICE):
        right = {"features": torch.zeros(8, 4), "weights": torch.ones(8)}
        right |= {"frame_start": torch.tensor([0, 4]), "weight_start": torch.tensor([0, 4, 8])}
        table = [
            ("features", torch.zeros(4, 8).T, "(1, 8)"),
            ("weights", torch.ones(16)[::2], "(2,)"),
            ("weights", torch.ones(8).half(), "float16"),
            ("weights", torch.ones(8, requires_grad=True), "True"),
            ("weights", torch.ones(8, device="meta"), "meta"),
            ("frame_start", torch.zeros(2).int(), "int32"),
            ("weight_start", torch.tensor([0, 4, 8]).int(), "int32"),
            ("weight_start", torch.tensor([0, 8]), "frame_start"),
            ("weight_start", torch.tensor([0, 4, 8, 8]), "frame_start"),
        ]
    for name, wrong, found in table:
        with pytest.raises(AssertionError) as error:
            kernels.masked_average_pool(**right | {name: wrong})
        assert found in str(error.value), (name, found, str(error.value))


class OnGPU(torch.Tensor):
    is_cuda = True  # wherever it is


def which(module, features):
    """The pool that is taken: kernels give NaN where a region leaves features, the reference raises."""
    regions = [tensor.to(features.device) for tensor in regions_of([3], [4], np.ones(4))]
    try:
        out = module.masked_average_pool(features, *regions)
    except IndexError:
        return "reference"
    return "triton" if torch.Tensor.isnan(out).all() else "neither"


def test_which_pool_is_taken(monkeypatch):
    features = torch.zeros(4, 2)
    assert which(kernels, features) == "reference"
    # A tensor on a GPU goes to the kernels; but without Triton there is the reference alone.
    on_gpu = features.to(DEVICE).as_subclass(OnGPU)
    assert which(kernels, on_gpu) == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "kernels")
    assert GPU or which(importlib.import_module("kernels"), on_gpu) == "reference"


COMPILE = """
import sys
for name in [*sys.modules]:  # which were imported for the interpreter
    if name.split(".")[0] in ("triton", "kernels") and not name.startswith("triton._C"):
        del sys.modules[name]
import kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TYPES = dict.fromkeys(("frame_start", "weight_start", "order"), "*i64")
TYPES |= dict(first="*i32", last="*i32", N="i32", M="i32", D="i32", weights="*fp32", area="*fp32")
for dtype, constants in (("bf16", {}), ("fp32", {"D": 1})):  # Triton makes a 1 a constant
    types = TYPES | dict.fromkeys(("features", "out", "grad", "grad_features"), "*" + dtype)
    constants = constants | kernels.BLOCKS
    for kernel in (kernels.pool_forward, kernels.pool_backward):
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32))
        assert "ld.global" in compiled.asm["ptx"]
        print(compiled.asm["ttir"] + compiled.asm["ptx"] if dtype == "bf16" else "")
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter forgives what the compiler refuses, such as a variable that changes its type in a loop.
    No GPU is needed. What comes out shows two things more."""
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    text = run(str(script), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    # Where a row of a bfloat16 array begins is counted in 64 bits: there may be more than 2**31 elements.
    row_start = r"addptr .*: (?:tensor<\d+x1x)?!tt\.ptr<bf16>>?, (?:tensor<\d+x1x)?(i\d+)"
    assert set(re.findall(row_start, text)) == {"i64"}
    # Nothing is added up in an order that may change from run to run.
    assert not re.search(r"\batom|\bred\.", text)
