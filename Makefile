# masquevpn: a CONNECT-IP (RFC 9484) VPN client and proxy. `make help` lists the targets.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -X masquevpn/internal/buildinfo.Version=$(VERSION)
# make builds with a patched copy of quic-go (docs/quic-go.md): .build/go.mod replaces the module by it. Plain go commands build
# with the stock quic-go, before and after make.
QUICGO  := .build/go.mod
USERFLAGS := $(filter-out -tags=% -modfile=%,$(shell $(GO) env GOFLAGS))
export GOFLAGS := $(USERFLAGS) -tags=quicpatch -modfile=$(CURDIR)/$(QUICGO)
# Builds with the stock quic-go, and in the modules below this one.
STOCK   := GOFLAGS='$(USERFLAGS) -mod=readonly'
# How long each fuzz target runs in `make fuzz`.
FUZZTIME ?= 60s
# Debian packages that the tests use as the other side: real programs, real packets.
TOOLS := dbus-daemon iproute2 iputils-ping iperf3 nftables pebble polkitd rpm systemd tcpdump traceroute

# Other programs that change the network of a host: they are installed on the machines of e2e-coexist alone, because they would take over the
# network of this one.
FELLOWS := dnsmasq-base firewalld iptables isc-dhcp-client
# How long they are at work.
TIME    ?= 1h

# Where systemd-resolved is unpacked: its package, once installed, would take over the name resolution of this machine.
RESOLVED := bin/resolved
DOWNLOAD := apt-get -qq -o APT::Sandbox::User=root download

UNITS   := $$($(GO) list ./... | grep -v '/test$$')
# The end-to-end tests, and which of them.
RUN     ?= .
E2E     = $(GO) test -count=1 -timeout 40m -run '$(RUN)' ./test
# Their variants (test/variant_test.go), and what `make test` runs in each: packets of all sizes, both ways, by either protocol.
VARIANTS := e2e-plain-tun e2e-plain-udp e2e-stock e2e-race
FEW      := ^(TestVariant|TestPathMTU|TestReload|TestFragmentation|TestTwoSites|TestForwardUDP|TestForeign.*|TestWireICMP)$$

.PHONY: build packages demo test check race fuzz e2e e2e-few e2e-matrix $(VARIANTS) e2e-packages e2e-coexist coexist-packages bench bench-quick bench-tools lint tools clean help

$(QUICGO): go.mod go.sum internal/quicpatch/apply.sh $(wildcard internal/quicpatch/patches/*) $(shell find internal/quicpatch/files -type f)
	rm -rf vendor # of older versions of this Makefile: go would take it
	internal/quicpatch/apply.sh $(@D)

build: $(QUICGO) ## build the three programs into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

# Versions of packages begin with a digit; what is not tagged comes before all that is.
PKG_VERSION ?= $(or $(patsubst v%,%,$(shell git describe --tags --match 'v[0-9]*' 2>/dev/null)),0~git$(shell git log -1 --format=%cd.%h --date=format:%Y%m%d%H%M%S))
export PKG_VERSION
export ARCH ?= $(shell $(GO) env GOARCH)
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)

packages: build ## dist/*.deb and dist/*.rpm
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

demo: build ## a tunnel between hosts on this machine, in network namespaces
	bin/masque-lab demo

ifdef PKG
test: $(if $(filter %/test,$(PKG:/=)),build tools,$(QUICGO))
	$(GO) test -count=1 $(if $(filter %/test,$(PKG:/=)),,-race) -run '$(RUN)' $(PKG)
else
test: lint race e2e e2e-few $(if $(filter 0,$(shell id -u)),e2e-packages) ## everything that has to pass before a change goes in; PKG=./proxy RUN=TestSite: some tests of one package
endif

check: lint ## lint and unit tests: no root, nothing to install, two minutes
	$(GO) test $(UNITS)

race: $(QUICGO) tools ## unit tests with the race detector, and the seeds of the fuzz targets
	$(GO) test -race $(UNITS)

e2e: build tools ## end-to-end tests in network namespaces; RUN=REGEXP: some of them
	$(E2E)

e2e-few: RUN = $(FEW)
e2e-few: $(VARIANTS) ## a few of them in all variants

e2e-matrix: e2e $(VARIANTS) ## all in all variants; and the unit tests with the stock quic-go
	$(STOCK) $(GO) test -race $(UNITS)

e2e-plain-tun: build tools ## with tun.offload = false
	$(E2E) -tun-offload=false

e2e-plain-udp: build tools ## on a kernel without UDP GSO and GRO
	$(E2E) -udp-offload=false

e2e-stock: build tools ## with the stock quic-go
	$(STOCK) $(E2E)

e2e-race: build tools ## with the race detector in programs and tests
	GOFLAGS='$(GOFLAGS) -race' $(E2E)

e2e-packages: packages tools coexist-packages ## the packages installed, run as services, upgraded and removed, with systemd in namespaces (root)
	cd packaging && export $(STOCK) && $(GO) vet . && $(GO) test -count=1 -timeout 15m .

e2e-coexist: packages tools coexist-packages ## a client and a proxy beside systemd-networkd, firewalld, containers and DHCP for TIME (1h) (root)
	cd packaging && $(STOCK) $(GO) test -count=1 -timeout 0 -run TestCoexistence -coexist-time $(TIME) -v .

FETCH := apt-get -qq -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=120 -o Dir::Cache::archives=$(CURDIR)/bin/coexist \
	install -y --download-only --no-install-recommends $(FELLOWS)

coexist-packages:
	@mkdir -p bin/coexist/partial && { $(FETCH) || { apt-get update -qq && $(FETCH); }; }

fuzz: $(QUICGO) ## every fuzz target for FUZZTIME (60s)
	@for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "$$pkg $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$pkg || exit 1; \
		done; \
	done

bench: bench-tools ## our tunnel, wireguard-go and a plain reference by turns (docs/performance.md); BENCH="-case REGEXP"
	bin/bench/bench -json artifacts/bench.json $(BENCH)
	$(GO) test -run '^$$' -bench . -benchmem ./internal/connectip ./internal/ippacket ./proxy

bench-quick: bench-tools ## the most telling cases of it, in less than three minutes
	bin/bench/bench -quick -json artifacts/bench-quick.json $(BENCH)

bench-tools: build tools ## what `make bench` runs: bin/bench/bench
	cd test/bench && $(STOCK) $(GO) build -buildvcs=false -o ../../bin/bench/ . golang.zx2c4.com/wireguard
	mkdir -p artifacts

lint: $(QUICGO) ## gofmt, go vet, staticcheck, and the rules on who imports whom
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted: $$unformatted"; exit 1; fi
	$(GO) run ./internal/stylecheck $$(git ls-files '*.go')
	$(GO) vet ./...
	cd test/bench && $(STOCK) $(GO) vet ./...
	$(STOCK) $(GO) vet ./...
	GOWORK=$(CURDIR)/.build/go.work GOFLAGS='$(USERFLAGS) -tags=quicpatch' $(GO) tool staticcheck ./...
	GOWORK=$(CURDIR)/.build/go.work GOFLAGS='$(USERFLAGS) -tags=quicpatch' $(GO) tool depguard ./...

tools: ## the programs that the tests need (Debian packages; as root, but for systemd-resolved)
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

clean: ## remove what the build made
	rm -rf bin dist artifacts .build vendor

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
