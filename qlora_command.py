"""The door of the `qlora` command: `--version` and `--help` are answered here, since importing qlora takes seconds.

Room: the standard library only; what is answered is `qlora/usage.py`'s, all else `qlora/cli.py`'s.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Run the command with the process's words; returns its exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "--version"):
        found = importlib.util.find_spec("qlora")
        assert found is not None
        assert found.origin is not None
        spec = importlib.util.spec_from_file_location("qlora_usage", Path(found.origin).with_name("usage.py"))
        assert spec is not None
        assert spec.loader is not None
        usage = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(usage)
        usage.parser().parse_args(words[:1] or ["--help"])
    from qlora.cli import main as run

    return run(words)
