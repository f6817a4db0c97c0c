"""AdamW over float32 masters, and the learning-rate schedules.

Compute weights may be bf16; the optimizer never is (an update of 1e-5 would vanish in bf16).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.adamw import adamw

from postgrad.config import SFTConfig
from postgrad.kernels import has_triton
from postgrad.train.layout import Layout

BLOCK = 1024  # elements a thread block of the GPU's kernel updates
GROUP = 256  # elements that share a scale where moments are 8-bit codes
MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterOptimizer:
    """AdamW on float32 masters of a model's parameters, accumulating gradients in float32.

    Args:
        model: its trainable parameters are trained; those in ``compute_dtype`` are copies of the masters.
        config: learning rate, betas, epsilon, weight decay, clipping, and ``optim`` for the moments' dtype.
        compute_dtype: dtype of the weights during forward and backward.

    Shapes: one master, and two moments, per parameter, each of the parameter's shape; masters are float32. All
    masters are views of one flat buffer, and so are the moments and the compute weights: on a GPU one kernel updates
    them in a single pass over memory. Moments are float32, bf16, or uint8 codes with a float32 scale per 256 elements;
    the last two only on a GPU.
    """

    def __init__(self, model: torch.nn.Module, config: SFTConfig, compute_dtype: torch.dtype) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.config = config
        undecayed = no_decay_names(model)
        self.decayed = [name not in undecayed for name in self.names]
        self.layout = Layout([p.shape for p in self.parameters], self.decayed, BLOCK)
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.frozen = [(p, p.data) for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        for parameter, _ in self.frozen:
            parameter.data = parameter.data.to(compute_dtype)
        self._make_masters(compute_dtype)
        self._make_moments()
        self.steps_P = torch.zeros(len(self.parameters), dtype=torch.float64, device=self.device)
        self.gradients: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.sums: torch.Tensor | None = None
        self.summed = [False] * len(self.parameters)  # which parameters have a gradient in the sums
        self.fused = _Fused(self.layout, self.device) if has_triton(self.device) else None

    def _flat(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.layout.total, dtype=dtype, device=self.device)

    def _make_masters(self, compute_dtype: torch.dtype) -> None:
        self.flat_master = self._flat(torch.float32)
        self.masters = self.layout.views(self.flat_master)
        self.flat_copy = None if compute_dtype == torch.float32 else self._flat(compute_dtype)
        copies = self.masters if self.flat_copy is None else self.layout.views(self.flat_copy)
        for parameter, master, copy in zip(self.parameters, self.masters, copies, strict=True):
            master.copy_(parameter.detach())
            parameter.data = copy
        self.publish()

    def _make_moments(self) -> None:
        """Zero moments, and views of them under the names that a checkpoint knows them by."""
        kinds = {"adamw_bf16": torch.bfloat16, "adamw_8bit": torch.uint8}
        dtype = kinds.get(self.config.optim, torch.float32)
        self.flat_moments = [self._flat(dtype), self._flat(dtype)]
        self.moments = {name: self.layout.views(flat) for name, flat in zip(MOMENTS, self.flat_moments, strict=True)}
        if dtype == torch.uint8:
            scales = [torch.zeros(self.layout.total // GROUP, device=self.device) for _ in MOMENTS]
            self.flat_moments += scales
            for name, flat in zip(MOMENTS, scales, strict=True):
                self.moments[f"{name}_scale"] = self.layout.group_views(flat, GROUP)

    @torch.no_grad()
    def accumulate(self, more: bool = False) -> None:
        """Take the parameters' gradients after a backward pass, and clear them.

        Args:
            more: another pass of the same step follows: add up in float32 at once. The gradients of a single pass
                are kept as they are.
        """
        new = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if self.fused is None:
            self._add(new)
            return
        if any(gradient is not None for gradient in self.gradients):
            self._add_fused(self.gradients)
            self.gradients = [None] * len(self.parameters)
        if more or any(self.summed):
            self._add_fused(new)
        else:
            self.gradients = [None if gradient is None else _readable(gradient) for gradient in new]

    def _add(self, new: list[torch.Tensor | None]) -> None:
        for number, gradient in enumerate(new):
            known = self.gradients[number]
            if gradient is None:
                continue
            if known is None:
                self.gradients[number] = gradient.to(torch.float32)
            else:
                known.add_(gradient)

    def _add_fused(self, new: list[torch.Tensor | None]) -> None:
        assert self.fused is not None
        if self.sums is None:
            self.sums = torch.empty_like(self.flat_master)
        first = not any(self.summed)
        self.fused.accumulate(self.sums, [None if g is None else _readable(g) for g in new], first=first)
        self.summed = [known or g is not None for known, g in zip(self.summed, new, strict=True)]

    def _final(self) -> list[torch.Tensor | None]:
        """The step's gradients, wherever they are."""
        if self.sums is None or not any(self.summed):
            return self.gradients
        views = self.layout.views(self.sums)
        return [view if known else None for view, known in zip(views, self.summed, strict=True)]

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """L2 norm of the accumulated gradient: a float32 scalar on the parameters' device (reading it waits)."""
        gradients = self._final()
        if self.fused is not None:
            return self.fused.norm(gradients)
        found = [gradient for gradient in gradients if gradient is not None]
        return torch.nn.utils.get_total_norm(found) if found else torch.zeros((), device=self.device)

    @torch.no_grad()
    def gradient_norms(self) -> dict[str, float | None]:
        """L2 norm of each parameter's accumulated gradient by name; None where it has none (this waits)."""
        norms = [None if g is None else g.float().norm() for g in self._final()]
        known = torch.stack([norm for norm in norms if norm is not None] or [torch.zeros(())]).tolist()
        values = iter(known)
        return {name: None if n is None else next(values) for name, n in zip(self.names, norms, strict=True)}

    @torch.no_grad()
    def update(self, learning_rate: float, norm: torch.Tensor) -> None:
        """Clip to ``max_grad_norm``, make one AdamW step, write the masters into the parameters.

        Args:
            learning_rate: of this step.
            norm: of the gradient, from :meth:`grad_norm`. Where it is not finite, nothing is updated.
        """
        if self.fused is not None:
            self.fused.update(self, self._final(), learning_rate, norm)
        elif bool(torch.isfinite(norm)):
            self._update(learning_rate, float(norm))
        self.clear()

    def _update(self, learning_rate: float, norm: float) -> None:
        config = self.config
        factor = min(1.0, config.max_grad_norm / (norm + 1e-6)) if config.max_grad_norm > 0 else 1.0
        if factor < 1.0:  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_([gradient for gradient in self.gradients if gradient is not None], factor)
        for decayed in (True, False):
            chosen = [
                number
                for number, gradient in enumerate(self.gradients)
                if gradient is not None and self.decayed[number] is decayed
            ]
            self._adamw(chosen, learning_rate, config.weight_decay if decayed else 0.0)
        self.publish()

    def _adamw(self, chosen: list[int], learning_rate: float, weight_decay: float) -> None:
        if not chosen:
            return
        first, second = (self.moments[name] for name in MOMENTS)
        steps = [self.steps_P[number].to(torch.float32) for number in chosen]
        adamw(
            [self.masters[number] for number in chosen],
            [gradient for number in chosen if (gradient := self.gradients[number]) is not None],
            [first[number] for number in chosen],
            [second[number] for number in chosen],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.config.adam_beta1,
            beta2=self.config.adam_beta2,
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self.config.adam_epsilon,
            maximize=False,
        )
        self.steps_P[chosen] = torch.stack(steps).to(torch.float64)

    def clear(self) -> None:
        """Forget every gradient."""
        for parameter in self.parameters:
            parameter.grad = None
        self.gradients = [None] * len(self.parameters)
        self.summed = [False] * len(self.parameters)

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the compute weights."""
        if self.flat_copy is not None:
            self.flat_copy.copy_(self.flat_master)

    @torch.no_grad()
    def restore_dtype(self, dtypes: list[torch.dtype]) -> None:
        """Give each parameter the dtype it came in, with the master's value, and a storage of its own."""
        for parameter, master, dtype in zip(self.parameters, self.masters, dtypes, strict=True):
            parameter.data = master.to(dtype, copy=True)
        for parameter, data in self.frozen:
            parameter.data = data

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name, for a checkpoint; 8-bit moments as they are, codes and scales."""
        tensors: dict[str, torch.Tensor] = {}
        for number, name in enumerate(self.names):
            tensors[f"master.{name}"] = self.masters[number]
            if self.steps_P[number] > 0:
                tensors[f"step.{name}"] = self.steps_P[number].to(torch.float32)
                tensors.update({f"{moment}.{name}": views[number] for moment, views in self.moments.items()})
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            KeyError: when a parameter is missing.
        """
        for number, name in enumerate(self.names):
            self.masters[number].copy_(tensors[f"master.{name}"])
            if f"step.{name}" in tensors:
                self.steps_P[number] = float(tensors[f"step.{name}"])
                for moment, views in self.moments.items():
                    views[number].copy_(tensors[f"{moment}.{name}"])
        self.publish()


