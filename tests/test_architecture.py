"""Who may know whom: walks the imports of the Python packages and the includes of the native core.

The rules are the project's layout: arrows point one way, importing znn costs NumPy and the core only, records
are read without the engine, and each outside library has one room that knows it.
"""
from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Modules of znn/ from the ground up: each may import from lower ranks and from its own.
LAYERS = [
    {"errors", "files"},
    {"cache", "options"},
    {"spec", "fftw"},
    {"zoo", "shapes"},
    {"graph", "znn_format"},
    {"init", "cost", "reference", "trace", "draw"},
    {"bundled"},
    {"footprint"},
    {"plan"},
    {"theory", "network", "roofline"},
    {"checkpoint"},
    {"train", "infer", "torch"},
    {"bench"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The one import that leads upwards on purpose, in a function: spec.load reads .znn files, whose module builds
# specs.
UPWARDS = {("spec", "znn_format")}
# Who may import the core. The two files of the suite only ask whether it is there and how it was built.
CORE_USERS = {"znn/__init__.py", "znn/network.py", "znn/plan.py", "znn/bundled.py", "znn/fftw.py", "znn/torch/layers.py"}
CORE_FACTS = {"znn/bench/provenance.py", "znn/bench/adapters/znn_adapter.py"}
PRIVATE = re.compile(r"znn\.(_|.*\._)")


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(full name of an imported module, whether the import runs when the file is loaded)."""
    def walk(node: ast.AST, loaded: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, loaded) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = absolute(path, child)
                names = [f"{base}.{alias.name}" for alias in child.names if is_module(base, alias.name)]
                yield from ((name, loaded) for name in names)
                if len(names) < len(child.names):
                    yield base, loaded
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, loaded and not inner)

    return walk(ast.parse(path.read_text(encoding="utf-8")), True)


def absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parts[:-node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def is_module(base: str, name: str) -> bool:
    place = ROOT / base.replace(".", "/")
    return (place / f"{name}.py").exists() or (place / name / "__init__.py").exists() or name == "_core"


def room(path: Path) -> str:
    """The module of znn/ that a file is or belongs to."""
    parts = path.relative_to(ROOT / "znn").with_suffix("").parts
    return parts[0]


ENGINE_FILES = [path for path in python_files("znn") if room(path) not in ("bench", "__init__")]


def named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


# ---- Python -------------------------------------------------------------------------------------------
@named(ENGINE_FILES)
def test_modules_of_znn_know_only_what_is_below_them(path):
    own = room(path)
    assert own in RANK, f"znn/{own} has no place in LAYERS: add it where it belongs"
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "znn":
            continue
        whom = parts[1] if len(parts) > 1 else "znn"
        if whom == "_core" or (own, whom) in UPWARDS:
            continue
        # The package itself hands out Network, so it ranks with it.
        rank = RANK.get("network" if whom == "znn" else whom)
        assert rank is not None, f"znn/{own} imports {module}, which no module below the command line may"
        assert rank <= RANK[own], f"znn/{own} imports {module}, which stands above it"


@named(ENGINE_FILES)
def test_loading_a_module_of_znn_needs_only_numpy(path):
    known = ("numpy", "znn", "torch") if room(path) == "torch" else ("numpy", "znn")  # znn.torch is loaded on demand
    for module, loaded in imports(path):
        top = module.split(".")[0]
        assert not loaded or top in known or top in sys.stdlib_module_names, (
            f"{path.name} imports {module} when loaded: import it in the function that uses it")


def test_the_reference_knows_numpy_alone():
    known = {module.split(".")[0] for module, _ in imports(ROOT / "znn/reference.py")}
    assert known <= {"numpy", "pyfftw"} | set(sys.stdlib_module_names)


@named(python_files("znn"))
def test_few_know_the_core(path):
    name, allowed = str(path.relative_to(ROOT)), CORE_USERS | CORE_FACTS
    if any("_core" in module.split(".") for module, _ in imports(path)):
        assert name in allowed, f"{name} imports znn._core; only {sorted(allowed)} may"


@named([*python_files("znn/bench"), *python_files("experiments"), *python_files("benchmarks"),
        *python_files("paper_figs")])
def test_what_surrounds_the_engine_uses_its_public_names(path):
    name = str(path.relative_to(ROOT))
    for module, _ in imports(path):
        assert not PRIVATE.match(module) or name in CORE_FACTS and module == "znn._core", (
            f"{name} imports the private {module}")


@named(python_files("paper_figs"))
def test_figures_know_records_not_the_engine(path):
    for module, _ in imports(path):
        if module.split(".")[0] == "znn":
            assert module in ("znn", "znn.bench") and module != "znn" or module.startswith("znn.bench."), (
                f"{path.name} imports {module}; figures are made from records alone")


def test_importing_znn_is_importing_numpy_and_the_core():
    code = ("import json, sys; before = set(sys.modules); import znn; new = set(sys.modules) - before; "
            "print(json.dumps([[name, getattr(sys.modules[name], '__file__', None)] for name in new]))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    loaded = {name.split(".")[0] for name, file in json.loads(out.stdout) if file}
    foreign = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign <= {"numpy", "znn"}, f"import znn pulls in {sorted(foreign - {'numpy', 'znn'})}"
    modules = {name for name, _ in json.loads(out.stdout)}
    assert {"znn", "znn._core", "numpy"} <= modules
    assert not any(name.startswith(("znn.bench", "znn.train", "znn.cli")) for name in modules)


# ---- the native core ----------------------------------------------------------------------------------
NATIVE = {
    "base": {"base"},
    "fft": {"base", "fft"},
    "kernels": {"base", "fft", "kernels"},
    "tasks": {"base", "tasks"},
    "tiled": {"base", "fft", "kernels", "tiled"},
    "engine": {"base", "fft", "kernels", "tasks", "tiled", "engine"},
    "bindings": {"base", "fft", "kernels", "tasks", "tiled", "engine", "bindings"},
    "tests": {"base", "fft", "kernels", "tasks", "tiled", "engine", "tests"},
}
SOURCES = sorted(path for path in (ROOT / "native").rglob("*") if path.suffix in (".hpp", ".cpp", ".inc"))
# header (a regular expression) -> the only rooms that may include it
OUTSIDE = {
    r"pybind11/": {"bindings"},
    r"Python\.h": {"bindings"},
    r"fftw3?\.h": {"fft"},
    r"dlfcn\.h": {"fft"},
    r"(thread|mutex|condition_variable|pthread\.h|future)$": {"base", "fft", "tasks", "engine", "tests"},
}


def includes(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether in quotes) of every #include."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line):
            yield match[2], match[1] == '"'


@named(SOURCES)
def test_rooms_of_the_core_know_only_what_is_below_them(path):
    own = path.relative_to(ROOT / "native").parts[0]
    assert own in NATIVE, f"native/{own} has no place in NATIVE: add it where it belongs"
    for name, quoted in includes(path):
        if not quoted:
            continue
        whom = name.split("/")[0] if "/" in name else own
        assert whom in NATIVE[own], f"native/{own} includes {name}"
        assert (ROOT / "native" / name).exists() or (path.parent / name).exists() or name.endswith(".inc"), (
            f"{path.name} includes {name}, which does not exist")


@named(SOURCES)
def test_outside_libraries_have_one_room_each(path):
    own = path.relative_to(ROOT / "native").parts[0]
    for name, _ in includes(path):
        for pattern, rooms in OUTSIDE.items():
            assert not re.match(pattern, name) or own in rooms, f"native/{own} includes {name}: only {rooms}"
