"""Distillation loss in Triton: rows of any length, read tile by tile for the sums and again for the gradient.

Of 16-bit logits with the gradient it asks for 10 bytes an element (jsd: 14): 4 for the sums, 4 more for jsd's moments,
4 and 2 for the gradient. The gradient starts with the tile that was summed last, and what the L2 cache still holds of
the row does not come from memory again. Formulas: ``distill_loss_rows.py``.

A tile is K x N x E classes: E neighbours in 16 bytes of a thread, N threads side by side, K such stripes in flight::

    k = 0   | n0: e0 e1 ... | n1: e0 e1 ... | ... | n255 |
    k = 1   | n0: e0 e1 ... | ...

The running maxima and sums are one a thread, [N]: they meet only at the end of the row, so that no tile waits for a
reduction across threads, and a maximum that moves costs one exponential a thread and tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_loss_rows import (
    INF,
    LOG2_E,
    base_of,
    cross_moved,
    crossed,
    finish_hard,
    finish_jsd,
    finish_kl,
    hard_power,
    inverse_items,
    is_positive,
    log_ratio,
    mixture_moments,
    moved,
    narrowed,
    row_offset,
    soft_gradient,
    token_of,
    token_values,
)


@triton.jit
def thread_sum(x):
    """Of a [K, N, E] tile: [N], within each thread."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def thread_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def tile_of(s_from, t_from, cols, s_col, t_col, s_end, t_end, DIVERGENCE: tl.constexpr):
    """Logits of both in fp32, -inf beyond the ends; the teacher's are the student's where nothing reads them."""
    wide = cols.to(tl.int64)
    s = tl.load(s_from + wide * s_col, mask=cols < s_end, other=-INF).to(tl.float32)
    t = s
    if DIVERGENCE != "none":
        t = tl.load(t_from + wide * t_col, mask=cols < t_end, other=-INF).to(tl.float32)
    return s, t


