"""Real English sentences that every CPython carries: the prose of its reference manual and of its standard library."""

import ast
import importlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

# A sentence ends at . ! or ? before a space and a capital, but not inside "e.g." or after an initial.
_END = re.compile(r"(?<![A-Z])(?<!e\.g)(?<!i\.e)(?<!cf)(?<!vs)(?<!etc)[.!?](?=\s+[\"'(]?[A-Z])")
# Code, grammar, cross-references and markup: a sentence with any of these is not plain prose.
_NOT_PROSE = re.compile(r"[_=<>{}\[\]\\|*/`~^@#%+&$\d]|::|\.\.\.|\w\(|\w\.\w|\(\)|\"\W+\"|:$|^See ")
_BROKEN_WORD = re.compile(r"(?<=\w)- (?!and |or )(?=\w)")  # a hyphen at the end of a line
_WORD = re.compile(r"[A-Za-z][A-Za-z’'-]*")
_MIN_WORDS, _MAX_WORDS = 6, 45


def _paragraphs(text: str) -> Iterator[str]:
    """Yields the unindented paragraphs of a topic; what is indented is code, grammar or a field list."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        underlined = len(lines) > 1 and re.fullmatch(r"[*=\-~^\"]+", lines[-1])
        if lines[0][:1].isalpha() and not underlined and not any(line.startswith(" ") for line in lines):
            yield _BROKEN_WORD.sub("-", re.sub(r"\s+", " ", " ".join(lines)))


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _END.finditer(paragraph):
        yield paragraph[start : end.end()].strip()
        start = end.end()
    yield paragraph[start:].strip()


def _is_prose(sentence: str) -> bool:
    words = _WORD.findall(sentence)
    return (
        _MIN_WORDS <= len(words) <= _MAX_WORDS
        and sentence[:1].isupper()
        and sentence.endswith(".")
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
        and not _NOT_PROSE.search(sentence)
    )


def _prose(texts: Iterable[str]) -> list[str]:
    """The distinct prose sentences of the texts, in their order."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in _paragraphs(text):
            found.update((s, None) for s in _split(paragraph) if _is_prose(s))
    return list(found)


def load(limit: int | None = None) -> list[str]:
    """Returns up to `limit` distinct prose sentences in the manual's order, spread evenly over it.

    Raises RuntimeError where this Python was built without pydoc_data.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise RuntimeError("demo: this Python lacks pydoc_data; install its full standard library") from error
    sentences = _prose(topics[name] for name in sorted(topics))
    if limit is None or limit >= len(sentences):
        return sentences
    return [sentences[i * len(sentences) // limit] for i in range(limit)]


# Not every CPython comes with its tests, and what is installed beside the standard library is not part of it.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


def load_library() -> list[str]:
    """Returns the distinct prose sentences of the standard library's docstrings and comments, some 10 000 in 6 s.

    Raises RuntimeError where this Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in sorted(root.rglob("*.py")) if _NOT_LIBRARY.isdisjoint(f.relative_to(root).parts)]
    sentences = _prose(text for file in files for text in _written(file))
    if not sentences:
        raise RuntimeError(f"demo: {root} holds no Python sources with prose; install the full standard library")
    return sentences


def _written(file: Path) -> Iterator[str]:
    """Yields the docstrings and the blocks of comments of a Python file; nothing of one that does not parse."""
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or in another encoding
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    lines = [line.strip() for line in source.split("\n")]
    for comment in re.findall(r"(?:^#.*\n)+", "\n".join(lines), re.MULTILINE):
        yield re.sub(r"^#+ ?", "", comment, flags=re.MULTILINE)
