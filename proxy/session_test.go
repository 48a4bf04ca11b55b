package proxy

import (
	"errors"
	"testing"
)

// A session replaces all of its instance, and of its user, that are still there, without getting around the limits.
func TestSessionsAdd(t *testing.T) {
	l := sessions{byID: make(map[string]*session)}
	add := func(user, instance string) (replaced int, err error) {
		list, err := l.add(&session{user: User{Name: user}, instance: instance}, 3, 2)
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
			t.Errorf("%s, instance %s: replaces %d, %v; want %d, %v", tc.user, tc.instance, replaced, err, tc.replaced, tc.err)
		}
	}
}
