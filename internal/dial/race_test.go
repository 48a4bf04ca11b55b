package dial

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"masquevpn/internal/discovery"
)

// A far is a server at an address: after some time it answers, or fails.
type far struct {
	after   time.Duration
	failure Failure // 0: it answers
}

// silent is how long an attempt without an answer takes.
const silent = handshakeTimeout

// groups returns groups of records. Each letter of a record is one of its
// addresses.
func groups(names ...[]string) (list []discovery.Group) {
	for _, g := range names {
		var group discovery.Group
		for _, r := range g {
			record := discovery.Record{Target: r, Port: 443, Verify: []string{"example.org"}}
			for _, a := range r {
				record.Addresses = append(record.Addresses, address(a))
			}
			group.Records = append(group.Records, record)
		}
		list = append(list, group)
	}
	return list
}

// address returns the address with a name of one letter.
func address(name rune) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(name)}) }

// TestRace checks when addresses are dialed, and which wins.
func TestRace(t *testing.T) {
	ok := func(after time.Duration) far { return far{after, 0} }
	for _, tt := range []struct {
		name    string
		groups  []discovery.Group
		servers map[rune]far
		want    string // the address that wins, or the failure
		took    time.Duration
		dialed  string // times and addresses
	}{
		{"a slow group is not overtaken", groups([]string{"a"}, []string{"b"}),
			map[rune]far{'a': ok(300 * time.Millisecond)}, "a", 300 * time.Millisecond, "0s a"},
		{"the next group follows when all failed", groups([]string{"ab"}, []string{"c"}),
			map[rune]far{'a': {silent, Silence}, 'b': {time.Second, Broken}, 'c': ok(0)},
			"c", silent,
			"0s a, 250ms b, 5s c"},
		{"the second record starts after a second", groups([]string{"a", "b"}),
			map[rune]far{'a': {silent, Silence}, 'b': ok(100 * time.Millisecond)}, "b",
			1100 * time.Millisecond, "0s a, 1s b"},
		{"the second record starts when the first failed", groups([]string{"ab", "c"}),
			map[rune]far{'a': {100 * time.Millisecond, Broken},
				'b': {100 * time.Millisecond, Broken},
				'c': ok(0)}, "c", 200 * time.Millisecond, "0s a, 100ms b, 200ms c"},
		{"addresses are a quarter of a second apart", groups([]string{"abc"}),
			map[rune]far{'a': {silent, Silence}, 'b': {silent, Silence}, 'c': ok(0)}, "c",
			500 * time.Millisecond, "0s a, 250ms b, 500ms c"},
		{"the wrong certificate, then the right one", groups([]string{"a", "b"}),
			map[rune]far{'a': {10 * time.Millisecond, Identity}, 'b': ok(0)}, "b",
			10 * time.Millisecond, "0s a, 10ms b"},
		{"refused credentials end the attempt", groups([]string{"a", "b"}, []string{"c"}),
			map[rune]far{'a': {0, Credentials}, 'b': ok(0), 'c': ok(0)}, "Credentials", 0, "0s a"},
		{"identity says more than silence", groups([]string{"ab"}, []string{"c"}),
			map[rune]far{'a': {silent, Silence}, 'b': {0, Identity}, 'c': {0, Unsent}}, "Identity",
			silent, "0s a, 250ms b, 5s c"},
		{"silence says more than unsent packets", groups([]string{"ab"}),
			map[rune]far{'a': {0, Unsent}, 'b': {silent, Silence}}, "Silence", silent,
			"0s a, 0s b"},
		{"an attempt has an end", groups([]string{"a"}, []string{"b"}, []string{"c"}, []string{"d"},
			[]string{"e"},
			[]string{"f"}, []string{"g"}),
			map[rune]far{'a': {silent, Silence}, 'b': {silent, Silence}, 'c': {silent, Silence},
				'd': {silent, Silence}, 'e': {silent, Silence}, 'f': {silent + 1, Silence},
				'g': ok(0)}, "Silence",
			attemptTimeout, "0s a, 5s b, 10s c, 15s d, 20s e, 25s f"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				var mu sync.Mutex
				var dialed []string
				d := &Dialer{dialOne: func(ctx context.Context, r *discovery.Record,
					a netip.AddrPort) (*Conn, error) {
					name := rune(a.Addr().As4()[3])
					mu.Lock()
					dialed = append(dialed, fmt.Sprintf("%v %c", time.Since(start), name))
					mu.Unlock()
					f := tt.servers[name]
					select {
					case <-time.After(f.after):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if f.failure != 0 {
						return nil,
							&Error{Failure: f.failure, Record: *r, Addr: a, Err: errors.New("no")}
					}
					return &Conn{Remote: a}, nil
				}}
				c, err := d.Dial(t.Context(), tt.groups)
				got := ""
				if err == nil {
					got = string(rune(c.Remote.Addr().As4()[3]))
				} else if e := asError(err); e != nil {
					got = map[Failure]string{Credentials: "Credentials", Identity: "Identity",
						Silence: "Silence"}[e.Failure]
				}
				if took := time.Since(start); got != tt.want || took != tt.took {
					t.Errorf("got %q (%v) after %v, want %q after %v", got, err, took, tt.want,
						tt.took)
				}
				if s := strings.Join(dialed, ", "); s != tt.dialed {
					t.Errorf("got the attempts %s, want %s", s, tt.dialed)
				}
			})
		})
	}
}

// TestDialCanceled checks that the end of the context ends an attempt.
func TestDialCanceled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &Dialer{dialOne: func(ctx context.Context, _ *discovery.Record,
			_ netip.AddrPort) (*Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		stop := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(stop) })
		start := time.Now()
		if _, err := d.Dial(ctx, groups([]string{"a", "b"}, []string{"c"})); err != stop ||
			time.Since(start) != time.Second {
			t.Errorf("got %v after %v, want the cause after 1s", err, time.Since(start))
		}
	})
}
