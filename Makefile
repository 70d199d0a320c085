# `make demo`: set up, then fine-tune, export, sample and compare on the embedded data.
# `make test`: set up, then linter, types and tests.
# `make demo-emoji`: the same for text-to-image and inpainting on the embedded emoji.
# `make bench`: set up, then every speed figure on this machine, its GPU where it has one; ARGS=debug=cpu for a quick look.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   := outputs/demo
EMOJI  := outputs/demo-emoji
# six concepts of the training set, and one that occurs in no training picture
PROMPTS := "red apple, twemoji emoji" "grinning face, noto emoji" "snail, fluent 3d emoji" "sailboat, noto emoji" \
  "sunflower, twemoji emoji" "blue heart, fluent flat emoji" "skateboard, twemoji emoji"
BENCH  := outputs/bench
SHELL  := /bin/bash
# tests run side by side, and processes on few cores stall each other when idle threads spin; alone, spinning is faster
test: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-emoji test bench clean

$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 2; }
	@start=$$(date +%s); test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e ".[metrics,text,report$(if $(findstring dev,$@),$(comma)dev)]" && touch $@ && \
	echo "set up in $$(( $$(date +%s) - start )) s"

comma := ,

demo: $(VENV)/.demo
	@rm -rf $(DEMO)
	@start=$$(date +%s); set -e; \
	$(BIN)/diffratio train experiment=fashion_demo paths.output_dir=$(DEMO)/train; \
	trained=$$(date +%s); echo "fine-tuned in $$(( trained - start )) s"; \
	$(BIN)/diffratio export $(DEMO)/train --out $(DEMO)/routed --dtype float16; \
	$(BIN)/diffratio sample $(DEMO)/routed --n 20 --out $(DEMO)/samples.png; \
	$(BIN)/diffratio compare routed=[$(DEMO)/routed] methods=[fewer_steps,tome] budgets=[0.8] n=60 validation_n=100 \
	  latency_batches=[1] latency_repeats=5 block_repeats=5 paths.output_dir=$(DEMO)/compare; \
	echo "demo done in $$(( $$(date +%s) - start )) s: open $(DEMO)/compare/report.html"

demo-emoji: $(VENV)/.demo
	@rm -rf $(EMOJI)
	@start=$$(date +%s); set -e; \
	$(BIN)/diffratio train experiment=emoji_diffcr paths.output_dir=$(EMOJI)/train; \
	trained=$$(date +%s); echo "fine-tuned in $$(( trained - start )) s"; \
	$(BIN)/diffratio export $(EMOJI)/train --out $(EMOJI)/routed --dtype float16; \
	$(BIN)/diffratio sample $(EMOJI)/routed --prompts $(PROMPTS) --out $(EMOJI)/samples.png; \
	$(BIN)/diffratio train experiment=emoji_inpaint backbone.source=emoji-pixart-inpaint trainer.max_steps=50 paths.output_dir=$(EMOJI)/fill; \
	$(BIN)/diffratio sample $(EMOJI)/fill/export --n 3 --out $(EMOJI)/filled.png; \
	$(BIN)/diffratio compare data=emoji64 weights=emoji-pixart routed=[$(EMOJI)/routed] methods=[fewer_steps,tome,importance] \
	  budgets=[0.8] n=60 reference_n=300 validation_n=100 latency_batches=[1] latency_repeats=5 paths.output_dir=$(EMOJI)/compare; \
	echo "demo done in $$(( $$(date +%s) - start )) s: open $(EMOJI)/compare/report.html"

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy diffratio train.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n auto --dist loadgroup

bench: $(VENV)/.demo
	@set -e; for kind in routing training methods table; do \
	  $(BIN)/diffratio bench $$kind out=$(BENCH)/$$kind.json $(ARGS); \
	done; echo "bench done: $(BENCH)/"

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
