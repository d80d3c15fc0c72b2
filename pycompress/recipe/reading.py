"""Makes recipes: from Python values, which are checked like a file, and from YAML files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from pycompress.recipe.config import Config
from pycompress.recipe.order import agreement_problems, order_problems
from pycompress.recipe.problems import (
    Path,
    Problem,
    RecipeError,
    closest,
    raise_for,
    shown,
    validation_problems,
)
from pycompress.recipe.sections import STAGES, Recipe, Stage
from pycompress.recipe.yaml_file import Document, read_yaml

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_config(path: str | os.PathLike[str]) -> tuple[Config, Document]:
    """A file of `pycompress compress`; raises RecipeError with the line of every problem."""
    document = read_yaml(path)
    return build(Config, document.values, document), document


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of a file; the keys that Config adds are passed over."""
    document = read_yaml(path)
    if isinstance(document.values, dict):
        for name in set(Config.model_fields) - set(Recipe.model_fields):
            document.values.pop(name, None)
    return build(Recipe, document.values, document)


def build(kind: type[AnyRecipe], values: object, document: Document | None = None) -> AnyRecipe:
    """A recipe of a list of stages or a mapping with `stages`; document: the file they come from."""
    place = document.place if document else _python_place
    if isinstance(values, (list, tuple)):
        values = {"stages": values}
    if not isinstance(values, Mapping):
        text = f"a recipe is a list of stages or a mapping with stages:, not {shown(values)}"
        raise RecipeError([place(()) + text])
    problems: list[Problem] = []
    found = _stages(values, problems)
    stages = [stage for stage in found if isinstance(stage, Stage)]
    whole = None
    try:
        whole = kind.model_validate({**values, "stages": tuple(stages)})
    except ValidationError as error:
        problems += validation_problems(error, kind, values, ())
    problems += order_problems([stage.name if isinstance(stage, Stage) else stage for stage in found])
    if len(stages) == len(found):
        problems += agreement_problems(stages)
    problems.sort(key=lambda problem: document.line(problem.path) if document else _stage_of(problem))
    raise_for(problems, place)
    assert whole is not None
    return whole


def _stages(values: Mapping[str, Any], problems: list[Problem]) -> list[Stage | str]:
    """The stages; of one with a mistake, which joins `problems`, its name, and "" of an unknown one."""
    items = values.get("stages")
    if not isinstance(items, (list, tuple)) or not items:
        problem = f"stages is {shown(items)}; expected" if "stages" in values else "stages is missing; expected"
        problems.append(Problem(("stages",), f"{problem} a list with one or more of {', '.join(STAGES)}"))
        return []
    return [_stage(item, ("stages", i), problems) for i, item in enumerate(items)]


def _stage(item: object, path: Path, problems: list[Problem]) -> Stage | str:
    if isinstance(item, Stage):
        return item
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or len(item) != 1:
        problems.append(Problem(path, _no_stage(item)))
        return ""
    (name, options), *_ = item.items()
    if name not in STAGES:
        nearest = closest(str(name), STAGES)
        hint = f"did you mean {nearest!r}? " if nearest else ""
        problems.append(Problem((*path, name), f"unknown stage {name!r}; {hint}valid stages: {', '.join(STAGES)}"))
        return ""
    kind, path = STAGES[name], (*path, name)
    values = {} if options is None else options
    if isinstance(values, kind):
        return values
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems += validation_problems(error, kind, values, path)
        return str(name)


def _no_stage(item: object) -> str:
    if isinstance(item, Mapping) and (name := next((key for key in item if key in STAGES), None)):
        others = ", ".join(str(key) for key in item if key != name)
        return f"a stage has one name, but {others} stands beside {name}; indent what belongs to {name} below it"
    return f"a stage is a name or name: {{key: value}}, not {shown(item)}; valid stages: {', '.join(STAGES)}"


def _python_place(path: Path) -> str:
    return f"stage {path[1] + 1}: " if path[:1] == ("stages",) and len(path) > 1 else "recipe: "  # type: ignore[operator]


def _stage_of(problem: Problem) -> int:
    """For sorting: what holds for all stages first."""
    path = problem.path
    return int(path[1]) if path[:1] == ("stages",) and len(path) > 1 else -1
