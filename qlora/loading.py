"""`load_pretrained_4bit`: a causal language model in 4 bits from a float, GGUF or 4-bit checkpoint, and ready to train.

Room: the door between a name and a model; whatever is wrong with the name or the files becomes one `UserError` (the
errors of other libraries in load_errors.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel

from qkernels.errors import UserError

from .checkpoint import is_local
from .integrations.transformers import NF4Config, quantize_model
from .integrations.transformers.bitsandbytes_files import BitsAndBytesNF4Config, is_4bit_of_bitsandbytes
from .integrations.transformers.config import METHOD, as_dtype, check_same_format
from .load_errors import one_error
from .precision import choose_precision, resolve_device

_NOT_HERE = {
    "load_in_4bit": "It is what this function does: leave it out.",
    "load_in_8bit": "Only 4 bits are supported.",
    "quantization_config": "Pass its fields here, or the configuration to AutoModelForCausalLM.from_pretrained.",
    "torch_dtype": "The argument is called dtype.",
    "output_loading_info": "Missing weights are an error here: leave it out.",
    "weights_only": "Pickled checkpoints are read without running the code in them (weights_only=True), always.",
}


def load_pretrained_4bit(
    name_or_path: str | os.PathLike[str],
    *,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    blocksize: int = 64,
    quant_storage: torch.dtype | str = torch.uint8,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    quantize_embeddings: bool = False,
    modules_to_not_convert: list[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model with its linear layers in 4 bits.

    A float checkpoint is quantized one tensor at a time on its way to the device, so neither the host nor the GPU ever
    holds the float model (but for GGUF, which is unpacked in host memory).  A checkpoint saved by this function's
    models is reloaded as it is.

    Args:
        name_or_path: folder of a checkpoint (safetensors, or pickled .bin files, which are read without running
            code), or the id of a model on the Hugging Face hub.
        quant_type, compress_statistics, blocksize, quant_storage, quantize_embeddings, modules_to_not_convert: as in
            `NF4Config`.
        dtype: float32, float16 or bfloat16, or their names: of the activations and of what stays float.  None asks
            `choose_precision(device)`.
        device: where the model goes; None takes CUDA if there is one, else the CPU.
        kwargs: for `AutoModelForCausalLM.from_pretrained`: `revision`, `token`, `attn_implementation`, `gguf_file`,
            `device_map` (instead of `device`), ...

    Returns:
        Model in eval mode; `save_pretrained` writes it in 4 bits.

    Raises:
        UserError: no such model, no network, damaged or incomplete files, a checkpoint quantized otherwise, NaN or
            Inf in a weight, or a wrong argument.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise UserError(
            "name_or_path",
            expected="a folder, or the id of a model on the Hugging Face hub",
            got=repr(name_or_path),
            remedy="Pass a str or a pathlib.Path.",
        )
    _refuse_other_names(kwargs, device)
    target = resolve_device(device)
    float_dtype = choose_precision(target).dtype if dtype is None else as_dtype("dtype", dtype)
    config = NF4Config(
        quant_type=quant_type,
        compress_statistics=compress_statistics,
        blocksize=blocksize,
        quant_storage=quant_storage,
        quantize_embeddings=quantize_embeddings,
        modules_to_not_convert=modules_to_not_convert,
    )
    name = (
        local_folder(
            name_or_path, wanted=kwargs.get("gguf_file") or "config.json", subfolder=kwargs.get("subfolder", "")
        )
        if is_local(name_or_path)
        else os.fspath(name_or_path)
    )
    with one_error(name, kwargs):
        if kwargs.get("gguf_file") is not None:
            return quantize_model(_load_gguf(name, float_dtype, kwargs), config, target)
        stored = _stored_config(name, kwargs)
        arguments = {"dtype": float_dtype, "weights_only": True, "device_map": {"": target}, **kwargs}
        if stored is not None:
            check_same_format(repr(name), stored, config)
        if stored is None or isinstance(stored, BitsAndBytesNF4Config):
            arguments["quantization_config"] = config  # not None else: that would erase the stored one
        return _load_whole(name, arguments)


def prepare_model_for_training(model: PreTrainedModel, gradient_checkpointing: bool = True) -> PreTrainedModel:
    """Freeze a base model and set it up for adapters; call it before `get_peft_model`.

    Replaces peft's `prepare_model_for_kbit_training`, which casts the embedding to float32 (for Bloom-7B1 1.9 GiB
    more) and leaves gradient checkpointing off for a quantization method it does not know.  Nothing is cast here.

    Args:
        model: base model; changed in place.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.

    Returns:
        `model`.

    Raises:
        UserError: no model of transformers, one that carries adapters already, or an architecture without gradient
            checkpointing.
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            "model",
            expected="a base model without adapters",
            got=f"a {type(model).__name__} with adapters, which would be frozen too",
            remedy="Call prepare_model_for_training before get_peft_model.",
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            "model",
            expected="a model of transformers",
            got=f"a {type(model).__name__}",
            remedy="For another module, freeze its parameters: module.requires_grad_(False).",
        )
    model.requires_grad_(False)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                "gradient_checkpointing",
                expected="False for this architecture",
                got="True",
                remedy=f"{type(model).__name__} cannot recompute activations.",
            )
        # Also makes the embedding's output require gradients.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _refuse_other_names(kwargs: dict[str, Any], device: Any) -> None:
    for name, remedy in _NOT_HERE.items():
        if name in kwargs:
            raise UserError(
                name, expected="an argument of load_pretrained_4bit", got=f"{name}={kwargs[name]!r}", remedy=remedy
            )
    for other in ("device", "gguf_file"):
        if kwargs.get("device_map") is not None and (device if other == "device" else kwargs.get(other)) is not None:
            raise UserError(
                "device_map", expected=f"device_map or {other}", got="both", remedy="Leave one of the two out."
            )


