"""Times the pooling kernels against other ways to compute the same: `python tests/bench_kernels.py`.

Pooling makes one multiplication and one addition for each number that it reads, so its time is that of the
bytes that go to and from memory. On a GPU there are 64 frames of 27 x 27 cells with 3584 columns of bfloat16,
334 MB, and two regions on each frame. Without a GPU a small case is timed, which says nothing about a GPU.

    ours   reads the rows that a mask touches and writes (R, D)
    eager  (x * mask / area).sum(-1).sum(-1), as VideoRefer has it: two arrays (R, D, h, w), and smaller ones
    copy   copies as many bytes as the forward pass of "ours" moves: none can be faster

What a version needs beside features is made before its time is taken. "both": forward and backward.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402

import kernels  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
FRAMES, SIDE, D = (64, 27, 3584) if GPU else (8, 12, 512)
REGIONS = 2  # on a frame


def median_ms(call):
    if GPU:
        from triton.testing import do_bench  # clears the GPU's cache before each call

        return do_bench(call, return_mode="median")
    return 1000 * Timer("call()", globals={"call": call}).blocked_autorange().median


def main():
    sizes = (1 + torch.arange(FRAMES * REGIONS) % 8) * SIDE // 8
    inside = torch.arange(SIDE) < sizes[:, None]  # (regions, SIDE)
    masks = (inside[:, :, None] & inside[:, None]).float().to(DEVICE)  # squares of 1/8 to 8/8 of the side
    features = torch.randn(FRAMES * SIDE**2, D, device=DEVICE, dtype=DTYPE).requires_grad_()
    frame_start = torch.arange(FRAMES, device=DEVICE).repeat_interleave(REGIONS) * SIDE**2
    weight_start = torch.arange(len(masks) + 1, device=DEVICE) * SIDE**2
    area = masks.sum((1, 2), keepdim=True)
    mask = masks.to(DTYPE).view(FRAMES, REGIONS, 1, SIDE, SIDE)
    area = area.to(DTYPE).view(FRAMES, REGIONS, 1, 1, 1)

    def ours(x):
        return kernels.masked_average_pool(x, masks.flatten(), frame_start, weight_start)

    def eager(x):
        x = x.view(FRAMES, 1, SIDE, SIDE, D).permute(0, 1, 4, 2, 3)  # (frames, 1, D, h, w)
        return (x * mask / area).sum(-1).sum(-1).view(-1, D)

    moved = (int(masks.sum()) + len(masks)) * D * DTYPE.itemsize  # by the forward pass
    block = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)  # it is read, and written again
    print(torch.cuda.get_device_name() if GPU else "No GPU: a small case on the CPU.")
    print(f"copy  {median_ms(block.clone):9.4f} ms for {moved / 1e6:.0f} MB")
    grad = torch.randn(len(masks), D, device=DEVICE, dtype=DTYPE)
    for pool in (ours, eager):
        torch.testing.assert_close(pool(features), ours(features), rtol=0.03, atol=0.03)
        with torch.no_grad():
            forward = median_ms(lambda pool=pool: pool(features))
        both = median_ms(lambda pool=pool: torch.autograd.grad(pool(features), features, grad))
        print(f"{pool.__name__:6}{forward:9.4f} ms forward {both:9.4f} ms both")


if __name__ == "__main__":
    main()
