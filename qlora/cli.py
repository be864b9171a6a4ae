"""The `qlora` command: which command runs, and what its errors become.

Room: messages and exit codes: 0, 2 for wrong input (one line on stderr), 130 after Ctrl-C.  The commands raise.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from qkernels.errors import UserError

from .usage import parser

# What the library calls otherwise than the command line, which has TRL's names.
_FLAGS = {
    "name_or_path": "--model_name_or_path",
    "checkpoint": "--model_name_or_path",
    "target_modules": "--lora_target_modules",
    "quant_type": "--bnb_4bit_quant_type",
    "compress_statistics": "--use_bnb_nested_quant",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after `qlora`; None takes those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = "qlora"
    try:
        command = parser().parse_args(words[:1] or ["--help"]).command
        name = f"qlora {command}"
        # The libraries' notes to their own callers; the user of a command can do nothing about them.
        warnings.filterwarnings("ignore", category=FutureWarning)
        importlib.import_module(f"qlora.{command}").main(words[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except UserError as error:
        print(f"{name}: {_in_flags(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _nobody_reads() -> bool:
    """Whether standard output's reader has gone, as in `qlora plan | head`; what is left for it then goes nowhere."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _in_flags(error: UserError) -> str:
    """The message as one line, with the flag for an argument of the library."""
    text = str(error)
    if error.argument in _FLAGS:
        text = _FLAGS[error.argument] + text.removeprefix(error.argument)
    return " ".join(text.split())
