package proxy

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"masquevpn/internal/connectip"
)

// TestSessionsAdd checks that a session replaces all older sessions of its
// instance and user, within the limits.
func TestSessionsAdd(t *testing.T) {
	l := newSessions()
	add := func(user, instance string) (replaced int, err error) {
		ss := newIPSession()
		ss.user, ss.instance = User{Name: user}, instance
		list, err := l.add(ss, limits{3, 2, errTooManySessions, errTooManyOfUser, ""})
		return len(list), err
	}
	for _, tc := range []struct { // in this order
		name           string
		user, instance string
		replaced       int
		err            error
	}{
		{"first", "alice", "a", 0, nil},
		{"another user", "bob", "a", 0, nil},
		{"same instance", "alice", "a", 1, nil},
		{"another instance", "alice", "b", 0, errTooManySessions},
		{"one more than allowed, while the others end", "alice", "a", 2, nil},
		{"two more than allowed", "alice", "a", 0, errTooManyOfUser},
	} {
		t.Run(tc.name, func(t *testing.T) {
			replaced, err := add(tc.user, tc.instance)
			if replaced != tc.replaced || !errors.Is(err, tc.err) {
				t.Errorf("replaces %d, %v; want %d, %v", replaced, err, tc.replaced, tc.err)
			}
		})
	}
}

// TestTokens checks that the proxy stores only valid tokens of clients, and
// serves clients without.
func TestTokens(t *testing.T) {
	for _, tc := range []struct{ name, token, want string }{
		{"short", "ABCDEFGH", "ABCDEFGH"},
		{"long", strings.Repeat("i", 7000), ""},
		{"with a space", "A B", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := startServer(t, nil)
			_, h3 := s.dial(t, nil)
			header := http.Header{connectip.InstanceHeader: {tc.token},
				connectip.InstallationHeader: {tc.token}}
			if rsp, _ := request(t, h3, "CONNECT", "connect-ip", anyPath,
				header); rsp.StatusCode != 200 {
				t.Fatalf("status %d", rsp.StatusCode)
			}
			for _, session := range s.sessions.list() {
				ss := session.base()
				if ss.instance != tc.want || ss.installation != tc.want {
					t.Errorf("the session has %q and %q, want %q", ss.instance, ss.installation,
						tc.want)
				}
			}
		})
	}
}
