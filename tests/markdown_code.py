"""The code blocks of a Markdown file, for the tests that run what the README and the guides print."""
from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Code between fences: its language, its text, and the line of the file it starts on."""

    file: Path
    language: str
    text: str
    line: int


def blocks(path: Path, language: str) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(path, match[1], match[2], text.count("\n", 0, match.start()) + 2)
            for match in FENCE.finditer(text) if match[1] == language]


def run_python(path: Path) -> dict:
    """Run the file's Python blocks one after the other in one namespace, which is returned.

    Errors name the line of the Markdown file.
    """
    namespace: dict = {"__name__": "__main__"}
    for block in blocks(path, "python"):
        # Blank lines in front make the line numbers of a traceback those of the file.
        exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)
    return namespace


def commands(path: Path) -> list[list[str]]:
    """The commands of the file's shell blocks as words, without comments and prompts; `\\` joins lines."""
    lines = [line for block in blocks(path, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def links(path: Path) -> list[str]:
    """Targets of the file's links and pictures that are no web addresses, without anchors."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.split("#")[0] for target in found if not re.match(r"[a-z]+:", target) and target.split("#")[0]]


def check_links(path: Path) -> None:
    """Every file linked exists, or is a figure that `paper_figs/build.py` draws once there are records."""
    for target in links(path):
        file = (path.parent / target).resolve()
        if file.parent == ROOT / "paper_figs" / "built":
            assert (ROOT / "paper_figs" / f"fig_{file.stem}.py").exists(), f"{path.name} links {target}, which nothing draws"
            assert file.suffix in (".png", ".pdf", ".csv", ".txt")
        else:
            assert file.exists(), f"{path.name} links {target}, which does not exist"


def check_commands(path: Path) -> None:
    """Every `znn`, `run_all.py` and `make` command is one that the program accepts, by its parser."""
    from znn import cli
    from znn.bench import suite

    rules = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"[a-z]+:", line)}
    for words in commands(path):
        try:
            if words[0] == "znn":
                cli._parser().parse_args(words[1:])
            elif words[:2] == ["python", "experiments/run_all.py"]:
                suite.parser().parse_args(words[2:])
            elif words[0] == "make":
                assert words[1] in rules, f"{path.name}: the Makefile has no rule {words[1]}"
            elif words[0] == "python" and words[1] != "-m":
                assert (ROOT / words[1]).exists(), f"{path.name}: {words[1]} does not exist"
        except SystemExit as stopped:
            assert not stopped.code, f"{path.name}: wrong usage in `{shlex.join(words)}`"
