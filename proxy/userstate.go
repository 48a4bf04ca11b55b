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

// expiryInterval is the time between checks for users whose access has ended.
const expiryInterval = 250 * time.Millisecond

// errExpired is the reason for ending the sessions of a user whose access has
// ended.
var errExpired = errors.New("the user's time is over")

// userState is the state that the sessions of one user share: the present
// permissions of the user and the use of its rates.
type userState struct {
	// allowed contains the destinations that the user may reach. nil means no
	// limit.
	allowed atomic.Pointer[netipx.IPSet]

	// expires is the time at which access ends. nil means never.
	expires atomic.Pointer[time.Time]

	up, down pacer.Pacer
	leases   atomic.Int64 // leases of all sessions of the user

	// following is held while the user is looked up and applied, so that the
	// latest lookup is applied last.
	following sync.Mutex

	// sessions is the number of sessions. sessions.mu guards it.
	sessions int
}

// userStates contains the state of each user, and of each pair, with sessions.
// It is used with sessions.mu held.
type userStates map[owner]*userState

// open returns the state of o for a new session of u.
func (m userStates) open(o owner, u User) *userState {
	state := m[o]
	if state == nil {
		state = new(userState)
		state.set(u)
		m[o] = state
	}
	state.sessions++
	return state
}

// close undoes one call of open when the session ends.
func (m userStates) close(o owner) {
	state := m[o]
	if state.sessions--; state.sessions == 0 {
		delete(m, o)
	}
}

// set applies the permissions and rates of u. It keeps the pointer in allowed
// if the destinations are the same.
func (state *userState) set(u User) {
	old, allowed := state.allowed.Load(), u.allowed()
	if (old == nil) != (allowed == nil) || old != nil && !old.Equal(allowed) {
		state.allowed.Store(allowed)
	}
	state.expires.Store(nil)
	if !u.Expires.IsZero() {
		state.expires.Store(&u.Expires)
	}
	state.up.SetRate(u.RateUp)
	state.down.SetRate(u.RateDown)
}

// expired reports whether access has ended at the time now.
func (state *userState) expired(now time.Time) bool {
	at := state.expires.Load()
	return at != nil && !now.Before(*at)
}

// allowed returns the destinations that u may reach. nil means no limit.
func (u User) allowed() *netipx.IPSet {
	if u.Routes == nil {
		return nil
	}
	return setOf(u.Routes)
}

// expired reports whether the access of u has ended at the time now. Only the
// wall clock counts, because Expires has no monotonic clock.
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
	if b.user.Name == "" || b.link != nil { // nobody, or a peer, who is no user
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
	if b.allowed == b.userState.allowed.Load() {
		return nil
	}
	b.allowed = b.userState.allowed.Load()
	if err := ss.updateDenied(); err != nil {
		return err
	}
	ss.notify()
	return nil
}

// endExpired ends sessions of users whose access has ended, until ctx is done.
// It polls, because timers do not follow a change of the wall clock.
func (s *Server) endExpired(ctx context.Context) error {
	tick := time.NewTicker(expiryInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			wall := now.Round(0) // removes the monotonic clock
			for _, ss := range s.sessions.expired(wall) {
				if tunnel, ok := ss.(*ipSession); ok && tunnel.link != nil {
					s.peers.revoke(tunnel, errPeerExpired)
					continue
				}
				ss.base().stop(errExpired)
			}
		}
	}
}
