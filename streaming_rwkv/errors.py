"""The base of errors that a user can fix; nothing else is imported, so that every module may use it."""


class UserError(ValueError):
    """Something outside this program is wrong; its text says where, what was found, what is allowed, what to do.

    Front ends print the text alone. Anything else that is raised is our own mistake and keeps its traceback.
    """


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a Rust library, which `except Exception` does not catch."""
    return type(error).__name__ == "PanicException"
