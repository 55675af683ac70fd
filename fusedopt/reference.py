"""The eager references: the originals' loops, written out plainly.

One parameter after the other, one torch operation after the other, every intermediate a tensor of its own: slow and
obvious. Tests, the demo and the benchmarks all measure against these three. They round where the originals round (in 16
bits that is after every operation of AdamW), they hold what the originals hold in `state`, and they check nothing: they
are not for training. The one departure: a closure runs with gradients enabled.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Loop(torch.optim.Optimizer):
    """One call of `update` for every parameter that has a gradient."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)
        return loss


class ReferenceAdamW(_Loop):
    """AdamW as transformers 4.34 computes it.

    eps is added to `sqrt(v)` before any bias correction, and weight decay comes after the update, on the updated
    parameter, with the plain learning rate. State has the parameter's dtype.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101; `transformers.optimization.AdamW`, version 4.34.0.

    Args:
        params: parameters, or param groups with their own options.
        lr: learning rate per step.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the root of the average square, in the unit of the gradient.
        weight_decay: share of the parameter that `lr = 1` would take away per step.
        correct_bias: whether the averages, which start at 0, are scaled up in the first steps.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> weight.grad = torch.tensor([4.0])
        >>> ReferenceAdamW([weight], lr=0.25).step()
        >>> round(weight.item(), 4)
        0.75
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        k, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
        lr, (beta1, beta2) = group["lr"], group["betas"]

        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step_size = lr
        if group["correct_bias"]:
            step_size = lr * math.sqrt(1 - beta2**k) / (1 - beta1**k)
        p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
        if group["weight_decay"] > 0:
            p.add_(p, alpha=-lr * group["weight_decay"])


class ReferenceAdafactor(_Loop):
    """Adafactor as transformers 4.34 computes it.

    The second moment of a parameter with two or more dimensions is kept as its averages over the last and over the
    second-last dimension. 16-bit parameters are updated in float32 and rounded once per step; their state is float32.

    Source: Shazeer and Stern, https://arxiv.org/abs/1804.04235; `transformers.optimization.Adafactor`, version 4.34.0.

    Args:
        params: parameters, or param groups with their own options.
        lr: learning rate per step; None with `relative_step`.
        eps: added to the squared gradient; smallest root mean square of a parameter that `scale_parameter` uses.
        clip_threshold: largest root mean square of an update before the learning rate.
        decay_rate: at step k the average of squares keeps the share `1 - k**decay_rate`.
        beta1: decay of the running average of updates, learning rate included; None keeps no such average.
        weight_decay: share of the parameter that an effective learning rate of 1 would take away per step.
        scale_parameter: whether the learning rate is multiplied by the parameter's root mean square.
        relative_step: whether the learning rate is `min(1e-2, 1/sqrt(k))`.
        warmup_init: with `relative_step`: `min(1e-6 * k, 1/sqrt(k))` instead.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> weight.grad = torch.full((2, 3), 5.0)
        >>> ReferenceAdafactor([weight]).step()
        >>> round(weight[0, 0].item(), 4)
        0.99
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            eps=eps,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=scale_parameter,
            relative_step=relative_step,
            warmup_init=warmup_init,
        )
        super().__init__(params, defaults)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        factored, has_momentum = p.dim() >= 2, group["beta1"] is not None
        wide = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
        g, wide_p = g.to(wide), p.to(wide)
        if not state:
            state["step"] = 0
            if factored:
                state["exp_avg_sq_row"] = g.new_zeros(p.shape[:-1])
                state["exp_avg_sq_col"] = g.new_zeros(p.shape[:-2] + p.shape[-1:])
            else:
                state["exp_avg_sq"] = torch.zeros_like(g)
            if has_momentum:
                state["exp_avg"] = torch.zeros_like(g)
        state["step"] += 1
        state["RMS"] = _root_mean_square(wide_p)
        k, lr = state["step"], _adafactor_rate(state, group)
        keep = 1 - k ** group["decay_rate"]

        square = g * g + group["eps"][0]
        if factored:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.mul_(keep).add_(square.mean(dim=-1), alpha=1 - keep)
            col.mul_(keep).add_(square.mean(dim=-2), alpha=1 - keep)
            row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt()
            update = row_factor.unsqueeze(-1) * col.rsqrt().unsqueeze(-2) * g
        else:
            v = state["exp_avg_sq"]
            v.mul_(keep).add_(square, alpha=1 - keep)
            update = v.rsqrt() * g

        update = update / (_root_mean_square(update) / group["clip_threshold"]).clamp(min=1.0)
        update = update * lr
        if has_momentum:
            update = state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        if group["weight_decay"] != 0:
            wide_p = wide_p.add(wide_p, alpha=-group["weight_decay"] * lr)
        p.copy_(wide_p - update)


