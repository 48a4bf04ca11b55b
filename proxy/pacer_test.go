package proxy

import (
	"bytes"
	"context"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"masquevpn/internal/flowqueue"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
	"masquevpn/tun/tuntest"
)

// Whoever shares a pacer sends as much as the rate allows together, and about
// the same each.
func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const senders, size, rate, seconds = 4, 1000, 800_000, 10 // 100 packets a second
		var p pacer
		p.rate.Store(rate)
		p.due.Store(int64(time.Since(began))) // the time in here is not that of began
		done := make(chan struct{})
		var sent [senders]int
		var wg sync.WaitGroup
		for i := range senders {
			wg.Go(func() {
				for {
					p.wait(done)
					select {
					case <-done:
						return
					default:
					}
					sent[i]++
					p.spend(size)
				}
			})
		}
		time.Sleep(seconds * time.Second)
		close(done)
		wg.Wait()
		total := 0
		for _, n := range sent {
			total += n
			if n < rate/8/size*seconds/senders/2 {
				t.Errorf("one sent %d packets: %v", n, sent)
			}
		}
		// Each may be one packet early, and the slack is there at the start.
		if want := rate / 8 / size * seconds; total < want || total > want+senders+3 {
			t.Errorf("%d packets in %d seconds, want %d", total, seconds, want)
		}
	})
}

func TestPacerWithoutRate(t *testing.T) {
	var p pacer
	p.spend(1 << 30)
	p.wait(nil)
	if p.behind() != 0 || p.limited() || p.packets(sendBatch) != sendBatch {
		t.Error("the zero value holds somebody")
	}
	for rate, want := range map[int64]int{64_000: 1, 10_000_000: 1, 20_000_000: 3,
		1_000_000_000: sendBatch} {
		p.rate.Store(rate)
		if got := p.packets(sendBatch); got != want {
			t.Errorf("at %d bits per second, %d packets at once, want %d", rate, got, want)
		}
	}
	closed := make(chan struct{})
	close(closed)
	p.rate.Store(64_000)
	p.spend(1 << 30)
	p.wait(closed)
}

// Who writes above the rate does not wait; what is too much is dropped and
// counted, and nothing is lost of what is not.
func TestUplink(t *testing.T) {
	device := tuntest.New(1400)
	a := new(userState)
	ctx, cancel := context.WithCancelCause(t.Context())
	ss := &session{userState: a, ctx: ctx, stop: cancel}
	u := &uplink{Device: device, ss: ss}
	pkt := ippacket.AppendEcho(make([]byte, tun.Headroom), netip.MustParseAddr("10.77.0.2"),
		netip.MustParseAddr("192.0.2.1"), 64, true, 1, 1, make([]byte, 1000))
	write := func(n int) {
		t.Helper()
		for range n {
			if _, err := u.Write([][]byte{slices.Clone(pkt)}, tun.Headroom); err != nil {
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
	if u.queue.Load() != nil {
		t.Error("a user without a rate has a queue")
	}
	a.up.rate.Store(1_000_000_000)
	write(10)
	for range 10 {
		receive()
	}
	a.up.rate.Store(64_000)
	a.up.spend(1 << 20) // nothing goes out for minutes
	const more = 7
	write(flowqueue.Limit + sendBatch + more) // one batch of them may be on its way
	if n := ss.stats.Receive.Drops()["queue_full"]; n < more {
		t.Errorf("%d packets dropped, want %d", n, more)
	}
	cancel(nil)
	u.close()
	write(1) // nothing takes it
}
