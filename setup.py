"""Packaging of the two packages, `qkernels` and `qlora`, and of the benchmarks' extras."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

DEMO = ["gguf>=0.17"]
BENCH = ["bitsandbytes==0.50.2; sys_platform == 'linux'", "pytest>=8", "pytest-benchmark>=5", "jinja2>=3"]
PEERS = ["torchao>=0.17", "gemlite>=0.6"]  # further rivals of `benchmarks.run --all-rivals`
DOCS = ["mkdocs>=1.6"]
NOTEBOOK = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]
TOOLS = ["ruff>=0.14", "mypy>=1.18", "pytest-xdist>=3.6", "types-PyYAML", "setuptools>=77", "tensorboardX>=2.6"]
DEV = [*BENCH, *TOOLS, *NOTEBOOK, *DOCS]

setup(
    name="qkernels-qlora",
    version=VERSION,
    description="NF4 quantization in own Triton kernels, and QLoRA fine-tuning on top of them",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    py_modules=["qlora_command"],
    packages=find_packages(include=["qkernels", "qkernels.*", "qlora", "qlora.*"]),
    package_data={"qkernels": ["py.typed"], "qlora": ["py.typed", "assets/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=1.26",
        "scipy>=1.11",
        "transformers>=5.17,<5.25",
        "peft>=0.20",
        "datasets>=4.0",
        "accelerate>=1.10",
        "trl>=1.0",
        "safetensors>=0.5",
        "PyYAML>=6",
        "matplotlib>=3.8",
        "packaging>=22",
        "psutil>=5",
    ],
    extras_require={"demo": DEMO, "bench": BENCH, "peers": PEERS, "dev": DEV, "docs": DOCS},
    entry_points={
        "console_scripts": ["qlora=qlora_command:main"],
        # An installed bitsandbytes calls it when it is imported; QKERNELS_BITSANDBYTES=0 leaves that library alone.
        "bitsandbytes.backends": ["qkernels=qkernels.bitsandbytes_backend:register"],
    },
)
