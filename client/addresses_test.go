package client

import (
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/proxy"
	"masquevpn/routing"
)

func prefixes(s ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(s))
	for i := range s {
		out[i] = netip.MustParsePrefix(s[i])
	}
	return out
}

// The client owns each address of a delegated prefix. Its interface gets the
// first host address; packets of the others pass as well.
func TestDelegatedPrefix(t *testing.T) {
	f := startProxy(t, func(c *proxy.Config) {
		c.Pool6 = netip.MustParsePrefix("fd77::/56")
		c.Delegate4, c.Delegate6 = 28, 64
	})
	n := startClient(t, f, func(c *Config) {
		c.Request = prefixes("0.0.0.0/28", "::/64", "0.0.0.0/32")
	})
	n.awaitConnected(t)
	want := prefixes("10.77.0.224/28", "fd77:0:0:ff::/64", "10.77.0.2/32")
	if got := n.Status().Addresses; !slices.Equal(got, want) {
		t.Errorf("addresses %v, want %v", got, want)
	}
	if got, want := n.network.Last().Addresses,
		prefixes("10.77.0.225/32", "fd77:0:0:ff::1/128", "10.77.0.2/32"); !slices.Equal(got, want) {
		t.Errorf("addresses in the kernel %v, want %v", got, want)
	}
	for _, inside := range []string{"10.77.0.225", "10.77.0.238", "10.77.0.2"} {
		carries(t, n, f, inside, "192.0.2.2")
	}
	for _, inside := range []string{"fd77:0:0:ff::1", "fd77:0:0:ff:1:2:3:4"} {
		carries(t, n, f, inside, "2001:db8::2")
	}
	// After a reconnect the client requests the same prefixes and the same
	// single address.
	f.Kick(f.Sessions()[0].ID)
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects > 0
	})
	if got := n.Status().Addresses; !slices.Equal(got, want) {
		t.Errorf("addresses %v after the reconnect, want %v", got, want)
	}
}

// assignment returns an ADDRESS_ASSIGN that answers no request.
func assignment(s ...string) *capsule.AddressAssign {
	return &capsule.AddressAssign{Addresses: unrequested(prefixes(s...))}
}

// advertisement returns a ROUTE_ADVERTISEMENT for any protocol.
func advertisement(s ...string) *capsule.RouteAdvertisement {
	return &capsule.RouteAdvertisement{Routes: capsule.Routes(prefixes(s...), 0)}
}

