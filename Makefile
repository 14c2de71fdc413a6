# Conclave. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN     := bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 20s
# The race detector watches everything but the field arithmetic and the permutations of the
# cryptographic libraries: they share nothing between goroutines, and take ten times as long
# under it.
ARITHMETIC := crypto/internal/fips140/nistec/fiat crypto/internal/fips140/edwards25519/field crypto/internal/fips140/mlkem \
  $(addprefix github.com/cloudflare/circl/,internal/sha3 sign/internal/dilithium pke/kyber/internal/common)
RACE := -race $(ARITHMETIC:%=-gcflags=%=-race=false)
export CGO_ENABLED := 1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install-deps
install-deps: ## install SoftHSM, swtpm, a C compiler and python3-cryptography where missing (Debian/Ubuntu), or name them
	@.ci/install-deps

.PHONY: build
build: install-deps ## build bin/conclaved and bin/conclave
	@mkdir -p $(BIN)
	@go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

.PHONY: demo
demo: build ## the main job, narrated: three nations, one rotation approved across borders
	@go run ./test/demo -bin $(BIN)

.PHONY: test
test: install-deps ## every test, with the race detector (PKG and RUN narrow it)
	@go test $(RACE) -p 4 -timeout 15m $(if $(RUN),-run '$(RUN)') $(or $(PKG),./...)

MINUTES ?= 10
.PHONY: fault
fault: install-deps ## break a coalition of real nodes for MINUTES (10); SEED repeats the choice of faults
	@CONCLAVE_FAULT_MINUTES=$(MINUTES) CONCLAVE_FAULT_SEED=$(SEED) CONCLAVE_FAULT_KILLS=20 \
	  go test $(RACE) -count=1 -v -timeout $$(( $(MINUTES) + 15 ))m ./test/fault/chaos

ROTATIONS ?= 500
.PHONY: rotations
rotations: install-deps ## ROTATIONS (500) rotations under kills and cuts, with clients at every site that open old and new ciphertexts
	@CONCLAVE_FAULT_TURNS=$(ROTATIONS) CONCLAVE_FAULT_SEED=$(SEED) \
	  go test $(RACE) -count=1 -v -timeout 90m -run '^TestRotations$$' ./test/fault/chaos

.PHONY: upgrade
upgrade: install-deps ## a rolling upgrade from the previous release, under load (it needs the history of the repository)
	@go test $(RACE) -tags fault -count=1 -v -timeout 20m ./test/fault/upgrade

MUTANTS ?= 1000000
.PHONY: mutants
mutants: ## MUTANTS (1000000) changed, spliced, replayed and wrongly signed commands and approvals: none is carried out; SEED repeats them
	@CONCLAVE_MUTANTS=$(MUTANTS) CONCLAVE_MUTANTS_SEED=$(SEED) go test -count=1 -v -timeout 60m -run '^TestMutants' ./kms/state

FILES ?= 200
.PHONY: interop
interop: install-deps ## the Go and the Python verifier of evidence on FILES (200) tampered files of each class; SEED repeats the choice
	@CONCLAVE_INTEROP_FILES=$(FILES) CONCLAVE_INTEROP_SEED=$(SEED) go test -count=1 -v -timeout 30m ./test/interop

FLIPS ?= 2000
.PHONY: flips
flips: ## FLIPS (2000) random single-byte corruptions of a node's disk: each is found or harmless
	@CONCLAVE_FLIPS=$(FLIPS) go test -count=1 -v -timeout 60m -run '^TestBitFlips$$' ./cluster

.PHONY: check
check: install-deps ## formatting, vet, staticcheck, import direction, tidy modules
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt is needed on:"; echo "$$out"; exit 1; fi
	@go mod tidy -diff || { echo "run: go mod tidy"; exit 1; }
	@go mod verify >/dev/null
	@go vet -tags fault ./...
	@go tool staticcheck -tags fault ./...
	@go test -count=1 ./test/arch
	@echo "check: ok"

SCHEDULES ?= 10000
.PHONY: sim
sim: ## simulated clusters under random faults: SCHEDULES (10000) from SEED on; a violation names its seed
	@SIM_SEED=$(SEED) SIM_SCHEDULES=$(SCHEDULES) go test -count=1 -v -timeout 0 -run '^TestSchedules$$' ./cluster/clustertest/sim

.PHONY: bench
bench: build ## speed as ratios measured in one run, and the devices' raw rates
	@go run ./test/bench -bin $(BIN)

KEYS ?= 100000
.PHONY: backup-bench
backup-bench: ## a backup of KEYS (100000): time and peak memory of create, verify and restore, and the size
	@go test ./test/bench -run '^$$' -bench '^BenchmarkBackup$$' -benchtime 1x -timeout 60m -keys $(KEYS)

.PHONY: fuzz
fuzz: install-deps ## run every fuzz target for FUZZTIME (20s)
	@for pkg in $$(go list ./...); do \
	  for f in $$(go test -list '^Fuzz' $$pkg 2>/dev/null | grep '^Fuzz' || true); do \
	    echo "fuzz $$pkg $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$pkg; \
	  done; \
	done
