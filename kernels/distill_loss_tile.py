"""Distillation loss in Triton: rows that are one tile, kept in registers between sums and gradient.

Of 16-bit logits with the gradient it moves 6 bytes an element: 2 + 2 read, 2 written. Formulas:
``distill_loss_rows.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_loss_rows import (
    INF,
    LOG2_E,
    base_of,
    crossed,
    finish_hard,
    finish_jsd,
    finish_kl,
    hard_power,
    inverse_items,
    is_positive,
    log_ratio,
    mixture_moments,
    narrowed,
    row_offset,
    soft_gradient,
    token_of,
    token_values,
)

# Arguments of this kernel and of rows_in_sweeps:
#   student, teacher      logits, rows in two levels: *_inner rows *_row apart, then *_outer; classes *_col apart
#   grad                  (tokens, vocab) contiguous, the student's dtype; may be the student's own memory
#   loss, hard, soft      one value a program, or a token (PER_TOKEN)
#   labels, weights       (tokens,) contiguous
#   items                 what ITEMS says (inverse_items); grad_scale: where 1 / items goes if LATER, f32
#   common                min(vocab, the teacher's); SPLIT: it is less than vocab
#   classes               labels are 0..classes-1; for a gradient to the teacher that is not vocab
#   scale                 log2(e) / tau
#   not_*                 1 - *, rounded once


@triton.jit(do_not_specialize=["tokens", "classes", "s_inner", "t_inner", "ignore_index"])
def rows_in_tile(
    student, teacher, grad, loss, hard, soft, labels, weights, items, grad_scale,
    tokens, vocab, common, classes,
    s_inner, s_outer, s_row, s_col, t_inner, t_outer, t_row, t_col,
    scale, tau, alpha, not_alpha, beta, not_beta, smoothing, not_smoothing, inverse, ignore_index,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, SQUARINGS: tl.constexpr, SMOOTHING: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ITEMS: tl.constexpr, LATER: tl.constexpr,
    GRAD: tl.constexpr, PER_TOKEN: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, each within BLOCK classes. Nothing is read twice but the label's logit."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_tokens = row < tokens
    label, weight, used, spoiled = token_of(
        labels, weights, row, in_tokens, classes, ignore_index, HAS_LABELS, HAS_WEIGHTS
    )
    reads = used & ~spoiled
    cols = tl.arange(0, BLOCK)[None, :]
    in_row, in_common = cols < vocab, cols < common
    s_from = student + row_offset(row, s_inner, s_outer, s_row)
    s = tl.load(s_from[:, None] + cols.to(tl.int64) * s_col, mask=in_row & reads[:, None], other=-INF).to(tl.float32)
    t = s
    if DIVERGENCE != "none":
        t_from = teacher + row_offset(row, t_inner, t_outer, t_row)
        t = tl.load(t_from[:, None] + cols.to(tl.int64) * t_col, mask=in_common & reads[:, None], other=-INF)
        t = t.to(tl.float32)
    both = s
    if SPLIT:
        both = tl.where(in_common, s, -INF)
    inverse = tl.zeros([ROWS], tl.float32) + inverse_items(items, inverse, ITEMS)
    bad_token = spoiled | (used & (inverse != inverse))
    spoiled = bad_token
    gain = weight
    if LATER:
        if tl.program_id(0) == 0:
            one = tl.max(inverse, axis=0)
            tl.store(grad_scale, tl.where(one == one, one, 0.0))
    else:
        gain = weight * inverse

    # ---- sums
    s_base = base_of(tl.max(both, axis=1))
    s_top = base_of(tl.max(s, axis=1)) if SPLIT else s_base
    t_base = base_of(tl.max(t, axis=1)) if DIVERGENCE != "none" else s_base
    es = tl.exp2((both - s_base[:, None]) * scale)
    zs = tl.sum(es, axis=1)
    hard_value, soft_value = gain * 0, gain * 0
    hard_part, smooth_part, label_part = gain * 0, gain * 0, gain * 0
    if HARD != "none":
        z = tl.sum(hard_power(s, es, s_top[:, None], HARD, SQUARINGS), axis=1)
        logit = tl.load(s_from + label.to(tl.int64) * s_col, mask=reads, other=0.0).to(tl.float32)
        smooth, count = gain * 0, gain * 0 + 1
        if SMOOTHING:
            allowed = s > -INF
            smooth = tl.sum(tl.where(allowed, s - s_top[:, None], 0.0), axis=1)
            count = tl.sum(allowed.to(tl.float32), axis=1)
            smooth_part = alpha * gain * smoothing / count
        hard_value = finish_hard(z, s_top, logit, smooth, count, smoothing, not_smoothing, SMOOTHING)
        hard_part, label_part = alpha * gain / z, alpha * gain * not_smoothing
        hard_value = tl.where(is_positive(z), hard_value, float("nan"))
        spoiled = spoiled | (used & ~is_positive(z))
    a, b, c, shift, p_part, q_part = gain * 0, gain * 0, gain * 0, gain * 0, beta, gain * 0
    if DIVERGENCE != "none":
        soft_gain = not_alpha * tau * gain
        et = tl.exp2((t - t_base[:, None]) * scale)
        zt = tl.sum(et, axis=1)
        spoiled = spoiled | (used & ~(is_positive(zs) & is_positive(zt)))
        if DIVERGENCE == "jsd":
            shift, q_part = log_ratio(zt, zs) * LOG2_E, not_beta * tl.div_rn(zt, zs)
            p, q = mixture_moments(
                both, t, s_base[:, None], t_base[:, None], scale, shift[:, None], p_part, q_part[:, None]
            )
            value, a, b = finish_jsd(tl.sum(p, axis=1), tl.sum(q, axis=1), zs, zt, beta, not_beta, soft_gain)
        else:
            cross, matched, open_top = crossed(both, t, s_base[:, None], t_base[:, None], es, et, DIVERGENCE)
            cross, matched, open_top = tl.sum(cross, axis=1), tl.sum(matched, axis=1), tl.max(open_top, axis=1)
            value, a, b, c = finish_kl(
                zs, zt, cross, matched, open_top, s_base, t_base, scale, soft_gain, DIVERGENCE
            )  # fmt: skip
        soft_value = tl.where(is_positive(zs) & is_positive(zt), tau * (tau * value), float("nan"))

    # ---- what leaves
    one, two, three = token_values(hard_value, soft_value, alpha, not_alpha, weight, inverse, used, bad_token)
    if PER_TOKEN:
        tl.store(loss + row, one, mask=in_tokens)
        tl.store(hard + row, two, mask=in_tokens)
        tl.store(soft + row, three, mask=in_tokens)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(one, axis=0))
        tl.store(hard + tl.program_id(0), tl.sum(two, axis=0))
        tl.store(soft + tl.program_id(0), tl.sum(three, axis=0))
    if GRAD:
        g, es = soft_gradient(
            both, t, s_base[:, None], t_base[:, None], scale, a[:, None], b[:, None], c[:, None], shift[:, None],
            p_part, q_part[:, None], DIVERGENCE,
        )  # fmt: skip
        if HARD != "none":
            g += hard_part[:, None] * hard_power(s, es, s_top[:, None], HARD, SQUARINGS)
            if SMOOTHING:
                g = tl.where(s > -INF, g - smooth_part[:, None], g)
            g = tl.where(cols == label[:, None], g - label_part[:, None], g)
        g = tl.where((used & ~spoiled)[:, None], g, tl.where(spoiled, float("nan"), 0.0)[:, None])
        to = grad + row[:, None] * vocab + cols
        tl.store(to, narrowed(g, grad.dtype.element_ty), mask=in_row & in_tokens[:, None])
