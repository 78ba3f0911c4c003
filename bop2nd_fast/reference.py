"""THE SPECIFICATION: what every operator of bop2nd_fast computes, in plain torch.

Slow and obvious on purpose. It imports nothing of this package, runs on any device torch knows, and is
the oracle every kernel is compared with: bit for bit where bits are the result.

Conventions (all of them are tested):

* **Sign bit.** ``sign(x)`` is -1 iff ``x < 0``; so +0.0, -0.0 and NaN give +1. Bit 1 means -1.
* **Words.** 32 elements to an int32, element ``e`` of a row is bit ``e % 32`` (least significant
  first) of word ``e // 32``; tail bits are 0. The packed axis is always the last axis of the words.
* **Walk order.** A tensor of logical shape ``S`` packed along ``dim`` is walked with ``dim`` innermost;
  the step receives moments and gradients already viewed that way (``movedim(dim, -1)``).
* **Rounding.** The step computes in fp32, each operation rounded on its own (no fused multiply-add).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.grad import conv2d_input, conv2d_weight

WORD_BITS = 32


# ------------------------------------------------------------------------------------------- packing


def _pack_bools(bits: Tensor, dim: int) -> Tensor:
    """Pack booleans along ``dim`` into int32 words; the packed axis becomes the last one."""
    bits = bits.movedim(dim, -1)
    n_words = -(-bits.shape[-1] // WORD_BITS)
    bits = F.pad(bits.to(torch.int64), (0, n_words * WORD_BITS - bits.shape[-1]))
    lanes = bits.reshape(*bits.shape[:-1], n_words, WORD_BITS)
    words = (lanes << torch.arange(WORD_BITS, device=bits.device)).sum(-1)
    return words.to(torch.int32)  # wraps: bit 31 becomes the sign of the int32


def pack_bits(x: Tensor, dim: int = -1) -> Tensor:
    """Sign bits of ``x`` along ``dim`` -> int32 words, packed axis last, ``ceil(length / 32)`` words."""
    return _pack_bools(x < 0, dim)


def pack_bits_ste(x: Tensor, dim: int = -1, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Sign bits and the straight-through estimator's mask (bit 1 where ``|x| <= 1``), both packed.

    With ``groups > 1`` every group of ``dim`` is padded to whole words of its own.
    """
    grouped = x.movedim(dim, -1).unflatten(-1, (groups, x.shape[dim] // groups))
    return _pack_bools(grouped < 0, -1).flatten(-2), _pack_bools(grouped.abs() <= 1, -1).flatten(-2)


def apply_mask_(grad: Tensor, mask: Tensor) -> None:
    """Clear the elements of ``grad`` ``[..., L]`` whose bit in ``mask`` ``[..., words(L)]`` is 0."""
    grad.masked_fill_(~unpack_flags(mask, grad.shape[-1]), 0)


def unpack_flags(words: Tensor, length: int) -> Tensor:
    """Words ``[..., W]`` -> booleans ``[..., length]``."""
    shifts = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 1).bool().flatten(-2)[..., :length]


def unpack_bits(words: Tensor, length: int, dim: int = -1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words -> tensor of +1 / -1 in ``dtype``, the packed axis moved back to ``dim``."""
    negative = unpack_flags(words, length)
    one = torch.ones((), dtype=dtype, device=words.device)
    return torch.where(negative, -one, one).movedim(-1, dim)


# -------------------------------------------------------------------------------------------- the step


def exact_sqrt(x: Tensor) -> Tensor:
    """Correctly rounded fp32 square root. torch's own CPU root is one ulp off for a fifth of inputs."""
    return x.double().sqrt().float()


def bop_rule(
    grad: Tensor, m: Tensor, v: Tensor | None, negative: Tensor, hyper: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """THE UPDATE RULE on fp32 values. ``hyper`` is fp32 ``[gamma, sigma, a, b]``.

    Returns the new moments, the candidates (sign of ``m`` equals the weight, so a flip would follow
    the gradient downhill) and the flips among them. Source: arXiv 2104.05124, algorithms 1 and 2;
    ``a`` and ``b`` absorb threshold, epsilon and bias correction (see ``optim.thresholds``).
    """
    gamma, sigma, a, b = hyper.unbind()
    m = m + gamma * (grad - m)
    bound = b.expand_as(m)
    if v is not None:
        v = v + sigma * (grad * grad - v)
        bound = a * exact_sqrt(v) + b
    candidates = (m < 0) == negative
    flips = candidates & (m.abs() > bound)
    return m, v, candidates, flips


def mix32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (two multiplications, three xor-shifts) on int64 tensors holding uint32."""
    mask = 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & mask
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & mask
    return x ^ (x >> 16)


def rounding_bits(seed: Tensor, tensor_index: int, n_elements: int) -> Tensor:
    """Random uint32 (in int64) for each element in walk order; a pure function of its arguments.

    ``seed`` is int64 ``[2]``: the user's seed and the step count. Bits 0..15 round ``m``, 16..31 ``v``.
    """
    mask = 0xFFFFFFFF
    key = torch.zeros((), dtype=torch.int64, device=seed.device)
    for part in (seed[0] & mask, (seed[0] >> 32) & mask, seed[1] & mask):
        key = mix32(key ^ part)
    key = mix32(key ^ tensor_index)
    index = torch.arange(n_elements, device=seed.device)
    return mix32((index & mask) ^ ((key + (index >> 32) * 0x9E3779B9) & mask))


def round_bf16_stochastic(x: Tensor, random16: Tensor) -> Tensor:
    """fp32 -> bf16: add 16 random bits below the cut, truncate. Infinities stay, NaN stays NaN."""
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    special = (bits & 0x7F800000) == 0x7F800000
    rounded = torch.where(special, bits, bits + random16)
    is_nan = special & ((bits & 0x007FFFFF) != 0)
    top = ((rounded >> 16) & 0xFFFF) | torch.where(is_nan, 0x40, 0)
    return top.to(torch.int16).view(torch.bfloat16)


def bop_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    hyper: Tensor,
    counts: Tensor,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """One optimizer step on a list of parameters, in place. See ``ops/bop_step.py`` for the contract."""
    counts.zero_()
    if found_inf is not None and bool(found_inf != 0):
        return
    for i, (weight, grad, exp_avg) in enumerate(zip(weights, grads, exp_avgs, strict=True)):
        exp_avg_sq = exp_avg_sqs[i] if exp_avg_sqs else None
        g = grad.float()
        if inv_scale is not None:
            g = g * inv_scale.float()
        if maximize:
            g = -g
        packed = weight.dtype == torch.int32
        negative = unpack_flags(weight, grad.shape[-1]) if packed else weight < 0
        v = None if exp_avg_sq is None else exp_avg_sq.float()
        m, v, candidates, flips = bop_rule(g, exp_avg.float(), v, negative, hyper)
        for state, new, shift in ((exp_avg, m, 0), (exp_avg_sq, v, 16)):
            if state is None or new is None:
                continue
            if state.dtype == torch.bfloat16:
                assert seed is not None
                random = rounding_bits(seed, i, new.numel()).view(new.shape)
                new = round_bf16_stochastic(new, (random >> shift) & 0xFFFF)
            state.copy_(new)
        if packed:
            weight.bitwise_xor_(_pack_bools(flips, -1))
        else:
            weight.copy_(torch.where(flips, -weight, weight))
        counts[i, 0] = candidates.sum()
        counts[i, 1] = flips.sum()


# ------------------------------------------------------------------------- binary linear and convolution


def binary_linear(input: Tensor, weight_words: Tensor, ste_clip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``sign(input) @ W.T``; returns (output, sign words of input, mask words or an empty tensor)."""
    signs, mask = _pack_activation(input, -1, 1, ste_clip)
    weight = unpack_bits(weight_words, input.shape[-1], dtype=torch.float64)
    x = unpack_bits(signs, input.shape[-1], dtype=torch.float64)
    return (x @ weight.T).to(input.dtype), signs, mask


def binary_conv2d(
    input: Tensor,
    weight_words: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_value: int,
    ste_clip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of ``sign(input)`` ``[N, C, H, W]`` with packed ``[O, kH, kW, words(C/groups)]``.

    Padded taps count as ``padding_value`` (0, +1 or -1). Returns (output in the memory format of ``input``,
    sign words, mask words), the words as ``[N, H, W, groups * words(C/groups)]``: each group starts on a word
    of its own.
    """
    signs, mask = _pack_activation(input, 1, groups, ste_clip)
    per_group = input.shape[1] // groups
    weight = unpack_bits(weight_words, per_group, dim=1, dtype=torch.float64)
    x = torch.where(input < 0, -1.0, 1.0).double()
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=float(padding_value))
    out = _convolve(x, weight, stride, dilation, groups)
    return out.to(input.dtype).contiguous(memory_format=suggest_memory_format(input)), signs, mask


def _convolve(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """torch's convolution, which does not know sums of nothing."""
    if x.numel() and weight.numel():
        return F.conv2d(x, weight, None, stride, 0, dilation, groups)
    size = [(x.shape[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return x.new_zeros(x.shape[0], weight.shape[0], *size)


def binary_linear_backward(
    grad_output: Tensor, signs: Tensor, mask: Tensor, weight_words: Tensor, in_features: int
) -> tuple[Tensor, Tensor]:
    """Both gradients of :func:`binary_linear`, from what it keeps.

        grad_input[m, k]  = inside[m, k] * sum_n grad_output[m, n] * weight[n, k]    dtype of grad_output
        grad_weight[n, k] = sum_m grad_output[m, n] * sign[m, k]                     fp32

    ``inside`` is the estimator's mask (1 everywhere, if ``mask`` is empty). The sums are fp64 here; kernels
    sum in fp32 in an order of their own, so that they agree to rounding, to the bit where no sum rounds.
    """
    weight = unpack_bits(weight_words, in_features, dtype=torch.float64)
    sign = unpack_bits(signs, in_features, dtype=torch.float64).flatten(0, -2)
    grad = grad_output.double().flatten(0, -2)
    grad_input = (grad @ weight).to(grad_output.dtype).view(*grad_output.shape[:-1], in_features)
    if mask.numel():
        apply_mask_(grad_input, mask)
    return grad_input, (grad.T @ sign).float()


def binary_conv2d_backward(
    grad_output: Tensor,
    signs: Tensor,
    mask: Tensor,
    weight_words: Tensor,
    in_channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_value: int,
) -> tuple[Tensor, Tensor]:
    """Both gradients of :func:`binary_conv2d`, from what it keeps: those of a dense convolution of signs.

    The border of ``padding_value`` is cut off again, the input's gradient is masked and has the memory
    format of ``grad_output``. Dtypes and rounding as
    for :func:`binary_linear_backward`.
    """
    per_group = in_channels // groups
    weight = unpack_bits(weight_words, per_group, dim=1, dtype=torch.float64)
    lanes = unpack_bits(signs.unflatten(-1, (groups, -1)), per_group, dtype=torch.float64)
    x = lanes.flatten(-2).movedim(-1, 1)
    (height, width), (rows, columns) = x.shape[2:], padding
    wide = F.pad(x, (columns, columns, rows, rows), value=float(padding_value))
    grad, how = grad_output.double(), (stride, 0, dilation, groups)
    grad_weight = conv2d_weight(wide, weight.shape, grad, *how)
    grad_wide = conv2d_input(wide.shape, weight, grad, *how)
    grad_input = grad_wide[:, :, rows : rows + height, columns : columns + width].to(grad_output.dtype)
    if mask.numel():
        inside = unpack_flags(mask.unflatten(-1, (groups, -1)), per_group).flatten(-2).movedim(-1, 1)
        grad_input = torch.where(inside, grad_input, 0)
    layout = suggest_memory_format(grad_output)
    return grad_input.contiguous(memory_format=layout), grad_weight.float()


def _pack_activation(input: Tensor, dim: int, groups: int, ste_clip: bool) -> tuple[Tensor, Tensor]:
    """Sign words of an activation, and its mask words where the estimator clips (else an empty tensor)."""
    signs, mask = pack_bits_ste(input, dim, groups)
    return signs, mask if ste_clip else signs.new_empty(0)


def epilogue(
    dot: Tensor,
    values: bool = True,
    signs: bool = False,
    threshold: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    low: int | None = None,
    high: int | None = None,
    relu: bool = False,
    slope: Tensor | None = None,
    post_shift: Tensor | None = None,
    sign_shift: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What becomes of dots ``[..., O]`` (fp32, or exact int32): (values or empty, sign words or empty).

    ``value = act(clamp(dot, low, high) * input_scale * scale + shift + residual) + post_shift``, only what is
    given, every operation (and the way from int32) rounded on its own in fp32; values are rounded to
    ``dtype`` at the end. ``act``: none, or with ``relu`` 0 where its argument is below 0, or with ``slope``
    that times the argument there. ``low`` and ``high`` are whole numbers; ``residual`` has the values' shape
    and ``dtype``; ``input_scale`` (products of real and 8-bit inputs only) fits ``[..., 1]``; what else is
    given is fp32 ``[O]``. Bit 1 (-1) where ``dot < threshold`` (int32 ``[O]``), without thresholds where
    ``value + sign_shift < 0`` before anything is rounded to ``dtype``.

    What the operators refuse (``kernels/outputs.py``) is not looked at here.
    """
    value = (dot if low is None and high is None else dot.clamp(low, high)).float()
    value = value if input_scale is None else value * input_scale
    value = value if scale is None else value * scale
    value = value if shift is None else value + shift
    value = value if residual is None else value + residual.float()
    if relu:
        value = torch.where(value < 0, 0.0, value)
    if slope is not None:
        value = torch.where(value < 0, value * slope, value)
    value = value if post_shift is None else value + post_shift
    before_sign = value if sign_shift is None else value + sign_shift
    negative = before_sign < 0 if threshold is None else dot < threshold
    return (
        value.to(dtype) if values else dot.new_empty(0, dtype=dtype),
        _pack_bools(negative, -1) if signs else dot.new_empty(0, dtype=torch.int32),
    )


def binary_linear_packed(
    input_words: Tensor, weight_words: Tensor, in_features: int, **outputs: Any
) -> tuple[Tensor, Tensor]:
    """Words ``[M, W]`` x words ``[N, W]`` -> values ``[M, N]`` and sign words ``[M, words(N)]``.

    ``outputs``: what to emit, see :func:`epilogue`.
    """
    x = unpack_bits(input_words, in_features, dtype=torch.float64)
    dot = (x @ unpack_bits(weight_words, in_features, dtype=torch.float64).T).float()
    return epilogue(dot, **outputs)


def binary_conv2d_packed(
    input_words: Tensor,
    weight_words: Tensor,
    in_channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_value: int,
    **outputs: Any,
) -> tuple[Tensor, Tensor]:
    """Words ``[N, H, W, groups * words(C/groups)]`` -> values ``[N, Ho, Wo, O]`` (channels last) and sign
    words ``[N, Ho, Wo, words(O)]``. ``outputs``: what to emit, see :func:`epilogue`."""
    per_group = in_channels // groups
    lanes = unpack_flags(input_words.unflatten(-1, (groups, weight_words.shape[-1])), per_group).flatten(-2)
    x = torch.where(lanes, -1.0, 1.0).double().movedim(-1, 1)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=float(padding_value))
    weight = unpack_bits(weight_words, per_group, dim=1, dtype=torch.float64)
    dot = _convolve(x, weight, stride, dilation, groups).movedim(1, -1).float().contiguous()
    return epilogue(dot, **outputs)


# --------------------------------------------------------- signs times real numbers and 8-bit integers


def quantize_rows(x: Tensor, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """fp32 ``scale`` and int8 ``q`` with ``x ~ q * scale``, for each row (the last axis) or for all of ``x``.

    ``scale = max |x| / 127`` and ``q = clamp(round(x / scale), -127, 127)``, in fp32, halves to even; where
    ``scale`` is 0, ``q`` is. Returns ``q`` of the shape of ``x``, ``scale`` ``[...]`` (or ``[1]``).

    Raises:
        ValueError: infinite or NaN elements, with the number of rows that have any.
    """
    wide = x.float()
    if not bool((finite := wide.isfinite()).all()):
        bad = int((~finite).flatten(0, -2).any(-1).sum()) if x.dim() > 1 else 1
        raise ValueError(f"{bad} of {wide[..., :1].numel()} rows have infinite or NaN elements")
    size = wide.abs()
    if x.numel() == 0:
        most = size.new_zeros(x.shape[:-1] if per_row else (1,))
    else:
        most = size.amax(-1) if per_row else size.amax().view(1)
    scale = most / torch.full_like(most, 127)  # GPUs multiply by the reciprocal of a number: other bits
    divisor = scale[..., None] if per_row else scale
    q = torch.where(divisor == 0, 0.0, wide / divisor).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def signed_dots(x: Tensor, signs: Tensor) -> Tensor:
    """fp32 rows ``[M, K]`` times +-1 ``[N, K]`` -> ``[M, N]``, summed in THE ORDER OF SIGNED SUMS.

    Both are filled up with zeros to a multiple of 32. Of 32 products, four neighbours make
    ``g = (p[0] + p[1]) + (p[2] + p[3])``, and these eight make
    ``(((g[0] + g[2]) + g[4]) + g[6]) + (((g[1] + g[3]) + g[5]) + g[7])``. These sums are added, one after
    another, to +0. Every addition is rounded to fp32 by itself.
    """
    fill = -x.shape[1] % WORD_BITS
    x, signs = F.pad(x, (0, fill)), F.pad(signs, (0, fill))
    total = x.new_zeros(x.shape[0], signs.shape[0])
    for start in range(0, x.shape[1], WORD_BITS):
        part = slice(start, start + WORD_BITS)
        p = (x[:, None, part] * signs[None, :, part]).unflatten(-1, (8, 2, 2))
        pairs = p[..., 0] + p[..., 1]
        g = (pairs[..., 0] + pairs[..., 1]).unbind(-1)
        total = total + ((((g[0] + g[2]) + g[4]) + g[6]) + (((g[1] + g[3]) + g[5]) + g[7]))
    return total


def signed_linear(
    input: Tensor, weight_words: Tensor, multiplier: int = 1, zero_point: int = 0, **outputs: Any
) -> tuple[Tensor, Tensor]:
    """``[..., K]`` times words ``[O, W]`` -> values ``[..., O]`` and sign words, see :func:`epilogue`.

    Real inputs are widened to fp32 and summed by :func:`signed_dots`; of integers (int8, uint8)
    ``sum +-(multiplier * x - zero_point)`` is exact in int32.
    """
    rows = input.shape[:-1]
    image = input.reshape(rows.numel(), input.shape[-1], 1, 1)
    dots = _signed_dots_of_images(
        image, weight_words[:, None, None], multiplier, zero_point, [1, 1], [0, 0], [1, 1], 1
    )
    dots = dots.view(*rows, weight_words.shape[0])
    scale = outputs.pop("input_scale", None)
    if scale is not None and scale.numel() != 1:
        scale = scale.view(*rows, 1)
    return epilogue(dots, input_scale=scale, **outputs)


def signed_conv2d(
    input: Tensor,
    weight_words: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: int = 1,
    zero_point: int = 0,
    **outputs: Any,
) -> tuple[Tensor, Tensor]:
    """``[N, C, H, W]`` with words ``[O, kH, kW, words(C/groups)]`` -> values ``[N, Ho, Wo, O]``, sign words.

    As :func:`signed_linear`, over taps row by row and, within a tap, the channels of the group, filled up
    with zeros to a multiple of four. Padded taps are left out.
    """
    arguments = (stride, padding, dilation, groups)
    dots = _signed_dots_of_images(input, weight_words, multiplier, zero_point, *arguments)
    scale = outputs.pop("input_scale", None)
    if scale is not None and scale.numel() != 1:
        scale = scale.view(-1, 1, 1, 1)
    return epilogue(dots, input_scale=scale, **outputs)


def _signed_dots_of_images(
    input: Tensor,
    weight_words: Tensor,
    multiplier: int,
    zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Dots ``[N, Ho, Wo, O]``: fp32 of real inputs, else int32."""
    per_group = input.shape[1] // groups
    around = (padding[1], padding[1], padding[0], padding[0])
    if not input.is_floating_point():
        weight = unpack_bits(weight_words, per_group, dim=1, dtype=torch.float64)
        x = F.pad(input.double() * multiplier - zero_point, around)
        return _convolve(x, weight, stride, dilation, groups).movedim(1, -1).to(torch.int32).contiguous()
    weight = unpack_bits(weight_words, per_group)  # [O, kH, kW, C / groups]
    x = F.pad(input.float(), around)
    kernel = weight_words.shape[1:3]
    size = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    taps = [
        x[:, :, i * dilation[0] :: stride[0], j * dilation[1] :: stride[1]][:, :, : size[0], : size[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    seen = torch.stack(taps).permute(1, 3, 4, 0, 2)  # [N, Ho, Wo, taps, C]
    fill = (0, -per_group % 4)
    outputs = weight_words.shape[0] // groups
    results = []
    for g in range(groups):
        rows = F.pad(seen[..., g * per_group : (g + 1) * per_group], fill).flatten(-2)
        signs = F.pad(weight[g * outputs : (g + 1) * outputs], fill).flatten(1)
        flat = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
        results.append(signed_dots(flat, signs).view(*rows.shape[:-1], outputs))
    return torch.cat(results, -1)
