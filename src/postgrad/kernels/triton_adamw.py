"""AdamW over all parameters in one launch: float32 masters, moments and the compute copy in one pass over memory.

Masters, moments and copies lie in flat buffers cut into blocks, each of one parameter; gradients stay where autograd
left them and are found through a table of their addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from postgrad.kernels.triton_codes import GROUP, decoded, decoded_signed, encoded, encoded_signed, lanes

BLOCK = 1024  # elements a thread block updates


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where each block's parameter lies.

    Args:
        parameter_B: int32, shape (blocks,): number of the parameter.
        start_B: int64, shape (blocks,): first element of the block within its parameter.
        sizes_P: int64, shape (parameters,): elements of each parameter.
        decayed: how many leading blocks have weight decay.
    """

    parameter_B: torch.Tensor
    start_B: torch.Tensor
    sizes_P: torch.Tensor
    decayed: int


@triton.jit
def _gradient(block, ADDRESSES, PARAMETER, START, SIZES, lane, DTYPE: tl.constexpr):
    """This block's gradient in float32, and whether there is one."""
    parameter = tl.load(PARAMETER + block)
    address = tl.load(ADDRESSES + parameter)
    offsets = tl.load(START + block) + lane
    here = offsets < tl.where(address != 0, tl.load(SIZES + parameter), 0)
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return tl.load(pointer + offsets, mask=here, other=0.0).to(tl.float32), here


