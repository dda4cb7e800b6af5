# `make demo` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-pi lint bench schemas clean

demo: $(READY)
	@$(BIN)/python -m benchmarks.demo $(ARGS)

# A compiler for Arm and QEMU's boards: without them, tests of images are skipped.
FIRMWARE_PACKAGES := gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm \
	gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf qemu-system-misc cppcheck gcc libc6-dev

# A browser, C++ for sample sketches, libFuzzer.
CI_PACKAGES := chromium g++ openssl clang libclang-rt-dev

# What this machine lacks is skipped; with CI=true it fails, and the emulated userlands run too.
test: $(READY) lint
	@sh .ci/system-packages mosquitto $(FIRMWARE_PACKAGES) $(if $(filter true,$(CI)),$(CI_PACKAGES))
	$(BIN)/python -m pytest -m "not pi" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
ifeq ($(CI),true)
	$(MAKE) test-pi
endif

# A device agent in real Raspberry Pi userlands (arm64 and armhf), emulated by qemu-user.
test-pi: $(READY)
	@sh .ci/system-packages mosquitto dpkg
	SHOAL_TEST_PI=1 $(BIN)/python -m pytest -m pi $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Regenerates every table of the README; see benchmarks/METHODOLOGY.md for how long each takes.
bench: $(READY)
	$(BIN)/python -m benchmarks.run $(ARGS)

schemas: $(READY)
	$(BIN)/python -m agent.protocol.schema docs/schema

clean:
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "Install Shoal and what it needs; minutes on a slow line, TensorFlow is large."
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
