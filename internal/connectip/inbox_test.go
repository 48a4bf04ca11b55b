package connectip

import (
	"testing"

	"masquevpn/capsule"
	"masquevpn/tun"
)

// receiver returns a Conn without a network and its device. The peer may send
// packets from clientAddr4 to target4.
func receiver(t *testing.T) (*Conn, device) {
	t.Helper()
	dev := make(device, 2*maxBatch)
	c := New(fakeStream{}, nil, Config{Device: dev, Stats: &Stats{}})
	c.link.peerAssigned = append(c.link.peerAssigned, host(clientAddr4))
	c.link.advertised = capsule.Routes(append(c.link.peerAssigned[:0:0], host(target4)), 0)
	if err := c.updatePolicy(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.stop(nil) })
	return c, dev
}

// Packets reach the device while other peers hold all batches, however they
// arrive.
func TestPacketsWithoutABatch(t *testing.T) {
	for range cap(batches) {
		b := <-batches
		defer b.free()
	}
	datagram := append([]byte{contextIPPacket},
		echoPacket(clientAddr4, target4, 64, 100)[tun.Headroom:]...)
	long := append([]byte{contextIPPacket},
		echoPacket(clientAddr4, target4, 64, 2*maxUnbatched)[tun.Headroom:]...)
	for _, tc := range []struct {
		name    string
		receive func(*Conn, *inbox)
		want    []int // packet lengths in bytes
	}{
		{"from the connection's goroutine", func(_ *Conn, in *inbox) {
			for range 3 {
				in.HandleDatagram(datagram)
			}
			in.FlushDatagrams()
		}, []int{100, 100, 100}},
		{"from the stream", func(c *Conn, _ *inbox) {
			c.handleDatagram(datagram, unbatched{c, new(Busy)})
		}, []int{100}},
		{"in a long capsule", func(c *Conn, _ *inbox) {
			c.handleDatagram(long, unbatched{c, new(Busy)})
		}, []int{2 * maxUnbatched}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, dev := receiver(t)
			tc.receive(c, newInbox(c))
			for _, want := range tc.want {
				if got := len(dev.next(t)); got != want {
					t.Errorf("got a packet of %d bytes, want %d", got, want)
				}
			}
			if got, want := c.cfg.Stats.Receive.Packets.Load(), uint64(len(tc.want)); got != want {
				t.Errorf("%d packets counted, want %d", got, want)
			}
		})
	}
}

// An inbox returns its batch to the pool when it is flushed and when its Conn
// ends.
func TestBatchesAreReturned(t *testing.T) {
	datagram := append([]byte{contextIPPacket},
		echoPacket(clientAddr4, target4, 64, 100)[tun.Headroom:]...)
	for _, tc := range []struct {
		name string
		end  func(*Conn, *inbox)
	}{
		{"flushed", func(_ *Conn, in *inbox) { in.FlushDatagrams() }},
		{"ended", func(c *Conn, in *inbox) { c.stop(nil); in.close() }},
		{"ended, with more packets than flush writes itself", func(c *Conn, in *inbox) {
			for range maxInline {
				in.HandleDatagram(datagram)
			}
			c.stop(nil)
			in.FlushDatagrams()
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, _ := receiver(t)
			in := newInbox(c)
			in.HandleDatagram(datagram)
			if got, want := len(batches), cap(batches)-1; got != want {
				t.Fatalf("%d batches are free while one is being filled, want %d", got, want)
			}
			tc.end(c, in)
			if got, want := len(batches), cap(batches); got != want {
				t.Errorf("%d batches are free afterwards, want %d", got, want)
			}
		})
	}
}
