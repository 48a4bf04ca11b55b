package connectip

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/ippacket"
	"masquevpn/tun"
)

// deafStream is a request stream whose peer neither sends nor reads.
type deafStream struct {
	ctx       context.Context
	deadlines chan time.Time
	writing   chan time.Time // each deadline that a write took note of
	written   chan struct{}  // closed with the write side
	read      chan struct{}  // and with the read side
	ended     string         // how the write side was
}

func newDeafStream() *deafStream {
	return &deafStream{ctx: context.Background(), deadlines: make(chan time.Time, 10),
		writing: make(chan time.Time, 10), written: make(chan struct{}), read: make(chan struct{})}
}

func (s *deafStream) Write([]byte) (int, error) {
	var timeout <-chan time.Time
	for {
		select {
		case d := <-s.deadlines:
			timeout = time.After(time.Until(d))
			s.writing <- d
		case <-timeout:
			return 0, os.ErrDeadlineExceeded
		case <-s.written:
			return 0, errors.New("canceled")
		}
	}
}

func (s *deafStream) end(how string) {
	if s.ended == "" {
		s.ended = how
		close(s.written)
	}
}

func (s *deafStream) Read([]byte) (int, error) {
	<-s.read
	return 0, errors.New("canceled")
}

func (s *deafStream) ReceiveDatagram(ctx context.Context) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s *deafStream) Close() error                          { s.end("closed"); return nil }
func (s *deafStream) CancelWrite(code quic.StreamErrorCode) { s.end("reset") }
func (s *deafStream) CancelRead(quic.StreamErrorCode)       { close(s.read) }
func (s *deafStream) SetWriteDeadline(d time.Time) error    { s.deadlines <- d; return nil }
func (s *deafStream) Context() context.Context              { return s.ctx }
func (s *deafStream) StreamID() quic.StreamID               { return 4 }

// deaf runs a Conn on a deafStream, and returns what Run returned.
func deaf(t *testing.T) (c *Conn, s *deafStream, stop func(), done chan error) {
	s = newDeafStream()
	c = New(s, nil, Config{Device: make(device, 1), Stats: &Stats{}})
	c.datagrams.conn = &fakeQUIC{limit: 1400}
	ctx, stop := context.WithCancel(t.Context())
	done = make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	return c, s, stop, done
}

// A peer that does not read a capsule is given up after a while, and until then
// nothing else waits for it.
func TestPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s, stop, done := deaf(t)
		defer stop()
		start := time.Now()
		wrote := make(chan error, 1)
		go func() { wrote <- c.Advertise(nil) }()
		synctest.Wait()
		if err := c.SetDenied([]netip.Prefix{host(target4)}, nil); err != nil {
			t.Error(err)
		}
		if time.Since(start) != 0 {
			t.Error("a change of the policy waits for the peer")
		}
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Run: %v", err)
		}
		if err := <-wrote; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Advertise: %v", err)
		}
		if took := time.Since(start); took != writeTimeout {
			t.Errorf("given up after %v, want %v", took, writeTimeout)
		}
		if s.ended != "reset" {
			t.Errorf("the stream was %s in the middle of a capsule", s.ended)
		}
		if err := c.Assign(nil); err == nil {
			t.Error("a capsule was written after the end")
		}
	})
}

// A tunnel that ends while its peer does not read is not held up, and its
// stream not closed in the middle of a capsule.
func TestEndWhilePeerDoesNotRead(t *testing.T) {
	t.Run("in a capsule", func(t *testing.T) {
		// not in a bubble, where time stands still for a goroutine that waits
		// for a mutex
		c, s, stop, done := deaf(t)
		wrote := make(chan error, 1)
		go func() { wrote <- c.Advertise(nil) }()
		first := <-s.writing
		stop()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := <-wrote; err == nil || s.ended != "reset" {
			t.Errorf("Advertise: %v; the stream was %s", err, s.ended)
		}
		if last := <-s.writing; !last.Before(first) {
			t.Errorf("the capsule had until %v, and at the end until %v", first, last)
		}
	})
	t.Run("between capsules", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, s, stop, done := deaf(t)
			synctest.Wait()
			stop()
			if err := <-done; err != nil || s.ended != "closed" {
				t.Errorf("Run: %v; the stream was %s, want closed in good order", err, s.ended)
			}
			if err := c.Advertise(nil); err == nil {
				t.Error("a capsule was written after the end")
			}
		})
	})
}

// A peer that refuses to hear more ends the tunnel.
func TestStopSending(t *testing.T) {
	for code, inOrder := range map[http3.ErrCode]bool{http3.ErrCodeNoError: true,
		http3.ErrCodeRequestCanceled: false} {
		client, proxy := rawPair(t, Config{}, Config{})
		proxy.start(t.Context())
		client.stream.CancelRead(quic.StreamErrorCode(code))
		if err := proxy.wait(t); err == nil || errors.Is(err, ErrClosedByPeer) != inOrder {
			t.Errorf("%v: Run returned %v", code, err)
		}
		client.start(t.Context())
		client.wait(t)
	}
}

