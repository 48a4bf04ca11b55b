package connectip

import (
	"net/netip"
	"testing"

	"masquevpn/capsule"
	"masquevpn/tun"
)

// Only entries that Filter returns, or SetFiltered sets later, widen the
// policy.
func TestFilter(t *testing.T) {
	lan, own := netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("10.1.0.200/32")
	local := netip.MustParseAddr("127.0.0.1")
	client, proxy := newPair(t, Config{}, Config{
		Self:   []netip.Addr{proxyAddr4},
		Denied: []netip.Prefix{host(local), own},
		Filter: Filter{
			Assigned: func(all []capsule.Address) []capsule.Address { return all[:1] },
			Routes: func([]capsule.Route) []capsule.Route {
				return capsule.Routes([]netip.Prefix{lan}, 0)
			},
		},
	})
	everything := capsule.Routes([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, 0)
	for _, err := range []error{
		proxy.Assign([]capsule.Address{{Prefix: host(clientAddr4)}}), proxy.Advertise(everything),
		client.Assign([]capsule.Address{{Prefix: own}, {Prefix: host(local)}}),
		client.Advertise(everything),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	<-client.assigns
	<-client.routes
	<-proxy.assigns
	if got := <-proxy.routes; len(got) != 1 || got[0] != everything[0] {
		t.Errorf("the handler got %v, want all advertised routes, %v", got, everything)
	}

	t.Run("accepted source", func(t *testing.T) {
		sendRaw(t, client, echoPacket(elsewhere4, target4, 64, 64))
		if p := parse(t, proxy.device.next(t)); p.Src != elsewhere4 {
			t.Errorf("got %+v", p)
		}
	})
	t.Run("accepted address", func(t *testing.T) {
		sendRaw(t, client, echoPacket(elsewhere4, own.Addr(), 64, 64))
		if p := parse(t, proxy.device.next(t)); p.Dst != own.Addr() {
			t.Errorf("got %+v", p)
		}
	})
	t.Run("advertised source that is not accepted", func(t *testing.T) {
		sendRaw(t, client, echoPacket(target4, elsewhere4, 64, 64))
		waitDrop(t, &proxy.stats.Receive, DropSource)
	})
	t.Run("advertised destination that is not accepted", func(t *testing.T) {
		if d := proxy.Send(echoPacket(elsewhere4, target4, 64, 64),
			tun.Headroom); d != DropDestination {
			t.Errorf("got %v", d)
		}
		proxy.device.next(t) // the ICMP error
	})
	t.Run("assigned address that is not accepted stays denied", func(t *testing.T) {
		sendRaw(t, client, echoPacket(clientAddr4, local, 64, 64))
		waitDrop(t, &proxy.stats.Receive, DropDestination)
	})
	t.Run("changed later", func(t *testing.T) {
		if err := proxy.SetFiltered(nil, nil); err != nil {
			t.Fatal(err)
		}
		if d := proxy.Send(echoPacket(target4, elsewhere4, 64, 64),
			tun.Headroom); d != DropDestination {
			t.Errorf("got %v", d)
		}
		if err := proxy.SetFiltered(nil, capsule.Routes([]netip.Prefix{lan}, 0)); err != nil {
			t.Fatal(err)
		}
		if d := proxy.Send(echoPacket(target4, elsewhere4, 64, 64), tun.Headroom); d != DropNone {
			t.Errorf("got %v", d)
		}
	})
}

// The policy changes even while a capsule waits for the peer to read.
func TestPolicyChangesWhileACapsuleIsSent(t *testing.T) {
	client, proxy := newPair(t, Config{}, Config{Static: []netip.Prefix{host(proxyAddr4)}})
	proxy.writeMu.Lock() // like a write that waits for the peer
	defer proxy.writeMu.Unlock()
	if err := client.Advertise(capsule.Routes([]netip.Prefix{host(elsewhere4)}, 0)); err != nil {
		t.Fatal(err)
	}
	<-proxy.routes
	if d := proxy.Send(echoPacket(proxyAddr4, elsewhere4, 64, 64), tun.Headroom); d != DropNone {
		t.Errorf("after the peer advertised the destination: %v", d)
	}
	if err := proxy.SetFiltered(nil, nil); err != nil {
		t.Error(err)
	}
	if err := proxy.SetDenied(nil, nil); err != nil {
		t.Error(err)
	}
	if d := proxy.Send(echoPacket(proxyAddr4, elsewhere4, 64, 64),
		tun.Headroom); d != DropDestination {
		t.Errorf("after SetFiltered removed the destination: %v", d)
	}
}
