package proxy

import (
	"context"
	"errors"
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

// UsersChanged applies changes of the users to their sessions. It ends sessions
// of users that were removed, have other credentials than at the start of the
// session, or whose access has ended. The other sessions get the users' present
// rates and routes.
func (s *Server) UsersChanged() {
	for _, ss := range s.sessions.list() {
		if err := followUser(ss, s.cfg().Users); err != nil {
			ss.base().stop(err)
		}
	}
}

// followUser applies the present state of its user to ss. An error is the
// reason why ss must end.
func followUser(ss session, users Users) error {
	b := ss.base()
	if b.user.Name == "" { // there is no authentication
		return nil
	}
	b.userState.following.Lock()
	defer b.userState.following.Unlock()
	now, ok := users.ByName(b.user.Name)
	switch {
	case !ok:
		return errRevoked
	case now.TokenHash != b.user.TokenHash || now.Certificate != b.user.Certificate:
		return errRenewed
	case now.expired(time.Now()):
		return errExpired
	}
	b.userState.set(now)
	if b.follows == b.userState.reach.Load() {
		return nil
	}
	b.follows = b.userState.reach.Load()
	if err := ss.updateDenied(); err != nil {
		return err
	}
	ss.notify()
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
				ss.base().stop(errExpired)
			}
		}
	}
}

// errExpired is the cause for which the session of a user ends.
var errExpired = errors.New("the user's time is over")