def _root_mean_square(x: Tensor) -> Tensor:
    root_mean_square: Tensor = x.norm(2) / x.numel() ** 0.5
    return root_mean_square


def _adafactor_rate(state: dict[str, Any], group: dict[str, Any]) -> Any:
    lr, k = group["lr"], state["step"]
    if group["relative_step"]:
        lr = min(1e-6 * k if group["warmup_init"] else 1e-2, 1 / math.sqrt(k))
    return lr * max(group["eps"][1], state["RMS"]) if group["scale_parameter"] else lr


class ReferenceLion(_Loop):
    """Lion as its paper writes it. State has the parameter's dtype.

    Source: Chen et al., https://arxiv.org/abs/2302.06675.

    Args:
        params: parameters, or param groups with their own options.
        lr: how far an element moves per step.
        betas: weights of the running average where its sign is taken, and in the next average.
        weight_decay: share of the parameter that `lr = 1` would take away per step.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> weight.grad = torch.tensor([4.0])
        >>> ReferenceLion([weight], lr=0.25).step()
        >>> weight.item()
        0.75
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        m, lr, (beta1, beta2) = state["exp_avg"], group["lr"], group["betas"]
        direction = torch.sign(beta1 * m + (1 - beta1) * g)
        p.sub_(lr * (direction + group["weight_decay"] * p))
        m.mul_(beta2).add_(g, alpha=1 - beta2)


class ReferenceAdamWeightDecay(_Loop):
    """AdamWeightDecay as transformers 4.34 computes it on TensorFlow, without gradient clipping.

    Decay comes before the update, and one count of steps serves all parameters: one that was skipped, or came late,
    gets the bias correction of the whole optimizer.

    Source: `transformers.optimization_tf.AdamWeightDecay`, version 4.34.0, on Keras 2.14's legacy Adam.

    Args:
        params: parameters, or param groups with their own options, in torch's names (`lr`, `betas`, `eps`,
            `weight_decay`); a group with `weight_decay=0` does not decay.
        learning_rate: per step.
        beta_1, beta_2: decay of the running averages of the gradient and of its square.
        epsilon: added to the root of the average square, in the unit of the gradient; 0 means 1e-7, as in Keras.
        amsgrad: divide by the largest average square so far.
        weight_decay_rate: share of the parameter that a learning rate of 1 would take away per step.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> weight.grad = torch.tensor([4.0])
        >>> ReferenceAdamWeightDecay([weight], learning_rate=0.25, weight_decay_rate=0.5).step()
        >>> round(weight.item(), 4)
        0.625
    """

    def __init__(
        self,
        params: Iterable[Any],
        learning_rate: float = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        weight_decay_rate: float = 0.0,
    ) -> None:
        defaults = dict(
            lr=learning_rate,
            betas=(beta_1, beta_2),
            eps=epsilon or 1e-7,
            amsgrad=amsgrad,
            weight_decay=weight_decay_rate,
            iterations=0,
        )
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["iterations"] += 1
        return super().step(closure)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p)
        k, m, v = group["iterations"], state["exp_avg"], state["exp_avg_sq"]
        lr, (beta1, beta2) = group["lr"], group["betas"]

        if group["weight_decay"] != 0:
            p.sub_(p * (lr * group["weight_decay"]))
        m.add_((g - m) * (1 - beta1))
        v.add_((g * g - v) * (1 - beta2))
        if group["amsgrad"]:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        step_size = lr * math.sqrt(1 - beta2**k) / (1 - beta1**k)
        p.sub_(step_size * m / (v.sqrt() + group["eps"]))
