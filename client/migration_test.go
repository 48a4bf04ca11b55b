package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"masquevpn/internal/congestion"
	"masquevpn/internal/dial"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/logtest"
	"masquevpn/proxy"
	"masquevpn/routing"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// fakeUnderlay is an Underlay that a test changes.
type fakeUnderlay struct {
	mu      sync.Mutex
	nextHop routing.NextHop
	err     error
	changed chan struct{}
}

func newFakeUnderlay() *fakeUnderlay {
	return &fakeUnderlay{nextHop: routing.NextHop{Interface: "eth0",
		Source: netip.MustParseAddr("192.0.2.1")},
		changed: make(chan struct{}, 1)}
}

func (u *fakeUnderlay) NextHop(netip.Addr) (routing.NextHop, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.nextHop, u.err
}

func (u *fakeUnderlay) Changed() <-chan struct{} { return u.changed }
func (u *fakeUnderlay) Close() error             { return nil }

// set changes the source address of the next hop and the error of NextHop.
func (u *fakeUnderlay) set(source string, err error) {
	u.mu.Lock()
	u.nextHop.Source, u.err = netip.MustParseAddr(source), err
	u.mu.Unlock()
	u.changed <- struct{}{}
}

func (u *fakeUnderlay) open() (Underlay, error) { return u, nil }

// nat is a router with network address translation between a client and a
// proxy.
type nat struct {
	t      *testing.T
	inside *net.UDPConn
	proxy  *net.UDPAddr
	drop   atomic.Bool // drop all packets

	mu       sync.Mutex
	bindings map[netip.AddrPort]*net.UDPConn // key: the client's address
	running  sync.WaitGroup
}

func newNAT(t *testing.T, f *testProxy) *nat {
	t.Helper()
	to, err := net.ResolveUDPAddr("udp", f.addr)
	must(err)
	inside, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(err)
	n := &nat{t: t, inside: inside, proxy: to, bindings: make(map[netip.AddrPort]*net.UDPConn)}
	n.running.Go(n.outbound)
	t.Cleanup(func() {
		_ = inside.Close()
		n.rebind()
		n.running.Wait()
	})
	f.addr = inside.LocalAddr().String()
	return n
}

func (n *nat) outbound() {
	b := make([]byte, 1<<16)
	for {
		size, from, err := n.inside.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if !n.drop.Load() {
			_, _ = n.binding(from).Write(b[:size])
		}
	}
}

// binding returns the socket that sends the packets of a client's address.
func (n *nat) binding(from netip.AddrPort) *net.UDPConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c := n.bindings[from]; c != nil {
		return c
	}
	c, err := net.DialUDP("udp", nil, n.proxy)
	must(err)
	n.bindings[from] = c
	n.running.Go(func() {
		b := make([]byte, 1<<16)
		for {
			size, err := c.Read(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil && !n.drop.Load() {
				_, _ = n.inside.WriteToUDPAddrPort(b[:size], from)
			}
		}
	})
	return c
}

// rebind removes all bindings: later packets leave from other ports, and
// packets to the old ports are lost.
func (n *nat) rebind() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for from, c := range n.bindings {
		_ = c.Close()
		delete(n.bindings, from)
	}
}

func onlySession(t *testing.T, f *testProxy) proxy.SessionStatus {
	t.Helper()
	all := f.Sessions()
	if len(all) != 1 {
		t.Fatalf("the proxy has %d sessions, want 1", len(all))
	}
	return all[0]
}

// The proxy follows a client whose outer address changes repeatedly without the
// client's knowledge.
func TestNATRebinding(t *testing.T) {
	f := startProxy(t, nil)
	nat := newNAT(t, f)
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	before := onlySession(t, f)
	rounds := 8
	if !congestion.Selectable { // stock quic-go loses a connection ID each time
		rounds = 2
	}
	for range rounds {
		was := onlySession(t, f).Remote
		nat.rebind()
		eventually(t, "the proxy sees the new address", func() bool {
			return passes(n, f) && onlySession(t, f).Remote != was
		})
	}
	if after := onlySession(t, f); after.ID != before.ID {
		t.Error("the session is another one")
	}
	if s := n.Status(); s.Reconnects != 0 || s.Migrations != 0 {
		t.Errorf("%d reconnects and %d migrations, want none", s.Reconnects,
			s.Migrations)
	}
}

