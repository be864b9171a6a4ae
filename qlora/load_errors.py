"""What transformers, safetensors and pickle raise for a model that cannot be loaded, as one `UserError`.

Room: messages only.  transformers raises plain ValueErrors and OSErrors for wrong names, files and arguments alike, so
what an error is about is told from its class and from words in its text.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from qkernels.errors import UserError

from .checkpoint import is_local

_DAMAGED = (SafetensorError, pickle.UnpicklingError, struct.error, EOFError, json.JSONDecodeError)
_ABOUT_FILES = ("PytorchStreamReader", "ignore_mismatched_sizes")
_ABOUT_ARGUMENTS = ("attn_implementation", "device_map")
_ABOUT_CONFIG = ("model type", "model_type", "configuration class")


@contextmanager
def one_error(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of the `with` block that the user can mend into a `UserError`; others pass through.

    Args:
        name: folder or hub id that is being loaded.
        arguments: those of `from_pretrained` that the user gave.
    """
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGED, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _ABOUT_FILES):
            raise  # out of memory, CUDA, ...
        raise _unreadable(name, error) from error
    except (OSError, ImportError) as error:
        raise _not_found(name, arguments, error) from error
    except (ValueError, StrictDataclassError) as error:
        raise _unsuitable(name, arguments, error) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(
            "kwargs",
            expected="arguments of AutoModelForCausalLM.from_pretrained",
            got=str(error),
            remedy="Check the spelling.",
        ) from error


def _unreadable(name: str, error: Exception) -> UserError:
    expected = "a checkpoint that can be read"
    remedy = "A file is damaged, incomplete, or a pickle with code in it, which is not run: get it as safetensors."
    if "ignore_mismatched_sizes" in str(error):
        expected, remedy = "weights of the sizes in config.json", "The weights are of another model."
    return UserError("name_or_path", expected=expected, got=f"{name!r}: {_text(error)}", remedy=remedy)


def _not_found(name: str, arguments: Mapping[str, Any], error: OSError | ImportError) -> UserError:
    expected = "a causal language model on this machine or on the Hugging Face hub"
    if isinstance(error, ImportError):
        remedy = "Install the package it names."
    elif is_local(name):
        expected = "a folder with all files of a checkpoint"
        choices = "".join(
            f", or leave {choice} out" for choice in ("variant", "use_safetensors") if choice in arguments
        )
        remedy = f"A file is missing, damaged or may not be read: copy the folder again, whole{choices}."
    elif "connect" in str(error):
        remedy = (
            "The hub cannot be reached and the model is not in its cache: go online, or give a checkpoint's folder."
        )
    else:
        remedy = "Check the name; a private or gated model needs `hf auth login`."
    return UserError("name_or_path", expected=expected, got=f"{name!r}: {_text(error)}", remedy=remedy)


def _unsuitable(name: str, arguments: Mapping[str, Any], error: Exception) -> UserError:
    text = _text(error)
    named = [argument for argument in _ABOUT_ARGUMENTS if argument in arguments and argument in text]
    if named or arguments.get("gguf_file"):
        argument = named[0] if named else "gguf_file"
        return UserError(
            argument,
            expected="a value that transformers takes for this model",
            got=f"{arguments[argument]!r}: {text}",
            remedy="Give another one, or leave it out.",
        )
    if isinstance(error, StrictDataclassError) or any(words in text for words in _ABOUT_CONFIG):
        return UserError(
            f"config.json of {name!r}",
            expected="the configuration of a causal language model (Bloom, Llama, ...) that transformers knows",
            got=text,
            remedy="Choose another model, or update transformers if this one is newer.",
        )
    return UserError(
        "name_or_path",
        expected="a causal language model that transformers can load",
        got=f"{name!r}: {text}",
        remedy="Check the files of the model, and the arguments.",
    )


def _text(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "torch.load(weights_only=True) refuses it"  # torch's own text advises to run the code
    if isinstance(error, json.JSONDecodeError):
        return f"a JSON file in it is not valid: {error}"
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    return str(error).strip().partition("\n")[0]
