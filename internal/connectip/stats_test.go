package connectip

import (
	"maps"
	"net/netip"
	"testing"

	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
)

// Both endpoints count the same capsules by type. Unknown types count as well.
func TestCapsulesAreCounted(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	if err := client.Request([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/32")}); err != nil {
		t.Fatal(err)
	}
	<-client.assigns
	if err := proxy.AssignDNS(nil); err != nil {
		t.Fatal(err)
	}
	<-client.dns
	if err := proxy.SendPREF64(nil); err != nil {
		t.Fatal(err)
	}
	<-client.pref64
	unknown := quicvarint.Append(quicvarint.Append(nil, 0x2575), 0)
	packet := (&capsule.Datagram{Payload: []byte{9}}).Append(nil)
	if _, err := client.stream.Write(append(append(unknown, unknown...), packet...)); err != nil {
		t.Fatal(err)
	}
	down := map[string]uint64{"address_assign": 2, "route_advertisement": 1, "dns_assign": 1,
		"pref64": 1}
	up := map[string]uint64{"address_request": 1}
	received := map[string]uint64{"address_request": 1, "unknown": 2, "datagram": 1}
	counted := func(traffic *Traffic) map[string]uint64 {
		m := maps.Collect(traffic.EachCapsule())
		if len(m) != len(capsuleNames) {
			t.Fatalf("counts of %d types: %v", len(m), m)
		}
		maps.DeleteFunc(m, func(_ string, n uint64) bool { return n == 0 })
		return m
	}
	for _, tc := range []struct {
		name string
		got  *Traffic
		want map[string]uint64
	}{
		{"sent by the proxy", &proxy.stats.Send, down},
		{"received by the client", &client.stats.Receive, down},
		{"sent by the client", &client.stats.Send, up},
		{"received by the proxy", &proxy.stats.Receive, received},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer func() {
				if t.Failed() {
					t.Logf("got %v, want %v", counted(tc.got), tc.want)
				}
			}()
			waitCount(t, func() bool { return maps.Equal(counted(tc.got), tc.want) })
		})
	}
}

// AddTo adds each count to the sum with the same label.
func TestAddTo(t *testing.T) {
	var s, sum Stats
	for d := DropNone + 1; d < numDrops; d++ {
		s.Receive.DropMany(d, int(d))
		s.Send.DropMany(d, 100*int(d))
	}
	for i := range capsuleNames {
		s.Receive.capsules[i].Add(uint64(i + 1))
	}
	for kind := ippacket.ICMPError(1); kind < ippacket.NumICMPErrors; kind++ {
		for range kind {
			s.ICMPSent.Count(kind)
		}
	}
	s.ICMPSuppressed.Add(5)
	s.Send.Add(70)
	s.AddTo(&sum)
	s.AddTo(&sum)
	drops, icmp, capsules := maps.Collect(sum.Send.EachDrop()), maps.Collect(sum.ICMPSent.Each()),
		maps.Collect(sum.Receive.EachCapsule())
	for d := DropNone + 1; d < numDrops; d++ {
		if n := drops[d.String()]; n != 200*uint64(d) {
			t.Errorf("%d dropped for %v", n, d)
		}
	}
	for kind := ippacket.ICMPError(1); kind < ippacket.NumICMPErrors; kind++ {
		if n := icmp[kind.String()]; n != 2*uint64(kind) || kind.String() == "" {
			t.Errorf("%d ICMP errors %q", n, kind)
		}
	}
	for i, name := range capsuleNames {
		if n := capsules[name]; n != 2*uint64(i+1) {
			t.Errorf("%d capsules %s", n, name)
		}
	}
	if sum.ICMPSent.Total() != 72 || sum.ICMPSuppressed.Load() != 10 ||
		sum.Send.Bytes.Load() != 140 || sum.Send.Packets.Load() != 2 {
		t.Errorf("sums: %d, %d, %d, %d", sum.ICMPSent.Total(), sum.ICMPSuppressed.Load(),
			sum.Send.Bytes.Load(), sum.Send.Packets.Load())
	}
}
