"""The base of errors that a user can fix; nothing else of ours is imported, so that every module may use it."""

from collections.abc import Iterator
from contextlib import contextmanager

SHORTEST_HIDDEN = 8  # characters of a value that errors hide: numbers, flags and names of folders are no secrets


class UserError(ValueError):
    """Something outside this program is wrong; its text says where, what was found, what is allowed, what to do.

    Front ends print the text alone. Anything else that is raised is our own mistake and keeps its traceback.
    """


_from_environment: dict[str, str] = {}


def hide(value: str, shown: str) -> None:
    """Show `shown` instead of a value of the environment in errors, as in `${oc.env:NAME}`; it may be a secret."""
    if len(value) >= SHORTEST_HIDDEN:
        _from_environment[value] = shown


def without_hidden(text: str) -> str:
    """Return a text with each value of the environment replaced by what is shown instead."""
    for value in sorted(_from_environment, key=len, reverse=True):
        text = text.replace(value, _from_environment[value])
    return text


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a Rust library, which `except Exception` does not catch."""
    return type(error).__name__ == "PanicException"


class LibraryPanic(RuntimeError):
    """A panic of a Rust library, with its text."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic in the block as an error that `except Exception` catches."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise LibraryPanic(str(error)) from error
