"""The file of `pycompress compress`: loads the functions that it names, and checks them, before any is called.

What each function takes and returns is in ROLES. One that has a parameter `seed` gets the recipe's. Files are loaded
once, so that what they keep in variables is shared; the configuration's folder is where `import` looks first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pycompress.recipe import Config, Recipe, Reference
from pycompress.recipe.problems import Problem, closest, raise_for
from pycompress.recipe.reading import read_config
from pycompress.workflow.errors import PreflightError
from pycompress.workflow.rng import seed_all

_NOT_THEIRS = (os.path.dirname(os.path.dirname(__file__)), sysconfig.get_path("stdlib"), "<frozen")
_SHOWN = 12  # names of a file's functions in an error


@dataclass(frozen=True)
class Role:
    """A function of the configuration: called for its result with `given` positional arguments when a run starts, or
    passed on to be called with them (`given` not empty).
    """

    given: tuple[str, ...] = ()
    returns: str = ""


ROLES = {
    "model": Role(returns="a torch.nn.Module"),
    "teacher": Role(returns="a torch.nn.Module"),
    "train_batches": Role(given=("epoch",), returns="the batches of an epoch; without parameters, of every epoch"),
    "calibration": Role(returns="model inputs, as pycompress.calibrate takes them"),
    "eval_fn": Role(given=("model",), returns="a number or {name: number}"),
    "loss_fn": Role(given=("output", "batch"), returns="the loss of a batch, a scalar tensor"),
}


@dataclass(frozen=True)
class Task:
    """A configuration whose functions are loaded, and not called yet."""

    path: Path
    config: Config
    functions: dict[str, Callable[..., Any]]

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe()

    def arguments(self, seed: int) -> dict[str, Any]:
        """What compress() takes beside the recipe; makes the model. Raises PreflightError where a function fails."""
        seed_all(seed)  # so that a model of random weights is the same each time
        return {role: self._argument(role, function, seed) for role, function in self.functions.items()}

    def _argument(self, role: str, function: Callable[..., Any], seed: int) -> Any:
        if takes(function, "seed") and "seed" not in _bound(function):
            function = functools.partial(function, seed=seed)
        if ROLES[role].given and not (role == "train_batches" and is_factory(function)):
            return function
        name = getattr(self.config, role)
        try:
            made = function()
        except Exception as error:
            raise PreflightError(f"{role}: {name} raised {type(error).__name__}: {error}") from error
        if role in ("model", "teacher") and not isinstance(made, nn.Module):
            raise PreflightError(f"{role}: {name} returned a {type(made).__name__}; expected {ROLES[role].returns}")
        if made is None:
            raise PreflightError(f"{role}: {name} returned None; expected {ROLES[role].returns}")
        return made


def load_task(path: str | os.PathLike[str], seed: int | None = None) -> Task:
    """Reads the file and loads what it names; seed: instead of the file's.

    Raises RecipeError naming every problem with its line.
    """
    config, document = read_config(path)
    if seed is not None:
        config = config.model_copy(update={"seed": seed})
    folder = Path(path).resolve().parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    modules: dict[str, ModuleType | str] = {}
    functions: dict[str, Callable[..., Any]] = {}
    problems = _missing(config)
    for role in ROLES:
        reference = getattr(config, role)
        if reference is None:
            continue
        if reference.source not in modules:
            modules[reference.source] = _loaded(reference.source, folder)
        module = modules[reference.source]
        try:
            if isinstance(module, str):
                raise ValueError(module)
            functions[role] = _function(module, reference, role)
        except ValueError as error:
            problems.append(Problem((role,), f"{role}: {error}"))
    raise_for(sorted(problems, key=lambda problem: document.line(problem.path)), document.place)
    return Task(Path(path), config, functions)


def _missing(config: Config) -> list[Problem]:
    """What the stages need and the file does not name."""
    problems = []
    for i, stage in enumerate(config.stages):
        if config.train_batches is None and stage.training is not None:
            problems.append(Problem(("stages", i), f"{stage.name} trains, but there is no train_batches: in this file"))
        elif config.train_batches is None and config.calibration is None and stage.needs_samples:
            text = f"{stage.name} looks at model inputs, but there is neither calibration: nor train_batches: here"
            problems.append(Problem(("stages", i), text))
    return problems


def _loaded(source: str, folder: Path) -> ModuleType | str:
    """The module, or what is wrong with it."""
    try:
        return _load_file(folder / source) if source.endswith(".py") else importlib.import_module(source)
    except FileNotFoundError as error:
        return f"there is no file {error.filename}; paths are relative to the configuration"
    except (Exception, SystemExit) as error:
        hint = "" if source.endswith(".py") else "; a file is named as file.py:name"
        return f"{source} cannot be loaded: {type(error).__name__}: {error}{place_of(error)}{hint}"


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    # The name is the same wherever the folder lies: runs know a model by its class, and resume by it.
    name = re.sub(r"\W", "_", f"{path.resolve().parent.name}_{path.stem}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def _function(module: ModuleType, reference: Reference, role: str) -> Callable[..., Any]:
    """The function with its arguments bound. Raises ValueError where it is not there or cannot be called so."""
    target: Any = module
    for part in reference.name.split("."):
        if not hasattr(target, part):
            defined = _defined(target)
            nearest = closest(part, defined)
            hint = f"did you mean {nearest!r}? " if nearest else ""
            named = ", ".join(defined[:_SHOWN]) + (", ..." if len(defined) > _SHOWN else "")
            raise ValueError(f"{reference.source} defines no {part!r}; {hint}it defines {named or 'no function'}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{reference} is a {type(target).__name__}; expected a function that returns it")
    arguments = reference.arguments or {}
    _check_call(target, reference, arguments, role)
    return functools.partial(target, **arguments) if arguments else target


def _defined(target: Any) -> list[str]:
    """The functions and classes that a module or class defines itself, those that it imports left out."""
    home = getattr(target, "__name__", None)
    return [
        name
        for name, value in vars(target).items()
        if callable(value) and not name.startswith("_") and (not inspect.ismodule(target) or value.__module__ == home)
    ]


def _check_call(function: Callable[..., Any], reference: Reference, arguments: Mapping[str, Any], role: str) -> None:
    parameters = _parameters(function)
    if parameters is None:
        return
    known = [
        name for name, p in parameters.items() if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in known:
                nearest = closest(name, known)
                hint = f"did you mean {nearest!r}? " if nearest else ""
                raise ValueError(f"{reference} takes no {name!r}; {hint}it takes {', '.join(known) or 'nothing'}")
    keywords = dict(arguments) | ({"seed": 0} if "seed" in known and "seed" not in arguments else {})
    given = ROLES[role].given
    if role == "train_batches" and is_factory(functools.partial(function, **keywords)):
        given = ()
    try:
        inspect.signature(function).bind(*given, **keywords)
    except TypeError as error:
        call = ", ".join([*given, *(f"{name}=..." for name in keywords)])
        raise ValueError(
            f"{reference} cannot be called as {reference.name}({call}): {error}; arguments of your own are given as "
            f'{{call: "{reference}", name: value}}'
        ) from None


def is_factory(train_batches: Callable[..., Any]) -> bool:
    """Whether it is called once for all epochs: it has no parameter `epoch` and none that must be given."""
    if takes(train_batches, "epoch"):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = _parameters(train_batches)
    return parameters is not None and all(
        p.default is not p.empty or p.kind not in positional for p in parameters.values()
    )


def takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in (_parameters(function) or {})


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # builtins have none
        return None


def _bound(function: Callable[..., Any]) -> Mapping[str, Any]:
    return function.keywords if isinstance(function, functools.partial) else {}


def place_of(error: BaseException | None) -> str:
    """Where in the user's files an error was raised, as " (task.py, line 12)"."""
    place, trace = "", error.__traceback__ if error else None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_NOT_THEIRS) and "site-packages" not in file:
            place = f" ({os.path.basename(file)}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