@triton.jit(do_not_specialize=["tokens", "classes", "s_inner", "t_inner", "ignore_index"])
def rows_in_sweeps(
    student, teacher, grad, loss, hard, soft, labels, weights, items, grad_scale,
    tokens, vocab, common, classes,
    s_inner, s_outer, s_row, s_col, t_inner, t_outer, t_row, t_col,
    scale, tau, alpha, not_alpha, beta, not_beta, smoothing, not_smoothing, inverse, ignore_index,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, SQUARINGS: tl.constexpr, SMOOTHING: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ITEMS: tl.constexpr, LATER: tl.constexpr,
    GRAD: tl.constexpr, SPLIT: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One row a program. loss, hard, soft: one value a token."""
    row = tl.program_id(0).to(tl.int64)
    label, weight, used, spoiled = token_of(
        labels, weights, row, row >= 0, classes, ignore_index, HAS_LABELS, HAS_WEIGHTS
    )
    # What is read: nothing of a token that is not used, or NaN anyway.
    reads = used & ~spoiled
    s_end, t_end = tl.where(reads, vocab, 0), tl.where(reads, common, 0)
    s_from = student + row_offset(row, s_inner, s_outer, s_row)
    t_from = teacher + row_offset(row, t_inner, t_outer, t_row) if DIVERGENCE != "none" else s_from
    logit = 0.0
    if HARD != "none":
        logit = tl.load(s_from + label.to(tl.int64) * s_col, mask=reads, other=0.0).to(tl.float32)
    inverse = inverse_items(items, inverse, ITEMS)
    bad_token = spoiled | (used & (inverse != inverse))
    spoiled = bad_token
    gain = weight
    if LATER:
        if row == 0:
            tl.store(grad_scale, tl.where(inverse == inverse, inverse, 0.0))
    else:
        gain = weight * inverse
    TILE: tl.constexpr = K * N * E
    lane = tl.arange(0, K)[:, None, None] * (N * E) + tl.arange(0, N)[None, :, None] * E
    lane += tl.arange(0, E)[None, None, :]

    # ---- sums: s_max, zs, cross, ... refer to the thread's largest logits so far
    nothing = tl.zeros([N], tl.float32)
    s_max, t_max, s_max_all, open_top = nothing - INF, nothing - INF, nothing - INF, nothing - INF
    zs, zt, z, cross, matched, smooth, count = nothing, nothing, nothing, nothing, nothing, nothing, nothing
    for start in range(0, s_end, TILE):
        s, t = tile_of(s_from, t_from, start + lane, s_col, t_col, s_end, t_end, DIVERGENCE)
        both = tl.where(start + lane < t_end, s, -INF) if SPLIT else s
        s_new = tl.maximum(s_max, thread_max(both))
        s_base = base_of(s_new)
        s_moved = moved(s_max, s_new)
        es = tl.exp2((both - s_base[None, :, None]) * scale)
        zs = zs * tl.exp2(s_moved * scale) + thread_sum(es)
        if HARD != "none":
            all_new = tl.maximum(s_max_all, thread_max(s)) if SPLIT else s_new
            all_base = base_of(all_new)
            shift_all = moved(s_max_all, all_new)
            powers = thread_sum(hard_power(s, es, all_base[None, :, None], HARD, SQUARINGS))
            z = z * tl.exp2(shift_all * LOG2_E) + powers
            if SMOOTHING:
                allowed = s > -INF
                smooth += count * shift_all + thread_sum(tl.where(allowed, s - all_base[None, :, None], 0.0))
                count += thread_sum(allowed.to(tl.float32))
            s_max_all = all_new
        if DIVERGENCE != "none":
            t_new = tl.maximum(t_max, thread_max(t))
            t_base = base_of(t_new)
            t_moved = moved(t_max, t_new)
            et = tl.exp2((t - t_base[None, :, None]) * scale)
            zt = zt * tl.exp2(t_moved * scale) + thread_sum(et)
            if DIVERGENCE != "jsd":
                cross, matched = cross_moved(cross, matched, s_moved, t_moved, scale, DIVERGENCE)
                product, closed, opened = crossed(
                    both, t, s_base[None, :, None], t_base[None, :, None], es, et, DIVERGENCE
                )
                cross += thread_sum(product)
                matched += thread_sum(closed)
                open_top = tl.maximum(open_top, thread_max(opened))
            t_max = t_new
        s_max = s_new

    # ---- threads together
    s_top, t_top = tl.max(s_max, axis=0), tl.max(t_max, axis=0)
    s_base, t_base = base_of(s_top), base_of(t_top)
    s_moved, t_moved = moved(s_max, s_top), moved(t_max, t_top)
    zs = tl.sum(zs * tl.exp2(s_moved * scale), axis=0)
    zt = tl.sum(zt * tl.exp2(t_moved * scale), axis=0)
    cross, matched = cross_moved(cross, matched, s_moved, t_moved, scale, DIVERGENCE)
    cross, matched, open_top = tl.sum(cross, axis=0), tl.sum(matched, axis=0), tl.max(open_top, axis=0)
    zero = gain * 0
    hard_value, soft_value, hard_part, smooth_part, label_part = zero, zero, zero, zero, zero
    all_base = s_base
    if HARD != "none":
        all_top = tl.max(s_max_all, axis=0)
        all_base = base_of(all_top)
        shift_all = moved(s_max_all, all_top)
        z = tl.sum(z * tl.exp2(shift_all * LOG2_E), axis=0)
        smooth, count = tl.sum(smooth + count * shift_all, axis=0), tl.sum(count, axis=0)
        hard_value = finish_hard(z, all_base, logit, smooth, count, smoothing, not_smoothing, SMOOTHING)
        hard_part, label_part = alpha * gain / z, alpha * gain * not_smoothing
        if SMOOTHING:
            smooth_part = alpha * gain * smoothing / count
        hard_value = tl.where(is_positive(z), hard_value, float("nan"))
        spoiled = spoiled | (used & ~is_positive(z))
    a, b, c, shift, q_part = zero, zero, zero, zero, zero
    if DIVERGENCE != "none":
        soft_gain = not_alpha * tau * gain
        spoiled = spoiled | (used & ~(is_positive(zs) & is_positive(zt)))
        if DIVERGENCE == "jsd":
            shift, q_part = log_ratio(zt, zs) * LOG2_E, not_beta * tl.div_rn(zt, zs)
            p_sum, q_sum = nothing, nothing
            for start in range(0, t_end, TILE):
                s, t = tile_of(s_from, t_from, start + lane, s_col, t_col, t_end, t_end, DIVERGENCE)
                p, q = mixture_moments(s, t, s_base, t_base, scale, shift, beta, q_part)
                p_sum += thread_sum(p)
                q_sum += thread_sum(q)
            value, a, b = finish_jsd(
                tl.sum(p_sum, axis=0), tl.sum(q_sum, axis=0), zs, zt, beta, not_beta, soft_gain
            )  # fmt: skip
        else:
            value, a, b, c = finish_kl(
                zs, zt, cross, matched, open_top, s_base, t_base, scale, soft_gain, DIVERGENCE
            )  # fmt: skip
        soft_value = tl.where(is_positive(zs) & is_positive(zt), tau * (tau * value), float("nan"))
    one, two, three = token_values(hard_value, soft_value, alpha, not_alpha, weight, inverse, used, bad_token)
    tl.store(loss + row, one)
    tl.store(hard + row, two)
    tl.store(soft + row, three)

    # ---- gradient
    if GRAD:
        fill = tl.where(spoiled, float("nan"), 0.0)
        fine = used & ~spoiled
        tiles = tl.cdiv(vocab, TILE)
        for i in range(0, tiles):
            cols = (tiles - 1 - i) * TILE + lane
            s, t = tile_of(s_from, t_from, cols, s_col, t_col, s_end, t_end, DIVERGENCE)
            both = tl.where(cols < t_end, s, -INF) if SPLIT else s
            g, es = soft_gradient(both, t, s_base, t_base, scale, a, b, c, shift, beta, q_part, DIVERGENCE)
            if HARD != "none":
                g += hard_part * hard_power(s, es, all_base, HARD, SQUARINGS)
                if SMOOTHING:
                    g = tl.where(s > -INF, g - smooth_part, g)
                g = tl.where(cols == label, g - label_part, g)
            g = tl.where(fine, g, fill)
            tl.store(grad + row * vocab + cols, narrowed(g, grad.dtype.element_ty), mask=cols < vocab)