// Each list of addresses or routes that the proxy sends during a session
// replaces the last one; the session continues.
func TestAddressesAndRoutesChange(t *testing.T) {
	next := make(chan []capsule.Capsule)
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		asked := requested(capsule.NewReader(str, 1<<16))
		write(str,
			&capsule.AddressAssign{Addresses: []capsule.Address{
				{RequestID: asked[0].RequestID, Prefix: netip.MustParsePrefix("10.77.0.2/32")},
				{RequestID: asked[1].RequestID, Prefix: netip.MustParsePrefix("fd77::2/128")},
			}},
			&capsule.RouteAdvertisement{Routes: capsule.Routes(prefixes("192.0.2.0/24",
				"2001:db8::/32"), 0)})
		for _, to := range []string{"10.77.0.2", "10.77.0.3"} {
			from := netip.MustParseAddr("192.0.2.1")
			go keepSending(r.Context(), str,
				append([]byte{0}, ippacket.AppendEcho(nil, from, netip.MustParseAddr(to), 64, true,
					1, 1, nil)...))
		}
		for {
			select {
			case c := <-next:
				write(str, c...)
			case <-r.Context().Done():
				return
			}
		}
	})
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	// Each step continues from the state of the one before.
	for _, step := range []struct {
		name              string
		capsules          []capsule.Capsule
		addresses, routes []netip.Prefix
	}{
		{
			"another IPv4 address, no IPv6 address",
			[]capsule.Capsule{assignment("10.77.0.2/32", "10.77.0.3/32")},
			prefixes("10.77.0.2/32", "10.77.0.3/32"), prefixes("192.0.2.0/24", "2001:db8::/32"),
		},
		{
			"another IPv4 route, no IPv6 route",
			[]capsule.Capsule{advertisement("192.0.2.0/24", "198.51.100.0/24")},
			prefixes("10.77.0.2/32", "10.77.0.3/32"), prefixes("192.0.2.0/24", "198.51.100.0/24"),
		},
		{
			"fewer addresses and routes",
			[]capsule.Capsule{assignment("10.77.0.3/32"), advertisement("198.51.100.0/24")},
			prefixes("10.77.0.3/32"), prefixes("198.51.100.0/24"),
		},
	} {
		before := n.network.States()
		next <- step.capsules
		want := func(s routing.State) bool {
			return slices.Equal(s.Addresses, step.addresses) && slices.Equal(s.Routes, step.routes)
		}
		deadline := time.Now().Add(20 * time.Second)
		for ; !want(n.network.Last()); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: the kernel has %+v, want addresses %v and routes %v", step.name,
					n.network.Last(), step.addresses, step.routes)
			}
		}
		// Addresses and routes of both the old and the new list are in every
		// state between.
		last := before[len(before)-1]
		for _, s := range n.network.States()[len(before):] {
			for _, p := range step.addresses {
				if slices.Contains(last.Addresses, p) && !slices.Contains(s.Addresses, p) {
					t.Errorf("%s: %v was removed for a while", step.name, p)
				}
			}
			for _, p := range step.routes {
				if slices.Contains(last.Routes, p) && !slices.Contains(s.Routes, p) {
					t.Errorf("%s: the route to %v was removed for a while", step.name, p)
				}
			}
		}
		n.await(t, "the status shows the addresses", func(s Status) bool {
			return slices.Equal(s.Addresses, step.addresses)
		})
	}
	if s := n.Status(); s.State != StateConnected || s.Reconnects != 0 || n.network.Closed() {
		t.Errorf("the session did not last: %+v", s)
	}
}

// When the clients on two devices of one user start again, each device gets its
// former addresses, in any order.
func TestInstallations(t *testing.T) {
	f := startProxy(t, nil)
	start := func(installation string) *testClient {
		n := startClient(t, f, func(c *Config) { c.Installation = installation })
		n.awaitConnected(t)
		return n
	}
	stop := func(n *testClient, sessions int) {
		n.stop()
		<-n.done
		eventually(t, "the proxy releases the addresses", func() bool {
			return len(f.Sessions()) == sessions
		})
	}
	laptop, phone := start("laptop"), start("phone")
	former := map[string][]netip.Prefix{"laptop": laptop.Status().Addresses,
		"phone": phone.Status().Addresses}
	stop(laptop, 1)
	stop(phone, 0)
	for _, name := range []string{"phone", "tablet", "laptop"} {
		got := start(name).Status().Addresses
		if want, ok := former[name]; ok && !slices.Equal(got, want) {
			t.Errorf("addresses of the %s: got %v, want %v", name, got, want)
		}
	}
}

// Two copies of one installation, for example on a cloned machine, get
// different addresses and do not disturb each other.
func TestInstallationCopied(t *testing.T) {
	f := startProxy(t, nil)
	var copies []*testClient
	for range 2 {
		n := startClient(t, f, func(c *Config) { c.Installation = "clone" })
		n.awaitConnected(t)
		copies = append(copies, n)
	}
	if slices.Equal(copies[0].Status().Addresses, copies[1].Status().Addresses) {
		t.Errorf("both copies have %v", copies[0].Status().Addresses)
	}
	for _, n := range copies {
		eventually(t, "packets pass", func() bool {
			n.device.Inject(ippacket.AppendEcho(nil, n.Status().Addresses[0].Addr(),
				netip.MustParseAddr("192.0.2.9"), 64, true, 1, 1, nil))
			return n.Status().Packets.TX > 0
		})
		if s := n.Status(); s.State != StateConnected || s.Reconnects > 0 {
			t.Errorf("state %s after %d reconnects: %s", s.State, s.Reconnects, s.Reason)
		}
	}
}
