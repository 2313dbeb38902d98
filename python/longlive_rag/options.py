"""The options of a command from its frozen dataclass: argparse splits the words, the fields say what they mean.

A field is an option: the string below it is its help, its type and its default are checked and shown. A field that is a
dataclass itself brings its own fields. The docstring of the class is the description, and what follows ``Examples:``
in it is shown last. The class variable ``groups``, if there is one, maps headings to names of fields.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Positional = Annotated[T, "positional"]
"""Marks the one field, a tuple of any length, that takes the words which belong to no option."""

_REST = "-- COMMAND"
# What stands for a value in the help, by its type ("") and by the name of its field.
_PLACEHOLDERS: dict[type, dict[str, str]] = {
    bool: {"": ""},
    int: {"": "N", "height": "PIXELS", "port": "PORT", "width": "PIXELS"},
    float: {"": "X", "ahead": "SECONDS", "seconds": "SECONDS"},
    str: {
        "": "TEXT",
        "allow_host": "NAME",
        "command": _REST,
        "device": "DEVICE",
        "host": "ADDRESS",
        "step": "prepare|collect FOLDER",
    },
    Path: {
        "": "FILE",
        "checkpoint": "PATH",
        "data": "FOLDER",
        "output": "FOLDER",
        "videos": "VIDEO",
        "wan_dir": "FOLDER",
    },
}
_EXPECTED = {int: "an integer", float: "a number"}
_HELP_COLUMN = 33
_LARGEST_WIDTH = 100


class UsageError(Exception):
    """The words make no command; the message is one line."""


@dataclass(frozen=True)
class Option:
    """One option of a command, or its positional arguments.

    Attributes:
        path: names of the fields that lead to it, its own last.
        kind: type of one value: bool (a flag), int, float, str or Path.
        choices: the values allowed; empty: all of the type.
        many: whether it takes any number of values.
        positional: whether it is given without a name.
        required: whether it must be given.
        default: what it is if it is not given.
        help: what it means.
    """

    path: tuple[str, ...]
    kind: type
    choices: tuple[str, ...]
    many: bool
    positional: bool
    required: bool
    default: Any
    help: str

    @property
    def dest(self) -> str:
        return ".".join(self.path)

    @property
    def name(self) -> str:
        """As it is typed, or for positional arguments, shown."""
        return self.placeholder if self.positional else "--" + self.path[-1].replace("_", "-")

    @property
    def placeholder(self) -> str:
        name, by_name = self.path[-1], _PLACEHOLDERS[self.kind]
        if self.choices:
            return name.upper().replace("_", "-").removesuffix("S" if self.many else "")
        return by_name.get(name, by_name[""])

    def invocation(self, placeholder: str) -> str:
        """How it is typed, with this in the value's place."""
        dots = "..." if self.many else ""
        return f"{placeholder}{dots}" if self.positional else f"{self.name} {placeholder}{dots}".rstrip()

    @property
    def values(self) -> str:
        """What may be given."""
        return f"{{{'|'.join(self.choices)}}}" if self.choices else self.placeholder

    def parsed(self, given: Any) -> Any:
        """The value that argparse's True, string or list of strings stands for.

        Raises:
            UsageError: it is not one of the type or of the choices.
        """
        if self.kind is bool:
            return given
        return tuple(map(self._parsed, given)) if self.many else self._parsed(given)

    def _parsed(self, text: str) -> Any:
        if self.choices:
            if text not in self.choices:
                raise UsageError(f"{self.name} must be {_listed(self.choices, 'or')}, got {text!r}")
            return text
        try:
            return self.kind(text)
        except ValueError:
            raise UsageError(f"{self.name} must be {_EXPECTED[self.kind]}, got {text!r}") from None


