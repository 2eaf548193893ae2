# Two environments: .venv for what `python3` is (CPython 3.11 or newer), .venv312 for CPython 3.12 with the newest tested
# megatron-core. Everything below creates what it needs.
SHELL := /bin/bash
PYTHON ?= python3
PYTHON312 ?= $(shell for python in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12; do \
	"$$python" -c 'import venv' 2>/dev/null && { echo "$$python"; break; }; done)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
EXTRAS := deepspeed,megatron,hf,demo,test

.PHONY: gpu demo test test-newest matrix exhaustive portable bench rooms lint clean

demo: .venv/installed
	.venv/bin/dsp-plugin demo

test: .venv/installed
	.venv/bin/python -m pytest

test-newest: .venv312/installed
	.venv312/bin/python -m pytest $(NEWEST)

# The compatibility suite, every cell of it, on both environments, then the page of what it found; and the families of
# Transformers, with theirs. About three quarters of an hour on two quiet cores. A failing test keeps no page from being
# written.
matrix: .venv/installed .venv312/installed
	status=0; \
	.venv/bin/python -m pytest --matrix -m cell tests/integration --cells-out docs/compatibility/py$(VERSION).json \
		|| status=1; \
	.venv312/bin/python -m pytest --matrix -m cell tests/integration --cells-out docs/compatibility/py3.12.json \
		|| status=1; \
	.venv/bin/python tests/compatibility.py docs/compatibility/*.json --page docs/compatibility.md; \
	for python in .venv .venv312; do \
		$$python/bin/python tests/families.py --out configs/models --page docs/models.md || status=1; \
	done; \
	exit $$status

# Every case of every test, those beyond the covering subset too, on both environments. Hours.
exhaustive: .venv/installed .venv312/installed
	.venv/bin/python -m pytest --matrix
	.venv312/bin/python -m pytest --matrix tests/integration

# Every test with the arithmetic of other x86-64 processors, which round otherwise: ATen without vector instructions, and
# MKL's code for the oldest ones. A bound at the rounding noise of this machine fails here. A failing run does not keep the
# next from running; each one's last line is repeated at the end. Four runs of the suite, without --matrix: hours.
portable: .venv/installed .venv312/installed
	status=0; lines=$$(mktemp); \
	for setting in ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE; do \
		for python in .venv/bin/python .venv312/bin/python; do \
			output=$$(mktemp); \
			env $$setting $$python -m pytest 2>&1 | tee $$output; \
			[ $${PIPESTATUS[0]} = 0 ] || status=1; \
			echo "$$setting $$python: $$(tail -n 1 $$output)" >> $$lines; \
			rm $$output; \
		done; \
	done; \
	cat $$lines; rm $$lines; exit $$status

# Ratios measured side by side on this machine, written to benchmarks/results/. Twenty minutes on two quiet cores.
bench: .venv/installed
	.venv/bin/python -m benchmarks

# What needs a GPU, all of it, and a report of it in build/gpu: tests/gpu, on two devices those of several ranks, too, and the
# counts of the hot path. Without a device it says so, and fails.
gpu: .venv/installed
	.venv/bin/python -m benchmarks.gpu_report

# docs/rooms.svg, from the imports. Standard library only.
rooms:
	$(PYTHON) tests/draw_rooms.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy dsp_plugin patches launch benchmarks

.venv/installed: setup.cfg setup.py pyproject.toml configs/constraints/py$(VERSION).txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c configs/constraints/py$(VERSION).txt -e '.[$(EXTRAS)]' ruff mypy
	touch $@

.venv312/installed: setup.cfg setup.py pyproject.toml configs/constraints/py3.12.txt
	@test -n "$(PYTHON312)" || { echo "no CPython 3.12 found: set PYTHON312=/path/to/python3.12"; exit 1; }
	$(PYTHON312) -m venv .venv312
	.venv312/bin/pip install --quiet -c configs/constraints/py3.12.txt -e '.[$(EXTRAS)]' ruff mypy
	touch $@

configs/constraints/py$(VERSION).txt:
	@echo "no tested set of versions for CPython $(VERSION): set PYTHON to a 3.11 or 3.12 interpreter"; exit 1

clean:
	rm -rf .venv .venv312 demo_output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
