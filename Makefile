# Two commands for a first look: `make demo` and `make test`. Both set up .venv from requirements.txt.
#   make bench                     images/s and ratios here, beside their goals (BENCH="--arch resnet50 --size 224")
#   make gpu                       what needs CUDA, most valuable first, for nine minutes; the rest: see .ci/gpu.py
#   make reproduce-cifar DATA=...  DO, MORE, its baselines, a table; also -imagenet -places -inat, without DO -voc -coco
#   make reproduce-folder DATA=FOLDER   the same on your own photographs
#   make table                     README's tables again, from .ci/results
# DATA: the data root; LISTS: where published list files are; SEEDS; GPUS: processes, one a GPU; FLAGS: for every run.
# MORE in fp32 at batch 256 takes some 40 GB (ImageNet-LT) or 80 GB (Places-LT) of memory (by count), all GPUs together.
PYTHON ?= python3
DATA ?= data
LISTS ?= $(DATA)
SEEDS ?= 0 1 2
GPUS ?= 1
FLAGS ?=
PACK ?= 256
BENCH ?=
GPU ?=
V = .venv/bin/python
RUN = $(if $(filter 1,$(GPUS)),$(V),$(V) -m torch.distributed.run --standalone --nproc_per_node=$(GPUS))
# glibc keeps freed memory instead of handing it back after every step: about a tenth faster on CPUs
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000
export MALLOC_TOP_PAD_ = 268435456
PLAIN = env -u MALLOC_MMAP_MAX_ -u MALLOC_TRIM_THRESHOLD_ -u MALLOC_TOP_PAD_

.PHONY: demo test bench gpu table clean reproduce-cifar reproduce-folder reproduce-imagenet reproduce-places \
  reproduce-inat reproduce-voc reproduce-coco
.DELETE_ON_ERROR:

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(V) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready  ## both methods on made-up images, under three minutes
	rm -rf runs/demo_do runs/demo_more
	$(V) more_lt.py --dataset synth --loss bsce --out runs/demo_more
	$(V) do_lt.py --dataset synth --out runs/demo_do
	@echo "What to look at: in the last table, column few, cross-entropy hardly ever predicts the four rare classes,"
	@echo "DO several times as often (as MORE on balanced softmax does, in the first run's table)."

test: .venv/ready
	$(V) -m pytest -q test_smoke.py

bench: .venv/ready  ## idle machine, please
	$(V) .ci/bench.py $(BENCH)
	# as a program without our glibc settings, which would double the pace of decoding every pixel
	$(if $(BENCH),,$(PLAIN) $(V) .ci/bench.py --views)
	$(if $(BENCH),,$(V) .ci/bench.py --many-classes)

gpu:  ## on a machine with CUDA: GPU="--data FOLDER"
	$(if $(wildcard .venv/ready),$(V),$(PYTHON)) .ci/gpu.py $(GPU)

table: .venv/ready
	$(V) .ci/table.py

FLAGS_paper = --recipe paper
FLAGS_three = --order many,medium,few
FLAGS_three50 = --order many,medium,few --gamma 0.5,0.6
# $(1): name of the runs, $(2): flags that choose the data, $(3): losses without and with MORE, $(4): DO's recipes
# (do: the default), $(5): losses without MORE alone.
# Looks at the data first, leaves out what is finished and goes on where it was interrupted.
define reproduce
	$(V) data_lt.py $(2) --data-root $(DATA) --lists $(LISTS)
	set -e; run() { out=$$1; shift; \
	  if test -f runs/$$out/result.json; then echo "runs/$$out is finished: delete it to train it again"; return; fi; \
	  $(RUN) $$@ --out runs/$$out $(2) --data-root $(DATA) --lists $(LISTS) --seed $$seed --resume $(FLAGS); }; \
	for seed in $(SEEDS); do \
	  $(foreach d,$(4),run $(d)_$(1)_seed$$seed do_lt.py $(FLAGS_$(d));) \
	  for loss in $(3); do \
	    run base_$${loss}_$(1)_seed$$seed more_lt.py --loss $$loss --no-more; \
	    run more_$${loss}_$(1)_seed$$seed more_lt.py --loss $$loss; \
	  done; \
	  $(foreach loss,$(5),run base_$(loss)_$(1)_seed$$seed more_lt.py --loss $(loss) --no-more;) \
	done
	$(V) .ci/table.py runs/*_$(1)_seed*/result.json
endef

reproduce-cifar: .venv/ready  ## CIFAR-100-LT at ratio 100 and 50
	$(call reproduce,cifar100_imb100,--dataset cifar100 --imb 100,ce bsce,do three paper)
	$(call reproduce,cifar100_imb50,--dataset cifar100 --imb 50,ce bsce,do three50 paper)

PHOTOS = $(subst /,_,$(patsubst %/,%,$(DATA)))
reproduce-folder: .venv/ready  ## DATA: photographs in train/CLASS, val/CLASS, test/CLASS; PACK: their side once decoded
	@echo "photographs are decoded once, into runs/packed_$(PHOTOS): delete it when they have changed"
	test -f runs/packed_$(PHOTOS)/about.json || $(V) data_lt.py --dataset $(DATA) --pack runs/packed_$(PHOTOS) --size $(PACK)
	$(call reproduce,folder_$(PHOTOS),--dataset runs/packed_$(PHOTOS),bsce,do,ce)

reproduce-imagenet: .venv/ready  ## DATA holds ImageNet's train/ and val/, LISTS its ImageNet_LT_*.txt
	$(call reproduce,imagenet_lt,--dataset imagenet_lt,ce bsce,do paper)

reproduce-places: .venv/ready  ## DATA holds Places' train/ and val/ (256 px), LISTS its Places_LT_*.txt
	$(call reproduce,places_lt,--dataset places_lt,ce bsce,do paper)

reproduce-inat: .venv/ready  ## DATA holds train_val2018/, LISTS train2018.json and val2018.json or iNaturalist18_*.txt
	$(call reproduce,inat18,--dataset inat18,ce bsce,do paper)

reproduce-voc: .venv/ready  ## DATA holds VOCdevkit/VOC2012 and VOC2007, LISTS img_id.txt or voc_mlt_train_labels.txt
	$(call reproduce,voc_mlt,--dataset voc_mlt,bce asl db)

reproduce-coco: .venv/ready  ## DATA: train2017/, val2017/, annotations/; LISTS: img_id.pkl or coco_mlt_train_labels.txt
	$(call reproduce,coco_mlt,--dataset coco_mlt,bce asl db)

clean:  ## what can be made again in minutes; runs/ stays but for the demo
	rm -rf .venv runs/demo_do runs/demo_more __pycache__ .pytest_cache
