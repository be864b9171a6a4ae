"""`NF4Quantizer`: what `from_pretrained` and `save_pretrained` call; and whole models to 4 bits and back in memory.

Room: transformers' quantizer hooks.  `from_pretrained` builds the model on the meta device, has its linear layers
swapped for 4-bit ones here, and then hands over each weight (see conversion.py).  `is_loaded_in_4bit` stays unset: it
makes transformers import bitsandbytes and TRL cast the adapters to bfloat16, which a T4 cannot train.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qkernels.errors import UserError

from ...dequantize import float_layer
from ...embedding4bit import Embedding4bit
from ...linear4bit import Linear4bit, Params4bit
from ...module4bit import Module4bit
from ...output4bit import OutputLayer4bit
from ..trl import join_trl
from .config import METHOD, NF4Config, as_dtype
from .conversion import Quantize, converters, missing_weight, without_ours, wrong_shape


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Loads and saves models for `NF4Config`; made by transformers, not by users.

    Attributes:
        dtype: of the activations and of what stays float.
        refused: errors by the name of the weight, raised once loading is over.
        head: the float output layer, where it is to be quantized.
    """

    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtype: torch.dtype | None = None
        self.refused: dict[str, UserError] = {}
        self._not_converted: list[str] = []
        self._embedding: nn.Module | None = None
        self.head: nn.Module | None = None
        self._shapes: dict[str, torch.Size] = {}

    # Before loading.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places:
            raise UserError(
                "device_map",
                expected="every module on a GPU or the CPU",
                got=f"modules on {', '.join(sorted(places))}",
                remedy="4-bit layers can be offloaded to host memory ('cpu') only.",
            )

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None:
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = as_dtype("dtype", dtype)
        return dtype

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        # A float weight stands beside its codes while it is being quantized.
        return {place: limit * 0.9 for place, limit in max_memory.items()}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _refuse_distributed(model.config)
        for name, float_module in self.find_layers(model).items():
            layer = self.new_layer(float_module, "meta")
            if self.pre_quantized and layer.quant_storage.is_floating_point:
                # transformers 5.17 casts a stored float tensor to the dtype of the parameter it is meant for.
                layer.weight.data = layer.weight.data.to(layer.quant_storage)
            model.set_submodule(name, layer)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def find_layers(self, model: PreTrainedModel) -> dict[str, nn.Linear | nn.Embedding]:
        """The float layers that the configuration means, by name; the embedding before the output layer.

        Raises:
            UserError: there are none, a name in `modules_to_not_convert` is unknown, or the architecture cannot do.
        """
        _refuse_sliced_layers(model.config)
        config = self.quantization_config
        wanted = config.modules_to_not_convert
        keep_in_fp32 = list(model._keep_in_fp32_modules or ())
        self._not_converted = self.get_modules_to_not_convert(model, wanted, keep_in_fp32, config.skips_are_added)
        if config.skips_are_added:  # bitsandbytes' checkpoints name modules of other architectures too
            _refuse_unknown_names(model, wanted or [])
        if config.quantize_embeddings:
            self._embedding, self.head = embeddings_of(model, config.blocksize)
            ends = {name for name, module in model.named_modules() if module in (self._embedding, self.head)}
            self._not_converted = [name for name in self._not_converted if name not in ends - set(wanted or [])]
        layers = self._convertible(model)
        if not layers:
            raise UserError(
                "model",
                expected="torch.nn.Linear layers besides the output layer",
                got=f"none in {type(model).__name__}",
                remedy="This architecture cannot be quantized with NF4Config: load it without.",
            )
        return layers

    def _convertible(self, model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
        # Exactly nn.Linear: a subclass has a forward of its own.
        is_named = _is_named if self.quantization_config.skips_are_added else _is_named_itself
        found: dict[str, nn.Linear | nn.Embedding] = {
            name: module
            for name, module in model.named_modules()
            if (type(module) is nn.Linear or (type(module) is nn.Embedding and module is self._embedding))
            and not is_named(name, self._not_converted)
        }
        ends = [name for name, module in found.items() if module is self._embedding or module is self.head]
        if len(ends) == 1 and _is_tied(self._embedding, self.head):  # what is shared is kept float for both
            del found[ends[0]]
        return found

    def new_layer(self, float_module: nn.Linear | nn.Embedding, device: torch.device | str | int) -> Module4bit:
        """What stands in the place of a layer; on "meta" it waits for its weight."""
        config = self.quantization_config
        how: dict[str, Any] = {
            "quant_type": config.quant_type,
            "blocksize": config.blocksize,
            "compress_statistics": config.compress_statistics,
            "quant_storage": config.quant_storage,
            "device": device,
        }
        if isinstance(float_module, nn.Embedding):
            return Embedding4bit.from_embedding(float_module, **how)
        kind = OutputLayer4bit if float_module is self.head else Linear4bit
        return kind.from_linear(float_module, compute_dtype=config.compute_dtype, **how)

    # While loading.

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Module4bit) and name == "weight"

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes a weight, scales included, for device_map="auto"."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        scale_bytes = 1 + 4 / 256 if self.quantization_config.compress_statistics else 4
        return 0.5 + scale_bytes / self.quantization_config.blocksize

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self.refused)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return converters(self) if self.pre_quantized else []

    # After loading, and saving.

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._weight_conversions = without_ours(getattr(model, "_weight_conversions", None))
        for name, module in model.named_modules():
            if isinstance(module, Module4bit) and not getattr(module.weight, "bnb_quantized", False):
                self.refused.setdefault(f"{name}.weight", missing_weight(f"{name}.weight"))
        for name, parameter in model.named_parameters():
            # transformers 5.17 checks no shapes at all where there is a quantizer.
            shape = self._shapes.get(name, parameter.shape)
            if not isinstance(parameter, Params4bit) and parameter.shape != shape:
                self.refused.setdefault(name, wrong_shape(name, parameter.shape, shape))
        if self.refused:
            name, error = next(iter(self.refused.items()))
            others = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
            raise UserError(name + others, expected=error.expected, got=error.got, remedy=error.remedy)
        head = model.get_output_embeddings()
        if isinstance(head, OutputLayer4bit):
            head.is_tied = _is_tied(model.get_input_embeddings(), head)
            join_trl(required=True)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called before saving.  Layers made float since loading (a merged adapter) are recorded as such."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            made_float = set(self._convertible(model))
            if made_float:
                config = self.quantization_config
                others = config.modules_to_not_convert if config.skips_are_added else self._not_converted
                config.modules_to_not_convert = sorted(made_float.union(others or ()))
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dequantize_model(model, None if dtype is None else as_dtype("dtype", dtype))
        return model


