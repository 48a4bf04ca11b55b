package auththrottle

import (
	"fmt"
	"net"
	"testing"
	"time"

	"masquevpn/proxy/internal/source"
)

func TestThrottle(t *testing.T) {
	now := time.Now()
	a := Throttle{now: func() time.Time { return now }}
	remote := func(s string) string {
		return source.Key(&net.UDPAddr{IP: net.ParseIP(s), Port: 9})
	}
	begin := func(addr, user string, want time.Duration) {
		t.Helper()
		got, ok := a.Begin(remote(addr), user)
		if !ok || got != want {
			t.Errorf("a failure of %s waits %v, %v, want %v", addr, got, ok, want)
		}
		a.End()
	}
	for range Burst {
		begin("192.0.2.1", "", 0)
	}
	for i := range 3 {
		begin("192.0.2.1", "", time.Duration(i+1)*time.Second)
	}
	begin("192.0.2.2", "", 0)
	for range 100 {
		_, _ = a.Begin(remote("192.0.2.1"), "")
		a.End()
	}
	begin("192.0.2.1", "", maxDelay)
	now = now.Add(10 * time.Second) // more than the delay
	begin("192.0.2.1", "", 0)
	now = now.Add(3 * forgetAfter)
	begin("192.0.2.1", "", 0)

	// An IPv6 client has a whole network. Failures about one user count
	// together, wherever they come from.
	for i := range Burst {
		begin(fmt.Sprintf("2001:db8::%x", i), "", 0)
		begin(fmt.Sprintf("192.0.2.%d", 100+i), "alice", 0)
	}
	begin("2001:db8::ffff", "", time.Second)
	begin("2001:db8:0:1::1", "", 0)
	begin("192.0.2.99", "alice", time.Second)
	begin("192.0.2.99", "bob", 0)

	// The numbers of remembered keys and of waiting answers are bounded.
	for i := range 5 * maxKeys {
		begin(fmt.Sprintf("10.%d.%d.1", i>>8, i&0xff), "", 0)
	}
	if n := len(a.recent) + len(a.older); n > 2*maxKeys {
		t.Errorf("%d keys are remembered, want %d at most", n, 2*maxKeys)
	}
	for range maxWaiting {
		if _, ok := a.Begin(remote("192.0.2.1"), ""); !ok {
			t.Fatalf("fewer than %d answers may wait", maxWaiting)
		}
	}
	if _, ok := a.Begin(remote("192.0.2.2"), ""); ok {
		t.Errorf("more than %d answers may wait", maxWaiting)
	}
}
