"""AdamW's moments as 8-bit codes: one byte an element and one float32 scale per group of 256 elements.

Optimizer states in blocks of codes with a scale each are from arXiv:2110.02861. The map here is in closed form: code c
of ``top`` stands for scale · (c / top)⁴, where the scale is the group's largest magnitude.

- The fourth power keeps small elements beside large ones: the smallest code of m (top 127, a sign beside it) is
  3.8e-9 of the scale, that of v (top 255) 2.4e-10, which is 1.5e-5 after the square root. Neighbouring codes near the
  scale differ by 3.1% and 1.6%.
- A nonzero v never becomes code 0. It would decode to 0, and the update would be m / ε: the zero-point problem of
  arXiv:2309.01507.
- Rounding is by chance, with a probability linear in the value. In the long run v changes by a thousandth of itself a
  step, far less than a code: rounded to the nearest or upwards it would stay where it is for ever. By chance it changes
  as it should on average, and so does m, in which the update is linear.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 256  # elements that share a scale
TOP_SIGNED = tl.constexpr(127)
TOP = tl.constexpr(255)


@triton.jit
def lanes(BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Places within a block, shape (BLOCK // GROUP, GROUP): a row is a group."""
    return tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def decoded_signed(codes, scale):
    """m of uint8 codes, shape (groups, GROUP), and scales, shape (groups,)."""
    magnitude = scale[:, None] * _share((codes & 127).to(tl.float32), TOP_SIGNED)
    return tl.where(codes > 127, -magnitude, magnitude)


@triton.jit
def decoded(codes, scale):
    """v of uint8 codes; shapes as in :func:`decoded_signed`."""
    return scale[:, None] * _share(codes.to(tl.float32), TOP)


@triton.jit
def encoded_signed(x, bits):
    """Codes and scales of m: a sign bit, and seven bits of magnitude.

    Args:
        x: float32, shape (groups, GROUP).
        bits: uint32, of the same shape; the low 16 are random.
    """
    magnitude = tl.abs(x)
    codes, scale = _nearby(magnitude, bits, TOP_SIGNED)
    return codes.to(tl.uint8) | tl.where(x < 0, 128, 0).to(tl.uint8), scale


@triton.jit
def encoded(x, bits):
    """Codes and scales of v; arguments as in :func:`encoded_signed`, x at least 0."""
    codes, scale = _nearby(x, bits, TOP)
    return tl.where(x > 0, tl.maximum(codes, 1.0), 0.0).to(tl.uint8), scale


@triton.jit
def _share(code, TOP: tl.constexpr):
    """What part of the scale a code stands for."""
    root = code / TOP
    square = root * root
    return square * square


@triton.jit
def _nearby(x, bits, TOP: tl.constexpr):
    """One of the two codes around each x, by chance, so that the mean is x; and the scales."""
    scale = tl.max(x, axis=1)
    share = x / tl.where(scale > 0, scale, 1.0)[:, None]
    # A root that is a little off costs nothing: the chance below is of the code it gave, whichever that is.
    lower = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(share)) * TOP), TOP - 1.0)
    low, high = _share(lower, TOP), _share(lower + 1, TOP)
    uniform = ((bits & 0xFFFF).to(tl.float32) + 0.5) / 65536
    return lower + tl.where(uniform * (high - low) < share - low, 1.0, 0.0), scale
