package connlimit

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
)

// fakeQUIC is a QUIC connection that records how it is closed.
type fakeQUIC struct {
	ended    chan quic.ApplicationErrorCode
	received atomic.Uint64           // bytes
	done     context.CancelCauseFunc // ends the context of the connection
}

func (c *fakeQUIC) CloseWithError(code quic.ApplicationErrorCode, _ string) error {
	c.ended <- code
	c.done(nil)
	return nil
}

func (c *fakeQUIC) ConnectionStats() quic.ConnectionStats {
	return quic.ConnectionStats{BytesReceived: c.received.Load()}
}

// gate is a Limiter with named connections.
type gate struct {
	*Limiter
	t     *testing.T
	conns map[string]*Conn
	quic  map[string]*fakeQUIC
}

func newGate(t *testing.T, most, mostPerAddress int) *gate {
	l := New(slog.New(slog.DiscardHandler), most, mostPerAddress)
	return &gate{l, t, make(map[string]*Conn), make(map[string]*fakeQUIC)}
}

// opens begins a connection called name from addr.
func (g *gate) opens(name, addr string) {
	g.t.Helper()
	ctx, cancel := context.WithCancelCause(g.t.Context())
	remote := &net.UDPAddr{IP: net.ParseIP(addr), Port: 9}
	ctx, err := g.Begin(ctx, &quic.ClientInfo{RemoteAddr: remote})
	if err != nil {
		g.t.Fatal(err)
	}
	conn := &fakeQUIC{ended: make(chan quic.ApplicationErrorCode, 1), done: cancel}
	g.conns[name], g.quic[name] = FromContext(ctx), conn
	g.Attach(FromContext(ctx), conn)
	synctest.Wait()
}

// has checks the names of the open connections, and the reasons for closing
// others with their numbers.
func (g *gate) has(alive string, ended ...string) {
	g.t.Helper()
	synctest.Wait()
	var names []string
	for _, name := range slices.Sorted(maps.Keys(g.quic)) {
		if len(g.quic[name].ended) == 0 {
			names = append(names, name)
		}
	}
	if got := strings.Join(names, " "); got != alive {
		g.t.Errorf("open connections: got %q, want %q", got, alive)
	}
	var got []string
	_, counts := g.Counts()
	for _, reason := range slices.Sorted(maps.Keys(counts)) {
		if n := counts[reason]; n > 0 {
			got = append(got, fmt.Sprint(reason, " ", n))
		}
	}
	if !slices.Equal(got, ended) {
		g.t.Errorf("reasons: got %q, want %q", got, ended)
	}
}

