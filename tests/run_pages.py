"""Reads the page of a report as strictly as a validator would."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pycompress.run_report import write_report
from pycompress.run_report.page import SECTIONS

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.svgs = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.texts))


def page_of(run: Path) -> tuple[Page, str, dict[str, Any]]:
    path = write_report(run)
    text = path.read_text(encoding="utf-8")
    content = json.loads((path.parent / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return check(text), text, content


def check(text: str) -> Page:
    """That the page is well-formed, has every section and needs nothing else."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(SECTIONS) <= set(page.ids)
    for tag, name, value in page.attributes:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), tag
        assert name not in ("src", "srcset", "action", "background"), (tag, name)
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), value
            assert value[1:] in page.ids
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.strip("'\"").lstrip("#") in page.ids
    outside = re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|xmlns", re.sub(r"(?m)^//.*$", "", text))
    assert outside == []
    return page
