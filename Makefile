# Needs Python 3.11 or later and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: help demo test lint format slow bench bench-applications bench-distillation bench-fashion bench-hinton \
	bench-hinton-without-3 bench-packing bench-pruning bench-quantization examples docs lock clean

help:
	@echo "make demo      train LeNet-5 on MNIST digits and compress it (a few minutes)"
	@echo "make test      the tests (under 20 minutes on two cores)"
	@echo "make lint      ruff and mypy"
	@echo "make slow      the long tests"
	@echo "make examples  the examples"
	@echo "make bench     the benchmarks that need no data; see the Makefile for the rest"
	@echo "make docs      build the documentation into site/"

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(READY)
	$(BIN)/dwindle demo --out demo-out --force

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

examples: $(READY)
	$(BIN)/python examples/prune_mnist.py
	$(BIN)/python examples/distill_mnist.py
	$(BIN)/python examples/quantize_mnist.py
	$(BIN)/python examples/cluster_mnist.py
	$(BIN)/python examples/micro_mnist.py

# TFMOT names the Python of an environment with tensorflow-cpu==2.19.*, tf-keras==2.19.* and
# tensorflow-model-optimization==0.8.*; MNIST and FASHION are mnist.npz and fashion_mnist.npz of keras.datasets.
bench: $(READY)
	$(BIN)/python benchmarks/step_time.py $(if $(TFMOT),--tfmot $(TFMOT))
	$(BIN)/python benchmarks/large_model.py
	$(BIN)/python benchmarks/schemes.py

bench-applications: $(READY)
	$(BIN)/python benchmarks/applications.py

bench-distillation: $(READY)
	$(BIN)/python benchmarks/distillation_steps.py

# Hinton's table (25 minutes on two busy cores) and the transfer set without the 3 (16); HINTON is where both keep the
# teacher, so that the second one to run does not train it again.
HINTON ?= build/hinton
bench-hinton: $(READY)
	$(BIN)/python benchmarks/distillation_mnist.py --data $(MNIST) --folder $(HINTON) --rows alone distilled

bench-hinton-without-3: $(READY)
	$(BIN)/python benchmarks/distillation_mnist.py --data $(MNIST) --folder $(HINTON) --rows without-3

# One seed; SEEDS="0 1 2" for the whole table.
SEEDS ?= 0
bench-fashion: $(READY)
	$(BIN)/python benchmarks/distillation_fashion.py --data $(FASHION) --seeds $(SEEDS)

# zstd and brotli take part where their packages are: pip install zstandard brotli.
bench-packing: $(READY)
	$(BIN)/python benchmarks/packing.py

.PHONY: bench-guide bench-micro bench-smallest-files bench-smallest-network

bench-guide: $(READY)
	$(BIN)/python benchmarks/guide_model.py --data $(MNIST)

bench-micro: $(READY)
	$(BIN)/python benchmarks/micro.py

# LeNet-300-100, from the beginning; for LeNet-5 see docs/benchmarks.md.
bench-smallest-files: $(READY)
	$(BIN)/python benchmarks/pruning_mnist.py --data $(MNIST) --network mlp --out bench-out/pruned
	$(BIN)/python benchmarks/smallest_files.py --data $(MNIST) --pruned bench-out/pruned

bench-smallest-network: $(READY)
	$(BIN)/python benchmarks/smallest_network.py --data $(MNIST)

.PHONY: bench-search bench-search-residual bench-search-usual bench-search-infeasible bench-search-workers bench-by-hand

# 20 and 40 minutes on two cores; usual and infeasible goals take 5 each, one and two workers 10.
bench-search: $(READY)
	$(BIN)/python benchmarks/search.py lenet --data $(MNIST)

bench-search-residual: $(READY)
	$(BIN)/python benchmarks/search.py residual --data $(FASHION)

bench-search-usual: $(READY)
	$(BIN)/python benchmarks/search.py usual --data $(MNIST)

bench-search-infeasible: $(READY)
	$(BIN)/python benchmarks/search.py infeasible --data $(MNIST)

# What one would try by hand on the residual network; FOUND is the file of bench-search-residual.
bench-by-hand: $(READY)
	$(BIN)/python benchmarks/by_hand.py --data $(FASHION) $(if $(TFMOT),--tfmot $(TFMOT)) $(if $(FOUND),--found $(FOUND))

bench-search-workers: $(READY)
	$(BIN)/python benchmarks/search.py workers --data $(MNIST)

bench-pruning: $(READY)
	$(BIN)/python benchmarks/pruning_mnist.py --data $(MNIST)

bench-quantization: $(READY)
	$(BIN)/python benchmarks/quantization_accuracy.py --data $(MNIST) --data $(FASHION) $(if $(TFMOT),--tfmot $(TFMOT))

docs: $(READY)
	$(BIN)/mkdocs build --strict

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra micro --extra onnx --extra ray --extra dev --extra docs --universal --python-version 3.11 --prerelease if-necessary --generate-hashes --no-header --output-file requirements.lock

clean:
	rm -rf $(VENV) site demo-out dwindle-out bench-out .pytest_cache .mypy_cache .ruff_cache