func TestConnectionsWithoutSession(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(g *gate)
	}{
		{"no request", func(g *gate) {
			g.opens("a", "192.0.2.1")
			time.Sleep(firstRequestTimeout - time.Second)
			g.has("a")
			time.Sleep(2 * time.Second)
			g.has("", "no_request 1")
		}},
		{"a session", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.SessionBegins(g.conns["a"])
			time.Sleep(time.Hour)
			g.has("a")
			if pending, _ := g.Counts(); pending != 0 {
				g.t.Errorf("%d connections are pending, want 0", pending)
			}
		}},
		{"after a session", func(g *gate) {
			g.opens("a", "192.0.2.1")
			for range 3 { // two sessions at once, and then one
				g.SessionBegins(g.conns["a"])
				g.SessionBegins(g.conns["a"])
				g.SessionEnds(g.conns["a"], "alice", 8)
				time.Sleep(time.Hour)
				g.SessionEnds(g.conns["a"], "alice", 8)
				time.Sleep(nextRequestTimeout - time.Second)
			}
			g.has("a")
			time.Sleep(2 * time.Second)
			g.has("", "idle 1")
		}},
		{"too many bytes", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.opens("b", "192.0.2.1")
			g.opens("c", "192.0.2.2")
			g.SessionBegins(g.conns["c"])
			for name, n := range map[string]uint64{"a": maxPendingBytes + 1, "b": maxPendingBytes,
				"c": 1 << 30} {
				g.quic[name].received.Store(n)
			}
			time.Sleep(2 * sweepInterval)
			g.has("b c", "too_many_bytes 1")
		}},
		{"too many", func(g *gate) {
			for i, name := range []string{"a", "b", "c", "d", "e"} {
				g.opens(name, fmt.Sprintf("192.0.2.%d", i))
			}
			g.has("b c d e", "too_many 1")
			g.SessionBegins(g.conns["b"]) // no longer pending
			g.opens("f", "192.0.2.1")
			g.has("b c d e f", "too_many 1")
			g.opens("g", "192.0.2.2")
			g.has("b d e f g", "too_many 2")
		}},
		{"too many, most of one address", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.opens("b", "192.0.2.2")
			g.opens("c", "192.0.2.2")
			g.opens("d", "192.0.2.3")
			g.opens("e", "192.0.2.4") // closes one of 192.0.2.2, which has most
			g.has("a c d e", "too_many 1")
		}},
		{"too many of an address", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.opens("b", "192.0.2.2")
			g.opens("c", "192.0.2.2")
			g.opens("d", "192.0.2.2")
			g.has("a c d", "too_many_of_address 1")
		}},
		{"too many of a network", func(g *gate) {
			g.opens("a", "2001:db8::1")
			g.opens("b", "2001:db8::2")
			g.opens("c", "2001:db8::3")
			g.opens("d", "2001:db8:0:1::1")
			g.has("b c d", "too_many_of_address 1")
		}},
		{"sessions and strangers do not displace each other", func(g *gate) {
			for i := range 20 {
				name := fmt.Sprintf("session%02d", i)
				g.opens(name, "192.0.2.1")
				g.SessionBegins(g.conns[name])
			}
			for i := range 20 {
				g.opens(fmt.Sprintf("stranger%02d", i), "192.0.2.1")
			}
			for i := range 20 {
				g.quic[fmt.Sprintf("stranger%02d",
					i)].ended = make(chan quic.ApplicationErrorCode, 1)
				delete(g.quic, fmt.Sprintf("stranger%02d", i))
			}
			want := make([]string, 20)
			for i := range want {
				want[i] = fmt.Sprintf("session%02d", i)
			}
			g.has(strings.Join(want, " "), "too_many_of_address 18")
		}},
		{"too many idle ones of a user", func(g *gate) {
			for _, name := range []string{"a", "b", "c"} {
				g.opens(name, "192.0.2.1")
				g.SessionBegins(g.conns[name])
				g.SessionEnds(g.conns[name], "alice", 2)
			}
			g.opens("d", "192.0.2.1")
			g.SessionBegins(g.conns["d"])
			g.SessionEnds(g.conns["d"], "bob", 2)
			g.has("b c d", "too_many_of_user 1")
		}},
		{"ended by the client", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.opens("b", "192.0.2.1")
			g.quic["a"].done(nil)
			synctest.Wait()
			g.opens("c", "192.0.2.1")
			g.SessionBegins(g.conns["b"])
			g.quic["b"].done(nil)
			synctest.Wait()
			g.SessionEnds(g.conns["b"], "alice", 2)
			g.opens("d", "192.0.2.1")
			g.has("a b c d") // a and b ended without being closed
			if pending, _ := g.Counts(); pending != 2 {
				g.t.Errorf("%d connections are pending, want 2", pending)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate(t, 4, 2)
				tc.do(g)
				time.Sleep(2 * time.Hour) // ends all connections and timers
			})
		})
	}
}

// TestConnectionsInHandshake checks closing a connection in its handshake,
// which has no QUIC connection yet: its context ends, and a QUIC connection
// that is attached later is closed.
func TestConnectionsInHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, 1, 1)
		ctx, err := g.Begin(t.Context(),
			&quic.ClientInfo{RemoteAddr: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1)}})
		if err != nil {
			t.Fatal(err)
		}
		g.opens("a", "192.0.2.2")
		if ctx.Err() == nil {
			t.Error("the context of the older connection has not ended")
		}
		late := &fakeQUIC{ended: make(chan quic.ApplicationErrorCode, 1),
			done: func(error) {}}
		g.Attach(FromContext(ctx), late)
		synctest.Wait()
		if len(late.ended) != 1 {
			t.Error("the QUIC connection attached later is not closed")
		}
		time.Sleep(time.Hour)
	})
}
