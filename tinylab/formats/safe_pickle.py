"""Read what torch.save wrote without unpickling it: an interpreter of 40 opcodes that can only build plain data.

`read` builds dictionaries, lists, tuples, numbers, text and descriptions of tensors. It imports nothing, calls nothing
that the file names, and raises CheckpointError at the first global or opcode outside its lists. The opcodes are
documented in Python's pickletools; the globals are those that torch.save writes for a state dict.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from tinylab.errors import CheckpointError

MAX_PICKLE_BYTES = 16 * 2**20
"""TinyLlama's checkpoint, with its optimizer, has about 100 KB."""
MAX_OPCODES = 300_000
"""The same file has about 25,000, 40 for each tensor."""

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""The storage classes of `torch`, each with the dtype of its elements."""
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED = ("collections", "OrderedDict")
_SIZE = ("torch", "Size")
ALLOWED = frozenset({_TENSOR, _PARAMETER, _ORDERED, _SIZE} | {("torch", name) for name in STORAGES})
"""Every (module, name) that a pickle may name."""


class Global(NamedTuple):
    """A name that the pickle mentions; it is never looked up."""

    module: str
    name: str


class Storage(NamedTuple):
    """The bytes of one tensor or several: the member `data/KEY` of the archive."""

    dtype: str
    key: str
    numel: int


class TensorSpec(NamedTuple):
    """A strided view of a storage, in elements. It has not been compared with the size of the storage yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()
"""On the stack: here a group of items begins."""
_KEYS = (str, int, float, bool, type(None))


def read(data: bytes, where: str) -> Any:
    """The plain value in pickle `data`, with a TensorSpec for every tensor. `where` names the file in errors.

    Raises CheckpointError for anything but plain data and tensors, and for broken or oversized pickles.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{where} must be at most {MAX_PICKLE_BYTES} bytes; found {len(data)}: not a state dict")
    reader = _Reader(where)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise CheckpointError(f"{where} must have at most {MAX_OPCODES} opcodes: not a state dict")
            if opcode.name == "STOP":
                if rest := len(data) - (position or 0) - 1:
                    raise CheckpointError(f"{where} must end with its pickle; found {rest} bytes more")
                (value,) = reader.stack
                return value
            reader.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, MemoryError) as error:
        raise CheckpointError(
            f"{where} must be a complete pickle; found a broken one ({error}). Copy it again"
        ) from None
    raise CheckpointError(f"{where} must be a complete pickle; found no end. Copy it again")


class _Reader:
    """The stack machine. It refuses every opcode that is missing from the tables at the end of this file."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where} must hold tensors and plain values only; found {what}. A pickle can run any code, so "
            "nothing of it was executed. Do not open this file elsewhere unless you trust its source; "
            "ask for safetensors"
        )

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self.pop(_TUPLES[name])))
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            self.refuse(f"the opcode {name}")

    def pop(self, count: int) -> list[Any]:
        """The last `count` items, at least one, none of them a mark."""
        if len(self.stack) < count:
            raise ValueError("an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        if any(item is _MARK for item in items):
            raise ValueError("a mark in place of a value")
        return items

    def pop_mark(self) -> list[Any]:
        """The items above the last mark."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark")

    def fill(self, pairs: list[Any]) -> None:
        """Put alternating keys and values into the dictionary on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items set on something other than a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, _KEYS):
                self.refuse(f"a dictionary key of type {type(key).__name__}")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items appended to something other than a list")
        self.stack[-1].extend(items)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def named(self, module: Any, name: Any) -> None:
        if (module, name) not in ALLOWED:
            self.refuse(f"the global {str(module)[:100]}.{str(name)[:100]}")
        self.stack.append(Global(module, name))

    def storage(self) -> None:
        (identity,) = self.pop(1)
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            self.refuse("a persistent identifier other than a torch storage")
        _, kind, key, _, numel = identity
        is_key = isinstance(key, str) or _is_count(key)  # litgpt's own writer numbers its storages
        if not (isinstance(kind, Global) and kind.name in STORAGES and is_key and _is_count(numel)):
            self.refuse("a malformed torch storage")
        self.stack.append(Storage(STORAGES[kind.name], str(key), numel))

    def build(self) -> None:
        target, state = self.pop(2)
        if not (isinstance(target, dict) and isinstance(state, dict)):  # only a module's OrderedDict has `_metadata`
            self.refuse(f"attributes set on a {type(target).__name__}")
        self.stack.append(target)

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self.refuse(f"a call of a {type(function).__name__}")
        if function not in _CALLS:
            self.refuse("a call of a torch storage class")
        self.stack.append(_CALLS[function](self, arguments))

    def ordered(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        if arguments:
            self.refuse("an OrderedDict made from arguments")
        return {}

    def tensor(self, arguments: tuple[Any, ...]) -> TensorSpec:
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, Storage) or not _is_count(offset):
            self.refuse("a malformed tensor")
        spec = TensorSpec(storage, offset, _counts(shape), _counts(stride))
        if len(spec.shape) != len(spec.stride) or len(spec.shape) > 8:
            self.refuse("a malformed tensor")
        return spec

    def parameter(self, arguments: tuple[Any, ...]) -> TensorSpec:
        if not isinstance(arguments[0], TensorSpec):
            self.refuse("a parameter that holds no tensor")
        return arguments[0]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(_is_count(v) for v in values):
        raise ValueError("a malformed shape")
    return values


_IGNORED = frozenset({"PROTO", "FRAME"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPERATIONS: dict[str, Callable[[_Reader, Any], object]] = {
    "MARK": lambda reader, _: reader.stack.append(_MARK),
    "POP": lambda reader, _: reader.stack.pop(),
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader.pop_mark())),
    "APPEND": lambda reader, _: reader.extend(reader.pop(1)),
    "APPENDS": lambda reader, _: reader.extend(reader.pop_mark()),
    "SETITEM": lambda reader, _: reader.fill(reader.pop(2)),
    "SETITEMS": lambda reader, _: reader.fill(reader.pop_mark()),
    "MEMOIZE": lambda reader, _: reader.remember(len(reader.memo)),
    "BINPUT": _Reader.remember,
    "LONG_BINPUT": _Reader.remember,
    "BINGET": _Reader.recall,
    "LONG_BINGET": _Reader.recall,
    "GLOBAL": lambda reader, argument: reader.named(*argument.partition(" ")[::2]),
    "STACK_GLOBAL": lambda reader, _: reader.named(*reader.pop(2)),
    "BINPERSID": lambda reader, _: reader.storage(),
    "BUILD": lambda reader, _: reader.build(),
    "REDUCE": lambda reader, _: reader.call(),
}
_CALLS: dict[Any, Callable[[_Reader, tuple[Any, ...]], Any]] = {
    _TENSOR: _Reader.tensor,
    _PARAMETER: _Reader.parameter,
    _ORDERED: _Reader.ordered,
    _SIZE: lambda _, arguments: _counts(*arguments),
}
