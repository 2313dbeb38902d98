"""PTX to C++: an instruction becomes a call of the function of its name in isa.h, a register a local variable, a label
a label. The text is what nvcc writes with `-ptx`; the translation knows nothing of what the instructions do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+[^\n]*\n)*)\{", re.DOTALL)
PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?")
STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<text>[^;]+);)", re.DOTALL)
INSTRUCTION = re.compile(r"(?:@(?P<negated>!?)(?P<guard>[%\w]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL)
REGISTER = re.compile(r"%(?:p|rs|rd|r|fd|f)\d+$")
IMMEDIATE = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
C_TYPES = {"%p": "bool", "%rs": "uint16_t", "%r": "uint32_t", "%f": "uint32_t", "%rd": "uint64_t", "%fd": "uint64_t"}
POISON = {"bool": "false", "uint16_t": "0xffff", "uint32_t": "~0u", "uint64_t": "~0ull"}
CACHE_OPERATORS = {"nc", "cg", "ca", "cs", "lu", "cv"}
PURE = {
    *["mov", "selp", "setp", "add", "sub", "mul", "mad", "fma", "min", "max", "shl", "shr", "and", "or", "xor", "not"],
    *["abs", "neg", "cvt", "ex2", "lg2", "rcp", "rsqrt", "sqrt", "bfi", "popc", "prmt"],
}
"""Instructions that can neither fault nor wait; before all others the line is noted, for the report of a fault and to
see that the kernel ends."""


class Parameter(NamedTuple):
    name: str
    size: int
    alignment: int


class Entry(NamedTuple):
    """A kernel of a PTX module; `line` is that of the body's first character."""

    name: str
    parameters: list[Parameter]
    max_threads: int
    body: str
    line: int


class Instruction(NamedTuple):
    opcode: str
    operands: list[str]
    guard: str
    """C++ condition, or empty."""
    line: int


def entries(module: str) -> dict[str, Entry]:
    """The kernels of a module by name; without comments, which line numbers survive."""
    module = re.sub(r"//[^\n]*", "", module)
    found = {}
    for match in ENTRY.finditer(module):
        name, parameters, directives = match.groups()
        threads = re.search(r"\.maxntid (\d+)", directives)
        found[name] = Entry(
            name,
            [_parameter(text) for text in parameters.split(",")],
            int(threads[1]) if threads else 1024,
            module[match.end() : _closing(module, match.end())],
            module.count("\n", 0, match.end()) + 1,
        )
    return found


def opcodes(entry: Entry) -> set[str]:
    return {statement.opcode for statement in _statements(entry) if isinstance(statement, Instruction)}


def translate(entry: Entry) -> str:
    """A C++ translation unit that defines the kernel, under its own name, as a function of a `ptx::Launch`."""
    parameters = {p.name: f"parameter{i}" for i, p in enumerate(entry.parameters)}
    products = _registers_of_products(entry)
    registers: set[str] = set()
    lines = []
    for statement in _statements(entry):
        if isinstance(statement, str):
            lines.append(statement)
            continue
        call = _call(statement, parameters, registers)
        if statement.opcode.split(".")[0] not in PURE:
            call = f"at({statement.line}); {call}"
        if products.intersection(_names(statement)) and not statement.opcode.startswith("wgmma"):
            call = f"{call} wgmma_registers_accessed();"
        lines.append(f"if ({statement.guard}) {{ {call} }}" if statement.guard else call)
        if statement.guard:
            registers.add(statement.guard.lstrip("!"))
    declared = []
    for name in sorted(registers):
        kind = _c_type(name)
        declared.append(f"{kind} {name} = {POISON[kind]};")
    named = [f"const uint64_t parameter{i} = parameters[{i}];" for i in range(len(entry.parameters))]
    sizes = ", ".join(f"{{{p.size}, {p.alignment}}}" for p in entry.parameters)
    body = "\n".join(["[[maybe_unused]] Sink sink;", *named, *declared, *lines])
    return (
        '#include "isa_wgmma.h"\nusing namespace ptx;\n'
        f"static void body([[maybe_unused]] const uint64_t* parameters) {{\n{body}\n}}\n"
        f'extern "C" void {entry.name}(const Launch& launch) {{\n'
        f'  run("{entry.name}", launch, {{{sizes}}}, {entry.max_threads}, body);\n}}\n'
    )


def _parameter(text: str) -> Parameter:
    match = PARAMETER.search(text)
    assert match, f"not a parameter: {text}"
    alignment, kind, name, count = match.groups()
    size = int(re.sub(r"\D", "", kind)) // 8
    return Parameter(name, size * int(count or 1), int(alignment or size))


