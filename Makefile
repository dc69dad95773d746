# Each target but gpu sets up what it needs: .venv is made once, from pinned versions, by plain pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/digits
# Of the evidence on natural images: the evaluation pack's folder, where files lie, which prior, which presets.
PACK ?=
DATA ?= $(or $(SYNTHKD_DATA),data)
SIZE ?= small
SIDE ?= $(if $(filter base,$(SIZE)),128,64)
PACS_PRIOR ?= $(if $(filter base,$(SIZE)),--set 'vae_widths=[64$(,)128$(,)128]',$(PACS_SMALL))
PACS_SMALL := --set 'vae_widths=[16$(,)32$(,)64]' --set latent_channels=8 --set vae_steps=800 --set vae_batch_size=16 --set steps=2000
SEEDS ?= 0,1,2
EVIDENCE ?= $(if $(shell command -v nvidia-smi),cifar10 pacs-sketch,cifar10-small pacs-sketch-small)
export OMP_NUM_THREADS ?= 1

, := ,
# A command in parts of at most 9 minutes: it ends with 75 as long as it is not done, and goes on when called again.
in_parts = until $(1) --minutes 9; do code=$$?; [ $$code -eq 75 ] || exit $$code; done

.PHONY: demo test test-backends lint bench soak gpu assets clean prior-cifar prior-pacs evidence
.DEFAULT_GOAL := help

help: ## say what the targets do
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 15

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.ready ## the main job: draw a guided set of digits, distil a student, write the report
	$(BIN)/synthkd run digits --out $(OUT)

test: $(VENV)/.ready ## all tests that need no GPU, but for the next target's
	$(BIN)/python -m pytest -m "not gpu and not backends" -n 2

test-backends: $(VENV)/.ready ## every backend of every small pipeline and role (half an hour at most on 2 cores)
	$(BIN)/python -m pytest -m "backends and not gpu" -n 2 tests/backends

lint: $(VENV)/.ready ## ruff, mypy --strict, import contracts
	@mkdir -p build/typing && ln -sfn ../.. build/typing/synthkd
	$(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: $(VENV)/.ready ## the benchmark suites of this machine; rows go to bench/results/
	$(BIN)/synthkd bench digits --seeds 0,1,2,3,4 --out out/bench --record
	$(BIN)/synthkd bench adversarial --seeds 0,1,2,3,4 --out out/adversarial --record
	$(BIN)/synthkd bench kernels --record
	$(BIN)/synthkd bench engine --seeds 0,1,2,3,4 --record
	$(BIN)/synthkd bench engine --case sd15-512 --case sdxl-1024 --counts --record
	$(BIN)/synthkd bench backends --record
	$(BIN)/synthkd bench distill --record
	$(BIN)/synthkd bench ablation --seeds 0 --num-images 400 --record
	$(BIN)/synthkd bench methods --seeds 0,1,2 --out out/methods --record
	$(BIN)/synthkd bench writing --record
	$(BIN)/python -m synthkd.bench.table --record
	$(BIN)/python -m synthkd.bench.scale --record
	$(BIN)/python -m pytest tests/bench/benchmark_kernels.py --benchmark-only -q
	$(BIN)/python -m synthkd.bench.resources

soak: $(VENV)/.ready ## 20,000 images by a Ray cluster under 20 SIGKILLs, a lost actor, a lost node and a full disk
	$(BIN)/python -m synthkd.bench.soak --record

# Each pack's files are made by one command; the target is the last that it writes.
$(DATA)/cifar10/teacher/resnet56.toml: | $(VENV)/.ready
	$(call needs_pack)
	$(BIN)/python -m synthkd.bench.cifar_pack "$(PACK)" $(DATA)/cifar10

$(DATA)/pacs/test.npz: | $(VENV)/.ready
	$(call needs_pack)
	$(BIN)/python -m synthkd.bench.pacs_pack "$(PACK)" $(DATA)/pacs --side $(SIDE)

# Files of another size of prior are not trained on: one line says what to do.
of_side = $(BIN)/python -m synthkd.bench.made_files $(DATA)/$(1)/pool.npz --side $(2)
needs_pack = @test -n "$(PACK)" || { echo "$@ is not there: name the evaluation pack, as in PACK=../evaluation" >&2; exit 2; }

prior-cifar: $(DATA)/cifar10/teacher/resnet56.toml ## with PACK=folder: CIFAR files, and a prior of SIZE=small (an hour or two of one core) or base
	$(call of_side,cifar10,32)
	$(call in_parts,$(BIN)/synthkd fit-prior $(DATA)/cifar10/pool.npz --out $(DATA)/cifar10/prior-$(SIZE) --size $(SIZE))

prior-pacs: $(DATA)/pacs/test.npz ## with PACK=folder: PACS files, the sketch teacher, and a prior of SIZE=small (an hour or two of one core) or base
	$(call of_side,pacs,$(SIDE))
	$(call in_parts,$(BIN)/python -m synthkd.bench.fit_teacher $(DATA)/pacs/train.npz --test $(DATA)/pacs/test.npz \
		--out $(DATA)/pacs/teacher)
	$(call in_parts,$(BIN)/synthkd fit-prior $(DATA)/pacs/pool.npz --out $(DATA)/pacs/prior-$(SIZE) --size $(SIZE) \
		$(PACS_PRIOR))

# Of one preset: its rows, then what the page shows of its prior, its teacher where that was trained here, and its images.
define evidence_of
	$(call in_parts,SYNTHKD_DATA=$(DATA) $(BIN)/synthkd bench evidence $(1) --seeds $(SEEDS) --out out/evidence/$(1) --record)
	$(PAGE) $(1) --trained $(DATA)/$(call set_of,$(1))/prior-$(if $(findstring small,$(1)),small,base)
	$(if $(findstring pacs,$(1)),$(PAGE) $(1) --trained $(DATA)/pacs/teacher)
	$(PAGE) $(1) --sheet out/evidence/$(1)/seed-$(firstword $(subst $(,), ,$(SEEDS)))

endef
PAGE = $(BIN)/python -m synthkd.bench.evidence
set_of = $(if $(findstring cifar,$(1)),cifar10,pacs)

evidence: $(VENV)/.ready ## guided runs and controls on natural images, of the presets that fit this machine; then docs/evidence.md
	$(foreach preset,$(EVIDENCE),$(call evidence_of,$(preset)))
	$(PAGE) --table

gpu: ## with the GPU machine's own Python: all GPU tests, then its benchmark suites, in resumable parts
	@mkdir -p build/typing && ln -sfn ../.. build/typing/synthkd
	PYTHONUNBUFFERED=1 PYTHONPATH="$(CURDIR)/build/typing$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m synthkd.bench.gpu --minutes 9

assets: $(VENV)/.ready ## rebuild the embedded default from scratch (about 70 minutes on one core)
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[dev,assets]'
	$(BIN)/python engine/assets/build/build.py

clean: ## remove what the targets made
	rm -rf $(VENV) build out .pytest_cache .ruff_cache .benchmarks *.egg-info
