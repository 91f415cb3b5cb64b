# Everything a newcomer types. Needs Python 3.11 or newer and nothing else: the rest goes into .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint help conformance fuzz sanitize arm peers oldest clean

# A Transformer learns the phrasebook, is saved, comes back in a new process, and translates.
quickstart: .venv/installed
	rm -rf runs/quickstart
	$(BIN)/vanilla-transformer train quickstart.yaml
	@echo; echo "Reloaded from runs/quickstart in a new process:"
	@printf '%s\n' 'Friday, March 13, 2026' '3 days ago' '1,234.50 euros' 'Norway, Peru, and Japan' > runs/quickstart/examples.txt
	@$(BIN)/vanilla-transformer translate runs/quickstart --input runs/quickstart/examples.txt | paste runs/quickstart/examples.txt -

test: lint peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet --noconftest tests/test_imports.py

# What `vanilla-transformer COMMAND --help` prints, from the options in the source.
help: .venv/installed
	$(BIN)/python -m vanilla_transformer_commands.ready_help

# transformers' own tests on our classes; they come with its source distribution.
conformance: .venv/installed
	$(BIN)/python tests/conformance/run.py

# generate() beside transformers' own loops for so many seconds: random networks, sources and arguments.
SECONDS ?= 60
fuzz: .venv/installed
	$(BIN)/python tests/stock_loops.py $(SECONDS)

# The compiled program under GCC's sanitizers, fuzzed so many seconds by each.
sanitize: .venv/installed
	$(BIN)/python tests/native/run.py sanitize $(SECONDS)

# The compiled program on AArch64, emulated, and on other instruction sets: the same outputs as here, token by token.
# On Debian: apt-get install g++-aarch64-linux-gnu qemu-user
arm: .venv/installed
	$(BIN)/python tests/native/run.py arm

# torch first, so that nothing below it asks for another build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# What only tests need, and .venv is better without: frameworks whose checkpoints `convert` reads, and
# torchao. Each has an environment of its own, which sees the packages of .venv, so that torch is not installed twice.
peers: .peers/joeynmt/installed .peers/eole/installed .peers/torchao/installed

.peers/%/installed: tests/peers/%.txt .venv/installed
	rm -rf .peers/$*
	$(BIN)/python -m venv --without-pip .peers/$*
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> $$(.peers/$*/bin/python -c "import site; print(site.getsitepackages()[0])")/project.pth
	$(BIN)/pip --python .peers/$*/bin/python install --quiet --disable-pip-version-check --no-deps --requirement $<
	touch $@

# The tests with the oldest versions that pyproject.toml promises, in an environment of their own. TESTS names a few.
TESTS ?= tests
oldest: .oldest/installed
	OMP_NUM_THREADS=1 .oldest/bin/python -m pytest $(TESTS)

.oldest/installed: pyproject.toml tests/oldest.py
	rm -rf .oldest
	$(PYTHON) -m venv .oldest
	.oldest/bin/python tests/oldest.py > .oldest/constraints.txt
	.oldest/bin/pip install --quiet --disable-pip-version-check --constraint .oldest/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .peers .oldest .conformance build dist *.egg-info runs/quickstart
