# Two commands matter: `make demo` (what fits this machine, planned and measured) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test lint fresh docs real learn clean

demo: $(VENV)/.run
	$(BIN)/qwenfit plan
	$(BIN)/qwenfit bench demo --record measurements/local

# A file's tests stay in one process; as many processes as cores, at most 4 for the memory's sake. Those that take the
# time of something come after the others, by themselves (5: none is among the TESTS asked for).
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not timing" $(TESTS)
	$(BIN)/python -m pytest -m timing $(TESTS) || [ $$? -eq 5 ]

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fresh: $(VENV)/.test
	$(BIN)/python -m qwenfit.guide.accuracy --check docs/accuracy.md
	$(BIN)/python -m qwenfit.bench.guide_page --check docs/measured.md

docs: $(VENV)/.test
	$(BIN)/python -m qwenfit.guide.accuracy docs/accuracy.md
	$(BIN)/python -m qwenfit.bench.guide_page docs/measured.md

# The real model that tests marked `real` use, fetched once (491 MB).
real:
	bash tests/get-real-qwen.sh

# Thirty invented facts, LoRA on the CPU: none known before, at least 27 after. Ten quiet minutes on two cores.
learn: $(VENV)/.test
	$(BIN)/python -m tests.real.learn_facts "$$(bash tests/get-real-qwen.sh)" --out learned

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[run]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.run
	DS_BUILD_OPS=0 $(PIP) install -c constraints.txt -e '.[run,gguf,hub,modelscope,tune,deepspeed,test]'
	$(PIP) install -c constraints.txt --no-deps dashscope
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
