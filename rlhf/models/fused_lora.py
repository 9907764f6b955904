"""A faster LoRA layer: x Wᵀ + s (x Aᵀ) Bᵀ accumulated in place, with fewer passes over memory than peft's.

peft allocates temporaries for the branch, its scaled copy and the sum, and under autocast it converts x to float32 for
the adapter, which autocast converts back. Here everything is multiplied in the dtype of the frozen weight: float32, or
16 bits under autocast. Whatever is not a single plain adapter on such a weight is left to peft's own code.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Scale · left @ right as one kernel, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


class _FusedLora(torch.autograd.Function):
    """x Wᵀ + b + s (dropout(x) Aᵀ) Bᵀ for x [rows, in], frozen W [out, in], trained A [rank, in] and B [out, rank].

    x and W have one dtype, in which everything is multiplied. A and B may have a wider one; so have their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        # Dropout's factor is a part of the scaling: multiplying x by it would round all of x, or in 16 bits the factor.
        ctx.scaling, ctx.dtype = scaling / (1 - dropout), a.dtype
        a, b, inputs, kept = a.to(x.dtype), b.to(x.dtype), x, None
        if dropout:
            kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
            inputs = x * kept
        low = inputs @ a.t()
        ctx.save_for_backward(inputs, kept, weight, a, b, low)
        return nn.functional.linear(x, weight, bias).addmm_(low, b.t(), alpha=ctx.scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept, weight, a, b, low = ctx.saved_tensors
        low_gradient = _scaled_product(gradient, b, ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0] and kept is None:
            x_gradient = (gradient @ weight).addmm_(low_gradient, a)
        elif ctx.needs_input_grad[0]:
            x_gradient = (low_gradient @ a).mul_(kept).addmm_(gradient, weight)
        a_gradient = (low_gradient.t() @ inputs).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        b_gradient = None
        if ctx.needs_input_grad[4]:
            b_gradient = _scaled_product(gradient.t(), low, ctx.scaling).to(ctx.dtype)
        return x_gradient, None, None, a_gradient, b_gradient, None, None


def _dtype_of_products(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype, or float32. None otherwise: peft multiplies by W in one dtype then, by A and B in another."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype == torch.float32 else None


class FusedLinear(Linear):
    """A peft LoRA layer that runs the fused operation where it computes the same as peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same as peft's `Linear.forward`, but in 16 bits with fewer roundings."""
        if args or kwargs or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        if self._disable_adapters:
            return base(x)
        dtype = _dtype_of_products(x)
        adapter = self._single_adapter()
        if adapter is None or dtype != base.weight.dtype:
            return super().forward(x)
        flat = _FusedLora.apply(
            x.reshape(-1, x.shape[-1]).to(dtype),
            base.weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            self._dropout(adapter),
        )
        return flat.view(*x.shape[:-1], -1)

    def _dropout(self, adapter: str) -> float:
        """The probability that an input of the adapter is dropped in this mode."""
        return getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0

    def _single_adapter(self) -> str | None:
        """The active adapter, if it is the only one and the fused operation computes it; else None."""
        active = self._active_adapter
        if len(active) != 1:
            return None
        name = active[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        return name if self._dropout(name) < 1 and not self.get_base_layer().weight.requires_grad else None


def fuse(model: nn.Module) -> None:
    """Turn the LoRA layers on plain linear layers into `FusedLinear`, in place."""
    for module in model.modules():
        if isinstance(module, Linear) and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLinear
