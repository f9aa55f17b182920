"""A check of a pickle before it is loaded: the functions that it calls, and that they make no more than it contains.

A list of harmless functions is not enough, since they can be called with each other's results: `hex` of `hex` of a
text, a path of two paths, a set of a tensor of 300 million numbers. Nor are other parts of pickles harmless: a place of
the memo makes room for all before it, and a key of tuples that share their members takes longer to hash than anyone
waits. So the pickle is followed, operation by operation, with what is known of each value, and nothing is made.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

_LARGEST_KEY = 1000  # constants in a key of a mapping, or in the arguments of a call, counted as often as they occur
_MOST_WEIGHT = 1 << 62
_CONSTANTS = frozenset(
    {
        "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "SHORT_BINSTRING", "BINSTRING",
    }
)  # fmt: skip
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class Named:
    """A class, function or other object that a pickle names."""

    def __init__(self, name: str) -> None:
        self.name = name


class Value:
    """A value that is no constant: a tuple, of which the members are known, or any other.

    Its weight is the number of constants in it, counted as often as they occur, since values may share members. It is
    known when the value becomes a member of another, and nothing may be added afterwards.
    """

    def __init__(self, members: Sequence[Any] = (), *, is_tuple: bool = False) -> None:
        self.members = members if is_tuple else None
        self.weight, self.is_member = 1, False
        self.add(members)

    def add(self, members: Sequence[Any]) -> None:
        self.weight = min(self.weight + sum(map(weight_of, members)), _MOST_WEIGHT)
        for member in members:
            if isinstance(member, Value):
                member.is_member = True


def weight_of(value: Any) -> int:
    """Return the number of constants in a value."""
    return value.weight if isinstance(value, Value) else 1


# A check of the arguments of a call; it raises a ValueError.
Check = Callable[[Sequence[Any]], None]


def small(arguments: Sequence[Any]) -> None:
    """Allow a call with few constants, also within other values."""
    if sum(map(weight_of, arguments)) > _LARGEST_KEY:
        raise ValueError(f"its pickle has a call with more than {_LARGEST_KEY} values")


def anything(arguments: Sequence[Any]) -> None:
    """Allow any call, where the result is not larger than the arguments."""


def texts(arguments: Sequence[Any]) -> None:
    """Allow a call with texts alone, not with what another call has made."""
    if not all(isinstance(argument, str) for argument in arguments):
        raise ValueError("its pickle has a call with other values than texts")


def latin1(arguments: Sequence[Any]) -> None:
    """Allow the call by which pickles of protocol 2 make bytes of a text."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
        raise ValueError("its pickle encodes a text otherwise than as bytes (latin1)")


def check_pickle(stream: IO[bytes], calls: Mapping[str, Check], *, names: Callable[[str], bool]) -> None:
    """Check one pickle, at the stream's position.

    Args:
        calls: the functions and classes that may be called, by `module.name`, each with the check of its arguments.
        names: whether another object may be named, but not called.
    Raises:
        pickle.UnpicklingError: it names another object.
        ValueError: it calls one otherwise than files of weights do, or is damaged.
    """
    _Follower(calls, names).follow(stream)


class _Follower:
    def __init__(self, calls: Mapping[str, Check], names: Callable[[str], bool]) -> None:
        self.calls, self.names = calls, names
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def follow(self, stream: IO[bytes]) -> None:
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.step(opcode.name, argument)
        except (IndexError, AttributeError, TypeError) as error:  # of a stack without what an operation takes
            raise ValueError(f"its pickle is damaged ({error})") from None

    def step(self, name: str, argument: Any) -> None:
        """Follow one operation."""
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.stack.append(_MARK)
            case "EMPTY_LIST" | "EMPTY_DICT":
                self.stack.append(Value())
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = 0 if name == "EMPTY_TUPLE" else int(name[-1])
                self.stack.append(Value([self.pop() for _ in range(count)][::-1], is_tuple=True))
            case "TUPLE":
                self.stack.append(Value(self.pop_to_mark(), is_tuple=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.remember(len(self.memo) if argument is None else argument)
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "APPEND":
                self.add([self.pop()])
            case "APPENDS":
                self.add(self.pop_to_mark())
            case "SETITEM":
                self.add_items([self.pop(), self.pop()][::-1])
            case "SETITEMS":
                self.add_items(self.pop_to_mark())
            case "BINPERSID":
                self.pop()
                self.stack.append(Value())
            case "GLOBAL":
                self.name(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                last, module = self.pop(), self.pop()
                self.name(f"{module}.{last}")
            case "REDUCE" | "NEWOBJ":
                arguments = self.pop()
                self.call(self.pop(), arguments)
            case "BUILD":
                self.add([self.pop()])
            case _ if name in _CONSTANTS:
                self.stack.append(_VALUES.get(name, argument))
            case _:
                raise ValueError(f"its pickle has the operation {name}, which is in no weights")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError("a value is missing")
        return value

    def pop_to_mark(self) -> list[Any]:
        found: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def remember(self, place: int) -> None:
        if place > len(self.memo):  # room would be made for all places before it
            raise ValueError(f"its pickle has place {place:,} in a memo of {len(self.memo):,}")
        self.memo[place : place + 1] = [self.stack[-1]]

    def add(self, values: list[Any]) -> None:
        """Add members to the last value, or its state."""
        target = self.stack[-1]
        if not isinstance(target, Value) or target.members is not None:
            raise TypeError(f"a {type(target).__name__} takes no members")
        if target.is_member:
            raise ValueError("its pickle adds to a value that is in another already")
        target.add(values)

    def add_items(self, keys_and_values: list[Any]) -> None:
        if max(map(weight_of, keys_and_values[::2]), default=0) > _LARGEST_KEY:
            raise ValueError(f"its pickle has a key with more than {_LARGEST_KEY} values")
        self.add(keys_and_values)

    def name(self, name: str) -> None:
        if name not in self.calls and not self.names(name):
            raise pickle.UnpicklingError(f"it asks for {name}")
        self.stack.append(Named(name))

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Named) or function.name not in self.calls:
            raise ValueError(f"its pickle calls {getattr(function, 'name', 'a value')}, as no file of weights does")
        if not isinstance(arguments, Value) or arguments.members is None:
            raise TypeError("a call without a tuple of arguments")
        self.calls[function.name](arguments.members)
        self.stack.append(Value(arguments.members))
