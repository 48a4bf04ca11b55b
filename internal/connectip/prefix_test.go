package connectip

import (
	"net/netip"
	"testing"

	"masquevpn/capsule"
	"masquevpn/tun"
)

func TestHostAddr(t *testing.T) {
	for prefix, want := range map[string]string{
		"10.77.0.9/32":      "10.77.0.9",
		"10.77.0.16/28":     "10.77.0.17",
		"10.77.0.16/30":     "10.77.0.17",
		"10.77.0.16/31":     "10.77.0.16",
		"10.77.0.9/24":      "10.77.0.9", // an address with the length of its network
		"fd77::9/128":       "fd77::9",
		"fd77:0:0:1::/64":   "fd77:0:0:1::1",
		"fd77:0:0:1::/127":  "fd77:0:0:1::",
		"0.0.0.0/0":         "0.0.0.1",
		"255.255.255.255/0": "255.255.255.255",
	} {
		if got := HostAddr(netip.MustParsePrefix(prefix)); got != netip.MustParseAddr(want) {
			t.Errorf("%s: %v, want %s", prefix, got, want)
		}
	}
}

// A prefix that was assigned is the peer's as a whole: any address of it may be
// used, and none is looked for at this end.
func TestAssignedPrefix(t *testing.T) {
	block4, block6 := netip.MustParsePrefix("10.77.0.16/28"),
		netip.MustParsePrefix("fd77:0:0:1::/64")
	client, proxy := newPair(t, Config{},
		Config{Self: []netip.Addr{proxyAddr4, proxyAddr6},
			Denied: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}})
	if err := proxy.Assign([]capsule.Address{{Prefix: block4}, {Prefix: block6}}); err != nil {
		t.Fatal(err)
	}
	everything := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	if err := proxy.Advertise(capsule.Routes(everything, 0)); err != nil {
		t.Fatal(err)
	}
	<-client.assigns
	<-client.routes
	for _, tc := range []struct {
		inside    string
		far       netip.Addr
		hopLimit  uint8 // expected hop limit of a packet sent with 64
		reachable bool
	}{
		{"10.77.0.17", target4, 64, true}, // the client itself
		{"10.77.0.16", target4, 63, true},
		{"10.77.0.31", target4, 63, true},
		{"fd77:0:0:1::1", target6, 64, true},
		{"fd77:0:0:1:2:3:4:5", target6, 63, true},
		{"10.77.0.15", target4, 0, false},
		{"10.77.0.32", target4, 0, false},
		{"fd77:0:0:2::1", target6, 0, false},
	} {
		inside := netip.MustParseAddr(tc.inside)
		if !tc.reachable {
			if d := client.Send(echoPacket(inside, tc.far, 64, 64), tun.Headroom); d != DropSource {
				t.Errorf("%s: the client sends it, %v", tc.inside, d)
			}
			<-client.device
			before := proxy.stats.Receive.drops[DropSource].Load()
			sendRaw(t, client, echoPacket(inside, tc.far, 64, 64))
			waitCount(t, func() bool {
				return proxy.stats.Receive.drops[DropSource].Load() > before
			})
			if d := proxy.Send(echoPacket(tc.far, inside, 64, 64),
				tun.Headroom); d != DropDestination {
				t.Errorf("%s: the proxy sends it, %v", tc.inside, d)
			}
			<-proxy.device
			continue
		}
		if d := client.Send(echoPacket(inside, tc.far, 64, 64), tun.Headroom); d != DropNone {
			t.Fatalf("%s: up: %v", tc.inside, d)
		}
		if p := parse(t, proxy.device.next(t)); p.Src != inside || p.HopLimit != tc.hopLimit {
			t.Errorf("%s: up: got %+v, want hop limit %d", tc.inside, p, tc.hopLimit)
		}
		if d := proxy.Send(echoPacket(tc.far, inside, 64, 64), tun.Headroom); d != DropNone {
			t.Fatalf("%s: down: %v", tc.inside, d)
		}
		if p := parse(t, client.device.next(t)); p.Dst != inside {
			t.Errorf("%s: down: got %+v", tc.inside, p)
		}
	}
	t.Run("no loop", func(t *testing.T) {
		if d := client.Send(echoPacket(netip.MustParseAddr("10.77.0.17"),
			netip.MustParseAddr("10.77.0.20"), 64, 64), tun.Headroom); d != DropDestination {
			t.Errorf("got %v", d)
		}
		wantICMP(t, client.device.next(t), netip.MustParseAddr("10.77.0.17"), 3, 0)
	})
}
