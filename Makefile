# Two commands: `make demo` and `make test`. Both make the environment in .venv on their first run.
PYTHON ?= python3
BIN := .venv/bin
QUICK ?=
OUT ?= crow-demo

.PHONY: demo test slow benchmark audit lock clean

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

# torch has no hash there: its builds differ from index to index
.venv/installed: pyproject.toml constraints.txt requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,dev]'
	touch $@

# The hashes of all files of the versions in constraints.txt, on every platform
lock: .venv/tools
	.venv/tools/bin/uv pip compile --quiet --no-deps --no-annotate --generate-hashes --no-emit-package torch \
		--output-file requirements.txt constraints.txt

# A package that can't be looked up fails it too (--strict): unasked, pip-audit takes that for harmless
audit: .venv/tools
	@said=$$(.venv/tools/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off \
		--requirement constraints.txt 2>&1) && echo "$$said" || { case "$$said" in \
		*"known vulnerabilit"*) echo "$$said" ;; \
		*) echo "audit: the versions could not be looked up: run it where PyPI's vulnerability database can be reached" \
			"($$(echo "$$said" | tail -n 1))" ;; \
	esac; exit 1; }

.venv/tools:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet uv pip-audit

clean:
	rm -rf .venv crow-demo
