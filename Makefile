# Everything from a bare Python >= 3.10: `make demo` shows the model at work, `make test` runs the tests.

PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed-$(shell cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
OTHERS := .cache/transformers
VLLM := .cache/vllm-venv
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint tiny ablation serve-check bench versions clean

demo: $(INSTALLED)
	$(PY) -m examples.demo

test: $(INSTALLED) lint versions
	$(PY) -m pytest tests -m "not long"

test-all: $(INSTALLED) lint versions
	$(PY) -m pytest tests

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --config-file pyproject.toml $(wildcard *.py) cli training serving examples tiny benchmarks integrations

# The tiny trained checkpoint from seeds alone, about 90 minutes on 2 cores; its ablation of tile tags, about an hour.
tiny: $(INSTALLED)
	$(PY) -m tiny.build --clean

ablation: $(INSTALLED)
	$(PY) -m tiny.build --until decoder
	$(PY) -m tiny.ablation

# vLLM's server against this package, with and without the plugin; CHECKPOINT=DIR serves that folder.
serve-check: $(INSTALLED) $(VLLM)/.installed
	$(PY) -m nvlm.serving.check $(CHECKPOINT) --venv $(VLLM)

$(VLLM)/.installed: serving/install_vllm.sh pyproject.toml | $(INSTALLED)
	serving/install_vllm.sh $(VLLM) $(PY)
	touch $@

# All benchmarks on a quiet machine, about a quarter of an hour on 2 cores: table, JSON and plots in .cache/bench.
bench: $(INSTALLED)
	$(PY) -m benchmarks

# The other transformers versions that the golden numbers are checked on, beside the venv's own.
versions: $(OTHERS)-4.57.6/.installed $(OTHERS)-5.16.1/.installed

$(OTHERS)-4.57.6/.installed: | $(INSTALLED)
	$(PY) -m pip install -q --target $(@D) --no-deps transformers==4.57.6 "tokenizers>=0.22,<0.23" \
		"huggingface_hub<1" requests urllib3 idna certifi charset-normalizer
	touch $@

$(OTHERS)-5.16.1/.installed: | $(INSTALLED)
	$(PY) -m pip install -q --target $(@D) --no-deps transformers==5.16.1 "huggingface_hub>=1.5,<2" \
		httpx httpcore anyio sniffio h11 idna certifi
	touch $@

$(INSTALLED):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	$(PY) -m pip install -q --no-deps -e .
	rm -f .venv/.installed-*
	touch $@

clean:
	rm -rf .venv .cache build dist *.egg-info
