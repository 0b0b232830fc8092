"""The pooling kernels against a float64 closed form in plain loops. Without a GPU they run in Triton's
interpreter."""

import os
import re
import subprocess
import sys

import bench_kernels
import numpy as np
import pytest
import torch

import kernels
from kernels import FusedMaskedAveragePool, masked_average_pool, masked_average_pool_reference

triton = pytest.importorskip("triton", reason="Triton is not installed here, so there are no kernels to test")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
interpreted = pytest.mark.skipif(GPU, reason="looks inside the interpreter, which only runs without a GPU")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# float32 differs by the order of the sum; the others by the one rounding at the end, half a unit in the last
# place, and no more. (The interpreter cuts bfloat16 off instead of rounding it: a whole unit.)
RELATIVE = {
    torch.float32: 1e-5,
    torch.float16: 0.55 * 2**-10,
    torch.bfloat16: (0.55 if GPU else 1.05) * 2**-7,
}


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("NANOREFER_POOL", "triton")


def use_blocks(monkeypatch, cells, columns, stages=1):
    forward = triton.Config({"BLOCK_N": cells, "BLOCK_D": columns, "STAGES": stages}, num_warps=4)
    monkeypatch.setattr(kernels.pool_forward, "configs", [forward])
    monkeypatch.setattr(
        kernels.pool_backward, "configs", [triton.Config({"BLOCK_N": cells, "BLOCK_D": columns}, num_warps=4)]
    )


def closed_form(features, weights, frame_start, weight_start, grad):
    """float64 (R, D) and its gradient for features (N, D), from the formula, one cell at a time."""
    x, g = features.detach().cpu().double().numpy(), grad.cpu().double().numpy()
    w, fs, ws = (
        t.cpu().numpy().astype(kind)
        for t, kind in ((weights, float), (frame_start, int), (weight_start, int))
    )
    out, gradient = np.zeros(g.shape), np.zeros(x.shape)
    for r in range(len(fs)):
        cells = [(fs[r] + i, w[ws[r] + i]) for i in range(ws[r + 1] - ws[r]) if w[ws[r] + i] > 0]
        area = sum(weight for _, weight in cells)
        for n, weight in cells:
            out[r] += weight / area * x[n]
            gradient[n] += weight / area * g[r]
    return torch.from_numpy(out), torch.from_numpy(gradient)


def tensors(starts, lengths, weights):
    return (
        torch.tensor(np.asarray(weights), dtype=torch.float32, device=DEVICE),
        torch.tensor(starts, dtype=torch.int64, device=DEVICE),
        torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int64, device=DEVICE),
    )


def run(features, region_tensors, grad):
    features = features.detach().requires_grad_()
    out = masked_average_pool(features, *region_tensors)
    (gradient,) = torch.autograd.grad(out, features, grad)
    assert out.dtype == gradient.dtype == features.dtype
    return out.detach(), gradient


def compare(features, region_tensors, seed=0):
    torch.manual_seed(seed)
    grad = torch.randn(len(region_tensors[1]), features.shape[1]).to(DEVICE, features.dtype)
    for found, wanted in zip(
        run(features, region_tensors, grad), closed_form(features, *region_tensors, grad)
    ):
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=RELATIVE[features.dtype], atol=1e-6)


def cells_of(N, D, dtype=torch.float32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(N, D))).to(DEVICE, dtype)


@pytest.mark.parametrize("D", [1, 63, 64, 1152, 3584] if GPU else [1, 63, 64, 200])
@pytest.mark.parametrize("grid", [(1, 1), (7, 13), (27, 27)])
def test_odd_shapes(grid, D, monkeypatch):
    if not GPU:
        use_blocks(monkeypatch, 64, 64)  # the interpreter's time goes by the number of blocks
    cells = grid[0] * grid[1]
    weights = np.random.default_rng(1).random(3 * cells).astype(np.float32)
    weights[cells : 2 * cells] *= np.arange(cells) == cells - 1  # one cell, the last
    compare(cells_of(2 * cells, D), tensors([0, cells, cells], [cells] * 3, weights))


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_ragged_batches(seed, dtype, choice, monkeypatch):
    """Frames of different sizes, in no order, shared, empty, and with frames that no region names. What is
    not finite in cells of weight 0 stays out, and sums are made in float32: in the reference too."""
    monkeypatch.setenv("NANOREFER_POOL", choice)
    rng = np.random.default_rng(seed)
    frames = rng.integers(1, 60, size=6)
    first = np.cumsum(frames) - frames
    chosen = rng.integers(1, 6, size=9)  # never frame 0: its gradient is zero
    weights = [
        rng.random(frames[f]) * (rng.random(frames[f]) < rng.random()) * (r != 4)
        for r, f in enumerate(chosen)
    ]
    features = cells_of(frames.sum(), 37, dtype, seed)
    read = np.zeros(frames.sum(), bool)
    for f, w in zip(chosen, weights):
        read[first[f] : first[f] + frames[f]] |= w > 0
    features[torch.from_numpy(~read)] = torch.tensor(
        [torch.nan, torch.inf, -torch.inf] * 13, dtype=dtype, device=DEVICE
    )[:37]
    regions = tensors(first[chosen], frames[chosen], np.concatenate(weights))
    out, gradient = run(features, regions, torch.ones(9, 37, dtype=dtype, device=DEVICE))
    assert out.isfinite().all() and (out[4] == 0).all() and (gradient[: frames[0]] == 0).all()
    compare(features, regions)


