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
		t.Run(prefix, func(t *testing.T) {
			got := HostAddr(netip.MustParsePrefix(prefix))
			if got != netip.MustParseAddr(want) {
				t.Errorf("got %v, want %s", got, want)
			}
		})
	}
}

// The peer may use all addresses of an assigned prefix. Packets for them never
// leave through the tunnel at the peer's end.
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
		name     string
		inside   string     // address of the client's network
		far      netip.Addr // address behind the proxy
		hopLimit uint8      // expected for a packet sent with 64; 0: not reachable
	}{
		{"client itself", "10.77.0.17", target4, 64},
		{"first address", "10.77.0.16", target4, 63},
		{"last address", "10.77.0.31", target4, 63},
		{"client itself, IPv6", "fd77:0:0:1::1", target6, 64},
		{"other address, IPv6", "fd77:0:0:1:2:3:4:5", target6, 63},
		{"address below", "10.77.0.15", target4, 0},
		{"address above", "10.77.0.32", target4, 0},
		{"address above, IPv6", "fd77:0:0:2::1", target6, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inside := netip.MustParseAddr(tc.inside)
			if tc.hopLimit == 0 {
				testUnreachable(t, client, proxy, inside, tc.far)
				return
			}
			if d := client.Send(echoPacket(inside, tc.far, 64, 64), tun.Headroom); d != DropNone {
				t.Fatalf("to the proxy: dropped, %v", d)
			}
			if p := parse(t, proxy.device.next(t)); p.Src != inside || p.HopLimit != tc.hopLimit {
				t.Errorf("to the proxy: got %+v, want hop limit %d", p, tc.hopLimit)
			}
			if d := proxy.Send(echoPacket(tc.far, inside, 64, 64), tun.Headroom); d != DropNone {
				t.Fatalf("to the client: dropped, %v", d)
			}
			if p := parse(t, client.device.next(t)); p.Dst != inside {
				t.Errorf("to the client: got %+v", p)
			}
		})
	}
	t.Run("no loop", func(t *testing.T) {
		if d := client.Send(echoPacket(netip.MustParseAddr("10.77.0.17"),
			netip.MustParseAddr("10.77.0.20"), 64, 64), tun.Headroom); d != DropDestination {
			t.Errorf("got %v", d)
		}
		wantICMP(t, client.device.next(t), netip.MustParseAddr("10.77.0.17"), 3, 0)
	})
}

// testUnreachable checks that neither endpoint accepts packets between inside,
// which is not assigned to the client, and far.
func testUnreachable(t *testing.T, client, proxy *end, inside, far netip.Addr) {
	t.Helper()
	if d := client.Send(echoPacket(inside, far, 64, 64), tun.Headroom); d != DropSource {
		t.Errorf("sent by the client: %v, want %v", d, DropSource)
	}
	<-client.device // the ICMP error
	before := proxy.stats.Receive.drops[DropSource].Load()
	sendRaw(t, client, echoPacket(inside, far, 64, 64))
	waitCount(t, func() bool { return proxy.stats.Receive.drops[DropSource].Load() > before })
	if d := proxy.Send(echoPacket(far, inside, 64, 64), tun.Headroom); d != DropDestination {
		t.Errorf("sent by the proxy: %v, want %v", d, DropDestination)
	}
	<-proxy.device // the ICMP error
}
