//go:build quicpatch

package connectip

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"masquevpn/capsule"
	"masquevpn/tun"
)

// Capsules are sent even while the queue of datagrams, each of which fills a
// packet, is never empty. The stock quic-go sends capsules only when it is; the
// patch 0011-control changes that.
func TestCapsulesThroughAFullTunnel(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	const rounds = 10
	defer fillQueue(t, proxy)()
	for i := range rounds {
		route := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24)
		if err := proxy.Advertise(capsule.Routes([]netip.Prefix{route}, 0)); err != nil {
			t.Fatal(err)
		}
		select {
		case got := <-client.routes:
			if len(got) != 1 || got[0].Start != route.Addr() {
				t.Fatalf("routes %v, want %v", got, route)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("capsule %d did not arrive", i)
		}
		if t.Failed() {
			break
		}
	}
}

// fillQueue keeps e's queue of datagrams full until stop is called.
func fillQueue(t *testing.T, e *end) (stop func()) {
	t.Helper()
	const floods = 64
	mtu := func() int { n, _ := e.datagrams.mtu(); return n }
	var stopped atomic.Bool
	var wg sync.WaitGroup
	started := make(chan struct{}, floods)
	for range floods {
		wg.Go(func() {
			buf := make([]byte, tun.Headroom+1500)
			for n := 0; !stopped.Load(); n++ {
				if n == 100 {
					started <- struct{}{}
				}
				var tooLarge *quic.DatagramTooLargeError
				if err := e.datagrams.send(buf[:tun.Headroom+mtu()], tun.Headroom); err != nil &&
					!errors.As(err, &tooLarge) {
					t.Errorf("sending: %v", err)
					return
				}
			}
		})
	}
	for range floods {
		<-started
	}
	return func() {
		stopped.Store(true)
		wg.Wait()
	}
}

// TrySend drops a packet where Send would block.
func TestTrySend(t *testing.T) {
	_, proxy := remoteAccess(t, Config{})
	defer fillQueue(t, proxy)()
	waitCount(t, func() bool {
		return proxy.TrySend(echoPacket(target4, clientAddr4, 64, 100),
			tun.Headroom) == DropQueueFull
	})
	if got := proxy.stats.Send.Drops()[DropQueueFull.String()]; got != 1 {
		t.Errorf("%d packets counted as dropped, want 1", got)
	}
}
