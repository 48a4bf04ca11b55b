package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
	"masquevpn/internal/logtest"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// byToken are the names of users whose token is their name.
type byToken []string

func (u byToken) ByName(name string) (User, bool) {
	return User{Name: name}, slices.Contains(u, name)
}
func (u byToken) ByToken(token string) (User, bool) { return u.ByName(token) }
func (byToken) Reserved(netip.Prefix, string) bool  { return false }

// hub is a proxy with two sites, of the users a and b, and a user c without a
// site.
type hub struct {
	running
	t      testing.TB
	h3     *http3.ClientConn
	cfg    Config // the initial configuration
	device *tuntest.Device
	kernel *routingtest.Network
	log    *logtest.Buffer
}

var (
	netA, netA6 = netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("2001:db8:a::/64")
	netB        = netip.MustParsePrefix("10.2.0.0/24")
	netProxy    = netip.MustParsePrefix("192.0.2.0/24") // advertised by the proxy
	hostNetwork = netip.MustParsePrefix("172.16.0.0/24")
)

func newHub(t testing.TB, change func(*Config)) *hub {
	h := &hub{t: t, device: tuntest.New(1400), kernel: new(routingtest.Network),
		log: new(logtest.Buffer)}
	h.running = startServer(t, func(c *Config) {
		c.Methods, c.Users = []string{MethodToken}, byToken{"a", "b", "c"}
		c.Pool6 = netip.MustParsePrefix("fd77::/64")
		c.Advertise = []netip.Prefix{netProxy}
		c.OpenDevice = func() (Device, error) { return h.device, nil }
		c.OpenNetwork = func(Device) (Network, error) { return h.kernel, nil }
		c.LocalNetworks = func() ([]netip.Prefix, error) {
			return []netip.Prefix{netip.PrefixFrom(hostNetwork.Addr().Next(), 24),
				netip.MustParsePrefix("192.0.2.1/24")}, nil
		}
		c.Logger = slog.New(slog.NewTextHandler(h.log, nil))
		c.Sites = []Site{
			{User: "a", Networks: []netip.Prefix{netA, netA6,
				netip.MustParsePrefix("172.16.0.0/12")},
				Peer: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}},
			{User: "b", Networks: []netip.Prefix{netB, netip.MustParsePrefix("10.1.0.0/16")}},
		}
		if change != nil {
			change(c)
		}
		h.cfg = *c
	})
	_, h.h3 = h.dial(t, nil)
	return h
}

// gateway is a client of a hub.
type gateway struct {
	hub      *hub
	str      *http3.RequestStream
	own      []netip.Addr // assigned addresses
	routes   chan []capsule.Route
	packets  chan []byte
	ended    chan error // receives the error of the stream
	assigned chan []capsule.Address
}

// connect begins a session of user, requests an IPv4 address, and advertises
// networks.
func (h *hub) connect(user, instance string, networks ...netip.Prefix) *gateway {
	h.t.Helper()
	header := http.Header{"Authorization": {"Bearer " + user}}
	if instance != "" {
		header[connectip.InstanceHeader] = []string{instance}
	}
	rsp, str := request(h.t, h.h3, "CONNECT", "connect-ip", anyPath, header)
	if rsp.StatusCode != 200 {
		h.t.Fatalf("status %d", rsp.StatusCode)
	}
	g := h.gateway(str)
	g.write(&capsule.AddressRequest{Addresses: []capsule.Address{{RequestID: 1,
		Prefix: netip.MustParsePrefix("0.0.0.0/32")}}})
	for _, a := range <-g.assigned {
		g.own = append(g.own, a.Prefix.Addr())
	}
	if len(networks) > 0 {
		g.advertise(networks...)
	}
	return g
}

// gateway returns the client of a session on str.
func (h *hub) gateway(str *http3.RequestStream) *gateway {
	g := &gateway{hub: h, str: str, routes: make(chan []capsule.Route, 100),
		packets: make(chan []byte, 100), ended: make(chan error, 1),
		assigned: make(chan []capsule.Address, 1)}
	go func() {
		r := capsule.NewReader(str, 1<<16)
		for {
			c, err := r.Next()
			if err != nil {
				g.ended <- err
				return
			}
			switch c := c.(type) {
			case *capsule.AddressAssign:
				g.assigned <- c.Addresses
			case *capsule.RouteAdvertisement:
				g.routes <- c.Routes
			}
		}
	}()
	go func() {
		for {
			b, err := str.ReceiveDatagram(h.t.Context())
			if err != nil {
				return
			}
			g.packets <- b[1:]
		}
	}()
	return g
}

func (g *gateway) write(c capsule.Capsule) {
	g.hub.t.Helper()
	if _, err := g.str.Write(c.Append(nil)); err != nil {
		g.hub.t.Fatal(err)
	}
}

func (g *gateway) advertise(networks ...netip.Prefix) {
	g.hub.t.Helper()
	g.write(&capsule.RouteAdvertisement{Routes: capsule.Routes(networks, 0)})
}

