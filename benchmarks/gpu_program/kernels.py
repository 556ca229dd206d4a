"""Kernels of a program, each with its kind, its operations and the bytes that it moves.

Operations are those of matrix products; what else a kernel computes is taken to be free. Bytes are each operand read
once and each result written once. Of what a fusion slices, or updates in place, only the slice counts. A loop's kernels
count for each of its turns.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu_program.hlo import Computation, Instruction, Module, Shape

PRODUCTS = ("__cublas$", "__cudnn$fmha")
PALLAS = "__gpu$xla.gpu.triton"
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute", "ragged-all-to-all")
NO_KERNEL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
}
SLICES = {"slice", "dynamic-slice", "gather"}
MOVING = {"transpose", "reverse", "sort", "scatter", "dynamic-update-slice", "reduce-window", "dot", "fusion", "pad"}
TRANSPARENT = {"bitcast", "reshape", "convert", "copy"}


@dataclass(frozen=True)
class Kernel:
    instruction: Instruction
    times: int  # how often it runs in a step
    kind: str
    operations: float  # of one run, as are the following
    bytes: int
    inputs: tuple[str, ...]  # dtypes of a product's factors
    output: str  # dtype of a product's result
    transposed: int  # bytes of arrays that it transposes
    collective: str  # which one it is: all-reduce; "" for none
    devices: int  # that take part in a collective
    sources: tuple[tuple[str, int], ...]  # files and lines that it is from, the innermost first

    @property
    def is_product(self) -> bool:
        return bool(self.inputs)

    @property
    def is_wait(self) -> bool:
        return self.instruction.opcode.endswith("-done")

    @property
    def is_collective(self) -> bool:
        return bool(self.collective)


def kernels(module: Module) -> list[Kernel]:
    """Returns the kernels of a program, in the order in which they are launched."""
    return [kernel for kernel in launches(module) if not kernel.is_wait]


def launches(module: Module) -> list[Kernel]:
    """Returns the kernels, and the places where those that run beside others are waited for."""
    return list(_walk(module, module.computations[module.entry], 1))


def _walk(module: Module, computation: Computation, times: int) -> Iterator[Kernel]:
    for instruction in computation:
        opcode = instruction.opcode
        if opcode == "while":
            body = module.computations[instruction.called("body")]
            yield from _walk(module, body, times * instruction.turns)
        elif opcode == "call":
            yield from _walk(module, module.computations[instruction.called("to_apply")], times)
        elif opcode == "conditional":
            yield from max((list(branch) for branch in _branches(module, instruction, times)), key=_moved)
        elif opcode not in NO_KERNEL and not opcode.endswith("-update"):
            yield _kernel(module, computation, instruction, times)


def _branches(module: Module, instruction: Instruction, times: int) -> Iterator[Iterator[Kernel]]:
    named = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    both = [instruction.called(f"{side}_computation") for side in ("true", "false")]
    for name in re.findall(r"[\w.$-]+", named[1]) if named else both:
        yield _walk(module, module.computations[name], times)


def _moved(kernels: list[Kernel]) -> float:
    return sum(kernel.bytes * kernel.times for kernel in kernels)


def _kernel(module: Module, computation: Computation, instruction: Instruction, times: int) -> Kernel:
    inside = _inside(module, instruction)
    operands = [computation.instructions[name] for name in instruction.operands]
    operations, inputs, output = _product(instruction, operands, inside)
    return Kernel(
        instruction=instruction,
        times=times,
        kind=_kind(instruction, inside, output),
        operations=operations,
        bytes=_bytes(instruction, operands, inside),
        inputs=inputs,
        output=output,
        transposed=_transposed(instruction, operands, inside),
        collective=collective(instruction, inside),
        devices=_devices(instruction),
        sources=tuple(module.sources(instruction)),
    )


def _inside(module: Module, instruction: Instruction) -> Computation | None:
    """Returns the computation that a fusion, or an operation that runs beside others, wraps."""
    if instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
        return module.computations.get(instruction.called("calls"))
    return None


# Kinds


def collective(instruction: Instruction, inside: Computation | None) -> str:
    """Returns the collective that an instruction is, starts or wraps, such as all-reduce; "" for none."""
    opcodes = [instruction.opcode, *(part.opcode for part in inside or ())]
    return next((name for opcode in opcodes if (name := opcode.removesuffix("-start")) in COLLECTIVES), "")


def _kind(instruction: Instruction, inside: Computation | None, output: str) -> str:
    opcodes = {part.opcode for part in inside} if inside else {instruction.opcode}
    if collective(instruction, inside):
        return "collectives"
    if instruction.target.startswith("__cudnn$fmha"):
        return f"cuDNN attention, {'backward' if 'Backward' in instruction.target else 'forward'}"
    if instruction.target == PALLAS:
        side = re.search(r"/attention\.(forward|backward)/", instruction.op_name)
        return f"Pallas attention, {side[1]}" if side else "Pallas kernels"
    if output:
        return f"products to {output}"
    if instruction.opcode == "custom-call":
        return "other custom calls"
    if "__triton" in instruction.attributes:
        return "Triton fusions"
    if opcodes & {"reduce", "reduce-window"}:
        return "reductions"
    if opcodes <= {"copy", "copy-start", "transpose", *NO_KERNEL} or _is_slice_copy(instruction):
        return "copies"
    return "loops"


def _devices(instruction: Instruction) -> int:
    """Returns how many devices a collective's first group has: replica_groups={{0,1},{2,3}} or [2,2]<=[4]."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.attributes)
    return len(listed[1].split(",")) if listed else int(counted[1]) if counted else 1


