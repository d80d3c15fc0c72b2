"""What is wrong with a recipe, in words: one line a problem, all problems at once.

A path leads from the recipe to the place: ("stages", 2, "prune", "train", "lr"). `reading.py` turns it into a file's
line or a stage's number.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Path = tuple[str | int, ...]
_SHOWN = 60  # characters of a value


class RecipeError(ValueError):
    """A recipe that cannot be carried out. problems: one line each, with the place."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@dataclass(frozen=True)
class Problem:
    path: Path
    text: str


@dataclass(frozen=True)
class Expects:
    """Beside a type in Annotated: what to write there, where the type alone does not say it."""

    text: str


def raise_for(problems: Iterable[Problem], place: Callable[[Path], str]) -> None:
    """Raises RecipeError if there is any; place(path): what is put before a problem's text."""
    lines = list(dict.fromkeys(place(problem.path) + problem.text for problem in problems))
    if lines:
        raise RecipeError(lines)


def validation_problems(error: ValidationError, section: type[BaseModel], values: object, path: Path) -> list[Problem]:
    """What pydantic found in `values`, which lie at `path` and were to become a `section`; one problem a place."""
    found: dict[Path, Problem] = {}
    for item in error.errors(include_url=False):
        spot = _Spot.find(section, values, item["loc"])
        at = path + spot.path
        if item["type"] in ("extra_forbidden", "invalid_key"):
            text = unknown_key(str(spot.path[-1]), dotted(at[:-1]), spot.section)
        elif item["type"] == "missing" and isinstance(item["loc"][-1], str):
            text = f"{dotted(at[:-1]) or 'the recipe'} lacks {at[-1]!r}: {expected_at(spot.section, at[-1])}"
        elif item["type"] == "value_error":
            text = f"{dotted(at)}: {item['ctx']['error']}" if at else str(item["ctx"]["error"])
        else:
            text = f"{dotted(at)} is {shown(spot.value)}; expected {expected_at(spot.section, spot.key)}"
        found.setdefault(at[: len(path) + spot.depth], Problem(at, text))  # of a union's members the first one counts
    return list(found.values())


@dataclass
class _Spot:
    """Where an error of pydantic lies: its location without the names that pydantic gives to members of unions."""

    path: Path
    value: object
    section: type[BaseModel]  # the innermost section around it
    key: str  # its field there, "" for the section itself
    depth: int  # how much of the path leads to that field

    @classmethod
    def find(cls, section: type[BaseModel], values: object, location: Sequence[str | int]) -> _Spot:
        spot = cls((), values, section, "", 0)
        for part in location:
            inner = section_of(spot.section, spot.key)
            if inner is not None and isinstance(spot.value, Mapping):
                spot.section, spot.key = inner, ""
            if isinstance(spot.value, Mapping) and (part in spot.value or not spot.key):
                spot.value = spot.value.get(part)
            elif isinstance(part, int) and isinstance(spot.value, (list, tuple)) and part < len(spot.value):
                spot.value = spot.value[part]
            else:
                continue
            spot.path += (part,)
            if not spot.key:
                spot.key, spot.depth = str(part), len(spot.path)
        return spot


def section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a field holds, if it does."""
    field = section.model_fields.get(key)
    members = _members(field.annotation) if field else []
    return next((member for member in members if _is_section(member)), None)


def unknown_key(key: str, owner: str, section: type[BaseModel]) -> str:
    valid = list(section.model_fields)
    where = f" in {owner}" if owner else ""
    nearest = closest(key, valid)
    inner = [name for name in valid if (part := section_of(section, name)) and key in part.model_fields]
    if inner:
        hint = f"it belongs under {' or '.join(inner)}"
    elif nearest:
        hint = f"did you mean {nearest!r}?"
    else:
        hint = ""
    return f"unknown key {key!r}{where}; {hint + (' ' if hint.endswith('?') else '; ') if hint else ''}" + (
        f"valid keys: {', '.join(valid)}"
    )


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant."""
    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), list(valid), 1)), None)


def dotted(path: Path) -> str:
    """("stages", 2, "prune", "train", "lr") is prune.train.lr: the line or the stage's number says the rest."""
    if path[:1] == ("stages",) and len(path) > 2:
        path = path[2:]
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


# ---- what is expected, from the types -----------------------------------------------------------------------------


def expected_at(section: type[BaseModel], key: str | int) -> str:
    """What a field takes; of the section itself (key "") its keys."""
    field = section.model_fields.get(str(key))
    if field is None:
        return _expected(section)
    return _expected(field.annotation, field.metadata)


def _expected(kind: Any, metadata: Sequence[Any] = ()) -> str:
    if (given := next((item for item in metadata if isinstance(item, Expects)), None)) is not None:
        return given.text
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _expected(inner, [*more, *metadata])
    if len(members := _members(kind)) > 1:
        return " or ".join(_expected(member) for member in members)
    kind = members[0]
    if get_origin(kind) is Annotated:
        return _expected(kind, metadata)
    if get_origin(kind) is Literal:
        return " or ".join(filter(None, [", ".join(get_args(kind)[:-1]), str(get_args(kind)[-1])]))
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        many = "a list, each item" if others == [Ellipsis] else f"a list of {len(others) + 1}, each"
        return f"{many} {_expected(item)}"
    if get_origin(kind) is dict:
        return f"a mapping of names to {_expected(get_args(kind)[1])}"
    if _is_section(kind):
        return f"a mapping with keys of {', '.join(kind.model_fields)}"
    names = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    return names.get(kind, str(kind)) + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    parts = [part for item in metadata for part in getattr(item, "metadata", [item])]  # Field() keeps its own list
    bounds = {name: getattr(part, name) for part in parts for name in ("ge", "gt", "le", "lt") if hasattr(part, name)}
    match bounds:
        case {"ge": low, "le": high}:
            return f" from {low} to {high}"
        case {"gt": low, "le": high}:
            return f" above {low} and up to {high}"
        case {"ge": low, "lt": high}:
            return f" of at least {low} and below {high}"
        case {"gt": low, "lt": high}:
            return f" between {low} and {high}"
        case {"ge": low}:
            return f" of at least {low}"
        case {"gt": low}:
            return f" above {low}"
    return ""


def _members(kind: Any) -> list[Any]:
    """The members of a union but None; of anything else itself."""
    if get_origin(kind) in (Union, types.UnionType):
        return [member for member in get_args(kind) if member is not type(None)]
    return [kind]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
