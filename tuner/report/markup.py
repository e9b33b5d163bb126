"""Pieces of HTML; every text that comes from a study is escaped here."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tuner.report.assets import STYLE


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def html(text: object) -> str:
    """Text as HTML; what is HTML already stays as it is."""
    return text if isinstance(text, Html) else escape(str(text))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """An element with its content; ``class_`` gives the attribute ``class``."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{pairs}>{''.join(html(part) for part in content)}</{tag}>")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table whose first column names the row; narrow screens show the heads in the cells."""
    header = element("thead", element("tr", *(element("th", h, scope="col") for h in head)))
    body = element("tbody", *(_row(head, row) for row in rows))
    return element("table", element("caption", caption), header, body)


def _row(head: Sequence[str], row: Sequence[object]) -> Html:
    first, *rest = row
    labels = head[1:] if len(rest) > 1 else [None]
    cells = (element("td", cell, data_label=h) for h, cell in zip(labels, rest, strict=True))
    return element("tr", element("th", first, scope="row"), *cells)


def page(title: str, *content: object, head: Sequence[Html] = ()) -> str:
    """A whole document in the report's style; ``head`` goes before the style."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    opening = [Html('<meta charset="utf-8">'), *head, Html(viewport), element("title", title)]
    style = Html(f"<style>{STYLE}</style>")
    body = element("body", element("h1", title), *content)
    return (
        f"<!doctype html>\n{element('html', element('head', *opening, style), body, lang='en')}\n"
    )


def plot(name: str, figure: Any, hint: str, *more: Html) -> Html:
    """A figure whose title is the caption, where screen readers and narrow screens read it."""
    title = figure.layout.title.text
    figure.layout.title = None
    figure.layout.template = None
    figure.layout.margin.t = 16
    block = json_block(f"figure-{name}", figure.to_json())
    box = element("div", class_="plot", data_figure=f"figure-{name}")
    caption = element("figcaption", Html(title))
    return element("figure", caption, element("p", hint), box, block, *more)


def json_block(name: str, value: Any) -> Html:
    """Data for a script, which cannot close its element however the texts in it read."""
    text = value if isinstance(value, str) else json.dumps(value)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def script(text: str) -> Html:
    """A script of our own."""
    return Html(f"<script>{text}</script>")


def content_policy(*scripts: str) -> str:
    """A policy that runs exactly these scripts and loads nothing from anywhere."""
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