def _is_slice_copy(instruction: Instruction) -> bool:
    """Returns whether XLA copies a slice itself rather than by a kernel."""
    custom = instruction.backend.get("fusion_backend_config", {}).get("custom_fusion_config", {})
    return instruction.opcode == "fusion" and custom.get("name") == "dynamic_slice_fusion"


def _transposed(instruction: Instruction, operands: list[Instruction], inside: Computation | None) -> int:
    """Returns the bytes of what changes its order in memory."""
    if instruction.opcode.endswith("-done"):
        return 0
    parts = list(inside) if inside else [instruction]
    known = inside.instructions if inside else {operand.name: operand for operand in operands}
    moved = 0
    for part in parts:
        if part.opcode == "transpose":
            moved += part.bytes * _reorders(part.sizes("dimensions"), part.shapes[0])
        elif part.opcode == "copy":
            moved += part.bytes * (known[part.operands[0]].shapes[0].layout != part.shapes[0].layout)
    return moved


def _reorders(permutation: tuple[int, ...], shape: Shape) -> bool:
    """Returns whether a permutation moves anything: axes of length 1 may go anywhere."""
    long = [axis for axis, size in zip(permutation, shape.dims, strict=True) if size > 1]
    return long != sorted(long)


# Operations


def _product(
    instruction: Instruction, operands: list[Instruction], inside: Computation | None
) -> tuple[float, tuple[str, ...], str]:
    """Returns the operations of the products in a kernel, the dtypes of their factors, and that of the result."""
    target = instruction.target
    if target.startswith("__cublas$"):
        dims = instruction.backend["gemm_backend_config"]["dot_dimension_numbers"]
        summed = [int(axis) for axis in dims["lhs_contracting_dimensions"]]
        factors = [operand.shapes[0] for operand in operands[:2]]
        return _of_dot(instruction.shapes[0], factors[0], summed), _dtypes(factors), instruction.shapes[0].dtype
    if target.startswith("__cudnn$fmha"):
        return _of_attention(instruction), _dtypes([operands[0].shapes[0]] * 2), instruction.shapes[0].dtype
    if target == PALLAS:
        told = re.search(r'"flops": "(\d+)"', instruction.attributes.replace(r"\22", '"'))
        if told is None:
            return 0.0, (), ""
        return float(told[1]), _dtypes([operands[0].shapes[0]] * 2), instruction.shapes[0].dtype
    operations, inputs, output = 0.0, (), ""
    factors = {part.name: part for part in inside or operands}
    for part in inside or (instruction,):
        if part.opcode == "dot":
            left, right = (factors[name].shapes[0] for name in part.operands[:2])
            operations += _of_dot(part.shapes[0], left, part.sizes("lhs_contracting_dims"))
            inputs, output = _dtypes([left, right]), instruction.shapes[0].dtype
    return operations, inputs, output


