"""What a piece of the program does on a device: it is run on tensors without values, and its operations are noted.

So the work of forward, backward, factors, inverses and preconditioning is that of the code itself, whatever the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["product", "factorise", "solve", "invert", "memory"]

# What only names memory, or takes it without writing; views besides are known by their type.
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach", "alias", "lift_fresh"}
_KINDS: dict[str, Kind] = {
    "linalg_cholesky_ex": "factorise",
    "cholesky_solve": "solve",
    "linalg_solve_triangular": "solve",
}


class Operation(NamedTuple):
    """One call of the device.

    Attributes:
        kind: What limits it besides memory; "invert" makes an inverse of a Cholesky factor.
        flops: Floating-point operations that its kind counts; 0 for "memory".
        size: Of a product the smallest of its three dimensions, by which its rate goes; of the others rows of a matrix.
        matrices: Matrices that it works on one after another on a CPU; 1 for products.
        values: Values read and written.
    """

    kind: Kind
    flops: float
    size: int
    matrices: int
    values: int


Operations = Sequence[Operation]


class OperationRecorder(TorchDispatchMode):
    """Notes the operations on meta tensors within its ``with`` block.

    Attributes:
        operations: In the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        name = func._overloadpacket.__name__
        inputs = {key: value for key, value in keywords.items() if key != "out"}
        read, written = list(_meta_tensors((args, inputs))), list(_meta_tensors(result))
        if (read or written) and not func.is_view and name not in _FREE and func.namespace == "aten":
            self.operations.append(_operation(func, name, args, keywords, result, read, written))
        return result


def operations_of(function: Callable[[], object]) -> list[Operation]:
    """The operations of a call; the function works on meta tensors."""
    recorder = OperationRecorder()
    with recorder:
        function()
    return recorder.operations


def _operation(
    func: Any,
    name: str,
    args: Sequence[Any],
    keywords: Mapping[str, Any],
    result: Any,
    read: Sequence[Tensor],
    written: Sequence[Tensor],
) -> Operation:
    values = sum(map(_distinct_values, [*read, *written]))
    kind = _KINDS.get(name)
    if kind == "factorise":
        *stack, size, _ = args[0].shape
        matrices = _product(stack)
        return Operation(kind, matrices * size**3 / 3, size, matrices, values)
    if kind == "solve":
        (right, factor), passes = (args[:2], 2) if name == "cholesky_solve" else (args[1::-1], 1)
        *stack, size, _ = factor.shape
        return Operation(kind, passes * right.numel() * size, size, _product(stack), values)
    count_flops = flop_registry.get(func._overloadpacket)
    if count_flops is None:
        return Operation("memory", 0.0, 0, 1, values)
    return Operation(
        "product", float(count_flops(*args, **keywords, out_val=result)), _product_size(name, args), 1, values
    )


def _product_size(name: str, args: Sequence[Any]) -> int:
    """The smallest dimension of a product or, of a convolution as one, of its weight."""
    if name.startswith(("convolution", "cudnn_convolution")):
        backward = name == "convolution_backward"
        weight, groups = args[2 if backward else 1].shape, args[9 if backward else 8]
        return int(min(weight[0] // groups, _product(weight[1:])))
    first, second = [argument for argument in args if isinstance(argument, Tensor)][-2:]
    return int(min(first.shape[-2], first.shape[-1], second.shape[-1]))


def _meta_tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta)


def _distinct_values(tensor: Tensor) -> int:
    """Values of a tensor; of an expanded one those that are there."""
    return int(min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size()))


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
