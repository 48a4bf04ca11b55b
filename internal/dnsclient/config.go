package dnsclient

import (
	"bufio"
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const dnsPort = 53

// A HostConfig is the host's configuration of its resolver (resolv.conf(5)), as
// far as it is used: search domains and retries are not.
type HostConfig struct {
	Servers []netip.AddrPort
	TrustAD bool // the servers, and the path to them, are trusted to validate
}

// ReadConfig reads a resolv.conf. Without a server, or without the file, the
// server is on this host, as it is for the C library.
func ReadConfig(path string) HostConfig {
	data, _ := os.ReadFile(path)
	c := parseConfig(data)
	if len(c.Servers) == 0 {
		c.Servers = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}),
			dnsPort)}
	}
	return c
}

func parseConfig(data []byte) (c HostConfig) {
	for line := range bytes.Lines(data) {
		if i := bytes.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		fields := strings.Fields(string(line))
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(fields[1]); err == nil {
				c.Servers = append(c.Servers, netip.AddrPortFrom(a, dnsPort))
			}
		case "options":
			c.TrustAD = c.TrustAD || slices.Contains(fields[1:], "trust-ad")
		}
	}
	return c
}

// A HostsFile is the host's own table of names (hosts(5)).
type HostsFile struct {
	Path string

	mu      sync.Mutex // guards the following
	changed time.Time  // the file's, when it was read
	size    int64
	names   map[string][]netip.Addr
}

// Lookup returns the addresses of a name in lower case without the final dot.
// It reads the file again when it changed.
func (h *HostsFile) Lookup(name string) []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	info, err := os.Stat(h.Path)
	if err != nil {
		h.names = nil
		return nil
	}
	if h.names == nil || !info.ModTime().Equal(h.changed) || info.Size() != h.size {
		data, err := os.ReadFile(h.Path)
		if err != nil {
			return nil
		}
		h.names, h.changed, h.size = parseHosts(data), info.ModTime(), info.Size()
	}
	return slices.Clone(h.names[name])
}

func parseHosts(data []byte) map[string][]netip.Addr {
	names := make(map[string][]netip.Addr)
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		a, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		for _, name := range fields[1:] {
			name = strings.ToLower(strings.TrimSuffix(name, "."))
			names[name] = append(names[name], a)
		}
	}
	return names
}

// LookupLocal looks up the addresses of a name as any program of the host does,
// with its search domains, but by sockets that control prepares. servers, if
// there are any, are asked in place of all of the host's servers, or of those
// on this host alone.
func LookupLocal(ctx context.Context, name string, servers []netip.AddrPort, all bool,
	control func(network, address string, c syscall.RawConn) error) ([]netip.Addr, error) {
	d := net.Dialer{Control: control}
	next := 0
	var mu sync.Mutex // guards next
	r := net.Resolver{PreferGo: true,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			a, err := netip.ParseAddrPort(address)
			if len(servers) > 0 && (all || err == nil && a.Addr().IsLoopback()) {
				mu.Lock()
				address = servers[next%len(servers)].String()
				next++
				mu.Unlock()
			}
			return d.DialContext(ctx, network, address)
		}}
	addrs, err := r.LookupNetIP(ctx, "ip", name)
	if notFound, ok := err.(*net.DNSError); ok && notFound.IsNotFound {
		return nil, nil
	}
	return addrs, err
}
