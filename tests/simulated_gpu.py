"""A GPU that is not there: its tensors say that they are on cuda:0, and compute on the CPU.

    with SimulatedGPU() as gpu:
        model.to(gpu.device)
        train.backward(model, [train.to_device(batch, gpu.device)])
    gpu.waits  # where the CPU would have waited for the GPU

It shows two kinds of slip that a CPU forgives. An operation on tensors of both devices raises AssertionError;
only a number (a CPU tensor of no dimensions) may meet tensors of the GPU, as torch has it. And where the CPU
has to wait until the GPU has computed, because it asks for a value or for a size that depends on values, the
place is noted. (A copy to the GPU with non_blocking does not wait, as if it came from pinned memory.)

Below autograd, torch's own CPU kernels compute. In place of the two kinds of kernel that run on a GPU alone
stand others: Triton's run in its interpreter, and flash attention is written out below, behind checks of what
the real one demands. Which types autocast would choose is written out, too, for the functions that we use.
"""

import traceback
import warnings
from collections import Counter
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
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
        raise AssertionError(f"{operator}: a tensor of the simulated GPU was used outside of the simulation")


class SimulatedGPU:
    """Within this context, device="cuda" is the simulated GPU.

    waits: a Counter of the places where the CPU waited for it, each "file function operator". exact: without
    mixed precision, and without the model's own casts to bfloat16, so that the CPU's results can be compared.
    """

    device = GPU

    def __init__(self, exact=False):
        self.waits, self.exact = Counter(), exact

    def __enter__(self):
        self.stack = ExitStack()
        enter = self.stack.enter_context
        enter(mock.patch("torch.cuda._lazy_init", lambda: None))
        for name in ("Stream", "stream", "current_stream"):
            enter(mock.patch(f"torch.cuda.{name}"))
        enter(mock.patch("torch.__future__.get_swap_module_params_on_conversion", lambda: True))
        enter(mock.patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)))  # an H100
        for name in ("pool_forward", "pool_backward"):
            enter(mock.patch.object(kernels, name, InterpretedKernel(getattr(kernels, name))))
        if self.exact:  # torch.autocast finds that there is no GPU, warns, and does nothing
            enter(warnings.catch_warnings(action="ignore"))
        else:
            enter(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
            enter(mock.patch("torch.cuda.is_bf16_supported", lambda: True))
        arguments = enter(Arguments(self.exact))
        enter(mock.patch("torch.autograd._engine_run_backward", arguments.run_backward))
        enter(Operators(self.waits, torch.float32 if self.exact else torch.bfloat16))
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)


def to_cpu(tensor):
    return tensor.value if isinstance(tensor, GPUTensor) else tensor


# ---- What a program says ----

