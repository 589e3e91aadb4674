# Front doors. Each target installs what it needs on Debian 12 or Ubuntu 24.04 and newer, configures and builds.
#
#   make demo         every mode on a small language model: bytes, accuracy, speed (builds the CLI only)
#   make test         everything that must hold: both builds, all tests, install, fuzzing
#   make test TSAN=1  and clang's warnings, and the quick tests under ThreadSanitizer
#   make build        build/bin/quire
#   make wheel        the Python package as a wheel in dist, with CUDA where nvcc is found
#   make cuda         the CUDA library and the CLI for this machine's GPUs in build-cuda (needs nvcc)
#   make cuda-archs   the CUDA library compiled for every architecture of a release (needs nvcc)
#   make format       clang-format every C++ and CUDA file
#   make lint         clang-tidy every C++ file
#   make clean        remove the build directories
#
# JOBS=n limits parallel compilation; CMAKE_ARGS="-D..." is passed to every configure.
SHELL := /bin/bash
JOBS ?= $(shell nproc)
CMAKE_ARGS ?=
CONFIGURE = cmake -G Ninja $(CMAKE_ARGS)
NINJA = cmake --build
# nvcc is often installed without being on the path.
export PATH := $(PATH):/usr/local/cuda/bin

.DEFAULT_GOAL := help
.PHONY: help demo test build wheel cuda cuda-archs format lint clean

help:
	@sed -n 's/^#   //p' Makefile

demo:
	@scripts/bootstrap build demo
	@$(CONFIGURE) -S . -B build-demo -DQUIRE_BUILD_TESTS=OFF -DQUIRE_CUDA=OFF --log-level=WARNING
	@$(NINJA) build-demo -j $(JOBS) --target quire_tool
	@build-demo/bin/quire demo --model models/tiny-lm --json-out build-demo/demo.json
	@$$(scripts/bootstrap --python) scripts/plot-accuracy build-demo/demo.json

test:
	@scripts/bootstrap build test python $(if $(TSAN),tsan)
	@scripts/test --jobs $(JOBS) $(if $(TSAN),--tsan) --cmake-args="$(CMAKE_ARGS)"

build:
	@scripts/bootstrap build test
	@$(CONFIGURE) -S . -B build --log-level=WARNING
	@$(NINJA) build -j $(JOBS) --target quire_tool

wheel:
	@scripts/bootstrap build python
	@scripts/python-venv build-wheel/venv
	@CMAKE_ARGS="$(CMAKE_ARGS)" build-wheel/venv/bin/pip wheel -q . --no-deps -w dist -Cbuild.tool-args=-j$(JOBS)
	@ls -l dist/*.whl

cuda:
	@scripts/bootstrap build test cuda
	@$(CONFIGURE) -S . -B build-cuda -DQUIRE_CUDA=ON -DQUIRE_BUILD_TESTS=OFF --log-level=WARNING
	@$(NINJA) build-cuda -j $(JOBS) --target quire_tool

cuda-archs:
	@scripts/bootstrap build test cuda
	@$(CONFIGURE) -S . -B build-cuda-archs -DQUIRE_CUDA=ON -DQUIRE_CUDA_ARCHITECTURES="80;86-real;89-real;90a-real;100-real;120-real" \
	  -DQUIRE_BUILD_TESTS=OFF -DQUIRE_BUILD_TOOLS=OFF --log-level=WARNING
	@$(NINJA) build-cuda-archs -j $(JOBS) --target quire

format:
	@scripts/bootstrap lint
	@git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs clang-format -i

lint:
	@scripts/bootstrap build test lint
	@$(CONFIGURE) -S . -B build-lint -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DQUIRE_CUDA=OFF --log-level=WARNING
	@git ls-files 'src/*.cc' 'tools/*.cc' 'tests/*.cc' ':!tests/install/*' \
	  | xargs -P $(JOBS) -n 1 clang-tidy -p build-lint --quiet --warnings-as-errors='*'

clean:
	rm -rf build build-asan build-cuda build-cuda-archs build-demo build-lint build-tsan build-wheel dist
