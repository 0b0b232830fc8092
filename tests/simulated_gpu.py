"""A GPU that is not there: its tensors say that they are on cuda:0, and compute on the CPU.

It shows two kinds of slip that a CPU forgives. An operation on tensors of both devices raises AssertionError;
only a number (a CPU tensor of no dimensions) may meet tensors of the GPU, as torch has it. And where the CPU
has to wait until the GPU has computed, because it asks for a value or for a size that depends on values, the
place is noted. (A copy to the GPU with non_blocking does not wait, as if it came from pinned memory.)

Triton's kernels run in its interpreter. Flash attention is written out, and so are autocast's types.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.attention.varlen  # defines torch.ops.torch_attn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import kernels

aten = torch.ops.aten
GPU = torch.device("cuda", 0)


class GPUTensor(torch.Tensor):
    """A tensor on the simulated GPU. Its numbers are in `value`, a CPU tensor."""

    device = GPU
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value):
        # Torch itself is told "meta", because in a build without CUDA its autograd refuses to work with cuda.
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, value.size(), device="meta", **layout)

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise AssertionError(f"{operator}: a tensor of the simulated GPU outside of the simulation")


class SimulatedGPU(ExitStack):
    """Within this context, device="cuda" is the simulated GPU.

    waits: a Counter of the functions where the CPU waited for it.
    """

    def __enter__(self):
        self.waits, arguments = Counter(), Arguments()
        answers = {
            "cuda._lazy_init": None,
            "cuda.is_available": True,
            "cuda.get_device_capability": (9, 0),  # an H100
            "cuda.is_bf16_supported": True,
            "cuda.amp.common.amp_definitely_not_available": False,
            "__future__.get_swap_module_params_on_conversion": True,
        }
        for name, answer in answers.items():
            self.enter_context(mock.patch(f"torch.{name}", return_value=answer))
        for name in ("Stream", "stream", "current_stream"):
            self.enter_context(mock.patch(f"torch.cuda.{name}"))
        for name in ("pool_forward", "pool_backward"):
            self.enter_context(mock.patch.object(kernels, name, Launcher(getattr(kernels, name))))
        self.enter_context(mock.patch("torch.autograd._engine_run_backward", arguments.run_backward))
        self.enter_context(arguments)
        self.enter_context(Operators(self.waits))
        return self


def to_cpu(tensor):
    return tensor.value if isinstance(tensor, GPUTensor) else tensor


# Of the operations that autocast casts on CUDA, those that our models leave to it. See torch's manual,
# "Automatic Mixed Precision package", section "CUDA Op-Specific Behavior".
TO_HALF = {F.linear, F.conv1d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
TO_FLOAT32 = {F.layer_norm, F.softmax, torch.Tensor.sum}


class Arguments(TorchFunctionMode):
    """Sees torch's functions as a program calls them, and casts their arguments as autocast would."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "__get__":  # of a shape, for example
            return function(*args)
        args, kwargs = tree_map(self.with_index, (args, kwargs or {}))
        if function is torch.ops.torch_attn._varlen_attn:
            return flash_attention(*args)
        # These two would copy numbers where we do not see it.
        if function is torch.tensor and kwargs.get("device") == GPU:
            values = tree_map(lambda x: x.item() if isinstance(x, GPUTensor) else x, args[0])
            return torch.tensor(values, **kwargs | {"device": None}).to(GPU)
        if function is torch.Tensor.tolist:
            return args[0].to("cpu").tolist()
        if torch.is_autocast_enabled("cuda"):
            # Mixtures of experts multiply by this, for which torch has no rule, but a program can make one.
            rules = aten._grouped_mm.default.py_kernels
            if function is torch._grouped_mm and torch._C.DispatchKey.AutocastCUDA in rules:
                return rules[torch._C.DispatchKey.AutocastCUDA](*args, *kwargs.values())
            dtype = torch.get_autocast_dtype("cuda") if function in TO_HALF else torch.float32
            widest = function in (torch.cat, torch.stack) and any(x.dtype == dtype for x in args[0])
            if function in TO_HALF | TO_FLOAT32 or widest:
                is_number = lambda x: isinstance(x, GPUTensor) and x.is_floating_point()  # noqa: E731
                args, kwargs = tree_map(lambda x: x.to(dtype) if is_number(x) else x, (args, kwargs))
        return function(*args, **kwargs)

    def run_backward(self, *args, **kwargs):
        """backward() is itself such a function, within which torch calls us no more, were it not for this."""
        with self:
            return torch.autograd.graph._engine_run_backward(*args, **kwargs)

    @staticmethod
    def with_index(x):  # because torch would ask the driver which GPU is meant
        return GPU if isinstance(x, torch.device) and x == torch.device("cuda") else x


