PYTHON ?= python3
VENV := .venv

.PHONY: venv demo test test-all lint docs clean

venv: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.10 to 3.12 is needed; name one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[cpu,torch,rtx,report,coco,dev]'
	touch $@

demo: venv
	$(VENV)/bin/mess-compile demo demo
	@echo 'to use mess-compile yourself: . $(VENV)/bin/activate'

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# A worker a core, each of which computes with one thread: two pools of threads on the same cores wait for each other.
# Bytecode is written, whatever the environment says: hundreds of processes would compile every module again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n auto --dist worksteal --durations=15

# With COMMIT=<hash> a fifth of the slow tests too, another one for other commits.
test: lint
	$(PYTEST) $(if $(COMMIT),-m '' --slow-fifth $(COMMIT))

test-all: lint
	$(PYTEST) -m ''

docs: venv
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(VENV)/bin/python tools/commands_page.py
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) demo site
