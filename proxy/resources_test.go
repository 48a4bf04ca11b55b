package proxy

import (
	"fmt"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
	"masquevpn/tun/tuntest"
)

// atProcs runs f with one, two and many processors, because shared resources
// often have a size that depends on their number.
func atProcs(t *testing.T, f func(t *testing.T)) {
	for _, n := range []int{1, 2, 16} {
		t.Run(fmt.Sprintf("processors=%d", n), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(n))
			f(t)
		})
	}
}

// TestManyTunnelsOfOneConnection checks that a client that sends into many
// tunnels of one connection in turn does not delay others.
func TestManyTunnelsOfOneConnection(t *testing.T) {
	const tunnels, rounds = 40, 100
	atProcs(t, func(t *testing.T) {
		h := newHub(t, func(c *Config) { c.MaxSessionsPerUser = tunnels })
		other := h.connect("a", "", netA)
		h.awaitInstalled(netA)
		h.awaitAllowed(other, "10.1.0.5", "192.0.2.9")

		attacker := *h
		_, attacker.h3 = h.dial(t, nil)
		var all []*gateway
		for range tunnels {
			all = append(all, attacker.connect("c", ""))
		}
		for range rounds {
			for _, g := range all {
				pkt := ippacket.AppendEcho([]byte{0}, g.own[0], netip.MustParseAddr("192.0.2.9"),
					64, true, 1, 1, nil)
				if err := g.str.SendDatagram(pkt); err != nil {
					t.Fatal(err)
				}
			}
		}
		h.awaitAllowed(other, "10.1.0.5", "192.0.2.77")
	})
}

// trap is a device that calls then for each packet to one address.
type trap struct {
	*tuntest.Device
	to   netip.Addr
	then func()
}

func (d trap) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		if p, err := ippacket.Parse(b[offset:]); err == nil && p.Dst == d.to {
			d.then()
		}
	}
	return d.Device.Write(bufs, offset)
}

// newTrap makes a hub whose device calls then for each packet to 192.0.2.66.
func newTrap(t *testing.T, then func()) *hub {
	device := tuntest.New(1400)
	h := newHub(t, func(c *Config) {
		c.OpenDevice = func() (Device, error) {
			return trap{device, netip.MustParseAddr("192.0.2.66"), then}, nil
		}
	})
	h.device = device
	return h
}

// sendDatagram sends a packet into the tunnel in a QUIC datagram.
func (g *gateway) sendDatagram(dst string) {
	g.hub.t.Helper()
	pkt := ippacket.AppendEcho([]byte{0}, g.own[0], netip.MustParseAddr(dst), 64, true, 1, 1, nil)
	if err := g.str.SendDatagram(pkt); err != nil {
		g.hub.t.Fatal(err)
	}
}

// TestPanicEndsOneSession checks that a panic in a goroutine of one session
// ends that session, is logged with its stack, and does not affect others.
func TestPanicEndsOneSession(t *testing.T) {
	for _, tc := range []struct {
		name string
		send func(*gateway)
	}{
		{"goroutine of the connection", func(g *gateway) { g.sendDatagram("192.0.2.66") }},
		{"goroutine that reads capsules", func(g *gateway) {
			g.send(g.own[0].String(), "192.0.2.66")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			atProcs(t, func(t *testing.T) {
				h := newTrap(t, func() { panic("on purpose") })
				other := h.connect("a", "", netA)
				h.awaitInstalled(netA)
				h.awaitAllowed(other, "10.1.0.5", "192.0.2.9")
				before := h.Counters().Panics
				victim := h.connect("c", "")
				tc.send(victim)
				h.eventually("the session has ended", func() bool { return len(h.Sessions()) == 1 })
				h.awaitAllowed(other, "10.1.0.5", "192.0.2.77")
				if got := h.Counters().Panics - before; got != 1 {
					t.Errorf("%d panics were counted, want 1", got)
				}
				lines := h.log.Lines("a fault of this program ended a session")
				if len(lines) != 1 || !strings.Contains(lines[0], "trap.Write") {
					t.Errorf("the log has %q, want one line with the stack", lines)
				}
				h.connect("c", "").sendDatagram("192.0.2.78") // the user may connect again
			})
		})
	}
}

