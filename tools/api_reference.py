"""MkDocs hook: puts signatures and docstrings where a page says `::: module.name` (a class with its methods, or a function)."""
from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

MARK = re.compile(r"^::: ([\w.]+)$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page. Raises AttributeError or ImportError, which end the build, for unknown names."""
    return MARK.sub(lambda mark: "\n".join(reference(mark[1])), markdown)


def reference(name: str) -> Iterator[str]:
    """The lines of Markdown for a name: its signature as heading, its docstring as it stands in the source."""
    module, _, attribute = name.rpartition(".")
    item = getattr(importlib.import_module(module), attribute)
    yield from entry(f"### `{name}{signature(item)}`", item)
    if not inspect.isclass(item):
        return
    for part, value in vars(item).items():
        if part.startswith("_") or not inspect.getdoc(getattr(item, part)):
            continue
        if isinstance(value, property):
            yield from entry(f"**`{attribute}.{part}`**", value)
        elif callable(getattr(item, part)):
            yield from entry(f"**`{attribute}.{part}{signature(getattr(item, part))}`**", value)


def entry(title: str, item: Any) -> Iterator[str]:
    document = inspect.getdoc(item)
    if not document:
        raise AttributeError(f"{title} has no docstring")
    yield from (title, "", "```text", document.replace("```", "'''"), "```", "")


def signature(item: Any) -> str:
    """Parameters with their defaults, without types, which the docstring gives."""
    try:
        found = inspect.signature(item)
    except ValueError:
        return ""
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"]
    return re.sub(r" at 0x\w+", "", str(found.replace(parameters=bare, return_annotation=found.empty)))
