"""What the parser produces: operands, instructions, variables, functions. No semantics here."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from tests.ptxsim.errors import PTXParseError


@dataclasses.dataclass(slots=True)
class Register:
    """``key``: (scope number, name), unique in the function."""

    key: tuple[int, str]
    ty: str

    def __repr__(self) -> str:
        return self.key[1]


@dataclasses.dataclass(slots=True)
class Immediate:
    """An integer literal, or with ``bits`` 32 or 64 the bit pattern of a float literal."""

    value: int
    bits: int = 0

    def __repr__(self) -> str:
        return hex(self.value) if self.bits else str(self.value)


@dataclasses.dataclass(slots=True)
class Special:
    """A special register, such as %tid.x."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(slots=True)
class Symbol:
    """A variable, parameter, label or function."""

    name: str
    scope: Scope
    offset: int = 0

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(slots=True)
class Vector:
    """{a, b, ...}"""

    items: list[Any]

    def __repr__(self) -> str:
        return "{" + ", ".join(map(repr, self.items)) + "}"


@dataclasses.dataclass(slots=True)
class Pair:
    """d|p: two destinations."""

    first: Any
    second: Any


@dataclasses.dataclass(slots=True)
class Negated:
    """!p"""

    register: Any


@dataclasses.dataclass(slots=True)
class Address:
    """[base + offset]"""

    base: Any
    offset: int
    extra: list[Any] | None = None

    def __repr__(self) -> str:
        return f"[{self.base!r}+{self.offset}]"


class Sink:
    """_: a destination that is thrown away."""

    def __repr__(self) -> str:
        return "_"


@dataclasses.dataclass(slots=True)
class ArgumentList:
    """(a, b, ...) of a call"""

    items: list[Any]


@dataclasses.dataclass(slots=True, eq=False)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all modifiers, as written; ``base`` is its first part, ``modifiers`` the others.
        guard: the predicate it runs under and whether that is negated.
        line: of the PTX text; ``source``: file and line that it was compiled from, if known.
        index: its place in the function.
    """

    opcode: str
    base: str
    modifiers: list[str]
    operands: list[Any]
    guard: tuple[Register, bool] | None
    line: int
    source: tuple[Any, int] | None
    text: str
    index: int
    scope: Scope

    def where(self) -> str:
        source = "" if self.source is None else f" ({self.source[0]}:{self.source[1]})"
        return f"PTX line {self.line}{source}: {self.text}"

    def __repr__(self) -> str:
        return f"<{self.text} @{self.line}>"


@dataclasses.dataclass(slots=True)
class Variable:
    """A variable of module or function scope; ``init`` holds the bytes of its initialiser."""

    space: str
    name: str
    ty: str
    size: int
    align: int
    extern: bool
    init: bytes | None = None


@dataclasses.dataclass(slots=True)
class Parameter:
    """A kernel parameter and its place in the parameter block."""

    name: str
    ty: str
    size: int
    align: int
    offset: int
    array: bool


class Scope:
    """A block of a function body: registers and variables declared in it hide those of the blocks around it."""

    def __init__(self, parent: Scope | None, number: int) -> None:
        self.parent, self.number = parent, number
        self.registers: dict[str, str] = {}
        self.families: dict[str, tuple[str, int]] = {}  # %r<64>: name without number, type and count

    def chain(self) -> list[Scope]:
        """This scope and those around it, inside out."""
        out, scope = [], self
        while scope is not None:
            out.append(scope)
            scope = scope.parent
        return out

    def register(self, name: str) -> Register | None:
        family = re.match(r"^(.*?)(\d+)$", name)
        for scope in self.chain():
            if name in scope.registers:
                return Register((scope.number, name), scope.registers[name])
            if family and (known := scope.families.get(family[1])) and int(family[2]) < known[1]:
                return Register((scope.number, name), known[0])
        return None


class Function:
    """A kernel (``entry``) or a device function."""

    def __init__(self, name: str, entry: bool) -> None:
        self.name, self.entry = name, entry
        self.parameters: list[Parameter] = []
        self.instructions: list[Instruction] = []
        self.labels: dict[tuple[int, str], int] = {}
        self.variables: dict[tuple[int, str], Variable] = {}
        self.directives: dict[str, list[int]] = {}
        self.branch_targets: dict[tuple[int, str], list[Symbol]] = {}

    def label(self, symbol: Symbol) -> int:
        """Index of the instruction that a label stands before."""
        for scope in symbol.scope.chain():
            if (scope.number, symbol.name) in self.labels:
                return self.labels[scope.number, symbol.name]
        raise PTXParseError(f"undefined label {symbol.name} in {self.name}")


class Program:
    """A PTX module: its functions, its variables and what it was compiled for."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self.variables: dict[str, Variable] = {}
        self.files: dict[int, str] = {}
        self.target = ""
        self.version = ""
