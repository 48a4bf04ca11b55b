package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"masquevpn/internal/lab"
)

// targets are the addresses of the host behind the proxy.
var targets = []netip.Addr{lab.TargetIPv4, lab.TargetIPv6}

// useSteps uses the tunnel for typical traffic.
func (p *pair) useSteps() []step {
	var steps []step
	for _, to := range targets {
		steps = append(steps, step{"ping the target, " + family(to),
			func(ctx context.Context) (string, error) {
				return p.ping(ctx, p.topo.Client, to)
			}})
	}
	for _, to := range targets {
		steps = append(steps, step{"download from the target, " + family(to),
			func(ctx context.Context) (string, error) {
				return p.download(ctx, p.topo.Client, p.topo.Target, to)
			}})
	}
	for _, to := range targets {
		steps = append(steps, step{"traceroute to the target, " + family(to),
			func(ctx context.Context) (string, error) {
				return p.traceroute(ctx, to)
			}})
	}
	return append(steps, step{"masque-client status", p.showStatus})
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func (p *pair) ping(ctx context.Context, from *lab.Host, to netip.Addr) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	rtt, err := from.Ping(ctx, to)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s answers in %s", to, duration(rtt)), nil
}

// downloadSize is the size of the served file in bytes.
const downloadSize = 32 << 20

// download fetches the file from a web server on a host, at one of its
// addresses, and compares its hash with the original's.
func (p *pair) download(ctx context.Context, to, from *lab.Host, at netip.Addr) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	address := net.JoinHostPort(at.String(), "80")
	ln, err := from.Listen("tcp", address)
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.Copy(w, content()) // the client checks the hash
	})}
	go server.Serve(ln)
	defer server.Close()

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		return "", err
	}
	transport := &http.Transport{DialContext: to.DialContext, DisableKeepAlives: true}
	begin := time.Now()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	got, want := sha256.New(), sha256.New()
	n, err := io.Copy(got, resp.Body)
	took := time.Since(begin)
	if err != nil {
		return "", fmt.Errorf("after %s: %w", byteCount(uint64(n)), err)
	}
	if _, err := io.Copy(want, content()); err != nil {
		return "", err
	}
	if string(got.Sum(nil)) != string(want.Sum(nil)) {
		return "", fmt.Errorf("SHA-256 of the %s that arrived is %x, and not %x",
			byteCount(uint64(n)), got.Sum(nil), want.Sum(nil))
	}
	return fmt.Sprintf("%s, SHA-256 is right, %.0f Mbit/s", byteCount(uint64(n)),
		float64(n)*8/1e6/took.Seconds()), nil
}

// content returns the served file, the same each time.
func content() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{'m', 'a', 's', 'q', 'u', 'e'}), downloadSize)
}

// traceroute checks that the path goes through the proxy's end of the tunnel
// and then to the target.
func (p *pair) traceroute(ctx context.Context, to netip.Addr) (string, error) {
	hops, err := p.topo.Client.Traceroute(ctx, to, 8, 3*time.Second)
	if err != nil {
		return "", err
	}
	path := hopNames(hops)
	if len(hops) != 2 || hops[0].Silent || !hops[1].Echo || hops[1].From != to {
		return "", fmt.Errorf("the hops are %s, want the proxy and %s", path, to)
	}
	return path, nil
}

func hopNames(hops []lab.Hop) string {
	names := make([]string, len(hops))
	for i, h := range hops {
		names[i] = "no answer"
		if !h.Silent {
			names[i] = h.From.String()
		}
	}
	return strings.Join(names, ", ")
}

func (p *pair) showStatus(ctx context.Context) (string, error) {
	s, err := p.readStatus(ctx, user)
	if err != nil {
		return "", err
	}
	if s.Packets.RX == 0 || s.Packets.TX == 0 {
		return "", errors.New("it counted no packets, although some went through the tunnel")
	}
	return p.run(ctx, p.topo.Client, p.programs.client, "status", user)
}

// byteCount formats a number of bytes in SI units.
func byteCount(n uint64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1000, 0
	for v >= 1000 && i < len(units)-1 {
		v, i = v/1000, i+1
	}
	return fmt.Sprintf("%.1f %cB", v, units[i])
}