// When the next hop to the proxy changes, repeatedly, the session migrates to a
// new path each time and closes the old sockets.
func TestNextHopChanges(t *testing.T) {
	f := startProxy(t, nil)
	nat := newNAT(t, f)
	u := newFakeUnderlay()
	n := startClient(t, f, func(c *Config) { c.OpenUnderlay = u.open })
	n.awaitConnected(t)
	before, descriptors := onlySession(t, f), openFiles(t)
	for i := range 8 {
		was := onlySession(t, f).Remote
		u.set(fmt.Sprintf("192.0.2.%d", 10+i), nil)
		n.await(t, "on the new path", func(s Status) bool {
			return s.State == StateConnected && s.Reason == "" &&
				int(s.Underlay.Source.As4()[3]) == 10+i
		})
		eventually(t, "the proxy sends there too", func() bool {
			return !congestion.Selectable || onlySession(t, f).Remote != was
		})
		eventually(t, "packets pass", func() bool { return passes(n, f) })
	}
	if after := onlySession(t, f); after.ID != before.ID {
		t.Error("the session is another one")
	}
	if s := n.Status(); s.Reconnects != 0 || s.Migrations != 8 {
		t.Errorf("%d reconnects and %d migrations, want 0 and 8", s.Reconnects, s.Migrations)
	}
	nat.rebind()
	if now := openFiles(t); now > descriptors+2 {
		t.Errorf("%d files are open, want at most 2 more than %d", now, descriptors)
	}
}

// openFiles returns the number of open descriptors of this process.
func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// A session survives while the host has no route to the proxy for a moment, and
// the status shows it.
func TestNoRouteToProxy(t *testing.T) {
	f := startProxy(t, nil)
	u := newFakeUnderlay()
	n := startClient(t, f, func(c *Config) { c.OpenUnderlay = u.open })
	n.awaitConnected(t)
	before := onlySession(t, f)
	u.set("192.0.2.1", errors.New("no route to the proxy"))
	n.await(t, "without a route", func(s Status) bool {
		return s.State == StateReconnecting && strings.Contains(s.Reason, "no route to the proxy")
	})
	u.set("192.0.2.1", nil)
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reason == ""
	})
	eventually(t, "packets pass", func() bool { return passes(n, f) })
	if after := onlySession(t, f); after.ID != before.ID {
		t.Error("the session is another one")
	}
}

// The client notices a dead path long before the idle timeout of QUIC, and
// reconnects soon after the path works again.
func TestBlackhole(t *testing.T) {
	f := startProxy(t, nil)
	nat := newNAT(t, f)
	u := newFakeUnderlay()
	n := startClient(t, f, func(c *Config) { c.OpenUnderlay = u.open })
	n.awaitConnected(t)
	nat.drop.Store(true)
	start := time.Now()
	passes(n, f)
	n.await(t, "reconnecting", func(s Status) bool {
		return s.State == StateReconnecting &&
			strings.Contains(s.Reason, "nothing has come from the proxy")
	})
	if d := time.Since(start); d > dial.IdleTimeout/2 {
		t.Errorf("the client noticed after %v, want less than %v", d, dial.IdleTimeout/2)
	}
	n.await(t, "dialing", func(s Status) bool { return s.Reconnects > 0 })
	nat.drop.Store(false)
	u.set("192.0.2.2", nil) // makes the client retry at once
	n.awaitConnected(t)
	eventually(t, "packets pass", func() bool { return passes(n, f) })
}

// The client does not consider the path of an idle tunnel dead.
func TestIdleIsNotDead(t *testing.T) {
	f := startProxy(t, nil)
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	for end := time.After(dial.KeepAlive + 4*maxSilence); ; {
		changed := n.Changed()
		if s := n.Status(); s.State != StateConnected || s.Reason != "" || s.Migrations != 0 {
			t.Fatalf("%s: %s, after %d migrations", s.State, s.Reason, s.Migrations)
		}
		select {
		case <-changed:
		case <-end:
			return
		}
	}
}

