"""Reads Triton IR: every global access with its tile, its loops and its mask."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

_ASSIGN = re.compile(r"^(?:(%[\w#:]+(?:, %[\w#:]+)*) = )?\"?([\w.]+)\"?\s*(.*)$")
_REFERENCE = re.compile(r"%\w+(?:#\d+)?")
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
_FOR = re.compile(r"(?:unsigned )?(%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")
_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1, "i1": 1}
_MASK_OPERAND = {"tt.load": 1, "tt.store": 2, "tt.atomic_rmw": 2, "tt.atomic_cas": 3}
_UNREAD = ("tt.descriptor", "scf.while", "tt.call", "tt.make_tensor_ptr")


@dataclass(frozen=True)
class Loop:
    variable: str
    low: str
    high: str
    step: str


@dataclass(frozen=True)
class Guard:
    """The branch of an scf.if."""

    condition: str
    taken: bool


@dataclass(frozen=True)
class Access:
    kind: str  # load, store, atomic_rmw, atomic_cas
    args: frozenset[str]  # *name where the address was read from what the argument points to
    dims: tuple[int, ...]
    item: int
    blocks: tuple[Loop | Guard, ...]
    mask: str | None

    @property
    def loops(self) -> tuple[Loop, ...]:
        return tuple(block for block in self.blocks if isinstance(block, Loop))

    @property
    def tile_bytes(self) -> int:
        return math.prod(self.dims) * self.item


@dataclass
class Module:
    """`products` are the 32-bit products in the addresses of each argument, with the blocks they are in."""

    accesses: list[Access] = field(default_factory=list)
    products: dict[str, set[tuple[str, tuple]]] = field(default_factory=dict)
    definitions: dict[str, tuple] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Value:
    ref: str
    args: frozenset[str] = frozenset()  # that a pointer may point into
    products: frozenset = frozenset()  # that an offset was made of
    found: frozenset[str] = frozenset()  # arguments that an integer was read from, which may be an address


class _Parser:
    """One walk over the IR, following pointers and 32-bit products to where they are used."""

    def __init__(self) -> None:
        self.module = Module()
        self.values: dict[str, _Value] = {}
        self.blocks: list[tuple[int, Loop | Guard]] = []

    def define(self, name: str, definition: tuple, like: _Value | None = None) -> _Value:
        # Two regions may use one name for different values, so a reference carries a number.
        value = replace(like or _Value(""), ref=f"{name}@{len(self.module.definitions)}")
        self.module.definitions[value.ref] = definition
        self.values[name] = value
        return value

    def value(self, name: str) -> _Value:
        return self.values.get(name) or self.values.get(name.split("#")[0]) or _Value(name)

    def line(self, raw: str) -> None:
        line = _LOCATION.sub("", raw)
        indent, line = len(line) - len(line.lstrip()), line.strip()
        if line.startswith("tt.func"):
            for name, kind in re.findall(r"%(\w+): ([^,{)]+)", line):
                args = frozenset({name} if "ptr" in kind else ())
                self.define(f"%{name}", ("argument", name), _Value("", args))
        elif line.startswith("}"):
            if self.blocks and self.blocks[-1][0] == indent:
                _, closed = self.blocks.pop()
                if line.startswith("} else") and isinstance(closed, Guard):
                    self.blocks.append((indent, Guard(closed.condition, False)))
        elif match := _ASSIGN.match(line):
            results, op, rest = match.groups()
            names = [name.split(":")[0] for name in results.split(", ")] if results else []
            if op.startswith(_UNREAD):
                self.module.unread.add(op)
            if op == "scf.for" and (bounds := _FOR.match(rest)):
                self.loop(indent, bounds.groups(), names, rest)
            elif op == "scf.if":
                condition = self.value(_REFERENCE.findall(rest)[0]).ref
                self.blocks.append((indent, Guard(condition, True)))
            else:
                self.operation(names, op, rest)

    def loop(self, indent: int, bounds: tuple[str, ...], results: list[str], rest: str) -> None:
        variable, *limits = bounds
        limits = [self.value(limit).ref for limit in limits]
        ref = self.define(variable, ("loop", limits[0])).ref
        self.blocks.append((indent, Loop(ref, *limits)))
        carried = re.search(r"iter_args\((.*?)\) ->", rest)
        pairs = re.findall(r"(%\w+) = (%[\w#]+)", carried.group(1)) if carried else []
        for i, (name, start) in enumerate(pairs):
            first = self.value(start)
            for copy in (name, results[0] if len(pairs) == 1 else f"{results[0]}#{i}"):
                self.define(copy, ("copy", first.ref), first)

    def operation(self, results: list[str], op: str, rest: str) -> None:
        operands = [self.value(name) for name in _REFERENCE.findall(rest)]
        args = frozenset().union(*(value.args for value in operands))
        products = frozenset().union(*(value.products for value in operands))
        found = operands[0].args if op == "tt.load" else frozenset()
        inside = tuple(block for _, block in self.blocks)
        if op in _MASK_OPERAND:
            self.access(op, operands, rest, inside)
            args = products = frozenset()
        elif op == "tt.int_to_ptr":
            args = frozenset(f"*{name}" for name in operands[0].found)
        elif op == "tt.addptr":
            args = operands[0].args
            for arg in args:
                self.module.products.setdefault(arg, set()).update(operands[1].products)
            products = frozenset()
        elif op in ("tt.reduce", "arith.divsi", "arith.remsi", "arith.cmpi"):
            products = frozenset()
        refs = [value.ref for value in operands]
        for name in results:
            value = self.define(name, (op, refs, rest), _Value("", args, products, found))
            if op == "arith.muli" and re.search(r"\bi32|xi32", rest.rsplit(" : ", 1)[-1]):
                self.values[name] = replace(value, products=products | {(value.ref, inside)})

    def access(self, op: str, operands: list[_Value], rest: str, inside: tuple) -> None:
        tile = re.search(r"tensor<((?:\d+x)+)!tt\.ptr<(\w+)>", rest)
        element = tile.group(2) if tile else re.search(r"!tt\.ptr<(\w+)>", rest).group(1)
        dims = tuple(map(int, tile.group(1).rstrip("x").split("x"))) if tile else ()
        place = _MASK_OPERAND[op]
        mask = operands[place].ref if len(operands) > place else None
        args = operands[0].args or frozenset({"?"})
        self.module.accesses.append(Access(op[3:], args, dims, _BYTES[element], inside, mask))


def parse(text: str) -> Module:
    parser = _Parser()
    for line in text.splitlines():
        parser.line(line)
    return parser.module
