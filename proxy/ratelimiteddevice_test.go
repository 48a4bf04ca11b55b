package proxy

import (
	"bytes"
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"masquevpn/internal/flowqueue"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
	"masquevpn/tun/tuntest"
)

// TestRateLimitedDevice checks that a write above the rate does not block:
// packets above the rate are dropped and counted, and all others arrive.
func TestRateLimitedDevice(t *testing.T) {
	device := tuntest.New(1400)
	a := new(userState)
	ctx, cancel := context.WithCancelCause(t.Context())
	ss := &sessionBase{userState: a, ctx: ctx, stop: cancel}
	d := &rateLimitedDevice{Device: device, ss: ss}
	pkt := ippacket.AppendEcho(make([]byte, tun.Headroom), netip.MustParseAddr("10.77.0.2"),
		netip.MustParseAddr("192.0.2.1"), 64, true, 1, 1, make([]byte, 1000))
	write := func(n int) {
		t.Helper()
		for range n {
			if _, err := d.Write([][]byte{slices.Clone(pkt)}, tun.Headroom); err != nil {
				t.Fatal(err)
			}
		}
	}
	receive := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if got, err := device.Receive(ctx); err != nil || !bytes.Equal(got, pkt[tun.Headroom:]) {
			t.Fatalf("got % x, %v", got, err)
		}
	}
	write(1)
	receive()
	if d.queue.Load() != nil {
		t.Error("a user without a rate has a queue")
	}
	a.up.SetRate(1_000_000_000)
	write(10)
	for range 10 {
		receive()
	}
	a.up.SetRate(64_000)
	a.up.Spend(1 << 20) // nothing goes out for minutes
	const more = 7
	write(flowqueue.Limit + sendBatch + more) // one batch of them may be on its way
	if n := ss.stats.Receive.Drops()["queue_full"]; n < more {
		t.Errorf("%d packets dropped, want %d", n, more)
	}
	cancel(nil)
	d.close()
	write(1) // nothing takes it
}
