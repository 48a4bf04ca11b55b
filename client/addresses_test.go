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

// A prefix is the client's as a whole: its interface has the first address of a
// host, and any other is carried as well.
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
	// It comes back with a prefix for the prefix, and an address for the
	// address.
	f.Kick(f.Sessions()[0].ID)
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects > 0
	})
	if got := n.Status().Addresses; !slices.Equal(got, want) {
		t.Errorf("addresses %v after the reconnect, want %v", got, want)
	}
}

// What the proxy changes while the session runs is applied as it comes, each
// list in place of the last, without an end of the session.
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
	for i, step := range []struct {
		capsules          []capsule.Capsule
		addresses, routes []netip.Prefix
	}{
		{
			[]capsule.Capsule{&capsule.AddressAssign{Addresses: []capsule.Address{{Prefix: netip.MustParsePrefix("10.77.0.2/32")}, {Prefix: netip.MustParsePrefix("10.77.0.3/32")}}}},
			prefixes("10.77.0.2/32", "10.77.0.3/32"), prefixes("192.0.2.0/24", "2001:db8::/32"),
		},
		{
			[]capsule.Capsule{&capsule.RouteAdvertisement{Routes: capsule.Routes(prefixes("192.0.2.0/24", "198.51.100.0/24"), 0)}},
			prefixes("10.77.0.2/32", "10.77.0.3/32"), prefixes("192.0.2.0/24", "198.51.100.0/24"),
		},
		{
			[]capsule.Capsule{
				&capsule.AddressAssign{Addresses: []capsule.Address{{Prefix: netip.MustParsePrefix("10.77.0.3/32")}}},
				&capsule.RouteAdvertisement{Routes: capsule.Routes(prefixes("198.51.100.0/24"), 0)},
			},
			prefixes("10.77.0.3/32"), prefixes("198.51.100.0/24"),
		},
	} {
		before := n.network.States()
		next <- step.capsules
		want := func(s routing.State) bool {
			return slices.Equal(s.Addresses, step.addresses) && slices.Equal(s.Routes, step.routes)
		}
		for deadline := time.Now().Add(20 * time.Second); !want(n.network.Last()); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("step %d: the kernel has %+v, want addresses %v and routes %v", i,
					n.network.Last(), step.addresses, step.routes)
			}
		}
		// What was there before and stays is there in every state between.
		last := before[len(before)-1]
		for _, s := range n.network.States()[len(before):] {
			for _, p := range step.addresses {
				if slices.Contains(last.Addresses, p) && !slices.Contains(s.Addresses, p) {
					t.Errorf("step %d: %v was away for a while", i, p)
				}
			}
			for _, p := range step.routes {
				if slices.Contains(last.Routes, p) && !slices.Contains(s.Routes, p) {
					t.Errorf("step %d: the route to %v was away for a while", i, p)
				}
			}
		}
		n.await(t, "told of it", func(s Status) bool {
			return slices.Equal(s.Addresses, step.addresses)
		})
	}
	if s := n.Status(); s.State != StateConnected || s.Reconnects != 0 || n.network.Closed() {
		t.Errorf("the session did not last: %+v", s)
	}
}

// Each of two devices of one user has its own former addresses when its program
// is started anew, in whatever order.
func TestInstallations(t *testing.T) {
	f := startProxy(t, nil)
	start := func(installation string) *near {
		n := startClient(t, f, func(c *Config) { c.Installation = installation })
		n.awaitConnected(t)
		return n
	}
	stop := func(n *near, left int) {
		n.stop()
		<-n.done
		eventually(t, "the proxy has taken the addresses back", func() bool {
			return len(f.Sessions()) == left
		})
	}
	laptop, phone := start("laptop"), start("phone")
	had := map[string][]netip.Prefix{"laptop": laptop.Status().Addresses,
		"phone": phone.Status().Addresses}
	stop(laptop, 1)
	stop(phone, 0)
	for _, name := range []string{"phone", "tablet", "laptop"} {
		got := start(name).Status().Addresses
		if want, ok := had[name]; ok && !slices.Equal(got, want) {
			t.Errorf("the %s has %v, and had %v", name, got, want)
		}
	}
}

// Two copies of one installation, as of a cloned machine, have addresses of
// their own, and leave each other alone.
func TestInstallationCopied(t *testing.T) {
	f := startProxy(t, nil)
	var copies []*near
	for range 2 {
		n := startClient(t, f, func(c *Config) { c.Installation = "clone" })
		n.awaitConnected(t)
		copies = append(copies, n)
	}
	if slices.Equal(copies[0].Status().Addresses, copies[1].Status().Addresses) {
		t.Errorf("both have %v", copies[0].Status().Addresses)
	}
	for _, n := range copies {
		eventually(t, "packets pass", func() bool {
			n.device.Inject(ippacket.AppendEcho(nil, n.Status().Addresses[0].Addr(),
				netip.MustParseAddr("192.0.2.9"), 64, true, 1, 1, nil))
			return n.Status().Packets.TX > 0
		})
		if s := n.Status(); s.State != StateConnected || s.Reconnects > 0 {
			t.Errorf("%s after %d reconnects: %s", s.State, s.Reconnects, s.Reason)
		}
	}
}
