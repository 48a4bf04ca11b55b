package client

import (
	"fmt"
	"net/netip"
)

// A cause is why there is no session: a row of the table of failures.
type cause int

// The causes. The zero value is a failure that may pass by itself.
const (
	causeFailure cause = iota
	causeConfiguration
	causePrivileges
	causeNetwork
	causeName
	causeSilence
	causeHandshake
	causeProtocol
	causeEarlyRefusal
	causeIdentity
	causeExpired
	causeClock
	causeNoProxy
	causeCredentials
	causeForbidden
	causeAnswer
	causeTarget
	causeBusy
	causeAddresses
	causeEnded
	causeLost
	numCauses
)

// source is who can bring a failure about.
type source int

const (
	byHost source = iota // nobody but this host
	// whoever can send packets to this host: the far end has not proved that it
	// is the proxy
	byAnyone
	byProxy // the proxy, which has proved who it is
)

// failure is what follows from a cause. The host keeps its device and its
// routes, and the client tries again, unless the failure is final: then the
// client ends, and all is as it was before, but for a kill switch, which stays
// closed.
//
// Two rules stand behind the table, and its test checks them. Whatever anybody
// on the way can bring about is final only while somebody waits for the outcome
// of a start by hand: else a packet without a key would take the routes away.
// Once a session has run, nothing is final but what the proxy itself, having
// proved who it is, says of this user.
type failure struct {
	name   string
	source source
	kind   Kind // and so the exit code

	// Whether it is final: in a client that was started by hand and has had no
	// session yet, in a service that has had none, and in either after that.
	byHand, service, later bool
}

// failures is the table; docs/failures.md shows it.
var failures = [numCauses]failure{
	causeConfiguration: {"the configuration is wrong", byHost, KindUsage, true, true, false},
	causePrivileges:    {"a privilege is missing", byHost, KindPrivileges, true, true, false},
	causeFailure:       {"something else fails", byHost, KindFailure, false, false, false},
	causeNetwork: {"packets do not leave this host", byHost, KindUnreachable, false,
		false, false},
	causeName: {"the proxy's name cannot be resolved", byAnyone, KindUnreachable, false,
		false, false},
	causeSilence:   {"nobody answers", byAnyone, KindUnreachable, false, false, false},
	causeHandshake: {"the handshake breaks off", byAnyone, KindUnreachable, false, false, false},
	causeProtocol: {"the far end says that it does not speak HTTP/3", byAnyone, KindUsage, true,
		false, false},
	causeEarlyRefusal: {"the far end refuses the client before it has proved who it is", byAnyone,
		KindCredentials, true, false, false},
	causeIdentity: {"the certificate is of another authority or for another name", byAnyone,
		KindIdentity, true, false, false},
	causeExpired: {"the certificate has expired", byAnyone, KindIdentity, true, false, false},
	causeClock:   {"the certificate is not valid yet, or has expired by a clock that is not synchronised", byAnyone, KindIdentity, false, false, false},
	causeNoProxy: {"the far end offers no Extended CONNECT or no HTTP Datagrams", byProxy,
		KindUsage, true, false, false},
	causeCredentials: {"the proxy refuses the credentials: 401, 407, or an alert about the client's certificate", byProxy, KindCredentials, true, true, true},
	causeForbidden: {"the proxy does not allow the request: 403", byProxy, KindRefused, true,
		true, true},
	causeAnswer: {"the proxy gives another answer that is no success: 3xx, 4xx", byProxy,
		KindUsage, true, false, false},
	causeTarget: {"the proxy finds no address of the target's name", byProxy, KindRefused, true,
		false, false},
	causeBusy: {"the proxy is busy or fails: 408, 429, 5xx", byProxy, KindFailure, false,
		false, false},
	causeAddresses: {"addresses or routes are not granted, or cannot be used here", byProxy,
		KindRefused, true, false, false},
	causeEnded: {"the proxy ends the session", byProxy, KindFailure, false, false, false},
	causeLost: {"nothing comes from the proxy any more", byAnyone, KindUnreachable, false,
		false, false},
}

// final reports whether a client ends because of c. service says that nobody
// waits for the outcome of its start, later that a session has run.
func (c cause) final(service, later bool) bool {
	f := failures[c]
	switch {
	case later:
		return f.later
	case service:
		return f.service
	default:
		return f.byHand
	}
}

// fail makes the Error of a cause.
func fail(c cause, err error, reason, remedy string) *Error {
	return &Error{Kind: failures[c].kind, Reason: reason, Remedy: remedy,
		Err: &attempt{cause: c, err: err}}
}

// attempt is the Err of the Errors that fail makes. It decides whether the
// client tries again.
type attempt struct {
	cause cause
	from  netip.AddrPort // address of the far end; zero: unknown
	err   error          // what went wrong; nil: the proxy refused
}

func (a *attempt) Error() string {
	if a.err == nil {
		return failures[a.cause].name
	}
	return a.err.Error()
}

func (a *attempt) Unwrap() error { return a.err }

// attemptOf returns the attempt that e is about. An Error from elsewhere is a
// failure that may pass by itself.
func attemptOf(e *Error) *attempt {
	if a, ok := e.Err.(*attempt); ok {
		return a
	}
	return &attempt{cause: causeFailure, err: e.Err}
}

// statusText returns the reason for a missing session while the client goes on
// trying.
func statusText(e *Error) string {
	if text := impostorText(e); text != "" {
		return text
	}
	return e.Error()
}

// impostorText describes a far end that answers without having proved to be the
// proxy. It returns "" for other failures.
func impostorText(e *Error) string {
	at := ""
	a := attemptOf(e)
	if a.from.IsValid() {
		at = fmt.Sprintf(" at %v", a.from)
	}
	switch a.cause {
	case causeIdentity:
		return fmt.Sprintf("somebody other than the proxy answers%s (%s): its operator can tell whether that is so", at, e.Reason)
	case causeProtocol, causeEarlyRefusal:
		return fmt.Sprintf("somebody who has not proved to be the proxy refuses the connection%s (%s)", at, e.Reason)
	}
	return ""
}

// withAddress adds the address of the far end to the error of an attempt.
func withAddress(err error, from netip.AddrPort) error {
	if e, ok := err.(*Error); ok {
		attemptOf(e).from = from
	}
	return err
}
