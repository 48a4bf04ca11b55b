package proxy

import (
	"errors"
	"math"
	"net/http"
)

// Refusals of a session by a limit.
var (
	errTooManySessions    = errors.New("the proxy has as many sessions as it is configured for")
	errTooManyOfUser      = errors.New("the user has as many sessions as allowed")
	errTooManyFlows       = errors.New("the proxy has as many flows of UDP as it is configured for (limits.udp_flows)")
	errTooManyFlowsOfUser = errors.New("the user has as many flows of UDP as allowed (limits.udp_flows_per_user)")
)

// addressesPerSession is how many leases a user may have, unless something else
// is configured, for each session that the user may have: one of each family.
const addressesPerSession = 2

// limits says how many sessions like ss there may be, and with which errors
// more are refused.
type limits struct {
	max, maxOfUser int
	all, ofUser    error
	what           string // is limited, for the client
}

// limits returns the limits that ss counts for. Flows of UDP, of which a client
// makes many, are no tunnels.
func (ss *session) limits() limits {
	cfg := ss.server.cfg()
	if ss.udp != nil {
		l := limits{cfg.MaxUDPFlows, cfg.MaxUDPFlowsPerUser, errTooManyFlows, errTooManyFlowsOfUser,
			"UDP flows"}
		if ss.user.Name == "" { // everybody is the same user without authentication
			l.maxOfUser = l.max
		}
		return l
	}
	return limits{cfg.MaxSessions, ss.maxSessions(), errTooManySessions, errTooManyOfUser,
		"sessions"}
}

// refuse returns the answer to a request of the user that the limit err
// forbids.
func (l limits) refuse(user string, err error) *refusal {
	if errors.Is(err, l.ofUser) {
		r := refuse(http.StatusTooManyRequests, "connection_limit_reached", "user %q: %v",
			user, err)
		r.details = "too many " + l.what + " of this user"
		return r
	}
	r := refuse(http.StatusServiceUnavailable, "connection_limit_reached", "%v", err)
	r.details = "too many " + l.what
	return r
}

// maxSessions returns how many tunnels the user may have.
func (ss *session) maxSessions() int {
	cfg := ss.server.cfg()
	switch {
	case ss.user.Name == "":
		return cfg.MaxSessions
	case ss.user.Sessions > 0:
		return ss.user.Sessions
	}
	return cfg.MaxSessionsPerUser
}

// maxLeases returns how many addresses and blocks all sessions of the user may
// have together.
func (ss *session) maxLeases() int64 {
	cfg := ss.server.cfg()
	switch {
	case ss.user.Name == "":
		return math.MaxInt64
	case ss.user.MaxAddresses > 0:
		return int64(ss.user.MaxAddresses)
	case cfg.MaxAddressesPerUser > 0:
		return int64(cfg.MaxAddressesPerUser)
	}
	return addressesPerSession * int64(ss.maxSessions())
}
