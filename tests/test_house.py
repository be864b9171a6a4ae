"""The walls of the house: who imports whom, and what an import may do.  `docs/house.md` says why."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a room may import of its own package's parts and of the outside; the longest matching prefix decides.
FORBIDDEN = {
    "qkernels": ("qlora", "transformers", "peft", "trl", "datasets", "bitsandbytes", "benchmarks", "tests"),
    "qkernels/format.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/adapter.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/dropout.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/norm.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/token_attention.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/quant_state.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/reference.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.checks"),
    "qkernels/checks.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/dispatch.py": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference"),
    "qkernels/kernels": ("os", "qkernels.checks", "qkernels.ops", "qkernels.autograd", "qkernels.reference"),
    "qkernels/tuning": ("torch", "triton", "qkernels.kernels", "qkernels.ops"),
    "qlora": ("triton", "qkernels.kernels", "qkernels.ops", "qkernels.reference", "benchmarks", "tests"),
    "qlora/linear4bit.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/params4bit.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/module4bit.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/embedding4bit.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/output4bit.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/targets.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/dequantize.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/dropout.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/lora_product.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/optimize/alibi.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/optimize/autocast.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/optimize/recompute.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/optimize/swiglu.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/rounding.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/layer_inputs.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
    "qlora/lora.py": ("transformers", "peft", "trl", "datasets", "bitsandbytes", "qlora.integrations"),
}
FILES = sorted(path for package in ("qkernels", "qlora") for path in (ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, wherever in the file it does."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def forbidden_imports(path: Path) -> set[str]:
    relative = path.relative_to(ROOT).as_posix()
    rules = {name for prefix, names in FORBIDDEN.items() if relative.startswith(prefix) for name in names}
    return {name for name in imported_names(path) for rule in rules if name == rule or name.startswith(f"{rule}.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_room_imports_what_it_must_not(path):
    assert not forbidden_imports(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_says_which_room_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "a file starts with a docstring"


def test_no_error_is_swallowed():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}: bare except"
                names = ast.unparse(node.type)
                everything = "Exception" in names.replace("(", " ").replace(")", " ").replace(",", " ").split()
                raises_on = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                assert raises_on or not (everything or "BaseException" in names), f"{path}:{node.lineno}: {names}"


def test_rules_name_files_that_exist():
    assert all((ROOT / prefix).exists() for prefix in FORBIDDEN)


def test_import_touches_no_gpu_and_no_environment():
    code = (
        "import os, logging, torch; before = dict(os.environ), logging.root.handlers[:]\n"
        "import qkernels, qkernels.ops\n"
        "assert (dict(os.environ), logging.root.handlers[:]) == before\n"
        "assert not torch.cuda.is_initialized()\n"
        "import sys; assert 'transformers' not in sys.modules and 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_row_of_the_compatibility_table_names_tests_that_exist():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and "**" not in line][2:]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?`", row.rpartition(" | ")[2])
        assert named, row
        file = ""
        for found, function in named:
            file = found or file
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not function or f"def {function}(" in text, f"{file}::{function}"
