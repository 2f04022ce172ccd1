"""HTML pages of facts, words, tables and plots: one file each, readable without a server or a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import RequestError
from trainer.durable import write_text

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A value that stands at the top."""

    name: str
    value: str
    warn: bool = False
    """A reader must not miss it."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    small: str = ""
    """Below the text, in small print: an interval."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn plot."""

    title: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page."""

    title: str
    words: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page."""

    title: str
    subtitle: str
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    def html(self) -> str:
        """The page as HTML text."""
        import jinja2

        loader = jinja2.FileSystemLoader(TEMPLATES)
        environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        return environment.get_template("page.html.j2").render(
            title=self.title, subtitle=self.subtitle, facts=self.facts, sections=self.sections
        )

    def write(self, target: Path) -> None:
        """Write the page.

        Raises:
            RequestError: the file cannot be written.
        """
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, self.html())
        except OSError as error:
            raise RequestError("--output", f"{target}: {error.strerror}", "a file that can be written") from error


def number(value: float | None) -> str:
    """A number for a table; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def span(low: float | None, high: float | None) -> str:
    """An interval for small print; nothing where there is none or it has no width."""
    return "" if low is None or high is None or low == high else f"{number(low)} to {number(high)}"