@pytest.mark.parametrize(
    "starts, lengths",
    [
        (
            [0, 5, 10, 3, 12, 0],
            [40, 2, 2, 9, 1, 3],
        ),  # a long one first: the short ones after it end before it does
        ([30, 20, 10, 0], [10, 15, 25, 8]),  # the later, the earlier in features
        ([7, 7, 7, 7], [1, 30, 4, 0]),  # one beginning, one of them of no cells
        ([0, 39, 0, 39], [1, 1, 40, 1]),  # first row, last row
    ],
)
@pytest.mark.parametrize("blocks", [(4, 16), (16, 64)])
def test_any_overlap(starts, lengths, blocks, monkeypatch):
    use_blocks(monkeypatch, *blocks)
    compare(cells_of(41, 20), tensors(starts, lengths, np.random.default_rng(0).random(sum(lengths)) + 0.1))


def test_random_overlaps(monkeypatch):
    use_blocks(monkeypatch, 8, 32)
    rng = np.random.default_rng(3)
    for seed in range(4):
        starts = rng.integers(0, 50, size=12)
        lengths = rng.integers(0, 51 - starts)
        weights = rng.random(lengths.sum()) * (rng.random(lengths.sum()) < 0.7)
        compare(cells_of(50, 17, seed=seed), tensors(starts, lengths, weights), seed)


def test_many_small_regions():
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 30, size=35), rng.integers(0, 4, size=35)
    compare(cells_of(33, 5), tensors(starts, lengths, rng.random(lengths.sum())))


@pytest.mark.parametrize("which", range(8))
def test_every_choice_of_blocks(which, monkeypatch):
    """What the tuner may choose from: each config gives the right result, and those of the backward the same
    one to the bit."""
    regions = tensors([0, 3, 40], [80, 77, 30], np.random.default_rng(0).random(187))
    features, grad = cells_of(90, 600), cells_of(3, 600, seed=1)
    monkeypatch.setattr(kernels.pool_forward, "configs", [kernels.FORWARD_CONFIGS[which]])
    gradients = []
    for config in (
        kernels.BACKWARD_CONFIGS[0],
        kernels.BACKWARD_CONFIGS[which % len(kernels.BACKWARD_CONFIGS)],
    ):
        monkeypatch.setattr(kernels.pool_backward, "configs", [config])
        gradients.append(run(features, regions, grad)[1])
    compare(features, regions)
    assert torch.equal(*gradients)
    assert len(kernels.FORWARD_CONFIGS) == 8  # the parametrization above


@on_gpu  # the interpreter runs one program after another, always in the same order
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype):
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 20, size=40)
    regions = tensors(starts, [70] * 40, rng.random(40 * 70))
    features, grad = cells_of(90, 33, dtype), cells_of(40, 33, dtype, seed=1)
    first, second = run(features, regions, grad), run(features, regions, grad)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_gradient_is_the_adjoint():
    """<g, pool(d)> = <gradient(g), d>: the pool is linear in features. No formula of the gradient is used."""
    regions = tensors([0, 10, 4], [30, 20, 26], np.random.default_rng(0).random(76))
    d, grad = cells_of(35, 21), cells_of(3, 21, seed=1)
    out, gradient = run(d, regions, grad)
    assert float((out.double() * grad).sum()) == pytest.approx(float((gradient.double() * d).sum()), abs=1e-5)


