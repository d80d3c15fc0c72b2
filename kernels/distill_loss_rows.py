"""Distillation loss in Triton: what one row needs, whatever the shape of the tile that its classes come in.

Numbers as in csrc/distill_loss/distill_loss.h: powers of two relative to the row's largest logit, ``scale = log2(e) /
tau``, sums in fp32. All functions work on tensors of any shape; what belongs to a row is broadcast by the caller.

===========  ==============================================================================================
DIVERGENCE   "forward_kl", "reverse_kl", "jsd", or "none" where the soft term is not computed
HARD         exp(s - largest) of the hard term: "none", "power" (the soft term's power, squared SQUARINGS times:
             temperatures 1, 2, 4), "own" (an exponential of its own)
===========  ==============================================================================================
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRETED

INF = tl.constexpr(float("inf"))
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
# Less than this part of the largest is no mass: the smallest normal float32, as in every backend.
LEAST = tl.constexpr(2.0**-126)
LEAST_POWER = tl.constexpr(-126.0)


# ---- a token: its label, its weight, what multiplies its loss and its gradient -----------------------------------


@triton.jit
def inverse_items(items, inverse, ITEMS: tl.constexpr):
    """1 / items, NaN where items is not finite and positive. ITEMS: "given" (inverse is it), "number" (in memory), or
    how many partial sums to add up."""
    # One return at the end: what follows one in a branch is compiled too.
    if ITEMS != "given":
        if ITEMS == "number":
            number = tl.load(items).to(tl.float32)
        else:
            number = tl.sum(tl.load(items + tl.arange(0, ITEMS)), axis=0)
        inverse = tl.where((number > 0) & (number < INF), tl.div_rn(1.0, number), float("nan"))
    return inverse


@triton.jit
def token_of(
    labels, weights, row, in_tokens, classes, ignore_index, HAS_LABELS: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):
    """(label, weight, used, spoiled): used tokens take part; of these the spoiled ones have a label or a weight out of
    its range, and are NaN."""
    label = row * 0
    weight = row.to(tl.float32) * 0 + 1
    used = in_tokens
    spoiled = row < 0
    if HAS_LABELS:
        label = tl.load(labels + row, mask=in_tokens, other=0).to(tl.int64)
        used = used & (label != ignore_index)
        spoiled = spoiled | (label < 0) | (label >= classes)
    if HAS_WEIGHTS:
        weight = tl.load(weights + row, mask=in_tokens, other=0).to(tl.float32)
        used = used & (weight != 0)  # NaN is used
        spoiled = spoiled | (weight < 0) | (weight == INF) | (weight != weight)
    return label.to(tl.int32), weight, used, used & spoiled


@triton.jit
def row_offset(row, inner_rows, outer_stride, row_stride):
    """Of row in elements, 64 bits; rows in two levels as ``ops/rows.py`` tells them."""
    return row // inner_rows * outer_stride + row % inner_rows * row_stride


# ---- sums -----------------------------------------------------------------------------------------------------


@triton.jit
def base_of(largest):
    """What powers are relative to: the largest logit, and 0 where all are masked."""
    return tl.where(largest == -INF, 0.0, largest)


@triton.jit
def hard_power(s, es, s_top, HARD: tl.constexpr, SQUARINGS: tl.constexpr):
    """exp(s - s_top); es is the soft term's power."""
    if HARD == "own":
        return tl.exp2((s - s_top) * LOG2_E)
    for _ in tl.static_range(SQUARINGS):
        es = es * es
    return es


@triton.jit
def crossed(s, t, s_base, t_base, es, et, DIVERGENCE: tl.constexpr):
    """(w d, open, w of the classes that are not open, largest logit of the open ones), all but d by element.

    w d sums to KL, but for the normalisation; d without ``scale``. Open: masked by the one distribution and not by the
    other; where it has mass in that, KL is infinite.
    """
    # A difference of differences: 0 where both logits are equal, however products and sums are fused.
    d = (t - t_base) - (s - s_base)
    if DIVERGENCE == "reverse_kl":
        is_open = t == -INF
        weight, d, whose = es, -d, s
    else:
        is_open = s == -INF
        weight, whose = et, t
    product = tl.where((weight >= LEAST) & ~is_open, weight * d, 0.0)
    return product, tl.where(is_open, 0.0, weight), tl.where(is_open, whose, -INF)


@triton.jit
def moved(old, new):
    """old - new of a largest logit so far; 0 where there was none: its sums are 0, whatever they refer to."""
    return tl.where(old == -INF, 0.0, old - new)


@triton.jit
def cross_moved(cross, matched, s_moved, t_moved, scale, DIVERGENCE: tl.constexpr):
    """The sum of w d and that of w, where the logits they refer to have moved."""
    if DIVERGENCE == "reverse_kl":
        factor = tl.exp2(s_moved * scale)
        return factor * (cross + matched * (s_moved - t_moved)), factor * matched
    factor = tl.exp2(t_moved * scale)
    return factor * (cross + matched * (t_moved - s_moved)), factor * matched


@triton.jit
def is_positive(z):
    return (z > 0) & (z < INF)


# ---- from the sums to the loss and the gradient's coefficients ---------------------------------------------------


