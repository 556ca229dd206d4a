# Every target first installs what it needs into .venv, and installs nothing when that is there already.
# Paths are relative, so that a clone may lie in a folder with spaces in its name. Works with GNU make 3.81 (macOS).

PYTHON ?= python3
# Passed on to the command, and more of pyproject.toml's extras to install: cuda12, cuda13, parity, ...
ARGS ?=
EXTRAS ?=
# What another JAX may do otherwise. Empty runs all tests.
NEWER_TESTS ?= tests/layers tests/models tests/parallel tests/generation tests/proof/test_gradcheck.py

# The notebooks have an environment of their own: JupyterLab brings many packages that nothing else needs. So has a
# second Python, with the JAX that is the newest for it, and so has JAX's CUDA plugin, which without a GPU has every
# process say that there is none.
VENV := $(if $(filter notebooks test-notebooks test-answers,$(MAKECMDGOALS)),.venv-notebooks,$(if \
    $(filter test-newer,$(MAKECMDGOALS)),.venv-newer,$(if \
    $(filter gpu-program test-gpu-program,$(MAKECMDGOALS)),.venv-gpu-program,.venv)))
RUN := $(VENV)/bin/python run.py

# One empty file for each extra in .venv ("core" for the package itself), written when its installation succeeded.
INSTALLED := $(VENV)/installed
# There while pip is at work. One that was left tells that pip was killed, maybe halfway through writing a package.
INSTALLING := $(VENV)/installing

# A .venv that cannot be used counts as none: its installation was killed, or its Python is gone since an upgrade.
$(shell if [ -e $(INSTALLING) ] || [ ! -x $(VENV)/bin/python ]; then rm -rf $(INSTALLED); fi)

.DEFAULT_GOAL := help
.PHONY: help env train assistant test test-slow test-newer gradcheck lint bench gpu-program test-gpu-program notebooks \
    test-notebooks test-answers docs constraints clean
# Two pips must not write into one .venv.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  ARGS="..."           options for the command:  make train ARGS="--optimizer.learning-rate 3e-4"'
	@echo '  EXTRAS=cuda12        run on an NVIDIA GPU (or cuda13); said once, .venv keeps it'
	@echo '  PYTHON=python3.12    the Python that .venv is made with, 3.11 or newer'

env: $(INSTALLED)/core $(addprefix $(INSTALLED)/,$(EXTRAS)) ## make .venv and install jaxgpt into it

train: env ## train a small Llama (configs/quickstart.toml)
	@$(RUN) --config quickstart $(ARGS)

assistant: env $(INSTALLED)/data ## train an assistant from random weights, and show the gain of each stage
	@$(VENV)/bin/python -m benchmarks.assistant.all $(ARGS)

test: env $(INSTALLED)/test ## run the tests
	@$(VENV)/bin/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: env $(INSTALLED)/test ## run the tests that take minutes: kills, full disks, all numbers of devices
	@$(VENV)/bin/python -m pytest -m slow -n auto --dist worksteal $(ARGS)

test-newer: env $(INSTALLED)/test ## run the tests under a second Python: make test-newer PYTHON=python3.13
	@$(VENV)/bin/python -m pytest -n auto --dist worksteal $(NEWER_TESTS) $(ARGS)
	@$(RUN) gradcheck

gradcheck: env ## compare every hand-written gradient with autodiff
	@$(RUN) gradcheck $(ARGS)

lint: env $(INSTALLED)/test $(INSTALLED)/lint ## check style and types
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check .
	@$(VENV)/bin/python -m pyright

bench: env $(INSTALLED)/parity ## measure the speed beside PyTorch and plain JAX
	@$(VENV)/bin/python -m benchmarks.bench $(ARGS)

gpu-program: env $(INSTALLED)/gpu-program ## show the program that XLA compiles of the step for a GPU (none is needed)
	@$(VENV)/bin/python -m benchmarks.gpu_program $(ARGS)

