# Two commands for a first look: `make demo` and `make test`. Both set up .venv from requirements.txt.
PYTHON ?= python3
DATA ?= data
SEEDS ?= 0 1
V = .venv/bin/python

.PHONY: demo test reproduce-cifar clean
.DELETE_ON_ERROR:

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(V) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready  ## DO on made-up images; ends with a table of DO beside plain cross-entropy
	rm -rf runs/demo_do
	$(V) do_lt.py --dataset synth --out runs/demo_do

test: .venv/ready
	$(V) -m pytest -q test_smoke.py

reproduce-cifar: .venv/ready  ## CIFAR-100-LT at ratio 100 and 50, every seed of SEEDS; goes on where it was interrupted
	for imb in 100 50; do for seed in $(SEEDS); do \
	  $(V) do_lt.py --dataset cifar100 --imb $$imb --data-root $(DATA) --seed $$seed --resume --export || exit $$?; \
	done; done

clean:  ## what can be made again in minutes; runs/ stays but for the demo
	rm -rf .venv runs/demo_do __pycache__ .pytest_cache
