package proxy

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

// someConnection is a QUIC connection that keeps what it is told.
type someConnection struct {
	ended    chan quic.ApplicationErrorCode
	received atomic.Uint64 // bytes
	done     context.CancelCauseFunc
}

func (c *someConnection) CloseWithError(code quic.ApplicationErrorCode, _ string) error {
	c.ended <- code
	c.done(nil)
	return nil
}

func (c *someConnection) ConnectionStats() quic.ConnectionStats {
	return quic.ConnectionStats{BytesReceived: c.received.Load()}
}

// gate is connections, and those that the test makes.
type gate struct {
	*connections
	t    *testing.T
	made map[string]*connection
	quic map[string]*someConnection
}

func newGate(t *testing.T, most, mostPerAddress int) *gate {
	l := newConnections(slog.New(slog.DiscardHandler), most, mostPerAddress)
	return &gate{l, t, make(map[string]*connection), make(map[string]*someConnection)}
}

// opens makes a connection called name from addr.
func (g *gate) opens(name, addr string) {
	g.t.Helper()
	ctx, cancel := context.WithCancelCause(g.t.Context())
	remote := &net.UDPAddr{IP: net.ParseIP(addr), Port: 9}
	ctx, err := g.begin(ctx, &quic.ClientInfo{RemoteAddr: remote})
	if err != nil {
		g.t.Fatal(err)
	}
	conn := &someConnection{ended: make(chan quic.ApplicationErrorCode, 1), done: cancel}
	g.made[name], g.quic[name] = connectionOf(ctx), conn
	g.attach(connectionOf(ctx), conn)
	synctest.Wait()
}

// has checks which connections there are, and how many ended for which reason.
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
		g.t.Errorf("the connections are %q, want %q", got, alive)
	}
	var got []string
	_, counts := g.counts()
	for _, reason := range slices.Sorted(maps.Keys(counts)) {
		if n := counts[reason]; n > 0 {
			got = append(got, fmt.Sprint(reason, " ", n))
		}
	}
	if !slices.Equal(got, ended) {
		g.t.Errorf("they ended by %q, want %q", got, ended)
	}
}

func TestConnectionsWithoutSession(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(g *gate)
	}{
		{"without a request", func(g *gate) {
			g.opens("a", "192.0.2.1")
			time.Sleep(firstRequestTimeout - time.Second)
			g.has("a")
			time.Sleep(2 * time.Second)
			g.has("", "no_request 1")
		}},
		{"with a session", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.accepted(g.made["a"])
			time.Sleep(time.Hour)
			g.has("a")
			if pending, _ := g.counts(); pending != 0 {
				g.t.Errorf("%d are pending", pending)
			}
		}},
		{"after a session", func(g *gate) {
			g.opens("a", "192.0.2.1")
			for range 3 { // two sessions at once, and then one
				g.accepted(g.made["a"])
				g.accepted(g.made["a"])
				g.released(g.made["a"], "alice", 8)
				time.Sleep(time.Hour)
				g.released(g.made["a"], "alice", 8)
				time.Sleep(nextRequestTimeout - time.Second)
			}
			g.has("a")
			time.Sleep(2 * time.Second)
			g.has("", "idle 1")
		}},
		{"that sends much", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.opens("b", "192.0.2.1")
			g.opens("c", "192.0.2.2")
			g.accepted(g.made["c"])
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
			g.accepted(g.made["b"]) // which makes room
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
			g.opens("e", "192.0.2.4") // 192.0.2.2 has most, and gives way
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
		{"sessions are not in the way of others, nor others in theirs", func(g *gate) {
			for i := range 20 {
				name := fmt.Sprintf("session%02d", i)
				g.opens(name, "192.0.2.1")
				g.accepted(g.made[name])
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
				g.accepted(g.made[name])
				g.released(g.made[name], "alice", 2)
			}
			g.opens("d", "192.0.2.1")
			g.accepted(g.made["d"])
			g.released(g.made["d"], "bob", 2)
			g.has("b c d", "too_many_of_user 1")
		}},
		{"that ended by itself", func(g *gate) {
			g.opens("a", "192.0.2.1")
			g.opens("b", "192.0.2.1")
			g.quic["a"].done(nil)
			synctest.Wait()
			g.opens("c", "192.0.2.1")
			g.accepted(g.made["b"])
			g.quic["b"].done(nil)
			synctest.Wait()
			g.released(g.made["b"], "alice", 2)
			g.opens("d", "192.0.2.1")
			g.has("a b c d") // a and b are over, which nobody had to tell them
			if pending, _ := g.counts(); pending != 2 {
				g.t.Errorf("%d are pending", pending)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate(t, 4, 2)
				tc.do(g)
				time.Sleep(2 * time.Hour) // until nothing waits any more
			})
		})
	}
}

// A connection that is ended in its handshake has no QUIC connection yet: its
// context ends, and stock quic-go's is closed once there is one.
func TestConnectionsInHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(t, 1, 1)
		ctx, err := g.begin(t.Context(),
			&quic.ClientInfo{RemoteAddr: &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1)}})
		if err != nil {
			t.Fatal(err)
		}
		g.opens("a", "192.0.2.2")
		if ctx.Err() == nil {
			t.Error("the context of the older one has not ended")
		}
		late := &someConnection{ended: make(chan quic.ApplicationErrorCode, 1),
			done: func(error) {}}
		g.attach(connectionOf(ctx), late)
		synctest.Wait()
		if len(late.ended) != 1 {
			t.Error("the connection that came late goes on")
		}
		time.Sleep(time.Hour)
	})
}