def test_every_element_is_written(monkeypatch):
    """Memory that the kernels are given holds NaN, or a huge index, wherever they leave it as it was."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        memory = empty(*args, **kwargs)
        return memory.fill_(torch.nan if memory.is_floating_point() else torch.iinfo(memory.dtype).max)

    regions = tensors([3, 40, 3, 0], [30, 9, 30, 2], np.random.default_rng(0).random(71))
    features, grad = cells_of(70, 65), cells_of(4, 65, seed=1)
    wanted = closed_form(features, *regions, grad)
    monkeypatch.setattr(torch, "empty", poisoned)
    found = run(features, regions, grad)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in multiply"
)  # numpy computes what tl.where then leaves out
def test_an_infinite_gradient_stays_with_its_cells():
    regions = tensors([0, 0], [6, 6], [1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
    grad = torch.ones(2, 3, device=DEVICE)
    grad[0] = torch.inf
    gradient = run(cells_of(8, 3), regions, grad)[1]
    assert gradient.isinf().all(1).tolist() == [True, True, False, False, True, False, False, False]
    assert torch.equal(gradient[2], torch.ones(3, device=DEVICE)) and (gradient[[3, 5, 6, 7]] == 0).all()


def test_gradient_of_a_sum():
    """out.sum() hands back one number with strides of 0."""
    features = cells_of(10, 4).requires_grad_()
    masked_average_pool(features, *tensors([0], [10], np.ones(10))).sum().backward()
    torch.testing.assert_close(features.grad, torch.full((10, 4), 0.1, device=DEVICE))


@pytest.mark.parametrize(
    "N, D, lengths", [(5, 3, []), (0, 3, []), (0, 3, [0, 0]), (5, 0, [5]), (5, 3, [0]), (5, 3, [0, 5, 0])]
)
@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_nothing_to_do(N, D, lengths, choice, monkeypatch):
    monkeypatch.setenv("NANOREFER_POOL", choice)
    regions = tensors([0] * len(lengths), lengths, np.zeros(sum(lengths)))
    grad = torch.ones(len(lengths), D, device=DEVICE)
    out, gradient = run(cells_of(N, D), regions, grad)
    assert out.shape == grad.shape and gradient.shape == (N, D) and not out.any() and not gradient.any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale_of_the_weights(scale):
    compare(cells_of(20, 8), tensors([0, 4], [20, 9], scale * (np.random.default_rng(0).random(29) + 0.1)))


def test_starts_that_lie_outside_give_nan():
    """A kernel cannot raise: it does not read there, the region becomes NaN, and other regions and all
    gradients stay right."""
    weights, frame_start, _ = tensors([0, 98, -3, 0, 2], [4, 4, 4, 4, 4], np.ones(20))
    weight_start = torch.tensor(
        [0, 4, 8, 12, 99, 20], device=DEVICE
    )  # region 3 would end past weights, region 4 before it begins
    features, grad = cells_of(100, 3), torch.ones(5, 3, device=DEVICE)
    out, gradient = run(features, (weights, frame_start, weight_start), grad)
    assert out.isnan().all(1).tolist() == [False, True, True, True, True]
    assert gradient.isfinite().all() and not gradient[4:98].any()  # regions 3 and 4 give no gradient
    weights[4 + 2 : 12] = 0  # what leaves the frame has no weight now: nothing outside is read
    weights[8 + 3] = 1
    assert run(features, (weights, frame_start, weight_start), grad)[0][:3].isfinite().all()


@pytest.mark.parametrize(
    "frame_start, weight_start",
    [([-3], [0, 4]), ([97], [0, 4]), ([0], [0, 9]), ([0, 0], [0, 5, 4]), ([1], [1, 5]), ([1], [-1, 3])],
)
def test_the_reference_raises_where_starts_lie_outside(frame_start, weight_start):
    """A negative row once counted from the end of features, as an index in Python does. Where weight_start
    begins at another number than 0, the average was one of other cells."""
    indices = [torch.tensor(x, device="cpu") for x in (frame_start, weight_start)]
    with pytest.raises((IndexError, RuntimeError, AssertionError)):
        masked_average_pool_reference(torch.zeros(100, 3), torch.ones(4), *indices)


@interpreted
def test_only_weighted_rows_are_read(monkeypatch):
    """Watches the interpreter's loads: each row of weight > 0 is read once for its region, other rows
    never."""
    from triton.runtime.interpreter import InterpreterBuilder

    features = cells_of(60, 40)
    weights = np.random.default_rng(0).random(60) * (np.arange(60) % 3 == 1)
    regions = tensors([0, 30], [30, 30], weights)
    loads, load = [], InterpreterBuilder.create_masked_load

    def watched(self, ptrs, mask, *rest):
        loads.append(ptrs.data[mask.data])
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    with torch.no_grad():
        masked_average_pool(features, *regions)
    index = (np.concatenate(loads).astype(np.int64) - features.data_ptr()) // 4
    rows, counts = np.unique(index[(index >= 0) & (index < features.numel())] // 40, return_counts=True)
    assert rows.tolist() == np.flatnonzero(weights).tolist() and set(counts) == {40}


def big_regions(D):
    """The frame of the only regions begins past 2**31 elements."""
    N = 2**31 // D + 40
    return N, tensors([N - 30, N - 1], [30, 1], np.linspace(0.1, 1, 31))


@interpreted
def test_offsets_of_64_bits_forward(monkeypatch):
    """4 GB of features of which only the last rows are ever touched, so that they need no memory."""
    from triton.runtime.interpreter import GridExecutor

    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 8e9:
        pytest.skip("needs a machine with 8 GB of memory")
    N, regions = big_regions(1024)
    features = torch.empty(N, 1024, dtype=torch.float16)
    features[-30:] = cells_of(30, 1024, torch.float16)
    monkeypatch.setattr(
        GridExecutor, "_restore_args_dev", lambda *_: None
    )  # would copy all arguments onto themselves
    use_blocks(monkeypatch, 16, 512)
    with torch.no_grad():
        out = masked_average_pool(features, *regions)
    small = features[-30:].clone()
    wanted, _ = closed_form(small, regions[0], regions[1] - (N - 30), regions[2], torch.zeros(2, 1024))
    torch.testing.assert_close(out.double(), wanted, rtol=RELATIVE[torch.float16], atol=1e-6)


@on_gpu
def test_offsets_of_64_bits_on_the_gpu():
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of GPU memory")
    N, regions = big_regions(4096)
    features = torch.randn(N, 4096, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(2, 4096, device="cuda", dtype=torch.bfloat16)
    out, gradient = run(features, regions, grad)
    wanted, wanted_gradient = closed_form(features[-30:], regions[0], regions[1] - (N - 30), regions[2], grad)
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=RELATIVE[torch.bfloat16], atol=1e-6)
    torch.testing.assert_close(
        gradient[-30:].cpu().double(), wanted_gradient, rtol=RELATIVE[torch.bfloat16], atol=1e-6
    )
    assert not gradient[:-30].any()


COMPILE = """
import re

import kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TYPES = dict.fromkeys(("frame_start", "weight_start", "order"), "*i64")
TYPES |= dict(first="*i32", last="*i32", N="i32", M="i32", D="i32", weights="*fp32", area="*fp32")
for dtype, one_column in (("bf16", {}), ("fp32", {"D": 1})):  # Triton makes an argument of 1 a constant
    types = TYPES | dict.fromkeys(("features", "out", "grad", "grad_features"), "*" + dtype)
    jobs = [(kernels.pool_forward.fn, config.kwargs) for config in kernels.FORWARD_CONFIGS[:2]]
    jobs += [(kernels.pool_backward.fn, config.kwargs) for config in kernels.BACKWARD_CONFIGS[:1]]
    for kernel, blocks in jobs:
        constants = blocks | one_column
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values)
        ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "ld.global" in ptx
        assert not re.search(r"\\b(atom|red)\\.", ptx), "atomics add in an order that changes from run to run"
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter forgives what the compiler refuses, such as a variable that changes its type in a loop.
    No GPU is needed. The instructions show as well that nothing is added up in an order that a GPU may
    change."""
    environment = os.environ | {
        "PYTHONPATH": os.path.dirname(kernels.__file__),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout == "compiled\n", result.stderr


# ---- arguments and the switch


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize(
    "name, wrong, found",
    [
        ("features", torch.zeros(8, 4, dtype=torch.float64), "torch.float64, .*"),
        ("features", torch.zeros(8), "torch.float32, shape .8,., .*"),
        ("features", torch.zeros(4, 8).T, "torch.float32, shape .8, 4., strides .1, 8., .*"),
        ("weights", torch.ones(8).half(), "torch.float16, .*"),
        ("weights", torch.ones(2, 4), ".*, shape .2, 4., .*"),
        ("weights", torch.ones(16)[::2], ".*, strides .2,., .*"),
        ("weights", torch.ones(8, requires_grad=True), "True"),
        ("weights", torch.ones(8, device="meta"), ".* meta"),
        ("frame_start", torch.zeros(2).int(), "torch.int32, .*"),
        ("frame_start", torch.tensor(0), "torch.int64, shape .., .*"),
        ("weight_start", torch.zeros(3).int(), "torch.int32, .*"),
        ("weight_start", torch.tensor([0, 8]), None),
        ("weight_start", torch.tensor([0.0, 4, 8]), "torch.float32, .*"),
    ],
)
def test_wrong_arguments(name, wrong, found, choice, monkeypatch):
    monkeypatch.setenv("NANOREFER_POOL", choice)
    arguments = dict(
        features=torch.zeros(8, 4),
        weights=torch.ones(8),
        frame_start=torch.tensor([0, 4]),
        weight_start=torch.tensor([0, 4, 8]),
    )
    for key, tensor in (arguments | {name: wrong}).items():
        moved = tensor
        if (
            not tensor.is_meta and DEVICE != "cpu"
        ):  # a copy to a GPU keeps the strides of a transposed tensor only
            moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
            moved = moved.zero_().requires_grad_(tensor.requires_grad)
        arguments[key] = moved
    message = f"^{name}: expected .*, found {found}$" if found else f"^{name}: expected one entry more"
    with pytest.raises(AssertionError, match=message):
        masked_average_pool(**arguments)


def test_the_switch(monkeypatch):
    """What forces either, what is taken by itself, and what is refused."""
    taken = []
    monkeypatch.setattr(FusedMaskedAveragePool, "apply", lambda *_: taken.append("triton"))
    monkeypatch.setattr(kernels, "masked_average_pool_reference", lambda *_: taken.append("reference"))
    arguments = (torch.zeros(4, 2, device=DEVICE), *tensors([0], [4], np.ones(4)))
    for choice in ("triton", "reference"):
        monkeypatch.setenv("NANOREFER_POOL", choice)
        masked_average_pool(*arguments)
    monkeypatch.delenv("NANOREFER_POOL")
    masked_average_pool(*arguments)
    assert taken == ["triton", "reference", "triton" if GPU else "reference"]
    monkeypatch.setenv("NANOREFER_POOL", "cuda")
    with pytest.raises(AssertionError, match="NANOREFER_POOL.*cuda"):
        masked_average_pool(*arguments)


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_a_gpu_without_triton_takes_the_reference(monkeypatch):
    monkeypatch.delenv("NANOREFER_POOL")
    monkeypatch.setattr(kernels, "triton", None)
    features = cells_of(4, 2).as_subclass(OnGPU)
    out = masked_average_pool(features, *tensors([0], [4], np.ones(4)))
    torch.testing.assert_close(out.as_subclass(torch.Tensor)[0], features.as_subclass(torch.Tensor).mean(0))


def test_kernels_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import kernels, torch; i = torch.tensor; "
        "out = kernels.masked_average_pool(torch.ones(2, 1), torch.ones(2), i([0]), i([0, 2])); "
        "print(kernels.triton, out.tolist())"
    )
    environment = os.environ | {"PYTHONPATH": os.path.dirname(kernels.__file__)}
    del environment["NANOREFER_POOL"]
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout == "None [[1.0]]\n", result.stderr


# ---- the benchmark


def test_versions_that_are_timed_agree(monkeypatch):
    """A benchmark of something else than the average, or of its gradient, would be worthless."""
    monkeypatch.setitem(bench_kernels.CASES, "tiny", (8, 6, 10, 2, False))
    (features, other), versions = bench_kernels.make_versions("tiny", DEVICE, torch.float32, 2)
    assert not torch.equal(features, other)
    grad = cells_of(16, 10)
    masks = bench_kernels.make_masks(8, 6, 2, False)
    regions = tensors([36 * (r // 2) for r in range(16)], [36] * 16, masks.flatten())
    wanted, wanted_gradient = closed_form(features, *regions, grad)
    for version in versions.values():
        out = version(features)
        (gradient,) = torch.autograd.grad(out, features, grad)
        torch.testing.assert_close(out.detach().cpu().double(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient.cpu().double(), wanted_gradient, rtol=1e-4, atol=1e-5)
    assert set(versions) | {"compiled"} == set(bench_kernels.bytes_moved("tiny", 2))
    assert bench_kernels.median_ms(lambda i: versions["eager"]((features, other)[i]), 2, DEVICE) > 0


def test_bytes_that_the_docstring_names():
    named = dict(re.findall(r"^    (\w+) .*?((?: +\d+){2})$", bench_kernels.__doc__, re.M))
    counted = bench_kernels.bytes_moved("batch", 2)
    expected = {name: [round(count / 1e6) for count in both] for name, both in counted.items()}
    assert {name: [int(n) for n in numbers.split()] for name, numbers in named.items()} == expected


def test_the_benchmark_runs(capsys):
    bench_kernels.bench("small", DEVICE, torch.float32)
    printed = capsys.readouterr().out
    assert len(re.findall("^small +bmm ", printed, re.M)) == 2