def quantize_model(
    model: PreTrainedModel, config: NF4Config, device: torch.device | str | int = "cpu"
) -> PreTrainedModel:
    """Quantize a float model that is in memory, as `from_pretrained` would have done, one layer at a time.

    Args:
        model: float32, float16 or bfloat16 model on any device; changed in place.
        config: how.
        device: where the quantized model goes.

    Returns:
        `model`, which `save_pretrained` now writes in 4 bits.

    Raises:
        UserError: as for `from_pretrained`: NaN or Inf in a weight, nothing to quantize, unknown names.
    """
    quantizer = NF4Quantizer(config, pre_quantized=False)
    quantizer.update_dtype(model.dtype)
    tied = _is_tied(model.get_input_embeddings(), model.get_output_embeddings())
    layers = quantizer.find_layers(model)
    for name in list(layers):
        module = layers.pop(name)  # popped, so that each float weight is freed in turn
        waits = tied and module is quantizer.head
        try:
            layer = quantizer.new_layer(module, "meta" if waits else device)
        except UserError as error:
            raise UserError(f"{name}.weight", expected=error.expected, got=error.got, remedy=error.remedy) from error
        del module
        model.set_submodule(name, layer)
    head: Any = model.get_output_embeddings()
    if tied and isinstance(head, OutputLayer4bit):
        head.weight = model.get_input_embeddings().weight  # type: ignore[assignment]
    marked: Any = model.to(torch.device(device))  # type: ignore[arg-type]
    marked.is_quantized, marked.quantization_method, marked.hf_quantizer = True, METHOD, quantizer
    return quantizer.postprocess_model(marked)


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put float layers in the place of every 4-bit layer of a model, and take the mark of quantization off it.

    After `merge_and_unload` this leaves an ordinary model that any library loads.

    Args:
        model: any module; changed in place.
        dtype: float32, float16 or bfloat16 of the new weights; None is what each weight was before quantization.

    Returns:
        `model`.
    """
    tied = False
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear4bit | Embedding4bit):
            continue
        new = float_layer(layer, dtype)
        hook = getattr(layer, "_hf_hook", None)  # accelerate's, on models spread over several devices
        if hook is not None:
            remove_hook_from_module(layer)
            add_hook_to_module(new, hook)
        model.set_submodule(name, new)
        if isinstance(layer, OutputLayer4bit) and layer.is_tied:
            tied = True
    for module in model.modules():
        if tied and isinstance(module, PreTrainedModel):
            module.tie_weights()
        quantizer = vars(module).get("hf_quantizer")
        if isinstance(quantizer, NF4Quantizer):
            quantizer.remove_quantization_config(module)
    return model


def embeddings_of(model: PreTrainedModel, blocksize: int) -> tuple[nn.Module, nn.Module]:
    """The input embedding and the output layer of a float model.

    Raises:
        UserError: they are not plain layers, or their rows are no whole quantization blocks.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise UserError(
            "quantize_embeddings",
            expected="False for this architecture, whose embedding or output layer is none of torch.nn's",
            got=f"True for {type(embedding).__name__} and {type(head).__name__} of {type(model).__name__}",
            remedy="Leave it out: only the layers between are quantized then.",
        )
    if embedding.embedding_dim % blocksize or head.in_features % blocksize:
        raise UserError(
            "quantize_embeddings",
            expected=f"rows of whole quantization blocks, multiples of {blocksize}",
            got=f"rows of {embedding.embedding_dim}",
            remedy="Choose a smaller blocksize, or leave quantize_embeddings out.",
        )
    return embedding, head