def flash_attention(
    query, key, value, bounds, key_bounds, longest, key_longest, is_causal, scale, window, *_
):
    """torch_attn::_varlen_attn, behind checks of what the real kernel demands, and of what it would pass over
    in silence: a length that is too short, or bounds that leave out tokens.
    """
    T, heads, size = query.shape
    for x in (query, key, value):
        assert x.is_cuda and x.dtype == torch.bfloat16, (x.device, x.dtype)
        assert x.shape == query.shape and x.stride(-1) == 1, (x.shape, x.stride())
    assert size % 8 == 0 and size <= 256 and isinstance(scale, float), (size, scale)
    assert bounds is key_bounds and longest == key_longest and window == [-1, 0 if is_causal else -1], window
    assert bounds.is_cuda and bounds.dtype == torch.int32 and (bounds.value[0], bounds.value[-1]) == (0, T)
    assert type(longest) is int and longest == bounds.value.diff().max(), longest
    sample = torch.arange(len(bounds) - 1).repeat_interleave(bounds.value.diff())
    visible = sample[:, None] == sample
    if is_causal:
        visible = visible.tril()
    q, k, v = (x.transpose(0, 1).float() for x in (query, key, value))
    scores = (q @ k.mT * scale).masked_fill(~visible.to(GPU, non_blocking=True), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).bfloat16(), None, None


# The size of what they return depends on values, or they return values (_local_scalar_dense: item(), if).
ALWAYS_WAIT = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
ALWAYS_WAIT |= {aten.masked_select.default, aten.unique_consecutive.default, aten.bincount.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
ON_GPU = ("cuda", "meta")  # meta comes from what torch writes in C++


class Operators(TorchDispatchMode):
    """Sees each operator that reaches a device, in the forward pass and in the backward pass."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, GPUTensor)]
        if operator in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if operator is aten.copy_.default else args[0]
            output_on_gpu = (kwargs.get("device") or args[0].device).type in ON_GPU
            # To the GPU, pinned memory is copied while the CPU goes on. Back, it must wait for the numbers.
            in_background = output_on_gpu and (kwargs.get("non_blocking") or args[2:] == (True,))
            if output_on_gpu != isinstance(source, GPUTensor) and not in_background:
                self.note_wait()
        else:
            on_cpu = [x for x in tensors if not isinstance(x, GPUTensor) and x.dim() > 0]
            if operator in INDEXING:  # torch copies indices, and waits for it
                on_cpu = [x for x in on_cpu if not any(x is index for index in args[1])]
            assert not (on_gpu and on_cpu), f"{operator}: on the CPU are {[x.shape for x in on_cpu]}"
            device = kwargs.get("device")
            output_on_gpu = device.type in ON_GPU if device else bool(on_gpu)
            if on_gpu and self.waits_for(operator, args, kwargs):
                self.note_wait()
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        compute = histogram if operator is aten.histc.default else operator
        output = compute(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        if not output_on_gpu:
            return output
        same = {id(x.value): x for x in on_gpu}  # an operation in place returns one of them
        return tree_map(lambda x: same.get(id(x), GPUTensor(x)) if isinstance(x, torch.Tensor) else x, output)

    @staticmethod
    def waits_for(operator, args, kwargs):
        if operator in INDEXING:  # by a mask, whose true values must be counted, or from the CPU
            indices = [x for x in args[1] if x is not None]
            return any(x.dtype in (torch.bool, torch.uint8) or not x.is_cuda for x in indices)
        if operator is aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        if operator is aten._grouped_mm.default:  # in another dtype, torch loops over the groups
            return args[0].dtype != torch.bfloat16
        return operator in ALWAYS_WAIT

    def note_wait(self):
        frame = sys._getframe()
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.waits[frame.f_code.co_name] += 1


def histogram(x, *bins):
    """A CPU counts floating point numbers alone. transformers knows, and gives integers only to a GPU."""
    return torch.histc(x.float(), *bins).to(x.dtype)


class Launcher:
    """Hands tensors of the simulated GPU to a Triton kernel, in kernel[grid](*arguments)."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **blocks: self.kernel[grid](*map(to_cpu, args), **blocks)
