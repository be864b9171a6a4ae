"""What the `qlora` command says of itself: its version, its commands, its help.

Room: the standard library only, and nothing of this package when it is loaded: `qlora_command.py` loads this file
alone, because importing the package takes seconds.
"""

import argparse
from typing import NoReturn

VERSION = "0.1.0"

COMMANDS = {
    "train": "fine-tune a model in 4 bits with LoRA",
    "generate": "continue prompts, with or without an adapter",
    "compare": "show the base model beside the tuned one, on the same prompts",
    "merge": "write base and adapter as one ordinary model",
    "quantize": "write a 4-bit model whose weights are rounded for your texts",
    "plan": "estimate memory and time of a run, without loading the model",
    "demo": "all of it on a small model, without a GPU or a network, in a few minutes",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from qkernels.errors import UserError

        raise UserError("command", expected=" | ".join(COMMANDS), got=message, remedy="See `qlora --help`.")


def parser() -> argparse.ArgumentParser:
    """Of the command's first word; a wrong one is a `UserError`."""
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    made = _Parser(
        prog="qlora",
        usage="qlora COMMAND [flags]",
        description="Fine-tune language models in 4 bits (NF4) with LoRA.",
        epilog=f"commands:\n{commands}\n\n`qlora COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"qlora {VERSION}")
    made.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    return made
