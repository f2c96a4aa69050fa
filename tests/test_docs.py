"""The guides: every Python example runs, every command is accepted, every link and file named exists, the site builds."""
from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import markdown_code as markdown
from markdown_code import ROOT

GUIDES = sorted((ROOT / "docs").glob("*.md"))
with_python = [path for path in GUIDES if markdown.blocks(path, "python")]
guides = pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", with_python, ids=lambda path: path.name)
def test_the_examples_run(path):
    if path.name == "torch.md" and not importlib.util.find_spec("torch"):
        pytest.skip("PyTorch is not installed (pip install 'znn[torch]')")
    Path("results").mkdir()  # as in the clone, where they are read
    markdown.run_python(path)


def test_a_broken_example_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        markdown.run_python(page)
    page.write_text("```sh\nznn describe scaling_3d --no-such-option\n```\n")
    with pytest.raises(AssertionError, match="wrong usage"):
        markdown.check_commands(page)
    page.write_text("[gone](gone.md)\n")
    with pytest.raises(AssertionError, match="does not exist"):
        markdown.check_links(page)


@guides
def test_the_commands_are_accepted(path):
    markdown.check_commands(path)


@guides
def test_the_links_lead_somewhere(path):
    markdown.check_links(path)


@guides
def test_the_files_named_exist(path):
    folders = "znn|native|tests|experiments|paper_figs|benchmarks|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or "NAME" in name, f"{path.name} names {name}, which does not exist"


def test_every_experiment_is_in_the_guide():
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    for path in (ROOT / "experiments" / "sweeps").glob("*.toml"):
        assert f"`{path.stem}`" in text, f"docs/reproduce.md does not say what {path.stem} is for"


def test_every_key_of_a_record_is_in_the_guide():
    import dataclasses

    from znn.bench.record import Record

    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Record):
        # The run and the machine name the file and its folder.
        assert f"`{field.name}`" in text or field.name in ("run_id", "machine_id"), f"docs/measuring.md lacks {field.name}"


def test_every_guide_is_in_the_navigation():
    named = set(re.findall(r": (\w[\w-]*\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {path.name for path in GUIDES}


def test_the_site_builds_without_warnings(tmp_path):
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip("mkdocs is not installed (pip install 'znn[docs]')")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
                           cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").exists()
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "Network.train_step" in reference and ":::" not in reference


def test_the_reference_holds_every_public_name():
    import znn
    import znn.train

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", text, re.M)}
    exported = re.search(r"__all__ = \[(.*?)\]", (ROOT / "znn" / "torch" / "__init__.py").read_text(), re.S)
    assert set(re.findall(r'"(\w+)"', exported[1])) <= listed, "docs/api.md lacks names of znn.torch"
    for name in znn.__all__:
        assert name in listed or inspect.ismodule(getattr(znn, name)) or name.endswith("Error"), f"docs/api.md lacks {name}"


def test_the_reference_is_made_of_docstrings_and_pictures_find_their_place(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "tools" / "site.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert ":::" not in page and "Forward, loss, backward and update" in page
    assert hook.on_page_markdown("# Title\n") == "# Title\n"
    shown = "![a Gantt chart](../paper_figs/built/%s.png)"
    assert "make figures" in hook.on_page_markdown(shown % "no_such_figure")
    (tmp_path / "gantt.png").write_bytes(b"")
    monkeypatch.setattr(hook, "BUILT", tmp_path)
    assert hook.on_page_markdown(shown % "gantt") == "![a Gantt chart](figures/gantt.png)"
    with pytest.raises(AttributeError):
        hook.on_page_markdown("::: znn.network.NoSuch\n")
