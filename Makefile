# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= data
RUNS ?= runs
WORKERS ?= 2

.PHONY: reproduce test lab figures results notebooks clean
.DEFAULT_GOAL := help

help:
	@echo "make reproduce   write the embedded benchmark, train DI2L on it, evaluate, draw (minutes on two cores)"
	@echo "make test        export and cleanliness check, every notebook's cells, pytest"
	@echo "make lab         JupyterLab on nbs/"
	@echo "make figures     run every analysis notebook top to bottom; draws figures/ from results/"
	@echo "make results     make every record of results/ that is missing (a night on two cores)"
	@echo "make notebooks   run every notebook top to bottom"
	@echo "make clean       remove what these commands made (not .venv)"

.venv/ready: constraints.txt settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# as many threads as the recorded runs had: sums, and so bits, depend on it
reproduce results: export OMP_NUM_THREADS := 1
reproduce: .venv/ready
	$(BIN)/di2l_reproduce --data $(DATA) --runs $(RUNS)

# several programs share the cores, and the bits of a run depend on the number of threads
test: export OMP_NUM_THREADS := 1
test: .venv/ready
	$(BIN)/python -m pytest -q tests/test_repository.py
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/test_repository.py --durations 15 tests

lab: .venv/ready
	$(BIN)/jupyter lab --notebook-dir nbs

figures: .venv/ready
	$(BIN)/jupyter execute --inplace --timeout 3600 nbs/2?_*.ipynb
	$(BIN)/nbdev_clean

results: .venv/ready
	$(BIN)/di2l_experiments make --workers $(WORKERS) --data $(DATA) --runs $(RUNS)

notebooks: .venv/ready
	$(BIN)/jupyter execute --inplace --timeout 3600 nbs/[0-9]*.ipynb
	$(BIN)/nbdev_clean

clean:
	rm -rf $(DATA) $(RUNS) .pytest_cache .hypothesis *.egg-info nbs/.ipynb_checkpoints
	find di2l tests -name __pycache__ -type d -prune -exec rm -rf {} +
