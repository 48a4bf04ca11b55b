# masquevpn: a CONNECT-IP (RFC 9484) VPN client and proxy. `make help` lists the targets.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -X masquevpn/internal/buildinfo.Version=$(VERSION)
# make builds with a patched copy of quic-go (docs/quic-go.md), by which .build/go.mod replaces the module. Plain go commands
# build with the stock quic-go, before and after make.
QUICGO  := .build/go.mod
USERFLAGS := $(filter-out -tags=% -modfile=%,$(shell $(GO) env GOFLAGS))
export GOFLAGS := $(USERFLAGS) -tags=quicpatch -modfile=$(CURDIR)/$(QUICGO)
# Environment for builds with the stock quic-go, and in nested modules.
STOCK   := GOFLAGS='$(USERFLAGS) -mod=readonly'
# Duration of each fuzz target in `make fuzz`.
FUZZTIME ?= 60s
# Debian packages whose programs the tests use.
TOOLS := bind9-dnsutils dbus-daemon iproute2 iputils-ping iperf3 knot nftables nginx-light pebble polkitd rpm systemd tcpdump traceroute unbound

# Packages that change the network of a host. They are installed on the machines of e2e-coexist only, because they would take over
# the network of this host.
FELLOWS := dnsmasq-base firewalld iptables isc-dhcp-client
# Duration of e2e-coexist.
TIME    ?= 1h

# Folder for systemd-resolved, which is unpacked only: an installed package would take over the name resolution of this host.
RESOLVED := bin/resolved
DOWNLOAD := apt-get -qq -o APT::Sandbox::User=root download

UNITS   := $$($(GO) list ./... | grep -v '/test$$')
# The end-to-end tests to run.
RUN     ?= .
E2E     = $(GO) test -count=1 -timeout 40m -run '$(RUN)' ./test
# Variants of the end-to-end tests (test/variant_test.go), and the tests that `make test` runs in each variant: packets of all
# sizes, in both directions and both families.
VARIANTS := e2e-plain-tun e2e-plain-udp e2e-stock e2e-race
FEW      := ^(TestVariant|TestPathMTU|TestReload|TestFragmentation|TestTwoSites|TestForwardUDP|TestForeign.*|TestWireICMP)$$

.PHONY: build packages demo test check race fuzz e2e e2e-few e2e-matrix $(VARIANTS) e2e-packages e2e-coexist coexist-packages bench bench-quick bench-tools lint tools clean help

