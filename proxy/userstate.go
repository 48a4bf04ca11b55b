package proxy

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go4.org/netipx"

	"masquevpn/proxy/internal/pacer"
)

// expiryInterval is how often it is looked whether a user's time is over.
const expiryInterval = 250 * time.Millisecond

// userState is what all sessions of one user share: what the user may, as the
// users file has it now, and what of the rates is used.
type userState struct {
	reach    atomic.Pointer[netipx.IPSet] // what may be reached, nil for all
	expires  atomic.Pointer[time.Time]    // nil for never
	up, down pacer.Pacer

	// the user is looked up and followed under it, so that the last look counts
	following sync.Mutex

	leases atomic.Int64 // leases of all sessions of the user

	sessions int // that have it
}

// userStates are those of users who have sessions, by name. The mutex of the
// sessions is held.
type userStates map[string]*userState

// open returns the state of u for one more session.
func (l userStates) open(u User) *userState {
	a := l[u.Name]
	if a == nil {
		a = new(userState)
		a.set(u)
		l[u.Name] = a
	}
	a.sessions++
	return a
}

// close takes back an open of the user's state.
func (l userStates) close(name string) {
	a := l[name]
	if a.sessions--; a.sessions == 0 {
		delete(l, name)
	}
}

// set makes the state that of u.
func (a *userState) set(u User) {
	if now, reach := a.reach.Load(), u.reach(); (now == nil) != (reach == nil) ||
		now != nil && !now.Equal(reach) {
		a.reach.Store(reach)
	}
	a.expires.Store(nil)
	if !u.Expires.IsZero() {
		a.expires.Store(&u.Expires)
	}
	a.up.SetRate(u.RateUp)
	a.down.SetRate(u.RateDown)
}

// expired reports whether the user's time is over at now.
func (a *userState) expired(now time.Time) bool {
	at := a.expires.Load()
	return at != nil && !now.Before(*at)
}

// reach returns the set of what u may reach, nil for all.
func (u User) reach() *netipx.IPSet {
	if u.Routes == nil {
		return nil
	}
	return setOf(u.Routes)
}

// expired reports whether u is not let in any more at now. It is a matter of
// the wall clock: Expires has no other.
func (u User) expired(now time.Time) bool { return !u.Expires.IsZero() && !now.Before(u.Expires) }

// UsersChanged makes sessions follow their users. It ends those whose users are
// no more, have other credentials than when the session began, or whose time is
// over; the others have the rates and the routes that their users have now.
func (s *Server) UsersChanged() {
	for _, ss := range s.sessions.list() {
		if err := s.follow(ss); err != nil {
			ss.stop(err)
		}
	}
}

// follow makes ss follow its user as it is now, and returns why it has to end,
// nil when it may go on.
func (s *Server) follow(ss *session) error {
	if ss.user.Name == "" { // there is no authentication
		return nil
	}
	ss.userState.following.Lock()
	defer ss.userState.following.Unlock()
	now, ok := s.cfg().Users.ByName(ss.user.Name)
	switch {
	case !ok:
		return errRevoked
	case now.TokenHash != ss.user.TokenHash || now.Certificate != ss.user.Certificate:
		return errRenewed
	case now.expired(time.Now()):
		return errExpired
	}
	ss.userState.set(now)
	if ss.follows == ss.userState.reach.Load() {
		return nil
	}
	ss.follows = ss.userState.reach.Load()
	if err := ss.updateDenied(); err != nil {
		return err
	}
	ss.refresh()
	return nil
}

// endExpired ends sessions of users whose time is over, until ctx ends. It
// looks at the clock again and again, because timers do not follow when that is
// set.
func (s *Server) endExpired(ctx context.Context) error {
	tick := time.NewTicker(expiryInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, ss := range s.sessions.expired(now.Round(0)) {
				// Round removes the monotonic clock
				ss.stop(errExpired)
			}
		}
	}
}

// expired returns the sessions of users whose time is over.
func (l *sessions) expired(now time.Time) (list []*session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ss := range l.byID {
		if ss.userState.expired(now) {
			list = append(list, ss)
		}
	}
	return list
}

// errExpired is the cause for which the session of a user ends.
var errExpired = errors.New("the user's time is over")

// withheld returns what the proxy advertises, but not to a user who reaches
// only what is in reach.
func (s *Server) withheld(reach *netipx.IPSet) []netip.Prefix {
	if reach == nil {
		return nil
	}
	var b netipx.IPSetBuilder
	for _, p := range s.cfg().Advertise {
		b.AddPrefix(p)
	}
	b.RemoveSet(reach)
	set, _ := b.IPSet() // the prefixes are valid
	return set.Prefixes()
}
