"""What MkDocs does not do by itself for `make docs`.

The Markdown is written for GitHub, where it links to anything in the repository. Here, whatever a page links to outside
of `docs/` joins the site: Markdown as a page, a script as a page that shows it, a folder as a page that lists it, all
else as a file. The reference of commands and Python names is made from the package itself.
"""

from __future__ import annotations

import ast
import contextlib
import html
import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {".py": "python", ".sh": "bash", ".yml": "yaml", "": "bash"}
REFERENCE = ("longlive_rag", "backbones", "selection", "embedding", "models", "ops")
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")

sources: dict[str, str] = {}
"""Path in the repository of each page, by its place in the site."""


def place(path: str) -> str:
    """Where a path of the repository is in the site."""
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"{path}/README.md" if (ROOT / path / "README.md").exists() else f"{path}/index.md"
    path = path.removeprefix("docs/").lstrip(".")  # MkDocs leaves out what is hidden
    return f"{path}.md" if Path(path).suffix in LANGUAGES else path


def links(markdown: str) -> Iterator[str]:
    for _, target, _ in LINK.findall(FENCE.sub("", markdown)):
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]


def title(path: str) -> str:
    """Of a page, without what follows a colon."""
    heading = re.search(r"^# (.+)$", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return heading[1].partition(":")[0] if heading else path


def content(path: str) -> str:
    """A page of the repository as Markdown."""
    whole = ROOT / path
    if whole.is_dir():
        names = sorted(child.name for child in whole.iterdir() if child.is_file())
        return f"# {path}\n\n" + "\n".join(f"- [{name}]({whole.name}/{name})" for name in names)
    text = whole.read_text(encoding="utf-8")
    if whole.suffix == ".md":
        return text
    wide = "---\nhide: [navigation, toc]\n---\n\n"
    return f"{wide}# {whole.name}\n\n`{path}`\n\n```{LANGUAGES[whole.suffix]}\n{text.rstrip()}\n```\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    sources.clear()
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while waiting:
        path = waiting.pop()
        uri = place(path)
        if uri in sources or not (ROOT / path).exists():  # a link to nothing is reported by the build
            continue
        if not uri.endswith(".md"):
            if not files.get_file_from_path(uri):
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            continue
        sources[uri] = path
        markdown = content(path)
        if not files.get_file_from_path(uri):
            files.append(File.generated(config, uri, content=markdown))
        waiting += [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links(markdown)]
    for name in REFERENCE:
        files.append(File.generated(config, f"reference/{name}.md", content=names_of(name)))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    path = sources.get(page.file.src_uri)
    if path is None:
        return markdown

    def moved(match: re.Match[str]) -> str:
        begin, target, end = match.groups()
        name, hash_sign, anchor = target.partition("#")
        if not name or re.match(r"[a-z]+:", target):
            return match.group()
        goal = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        uri = posixpath.relpath(place(goal), posixpath.dirname(page.file.src_uri) or ".")
        video = (ROOT / goal).with_suffix(".mp4")
        if begin.startswith("!") and video.exists():
            # GitHub shows the picture; here it is what stands there before the video is played.
            moving = posixpath.splitext(uri)[0] + ".mp4"
            label = html.escape(begin[2:-2])
            return f'<video controls muted loop playsinline poster="{uri}" src="{moving}" aria-label="{label}"></video>'
        if begin[1:-2] == target and goal.endswith(".md"):  # a path says something in the repository, a title here
            begin = f"[{title(goal)}]("
        return f"{begin}{uri}{hash_sign}{anchor}{end}"

    pieces, last = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(moved, markdown[last : fence.start()]), fence.group()]
        last = fence.end()
    return "".join(pieces) + LINK.sub(moved, markdown[last:])


def names_of(name: str) -> str:
    """The page of a module: what it says of itself, and its public names for mkdocstrings."""
    module = "longlive_rag" if name == "longlive_rag" else f"longlive_rag.{name}"
    path = ROOT / "python" / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    names: list[str] = []
    whence: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):  # where a name is defined: `ops.attend` is a module too
            whence |= {alias.name: str(node.module) for alias in node.names}
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.append(statement.name)
        elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names = ast.literal_eval(statement.value)
            break
    public = [f"::: {whence.get(name, module)}.{name}" for name in names if not name.startswith("_")]
    return f"# {module}\n\n{ast.get_docstring(tree)}\n\n" + "\n\n".join(public)


def commands() -> str:
    """What `longlive-rag COMMAND --help` prints, for each command."""
    from longlive_rag import cli

    os.environ["COLUMNS"] = "84"  # as many as a line of the page has
    page = "# Commands\n\nWhat `longlive-rag COMMAND --help` prints.\n"
    for name in cli.COMMANDS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            cli.main([name, "--help"])
        page += f"\n## {name}\n\n```text\n{out.getvalue().strip()}\n```\n"
    return page
