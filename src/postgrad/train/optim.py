"""AdamW over float32 masters, and the learning-rate schedules.

Compute weights may be bf16; the optimizer never is (an update of 1e-5 would vanish in bf16).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from postgrad.config import SFTConfig


class MasterOptimizer:
    """AdamW on float32 masters of a model's parameters, accumulating gradients in float32.

    Args:
        model: its trainable parameters are trained; those in ``compute_dtype`` are copies of the masters.
        config: learning rate, betas, epsilon, weight decay, clipping.
        compute_dtype: dtype of the weights during forward and backward.

    Shapes: one master, and two moments, per parameter, each float32 and of the parameter's shape.
    """

    def __init__(self, model: torch.nn.Module, config: SFTConfig, compute_dtype: torch.dtype) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.max_grad_norm = config.max_grad_norm
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.shared = compute_dtype == torch.float32
        self.frozen = [(p, p.data) for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        for parameter, _ in self.frozen:
            parameter.data = parameter.data.to(compute_dtype)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data = master if self.shared else master.to(compute_dtype)
        undecayed = no_decay_names(model)
        groups: list[dict[str, object]] = [
            {
                "params": [m for n, m in zip(self.names, self.masters, strict=True) if (n not in undecayed) is decayed],
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    def accumulate(self) -> None:
        """Add the parameters' gradients, after a backward pass, to the masters' and clear them."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32)
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def grad_norm(self) -> float:
        """L2 norm of the accumulated gradient."""
        gradients = [master.grad for master in self.masters if master.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def update(self, learning_rate: float, norm: float) -> None:
        """Clip to ``max_grad_norm``, make one AdamW step, write the masters into the parameters.

        Args:
            learning_rate: of this step.
            norm: of the gradient, from :meth:`grad_norm`.
        """
        if self.max_grad_norm > 0:
            factor = min(1.0, self.max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            if factor < 1.0:
                torch._foreach_mul_([m.grad for m in self.masters if m.grad is not None], factor)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.clear()
        self.publish()

    def clear(self) -> None:
        """Forget every gradient."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = None
            master.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the compute weights."""
        if not self.shared:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)

    @torch.no_grad()
    def restore_dtype(self, dtypes: list[torch.dtype]) -> None:
        """Give each parameter the dtype it came in, with the master's value."""
        for parameter, master, dtype in zip(self.parameters, self.masters, dtypes, strict=True):
            parameter.data = master.to(dtype)
        for parameter, data in self.frozen:
            parameter.data = data

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name, for a checkpoint."""
        tensors: dict[str, torch.Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master.{name}"] = master
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = torch.as_tensor(value)
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            KeyError: when a parameter is missing.
        """
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            if f"step.{name}" in tensors:
                self.adamw.state[master] = {
                    "step": tensors[f"step.{name}"].to(torch.float32).reshape(()).to(master.device),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(master.device, copy=True),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device, copy=True),
                }
        self.publish()


def no_decay_names(model: torch.nn.Module) -> set[str]:
    """Names of parameters without weight decay: biases, vectors, and everything in a normalisation layer."""
    names = set()
    for module_name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm or name.endswith("bias") or parameter.ndim < 2:
                names.add(f"{module_name}.{name}" if module_name else name)
    return names


def schedule(config: SFTConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step.

    Args:
        config: shape, peak and warm-up.
        total_steps: optimizer steps of the whole run.

    Returns:
        A function from the number of steps done to the rate of the next one: linear warm-up from 0, then constant,
        linear to 0, or half a cosine to 0 (the schedules of transformers under the same names).
    """
    warmup = config.warmup_steps if config.warmup_steps >= 1 else total_steps * config.warmup_steps
    warmup = math.ceil(warmup or total_steps * config.warmup_ratio)

    def rate(step: int) -> float:
        if step < warmup:
            return config.learning_rate * step / max(1, warmup)
        progress = (step - warmup) / max(1, total_steps - warmup)
        if config.lr_scheduler_type == "linear":
            return config.learning_rate * max(0.0, 1.0 - progress)
        if config.lr_scheduler_type == "cosine":
            return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return config.learning_rate

    return rate
