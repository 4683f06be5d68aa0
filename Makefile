# Thin: what each target does is in the program that it runs.
# Packages are installed only where they are missing; that and nothing else needs root.

SHELL := /bin/sh
CARGO ?= cargo
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# What the lab needs of Debian. Kernels and busybox are fetched into ~/.cache/ballast, not installed.
PACKAGES := qemu-system-x86 qemu-utils e2fsprogs fdisk dosfstools mtools passt gcc libc6-dev python3-venv
# What packages are built and tried with.
DEB_PACKAGES := debhelper dpkg-dev lintian python3
DEB_TEST_PACKAGES := mmdebstrap systemd
# What its Intel hosts need beside: Bochs, its firmware, and what makes the disc that it boots.
INTEL_PACKAGES := bochs bochs-term bochsbios vgabios isolinux syslinux-common genisoimage
INSTALL = $(SUDO) apt-get install -y --no-install-recommends
# One package from elsewhere (a backport of qemu-utils) keeps the release's others out: all are taken from the
# release then.
RELEASE = $(shell . /etc/os-release; echo $$VERSION_CODENAME)
LAB_ARGS ?= -- sh
# The lab's own kernel, as `fetch` leaves it.
KERNEL_ROOT = --kernel-root "$$(ls -d "$${XDG_CACHE_HOME:-$$HOME/.cache}"/ballast/packages/linux-image-6.1.*/root | tail -n 1)"
BALLAST := target/x86_64-unknown-linux-gnu/release/ballast

.DEFAULT_GOAL := help
.PHONY: help demo demo-disks test test-long ignored soak fuzz bench prove slat slat-host lint lab setup intel deb deb-test fleet-test

help: ## Says what there is
	@sed -n 's/^\([a-z-]*\): .*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

demo: setup ## Three guests share a host that is too small for all their peaks; plot in out/demo.svg
	$(CARGO) run --package tests --bin demo

demo-disks: setup ## Two stock Debian guests on a budget too small for both page caches; plot in out/demo-disks.svg
	@$(call need,mmdebstrap)
	$(CARGO) run --package tests --bin demo -- disks

test: setup intel lint ## Everything, from unit tests to real guests in the lab
	$(CARGO) build --release --package cli
	$(CARGO) build --profile guest --package lab-init --package agent
	$(CARGO) run --quiet --package lab -- fetch
	if $(CARGO) nextest --version >/dev/null 2>&1; \
	then $(CARGO) nextest run --workspace --no-fail-fast; \
	else $(CARGO) test --workspace --all-targets; fi
	$(CARGO) test --workspace --doc
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

test-long: setup ## What `make test` leaves out: two CPUs that attack, shadow paging, soaks, fuzzers, proofs, packages, a cluster (some hours)
	@failed=; for part in ignored soak fuzz prove deb-test fleet-test; do \
	  echo "== make $$part"; $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

ignored: setup intel
	@$(call need,mmdebstrap)
	$(CARGO) test --package tests --test boots --test conditions --test kernels --test console_transfer --test cushion --test hostile_guest --test images --test intel --test plug -- --ignored --nocapture --test-threads=1
	$(CARGO) test --package balloon --test discard -- --ignored --nocapture
	$(CARGO) test --package devices --test block -- --ignored --nocapture --test-threads=1

