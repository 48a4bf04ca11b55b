package proxy

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"masquevpn/internal/connectip"
)

// A session replaces all of its instance, and of its user, that are still
// there, without getting around the limits.
func TestSessionsAdd(t *testing.T) {
	l := newSessions()
	add := func(user, instance string) (replaced int, err error) {
		list, err := l.add(&ipSession{sessionBase: sessionBase{user: User{Name: user}, instance: instance}},
			limits{3, 2, errTooManySessions, errTooManyOfUser, ""})
		return len(list), err
	}
	for _, tc := range []struct {
		user, instance string
		replaced       int
		err            error
	}{
		{"alice", "a", 0, nil},
		{"bob", "a", 0, nil}, // another user's
		{"alice", "a", 1, nil},
		{"alice", "b", 0, errTooManySessions},
		{"alice", "a", 2, nil}, // one session more than allowed, while the others end
		{"alice", "a", 0, errTooManyOfUser},
	} {
		replaced, err := add(tc.user, tc.instance)
		if replaced != tc.replaced || !errors.Is(err, tc.err) {
			t.Errorf("%s, instance %s: replaces %d, %v; want %d, %v", tc.user, tc.instance,
				replaced, err, tc.replaced, tc.err)
		}
	}
}

// A token that the proxy would have to keep is short; with another one the
// request goes on without it.
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