def local_folder(name_or_path: str | os.PathLike[str], *, wanted: str = "config.json", subfolder: str = "") -> str:
    """The folder of a checkpoint on this machine, expanded.

    Args:
        name_or_path: a path; `checkpoint.is_local` tells it from a hub's id.
        wanted: the file that makes it a checkpoint, below `subfolder`.

    Raises:
        UserError: no such folder, or not a checkpoint's.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        raise UserError(
            "name_or_path",
            expected="a folder with a checkpoint, or the id of a model on the Hugging Face hub",
            got=f"{os.fspath(name_or_path)!r}, which is " + ("a file" if folder.exists() else "no folder here"),
            remedy="Check the path; a hub id has the form 'organization/model'.",
        )
    if (folder / subfolder / wanted).is_file():
        return str(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    raise UserError(
        "name_or_path",
        expected="the folder of a checkpoint",
        got=f"{str(folder)!r}, which has no {wanted}" + (" but a LoRA adapter" if is_adapter else ""),
        remedy="Load its base model, then the adapter with peft's PeftModel.from_pretrained."
        if is_adapter
        else "Give the folder that save_pretrained wrote the model to.",
    )


def _load_gguf(name: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The float model that a GGUF file holds, in host memory."""
    arguments = {
        **kwargs,
        "dtype": dtype,
        "device_map": {"": "cpu"},
        "quantization_config": GgufConfig(dequantize=True),
    }
    return _load_whole(name, arguments)


def _load_whole(name: str, arguments: dict[str, Any]) -> PreTrainedModel:
    """`from_pretrained`, but a weight that is missing is an error: transformers would warn and make a random one.

    A tied weight that is stored under its other name counts as present.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        gguf = arguments.get("gguf_file")
        raise UserError(
            "gguf_file" if gguf else "name_or_path",
            expected=f"every weight of {type(model).__name__}",
            got=f"{gguf or name!r} without {', '.join(missing[:3])}{others}",
            remedy="The checkpoint is incomplete, or of another architecture than it says.",
        )
    return model


def _stored_config(name: str, kwargs: dict[str, Any]) -> NF4Config | None:
    """How the checkpoint is quantized; None for a float one."""
    given = kwargs.get("config")
    fields = given.to_dict() if given is not None else PreTrainedConfig.get_config_dict(name, **kwargs)[0]
    stored = fields.get("quantization_config")
    if stored is None:
        return None
    if is_4bit_of_bitsandbytes(stored):
        return BitsAndBytesNF4Config(stored)
    if stored.get("quant_method") != METHOD:
        raise UserError(
            "name_or_path",
            expected="a float checkpoint, or a 4-bit one saved with NF4Config or by bitsandbytes",
            got=f"{name!r}, which is quantized by {stored.get('quant_method')!r}",
            remedy="Load the float checkpoint that it was made from.",
        )
    return NF4Config.from_dict(stored)
