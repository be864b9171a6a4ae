"""Measurements beside other libraries.  Nothing imports this package; run it from the repository's root.

python -m benchmarks.bloom7b1 --help
"""

import os

# Before bitsandbytes is imported: the rival runs on its own kernels, not on ours.
os.environ["QKERNELS_BITSANDBYTES"] = "0"
