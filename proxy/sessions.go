package proxy

import (
	"math"
	"slices"
	"strconv"
	"sync"
	"time"

	"masquevpn/internal/connectip"
)

// sessions is the table of running sessions. It enforces their limits.
type sessions struct {
	mu     sync.Mutex // guards the fields below
	lastID uint64
	byID   map[string]session

	// ended is the sum of the traffic of sessions that were removed.
	ended connectip.Stats

	// userStates has an entry for each user with a session.
	userStates userStates
}

func newSessions() *sessions { return &sessions{byID: make(map[string]session)} }

// add gives ss an ID and puts it into the table, or returns the error of the
// limit that is reached. It returns the sessions that ss replaces; the caller
// stops them. They count until they have ended, so a user has at most one
// session more than allowed. Each kind of session counts on its own.
func (l *sessions) add(ss session, limit limits) (replaced []session, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all, ofUser, b := 0, 0, ss.base()
	for _, other := range l.byID {
		if other.kind() != ss.kind() {
			continue
		}
		all++
		if other.base().owner() != b.owner() {
			continue
		}
		ofUser++
		if ss.replaces(other) {
			replaced = append(replaced, other)
		}
	}
	if len(replaced) > 0 {
		limit.max, limit.maxOfUser = math.MaxInt, limit.maxOfUser+1
	}
	if all >= limit.max {
		return nil, limit.all
	}
	if ofUser >= limit.maxOfUser {
		return nil, limit.ofUser
	}
	l.lastID++
	b.id = strconv.FormatUint(l.lastID, 10)
	l.byID[b.id] = ss
	if l.userStates == nil {
		l.userStates = make(userStates)
	}
	b.userState = l.userStates.open(b.owner(), b.user)
	b.allowed = b.userState.allowed.Load()
	return replaced, nil
}

// remove takes ss out of the table.
func (l *sessions) remove(ss session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := ss.base()
	delete(l.byID, b.id)
	l.userStates.close(b.owner())
	b.stats.AddTo(&l.ended)
}

// addTo adds the traffic of all sessions so far, also of removed ones, to sum.
// It returns the numbers of running sessions by kind. The traffic added never
// decreases from call to call.
func (l *sessions) addTo(sum *connectip.Stats) (tunnels, flows int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended.AddTo(sum)
	for _, ss := range l.byID {
		ss.base().stats.AddTo(sum)
		if ss.kind() == KindIP {
			tunnels++
		} else {
			flows++
		}
	}
	return tunnels, flows
}

// find returns the session with the given ID, or nil.
func (l *sessions) find(id string) session {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.byID[id]
}

// list returns the sessions in the order of their IDs.
func (l *sessions) list() []session {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]session, 0, len(l.byID))
	for _, ss := range l.byID {
		out = append(out, ss)
	}
	slices.SortFunc(out, func(a, b session) int {
		x, _ := strconv.ParseUint(a.base().id, 10, 64)
		y, _ := strconv.ParseUint(b.base().id, 10, 64)
		return int(x) - int(y)
	})
	return out
}

// expired returns the sessions whose users' access ended before now.
func (l *sessions) expired(now time.Time) (list []session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ss := range l.byID {
		if ss.base().userState.expired(now) {
			list = append(list, ss)
		}
	}
	return list
}
