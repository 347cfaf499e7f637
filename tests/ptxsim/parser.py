"""PTX text to :class:`Program` (PTX ISA, "Syntax", "State Spaces, Types, and Variables", "Directives")."""

from __future__ import annotations

import bisect
import re
import struct
from typing import Any, NoReturn

from tests.ptxsim.errors import PTXParseError
from tests.ptxsim.ptx_types import WIDTH
from tests.ptxsim.syntax import (
    Address,
    ArgumentList,
    Function,
    Immediate,
    Instruction,
    Negated,
    Pair,
    Parameter,
    Program,
    Scope,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

TYPES = "|".join(sorted(WIDTH, key=len, reverse=True))
SPACE = re.compile(r"\s+")
LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
INTEGER = re.compile(r"^[+-]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
FLOAT_BITS = re.compile(r"^(-?)0([fFdD])([0-9a-fA-F]+)$")
DECIMAL = re.compile(r"^[+-]?\d+\.\d*([eE][+-]?\d+)?$")
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
LINKAGE = r"(?:\.(?:visible|weak|extern|common)\s+)*"
ENTRY = re.compile(rf"({LINKAGE})\.(entry|func)\b")
MODULE_STATEMENT = re.compile(rf"{LINKAGE}\.(global|const|shared|alias|pragma|tex|sampler)")
FUNCTION = re.compile(r"\.(entry|func)\s*(\([^)]*\)\s*)?([\w$]+)\s*(?:\((.*?)\))?([^()]*)$", re.S)
PERFORMANCE = re.compile(r"\.(maxntid|reqntid|minnctapersm|maxnreg|maxnctapersm|reqnctapercluster)\s+([\d ,]+)")
VARIABLE = re.compile(rf"\.(v[24]\s*\.)?({TYPES})\s+([\w$%]+)\s*((\[\s*\d*\s*\])*)\s*$")
PARAMETER = re.compile(
    r"\.(?:param|reg)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s*(?:\.ptr\b[\s\.\w]*?)?\s+([\w$%]+)\s*(?:\[\s*(\d*)\s*\])?$"
)
ADDRESS = re.compile(r"^([\w$%.]+?)\s*(?:([+-])\s*(-?\s*\w+))?$")
SPECIAL = re.compile(
    r"^%(n?tid|n?ctaid|cluster_\w+|clusterid|nclusterid|is_explicit_cluster|laneid|n?warpid|n?smid|gridid|lanemask_\w+"
    r"|clock\w*|globaltimer\w*|pm\d+\w*|envreg\d+|dynamic_smem_size|total_smem_size|aggr_smem_size|reserved_smem\w*"
    r"|current_graph_exec)(\.[xyz])?$"
)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def _integer(text: str) -> int | None:
    """Value of an integer literal (hexadecimal, binary, octal or decimal), None if it is none."""
    text = text.replace(" ", "")
    if not INTEGER.match(text):
        return None
    digits = text.rstrip("U").lstrip("+-").lower()
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8) if octal else int(digits, 0)
    return -value if text.startswith("-") else value


def _initialiser(declaration: str) -> tuple[str, str]:
    head, _, init = declaration.partition("=")
    return head, init.strip()


class Parser:
    """Recursive descent over the text; comments are blanked out first, so that line numbers stay."""

    def __init__(self, text: str) -> None:
        self.text = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        self.newlines = [match.start() for match in re.finditer("\n", self.text)]
        self.at = 0
        self.program = Program()
        self.source: tuple[Any, int] | None = None
        self.scopes = 0
        self.last_label = ""

    def line(self) -> int:
        return bisect.bisect_left(self.newlines, self.at) + 1

    def fail(self, message: str) -> NoReturn:
        raise PTXParseError(f"PTX line {self.line()}: {message}")

    # -------------------------------------------------------------------------------- text
    def skip_space(self) -> None:
        if match := SPACE.match(self.text, self.at):
            self.at = match.end()

    def take_line(self) -> str:
        end = self.text.find("\n", self.at)
        end = len(self.text) if end < 0 else end
        line, self.at = self.text[self.at : end], end
        return line

    def take_statement(self) -> str:
        """Up to the next semicolon outside of a string; without it."""
        end, quoted = self.at, False
        while end < len(self.text):
            if self.text[end] == '"':
                quoted = not quoted
            elif self.text[end] == ";" and not quoted:
                break
            end += 1
        else:
            self.fail(f'statement without ";": {self.text[self.at : self.at + 80]!r}')
        statement, self.at = self.text[self.at : end], end + 1
        return statement.strip()

    # -------------------------------------------------------------------------------- module
    def parse(self) -> Program:
        while True:
            self.skip_space()
            if self.at >= len(self.text):
                break
            if self.line_directive():
                continue
            ahead = self.text[self.at : self.at + 200]
            if ENTRY.match(ahead):
                self.function()
                continue
            statement = MODULE_STATEMENT.match(ahead)
            if not statement:
                self.fail(f"unknown module-level statement {ahead.splitlines()[0]!r}")
            declaration = self.take_statement()
            if statement[1] in ("global", "const", "shared"):
                variable = self.variable(declaration)
                self.program.variables[variable.name] = variable
        self.name_sources()
        return self.program

    def name_sources(self) -> None:
        """Replace file numbers by names: .file often comes last."""
        names = {number: path.rsplit("/", 1)[-1] for number, path in self.program.files.items()}
        for function in self.program.functions.values():
            for instruction in function.instructions:
                if instruction.source:
                    number, line = instruction.source
                    instruction.source = names.get(number, f"file{number}"), line

    def line_directive(self) -> bool:
        """Take a directive that ends with its line, or a .section; whether there was one."""
        for name in (".version", ".target", ".address_size", ".file", ".loc"):
            if not (self.text.startswith(name, self.at) and self.text[self.at + len(name)].isspace()):
                continue
            line = self.take_line().strip()
            if name == ".version":
                self.program.version = line.split()[1]
            elif name == ".target":
                self.program.target = line.split(None, 1)[1].split(",")[0].strip()
            elif name == ".file" and (match := re.match(r'\.file\s+(\d+)\s+"([^"]*)"', line)):
                self.program.files[int(match[1])] = match[2]
            elif name == ".loc":
                number, source_line = line.split()[1:3]
                self.source = int(number), int(source_line)
            return True
        if self.text.startswith(".section", self.at):
            end, depth = self.text.find("{", self.at) + 1, 1
            while depth and end < len(self.text):
                depth += (self.text[end] == "{") - (self.text[end] == "}")
                end += 1
            self.at = end
            return True
        return False

    def variable(self, declaration: str) -> Variable:
        head, init = _initialiser(declaration)
        space = re.search(r"\.(shared|global|const|local|param)\b", head)
        align = re.search(r"\.align\s+(\d+)", head)
        match = VARIABLE.search(head)
        if not match or not space:
            self.fail(f"cannot parse variable {declaration!r}")
        vector, ty, name, dimensions = match[1], match[2], match[3], match[4] or ""
        element = max(WIDTH[ty] // 8, 1) * (int(vector[1]) if vector else 1)
        counts = re.findall(r"\[\s*(\d*)\s*\]", dimensions)
        count = 1
        for size in counts:
            count *= int(size) if size else 0
        data = None
        if init:
            items = _split(init.replace("{", "").replace("}", ""))
            count = len(items) if counts == [""] else count
            data = b"".join(self.initial_value(item, ty) for item in items)
        return Variable(
            space[1], name, ty, element * count, int(align[1]) if align else element, ".extern" in declaration, data
        )

    def initial_value(self, text: str, ty: str) -> bytes:
        size = WIDTH[ty] // 8
        value = _integer(text)
        if value is not None:
            return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if match := FLOAT_BITS.match(text):
            return int(match[3], 16).to_bytes(size, "little")
        if ty in ("f32", "f64"):
            return struct.pack("<f" if ty == "f32" else "<d", float(text))
        self.fail(f"unsupported initialiser {text!r} (addresses of symbols in initialisers are not supported)")

    # -------------------------------------------------------------------------------- functions
    def function(self) -> None:
        end, depth = self.at, 0
        while self.text[end] not in "{;" or depth:
            depth += (self.text[end] == "(") - (self.text[end] == ")")
            end += 1
        head, has_body = self.text[self.at : end], self.text[end] == "{"
        self.at = end + 1
        match = FUNCTION.search(head)
        if not match:
            self.fail(f"cannot parse function header {head!r}")
        function = Function(match[3], match[1] == "entry")
        if function.entry:
            function.parameters = self.parameters((match[4] or "").replace("\n", " "))
        for directive in PERFORMANCE.finditer(match[5] or ""):
            numbers = directive[2].replace(" ", "").strip(",").split(",")
            function.directives[directive[1]] = [int(number) for number in numbers]
        if has_body:
            self.source = None
            self.body(function)
            self.program.functions[function.name] = function

    def parameters(self, text: str) -> list[Parameter]:
        out: list[Parameter] = []
        offset = 0
        for declaration in _split(text):
            match = PARAMETER.search(declaration)
            if not match:
                self.fail(f"cannot parse parameter {declaration!r}")
            element = max(WIDTH[match[2]] // 8, 1)
            size, align = element * int(match[4] or 1), int(match[1]) if match[1] else element
            offset = -(-offset // align) * align
            out.append(Parameter(match[3], match[2], size, align, offset, match[4] is not None))
            offset += size
        return out

    def body(self, function: Function) -> None:
        scope, self.scopes = Scope(None, 0), 1
        while True:
            self.skip_space()
            if self.at >= len(self.text):
                self.fail(f"unterminated function body of {function.name}")
            char = self.text[self.at]
            if char in "{};":
                self.at += 1
                if char == "{":
                    scope, self.scopes = Scope(scope, self.scopes), self.scopes + 1
                elif char == "}":
                    if scope.parent is None:
                        return
                    scope = scope.parent
                continue
            if self.line_directive():
                continue
            if match := LABEL.match(self.text, self.at):
                function.labels[scope.number, match[1]] = len(function.instructions)
                self.at, self.last_label = match.end(), match[1]
                continue
            line, statement = self.line(), self.take_statement()
            if statement.startswith("."):
                self.declaration(function, scope, statement)
            else:
                function.instructions.append(self.instruction(function, scope, statement, line))

    def declaration(self, function: Function, scope: Scope, statement: str) -> None:
        if statement.startswith(".reg"):
            match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S)
            if not match or match[1] not in WIDTH:
                self.fail(f"unsupported register declaration {statement!r}")
            for name in _split(match[2]):
                if family := re.match(r"^([\w$%]+?)<(\d+)>$", name):
                    scope.families[family[1]] = match[1], int(family[2])
                else:
                    scope.registers[name] = match[1]
        elif re.match(r"\.(shared|local|param|global|const)\b", statement):
            variable = self.variable(statement)
            function.variables[scope.number, variable.name] = variable
        elif statement.startswith(".branchtargets"):
            targets = [Symbol(name, scope) for name in _split(statement.split(None, 1)[1])]
            function.branch_targets[scope.number, self.last_label] = targets
        elif not statement.startswith((".pragma", ".callprototype", ".calltargets")):
            self.fail(f"unsupported directive {statement!r}")

    # -------------------------------------------------------------------------------- instructions
    def instruction(self, function: Function, scope: Scope, statement: str, line: int) -> Instruction:
        text, guard = re.sub(r"\s+", " ", statement), None
        if match := re.match(r"^@\s*(!?)\s*([\w$%]+)\s+(.*)$", statement, re.S):
            register = scope.register(match[2])
            if register is None:
                self.fail(f"undeclared guard predicate {match[2]}")
            guard, statement = (register, bool(match[1])), match[3]
        match = re.match(r"^([a-z][\w.:]*)\s*(.*)$", statement, re.S)
        if not match:
            self.fail(f"cannot parse instruction {statement!r}")
        base, *modifiers = match[1].split(".")
        operands = [self.operand(part, scope) for part in _split(match[2].replace("\n", " "))]
        index = len(function.instructions)
        return Instruction(match[1], base, modifiers, operands, guard, line, self.source, text, index, scope)

    def operand(self, text: str, scope: Scope) -> Any:
        text = text.strip()
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector([self.operand(part, scope) for part in _split(text[1:-1])])
        if text[0] == "(":
            return ArgumentList([self.operand(part, scope) for part in _split(text[1:-1])])
        if text[0] == "[":
            return self.address(text, scope)
        if text[0] == "!":
            return Negated(self.operand(text[1:], scope))
        if "|" in text:
            return Pair(*(self.operand(part, scope) for part in text.split("|")))
        if match := FLOAT_BITS.match(text):
            bits = 32 if match[2] in "fF" else 64
            return Immediate(int(match[3], 16) ^ (1 << bits - 1 if match[1] else 0), bits)
        value = _integer(text)
        if value is not None:
            return Immediate(value)
        if DECIMAL.match(text):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        register = scope.register(text)
        if register is not None:
            return register
        if SPECIAL.match(text):
            return Special(text)
        if match := re.match(r"^([\w$]+)\s*\+\s*(\d+)$", text):
            return Symbol(match[1], scope, int(match[2]))
        if re.match(r"^[A-Za-z_$][\w$]*$", text):
            return Symbol(text, scope)
        self.fail(f"undeclared register {text}" if text[0] == "%" else f"cannot parse operand {text!r}")

    def address(self, text: str, scope: Scope) -> Address:
        first, *others = _split(text[1:-1])
        match = ADDRESS.match(first)
        if not match:
            self.fail(f"cannot parse address {text!r}")
        offset = _integer(match[3]) if match[3] else 0
        if offset is None:
            self.fail(f"cannot parse address offset {text!r}")
        absolute = _integer(match[1])
        base = self.operand(match[1], scope) if absolute is None else Immediate(absolute)
        extra = [self.operand(part, scope) for part in others] or None
        return Address(base, -offset if match[2] == "-" else offset, extra)


def parse(text: str) -> Program:
    """Read a module; raises PTXParseError with the line of what it cannot read."""
    return Parser(text).parse()
