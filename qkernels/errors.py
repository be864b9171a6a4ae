"""The one error a user causes and can mend.

Room: all of `qkernels` and `qlora` raises `UserError` for wrong input; the command line turns it into one line on
stderr and exit code 2.  It is a `ValueError`, so library users who catch `ValueError` need not know it.
"""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input, told as argument, expected, got and remedy.

    Args:
        argument: name of the argument, flag, file or tensor that is wrong.
        expected: what it has to be.
        got: what it was.
        remedy: what to do about it.

    `str(error)` is one paragraph with all four; each is kept as an attribute too.
    """

    def __init__(self, argument: str, *, expected: str, got: object, remedy: str) -> None:
        # A cause quoted from elsewhere often ends in a full stop of its own.
        super().__init__(f"{argument}: expected {expected}, got {str(got).rstrip('.')}. {remedy}")
        self.argument = argument
        self.expected = expected
        self.got = got
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call UserError(message): a worker process could not hand the error to its parent.
        return _rebuild, (self.argument, self.expected, self.got, self.remedy)


def _rebuild(argument: str, expected: str, got: object, remedy: str) -> UserError:
    return UserError(argument, expected=expected, got=got, remedy=remedy)
