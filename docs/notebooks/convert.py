"""Make `qlora_bloom_t4.ipynb` from `qlora_bloom_t4.py`, whose cells begin with `# %%` or `# %% [markdown]`.

Run it after each change of the script: python docs/notebooks/convert.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("qlora_bloom_t4.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def notebook(script: str) -> dict[str, Any]:
    """The notebook, without outputs, that a script stands for."""
    cells = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
        if "[markdown]" in head:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            cell = {"cell_type": "markdown", "metadata": {}}
        cells.append(cell | {"id": f"cell-{len(cells)}", "source": body.splitlines(keepends=True)})
    metadata = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}, "language_info": {"name": "python"}}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": metadata | {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    text = json.dumps(notebook(SCRIPT.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")
