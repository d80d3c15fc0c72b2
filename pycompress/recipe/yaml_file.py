"""YAML to plain Python values, with the line that each of them stands in.

Anchors, aliases and merge keys (`<<`) work; a key given twice is refused. Numbers are read as YAML 1.2 reads them:
1e-3 is a number and 2:4 is text (PyYAML, which follows 1.1, takes them for text and for 124). Nothing but text,
numbers, true, false, null, lists and mappings is made, and no more of them than a recipe could need.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from pycompress.recipe.problems import Path, Problem, RecipeError, dotted, raise_for

MAX_BYTES = 1 << 18
MAX_VALUES = 20_000  # a few aliases of aliases write out to billions
MAX_DEPTH = 24
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = {"nan": "nan", "inf": "inf", "+inf": "inf", "-inf": "-inf"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass
class Document:
    """values: the file's content; lines: of every key and list item, by path, counted from 1."""

    name: str
    values: Any = None
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        """That of the innermost place that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def place(self, path: Path) -> str:
        """What an error message starts with."""
        return f"{self.name}:{self.line(path)}: "


def read_yaml(path: str | os.PathLike[str]) -> Document:
    """Raises RecipeError, naming file and line, for what is no file, no text or no YAML of that kind."""
    document = Document(os.fspath(path))
    text = _text(File(path))
    reader = _Reader(document)
    try:
        root = _compose(document.name, text)
        if root is None:
            raise RecipeError([f"{document.name}: the file is empty; expected stages:, a list"])
        document.values = reader.value(root, ())
    except RecursionError:
        raise RecipeError([f"{document.name}: nested more than {MAX_DEPTH} deep, which no recipe is"]) from None
    raise_for(reader.problems, document.place)
    return document


def _text(path: File) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror or error}"]) from error
    if len(content) > MAX_BYTES:
        raise RecipeError([f"{path}: more than {MAX_BYTES} bytes, which is no recipe"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise RecipeError([f"{path}:{line}: no UTF-8 text (byte {byte:#04x}); save it as UTF-8"]) from None


def _compose(name: str, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, [error.context, error.problem]))
        raise RecipeError([f"{name}:{mark.line + 1 if mark else 1}: no valid YAML: {what}"]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError([f"{name}:{line}: no valid YAML: character {error.character:#x} is not allowed"]) from None


@dataclass
class _Reader:
    document: Document
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            deep = f"nested more than {MAX_DEPTH} deep" if len(path) > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise RecipeError([f"{self.document.place(path)}{deep}, aliases written out, which no recipe is"])
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        return self._refused(node, path)

    def _refused(self, node: yaml.Node, path: Path) -> None:
        tag = node.tag.replace(_TAG, "!!")
        text = f"{dotted(path) or 'the file'} has the tag {tag}; a recipe has none: leave it out"
        self.problems.append(Problem(path, text))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                merged = self._merged(value_node, path) | merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(path, "a key is a name, not a list or a mapping"))
                continue
            key = key_node.value
            at = (*path, key)
            if key in own:
                text = f"key {dotted(at)!r} is given twice, first in line {self.document.lines[at]}; leave one out"
                again = (*at, "again")
                self.document.lines[again] = line
                self.problems.append(Problem(again, text))
                continue
            self.document.lines[at] = line
            own[key] = self.value(value_node, at)
        return merged | own

    def _merged(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """What `<<: *other` or `<<: [*one, *other]` brings; of several the first one that has a key counts."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, Any] = {}
        for one in nodes:
            value = self.value(one, path)
            if not isinstance(value, Mapping):
                self.problems.append(Problem(path, "<<: takes a mapping, as <<: *name, or a list of them"))
                break
            found = dict(value) | found
        return found

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = node.value
        if node.tag == _TAG + "str" and node.style is not None:
            return text
        if node.tag not in _SCALARS:
            return self._refused(node, path)
        if node.tag == _TAG + "null":
            return None
        if text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        if (name := text.lower().replace(".", "", 1)) in _NOT_FINITE and "." in text:
            return float(_NOT_FINITE[name])
        if len(text) <= 100 and _INT.fullmatch(text):  # int() refuses thousands of digits
            return int(text)
        return float(text) if _FLOAT.fullmatch(text) else text
