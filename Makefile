# Every target works alone on a fresh clone: the environment is made where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUICKSTART := runs/quickstart
RECIPES := recipes/quickstart
# Which recipe of $(RECIPES) the quickstart aligns with.
ALGORITHM ?= rloo

.PHONY: install docs quickstart family test test-long test-faults test-slurm check format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)
	@test -f $(RECIPES)/$(ALGORITHM).yaml || { echo "ALGORITHM=$(ALGORITHM): no such recipe; there are" $(filter-out sft reward_model,$(notdir $(basename $(wildcard $(RECIPES)/*.yaml)))); exit 2; }
	rm -rf $(QUICKSTART)
	$(BIN)/align toy $(QUICKSTART)/data --train 12000
	$(BIN)/align train $(RECIPES)/sft.yaml
	$(BIN)/align train $(RECIPES)/reward_model.yaml
	$(BIN)/align train $(RECIPES)/$(ALGORITHM).yaml
	$(BIN)/align compare $(QUICKSTART)/sft/final $(QUICKSTART)/$(ALGORITHM)/final \
		--reward $(QUICKSTART)/reward_model/final --data $(QUICKSTART)/data --json $(QUICKSTART)/verdict.json

# The HelpSteer family on the bundled task; what is there already is not made again.
FAMILY_OF_steerlm := family_sft family_attributes steerlm steerlm2
FAMILY_OF_genrm := family_sft feedback_edit_feedback genrm_sft genrm rloo_genrm
FAMILY_OF_feedback_edit := family_sft feedback_edit_feedback feedback_edit_edit feedback_edit_reward feedback_edit_select feedback_edit
# One of the three above.
SYSTEM ?= steerlm

family: $(STAMP)
	@test -n "$(FAMILY_OF_$(SYSTEM))" || { echo "SYSTEM=$(SYSTEM): there are steerlm, genrm and feedback_edit"; exit 2; }
	test -d runs/family/data || $(BIN)/align toy runs/family/data --family --train 8000
	set -e; for recipe in $(FAMILY_OF_$(SYSTEM)); do $(BIN)/align train $(RECIPES)/$$recipe.yaml; done
	test $(SYSTEM) != feedback_edit || $(BIN)/align scale recipes/scale/quickstart.yaml

# A test uses one thread, or few processes: two files at a time on two cores.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# With LONG=1 those of test-long too, at once, so that neither core waits for the other twice.
test: $(STAMP)
	$(PYTEST) -m "not full$(if $(LONG),, and not long)"

# Files without such a test are not even collected.
test-long: $(STAMP)
	$(PYTEST) -m long $$(grep -rl --include="test_*.py" "mark\.long" tests)

test-faults: $(STAMP)
	$(PYTEST) -m full $$(grep -rl --include="test_*.py" "mark\.full" tests)

# All cases, or those named: make test-slurm CASES="across timelimit"
test-slurm: $(STAMP)
	tests/slurm/run.sh $(CASES)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(PYTEST) -m "not slow"

# docs/recipes.md, from the docstrings of the schemas.
docs: $(STAMP)
	$(BIN)/python -m align.config.docs docs/recipes.md

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache *.egg-info
