"""Reads machine code: access widths, registers, spills, instructions per loop, programs per SM."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from triton import knobs

from .fake import Target

_GLOBAL = re.compile(r"\b(ld|st|atom|red)\.global((?:[.:][\w:]+)*)\s*(.*)$")
_ASYNC = re.compile(
    r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^\]]*\],\s*"
    r"\[\s*(%rd\d+)[^\]]*\],\s*(0x[\da-f]+|\d+)"
)


_STORED = re.compile(r"ld\.global[\w.:]*\.b64\s+\{?\s*(%rd\d+)\s*\}?,\s*\[\s*(%rd\d+)")
_ADDRESS = re.compile(r"(?:(?:mov|add|sub|cvta|selp|mad)[\w.:]*64|mad\.wide\.[su]32)\s+(%rd\d+),\s*(.*)")


@dataclass(frozen=True)
class Access:
    kind: str  # ld, st, async, atom, red
    width: int  # bytes per thread
    args: frozenset[str]


def _origins(lines: Sequence[str], names: Sequence[str]) -> dict[str, set[str]]:
    """Which kernel arguments each 64-bit address register may come from; *name where it was read from there."""
    origin: dict[str, set[str]] = {}
    # A loop feeds registers back to its head, so one sweep is not enough.
    for _ in range(4):
        for line in lines:
            line = re.sub(r"^@!?%p\d+\s+", "", line.split("//")[0].strip())
            if m := re.match(r"ld\.param\.[bus]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
                if int(m.group(2)) < len(names):
                    origin.setdefault(m.group(1), set()).add(names[int(m.group(2))])
            elif m := _STORED.match(line):
                found = {f"*{name}" for name in origin.get(m.group(2), ())}
                origin.setdefault(m.group(1), set()).update(found)
            elif m := _ADDRESS.match(line):
                for register in re.findall(r"%rd\d+", m.group(2)):
                    if register in origin:
                        origin.setdefault(m.group(1), set()).update(origin[register])
    return origin


def accesses(ptx: str, names: Sequence[str]) -> list[Access]:
    """Global accesses of PTX code; `names` are the kernel's run-time arguments in order."""
    lines = ptx.splitlines()
    origin, found = _origins(lines, names), []
    for line in lines:
        if match := _ASYNC.search(line):
            kind, register, width = "async", match.group(1), int(match.group(2), 0)
        elif match := _GLOBAL.search(line):
            kind, modifiers, operands = match.groups()
            vector = re.search(r"\.v(\d)", modifiers)
            bits = re.findall(r"\.(?:bf|[busf])(?:16x)?(\d+)\b", modifiers)
            width = (int(vector.group(1)) if vector else 1) * int(bits[-1]) // 8 if bits else 0
            address = re.search(r"\[\s*(%rd\d+)", operands)
            register = address.group(1) if address else ""
        else:
            continue
        args = frozenset(origin.get(register) or {"?"})
        found.append(Access(kind, width, args))
    return found


def double_instructions(ptx: str) -> int:
    lines = (line.strip() for line in ptx.splitlines())
    return sum(".f64" in line for line in lines if not line.startswith((".", "//")))


def _tool(name: str, *args: str) -> str:
    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack (spills) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = dict(re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"])}


def text_section(cubin: bytes) -> bytes:
    """The machine code of a cubin, an ELF file with one kernel."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    for name, _, _, _, start, length in headers:
        if cubin.startswith(b".text.", headers[names][4] + name):
            return cubin[start : start + length]
    raise ValueError("the cubin has no .text section")


@dataclass(frozen=True)
class Instructions:
    """Counts of one kernel's SASS; where it loops, of the loop bodies only."""

    count: int
    barriers: int
    wide_loads: int  # LDG in the whole kernel, to see what ptxas unrolled


def disassemble(codes: Sequence[bytes], arch: str) -> list[Instructions]:
    """SASS counts of many kernels at once: a start of nvdisasm costs more than a kernel does."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        listing = _tool("nvdisasm", "--binary", arch, "-ndf", file.name)
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    parsed = [(int(at, 16), op, operands) for at, op, operands in line.findall(listing)]
    found, position, end = [], 0, 0
    for code in codes:
        end += len(code)
        first = position
        while position < len(parsed) and parsed[position][0] < end:
            position += 1
        found.append(_count(parsed[first:position]))
    return found


def _count(instructions: Sequence[tuple[int, str, str]]) -> Instructions:
    loops = []
    for at, op, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if op.startswith("BRA") and target and int(target.group(1), 16) < at:
            loops.append((int(target.group(1), 16), at))
    hot = [op for at, op, _ in instructions if any(a <= at <= z for a, z in loops)]
    everything = [op for _, op, _ in instructions]
    body = hot or everything
    return Instructions(
        count=sum(op != "NOP" for op in body),
        barriers=sum(op.startswith("BAR") for op in body),
        wide_loads=sum(op.startswith("LDG") and not op.startswith("LDGSTS") for op in everything),
    )


def resident(registers: int, warps: int, shared: int, target: Target) -> int:
    """Programs that fit on one SM of an NVIDIA target."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    return max(
        0,
        min(
            32,
            64 // warps,
            65536 // (registers_per_warp * warps),
            target.shared_per_sm // (shared + 1024),
        ),
    )


_AMD_WIDTH = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def amd(amdgcn: str) -> dict[str, int]:
    """Registers, spills and the access width of a HIP kernel.

    Arguments cannot be told apart here, and the statistics of a row are single floats. So the width
    is that of the widest load or store, unless something narrower than a float is accessed. Scalar registers
    spill to lanes of vector registers, not to memory, and are not counted.
    """
    number = {
        key: int(re.search(rf"\.{key}:\s+(\d+)", amdgcn).group(1)) for key in ("vgpr_count", "vgpr_spill_count")
    }
    ops = re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", amdgcn, re.MULTILINE)
    width = {kind: [_AMD_WIDTH.get(op, 2) for k, op in ops if k == kind] for kind, _ in ops}
    narrow = 2 in itertools.chain(*width.values())
    return {
        "registers": number["vgpr_count"],
        "spills": number["vgpr_spill_count"],
        "x_width": 2 if narrow else min(map(max, width.values()), default=0),
        "atomics": len(re.findall(r"^\s+(?:global|buffer|flat)_atomic", amdgcn, re.MULTILINE)),
        "f64": len(re.findall(r"^\s+v_\w+_f64", amdgcn, re.MULTILINE)),
    }
