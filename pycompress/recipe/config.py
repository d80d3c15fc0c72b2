"""The file of `pycompress compress`: a recipe, and where the functions are that it needs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from pycompress.recipe.base import Section
from pycompress.recipe.problems import Expects, closest
from pycompress.recipe.sections import Recipe


class Reference(Section):
    """A function of a file or a module, and the keyword arguments that it is called with, if it is called.

    In YAML `file.py:name`, relative to the file, or `package.module:name`; with arguments
    `{call: "file.py:name", width: 64}`.
    """

    source: str  # a path that ends in .py, or a module's dotted name
    name: str
    arguments: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"


def _parsed(value: object) -> object:
    if isinstance(value, Reference):
        return value
    text, arguments = value, None
    if isinstance(value, dict):
        text, arguments = value.get("call"), {key: item for key, item in value.items() if key != "call"}
        if "call" not in value:
            meant = closest("call", value)
            hint = f"; {meant!r} is none" if meant else ""
            raise ValueError(f'expected {{call: "file.py:name", key: value}}, but there is no key call{hint}')
    if not isinstance(text, str):
        raise ValueError(f"expected text as file.py:name, not {text!r}")
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name.replace(".", "_").isidentifier():
        raise ValueError(f"{text!r} names no function; expected file.py:name or package.module:name")
    return Reference(source=source, name=name, arguments=arguments)


Function = Annotated[Reference, BeforeValidator(_parsed), Expects("text as file.py:name")]


class Config(Recipe):
    """A recipe's keys, and those that only the command line reads. See `pycompress compress --help`."""

    model: Function
    teacher: Function | None = None
    train_batches: Function | None = None
    calibration: Function | None = None
    eval_fn: Function | None = None
    loss_fn: Function | None = None
    out: str | None = None

    def recipe(self) -> Recipe:
        """The recipe alone."""
        return Recipe.model_validate({name: getattr(self, name) for name in Recipe.model_fields})