fuzz: ## Fuzz targets of the devices; FUZZ_SECONDS=60 for each (300)
	if $(CARGO) +nightly fuzz --version >/dev/null 2>&1; \
	then for target in fuzz/fuzz_targets/*.rs; do \
	  $(CARGO) +nightly fuzz run "$$(basename "$$target" .rs)" -- -max_total_time=$(or $(FUZZ_SECONDS),300) || exit 1; done; \
	else echo 'nightly Rust with cargo-fuzz is not installed: running the property tests with many cases instead'; \
	PROPTEST_CASES=$(or $(CASES),20000) $(CARGO) test --release --package balloon --package devices --package image; fi

soak: setup ## Moves a guest's memory at random for an hour of the lab's time; SEED=2 SECONDS=600 for another
	$(CARGO) build --release --package cli
	BALLAST_SOAK_SEED=$(or $(SEED),1) BALLAST_SOAK_SECONDS=$(or $(SECONDS),3600) \
	  $(CARGO) test --package tests --test soak -- --include-ignored --nocapture --test-threads=1

bench: setup ## Start, memory, exits and instructions, counted in the lab beside QEMU microvm; then this host (an hour)
	$(CARGO) run --package tests --bin bench
	$(CARGO) run --package tests --bin latency
	@$(call need,fio)
	$(CARGO) bench --package balloon --package balancer --package vmm --package devices --benches

prove: ## What holds of ranges and descriptors, for all input: by Kani, or exhaustively within small bounds
	if $(CARGO) kani --version >/dev/null 2>&1; \
	then $(CARGO) kani --package balloon && $(CARGO) kani --package devices; \
	else echo 'cargo kani is not installed: checking all input within small bounds instead'; \
	$(CARGO) test --package balloon --package devices --lib proofs -- --nocapture --test-threads=1; fi

slat: setup intel ## SLAT on and off in emulated hosts, and this host; report in out/slat.html (half an hour on two processors)
	$(CARGO) build --release --package cli
	$(CARGO) run --quiet --package lab -- fetch
	mkdir -p out
	rm -f out/slat-amd.json out/slat-intel.json
	$(BALLAST) slat lab --vendor amd --twice --density --output out/slat-amd.json $(KERNEL_ROOT) || [ -e out/slat-amd.json ]
	$(BALLAST) slat lab --vendor intel --twice --output out/slat-intel.json $(KERNEL_ROOT) || [ -e out/slat-intel.json ]
	$(BALLAST) slat run --set full --output out/slat-here.json || [ $$? = 3 ]
	$(BALLAST) slat report out/slat-amd.json out/slat-intel.json out/slat-here.json --html out/slat.html --svg out/slat.svg
	@for vendor in amd intel; do grep -q '"difference": null' out/slat-$$vendor.json \
	  || { echo "two counted runs of $$vendor hosts differ: see the report" >&2; exit 1; }; done

slat-host: setup ## What this host's own SLAT gains, in out/slat-host.json to send on (half an hour; a real host)
	$(CARGO) build --release --package cli
	mkdir -p out
	$(BALLAST) slat all --output out/slat-host.json

deb: ## Debian packages of the command, of the guests' agent and of that for Pacemaker, in out/
	@$(call need,$(DEB_PACKAGES))
	packaging/build-deb

deb-test: ## Builds the packages twice to the same bytes, then installs, runs, upgrades and purges them in a root of their own
	@$(call need,$(DEB_PACKAGES) $(DEB_TEST_PACKAGES))
	rm -rf target/deb-first target/deb-again target/deb-second
	OUT=target/deb-first packaging/build-deb
	OUT=target/deb-again packaging/build-deb
	for deb in target/deb-first/*.deb; do cmp "$$deb" "target/deb-again/$$(basename "$$deb")" || exit 1; done
	OUT=target/deb-second DEB_REVISION=2 packaging/build-deb
	packaging/test-in-root target/deb-first target/deb-second
	packaging/test-under-systemd target/deb-first target/deb-second

fleet-test: ## Three hosts with the real Pacemaker, in namespaces, lose one after the other, ROUNDS=20 times (3); the model of its placement
	@$(call need,mmdebstrap pacemaker-cli-utils)
	$(CARGO) build --release --package cli
	packaging/test-fleet $(BALLAST) $(ROUNDS)
	$(CARGO) test --package sim --test pacemaker -- --ignored

lint: ## Formatting and clippy; licences and sources of all crates where cargo-deny is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --workspace check bans licenses sources; \
	else echo 'cargo-deny is not installed: licences and sources of crates were not checked'; fi

lab: setup $(if $(findstring intel,$(LAB_ARGS)),intel) ## A shell in an emulated host; LAB_ARGS="--vendor intel --ept 0 -- ballast check" runs a program
	$(CARGO) run --quiet --package lab -- run $(LAB_ARGS)

# Installs packages where one is missing.
need = dpkg-query -W -f='$${Status}\n' $(1) 2>/dev/null | grep -c '^install ok installed' | grep -qx $(words $(1)) \
	|| { $(SUDO) apt-get update && { $(INSTALL) $(1) || $(INSTALL) --allow-downgrades $(patsubst %,%/$(RELEASE),$(1)); }; }

# Most of what the lab does needs no Intel host; what does (`test`, `slat`, `lab` with `--vendor intel`) asks for it.
intel:
	@$(call need,$(INTEL_PACKAGES))

setup:
	@$(call need,$(PACKAGES))
	@apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || $(SUDO) apt-get update
