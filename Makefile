# Every target works alone, from an empty clone, with nothing but Python 3.11: the environment is made first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TOWER ?= vit
DIGITS := demo-output/clip-digits-$(TOWER)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo app test test-all check format docs parity cards bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/	/' | expand -t 12

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no python3.11 found; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, made again when the pins change.
$(VENV)/.demo-installed $(VENV)/.app-installed $(VENV)/.dev-installed $(VENV)/.bench-installed $(VENV)/.docs-installed: $(VENV)/.%-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the pinned versions into $(VENV) (a minute or two) ..."
	$(INSTALL) --editable ".[$*]"
	@# open_clip asks for torchvision, which its model class does not need and nothing here may depend on.
	if test "$*" = dev; then $(INSTALL) --no-deps open_clip_torch; fi
	@touch $@

demo: $(VENV)/.demo-installed  ## train a small CLIP on digits and look at it (TOWER=vit or resnet; 3 to 5 minutes)
	$(BIN)/python -m demo --tower $(TOWER)

app: $(VENV)/.demo-installed $(VENV)/.app-installed  ## open a page with the demo's model (TOWER=vit or resnet); trains it if it is missing
	test -f $(DIGITS)/model.safetensors || $(BIN)/python -m demo --tower $(TOWER)
	@# An index of an earlier run's model is made anew.
	test $(DIGITS)-index/hf_clip_index.json -nt $(DIGITS)/model.safetensors || rm -rf $(DIGITS)-index
	$(BIN)/hf-clip index demo-output/data --split held_out_images --into $(DIGITS)-index --model $(DIGITS)
	$(BIN)/hf-clip app $(DIGITS) --index $(DIGITS)-index --open

test: $(VENV)/.dev-installed  ## run the tests (two workers)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.dev-installed  ## run the tests, the long ones too
	$(BIN)/python -m pytest -m "" -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev-installed  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev-installed  ## put the sources into the format that `check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs-installed  ## build the documentation into docs/_build/html (warnings are errors)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

parity: $(VENV)/.dev-installed  ## compare all nine models with the reference at full size (2 minutes, 12 GB)
	$(BIN)/python -m conversion.parity --all

cards: $(VENV)/.dev-installed  ## write the nine model cards and their picture
	$(BIN)/python -m model_cards

bench: $(VENV)/.dev-installed $(VENV)/.bench-installed  ## measure us and the peers in turn (about an hour; QUICK=1: some minutes)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) --json benchmark.json --picture benchmark.png

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) docs/_build demo-output benchmark.json benchmark.png
