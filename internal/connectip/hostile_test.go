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

// stalledStream is a request stream whose peer neither sends nor reads.
type stalledStream struct {
	ctx       context.Context
	deadlines chan time.Time // arguments of SetWriteDeadline
	writing   chan time.Time // deadlines that a running Write applied
	written   chan struct{}  // closed when the write side ends
	read      chan struct{}  // closed when the read side ends
	ended     string         // "closed" or "reset": how the write side ended
}

func newStalledStream() *stalledStream {
	return &stalledStream{ctx: context.Background(), deadlines: make(chan time.Time, 10),
		writing: make(chan time.Time, 10), written: make(chan struct{}), read: make(chan struct{})}
}

func (s *stalledStream) Write([]byte) (int, error) {
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

func (s *stalledStream) end(how string) {
	if s.ended == "" {
		s.ended = how
		close(s.written)
	}
}

func (s *stalledStream) Read([]byte) (int, error) {
	<-s.read
	return 0, errors.New("canceled")
}

func (s *stalledStream) ReceiveDatagram(ctx context.Context) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s *stalledStream) Close() error                          { s.end("closed"); return nil }
func (s *stalledStream) CancelWrite(code quic.StreamErrorCode) { s.end("reset") }
func (s *stalledStream) CancelRead(quic.StreamErrorCode)       { close(s.read) }
func (s *stalledStream) SetWriteDeadline(d time.Time) error    { s.deadlines <- d; return nil }
func (s *stalledStream) Context() context.Context              { return s.ctx }
func (s *stalledStream) StreamID() quic.StreamID               { return 4 }

// runStalled runs a Conn on a stalledStream. done receives the result of Run.
func runStalled(t *testing.T) (c *Conn, s *stalledStream, stop func(), done chan error) {
	s = newStalledStream()
	c = New(s, nil, Config{Device: make(device, 1), Stats: &Stats{}})
	c.datagrams.conn = &fakeQUIC{limit: 1400}
	ctx, stop := context.WithCancel(t.Context())
	done = make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	return c, s, stop, done
}

// The tunnel ends if the peer does not read a capsule for writeTimeout. Until
// then, changes of the policy do not wait for the peer.
func TestPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s, stop, done := runStalled(t)
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
			t.Errorf("the tunnel ended after %v, want %v", took, writeTimeout)
		}
		if s.ended != "reset" {
			t.Errorf("the stream was %s in the middle of a capsule", s.ended)
		}
		if err := c.Assign(nil); err == nil {
			t.Error("a capsule was written after the end")
		}
	})
}

// A tunnel whose peer does not read ends without delay, and its stream is not
// closed in the middle of a capsule.
func TestEndWhilePeerDoesNotRead(t *testing.T) {
	t.Run("in a capsule", func(t *testing.T) {
		// Not in a synctest bubble, because a goroutine that waits for a mutex
		// is not durably blocked.
		c, s, stop, done := runStalled(t)
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
			t.Errorf("deadline of the capsule: %v, later %v, want an earlier one", first, last)
		}
	})
	t.Run("between capsules", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, s, stop, done := runStalled(t)
			synctest.Wait()
			stop()
			if err := <-done; err != nil || s.ended != "closed" {
				t.Errorf("Run: %v; the stream was %s, want closed", err, s.ended)
			}
			if err := c.Advertise(nil); err == nil {
				t.Error("a capsule was written after the end")
			}
		})
	})
}

// A peer that sends STOP_SENDING ends the tunnel.
func TestStopSending(t *testing.T) {
	for code, closed := range map[http3.ErrCode]bool{http3.ErrCodeNoError: true,
		http3.ErrCodeRequestCanceled: false} {
		t.Run(code.String(), func(t *testing.T) {
			client, proxy := rawPair(t, Config{}, Config{})
			proxy.start(t.Context())
			client.stream.CancelRead(quic.StreamErrorCode(code))
			if err := proxy.wait(t); err == nil || errors.Is(err, ErrClosedByPeer) != closed {
				t.Errorf("Run returned %v", err)
			}
			client.start(t.Context())
			client.wait(t)
		})
	}
}

// The rate of capsules is limited. Long capsules count as several, and packets
// are not limited.
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
		{"burst", &capsule.AddressAssign{}, capsuleBurst, 0},
		{"short capsules", &capsule.DNSAssign{}, capsuleBurst + 100,
			100 * time.Second / capsuleRate},
		{"long capsules", routes(10 * entriesPerCapsule), capsuleBurst,
			(11*capsuleBurst - capsuleBurst) * time.Second / capsuleRate},
		{"longest capsules", &capsule.AddressRequest{Addresses: make([]capsule.Address,
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
					t.Errorf("%d capsules took %v, want %v", tc.n, took, tc.want)
				}
			})
		})
	}
}

// flood writes b to the stream of e repeatedly until the test ends.
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

// A tunnel ends even while a capsule waits because of the rate limit.
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

// A peer that assigns more than MaxAssigned addresses ends the tunnel.
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

// While the device is blocked, packets in capsules wait in the stream. They may
// be long, so memory must not hold many.
func TestLongPacketsDoNotPileUp(t *testing.T) {
	client, proxy := remoteAccess(t, Config{})
	for range cap(proxy.device) { // fill the device
		proxy.device <- nil
	}
	pkt := echoPacket(clientAddr4, target4, 64, 60000)[tun.Headroom:]
	long := (&capsule.Datagram{Payload: append([]byte{contextIPPacket}, pkt...)}).Append(nil)
	flood(t, client, long)
	received := &proxy.stats.Receive.capsules[capsuleIndex(capsule.TypeDatagram)]
	waitCount(t, func() bool { return received.Load() > 0 })
	time.Sleep(100 * time.Millisecond) // give further packets the time to arrive
	if n := received.Load(); n > 2 {
		t.Errorf("%d packets wait", n)
	}
	for range 100 { // no packet was lost
		for len(proxy.device.next(t)) == 0 {
		}
	}
	client.stop()
	for open := true; open; { // discard the packets that still arrive
		select {
		case <-proxy.device:
		case <-proxy.done:
			open = false
		}
	}
}

// A flood of packets that cause ICMP errors does not allocate memory.
func TestICMPErrorFlood(t *testing.T) {
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
		t.Errorf("%v allocations per packet, want none", n)
	}
}

// slowStream is a request stream whose peer reads, but slowly.
type slowStream struct {
	*stalledStream
	perChunk time.Duration
	got      int
}

func (s *slowStream) SetWriteDeadline(time.Time) error { return nil }

func (s *slowStream) Write(b []byte) (int, error) {
	time.Sleep(s.perChunk)
	s.got += len(b)
	return len(b), nil
}

// A long capsule may take longer than writeTimeout if the peer keeps reading.
func TestLongCapsuleOnASlowPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowStream{stalledStream: newStalledStream(), perChunk: writeTimeout / 2}
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
