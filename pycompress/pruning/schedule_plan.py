"""When a schedule changes masks, and to which sparsity: the arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from pycompress.pruning.patterns import check_fraction

KINDS = ("cubic", "linear", "constant", "one_shot")


@dataclass(frozen=True)
class Plan:
    """Steps are counted from 1; step 0 is the construction of the schedule.

    kind: from `initial` to `final` sparsity between the steps `begin` and `end`: "cubic", final + (initial - final) *
        (1 - p)^3 with p from 0 to 1 (Zhu and Gupta 2017), "linear", "constant" or "one_shot", both `final` from
        `begin` on; the latter changes masks at `begin` alone.
    every: steps between two changes; the last one is at `end` in any case.
    """

    kind: str
    begin: int
    end: int
    every: int
    initial: float
    final: float

    @classmethod
    def make(cls, kind: str, begin: int, end: int | None, every: int, initial: float, final: float, *, op: str) -> Plan:
        """Raises ValueError for what is no plan, TypeError for steps that are no whole numbers."""
        if kind not in KINDS:
            raise ValueError(f"{op}: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
        initial = check_fraction(initial, f"{op}: initial_sparsity")
        if initial > final:
            raise ValueError(f"{op}: initial_sparsity={initial} is above sparsity={final}; expected less")
        if initial and kind in ("constant", "one_shot"):
            raise ValueError(f"{op}: initial_sparsity={initial} with kind={kind!r}, which has but one; leave it out")
        steps = (("every", every, 1), ("begin", begin, 0), ("end", begin if end is None else end, begin))
        for name, value, least in steps:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{op}: {name} is {value!r}; expected a whole number of steps")
            if value < least:
                raise ValueError(f"{op}: {name}={value}; expected {least} or more")
        if end is None and kind != "one_shot":
            raise ValueError(f"{op}: kind={kind!r} needs end, the step at which the final sparsity is reached")
        return cls(kind, begin, begin if end is None or kind == "one_shot" else end, every, initial, final)

    def progress(self, step: int) -> float:
        """0 at `begin`, 1 at `end`."""
        if step >= self.end:
            return 1.0
        return max(0.0, (step - self.begin) / (self.end - self.begin))

    def sparsity(self, step: int) -> float:
        """The sparsity planned for a step; before `begin` there is none."""
        if step < self.begin:
            return 0.0
        if self.kind in ("constant", "one_shot"):
            return self.final
        power = 3 if self.kind == "cubic" else 1
        return self.final + (self.initial - self.final) * (1.0 - self.progress(step)) ** power

    def changes(self, step: int) -> bool:
        """Whether masks are chosen anew at this step."""
        if not self.begin <= step <= self.end:
            return False
        return step == self.end or (step - self.begin) % self.every == 0