func (g *gateway) close() {
	if err := g.str.Close(); err != nil {
		g.hub.t.Error(err)
	}
	g.str.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
}

// send sends a packet into the tunnel.
func (g *gateway) send(src, dst string) {
	g.hub.t.Helper()
	pkt := ippacket.AppendEcho([]byte{0}, netip.MustParseAddr(src), netip.MustParseAddr(dst), 64,
		true, 1, 1, nil)
	g.write(&capsule.Datagram{Payload: pkt})
}

// awaitRoutes waits until the proxy advertises want, besides its own address.
func (g *gateway) awaitRoutes(want ...netip.Prefix) {
	g.hub.t.Helper()
	wanted := capsule.Routes(append(want, netip.MustParsePrefix("10.77.0.1/32")), 0)
	var got []capsule.Route
	for {
		select {
		case got = <-g.routes:
			if slices.Equal(got, wanted) {
				return
			}
		case <-time.After(10 * time.Second):
			g.hub.t.Fatalf("the proxy advertised %v last, want %v", got, wanted)
		}
	}
}

// awaitPacket waits for a packet from the tunnel.
func (g *gateway) awaitPacket(src, dst string) {
	g.hub.t.Helper()
	for {
		select {
		case pkt := <-g.packets:
			if p, err := ippacket.Parse(pkt); err == nil && p.Src.String() == src &&
				p.Dst.String() == dst {
				return
			}
		case <-time.After(10 * time.Second):
			g.hub.t.Fatalf("no packet from %s to %s came", src, dst)
		}
	}
}

// awaitProhibited waits for the ICMP error about a packet that the proxy did
// not forward.
func (g *gateway) awaitProhibited(src, dst string) {
	g.hub.t.Helper()
	for {
		select {
		case pkt := <-g.packets:
			p, err := ippacket.Parse(pkt)
			if err != nil {
				continue
			}
			if q, ok := ippacket.Quoted(pkt, p); ok && q.Src.String() == src &&
				q.Dst.String() == dst {
				if code := pkt[p.HeaderLen+1]; code != 13 {
					g.hub.t.Errorf("%s to %s is answered with code %d", src, dst, code)
				}
				return
			}
		case <-time.After(10 * time.Second):
			g.hub.t.Fatalf("a packet from %s to %s was not answered", src, dst)
		}
	}
}

// awaitForwarded waits for a packet from the proxy to its device.
func (h *hub) awaitForwarded(src, dst string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 10*time.Second)
	defer cancel()
	for {
		pkt, err := h.device.Receive(ctx)
		if err != nil {
			h.t.Fatalf("no packet from %s to %s came out: %v", src, dst, err)
		}
		if p, err := ippacket.Parse(pkt); err == nil && p.Src.String() == src &&
			p.Dst.String() == dst {
			return
		}
	}
}

// awaitDelivery waits until packets from src to dst, which the kernel routes
// into the device, are sent to g.
func (h *hub) awaitDelivery(g *gateway, src, dst string) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("packets from %s to %s are sent on", src, dst), func() bool {
		h.inject(src, dst)
		select {
		case <-g.packets:
			return true
		case <-time.After(10 * time.Millisecond):
			return false
		}
	})
}

// awaitAllowed waits until packets of g from src to dst are forwarded to the
// proxy's device.
func (h *hub) awaitAllowed(g *gateway, src, dst string) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("packets from %s to %s come out", src, dst), func() bool {
		g.send(src, dst)
		ctx, cancel := context.WithTimeout(h.t.Context(), 10*time.Millisecond)
		defer cancel()
		for {
			pkt, err := h.device.Receive(ctx)
			if err != nil {
				return false
			}
			if p, err := ippacket.Parse(pkt); err == nil && p.Src.String() == src &&
				p.Dst.String() == dst {
				return true
			}
		}
	})
}

// inject makes the kernel route a packet into the proxy's device.
func (h *hub) inject(src, dst string) {
	h.device.Inject(ippacket.AppendEcho(nil, netip.MustParseAddr(src), netip.MustParseAddr(dst), 64,
		true, 1, 1, nil))
}

// awaitInstalled waits until the kernel has exactly these routes of sites.
func (h *hub) awaitInstalled(want ...netip.Prefix) {
	h.t.Helper()
	slices.SortFunc(want, netip.Prefix.Compare)
	h.eventually(fmt.Sprintf("routes %v", want), func() bool {
		return slices.Equal(slices.SortedFunc(slices.Values(h.kernel.Last().Routes),
			netip.Prefix.Compare), want)
	})
}

// eventually waits until ok returns true. condition describes it.
func (h *hub) eventually(condition string, ok func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("not in time: %s; the kernel has %+v\n%s", condition, h.kernel.Last(),
				strings.Join(h.log.Lines(""), "\n"))
		}
	}
}
