package smallmtu

import (
	"net"
	"testing"
	"time"
)

func TestHints(t *testing.T) {
	a := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
	otherPort := &net.UDPAddr{IP: a.IP, Port: 2}
	b := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 1}
	now := time.Unix(1e9, 0)
	for _, tc := range []struct {
		name string
		do   func(h *Hints)
		want bool
	}{
		{"first attempt", func(*Hints) {}, false},
		{"second attempt", func(h *Hints) { h.Begin(otherPort, now.Add(-time.Second)) }, true},
		{"another client's attempt", func(h *Hints) { h.Begin(b, now.Add(-time.Second)) }, false},
		{"late second attempt", func(h *Hints) { h.Begin(a, now.Add(-retryWindow)) }, false},
		{"after a complete handshake", func(h *Hints) {
			h.Begin(a, now.Add(-time.Second))
			h.Done(a)
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var h Hints
			tc.do(&h)
			if got := h.Begin(a, now); got != tc.want {
				t.Errorf("got small packets %v, want %v", got, tc.want)
			}
		})
	}
}

func TestHintsAreBounded(t *testing.T) {
	var h Hints
	for i := range 3 * maxAddrs {
		h.Begin(&net.UDPAddr{IP: net.IPv4(10, byte(i>>16), byte(i>>8), byte(i))}, time.Now())
	}
	if len(h.begun) > maxAddrs {
		t.Errorf("%d addresses are remembered, want %d at most", len(h.begun), maxAddrs)
	}
}