// After a suspension the client migrates. If the proxy has ended the session in
// the meantime, it reconnects at once.
func TestSuspended(t *testing.T) {
	for _, tt := range []struct {
		slept time.Duration
		same  bool // the session survives
	}{{5 * time.Second, true}, {2 * dial.IdleTimeout, false}} {
		t.Run(tt.slept.String(), func(t *testing.T) {
			f := startProxy(t, nil)
			nat := newNAT(t, f)
			var slept atomic.Int64
			n := startClient(t, f, func(c *Config) {
				c.Suspended = func() time.Duration { return time.Duration(slept.Load()) }
			})
			n.awaitConnected(t)
			before := onlySession(t, f)
			nat.rebind() // as routers do with idle bindings
			slept.Add(int64(tt.slept))
			n.await(t, "awake", func(s Status) bool {
				return s.State == StateConnected &&
					(tt.same && s.Migrations == 1 || !tt.same && s.Reconnects == 1)
			})
			eventually(t, "packets pass", func() bool { return passes(n, f) })
			if after := onlySession(t, f); (after.ID == before.ID) != tt.same ||
				!slices.Equal(after.Addresses, before.Addresses) {
				t.Errorf("session %s with %v became %s with %v", before.ID, before.Addresses,
					after.ID, after.Addresses)
			}
		})
	}
}

// The wait before the next attempt ends early when the next hop to the proxy
// changes, but not for other changes that the kernel reports.
func TestNetworkChangeEndsWait(t *testing.T) {
	c, err := New(Config{Name: "test", Proxy: "192.0.2.1",
		OpenNetwork: func(Device) (Network, error) {
			return &routingtest.Network{}, nil
		}})
	must(err)
	synctest.Test(t, func(t *testing.T) {
		u := newFakeUnderlay()
		c.host.underlay = u
		c.dialer.lastAddrs = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:443")}
		c.host.changed = make(chan struct{}, 1)
		c.noteDial()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan bool, 1)
		go func() { ended <- c.awaitNetworkChange(ctx) }()
		c.host.changed <- struct{}{}
		synctest.Wait()
		select {
		case <-ended:
			t.Error("the wait ended though nothing has changed")
		default:
		}
		u.set("192.0.2.77", nil)
		c.host.changed <- struct{}{}
		if !<-ended {
			t.Error("the wait did not end early")
		}
		go func() { ended <- c.awaitNetworkChange(ctx) }()
		cancel()
		if <-ended {
			t.Error("the end of the context counts as a change")
		}
	})
}

// The status lists the current conflicts with the host's routes, and the log
// has each conflict once.
func TestConflictsAreShown(t *testing.T) {
	f := startProxy(t, nil)
	u, kernel, log := newFakeUnderlay(), &routingtest.Network{}, new(logtest.Buffer)
	n := startClient(t, f, func(c *Config) {
		c.OpenUnderlay, c.Logger = u.open, slog.New(slog.NewTextHandler(log, nil))
		c.OpenNetwork = func(Device) (Network, error) { return kernel, nil }
	})
	n.awaitConnected(t)
	for _, conflicts := range [][]string{{"one"}, {"one", "two"}, {"two"}, nil} {
		kernel.SetConflicts(conflicts)
		u.set("192.0.2.1", nil)
		n.await(t, fmt.Sprintf("warnings %q", conflicts), func(s Status) bool {
			return slices.Equal(s.Warnings, conflicts)
		})
	}
	for _, text := range []string{"msg=one", "msg=two"} {
		if got := strings.Count(log.String(), text); got != 1 {
			t.Errorf("the log has %s %d times, want once:\n%s", text, got, log.String())
		}
	}
}

// passes reports whether one packet gets through in each direction.
func passes(n *testClient, f *testProxy) bool {
	for _, direction := range []struct {
		from, to *tuntest.Device
		src, dst netip.Addr
	}{
		{n.device, f.device, netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("192.0.2.9")},
		{f.device, n.device, netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("10.77.0.2")},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		direction.from.Inject(ippacket.AppendEcho(nil, direction.src, direction.dst, 64, true, 98,
			1, nil))
		for came := false; !came; {
			pkt, err := direction.to.Receive(ctx)
			if err != nil {
				cancel()
				return false
			}
			p, err := ippacket.Parse(pkt)
			_, id, _, _, ok := ippacket.ParseEcho(pkt, p)
			came = err == nil && ok && id == 98 && p.Src == direction.src
		}
		cancel()
	}
	return true
}

// eventually waits until ok returns true. event names it in the failure.
func eventually(t *testing.T, event string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", event)
		}
	}
}
