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
	"masquevpn/internal/ippacket"
	"masquevpn/internal/logtest"
	"masquevpn/proxy"
	"masquevpn/routing"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// uplink is a host's network that a test changes.
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

// set has the host send from another address, or not at all.
func (u *fakeUnderlay) set(source string, err error) {
	u.mu.Lock()
	u.nextHop.Source, u.err = netip.MustParseAddr(source), err
	u.mu.Unlock()
	u.changed <- struct{}{}
}

func (u *fakeUnderlay) open() (Underlay, error) { return u, nil }

// nat passes packets between a client and a proxy, like a router with address
// translation.
type nat struct {
	t      *testing.T
	inside *net.UDPConn
	proxy  *net.UDPAddr
	drop   atomic.Bool // everything

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

// binding returns the socket by which packets of a client's address leave.
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

// rebind forgets all bindings: from now on packets leave from other ports, and
// what comes to the old ones is lost.
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

// The proxy follows a client whose address changes without its knowledge,
// however often.
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
		t.Error("it is another session")
	}
	if s := n.Status(); s.Reconnects != 0 || s.Migrations != 0 {
		t.Errorf("%d reconnects, %d migrations: the client is not to notice", s.Reconnects,
			s.Migrations)
	}
}

// When this host sends from another address, the session moves to a new path,
// however often, and stays what it is. Its former sockets are closed.
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
		t.Error("it is another session")
	}
	if s := n.Status(); s.Reconnects != 0 || s.Migrations != 8 {
		t.Errorf("%d reconnects and %d migrations, want 0 and 8", s.Reconnects, s.Migrations)
	}
	nat.rebind()
	if now := openFiles(t); now > descriptors+2 {
		t.Errorf("%d files are open, %d were before", now, descriptors)
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

// A host without a way to the proxy says so, and goes on where it was when it
// has one again.
func TestNoRouteToProxy(t *testing.T) {
	f := startProxy(t, nil)
	u := newFakeUnderlay()
	n := startClient(t, f, func(c *Config) { c.OpenUnderlay = u.open })
	n.awaitConnected(t)
	before := onlySession(t, f)
	u.set("192.0.2.1", errors.New("no route to the proxy"))
	n.await(t, "without a way", func(s Status) bool {
		return s.State == StateReconnecting && strings.Contains(s.Reason, "no route to the proxy")
	})
	u.set("192.0.2.1", nil)
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reason == ""
	})
	eventually(t, "packets pass", func() bool { return passes(n, f) })
	if after := onlySession(t, f); after.ID != before.ID {
		t.Error("it is another session")
	}
}

// A path on which nothing comes any more is noticed long before QUIC gives it
// up, and the client is back soon after it works again.
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
	if d := time.Since(start); d > idleTimeout/2 {
		t.Errorf("it took %v", d)
	}
	n.await(t, "dialing", func(s Status) bool { return s.Reconnects > 0 })
	nat.drop.Store(false)
	u.set("192.0.2.2", nil) // which is a reason to try at once
	n.awaitConnected(t)
	eventually(t, "packets pass", func() bool { return passes(n, f) })
}

// A client that nobody uses is not taken for one whose path is dead.
func TestIdleIsNotDead(t *testing.T) {
	f := startProxy(t, nil)
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	for end := time.After(keepAlive + 4*maxSilence); ; {
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

// A host that was suspended looks after its path when it wakes up, and does not
// wait for a session that the proxy has ended.
func TestSuspended(t *testing.T) {
	for _, tt := range []struct {
		slept time.Duration
		same  bool // session
	}{{5 * time.Second, true}, {2 * idleTimeout, false}} {
		t.Run(tt.slept.String(), func(t *testing.T) {
			f := startProxy(t, nil)
			nat := newNAT(t, f)
			var slept atomic.Int64
			n := startClient(t, f, func(c *Config) {
				c.Suspended = func() time.Duration { return time.Duration(slept.Load()) }
			})
			n.awaitConnected(t)
			before := onlySession(t, f)
			nat.rebind() // as routers do with what is not used
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

// Waiting before the next attempt ends when the way to the proxy changes, and
// not for whatever else the kernel reports.
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
			t.Error("the wait ended for want of time")
		}
		go func() { ended <- c.awaitNetworkChange(ctx) }()
		cancel()
		if <-ended {
			t.Error("an end counts as a change")
		}
	})
}

// The status lists conflicts with the host's routes while there are any, and
// the log each of them once.
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

// passes reports whether a packet gets through in each direction. It may get
// lost.
func passes(n *testClient, f *testProxy) bool {
	for _, way := range []struct {
		from, to *tuntest.Device
		src, dst netip.Addr
	}{
		{n.device, f.device, netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("192.0.2.9")},
		{f.device, n.device, netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("10.77.0.2")},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		way.from.Inject(ippacket.AppendEcho(nil, way.src, way.dst, 64, true, 98, 1, nil))
		for came := false; !came; {
			pkt, err := way.to.Receive(ctx)
			if err != nil {
				cancel()
				return false
			}
			p, err := ippacket.Parse(pkt)
			_, id, _, _, ok := ippacket.ParseEcho(pkt, p)
			came = err == nil && ok && id == 98 && p.Src == way.src
		}
		cancel()
	}
	return true
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}
