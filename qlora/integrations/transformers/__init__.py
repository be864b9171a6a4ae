"""4-bit models in transformers' `from_pretrained` and `save_pretrained`, without bitsandbytes.

Room: the only folder that imports transformers' quantizer machinery (5.17 to 5.24).  Importing it, or `qlora`,
registers the method "qkernels_nf4"; without that import transformers takes such a checkpoint for a float one.
`config.py` is what the user writes, `quantizer.py` what transformers calls, `conversion.py` what happens to one weight,
`bitsandbytes_files.py` the same for what bitsandbytes wrote.
"""

from .bitsandbytes_files import as_bitsandbytes
from .config import NF4Config
from .quantizer import dequantize_model, quantize_model

__all__ = ["NF4Config", "as_bitsandbytes", "dequantize_model", "quantize_model"]
