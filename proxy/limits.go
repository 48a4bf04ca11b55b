package proxy

import (
	"errors"
	"net/http"
)

// The errors of the limits on sessions.
var (
	errTooManySessions = errors.New("the proxy has as many sessions as allowed (limits.sessions)")
	errTooManyOfUser   = errors.New("the user has as many sessions as allowed")
	errTooManyFlows    = errors.New("the proxy has as many UDP flows as allowed " +
		"(limits.udp_flows)")
	errTooManyFlowsOfUser = errors.New("the user has as many UDP flows as allowed " +
		"(limits.udp_flows_per_user)")
)

// addressesPerSession is the number of leases that a user may have by default
// for each allowed session: one of each family.
const addressesPerSession = 2

// limits are the limits on the number of sessions of one kind.
type limits struct {
	max, maxOfUser int // sessions of all users, and of one user

	// all and ofUser are the errors for requests above max and maxOfUser.
	all, ofUser error

	counted string // name of the sessions in messages to the client, in the plural
}

// refuse returns the refusal of a request of the user, because of the limit
// with the error err.
func (l limits) refuse(user string, err error) *refusal {
	if errors.Is(err, l.ofUser) {
		r := refuse(http.StatusTooManyRequests, "connection_limit_reached", "user %q: %v",
			user, err)
		r.details = "too many " + l.counted + " of this user"
		return r
	}
	r := refuse(http.StatusServiceUnavailable, "connection_limit_reached", "%v", err)
	r.details = "too many " + l.counted
	return r
}
