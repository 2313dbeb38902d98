"""The rules of the house that a machine can check; CONTRIBUTING.md gives their reasons."""

from __future__ import annotations

import ast
import graphlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml

from longlive_rag import cli, ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "longlive_rag"
CSRC = ROOT / "csrc"
PYTHON_FOLDERS = ("python", "tests", "benchmarks", "examples", "comfyui")
CPP_SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}

# From the bottom up: a file may include its own layer and those before it.
INCLUDE_LAYERS = ("emulator/", "core/", "cuda/ptx/", "cuda/", "bindings.cpp")

# Modules that stand on the library, from which no library module may import.
UPPER_ROOMS = {"bench", "cli", "commands", "evaluation", "serve", "small_world", "training"}

# With all their endings, but for the optimizer, which is what torch calls it.
VERBS = (
    "categorize|emphasize|equalize|factorize|finalize|generalize|initialize|linearize|materialize|maximize|memorize|"
    "minimize|normalize|optimize|organize|parameterize|penalize|prioritize|quantize|randomize|realize|recognize|"
    "serialize|specialize|stabilize|summarize|synchronize|utilize|vectorize|visualize|analyze"
)
AMERICAN = re.compile(
    rf"\b(?:\w*(?:{VERBS.replace('ze', 'z')})(?!er)\w*|(?:dis|un|multi)?color(?:s|ed|ing|less)?|colorful|"
    r"gray(?:s|ish|scale)?|(?:behavior|neighbor|favor|flavor|honor)\w*|(?:off|un)?center(?:s|ed|ing)?|artifacts?|"
    r"labeled|labeling|modeled|modeling|canceled|canceling|traveled|traveling|defense|catalogs?|fulfill)\b",
    re.IGNORECASE,
)
# What others named: code in backticks, addresses, paths and assignments, attributes, calls.
NAMES = re.compile(r"`[^`\n]*`|https?://\S+|[\w./-]*[_/=][\w./=-]*|\w+(?:\.\w+)+|\w+\(")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders or PYTHON_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def cpp_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in CPP_SUFFIXES)


def markdown_files() -> list[Path]:
    return sorted(chain(ROOT.glob("*.md"), *((ROOT / name).rglob("*.md") for name in ("docs", *PYTHON_FOLDERS))))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in python_files("python")}


def imported(path: Path, *, when: str) -> set[str]:
    """Modules of the package that a file imports.

    With `when` "loaded", only what runs as the module is loaded; "ever" has the imports inside of functions too. What
    stands under `if TYPE_CHECKING` never runs.
    """
    found: set[str] = set()

    def add(name: str) -> None:
        if name in modules():
            found.add(name)

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if when == "loaded" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{shown(path)}:{node.lineno}: a relative import; write the module's whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                add(whole if whole in modules() else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def room(module: str) -> str:
    """The module or folder directly below the package."""
    return [*module.split("."), ""][1]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that people read: all of a Markdown file but its code, comments and sentences of a source file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        in_code = False
        for number, line in enumerate(text.splitlines(), 1):
            if line.lstrip().startswith("```"):
                in_code = not in_code
            elif not in_code and not line.startswith("    "):
                yield number, line
    elif path.suffix == ".py":
        strings = {
            tokenize.STRING,
            getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
        }  # the second since Python 3.12
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT or (token.type in strings and " " in token.string):
                for offset, line in enumerate(token.string.splitlines()):
                    yield token.start[0] + offset, line
    else:
        for number, line in enumerate(text.splitlines(), 1):
            yield number, line.partition("//")[2]


@pytest.mark.parametrize(
    ("folders", "limit"), [(("python", "csrc", "benchmarks", "examples", "comfyui"), 400), (("tests",), 500)]
)
def test_a_file_can_be_read_in_one_sitting(folders: tuple[str, ...], limit: int) -> None:
    files = [path for path in [*python_files(), *cpp_files()] if path.relative_to(ROOT).parts[0] in folders]
    lengths = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > limit} == {}


def test_nothing_is_left_to_be_done_later() -> None:
    mark = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")  # house: allow
    assert found_in([*python_files(), *cpp_files(), *markdown_files()], mark, but="house: allow") == []


def test_nothing_needs_a_folder_outside_the_repository() -> None:
    outside = re.compile(r"\.\./shared|(?<!\w)shared/(?:data|design|golden|hooks|sketches)")
    assert found_in([*python_files("python", "benchmarks", "examples"), *cpp_files(), *markdown_files()], outside) == []


def found_in(files: list[Path], pattern: re.Pattern[str], but: str | None = None) -> list[str]:
    return [
        f"{shown(path)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line) and not (but and but in line)
    ]


def test_assembly_stands_in_ptx_alone() -> None:
    elsewhere = [path for path in cpp_files() if CSRC / "cuda" / "ptx" not in path.parents]
    assert found_in(elsewhere, re.compile(r"\basm\b\s*(?:volatile\s*)?\(")) == []


