package routing

import (
	"fmt"
	"testing"
)

func TestDefaultInterface(t *testing.T) {
	h := newHost(t)
	both := func() (names string) {
		h.do(func() {
			names = fmt.Sprintf("%q %q", DefaultInterface(false), DefaultInterface(true))
		})
		return names
	}
	if got := both(); got != `"" ""` {
		t.Errorf("got %s without routes", got)
	}
	h.underlay()
	if got := both(); got != `"up0" "up0"` {
		t.Errorf("got %s", got)
	}
	h.do(func() {
		if err := PolicyRouting(); err != nil {
			t.Error(err)
		}
	})
}