$(QUICGO): go.mod go.sum internal/quicpatch/apply.sh $(wildcard internal/quicpatch/patches/*) $(shell find internal/quicpatch/files -type f)
	rm -rf vendor # left by older versions of this Makefile; go would use it
	internal/quicpatch/apply.sh $(@D)

build: $(QUICGO) ## build the three programs into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

# Versions of packages begin with a digit. Untagged versions sort before all tagged ones.
PKG_VERSION ?= $(or $(patsubst v%,%,$(shell git describe --tags --match 'v[0-9]*' 2>/dev/null)),0~git$(shell git log -1 --format=%cd.%h --date=format:%Y%m%d%H%M%S))
export PKG_VERSION
export ARCH ?= $(shell $(GO) env GOARCH)
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)

packages: build ## build dist/*.deb and dist/*.rpm
	rm -rf dist
	mkdir -p dist/root/bin $(addprefix dist/root/completion/,bash zsh fish)
	cp bin/masque-client bin/masque-proxy dist/root/bin/
	for p in masque-client masque-proxy; do \
		bin/$$p man dist/root/man1 && \
		bin/$$p completion bash > dist/root/completion/bash/$$p && \
		bin/$$p completion zsh > dist/root/completion/zsh/_$$p && \
		bin/$$p completion fish > dist/root/completion/fish/$$p.fish || exit 1; \
	done
	gzip -9n dist/root/man1/*.1
	cd packaging && $(STOCK) $(GO) build -o ../dist/nfpm github.com/goreleaser/nfpm/v2/cmd/nfpm
	for format in deb rpm; do dist/nfpm package --config packaging/nfpm.yaml --packager $$format --target dist/ || exit 1; done

demo: build ## show a tunnel between hosts in network namespaces
	bin/masque-lab demo

ifdef PKG
test: $(if $(filter %/test,$(PKG:/=)),build tools,$(QUICGO))
	$(GO) test -count=1 $(if $(filter %/test,$(PKG:/=)),,-race) -run '$(RUN)' $(PKG)
else
test: lint race e2e e2e-few $(if $(filter 0,$(shell id -u)),e2e-packages) ## everything that must pass before a change is merged; PKG=./proxy RUN=TestSite: some tests of one package
endif

check: lint ## lint and unit tests in two minutes, without root or installing anything
	$(GO) test -p 6 $(UNITS)

race: $(QUICGO) tools ## unit tests and the seeds of fuzz targets with the race detector
	$(GO) test -race $(UNITS)

e2e: build tools ## end-to-end tests in network namespaces; RUN=REGEXP selects some
	$(E2E)

e2e-few: RUN = $(FEW)
e2e-few: $(VARIANTS) ## some end-to-end tests in all variants

e2e-matrix: e2e $(VARIANTS) ## all end-to-end tests in all variants, and unit tests with the stock quic-go
	$(STOCK) $(GO) test -race $(UNITS)

e2e-plain-tun: build tools ## end-to-end tests with tun.offload = false
	$(E2E) -tun-offload=false

e2e-plain-udp: build tools ## end-to-end tests without UDP GSO and GRO
	$(E2E) -udp-offload=false

e2e-stock: build tools ## end-to-end tests with the stock quic-go
	$(STOCK) $(E2E)

e2e-race: build tools ## end-to-end tests with the race detector in programs and tests
	GOFLAGS='$(GOFLAGS) -race' $(E2E)

e2e-packages: packages tools coexist-packages ## install, run, upgrade and remove the packages, with systemd in namespaces (root)
	cd packaging && export $(STOCK) && $(GO) vet . && $(GO) test -count=1 -timeout 15m .

e2e-coexist: packages tools coexist-packages ## run beside systemd-networkd, firewalld, containers and DHCP for TIME (1h) (root)
	cd packaging && $(STOCK) $(GO) test -count=1 -timeout 0 -run TestCoexistence -coexist-time $(TIME) -v .

FETCH := apt-get -qq -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=120 -o Dir::Cache::archives=$(CURDIR)/bin/coexist \
	install -y --download-only --no-install-recommends $(FELLOWS)

coexist-packages:
	@mkdir -p bin/coexist/partial && { $(FETCH) || { apt-get update -qq && $(FETCH); }; }

fuzz: $(QUICGO) ## run every fuzz target for FUZZTIME (60s)
	@for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "$$pkg $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$pkg || exit 1; \
		done; \
	done

bench: bench-tools ## compare with wireguard-go and a plain reference (docs/performance.md); BENCH="-case REGEXP"
	bin/bench/bench -json artifacts/bench.json $(BENCH)
	$(GO) test -run '^$$' -bench . -benchmem ./internal/connectip ./internal/ippacket ./proxy

bench-quick: bench-tools ## the most important cases, in less than three minutes
	bin/bench/bench -quick -json artifacts/bench-quick.json $(BENCH)

bench-tools: build tools ## build bin/bench/bench for `make bench`
	cd test/bench && $(STOCK) $(GO) build -buildvcs=false -o ../../bin/bench/ . golang.zx2c4.com/wireguard
	mkdir -p artifacts

lint: $(QUICGO) ## gofmt, stylecheck, go vet, staticcheck, and the import rules
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted: $$unformatted"; exit 1; fi
	$(GO) run ./internal/stylecheck $$(git ls-files '*.go')
	$(GO) vet ./...
	cd test/bench && $(STOCK) $(GO) vet ./...
	$(STOCK) $(GO) vet ./...
	GOWORK=$(CURDIR)/.build/go.work GOFLAGS='$(USERFLAGS) -tags=quicpatch' $(GO) tool staticcheck ./...
	GOWORK=$(CURDIR)/.build/go.work GOFLAGS='$(USERFLAGS) -tags=quicpatch' $(GO) tool depguard ./...

tools: ## install the Debian packages that the tests need (root)
	@missing=; for p in $(TOOLS); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ]; then echo "please install:$$missing"; exit 1; fi; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi
	@if [ ! -x /lib/systemd/systemd-resolved ] && [ ! -x $(RESOLVED)/lib/systemd/systemd-resolved ]; then \
		mkdir -p $(RESOLVED) && cd $(RESOLVED) && \
		{ $(DOWNLOAD) systemd-resolved || { apt-get update -qq && $(DOWNLOAD) systemd-resolved; }; } && \
		dpkg -x systemd-resolved_*.deb . && rm systemd-resolved_*.deb; \
	fi

clean: ## remove all build results
	rm -rf bin dist artifacts .build vendor

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