def test_the_extension_includes_nothing_of_torch() -> None:
    assert found_in(cpp_files(), re.compile(r"#\s*include\s*[<\"](?:torch|ATen|c10)\b")) == []


def test_includes_run_downwards() -> None:
    """emulator <- core <- ptx <- cuda <- bindings."""

    def layer(name: str) -> int:
        return next((i for i, start in enumerate(INCLUDE_LAYERS) if name.startswith(start)), -1)

    upwards = []
    for path in cpp_files():
        name = path.relative_to(CSRC).as_posix()
        assert layer(name) >= 0, f"csrc/{name} lies in none of {', '.join(INCLUDE_LAYERS)}"
        for target in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8")):
            assert (CSRC / target).is_file(), f"csrc/{name} includes {target!r}; write the path below csrc"
            if layer(target) > layer(name):
                upwards.append(f"{name} includes {target}")
    assert upwards == []


@pytest.mark.parametrize("name", [path.stem for path in (PACKAGE / "ops").glob("[a-z]*.py")])
def test_an_operation_is_one_word_everywhere(name: str) -> None:
    assert name in ops.__all__
    parts = [
        f"csrc/cuda/{name}.cu",
        f"csrc/cuda/{name}.h",
        f"python/longlive_rag/ops/{name}.py",
        f"tests/ops/test_{name}.py",
        f"python/longlive_rag/bench/{name}.py",
    ]
    assert [part for part in parts if not (ROOT / part).is_file()] == []
    assert list(CSRC.glob(f"cuda/{name}*.cuh"))


def test_no_module_below_the_commands_imports_them() -> None:
    arrows = [
        f"{module} -> {target}"
        for module, path in modules().items()
        if room(module) not in {"cli", "commands", "__main__"}
        for target in imported(path, when="ever")
        if room(target) in {"cli", "commands"}
    ]
    assert arrows == []


def test_the_library_stands_without_what_is_built_on_it() -> None:
    arrows = [
        f"{module} -> {target}"
        for module, path in modules().items()
        if room(module) not in UPPER_ROOMS | {"__main__"}
        for target in imported(path, when="ever")
        if room(target) in UPPER_ROOMS
    ]
    assert arrows == []


def test_training_and_evaluation_know_no_small_world() -> None:
    arrows = [
        f"{module} -> {target}"
        for module, path in modules().items()
        if room(module) in {"training", "evaluation", "bench"}
        for target in imported(path, when="ever")
        if room(target) == "small_world"
    ]
    assert arrows == []


def test_imports_run_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in modules().items():
        graph[module] = set()
        for target in imported(path, when="loaded") - {module}:
            graph[module].add(target)
            # A package runs before its modules do; one that is being loaded already is not waited for.
            parts = target.split(".")
            parents = {".".join(parts[:i]) for i in range(2, len(parts))}
            graph[module] |= {parent for parent in parents if not f"{module}.".startswith(f"{parent}.")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_one_spelling() -> None:
    this = Path(__file__)
    american = [
        f"{shown(path)}:{number}: {match.group()}"
        for path in [*python_files(), *cpp_files(), *markdown_files()]
        if path != this
        for number, line in prose(path)
        for match in AMERICAN.finditer(NAMES.sub(" ", line))
    ]
    assert american == []


def test_the_readme_lists_every_command() -> None:
    rows = re.findall(r"^\|(.*?)\|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = [word for row in rows for code in re.findall(r"`([^`]+)`", row) for word in code.split()[:1]]
    assert [name for name in cli.COMMANDS if name not in listed] == []


def links(path: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+\s+(.+?)\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    broken = []
    for path in markdown_files():
        for link in links(path):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{shown(path)}: {link}")
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path not in reached and path.suffix == ".md":
            reached.add(path)
            waiting += [(path.parent / link.partition("#")[0]).resolve() for link in links(path)]
    assert [shown(path) for path in (ROOT / "docs").rglob("*.md") if path not in reached] == []


def test_every_page_is_in_the_contents_of_the_site() -> None:
    nav = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in nav) == []


@pytest.mark.parametrize("folder", ["golden", "backbones/traces", "generation/traces"])
def test_every_trace_says_how_it_was_recorded(folder: str) -> None:
    text = (ROOT / "tests" / folder / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "tests" / folder).glob("*.safetensors") if f"`{path.stem}" not in text] == []


def test_the_hooks_run_what_make_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert all(repository["repo"] == "local" for repository in config["repos"]), (
        "pinned twice is pinned to two versions"
    )
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert lint is not None
    tools = set(re.findall(r"\$\(BIN\)/(\S+)", lint.group(1)))
    assert {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks} == tools
    pinned = re.findall(r'^    "([\w-]+)==', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert tools <= set(pinned)
