"""What a row of the table of ``structure_kinds.py`` is, and what rows are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

Options = dict[str, Any]


def type_name(module: nn.Module) -> str:
    return type(module).__name__


class Field(NamedTuple):
    """An option of a kind: what it may be, in a test and in words, and how a module tells it."""

    fits: Callable[[Any], bool]
    expected: str
    read: Callable[[Any], Any] | None = None  # by default the attribute of the option's name
    optional: bool = False


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def is_flag(value: object) -> bool:
    return isinstance(value, bool)


SIZE = Field(is_size, "a size")
TEXT = Field(lambda value: isinstance(value, str), "a name")
FLAG = Field(is_flag, "true or false")


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    why_not: of the options and the module of the fresh model; make: of the same, None where that module can stay.
    tensors, fill: what a file keeps of the module, and back into one on the meta device; a kind without them is made
        of other modules. unknown_length: those of its tensors whose length the options do not tell; bitmap: the one
        that holds a bit for each weight.
    is_ours: whether no class builds such a module by itself.
    """

    cls: type[nn.Module]
    fields: Mapping[str, Field]
    why_not: Callable[[Options, nn.Module], str]
    make: Callable[[Options, nn.Module], nn.Module | None]
    tensors: Callable[[nn.Module], dict[str, Tensor]] | None = None
    fill: Callable[[nn.Module, Mapping[str, Tensor], Options], None] | None = None
    unknown_length: frozenset[str] = frozenset()
    bitmap: str = ""
    is_ours: bool = True

    @property
    def name(self) -> str:
        return self.cls.__name__

    def describe(self, module: nn.Module) -> Options:
        values = {key: f.read(module) if f.read else getattr(module, key) for key, f in self.fields.items()}
        return {key: value for key, value in values.items() if not (value is None and self.fields[key].optional)}

    def check(self, options: Options) -> None:
        """Raises ValueError for an option that is missing, unknown, or of the wrong form."""
        for key, field in self.fields.items():
            if key not in options and not field.optional:
                raise ValueError(f"the description lacks {key}; it is damaged")
            if key in options and not field.fits(options[key]):
                raise ValueError(f"{key}={options[key]!r}; expected {field.expected}")
        if unknown := sorted(set(options) - set(self.fields)):
            raise ValueError(f"this version of pycompress does not know its option {unknown[0]!r}; update pycompress")


def maker(cls: Callable[..., nn.Module], arguments: tuple[str, ...]) -> Callable[[Options, nn.Module], nn.Module]:
    """Makes the module from the options that its constructor takes."""

    def make(options: Options, old: nn.Module) -> nn.Module:
        return cls(**{key: options[key] for key in arguments if key in options}, device="meta")

    return make


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in module.state_dict().items()}


def fill_packed(module: nn.Module, tensors: Mapping[str, Tensor], options: Options) -> None:
    """As load_state_dict of a layer that packs what it keeps as `_weight` and the like, without its copies."""
    for key, tensor in tensors.items():
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[f"_{key}" if f"_{key}" in module._buffers else key] = tensor
    module._arrange()  # type: ignore[operator]


def sizes_why_not(options: Options, old: nn.Module, classes: tuple[type[nn.Module], ...], keys: tuple[str, ...]) -> str:
    """Why a layer with these options cannot take the place of `old`: it is of no such class, or has other sizes."""
    if not isinstance(old, classes):
        return (
            f"the model has a {type_name(old)} there; expected nn.{classes[0].__name__}, pass a fresh float model of "
            "the same class"
        )
    for key in keys:
        there = getattr(old, key)
        if options[key] != (list(there) if isinstance(there, tuple) else there):
            return f"its {key} is {options[key]} and the model's {there}; build the model with the same sizes"
    return ""
