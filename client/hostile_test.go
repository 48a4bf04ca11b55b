package client

import (
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
)

// A flood of ROUTE_ADVERTISEMENTs changes the kernel only a few times, and the
// last one counts.
func TestFloodOfAdvertisements(t *testing.T) {
	const flood = 100
	last := netip.MustParsePrefix("198.51.100.0/24")
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		var assigned []capsule.Address
		for _, a := range requested(capsule.NewReader(str, 1<<16)) {
			if a.Prefix.Addr().Is4() {
				a.Prefix = netip.MustParsePrefix("10.77.0.2/32")
			}
			assigned = append(assigned, a)
		}
		capsules := []capsule.Capsule{&capsule.AddressAssign{Addresses: assigned}}
		for i := range flood {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24)
			if i == flood-1 {
				p = last
			}
			capsules = append(capsules,
				&capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{p}, 0)})
		}
		write(str, capsules...)
		<-r.Context().Done()
	})
	n := startClient(t, f, nil)
	deadline := time.Now().Add(60 * time.Second)
	for ; !slices.Equal(n.network.Last().Routes,
		[]netip.Prefix{last}); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the kernel has %v, want %v", n.network.Last().Routes, last)
		}
	}
	if got := len(n.network.States()); got > flood/3 {
		t.Errorf("%d capsules changed the kernel %d times", flood, got)
	}
}