def _of_dot(result: Shape, left: Shape, summed: list[int] | tuple[int, ...]) -> float:
    return 2.0 * result.size * math.prod(left.dims[axis] for axis in summed)


def _of_attention(instruction: Instruction) -> float:
    """Returns the operations of cuDNN's attention: two products forward and five backward, half of each if causal."""
    config = instruction.backend["cudnn_fmha_backend_config"]
    scores = math.prod(int(size) for size in config["intermediate_tensor_shape"]["dimensions"])
    width = instruction.shapes[0].dims[-1]
    products = 5 if "Backward" in instruction.target else 2
    return products * 2.0 * scores * width * (0.5 if config["mask_type"] == "CAUSAL" else 1)


def _dtypes(shapes: list[Shape]) -> tuple[str, ...]:
    return tuple(shape.dtype for shape in shapes)


# Bytes


def _bytes(instruction: Instruction, operands: list[Instruction], inside: Computation | None) -> int:
    if instruction.opcode == "fusion" and inside is not None:
        read = sum(_read(inside, parameter) for parameter in inside.parameters if parameter.name in inside.instructions)
        return read + sum(_written(inside, root) for root in inside.roots())
    if instruction.opcode.endswith("-done"):
        return 0
    if collective(instruction, inside):
        return sum(operand.bytes for operand in operands)  # what each device gives
    written = instruction.shapes
    if instruction.target.startswith(PRODUCTS) and len(written) > 1 and written[-1].dtype in ("s8", "u8"):
        written = written[:-1]  # the workspace
    different = {operand.name: operand.bytes for operand in operands}
    return sum(different.values()) + sum(shape.bytes for shape in written)


def _read(inside: Computation, parameter: Instruction) -> int:
    """Returns the bytes that a fusion reads of a parameter: all of it, or the slices if it takes but slices of it."""
    each = parameter.bytes / max(parameter.shapes[0].size, 1)
    read, waiting = 0.0, [(parameter, user) for user in inside.users[parameter.name]]
    while waiting:
        source, user = waiting.pop()
        if user.opcode in SLICES and user.operands[0] == source.name:
            read += each * user.shapes[0].size
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            pass  # stays as it is, in place
        elif user.opcode == "scatter" and user.operands[0] == source.name:
            read += each * inside.instructions[user.operands[-1]].shapes[0].size
        elif _keeps_places(source, user) and not user.is_root:
            waiting += [(user, following) for following in inside.users[user.name]]
        else:
            return parameter.bytes
    return min(round(read), parameter.bytes)


def _keeps_places(source: Instruction, user: Instruction) -> bool:
    """Returns whether each number of a result comes from one number of the source, so that a slice needs a slice."""
    if user.opcode in ("bitcast", "reshape"):
        return True
    return user.opcode not in MOVING and user.shapes[0].dims == source.shapes[0].dims


def _written(inside: Computation, root: Instruction) -> int:
    """Returns the bytes of a result, or of its part that is updated in place."""
    while root.opcode in TRANSPARENT and root.operands:
        before = inside.instructions[root.operands[0]]
        if before.opcode not in TRANSPARENT | {"dynamic-update-slice", "scatter"}:
            break
        root = before
    if root.opcode == "dynamic-update-slice":
        return inside.instructions[root.operands[1]].bytes
    if root.opcode == "scatter":
        return inside.instructions[root.operands[-1]].bytes
    return root.bytes