def options_of(command: type, path: tuple[str, ...] = (), defaults: Any = MISSING) -> Iterator[Option]:
    """The options that a dataclass describes, in its order; an instance may have other defaults than the class.

    Raises:
        TypeError: a field has a type that no option can have.
    """
    types, helps = get_type_hints(command, include_extras=True), _field_docstrings(command)
    for field in fields(command):
        here = (*path, field.name)
        annotated, positional = types[field.name], False
        if defaults is not MISSING:
            default = getattr(defaults, field.name)
        elif callable(field.default_factory):
            default = field.default_factory()
        else:
            default = field.default
        if get_origin(annotated) is Annotated:
            annotated, *marks = get_args(annotated)
            positional = "positional" in marks
        if isinstance(annotated, type) and is_dataclass(annotated):
            yield from options_of(annotated, here, default)
            continue
        kind, choices, many = _value_type(annotated, here)
        required = default is MISSING and not (positional and many)
        if default is MISSING:
            default = () if many else None
        yield Option(here, kind, choices, many, positional, required, default, helps.get(field.name, ""))


def add_options(parser: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    """Teach argparse the names and how many values each takes; what the values mean is not left to it."""
    for option in options:
        name = option.dest if option.positional else option.name
        how: dict[str, Any] = {} if option.positional else {"dest": option.dest}
        if option.kind is bool:
            how |= {"action": "store_true", "default": None}
        else:
            how |= {"nargs": "*" if option.many else None, "metavar": option.placeholder}
            if option.many and not option.positional:
                how["action"] = "extend"  # given twice, it is longer, and nothing of it is dropped
        parser.add_argument(name, help=option.help.replace("%", "%%"), **how)


class Parser(argparse.ArgumentParser):
    """Reads a command line into the command's dataclass."""

    def __init__(self, command: type, program: str) -> None:
        super().__init__(prog=program, allow_abbrev=False)
        self.command = command
        self.options = list(options_of(command))
        add_options(self, self.options)

    def parse_command(self, arguments: Sequence[str]) -> Any:
        """The command, as its dataclass. Exits after `--help`.

        Raises:
            UsageError: an option is unknown or missing, or a value does not fit.
            ValueError: from the dataclass.
        """
        words, rest = list(arguments), []
        if "--" in words:
            split = words.index("--")
            words, rest = words[:split], words[split + 1 :]
        # An option may be written as its field is, --context_frames.
        words = [_hyphenated(word) if word.startswith("--") else word for word in words]
        namespace, unknown = self.parse_known_intermixed_args(words)
        given = {name: value for name, value in vars(namespace).items() if value is not None and value != []}
        for option in self.options:
            if option.positional and rest:
                given[option.dest] = [*given.get(option.dest, []), *rest]
                rest = []
        self._refuse(unknown + rest)
        missing = [
            option.invocation(option.placeholder)
            for option in self.options
            if option.required and option.dest not in given
        ]
        if missing:
            raise UsageError(f"missing {_listed(missing, 'and')}")
        return self._build(self.command, (), given)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def format_usage(self) -> str:
        required: list[str] = []
        optional: list[str] = []
        positional: list[str] = []
        for option in self.options:
            text = option.invocation(option.placeholder)
            if option.positional:
                positional.append(f"[{text}]" if option.default else text)
            else:
                (required if option.required else optional).append(text)
        words = ["usage:", self.prog, *required, *(["[OPTIONS]"] if optional else []), *positional]
        # No line break between an option and its value.
        whole = [word.replace(" ", "\xa0") for word in words]
        return _wrapped(" ".join(whole), _width(), later=" " * 8).replace("\xa0", " ") + "\n"

    def format_help(self) -> str:
        width = _width()
        description, _, examples = inspect.cleandoc(self.command.__doc__ or "").partition("\n\nExamples:\n")
        parts = [self.format_usage().rstrip(), *(_wrapped(part, width) for part in description.split("\n\n"))]
        for heading, options in self._groups().items():
            parts.append(
                "\n".join([f"{heading}:", *(line for option in options for line in _described(option, width))])
            )
        if examples:
            parts.append("examples:\n" + textwrap.indent(textwrap.dedent(examples), "  "))
        return "\n\n".join(parts) + "\n"

    def _groups(self) -> dict[str, list[Option]]:
        headings: dict[str, tuple[str, ...]] = getattr(self.command, "groups", {})
        groups = {"arguments": [option for option in self.options if option.positional]}
        for heading, names in headings.items():
            groups[heading] = [option for name in names for option in self.options if name in option.path]
        grouped = [option for options in groups.values() for option in options]
        groups["options"] = [option for option in self.options if option not in grouped]
        return {heading: options for heading, options in groups.items() if options}

    def _refuse(self, unknown: list[str]) -> None:
        if not unknown:
            return
        word = next((word for word in unknown if word.startswith("-")), None)
        if word is None:
            raise UsageError(f"unexpected argument {unknown[0]!r}")
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, [each.name for each in self.options if not each.positional], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if any(each.placeholder == _REST for each in self.options):
            hint = hint or "; what belongs to the command comes after --"
        raise UsageError(f"unknown option {name}{hint}")

    def _build(self, command: type, path: tuple[str, ...], given: dict[str, Any]) -> Any:
        values: dict[str, Any] = {}
        for option in self.options:
            if option.path[: len(path)] != path:
                continue
            name, *deeper = option.path[len(path) :]
            if not deeper:
                values[name] = option.parsed(given[option.dest]) if option.dest in given else option.default
            elif name not in values:
                values[name] = self._build(get_type_hints(command)[name], (*path, name), given)
        return command(**values)


def completion_script(program: str, commands: Mapping[str, tuple[type, str]], shell: str) -> str:
    """What makes a shell complete the program's commands (dataclass and summary of each), their options and values.

    Raises:
        UsageError: no such shell.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(f"--print-completion must be {_listed(shtab.SUPPORTED_SHELLS, 'or')}, got {shell!r}")
    root = argparse.ArgumentParser(program)
    subparsers = root.add_subparsers()
    for name, (command, summary) in commands.items():
        options = {option.dest: option for option in options_of(command)}
        parser = subparsers.add_parser(name, help=summary)
        add_options(parser, list(options.values()))
        for action in parser._actions:
            if action.dest in options:
                option = options[action.dest]
                action.choices = option.choices or None
                if option.kind is Path:
                    action.complete = shtab.DIRECTORY if option.placeholder == "FOLDER" else shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(root, shell))


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, _LARGEST_WIDTH))


def _wrapped(text: str, width: int, first: str = "", later: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _listed(items: Sequence[str], word: str) -> str:
    return f" {word} ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _hyphenated(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _value_type(annotated: Any, path: tuple[str, ...]) -> tuple[type, tuple[str, ...], bool]:
    """Type of one value, its choices, and whether there may be many; ``X | None`` is X, given or not."""
    alternatives = [each for each in get_args(annotated) if each is not NoneType]
    if NoneType in get_args(annotated) and len(alternatives) == 1:
        annotated = alternatives[0]
    many = get_origin(annotated) is tuple and get_args(annotated)[1:] == (...,)
    if many:
        annotated = get_args(annotated)[0]
    if get_origin(annotated) is Literal:
        return str, get_args(annotated), many
    if annotated not in _PLACEHOLDERS:
        raise TypeError(f"{'.'.join(path)} must have a type that can be typed, got {annotated}")
    return annotated, (), many


def _field_docstrings(command: type) -> dict[str, str]:
    """The string below each field, from the source of the class and of what it inherits from."""
    found = {}
    for owner in reversed(command.__mro__):
        if not is_dataclass(owner):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def _described(option: Option, width: int) -> list[str]:
    """How an option is typed and its default, with its meaning beside, or below where there is no room for that."""
    default = (option.default or ()) if option.many else (option.default,)
    shown = " ".join(f"{each:g}" if option.kind is float else str(each) for each in default if each is not None)
    note = "(required)" if option.required else f"({shown})" if shown and option.kind is not bool else ""
    # A long list of choices may be broken behind a bar.
    head = f"{option.invocation(option.values)} {note}".rstrip().replace("|", "| ")
    lines = _wrapped(head, width, "  ", "    ").replace("| ", "|").splitlines()
    column = _HELP_COLUMN if width > 2 * _HELP_COLUMN else 6
    text = _wrapped(option.help, width, " " * column, " " * column).splitlines()
    if text and len(lines) == 1 and len(lines[0]) < column - 1:
        text[0] = lines.pop().ljust(column) + text[0][column:]
    return lines + text
