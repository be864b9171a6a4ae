"""4-bit models and QLoRA training on top of `qkernels`.

    import qlora                                          # registers NF4 with transformers and peft
    model = qlora.load_pretrained_4bit("bigscience/bloom-7b1")

Importing it is what makes transformers know `NF4Config` and checkpoints saved with it (an unknown method is loaded as
if it were not quantized, with a warning only), and peft's LoRA know `Linear4bit`.
"""

from qkernels.errors import UserError

from .calibration import CalibrationReport, calibrate_from_float
from .embedding4bit import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from .integrations import peft as _peft  # noqa: F401  (registers)
from .integrations.peft_init import InitReport, initialize_from_float
from .integrations.transformers import NF4Config, as_bitsandbytes, dequantize_model, quantize_model
from .linear4bit import Linear4bit, LinearFP4, LinearNF4
from .loading import load_pretrained_4bit, prepare_model_for_training
from .lora import LoRALinear, apply_lora
from .merging import MergeReport, merge_adapter
from .optimize import optimize_model
from .params4bit import Params4bit
from .precision import PrecisionPolicy, choose_precision
from .sharding import prepare_for_fsdp
from .usage import VERSION

__version__ = VERSION

__all__ = [
    "CalibrationReport",
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "InitReport",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "LoRALinear",
    "MergeReport",
    "NF4Config",
    "Params4bit",
    "PrecisionPolicy",
    "UserError",
    "apply_lora",
    "as_bitsandbytes",
    "calibrate_from_float",
    "choose_precision",
    "dequantize_model",
    "initialize_from_float",
    "load_pretrained_4bit",
    "merge_adapter",
    "optimize_model",
    "prepare_for_fsdp",
    "prepare_model_for_training",
    "quantize_model",
]