test-gpu-program: env $(INSTALLED)/test $(INSTALLED)/gpu-program ## run the tests of that program
	@$(VENV)/bin/python -m pytest -m '' tests/test_gpu_program.py tests/test_gpu_program_hlo.py $(ARGS)

notebooks: env $(INSTALLED)/notebooks ## open the notebooks in JupyterLab
	@$(VENV)/bin/python -m jupyterlab --ServerApp.root_dir=. \
	    --LabApp.default_url=/lab/tree/notebooks/01_a_tensors_way.ipynb $(ARGS)

test-notebooks: env $(INSTALLED)/notebooks ## run the notebooks; with ARGS=--overwrite keep what they print and draw
	@$(VENV)/bin/python -m pytest --nbmake --nbmake-timeout=600 --durations=0 notebooks $(ARGS)

test-answers: env $(INSTALLED)/notebooks ## run the notebooks with the authors' answers to the exercises
	@$(VENV)/bin/python notebooks/answers/run.py $(ARGS)

docs: env $(INSTALLED)/docs ## build the documentation into build/docs; any warning is an error
	@$(VENV)/bin/python -m docs.site.configuration
	@$(VENV)/bin/python -m docs.site.build

constraints: ## pin the newest releases that pyproject.toml allows (needs uv)
	uv pip compile pyproject.toml --universal --all-extras --upgrade --no-annotate --quiet \
	    --custom-compile-command "make constraints" --output-file constraints.txt

clean: ## remove .venv, its like (.venv-notebooks, ...) and caches; runs/ stays
	rm -rf .venv .venv-notebooks .venv-newer .venv-gpu-program build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Creates .venv unless there is a usable one. Debian and Ubuntu ship Python without venv: it then leaves half a .venv.
define create_venv
    [ ! -e $(INSTALLING) ] && $(VENV)/bin/python -m pip --version >/dev/null 2>&1 && exit 0; \
    found=$$("$(PYTHON)" --version 2>&1) || found="not there"; \
    "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
        echo "jaxgpt needs Python 3.11 or newer, and $(PYTHON) is $$found."; \
        echo "Install one, then name it:  make $(MAKECMDGOALS) PYTHON=python3.12"; \
        exit 1; } >&2; \
    rm -rf $(VENV); \
    said=$$("$(PYTHON)" -m venv $(VENV) 2>&1) && exit 0; \
    rm -rf $(VENV); \
    { echo "$$said"; \
      echo; \
      echo "jaxgpt: $(PYTHON) ($$found) could not make the virtual environment $(VENV); its words are above."; \
      echo "On Debian and Ubuntu a package may be missing:  sudo apt install $$("$(PYTHON)" -c \
          'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
      echo "Or name another Python, 3.11 or newer:          make $(MAKECMDGOALS) PYTHON=python3.12"; \
      exit 1; } >&2
endef

# pip is given all extras of this .venv each time, so that they stay consistent when a version changes.
$(INSTALLED)/%: pyproject.toml constraints.txt
	@$(create_venv)
	@mkdir -p $(INSTALLED); \
	extras=$$({ ls $(INSTALLED); echo $*; } | grep -v '^core$$' | sort -u | paste -s -d , -); \
	case $* in \
	    core) echo "Installing packages into $(VENV) (once, 1-3 minutes)" ;; \
	    parity | cuda* | gpu-program) echo "Installing packages for $* into $(VENV) (once, several minutes: they are large)" ;; \
	    *) echo "Installing packages for $* into $(VENV) (once, 1-3 minutes)" ;; \
	esac; \
	touch $(INSTALLING); \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e ".$${extras:+[$$extras]}" >$(VENV)/pip.log 2>&1; \
	status=$$?; \
	rm -f $(INSTALLING); \
	if [ $$status -ne 0 ]; then \
	    cat $(VENV)/pip.log; \
	    echo "jaxgpt: installing failed; pip's words are above (without a network it finds no versions)."; \
	    echo "The same command tries again."; \
	    exit 1; \
	fi >&2; \
	cd $(INSTALLED) && touch core $* $$(ls)