// Capsules are handled at a rate that their effects can bear; long ones count
// for more, and packets not at all.
func TestPace(t *testing.T) {
	routes := func(n int) *capsule.RouteAdvertisement {
		return &capsule.RouteAdvertisement{Routes: make([]capsule.Route, n)}
	}
	for _, tc := range []struct {
		name    string
		capsule capsule.Capsule
		n       int
		want    time.Duration
	}{
		{"packets", &capsule.Datagram{}, 10000, 0},
		{"a burst", &capsule.AddressAssign{}, capsuleBurst, 0},
		{"short ones", &capsule.DNSAssign{}, capsuleBurst + 100, 100 * time.Second / capsuleRate},
		{"long ones", routes(10 * entriesPerCapsule), capsuleBurst,
			(11*capsuleBurst - capsuleBurst) * time.Second / capsuleRate},
		{"the longest", &capsule.AddressRequest{Addresses: make([]capsule.Address,
			1000*entriesPerCapsule)}, 2, capsuleBurst * time.Second / capsuleRate},
		{"prefixes", &capsule.PREF64{Prefixes: make([]netip.Prefix, 100)}, capsuleBurst, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, start := newPace(), time.Now()
				for range tc.n {
					if err := p.wait(t.Context(), tc.capsule); err != nil {
						t.Fatal(err)
					}
				}
				if took := time.Since(start).Round(time.Millisecond); took != tc.want {
					t.Errorf("%d took %v, want %v", tc.n, took, tc.want)
				}
			})
		})
	}
}

// flood writes b on the stream of e again and again, until the test ends.
func flood(t *testing.T, e *end, b []byte) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if _, err := e.stream.Write(b); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		e.stream.CancelWrite(0)
		<-done
	})
}

// A tunnel that is held up ends all the same.
func TestPacedPeerIsEnded(t *testing.T) {
	client, proxy := newPair(t, Config{}, Config{})
	flood(t, client, bytes.Repeat((&capsule.AddressAssign{}).Append(nil), 1000))
	for range capsuleBurst {
		<-proxy.assigns
	}
	proxy.stop()
	if err := proxy.wait(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

// More addresses than are looked at for each packet are too many.
func TestTooManyAddresses(t *testing.T) {
	assigned := make([]capsule.Address, MaxAssigned+1)
	a := clientAddr4
	for i := range assigned {
		assigned[i].Prefix = host(a)
		a = a.Next()
	}
	client, proxy := newPair(t, Config{}, Config{})
	if err := proxy.Assign(assigned[1:]); err != nil {
		t.Fatal(err)
	}
	<-client.assigns
	if err := proxy.Assign(assigned); err != nil {
		t.Fatal(err)
	}
	if err := client.wait(t); !errors.Is(err, capsule.ErrTooLarge) ||
		!strings.Contains(err.Error(), fmt.Sprint(MaxAssigned+1)) {
		t.Errorf("Run: %v", err)
	}
}

// While the device does not take packets, those in capsules wait in the stream:
// they may be long.
func TestLongPacketsDoNotPileUp(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	for range cap(proxy.device) { // it takes no more
		proxy.device <- nil
	}
	pkt := echoPacket(clientAddr4, target4, 64, 60000)[tun.Headroom:]
	long := (&capsule.Datagram{Payload: append([]byte{contextIPPacket}, pkt...)}).Append(nil)
	flood(t, client, long)
	came := &proxy.stats.Receive.capsules[capsuleIndex(capsule.TypeDatagram)]
	waitCount(t, func() bool { return came.Load() > 0 })
	time.Sleep(100 * time.Millisecond) // for those that should not come
	if n := came.Load(); n > 2 {
		t.Errorf("%d packets wait", n)
	}
	for range 100 { // the others were not lost
		for len(proxy.device.next(t)) == 0 {
		}
	}
	client.stop()
	for open := true; open; { // what is still on its way
		select {
		case <-proxy.device:
		case <-proxy.done:
			open = false
		}
	}
}

// A flood of packets that deserve an ICMP error costs no memory.
func TestICMPErrorsOfAFlood(t *testing.T) {
	c := newFake(&fakeQUIC{limit: 1400}, Config{Stats: &Stats{}, Self: []netip.Addr{proxyAddr4}})
	if err := c.Assign([]capsule.Address{{Prefix: host(clientAddr4)}}); err != nil {
		t.Fatal(err)
	}
	spoofed := ippacket.AppendEcho(nil, elsewhere4, target4, 64, true, 1, 1, nil)
	for range 2 * errorBurst {
		if d := c.admit(spoofed); d != DropSource {
			t.Fatalf("got %v", d)
		}
	}
	if n := testing.AllocsPerRun(1000, func() { c.admit(spoofed) }); n != 0 {
		t.Errorf("%v allocations for each packet", n)
	}
}

// slowStream is a request stream whose peer reads, but slowly.
type slowStream struct {
	*deafStream
	perChunk time.Duration
	got      int
}

func (s *slowStream) SetWriteDeadline(time.Time) error { return nil }

func (s *slowStream) Write(b []byte) (int, error) {
	time.Sleep(s.perChunk)
	s.got += len(b)
	return len(b), nil
}

// A long capsule may take longer than a peer may be silent, as long as some of
// it is read all the time.
func TestLongCapsuleOnASlowPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowStream{deafStream: newDeafStream(), perChunk: writeTimeout / 2}
		c := New(s, nil, Config{Device: make(device, 1), Stats: &Stats{}})
		var routes []capsule.Route
		for i := range 4*writeChunk/10 + 1 {
			a := netip.AddrFrom4([4]byte{11, byte(i >> 15), byte(i >> 7), byte(i << 1)})
			routes = append(routes, capsule.Route{Start: a, End: a})
		}
		start := time.Now()
		if err := c.Advertise(routes); err != nil || s.got < 4*writeChunk {
			t.Errorf("%d bytes were written, %v", s.got, err)
		}
		if took := time.Since(start); took < writeTimeout {
			t.Errorf("it took %v, want longer than %v", took, writeTimeout)
		}
	})
}
