package client

import (
	"slices"
	"testing"
)

func TestNotices(t *testing.T) {
	f := startProxy(t, nil)
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	check := func(step, state, reason string, warnings ...string) {
		t.Helper()
		s := n.Status()
		if s.State != state || s.Reason != reason || !slices.Equal(s.Warnings, warnings) {
			t.Errorf("%s: got %q, %q, warnings %q; want %q, %q, %q", step, s.State, s.Reason,
				s.Warnings, state, reason, warnings)
		}
	}
	n.warn("b", "a warning")
	check("warning", StateConnected, "", "a warning")
	n.degrade("a", "something is missing")
	check("degraded", StateDegraded, "something is missing", "something is missing", "a warning")
	n.setState(StateConnected, "a narrow path")
	check("connected with a reason", StateDegraded, "something is missing", "something is missing",
		"a warning")
	n.warn("b", "")
	n.degrade("a", "")
	check("mended", StateConnected, "a narrow path")
	n.degrade("a", "again")
	n.setState(StateReconnecting, "lost")
	check("reconnecting", StateReconnecting, "lost", "again")
}
