"""A GPU that does not exist: tensors that say they are on it and hold their numbers on the CPU.

Results are those of the CPU, bit for bit. An operation that mixes devices raises as CUDA's would, and kernels,
synchronizations and copies are counted. Nothing here tells how fast a kernel is, how much memory it takes, or whether
streams are right.

Importing this module changes torch for the whole process: it registers a backend and replaces ``torch.tensor`` and
``scaled_dot_product_attention``. Tests run it in a process of its own.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    """What ``torch.pretended`` must have beside what torch asks of every backend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretended", _Backend())
GPU = torch.device("pretended", 0)

KERNELS, SYNCS, COPIES = "kernels", "syncs", "copies"
counts: collections.Counter[str] = collections.Counter()
"""``kernels``: operations that are not views. ``syncs``: the host waits for the device. ``copies``: from the host."""
sites: collections.Counter[str] = collections.Counter()
"""Where in ``align`` the syncs and copies come from."""

_VIEWS = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "as_strided", "alias", "detach", "lift_fresh"}
    | {"transpose", "t", "permute", "expand", "squeeze", "unsqueeze", "slice", "select", "narrow", "diagonal"}
    | {"split", "split_with_sizes", "unbind", "unfold"}
)
_WAITS = frozenset(
    {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave"}
    | {"_unique2", "unique_dim", "unique_consecutive"}
)
"""Operations whose result's value or shape the host must know."""
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})


def _site() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/align/" in file and "site-packages" not in file:
            return f"align/{file.rpartition('/align/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of align"


def _count(kind: str, what: str) -> None:
    counts[kind] += 1
    sites[f"{kind} {what} {_site()}"] += 1


class PretendedTensor(Tensor):
    """A tensor on `GPU`; ``plain`` holds its numbers."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> PretendedTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=GPU,
        )
        made.plain = plain
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.plain})"

    def tolist(self) -> Any:
        _count(SYNCS, "tolist")
        return self.plain.tolist()

    def new_tensor(self, data: Any, **named: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": GPU} | named)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Within the context, ``device=GPU`` works. `counts` and `sites` start at 0."""

    def __enter__(self) -> Any:
        counts.clear()
        sites.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``function`` of every tensor in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, item) for item in value])
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return value


def _as_plain(tensor: Tensor) -> Tensor:
    return tensor.plain if isinstance(tensor, PretendedTensor) else tensor


def _is_gpu(device: Any) -> bool:
    return torch.device(device).type == GPU.type


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors: list[Tensor] = []
    _map(tensors.append, (args, kwargs))
    on_gpu = any(isinstance(x, PretendedTensor) for x in tensors)
    result_on_gpu, device = on_gpu, kwargs.get("device")
    if device is not None:
        result_on_gpu = _is_gpu(device)
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if tensors and on_gpu != result_on_gpu:
            _count(SYNCS if on_gpu else COPIES, name)
    elif on_gpu:
        _require_one_device(name, args, tensors)
    if on_gpu or result_on_gpu:
        counts[KERNELS] += name not in _VIEWS
        by_mask = name in _INDEXING and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
        if name in _WAITS or by_mask:
            _count(SYNCS, name)
    result = func(*_map(_as_plain, args), **_map(_as_plain, kwargs))
    if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], PretendedTensor):
        return args[0]
    if not result_on_gpu or name == "_local_scalar_dense":
        return result
    return _map(PretendedTensor, result)


def _require_one_device(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Numbers without dimensions may be on the CPU; so may an index, whose copy is a wait."""
    strangers = [x for x in tensors if not isinstance(x, PretendedTensor) and x.dim() > 0]
    if not strangers:
        return
    if name == "copy_":
        _count(COPIES if isinstance(args[0], PretendedTensor) else SYNCS, name)
    elif (
        name in _INDEXING and isinstance(args[0], PretendedTensor) and not any(x.is_floating_point() for x in strangers)
    ):
        _count(SYNCS, f"{name} by an index on the CPU")
    else:
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name}, {shapes} on the CPU, at {_site()}")


class _OneKernel(torch.autograd.Function):
    """A function of plain tensors as one kernel, and one in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        _require_one_device("attention", tensors, list(tensors))
        counts[KERNELS] += 1
        inputs = [x.plain.detach().requires_grad_(x.is_floating_point()) for x in tensors]
        with torch.enable_grad():
            output = function(*inputs)
        ctx.inputs, ctx.output = inputs, output
        return PretendedTensor(output.detach())

    @staticmethod
    def backward(ctx: Any, grad: PretendedTensor) -> tuple[Any, ...]:  # type: ignore[override]
        counts[KERNELS] += 1
        wanted = [x for x in ctx.inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(ctx.output, wanted, grad.plain))
        return None, *(PretendedTensor(next(grads)) if x.requires_grad else None for x in ctx.inputs)


def one_kernel(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of tensors on the pretended GPU, counted as a fused kernel is."""
    return _OneKernel.apply(function, *tensors)


_sdpa, _tensor = F.scaled_dot_product_attention, torch.tensor


def _pretended_sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest, **named):
    if not isinstance(query, PretendedTensor):
        return _sdpa(query, key, value, attn_mask, *rest, **named)
    masks = [] if attn_mask is None else [attn_mask]
    call = lambda q, k, v, *mask: _sdpa(q, k, v, *(mask or (None,)), *rest, **named)  # noqa: E731
    return one_kernel(call, query, key, value, *masks)


def _pretended_tensor(data: Any, *, device: Any = None, **named: Any) -> Tensor:
    if device is None or not _is_gpu(device):
        return _tensor(data, device=device, **named)
    _count(COPIES, "torch.tensor")
    return PretendedTensor(_tensor(data, **named))


_device_constructors()  # cached by torch: ``with torch.device("meta")`` must know the real ``torch.tensor``
F.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = _pretended_sdpa
torch.tensor = _pretended_tensor


def move(module: nn.Module) -> nn.Module:
    """Put parameters and buffers on `GPU`, in place; tied ones stay tied."""
    moved: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                tensor = moved.setdefault(
                    id(parameter), nn.Parameter(PretendedTensor(parameter.data), requires_grad=parameter.requires_grad)
                )
                owner._parameters[name] = tensor
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = moved.setdefault(id(buffer), PretendedTensor(buffer))
    return module


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor of any device."""
    return tensor.detach().plain if isinstance(tensor, PretendedTensor) else tensor.detach()