@triton.jit
def _accumulate_kernel(
    SUMS, ADDRESSES, PARAMETER, START, SIZES, FIRST: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    block, lane = tl.program_id(0), tl.arange(0, BLOCK)
    g, here = _gradient(block, ADDRESSES, PARAMETER, START, SIZES, lane, DTYPE)
    place = SUMS + block.to(tl.int64) * BLOCK + lane
    if FIRST:
        tl.store(place, g)
    else:
        tl.store(place, tl.load(place, mask=here, other=0.0) + g, mask=here)


@triton.jit
def _square_kernel(PARTS, ADDRESSES, PARAMETER, START, SIZES, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    block, lane = tl.program_id(0), tl.arange(0, BLOCK)
    g, _ = _gradient(block, ADDRESSES, PARAMETER, START, SIZES, lane, DTYPE)
    tl.store(PARTS + block, tl.sum(g * g))


@triton.jit
def _rounded(x, bits, DTYPE: tl.constexpr):
    """To the moments' dtype: bf16 by chance in proportion, so that small changes are kept on average."""
    if tl.float32 == DTYPE:
        return x
    raw = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return ((raw & 0xFFFF0000).to(tl.float32, bitcast=True)).to(DTYPE)


@triton.jit
def _clipped(block, ADDRESSES, PARAMETER, START, SIZES, lane, NORM, max_norm, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """This block's gradient, clipped by the norm, and which lanes are updated: none where the norm is not finite."""
    norm = tl.load(NORM)
    g, here = _gradient(block, ADDRESSES, PARAMETER, START, SIZES, lane, DTYPE)
    here = here & (lane < tl.where(norm < float("inf"), BLOCK, 0))  # neither is NaN: nothing is updated from it
    if max_norm > 0:
        g = g * tl.minimum(1.0, max_norm / (norm + 1e-6))
    return tl.where(here, g, 0.0), here


@triton.jit
def _stepped(block, master, m, v, g, PARAMETER, CORRECTIONS, rate, beta1, beta2, epsilon, decay, decayed, parameters):
    """Master and moments after AdamW's step."""
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    parameter = tl.load(PARAMETER + block)
    correction1, correction2 = tl.load(CORRECTIONS + parameter), tl.load(CORRECTIONS + parameters + parameter)
    kept = tl.where(block < decayed, 1 - rate * decay, 1.0)
    return master * kept - (rate / correction1) * m / (tl.sqrt(v) / correction2 + epsilon), m, v


@triton.jit
def _update_kernel(
    MASTER, FIRST_MOMENT, SECOND_MOMENT, COPY, ADDRESSES, PARAMETER, START, SIZES, CORRECTIONS, NORM, max_norm, rate,
    beta1, beta2, epsilon, decay, decayed, parameters, seed,
    DTYPE: tl.constexpr, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, lane = tl.program_id(0), tl.arange(0, BLOCK)
    g, here = _clipped(block, ADDRESSES, PARAMETER, START, SIZES, lane, NORM, max_norm, DTYPE, BLOCK)
    place = block.to(tl.int64) * BLOCK + lane
    master = tl.load(MASTER + place, mask=here, other=0.0)
    m = tl.load(FIRST_MOMENT + place, mask=here, other=0.0).to(tl.float32)
    v = tl.load(SECOND_MOMENT + place, mask=here, other=0.0).to(tl.float32)
    master, m, v = _stepped(
        block, master, m, v, g, PARAMETER, CORRECTIONS, rate, beta1, beta2, epsilon, decay, decayed, parameters
    )
    tl.store(MASTER + place, master, mask=here)
    kind: tl.constexpr = FIRST_MOMENT.dtype.element_ty
    bits = tl.zeros([BLOCK], tl.uint32)
    if tl.float32 != kind:
        bits = tl.randint(seed, place.to(tl.uint32)).to(tl.uint32, bitcast=True)
    tl.store(FIRST_MOMENT + place, _rounded(m, bits, kind), mask=here)
    tl.store(SECOND_MOMENT + place, _rounded(v, bits >> 16, kind), mask=here)
    if HAS_COPY:
        tl.store(COPY + place, master.to(COPY.dtype.element_ty), mask=here)


@triton.jit
def _update_8bit_kernel(
    MASTER, FIRST_MOMENT, SECOND_MOMENT, FIRST_SCALE, SECOND_SCALE, COPY, ADDRESSES, PARAMETER, START, SIZES,
    CORRECTIONS, NORM, max_norm, rate, beta1, beta2, epsilon, decay, decayed, parameters, seed,
    DTYPE: tl.constexpr, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, lane = tl.program_id(0), lanes(BLOCK, GROUP)
    g, here = _clipped(block, ADDRESSES, PARAMETER, START, SIZES, lane, NORM, max_norm, DTYPE, BLOCK)
    place = block.to(tl.int64) * BLOCK + lane
    group = block.to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    touched = tl.max(here.to(tl.int32), axis=1) > 0
    master = tl.load(MASTER + place, mask=here, other=0.0)
    scale1 = tl.load(FIRST_SCALE + group, mask=touched, other=0.0)
    scale2 = tl.load(SECOND_SCALE + group, mask=touched, other=0.0)
    m = decoded_signed(tl.load(FIRST_MOMENT + place, mask=here, other=0), scale1)
    v = decoded(tl.load(SECOND_MOMENT + place, mask=here, other=0), scale2)
    # Lanes past the parameter's end have no gradient and no moments: they leave the groups' largest as it is.
    master, m, v = _stepped(
        block, master, m, v, g, PARAMETER, CORRECTIONS, rate, beta1, beta2, epsilon, decay, decayed, parameters
    )
    tl.store(MASTER + place, master, mask=here)
    bits = tl.randint(seed, place.to(tl.uint32)).to(tl.uint32, bitcast=True)
    codes1, scale1 = encoded_signed(m, bits)
    codes2, scale2 = encoded(v, bits >> 16)
    tl.store(FIRST_MOMENT + place, codes1, mask=here)
    tl.store(SECOND_MOMENT + place, codes2, mask=here)
    tl.store(FIRST_SCALE + group, scale1, mask=touched)
    tl.store(SECOND_SCALE + group, scale2, mask=touched)
    if HAS_COPY:
        tl.store(COPY + place, master.to(COPY.dtype.element_ty), mask=here)


def accumulate(sums: torch.Tensor, addresses_P: torch.Tensor, blocks: Blocks, dtype: torch.dtype, first: bool) -> None:
    """Add gradients to flat float32 sums (``first``: write them).

    Args:
        sums: float32, shape (blocks · BLOCK,).
        addresses_P: int64, where each parameter's gradient lies; 0 where there is none.
        blocks: the layout.
        dtype: of the gradients.
        first: overwrite what was there.
    """
    _accumulate_kernel[(len(blocks.parameter_B),)](
        sums, addresses_P, blocks.parameter_B, blocks.start_B, blocks.sizes_P,
        FIRST=first, DTYPE=_triton(dtype), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def norm(addresses_P: torch.Tensor, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """L2 norm of all gradients, a float32 scalar on their device; arguments as in :func:`accumulate`."""
    parts_B = torch.empty(len(blocks.parameter_B), dtype=torch.float32, device=addresses_P.device)
    _square_kernel[(len(parts_B),)](
        parts_B, addresses_P, blocks.parameter_B, blocks.start_B, blocks.sizes_P,
        DTYPE=_triton(dtype), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return parts_B.sum(dtype=torch.float64).sqrt().to(torch.float32)


def update(
    master: torch.Tensor,
    moments: tuple[torch.Tensor, ...],
    copy: torch.Tensor | None,
    addresses_P: torch.Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
    steps_P: torch.Tensor,
    norm: torch.Tensor,
    *,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    max_norm: float,
    seed: int,
) -> None:
    """One AdamW step (arXiv:1711.05101, algorithm 2) with the gradients clipped to ``max_norm`` (0: not clipped).

    Args:
        master: float32, flat; updated.
        moments: m and v, flat, float32 or bf16 (then rounded by chance); updated. With four tensors they are 8-bit
            codes as in :mod:`postgrad.kernels.triton_codes`, uint8, flat, followed by their scales, float32, shape
            (blocks · BLOCK / GROUP,).
        copy: the compute weights, flat; written. None where the masters are computed with.
        addresses_P, blocks, dtype: the gradients, as in :func:`accumulate`.
        steps_P: float64, shape (parameters,): updates of each parameter so far; counted on.
        norm: their norm, on the device; where it is not finite nothing is updated.
        rate, betas, epsilon, weight_decay: of AdamW.
        max_norm: largest norm.
        seed: of the rounding; another one for each step.
    """
    steps_P += (addresses_P != 0) & torch.isfinite(norm)
    corrections_2P = torch.stack([1 - betas[0] ** steps_P, (1 - betas[1] ** steps_P).sqrt()]).to(torch.float32)
    arguments = (
        master, *moments, master if copy is None else copy, addresses_P, blocks.parameter_B, blocks.start_B,
        blocks.sizes_P, corrections_2P, norm, float(max_norm), float(rate), *betas, epsilon, float(weight_decay),
        blocks.decayed, len(steps_P), seed,
    )  # fmt: skip
    grid = (len(blocks.parameter_B),)
    constants = {"DTYPE": _triton(dtype), "HAS_COPY": copy is not None, "BLOCK": BLOCK, "num_warps": 4}
    if len(moments) == 2:
        _update_kernel[grid](*arguments, **constants)
    else:
        _update_8bit_kernel[grid](*arguments, **constants, GROUP=GROUP)


def _triton(dtype: torch.dtype) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
