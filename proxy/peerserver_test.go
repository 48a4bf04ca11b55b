package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"masquevpn/internal/discovery"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/logtest"
	hostresolver "masquevpn/internal/resolver"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// peerEnd is a proxy that stands for a domain.
type peerEnd struct {
	*Server
	cfg    Config
	device *tuntest.Device
	log    *logtest.Buffer
	stop   func()
}

// startPeer starts a proxy for domain on a socket, with the network behind it.
func startPeer(t *testing.T, ca *peerCA, domain string, socket *net.UDPConn, network netip.Prefix,
	peers ...Peer) *peerEnd {
	t.Helper()
	e := &peerEnd{device: tuntest.New(1400), log: new(logtest.Buffer)}
	e.cfg = Config{Name: domain, Sockets: []*net.UDPConn{socket},
		TLS:         &tls.Config{Certificates: []tls.Certificate{*ca.issue(t, domain)}},
		Methods:     []string{MethodToken},
		Users:       byToken{"u"},
		Pool4:       netip.MustParsePrefix("10.77.0.0/24"),
		Advertise:   []netip.Prefix{network},
		Federation:  Federation{CA: ca.pool(), Resolver: hostresolver.New(hostresolver.Config{})},
		Peers:       peers,
		Logger:      slog.New(slog.NewTextHandler(e.log, nil)),
		OpenDevice:  func() (Device, error) { return e.device, nil },
		OpenNetwork: func(Device) (Network, error) { return new(routingtest.Network), nil },
		LocalNetworks: func() ([]netip.Prefix, error) {
			return nil, nil
		},
	}
	s, err := New(e.cfg)
	if err != nil {
		t.Fatal(err)
	}
	e.Server = s
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	e.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the proxy of %s ended with %v", domain, err)
		}
	}
	<-s.Ready()
	return e
}

// newPeerSocket returns a UDP socket and its address as the server of a peer.
func newPeerSocket(t *testing.T) (*net.UDPConn, discovery.Name) {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	n, err := discovery.ParseName(c.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	return c, n
}

// await waits until ok returns true.
func await(t *testing.T, what string, ok func() bool, log *logtest.Buffer) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s; log:\n%s", what, log)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Two proxies that dial each other link their networks, and keep one stream.
func TestPeersLink(t *testing.T) {
	ca := newPeerCA(t)
	socketA, serverA := newPeerSocket(t)
	socketB, serverB := newPeerSocket(t)
	netA, netB := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("10.2.0.0/24")
	b := startPeer(t, ca, "b.example", socketB, netB, Peer{Domain: "a.example", Connect: true,
		Server: serverA, Networks: []netip.Prefix{netA}, Reach: []netip.Prefix{netB}})
	defer b.stop()
	a := startPeer(t, ca, "a.example", socketA, netA, Peer{Domain: "b.example", Connect: true,
		Server: serverB, Networks: []netip.Prefix{netB}, Reach: []netip.Prefix{netA}})
	defer a.stop()
	connected := func(e *peerEnd, network netip.Prefix) func() bool {
		return func() bool {
			p := e.Peers()[0]
			return p.State == PeerConnected && slices.Equal(p.Networks, []netip.Prefix{network})
		}
	}
	await(t, "the link at a", connected(a, netB), a.log)
	await(t, "the link at b", connected(b, netA), b.log)
	alone := func() bool { return len(a.Sessions()) == 1 && len(b.Sessions()) == 1 }
	await(t, "one stream", alone, a.log)
	await(t, "the link at a", connected(a, netB), a.log)
	if p := a.Peers()[0]; p.Identity != "certificate" || p.Server != "b.example" {
		t.Errorf("got %+v, want the identity certificate of b.example", p)
	}

	// A packet in each direction.
	for _, d := range []struct {
		name     string
		from, to *peerEnd
		src, dst string
	}{
		{"to b", a, b, "10.1.0.5", "10.2.0.7"}, {"to a", b, a, "10.2.0.7", "10.1.0.5"},
	} {
		t.Run(d.name, func(t *testing.T) {
			packet := ippacket.AppendEcho(nil, netip.MustParseAddr(d.src),
				netip.MustParseAddr(d.dst), 64, true, 7, 1, []byte(d.name))
			await(t, "a packet", func() bool {
				d.from.device.Inject(bytes.Clone(packet))
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
				defer cancel()
				got, err := d.to.device.Receive(ctx)
				return err == nil && bytes.HasSuffix(got, []byte(d.name))
			}, d.to.log)
		})
	}

	// The operator ends the pair; it comes back.
	if n, ok := a.DisconnectPeer("b.example"); n != 1 || !ok {
		t.Errorf("ended %d pairs, %v; want 1", n, ok)
	}
	await(t, "the link again", connected(b, netA), b.log)
}

// Of two streams of a pair, the one that the lesser domain dialed is left after
// 1 s, at both ends.
func TestPeersDialedBoth(t *testing.T) {
	for _, tc := range []struct {
		name          string
		domain, local string
		keep          []bool // ours, for each stream in the order of their begin
		dialed        []bool
	}{
		{"we are the lesser", "b.example", "a.example", []bool{true, false}, []bool{true, false}},
		{"we are the greater", "a.example", "b.example", []bool{false, true}, []bool{true, false}},
		{"theirs came first", "b.example", "a.example", []bool{false, true}, []bool{false, true}},
		{"two of theirs", "b.example", "a.example", []bool{true, true}, []bool{false, false}},
		{"one of ours", "b.example", "a.example", []bool{true}, []bool{true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				changes := 0
				table := &bindings{changed: func(pairKey) { changes++ }}
				var list []*ipSession
				for _, dialed := range tc.dialed {
					ss := newIPSession()
					ss.link = &link{pair: pairKey{tc.domain, tc.local},
						conn: &peerConn{dialed: dialed}}
					ss.ctx, ss.stop = context.WithCancelCause(t.Context())
					list = append(list, ss)
					table.add(ss)
				}
				time.Sleep(999 * time.Millisecond)
				synctest.Wait()
				for i, ss := range list {
					if ss.ctx.Err() != nil {
						t.Errorf("stream %d ended before 1 s", i)
					}
				}
				time.Sleep(time.Millisecond)
				synctest.Wait()
				for i, ss := range list {
					if kept := ss.ctx.Err() == nil; kept != tc.keep[i] {
						t.Errorf("stream %d: kept %v, want %v", i, kept, tc.keep[i])
					}
					table.remove(ss)
				}
				if changes != 2*len(list) {
					t.Errorf("told of %d changes, want %d", changes, 2*len(list))
				}
			})
		})
	}
}