# Of the operations that autocast knows on CUDA, those that our models use. They are listed in torch's manual,
# "Automatic Mixed Precision package", section "CUDA Op-Specific Behavior".
TO_BFLOAT16 = {F.linear, F.conv1d, F.conv3d, F.scaled_dot_product_attention, torch.einsum}
TO_BFLOAT16 |= {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
TO_FLOAT32 = {F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, F.log_softmax, F.softplus}
TO_FLOAT32 |= {torch.rsqrt, torch.Tensor.rsqrt, torch.exp, torch.Tensor.exp, F.cosine_similarity}
TO_FLOAT32 |= {torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.sum, torch.Tensor.cumsum}
TO_WIDEST = {torch.cat, torch.stack}


class Arguments(TorchFunctionMode):
    """Sees torch's functions as a program calls them, and casts their arguments as autocast would."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(self.with_index, (args, kwargs or {}))
        if self.exact and function is torch.Tensor.bfloat16:
            return args[0]
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
            dtype = self.autocast_dtype(function, args)
            if dtype:
                args, kwargs = tree_map(lambda x: self.cast(x, dtype), (args, kwargs))
        return function(*args, **kwargs)

    def run_backward(self, *args, **kwargs):
        """backward() is itself such a function, within which torch calls us no more, were it not for this."""
        with self:
            return torch.autograd.graph._engine_run_backward(*args, **kwargs)

    @staticmethod
    def with_index(x):  # because torch would ask the driver which GPU is meant
        return GPU if isinstance(x, torch.device) and x == torch.device("cuda") else x

    @staticmethod
    def autocast_dtype(function, args):
        if function in TO_BFLOAT16:
            return torch.bfloat16
        if function in TO_FLOAT32:
            return torch.float32
        if function in TO_WIDEST and any(x.dtype == torch.float32 for x in args[0]):
            return torch.float32
        return None

    @staticmethod
    def cast(x, dtype):
        is_number = isinstance(x, GPUTensor) and x.is_floating_point()
        return x.to(dtype) if is_number else x


# ---- What a GPU is given to do ----

# The size of what they return depends on values, or they return values.
ALWAYS_WAIT = {
    aten._local_scalar_dense.default,  # item(), int(), float(), bool(), if
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class Operators(TorchDispatchMode):
    """Sees each operator that reaches a device, in the forward pass and in the backward pass."""

    def __init__(self, waits, flash_dtype):
        super().__init__()
        self.waits = waits
        self.stand_ins = {
            torch.ops.torch_attn._varlen_attn.default: partial(flash_forward, flash_dtype),
            torch.ops.torch_attn._varlen_attn_backward.default: flash_backward,
            aten.histc.default: histogram,
        }

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, GPUTensor)]
        if operator in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if operator is aten.copy_.default else args[0]
            output_on_gpu = self.is_gpu(kwargs.get("device") or args[0].device)
            # To the GPU, pinned memory is copied while the CPU goes on. Back, it must wait for the numbers.
            in_background = output_on_gpu and (kwargs.get("non_blocking") or args[2:] == (True,))
            if output_on_gpu != isinstance(source, GPUTensor) and not in_background:
                self.note_wait(operator)
        else:
            on_cpu = [x for x in tensors if not isinstance(x, GPUTensor) and x.dim() > 0]
            if operator in INDEXING:  # torch copies indices, and waits for it
                on_cpu = [x for x in on_cpu if not any(x is index for index in args[1])]
            shapes = [tuple(x.shape) for x in on_cpu]
            assert not (on_gpu and on_cpu), f"{operator}: tensors of these shapes are on the CPU: {shapes}"
            device = kwargs.get("device")
            output_on_gpu = self.is_gpu(device) if device else bool(on_gpu)
            if on_gpu and self.waits_for(operator, args, kwargs):
                self.note_wait(operator)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        compute = self.stand_ins.get(operator, operator)
        output = compute(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        if not output_on_gpu:
            return output
        arguments = {id(x.value): x for x in on_gpu}  # an operation in place returns one of them
        return tree_map(partial(self.to_gpu, arguments), output)

    @staticmethod
    def is_gpu(device):
        return device.type in ("cuda", "meta")  # meta comes from what torch writes in C++

    @staticmethod
    def to_gpu(arguments, x):
        if not isinstance(x, torch.Tensor):
            return x
        return arguments[id(x)] if id(x) in arguments else GPUTensor(x)

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

    def note_wait(self, operator):
        place = "?"
        for frame in reversed(traceback.extract_stack()):
            if "/torch/" not in frame.filename and frame.filename != __file__:
                place = f"{Path(frame.filename).name} {frame.name}"
                break
        self.waits[f"{place} {operator.overloadpacket}"] += 1


def histogram(x, bins, least, most):
    """A CPU counts floating point numbers alone. transformers knows, and gives integers only to a GPU."""
    return torch.histc(x.float(), bins, least, most).to(x.dtype)


class InterpretedKernel:
    """A Triton kernel, launched as kernel[grid](*arguments), that takes tensors of the simulated GPU."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel[grid](*map(to_cpu, args))


# ---- Flash attention ----


def flash_forward(
    dtype, query, key, value, bounds, key_bounds, max_length, max_key_length, is_causal, scale, window, *rest
):
    """torch_attn::_varlen_attn, behind checks of what the real kernel demands, and of what it would pass over
    in silence: a length that is too short, or bounds that leave out tokens."""
    T, heads, size = query.shape
    for x in (query, key, value):
        assert x.dtype == dtype, f"expected {dtype}, found {x.dtype}"
        assert x.shape == query.shape and x.stride(-1) == 1, (x.shape, x.stride())
    assert size % 8 == 0 and size <= 256, f"expected heads of 8, 16, ... or 256, found {size}"
    for found, longest in ((bounds, max_length), (key_bounds, max_key_length)):
        assert found.dtype == torch.int32 and found.is_contiguous(), found
        assert (found[0], found[-1]) == (0, T) and type(longest) is int, (found, longest)
        assert longest == found.diff().max(), (found, longest)
    assert window == [-1, 0 if is_causal else -1] and isinstance(scale, float), (window, scale)
    output, norms = torch.empty_like(query), torch.empty(heads, T)
    for rows in segments(bounds):
        scores = attention_scores(query[rows], key[rows], is_causal, scale)
        output[rows] = to_rows(scores.softmax(-1) @ to_heads(value[rows]))
        norms[:, rows] = scores.logsumexp(-1)
    return output, norms, torch.zeros(2, dtype=torch.uint64)


def flash_backward(
    grad, query, key, value, output, norms, bounds, key_bounds, longest, _, is_causal, state, scale, window
):
    """torch_attn::_varlen_attn_backward: returns the gradients of query, key and value."""
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for rows in segments(bounds):
        weight = (attention_scores(query[rows], key[rows], is_causal, scale) - norms[:, rows, None]).exp()
        grad_weight = to_heads(grad[rows]) @ to_heads(value[rows]).mT
        mean = (weight * grad_weight).sum(-1, keepdim=True)
        grad_scores = weight * (grad_weight - mean) * scale
        grads[0][rows] = to_rows(grad_scores @ to_heads(key[rows]))
        grads[1][rows] = to_rows(grad_scores.mT @ to_heads(query[rows]))
        grads[2][rows] = to_rows(weight.mT @ to_heads(grad[rows]))
    return tuple(grads)


def segments(bounds):
    return [slice(start, end) for start, end in pairwise(bounds.tolist())]


def to_heads(x):
    """(T, heads, size) -> float32 (heads, T, size)."""
    return x.transpose(0, 1).float()


def to_rows(x):
    return x.transpose(0, 1)


def attention_scores(query, key, is_causal, scale):
    """Returns float32 (heads, T, T): what softmax turns into how much each token sees of each other."""
    scores = to_heads(query) @ to_heads(key).mT * scale
    if is_causal:
        T = len(query)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return scores