def _closing(text: str, position: int) -> int:
    """Where the brace that was opened before `position` is closed."""
    depth = 1
    for match in re.compile("[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("a brace is not closed")


def _statements(entry: Entry) -> Iterator[Instruction | str]:
    """Instructions, and labels as C++ text. What a `{ }` block declares gets a name of its own."""
    position, blocks, scopes = 0, 0, [dict[str, str]()]
    text = entry.body
    while match := STATEMENT.match(text, position):
        position = match.end()
        if match["brace"] == "{":
            blocks += 1
            rest = text[position : _closing(text, position)]
            local = re.findall(r"\.reg \.pred (\w+);", rest) + re.findall(r"^(\w+):(?!:)", rest, re.MULTILINE)
            scopes.append(scopes[-1] | {name: f"block{blocks}_{name}" for name in local})
        elif match["brace"]:
            scopes.pop()
        elif match["label"]:
            yield f"{_label(scopes[-1].get(match['label'], match['label']))}: ;"
        elif not match["text"].lstrip().startswith("."):
            line = entry.line + text.count("\n", 0, match.start("text"))
            yield _instruction(match["text"], scopes[-1], line)
    assert not text[position:].strip(), f"cannot read {text[position : position + 80]!r}"


def _instruction(text: str, scope: dict[str, str], line: int) -> Instruction:
    match = INSTRUCTION.fullmatch(text.strip())
    assert match, f"cannot read {text!r}"
    # A name of the block becomes a register (a predicate) or a label.
    operands = [scope.get(operand, operand) for operand in _split(match["operands"])]
    guard = match["guard"] or ""
    guard = _variable(scope.get(guard, guard))
    return Instruction(match["opcode"], operands, (match["negated"] or "") + guard if guard else "", line)


def _split(operands: str) -> list[str]:
    """At the commas that stand outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(operands):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append(operands[start:i].strip())
            start = i + 1
    return [*parts, operands[start:].strip()] if operands.strip() else []


def _names(instruction: Instruction) -> set[str]:
    return set(re.findall(r"%(?:f|rs|rd|r)\d+\b", ",".join(instruction.operands)))


def _registers_of_products(entry: Entry) -> set[str]:
    """The registers that hold accumulators or A of some wgmma."""
    found: set[str] = set()
    for statement in _statements(entry):
        if isinstance(statement, Instruction) and statement.opcode.startswith("wgmma.mma_async"):
            found |= set(re.findall(r"%\w+", ",".join(o for o in statement.operands if o.startswith("{"))))
    return found


def _variable(name: str) -> str:
    return name.replace("%", "")


def _label(name: str) -> str:
    return name.replace("$", "")


def _c_type(variable: str) -> str:
    return C_TYPES.get("%" + variable.rstrip("0123456789"), "bool")


def _call(instruction: Instruction, parameters: dict[str, str], registers: set[str]) -> str:
    """The C++ statement for an instruction, without its guard."""

    def value(operand: str) -> str:
        if operand == "_":
            return "sink"
        if operand.startswith("[") and "{" in operand:  # of a tensor: the map's address and coordinates
            base, coordinates = operand[1:-1].split(",", 1)
            return (
                f"Box{{{value(f'[{base.strip()}]')}, {{{', '.join(map(value, _split(coordinates.strip()[1:-1])))}}}}}"
            )
        if operand.startswith("["):
            base, _, offset = operand[1:-1].partition("+")
            return f"{value(base)} + ({offset})" if offset else value(base)
        if operand.startswith("{"):
            return f"registers({', '.join(map(value, _split(operand[1:-1])))})"
        if "|" in operand:
            return ", ".join(map(value, operand.split("|")))
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            return f"0x{operand[2:]}"
        if IMMEDIATE.match(operand):
            return operand if -(2**31) <= int(operand.rstrip("U"), 0) < 2**63 else f"{operand.rstrip('U')}ull"
        if operand in parameters:
            return parameters[operand]
        if REGISTER.match(operand) or operand.startswith("block"):
            registers.add(_variable(operand))
            return _variable(operand)
        if operand.startswith("%"):  # a special register
            return operand[1:].replace(".", "_") + "()"
        return _symbol(operand)

    opcode = instruction.opcode
    name, *modifiers = opcode.split(".")
    operands = [] if name == "bra" else [value(operand) for operand in instruction.operands]
    if name == "bra":
        return f"goto {_label(instruction.operands[0])};"
    if name == "ret":
        return "return;"
    if name in ("ld", "st"):
        space, kind = modifiers[0], modifiers[-1]
        unknown = set(modifiers[1:-1]) - CACHE_OPERATORS - {"v2", "v4"}
        assert not unknown, f"{opcode}: {unknown}"
        data, address = (operands[0], operands[1]) if name == "ld" else (operands[1], operands[0])
        data = data.removeprefix("registers(").removesuffix(")")
        return f"{name}<{space}, {kind.upper()}>({address}, {data});"
    if opcode.startswith("wgmma.mma_async.sync.aligned."):
        shape, _, kind, _ = modifiers[3:]
        columns = re.fullmatch(r"m64n(\d+)k16", shape)
        assert columns, opcode
        return f"wgmma_mma_async_m64k16<{columns[1]}, {kind.upper()}>({', '.join(operands)});"
    if opcode.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
        return f"mma_sync_m16n8k16<{modifiers[-2].upper()}>({', '.join(operands)});"
    arguments = ", ".join(operands)
    if name == "mov" and "{" in "".join(instruction.operands):
        name = "unpack" if instruction.operands[0].startswith("{") else "pack"
        return f"{name}({arguments.replace('registers(', '').replace(')', '')});"
    return f"{opcode.replace('::', '_').replace('.', '_')}({arguments});"


def _symbol(name: str) -> str:
    """The one array of dynamic shared memory that all kernels have."""
    assert name.endswith("6memoryE"), f"unknown symbol {name!r}"
    return "kSharedBase"
