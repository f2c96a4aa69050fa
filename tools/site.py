"""MkDocs hooks: the API reference and the figures.

Where a page says `::: module.name`, the signature and docstring of a function, or of a class with its methods, are put in
its place. Pictures of `paper_figs/built/`, which pages name by their place in the repository, become part of the site.
"""
from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUILT = Path(__file__).resolve().parents[1] / "paper_figs" / "built"
MARK = re.compile(r"^::: ([\w.]+)$", re.M)
PICTURE = re.compile(r"!\[[^]]*\]\(\.\./paper_figs/built/(\w+)\.png\)")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with the files of the site: adds the figures."""
    from mkdocs.structure.files import File

    for path in sorted(BUILT.glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page. Raises AttributeError or ImportError, which end the build, for unknown names."""
    return MARK.sub(lambda mark: "\n".join(reference(mark[1])), PICTURE.sub(picture, markdown))


def picture(found: re.Match) -> str:
    """A figure's place in the site, or, where there are no records to draw it from, what would draw it."""
    if (BUILT / f"{found[1]}.png").exists():
        return found[0].replace("../paper_figs/built/", "figures/")
    return f"*The figure `{found[1]}` is drawn by `make figures` once there are records for it.*"


def reference(name: str) -> Iterator[str]:
    """The lines of Markdown for a name: its signature as heading, its docstring as it stands in the source."""
    module, _, attribute = name.rpartition(".")
    if module == "znn.torch" and not importlib.util.find_spec("torch"):
        yield from (f"### `{name}`", "", "Needs PyTorch, which was not there when this page was made.", "")
        return
    try:
        item = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        if "needs PyTorch" not in str(error):
            raise
        yield f"### `{name}`\n\n*Shown where PyTorch is installed.*\n"
        return
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
