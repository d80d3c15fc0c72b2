"""Real English sentences that every CPython carries: the prose of its own reference manual."""

import importlib
import re
from collections.abc import Iterator

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


def load(limit: int | None = None) -> list[str]:
    """Returns up to `limit` distinct prose sentences in the manual's order, spread evenly over it.

    Raises RuntimeError where this Python was built without pydoc_data.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise RuntimeError("demo: this Python lacks pydoc_data; install its full standard library") from error
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in _paragraphs(topics[name]):
            found.update((s, None) for s in _split(paragraph) if _is_prose(s))
    sentences = list(found)
    if limit is None or limit >= len(sentences):
        return sentences
    return [sentences[i * len(sentences) // limit] for i in range(limit)]
