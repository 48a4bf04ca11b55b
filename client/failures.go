package client

import (
	"fmt"
	"net/netip"
)

// cause is the cause of a failure. It is the index of failures.
type cause int

// The causes. The zero value is an unknown failure, which may pass.
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
	causeIdentityFound
	causeExpired
	causeClock
	causeNoProxy
	causeNoProxyFound
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

// source is the party that can cause a failure.
type source int

const (
	byHost   source = iota // this host
	byAnyone               // anybody on the path: the peer is not authenticated
	byProxy                // the authenticated proxy
)

// failure describes how the client reacts to a cause. If the failure is final,
// Run restores the host, except for the kill switch, and returns the error.
// Otherwise the host keeps its device and routes, and the client retries.
//
// TestFailureTable checks the two rules of the table. A failure that anybody on
// the path can cause is final only in a client that was started by hand and has
// had no session: otherwise a forged packet could remove the routes. After a
// session, only the authenticated proxy can cause a final failure.
type failure struct {
	name   string
	source source
	kind   Kind

	final finality
}

// finality tells when a failure is final. Each value includes the one before.
type finality int

const (
	never         finality = iota
	byHand                 // before the first session, if started by hand
	beforeSession          // before the first session, also of a service
	always                 // also after a session
)

// failures is the table of docs/failures.md.
var failures = [numCauses]failure{
	causeConfiguration: {"the configuration is wrong", byHost, KindUsage, beforeSession},
	causePrivileges:    {"a privilege is missing", byHost, KindPrivileges, beforeSession},
	causeFailure:       {"any other failure", byHost, KindFailure, never},
	causeNetwork:       {"packets do not leave this host", byHost, KindUnreachable, never},
	causeName:          {"the proxy's name cannot be resolved", byAnyone, KindUnreachable, never},
	causeSilence:       {"nobody answers", byAnyone, KindUnreachable, never},
	causeHandshake:     {"the handshake fails", byAnyone, KindUnreachable, never},
	causeProtocol: {"the peer reports that it does not speak HTTP/3",
		byAnyone, KindUsage, byHand},
	causeEarlyRefusal: {"the peer refuses the client before it has proved that it is the proxy",
		byAnyone, KindCredentials, byHand},
	causeIdentity: {"the certificate is from another authority or for another name",
		byAnyone, KindIdentity, byHand},
	causeIdentityFound: {"a server that the records of a domain lead to has a certificate from another authority or for another name",
		byAnyone, KindIdentity, never},
	causeExpired: {"the certificate has expired", byAnyone, KindIdentity, byHand},
	causeClock: {"the certificate is not valid yet, or has expired by a clock that is not synchronised",
		byAnyone, KindIdentity, never},
	causeNoProxy: {"the peer offers no Extended CONNECT or no HTTP Datagrams",
		byProxy, KindUsage, byHand},
	causeNoProxyFound: {"a server that the records of a domain lead to offers no Extended CONNECT or no HTTP Datagrams",
		byProxy, KindUnreachable, never},
	causeCredentials: {"the proxy refuses the credentials: 401, 407, or an alert about the client's certificate",
		byProxy, KindCredentials, always},
	causeForbidden: {"the proxy does not allow the request: 403", byProxy, KindRefused, always},
	causeAnswer:    {"the proxy answers with another status: 3xx, 4xx", byProxy, KindUsage, byHand},
	causeTarget: {"the proxy finds no address of the target's name",
		byProxy, KindRefused, byHand},
	causeBusy: {"the proxy is busy or fails: 408, 429, 5xx", byProxy, KindFailure, never},
	causeAddresses: {"addresses or routes are not granted, or cannot be used here",
		byProxy, KindRefused, byHand},
	causeEnded: {"the proxy ends the session", byProxy, KindFailure, never},
	causeLost:  {"no packets arrive from the proxy", byAnyone, KindUnreachable, never},
}

// final reports whether Run returns because of c. service is Config.Service,
// and later means that there was a session.
func (c cause) final(service, later bool) bool {
	now := byHand
	switch {
	case later:
		now = always
	case service:
		now = beforeSession
	}
	return failures[c].final >= now
}

// fail returns an Error with the kind of c.
func fail(c cause, err error, reason, remedy string) *Error {
	return &Error{Kind: failures[c].kind, Reason: reason, Remedy: remedy,
		Err: &attempt{cause: c, err: err}}
}

// attempt is the Err of an Error that fail returns. Its cause decides whether
// the client retries.
type attempt struct {
	cause cause
	from  netip.AddrPort // address of the peer; zero: unknown
	err   error          // underlying error; nil: the proxy refused
}

func (a *attempt) Error() string {
	if a.err == nil {
		return failures[a.cause].name
	}
	return a.err.Error()
}

func (a *attempt) Unwrap() error { return a.err }

// attemptOf returns the attempt that e wraps. For an Error from elsewhere it
// returns one with causeFailure, which may pass.
func attemptOf(e *Error) *attempt {
	if a, ok := e.Err.(*attempt); ok {
		return a
	}
	return &attempt{cause: causeFailure, err: e.Err}
}

// statusText returns the reason that the status shows while the client retries.
func statusText(e *Error) string {
	if text := impostorText(e); text != "" {
		return text
	}
	return e.Error()
}

// impostorText returns the text of a warning if a peer has answered that is not
// authenticated, and "" otherwise.
func impostorText(e *Error) string {
	at := ""
	a := attemptOf(e)
	if a.from.IsValid() {
		at = fmt.Sprintf(" at %v", a.from)
	}
	switch a.cause {
	case causeIdentity, causeIdentityFound:
		return fmt.Sprintf("somebody other than the proxy answers%s (%s): ask its operator whether that is intended", at, e.Reason)
	case causeProtocol, causeEarlyRefusal:
		return fmt.Sprintf("somebody who has not proved to be the proxy refuses the connection%s (%s)", at, e.Reason)
	}
	return ""
}

// withAddress adds the address of the peer to err, if err is an *Error.
func withAddress(err error, from netip.AddrPort) error {
	if e, ok := err.(*Error); ok {
		attemptOf(e).from = from
	}
	return err
}
