"""A saved float16 program with float32 in its place, so that what was saved can be checked on any computer.

Apple's runtime on Linux is an interpreter that adds up a float16 matrix product term by term in float16. No device
does, and the error grows with the width: 0.3 % of a product's largest number with 64 terms, 0.7 % with 512, 1.1 % with
2,048, which is ten to forty times that of rounding the result once. Twelve random layers of width 512 were off by 15 %
of their largest logit that way, and such limits would hide any fault.

So the check loads the saved program, gives every float16 value in it the type float32, constants through a cast, and
lets the same runtime execute that: each operation, shape, constant, code and state is the saved one, each number is
computed in float32. It says nothing of float16's rounding on a device. `CoreAIRunner(folder, as_saved=True)` executes
the program as it is.
"""

from __future__ import annotations

from typing import Any

__all__ = ["widened"]


def widened(program: Any) -> Any:
    """Return a loaded `AIProgram`, changed in place: float32 wherever it had float16."""
    from coreai._compiler.dialects import coreai
    from coreai._compiler.ir import F32Type, FunctionType, InsertionPoint, Location, TypeAttr

    module = program._module._mlir_module
    with module.context, Location.unknown():
        for graph in module.body.operations:
            block = graph.regions[0].blocks[0]
            for argument in block.arguments:
                argument.set_type(_wide(argument.type))
            operations = list(block.operations)
            for operation in operations:
                if operation.name != "coreai.constant":
                    for result in operation.results:
                        result.set_type(_wide(result.type))
                elif _wide(constant := operation.results[0].type) != constant:
                    value = operation.results[0]
                    with InsertionPoint(operation):
                        cast: Any = coreai.cast(value, F32Type.get())
                    cast.owner.move_after(operation.operation)
                    value.replace_all_uses_except(cast, cast.owner)
            given, returned = block.arguments, operations[-1].operands
            kind = FunctionType.get([value.type for value in given], [value.type for value in returned])
            graph.attributes["function_type"] = TypeAttr.get(kind)
    return program


def _wide(kind: Any) -> Any:
    """Return the type with float32 for float16: of a tensor, or of the state that a handle stands for."""
    from coreai._compiler.dialects import coreai
    from coreai._compiler.ir import F16Type, F32Type, RankedTensorType

    if isinstance(kind, coreai.HandleType):
        return coreai.HandleType.get(_wide(kind.inner_type))
    if isinstance(kind, RankedTensorType) and isinstance(kind.element_type, F16Type):
        return RankedTensorType.get(kind.shape, F32Type.get())
    return kind