class _Fused:
    """The kernels of :mod:`postgrad.kernels.triton_adamw` on this layout."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        from postgrad.kernels import triton_adamw

        self.kernels, self.device = triton_adamw, device
        sizes_P = torch.tensor(layout.sizes, dtype=torch.int64, device=device)
        self.blocks = triton_adamw.Blocks(*layout.table(device), sizes_P, layout.decayed_blocks)

    def _addresses(self, gradients: list[torch.Tensor | None]) -> tuple[torch.Tensor, torch.dtype]:
        places = torch.tensor([0 if g is None else g.data_ptr() for g in gradients], dtype=torch.int64)
        dtype = next((g.dtype for g in gradients if g is not None), torch.float32)
        if self.device.type == "cuda":
            places = places.pin_memory()
        return places.to(self.device, non_blocking=True), dtype

    def accumulate(self, sums: torch.Tensor, gradients: list[torch.Tensor | None], first: bool) -> None:
        addresses_P, dtype = self._addresses(gradients)
        self.kernels.accumulate(sums, addresses_P, self.blocks, dtype, first)

    def norm(self, gradients: list[torch.Tensor | None]) -> torch.Tensor:
        addresses_P, dtype = self._addresses(gradients)
        return self.kernels.norm(addresses_P, self.blocks, dtype)

    def update(
        self, owner: MasterOptimizer, gradients: list[torch.Tensor | None], rate: float, norm: torch.Tensor
    ) -> None:
        config = owner.config
        addresses_P, dtype = self._addresses(gradients)
        self.kernels.update(
            owner.flat_master,
            tuple(owner.flat_moments),
            owner.flat_copy,
            addresses_P,
            self.blocks,
            dtype,
            owner.steps_P,
            norm,
            rate=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_norm=config.max_grad_norm,
            seed=int(torch.randint(2**31 - 1, ())) if config.moments_rounded else 0,
        )


def _readable(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as the kernels read it: dense, and aligned to 16 bytes."""
    if gradient.is_contiguous() and gradient.data_ptr() % 16 == 0:
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


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