@triton.jit
def finish_hard(z, s_top, label_logit, smooth, count, smoothing, not_smoothing, SMOOTHING: tl.constexpr):
    """Cross-entropy. z: sum of exp(s - s_top); smooth, count: sum of s - s_top and number of the unmasked classes."""
    log_z = tl.log(z)
    value = tl.where(not_smoothing > 0, not_smoothing * ((s_top - label_logit) + log_z), 0.0)
    if SMOOTHING:
        value = value + smoothing * (log_z - smooth / count)
    return value


@triton.jit
def log_ratio(a, b):
    """log(a / b), exactly 0 where they are equal."""
    return tl.where(a == b, 0.0, tl.log(tl.div_rn(a, b)))


@triton.jit
def finish_kl(zs, zt, cross, matched, open_top, s_base, t_base, scale, gain, DIVERGENCE: tl.constexpr):
    """(D, a, b, c), the coefficients of ``soft_gradient``. gain: what multiplies dD/d(s / tau).

    forward_kl   gradient = a (2^s' - b 2^t')
    reverse_kl   gradient = 2^s' (a d + b), d as in ``crossed``; 2^s' c where the teacher masks the class
    """
    if DIVERGENCE == "forward_kl":
        value = LN2 * scale * tl.div_rn(cross, zt) + log_ratio(zs, zt)
        value = tl.where((open_top - t_base) * scale >= LEAST_POWER, INF, tl.maximum(value, 0.0))
        part = gain / zs
        return value, part, tl.div_rn(zs, zt), part
    shift = log_ratio(zt, zs)
    finite = LN2 * scale * tl.div_rn(cross, zs) + shift * tl.div_rn(matched, zs)
    value = tl.where((open_top - s_base) * scale >= LEAST_POWER, INF, tl.maximum(finite, 0.0))
    part = gain / zs
    return value, part * (LN2 * scale), part * (shift - finite), part * -finite


@triton.jit
def mixture_ratios(s, t, s_base, t_base, scale, shift, p_part, q_part):
    """(2^s', 2^t', log2 q - log2 m, log2 p - log2 m), m = beta p + (1 - beta) q, by element.

    Relative to the teacher's sum, so that the one logarithm that is rounded is near 0 where p is near q.
    """
    s2, t2 = (s - s_base) * scale, (t - t_base) * scale
    es, et = tl.exp2(s2), tl.exp2(t2)
    log_m = tl.log2(tl.maximum(et * p_part + es * q_part, LEAST))
    return es, et, s2 + shift - log_m, t2 - log_m


@triton.jit
def mixture_moments(s, t, s_base, t_base, scale, shift, p_part, q_part):
    """What sums to zt KL(p|m) and zs KL(q|m), both over ln 2."""
    es, et, q, p = mixture_ratios(s, t, s_base, t_base, scale, shift, p_part, q_part)
    return tl.where(et > 0, et * p, 0.0), tl.where(es > 0, es * q, 0.0)


@triton.jit
def finish_jsd(p_moment, q_moment, zs, zt, beta, not_beta, gain):
    """(D, a, b): gradient = 2^s' (a (log2 q - log2 m) + b)."""
    h = not_beta * LN2 * (q_moment / zs)
    value = tl.maximum(beta * LN2 * (p_moment / zt) + h, 0.0)
    part = gain / zs
    return value, part * not_beta * LN2, part * -h


@triton.jit
def soft_gradient(s, t, s_base, t_base, scale, a, b, c, shift, p_part, q_part, DIVERGENCE: tl.constexpr):
    """(the soft term's gradient, 2^s')."""
    if DIVERGENCE == "jsd":
        es, _, ratio, _ = mixture_ratios(s, t, s_base, t_base, scale, shift, p_part, q_part)
        return tl.where(es >= LEAST, es * (a * ratio + b), 0.0), es
    es = tl.exp2((s - s_base) * scale)
    if DIVERGENCE == "none":
        return tl.zeros(es.shape, tl.float32), es
    if DIVERGENCE == "forward_kl":
        return a * (es - b * tl.exp2((t - t_base) * scale)), es
    d = (s - s_base) - (t - t_base)
    bracket = tl.where(t == -INF, c, a * d + b)
    return tl.where(es > 0, es * bracket, 0.0), es


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """fp32 x in dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion cuts off
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def part_of_loss(share, value):
    """share * value; infinity stays, however small the share is in fp32."""
    return tl.where(value == INF, INF, share * value)


@triton.jit
def token_values(hard, soft, alpha, not_alpha, weight, inverse, used, bad_token):
    """(loss, hard, soft) of tokens as they are summed up: NaN where the token is bad, 0 where it is not used."""
    loss = part_of_loss(alpha, hard) + part_of_loss(not_alpha, soft)
    spoil = tl.where(bad_token, float("nan"), 1.0)
    # Weight and inverse one after the other: their product may be 0 in fp32, and 0 times infinity NaN.
    loss = tl.where(used, loss * weight * inverse * spoil, 0.0)
    return (
        loss,
        tl.where(used, hard * weight * inverse * spoil, 0.0),
        tl.where(used, soft * weight * inverse * spoil, 0.0),
    )
