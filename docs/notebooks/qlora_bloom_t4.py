# %% [markdown]
# # QLoRA: training a large language model on a 16 GB GPU
#
# Bloom-7B1 has 7 billion weights: 28 GB in float32, 14 GB in 16 bits, too much to train on a GPU of 16 GB such as the
# T4 of a free Colab. In 4 bits it takes 5 GB, and LoRA trains 8 million new weights beside it.
#
# 1. what quantization does, on one number and on a curve;
# 2. Bloom-7B1 in 4 bits, and what it writes before training;
# 3. a data set of prompts, LoRA, training;
# 4. saving, reloading, and what it writes after training.
#
# Every step is the usual code for transformers, peft and TRL. It comes in two variants. `NF4Config` needs no
# bitsandbytes. `BitsAndBytesConfig` is the code as it is written for bitsandbytes; where both packages are installed,
# bitsandbytes runs on the kernels of this one.

# %% [markdown]
# ## Settings
#
# In Colab: choose a T4 runtime, upload the wheel that `pip wheel --no-deps .` makes of a checkout, and install it in a
# cell of its own: `!pip install qkernels_qlora-0.1.0-py3-none-any.whl`, with `bitsandbytes` for the second variant. The
# environment can name a smaller model and other data, as the test of this notebook does.

# %%
import os

VARIANT = os.environ.get("VARIANT", "NF4Config")  # or "BitsAndBytesConfig"
MODEL = os.environ.get("MODEL", "bigscience/bloom-7b1")
DATA = os.environ.get("DATA", "fka/awesome-chatgpt-prompts")  # or a CSV file with a column "prompt"
OUTPUT = os.environ.get("OUTPUT", "bloom-prompts")
EPOCHS = int(os.environ.get("EPOCHS", "5"))
NEW_TOKENS = int(os.environ.get("NEW_TOKENS", "50"))

# %% [markdown]
# ## Quantization of one number
#
# A number between -1 and 1 in `bits` bits: multiply by the largest integer of that size and round. Back: divide.


# %%
def quantize(value, bits=4):
    return round(value * (2 ** (bits - 1) - 1))


def unquantize(code, bits=4):
    return code / (2 ** (bits - 1) - 1)


for bits in (4, 8):
    code = quantize(0.622, bits)
    print(f"0.622 in {bits} bits: {code}, and back: {int(unquantize(code, bits) * 1e5) / 1e5:.5f}")

# %% [markdown]
# With 8 bits the number comes back to four digits, with 4 bits it is 8% off. The same for a whole curve:

# %%
import math

import matplotlib.pyplot as plt

angles = [-math.pi + 2 * math.pi * step / 199 for step in range(200)]
curve = [math.cos(angle) for angle in angles]
for bits, style in ((8, "-"), (4, "-")):
    plt.plot(angles, [unquantize(quantize(value, bits), bits) for value in curve], style, label=f"{bits} bits")
plt.plot(angles, curve, ":", color="black", label="cosine")
plt.legend()
plt.show()

# %% [markdown]
# Weights of a network are not spread evenly but nearly normally, most of them close to zero. NF4 therefore places its
# 16 values where the weights are, and gives every 64 weights a scale of their own. On normal weights its error is
# smaller than that of 15 evenly spaced values with the same scales:

# %%
import torch

torch.manual_seed(0)
weight = torch.randn(64, 4096)
blocks = weight.view(-1, 64)
scale = blocks.abs().amax(1, keepdim=True)
even = ((blocks / scale * 7).round() / 7 * scale).view_as(weight)

if VARIANT == "NF4Config":
    import qkernels as F
else:
    import bitsandbytes.functional as F
packed, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4")
nf4 = F.dequantize_4bit(packed, state)
error_nf4, error_even = ((value - weight).norm() / weight.norm() for value in (nf4, even))
print(f"relative error in 4 bits: NF4 {error_nf4:.4f}, evenly spaced {error_even:.4f}")

# %% [markdown]
# ## The model in 4 bits
#
# Double quantization keeps the scales in 8 bits too, which saves 0.37 bits a weight. A T4 computes in float16; GPUs of
# compute capability 8.0 and later in bfloat16. A CPU, for a test with a small model, in float32.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

cuda = torch.cuda.is_available()
native_bf16 = cuda and torch.cuda.get_device_capability() >= (8, 0)
dtype = torch.bfloat16 if native_bf16 else torch.float16 if cuda else torch.float32

if VARIANT == "NF4Config":
    import qlora

    config = qlora.NF4Config(quant_type="nf4", compress_statistics=True)
else:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=dtype, device_map="auto")
print(f"{sum(weight.nbytes for weight in model.parameters()) / 2**30:.2f} GiB of weights on {model.device}")

# %% [markdown]
# ## Before training
#
# The data set holds prompts of the form "I want you to act as ...". The model continues the beginning of one.

# %%
PROMPT = "I want you to act as a motivational coach. "


def continue_prompt(model):
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=1.5,  # small models repeat themselves
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


before = continue_prompt(model)
print(before)

# %% [markdown]
# ## The data set
#
# The first 50 prompts. TRL tokenizes them.

# %%
from datasets import load_dataset

csv = DATA.endswith(".csv")
data = load_dataset("csv", data_files=DATA, split="train") if csv else load_dataset(DATA, split="train")
# TRL takes "prompt" for the first half of a prompt-completion pair, so the column gets a name of its own.
data = data.select(range(50)).select_columns(["prompt"]).rename_column("prompt", "text")
print(data[0]["text"])

# %% [markdown]
# ## LoRA
#
# Beside each `query_key_value` layer two thin matrices of rank 16 are trained; the 4-bit weights stay as they are.

# %%
from peft import LoraConfig

lora = LoraConfig(
    r=16,
    lora_alpha=16,
    target_modules=["query_key_value"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)

# %% [markdown]
# ## Training
#
# `auto_find_batch_size` halves the batch until it fits. float16 needs loss scaling (`fp16=True`); with bitsandbytes TRL
# keeps the adapters in bfloat16, which a T4 emulates.

# %%
from trl import SFTConfig, SFTTrainer

half = cuda and dtype == torch.float16 and VARIANT == "NF4Config"
arguments = SFTConfig(
    output_dir=OUTPUT,
    dataset_text_field="text",
    max_length=512,
    auto_find_batch_size=True,
    learning_rate=2e-4,
    num_train_epochs=EPOCHS,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    fp16=half,
    bf16=cuda and not half,
    use_cpu=not cuda,
)
trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora)
trainer.model.print_trainable_parameters()
trainer.train()

# %% [markdown]
# ## Saving and reloading
#
# Only the adapter is saved, 30 MB; it names the base model, which is loaded with it.

# %%
trainer.model.save_pretrained(OUTPUT)
print(sorted(os.listdir(OUTPUT)))

# %%
import gc

from peft import AutoPeftModelForCausalLM

del model, trainer  # a second copy would not fit
gc.collect()
if cuda:
    torch.cuda.empty_cache()

tuned = AutoPeftModelForCausalLM.from_pretrained(OUTPUT, quantization_config=config, dtype=dtype, device_map="auto")

# %% [markdown]
# ## After training

# %%
after = continue_prompt(tuned)
print(f"before: {before}\n\nafter:  {after}")
