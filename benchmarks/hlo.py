"""Counting what a compiled program moves."""

import math
import re

import numpy as np

_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "conditional", "copy-done",
    "optimization-barrier",
}  # fmt: skip
_LINE = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


def bytes_moved(program: str) -> int:
    """Bytes that the instructions of a compiled program's main path read and write.

    Each instruction reads its operands and writes its result once. Branches are left out.
    """
    entry = program[program.index("\nENTRY ") :]
    sizes: dict[str, int] = {}
    moved = 0
    for line in entry.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        name, result, operation, rest = match.groups()
        sizes[name] = sum(
            math.prod(map(int, shape.split(","))) * _width(dtype) if shape else _width(dtype)
            for dtype, shape in _ARRAY.findall(result)
        )
        if operation not in _FREE:
            operands = set(re.findall(r"%[\w.\-]+", rest.split(")")[0]))
            moved += sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
    return moved


def instructions(program: str) -> int:
    """How many instructions a compiled program has, in all its computations."""
    return sum(1 for line in program.splitlines() if _LINE.match(line))


def _width(dtype: str) -> int:
    return 1 if dtype == "pred" else max(1, int(np.ceil(int(re.sub(r"\D", "", dtype)) / 8)))