def _is_tied(embedding: Any, head: Any) -> bool:
    return embedding is not None and head is not None and embedding.weight is head.weight


def _refuse_distributed(config: Any) -> None:
    if getattr(config, "distributed_config", None) is not None:
        raise UserError(
            "distributed_config",
            expected="none for a model with 4-bit layers",
            got="one (or tp_plan, tp_size)",
            remedy="transformers' tensor-parallel plans slice float weights, and packed codes cannot be sliced alike. "
            "Shard with FSDP2 through accelerate (qlora.prepare_for_fsdp), or spread layers by device_map.",
        )


def _refuse_sliced_layers(config: Any) -> None:
    if getattr(config, "pretraining_tp", 1) > 1 and getattr(config, "slow_but_exact", False):
        raise UserError(
            "slow_but_exact",
            expected="False for a model with 4-bit layers",
            got=f"True with pretraining_tp={config.pretraining_tp}, which multiplies by slices of the weights",
            remedy="Pass slow_but_exact=False to from_pretrained; the results differ by rounding only.",
        )


def _is_named_itself(name: str, patterns: list[str]) -> bool:
    return not should_convert_module(name, patterns)


def _is_named(name: str, patterns: list[str]) -> bool:
    """Whether a module, or one that it is part of, is named.  transformers' own rule alone would let "mlp" match
    "model.layers.0.mlp" and still convert "model.layers.0.mlp.up_proj"."""
    parts = name.split(".")
    return any(_is_named_itself(".".join(parts[: end + 1]), patterns) for end in range(len(parts)))


def _refuse_unknown_names(model: nn.Module, wanted: list[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in wanted:
        if all(should_convert_module(name, [pattern]) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                "modules_to_not_convert",
                expected="names of modules of the model",
                got=repr(pattern),
                remedy=f"Among them are: {', '.join(leaf for leaf in leaves if not leaf.isdigit())}.",
            )