// TestStuckWrite checks that a write that blocks shows in the ages of packets.
func TestStuckWrite(t *testing.T) {
	release := make(chan struct{})
	h := newTrap(t, func() { <-release })
	h.connect("c", "").sendDatagram("192.0.2.66")
	h.eventually("a packet is being written", func() bool {
		c := h.Counters()
		return c.Oldest[connectip.StageDeviceWrite] > 0
	})
	if err := h.Stuck(); err != nil {
		t.Errorf("stuck at once: %v", err)
	}
	close(release)
	h.eventually("no packet waits", func() bool { return h.Counters().Oldest == connectip.Ages{} })
}

// vanishing has users who are removed as soon as their session is added to the
// running ones.
type vanishing struct {
	byToken
	gone func()
}

func (u vanishing) ByName(string) (User, bool) {
	u.gone()
	return User{}, false
}

// TestRefusedSessionIsDone checks that a session that is refused after it was
// added is done, because a newer session of the same client may wait for it.
func TestRefusedSessionIsDone(t *testing.T) {
	var server atomic.Pointer[Server]
	refused := make(chan session, 1)
	x := startServer(t, func(c *Config) {
		c.Methods = []string{MethodToken}
		c.Users = vanishing{byToken{"a"}, func() { refused <- server.Load().sessions.list()[0] }}
	})
	server.Store(x.Server)
	_, h3 := x.dial(t, nil)
	rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
		http.Header{"Authorization": {"Bearer a"}})
	if rsp.StatusCode != http.StatusUnauthorized {
		t.Fatalf("status %d, want %d", rsp.StatusCode, http.StatusUnauthorized)
	}
	select {
	case <-(<-refused).base().done:
	default:
		t.Error("the refused session never ends")
	}
}

// TestBatchesUnderGarbage checks that a client that sends one packet, which
// takes a batch, and then endless garbage does not keep the batch.
func TestBatchesUnderGarbage(t *testing.T) {
	atProcs(t, func(t *testing.T) {
		h := newHub(t, nil)
		other := h.connect("a", "", netA)
		h.awaitInstalled(netA)
		h.awaitAllowed(other, "10.1.0.5", "192.0.2.9")
		stop := make(chan struct{})
		var floods sync.WaitGroup
		for range 8 { // attacking connections
			attacker := *h
			_, attacker.h3 = h.dial(t, nil)
			g := attacker.connect("c", "")
			floods.Go(func() {
				pkt := ippacket.AppendEcho([]byte{0}, g.own[0], netip.MustParseAddr("192.0.2.9"),
					64, true, 1, 1, nil)
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					if n%100 == 0 {
						_ = g.str.SendDatagram(pkt)
					}
					_ = g.str.SendDatagram([]byte{1}) // unknown context ID
				}
			})
		}
		for range 10 {
			h.awaitAllowed(other, "10.1.0.5", "192.0.2.77")
		}
		close(stop)
		floods.Wait()
	})
}

// TestPanicEndsOneRequest checks that a panic in the handler of a request ends
// that request only, and leaves no session and no lock behind.
func TestPanicEndsOneRequest(t *testing.T) {
	var panics atomic.Bool
	panics.Store(true)
	x := startServer(t, func(c *Config) {
		c.Methods = []string{MethodToken}
		c.Users = vanishing{byToken{"a"}, func() {
			if panics.Swap(false) {
				panic("on purpose")
			}
		}}
	})
	_, h3 := x.dial(t, nil)
	auth := http.Header{"Authorization": {"Bearer a"}}
	str := send(t, h3, "CONNECT", "connect-ip", anyPath, auth)
	if rsp, err := str.ReadResponse(); err == nil {
		t.Errorf("the request is answered with status %d, want a reset", rsp.StatusCode)
	}
	if n := len(x.Sessions()); n != 0 {
		t.Errorf("%d sessions remain, want none", n)
	}
	// The same user, on the same connection.
	if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
		auth); rsp.StatusCode != http.StatusUnauthorized {
		t.Errorf("status %d after the panic, want %d", rsp.StatusCode, http.StatusUnauthorized)
	}
}
