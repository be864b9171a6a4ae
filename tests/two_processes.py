"""What each of two processes does in test_distributed.py, started by torchrun: DDP and FSDP2.

Writes what it saw to a file of its own in the folder that is its first argument; the second is a model's checkpoint,
the third "cpu" (over gloo) or "cuda" (over NCCL, a GPU each).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from qlora import NF4Config, prepare_for_fsdp
from qlora.sharding import shards_integers

VOCABULARY = 96
STEPS = 4
FSDP_RUNS: dict[str, dict[str, Any]] = {
    "fsdp": {"efficient": False},
    "fsdp efficient": {"efficient": True, "quant_storage": torch.bfloat16},
    "fsdp bfloat16": {"efficient": True, "precision": "bf16", "quant_storage": torch.float16},
}


def batch(rows: slice = slice(None)) -> torch.Tensor:
    """Two texts, of which each process takes one."""
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))[rows]


def adapted(checkpoint: str, **config: Any) -> Any:
    quantization = NF4Config(**config)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, dtype=torch.float32)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(accelerator: Accelerator, model: Any, optimizer: Any, steps: int) -> list[float]:
    """The mean loss of both processes at each step."""
    losses = []
    ids = batch(slice(accelerator.process_index, accelerator.process_index + 1)).to(accelerator.device)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def new_accelerator(**options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    return Accelerator(cpu=sys.argv[3] == "cpu", **options)


def fsdp(efficient: bool, precision: str = "no") -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=efficient,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = new_accelerator(fsdp_plugin=plugin, mixed_precision=precision)
    if accelerator.device.type == "cpu":
        # accelerate takes this step for GPUs only; what follows is the same for processes on the CPU.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        if precision != "no":
            plugin.set_mixed_precision(precision)
    return accelerator


def ddp_run(checkpoint: str) -> dict[str, Any]:
    accelerator = new_accelerator()
    model = adapted(checkpoint)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    return {"losses": train(accelerator, model, optimizer, STEPS), "kind": type(model).__name__}


def fsdp_run(checkpoint: str, folder: Path, efficient: bool, precision: str = "no", **config: Any) -> dict[str, Any]:
    """Train, save in the middle, and go on from there with a model of its own."""
    accelerator = fsdp(efficient, precision)
    whole = adapted(checkpoint, **config)
    codes = sum(p.nbytes for p in whole.parameters() if type(p).__name__ == "Params4bit")
    model = prepare_for_fsdp(whole)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    result = {
        "codes": codes,
        "local": sum(p.to_local().nbytes for p in packed),
        "sharded": all(isinstance(p, DTensor) for p in packed),
        "losses": train(accelerator, model, optimizer, STEPS // 2),
    }
    accelerator.save_state(str(folder / "state"))
    result["losses"] += train(accelerator, model, optimizer, STEPS // 2)
    adapters = {key: value for key, value in accelerator.get_state_dict(model).items() if "lora_" in key}
    if accelerator.is_main_process:
        torch.save(adapters, folder / "adapters.pt")

    resumed = prepare_for_fsdp(adapted(checkpoint, **config))
    resumed, optimizer = accelerator.prepare(resumed, optimizer_of(resumed))
    accelerator._models, accelerator._optimizers = [resumed], [optimizer]  # the first pair is not to be restored
    accelerator.load_state(str(folder / "state"))
    return result | {"resumed": train(accelerator, resumed, optimizer, STEPS // 2)}


def main() -> None:
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    results = {"ddp": ddp_run(checkpoint)}
    for name, arguments in FSDP_RUNS.items() if shards_integers() else ():
        (folder / name).mkdir(exist_ok=True)
        results[name] = fsdp_run(checkpoint, folder / name, **arguments)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
