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

    Each instruction reads its operands and writes its result once. Of an operand that it only
    slices, it reads the slices. Branches are left out.
    """
    computations = _computations(program)
    sizes: dict[str, int] = {}
    moved = 0
    for name, result, operation, rest in computations["ENTRY"]:
        sizes[name] = _size(result)
        if operation in _FREE:
            continue
        called = re.search(r"calls=(%[\w.\-]+)", rest)
        sliced = _sliced(computations[called[1]]) if called else {}
        read = {
            operand: sliced.get(number, sizes.get(operand, 0))
            for number, operand in enumerate(_operands(rest))
        }
        moved += sizes[name] + sum(read.values())
    return moved


def _computations(program: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """The instructions of each computation: name, result, operation, and what follows."""
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for block in re.split(r"\n(?=%|ENTRY )", program)[1:]:
        lines = map(_LINE.match, block.splitlines()[1:])
        found[block.split()[0]] = [match.groups() for match in lines if match]
    return found


def _sliced(computation: list[tuple[str, str, str, str]]) -> dict[int, int]:
    """Bytes of the slices of each parameter that nothing but slices read, by its number."""
    numbers = {
        name: int(rest.split(")")[0])
        for name, _, operation, rest in computation
        if operation == "parameter"
    }
    parameters = {name: name for name in numbers}  # and what is a bitcast of which
    slices, whole = dict.fromkeys(numbers, 0), set()
    for name, result, operation, rest in computation:
        for operand in _operands(rest):
            source = parameters.get(operand)
            if source is None:
                continue
            if operation == "bitcast":
                parameters[name] = source
            elif operation == "slice":
                slices[source] += _size(result)
            else:
                whole.add(source)
    return {numbers[name]: size for name, size in slices.items() if size and name not in whole}


def _operands(rest: str) -> list[str]:
    return re.findall(r"%[\w.\-]+", rest.split(")")[0])


def _size(result: str) -> int:
    return sum(
        math.prod(map(int, shape.split(","))) * _width(dtype) if shape else _width(dtype)
        for dtype, shape in _ARRAY.findall(result)
    )


def instructions(program: str) -> int:
    """How many instructions a compiled program has, in all its computations."""
    return sum(1 for line in program.splitlines() if _LINE.match(line))


def _width(dtype: str) -> int:
    return 1 if dtype == "pred" else max(1, int(np.ceil(int(re.sub(r"\D", "", dtype)) / 8)))
