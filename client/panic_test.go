package client

import (
	"net/netip"
	"sync/atomic"
	"testing"

	"masquevpn/internal/ippacket"
	"masquevpn/tun/tuntest"
)

// fragile is a device whose first write panics.
type fragile struct {
	*tuntest.Device
	wrote *atomic.Bool
}

func (d fragile) Write(bufs [][]byte, offset int) (int, error) {
	if !d.wrote.Swap(true) {
		panic("on purpose")
	}
	return d.Device.Write(bufs, offset)
}

// A panic in a goroutine of the session ends the session, and the client
// reconnects.
func TestPanicEndsSession(t *testing.T) {
	f := startProxy(t, nil)
	device, wrote := tuntest.New(1400), atomic.Bool{}
	n := startClient(t, f, func(c *Config) {
		c.OpenDevice = func() (Device, error) { return fragile{device, &wrote}, nil }
	})
	n.device = device
	n.awaitConnected(t)
	before := n.Counters().Panics
	own := n.Status().Addresses[0].Addr()
	f.device.Inject(ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.9"), own, 64, true, 1,
		1, nil))
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects == 1
	})
	if got := n.Counters().Panics - before; got != 1 {
		t.Errorf("%d panics are counted, want 1", got)
	}
	carries(t, n, f, own.String(), "192.0.2.2")
}
