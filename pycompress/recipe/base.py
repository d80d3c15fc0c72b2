"""What the sections of a recipe are made of: their base class, and the types of their keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pycompress.pruning.patterns import Pattern
from pycompress.recipe.problems import Expects, raise_for, validation_problems

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


def _number(value: object) -> object:
    """PyYAML and other readers of YAML 1.1 return 1e-3 as text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value):
        return float(value)
    return value


def _names(value: object) -> object:
    """One name is a list of one; layers of an nn.Sequential are named by numbers."""
    values = [value] if isinstance(value, (str, int)) else value
    if isinstance(values, (list, tuple)):
        return tuple(str(item) if type(item) is int else item for item in values)
    return value


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def as_names(value: object) -> object:
    """A tuple of the names that are given, be it one or a list."""
    return (value,) if isinstance(value, str) else as_tuple(value)


def check_pattern(value: str) -> str:
    Pattern.parse(value)
    return value


Number = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[
    Annotated[int, Field(ge=0)] | Share,
    Expects("steps, a whole number of at least 0, or a share of them from 0.0 to 1.0"),
]
# Qualified names or glob patterns, as quantize_'s `skip`.
Names = Annotated[tuple[str, ...], BeforeValidator(_names), Expects("a list of module names or patterns")]


class _Checked(ModelMetaclass):
    """Sections made in Python raise RecipeError, as those from a file do; pydantic itself does not pass here."""

    def __call__(cls, **values: Any) -> Any:
        return cls.made(values)  # type: ignore[attr-defined]


class Section(BaseModel, metaclass=_Checked):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @classmethod
    def made(cls, values: dict[str, Any]) -> Section:
        """The section of these keys; raises RecipeError naming every problem."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            name = getattr(cls, "name", cls.__name__.lower())
            raise_for(validation_problems(error, cls, values, (name,)), lambda path: "")
            raise
