# Everything from a bare clone: `make quickstart`, `make test`, `make test-vision`.
#
# Variables: PYTHON (3.10 to 3.12) makes the virtual environment VENV. CONFIG is
# another quickstart, such as configs/upernet_vim_quickstart.py, and ITERATIONS fixes
# for how long it trains, however fast the machine is. DETECTION=0 makes
# `make test` do without mmdetection, whose tests are skipped. pip's own
# settings are honoured: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
CONFIG :=
ITERATIONS :=
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.mmvssm-installed
DET_STAMP := $(VENV)/.mmvssm-detection-installed
DETECTION ?= 1
PINS := requirements/pins.txt
KERNELS := mmvssm/ops/cpu

.PHONY: help
help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.PHONY: install
install: $(STAMP) ## Make .venv with the tested stack and this package (editable).

# What an install depends on. The sources of the kernels are among it: installing
# compiles the kernels, too.
SOURCES := pyproject.toml setup.py $(wildcard requirements/*.txt) \
           $(wildcard $(KERNELS)/*.h $(KERNELS)/*.cpp)

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
    echo "error: $(PYTHON) is missing or older than 3.10 ($$($(PYTHON) -V 2>&1))." \
         "Name a newer one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "error: $(PYTHON) cannot make virtual environments." \
         "On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
endef

define WARN_WITHOUT_KERNELS
@test -e $(KERNELS)/_kernels.so || \
    echo 'warning: the CPU kernels were not compiled, so scans on the CPU are' \
         'many times slower. Put a C++ compiler on the path, then: make -B $(1);' \
         'MMVSSM_REQUIRE_KERNELS=1 make -B $(1) shows what fails' >&2
endef

$(STAMP): constraints.txt $(SOURCES)
	$(CHECK_PYTHON)
	@echo '==> [1/3] virtual environment $(VENV)'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -q 'setuptools>=77' wheel
	@echo '==> [2/3] torch, mmengine, this package, requirements of mmsegmentation, ONNX'
	@$(INSTALL) --no-build-isolation -e '.[quickstart,test]' -r requirements/seg.txt \
	    -r requirements/export.txt
	@echo '==> [3/3] mmsegmentation and mmcv-lite'
	@# The one with compiled ops has the same files; `make install-det` brings it back.
	@rm -f $(DET_STAMP)
	@$(RUN) -m pip uninstall -q -y onedl-mmcv
	@$(INSTALL) --no-deps --no-build-isolation -r requirements/openmmlab.txt
	@touch $@
	$(call WARN_WITHOUT_KERNELS,install)
	@echo '==> installed'

.PHONY: install-det
install-det: $(DET_STAMP) ## Add mmdetection; compiles mmcv's ops, once.

# Only what is built takes the place of mmcv-lite.
$(DET_STAMP): $(STAMP) requirements/det.txt requirements/mmdet.txt \
              requirements/build_mmcv.py
	@echo '==> [1/3] requirements of mmdetection'
	@$(INSTALL) -r requirements/det.txt
	@echo "==> [2/3] mmcv with its ops: 2 to 3 minutes on two cores, once"
	@$(RUN) requirements/build_mmcv.py build/wheels \
	    $$(grep ^onedl-mmcv== $(PINS)) -c constraints.txt
	@echo '==> [3/3] mmdetection'
	@$(RUN) -m pip uninstall -q -y mmcv-lite onedl-mmcv
	@$(INSTALL) --no-deps --no-build-isolation --find-links build/wheels \
	    -r requirements/mmdet.txt
	@$(RUN) -c 'import mmcv.ops, mmdet.models'
	@touch $@
	@echo '==> installed'

.PHONY: quickstart
quickstart: install ## Train, evaluate and draw a small VMamba-UperNet on the CPU.
	@$(RUN) tools/quickstart.py $(if $(CONFIG),--config $(CONFIG)) \
	    $(if $(ITERATIONS),--iterations $(ITERATIONS))

.PHONY: quickstart-det
quickstart-det: install-det ## Train, evaluate and draw a small VMamba Mask R-CNN on the CPU.
	@$(RUN) tools/quickstart.py --config configs/mask_rcnn_vmamba_quickstart.py \
	    --work-dir work_dirs/quickstart_det \
	    $(if $(ITERATIONS),--iterations $(ITERATIONS))

.PHONY: test
test: lint $(if $(filter 0,$(DETECTION)),install,install-det) ## Lint, then run every test.
	@echo '==> tests'
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	    --durations 40

# torchvision is compiled for one torch, and neither backbones nor mmseg and mmdet need
# it. So what works with it has an environment with a pair of its own.
VISION := .venv-vision
RUN_VISION := $(VISION)/bin/python
INSTALL_VISION := $(RUN_VISION) -m pip install --disable-pip-version-check \
    -c constraints-vision.txt
VISION_STAMP := $(VISION)/.mmvssm-installed

.PHONY: install-vision
install-vision: $(VISION_STAMP) ## Make .venv-vision with torchvision, timm, MMPretrain.

$(VISION_STAMP): constraints-vision.txt $(SOURCES)
	$(CHECK_PYTHON)
	@echo '==> [1/3] virtual environment $(VISION)'
	@test -x $(VISION)/bin/pip || $(PYTHON) -m venv $(VISION)
	@$(INSTALL_VISION) -q 'setuptools>=77' wheel
	@echo '==> [2/3] torch, torchvision, timm, segmentation-models-pytorch, this package'
	@$(INSTALL_VISION) --no-build-isolation -e '.[quickstart]' pytest pytest-xdist \
	    -r requirements/seg.txt -r requirements/vision.txt
	@echo '==> [3/3] mmpretrain, mmsegmentation and mmcv-lite'
	@$(INSTALL_VISION) --no-deps --no-build-isolation -r requirements/openmmlab.txt \
	    -r requirements/mmpretrain.txt
	@$(RUN_VISION) -c 'import mmpretrain, mmseg, segmentation_models_pytorch'
	@touch $@
	$(call WARN_WITHOUT_KERNELS,install-vision)
	@echo '==> installed'

.PHONY: quickstart-cls
quickstart-cls: install-vision ## Train, evaluate and draw a small VMamba classifier on the CPU.
	@$(RUN_VISION) tools/quickstart.py \
	    --config configs/classification/vmamba_quickstart.py \
	    --work-dir work_dirs/quickstart_cls \
	    $(if $(ITERATIONS),--iterations $(ITERATIONS))

.PHONY: test-vision
test-vision: install-vision ## Run tests/vision with torchvision, timm and MMPretrain.
	@echo '==> tests with torchvision'
	@OMP_NUM_THREADS=1 MMVSSM_REQUIRE_VISION=1 $(RUN_VISION) -m pytest -n 2 \
	    --dist loadfile --durations 20 tests/vision

# The forks have the import names of the originals: they share no environment.
ORIGINALS := .venv-originals
RUN_ORIGINALS := $(ORIGINALS)/bin/python
INSTALL_ORIGINALS := $(RUN_ORIGINALS) -m pip install --disable-pip-version-check \
    -c constraints.txt

.PHONY: test-originals
test-originals: ## Run every test on OpenMMLab's original packages (compiles their mmcv, once).
	@test -x $(ORIGINALS)/bin/pip || $(PYTHON) -m venv $(ORIGINALS)
	@$(INSTALL_ORIGINALS) -q 'setuptools>=77' wheel
	@$(INSTALL_ORIGINALS) -r requirements/seg.txt -r requirements/det.txt \
	    -r requirements/originals-deps.txt -r requirements/export.txt
	@$(RUN_ORIGINALS) requirements/build_mmcv.py build/wheels-originals \
	    $$(grep '^mmcv==' requirements/originals.txt) -c constraints.txt
	@$(INSTALL_ORIGINALS) --no-deps --no-build-isolation \
	    --find-links build/wheels-originals -r requirements/originals.txt -e .
	@OMP_NUM_THREADS=1 $(RUN_ORIGINALS) -m pytest -n 2 --dist loadfile

# ASan must come before all else in the program, so Python gets it preloaded,
# with the C++ library whose functions it replaces. No virtual functions, so no
# vptr; Python's own leaks are not looked for. pytest -s lets the report through,
# -k leaves out the tests of other backends and other instruction sets.
SANITIZED := $(CURDIR)/build/sanitize
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
            -fno-sanitize=vptr -fno-sanitize-recover=all
RUN_SANITIZED = env OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 \
    MMVSSM_CPU_LIBRARY=$(SANITIZED)/$(KERNELS)/_kernels.so LD_PRELOAD="$(strip \
    $(foreach name,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(name).so)))" \
    $(RUN)

.PHONY: sanitize
sanitize: install ## Run the tests of the ops under ASan and UBSan (Linux, g++).
	@MMVSSM_REQUIRE_KERNELS=1 CXX=g++ CXXFLAGS='$(SANITIZE)' $(RUN) setup.py -q \
	    build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	@isas=$$($(RUN_SANITIZED) -c 'from mmvssm.ops.cpu import library; \
	    print(*library.available_isas())'); \
	for isa in $$isas; do \
	    echo "==> $$isa"; \
	    MMVSSM_CPU_ISA=$$isa $(RUN_SANITIZED) -m pytest -n 2 -q -s \
	        --max-worker-restart 0 tests/ops tests/export/test_library.py \
	        -k "($$isa or not (avx or baseline)) and \
	        (cpu or not (torch or reference))"; \
	done

.PHONY: lint
lint: install ## Check style and types without changing a file.
	@echo '==> lint'
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

.PHONY: format
format: install ## Sort imports, format, apply ruff's safe fixes.
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

.PHONY: clean
clean: ## Remove the virtual environments, builds and caches (work_dirs/ and data/ stay).
	rm -rf $(VENV) $(VISION) $(ORIGINALS) build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	rm -f $(KERNELS)/_kernels*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
