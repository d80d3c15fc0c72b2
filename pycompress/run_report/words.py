"""Numbers as a person reads them: bytes, seconds, counts, ratios."""

from __future__ import annotations

import math

MISSING = "–"
# Two times that differ by less are called equal: timings of one model against itself differ by as much.
_SAME = 0.03


def size(count: float | None) -> str:
    """Bytes in decimal units: 512 B, 4.21 kB, 90.4 MB."""
    if count is None:
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:
            return f"{three(count / factor)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | None) -> str:
    """Of one call, or of a stage: 8.31 µs, 1.20 ms, 42.0 s, 1 h 05 min."""
    if seconds is None:
        return MISSING
    if seconds >= 3570:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    if seconds >= 119.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * factor:
            return f"{three(seconds / factor)} {unit}"
    return f"{seconds * 1e9:.0f} ns" if seconds else "0 s"


def three(value: float) -> str:
    """Three significant digits, never in powers of ten: 4.21, 42.1, 421, 4210."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    digits = 2 - int(f"{value:.2e}".partition("e")[2])  # the exponent after rounding: 0.9996 is 1.00
    return f"{value:.{max(0, min(digits, 9))}f}"


def count(number: float | None) -> str:
    """Whole, with thin spaces between thousands."""
    return MISSING if number is None else f"{round(number):,}".replace(",", "\u2009")


def short_count(number: float) -> str:
    """22.7 M, 4.20 k, 120, 1.62."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return f"{three(number / factor)} {unit}"
    return three(number) if number % 1 else f"{number:.0f}"


def percent(share: float | None) -> str:
    """0 %, 0.3 %, 90 %, 99.95 %; never rounded to 100 % or 0 % where it is not."""
    if share is None:
        return MISSING
    value = 100 * share
    digits = 1
    while digits < 4 and round(value, digits) in (0, 100) and value not in (0, 100):
        digits += 1
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}\u202f%"


def metric(value: float | None) -> str:
    """Of an evaluation: four significant digits."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.4e}"


def error(value: float | None) -> str:
    """A relative error: 0.000, 0.0123, 1.2e-07."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"


def smaller(before: float | None, after: float | None) -> str:
    """23x smaller, 1.2x larger, the same."""
    return _ratio(before, after, "smaller", "larger")


def fewer(before: float | None, after: float | None) -> str:
    return _ratio(before, after, "fewer", "more")


def faster(speedup: float | None) -> str:
    """3.4x faster, 1.2x slower, as fast."""
    if speedup is None or speedup <= 0:
        return MISSING
    if abs(math.log(speedup)) < _SAME:
        return "as fast"
    return f"{times(speedup)} faster" if speedup > 1 else f"{times(1 / speedup)} slower"


def times(ratio: float) -> str:
    """2.31×, 23.4×, 234×."""
    return f"{three(ratio) if ratio >= 10 else f'{ratio:.2f}'}×"


def _ratio(before: float | None, after: float | None, less: str, more: str) -> str:
    if before is None or after is None:
        return MISSING
    if before == after:
        return "the same"
    if not before or not after:
        return "none left" if not after else MISSING
    ratio = before / after
    text = times(ratio) if ratio > 1 else times(1 / ratio)
    return f"{text} {less if ratio > 1 else more}" if text != "1.00×" else "the same"
