package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/quic-go/quic-go"
	"go4.org/netipx"

	"masquevpn/internal/connectip"
	"masquevpn/internal/rescue"
	"masquevpn/proxy/internal/connlimit"
)

// session is an accepted request: an *ipSession or a *udpSession. The handler
// creates it, [sessions.add] puts it into the table of sessions, and serve
// carries its packets.
type session interface {
	// base returns the part that both kinds of session share.
	base() *sessionBase

	// kind returns KindIP or KindUDP.
	kind() string

	// prepare parses the target in the raw request path and acquires its
	// resources, before the session is put into the table. discard must be
	// called if the session does not start.
	prepare(ctx context.Context, path string) *refusal

	// discard releases the resources of a session that does not start, and
	// ends its context.
	discard()

	// limits returns the limits that the session counts against.
	limits() limits

	// replaces reports whether the session, which is new, takes the place of
	// old, another session of the same user.
	replaces(old session) bool

	// added is called after the session was put into the table, before it
	// starts. replaced are the sessions whose place it takes.
	added(replaced []session)

	// setHeader adds the header fields of this kind to the response.
	setHeader(http.Header)

	// serve carries packets after the response header was written, and calls
	// ended at the end of the session. It may return earlier than that.
	serve(w http.ResponseWriter, remote string, ended endFunc)

	// isSite reports whether the client is the gateway of a site.
	isSite() bool

	// updateDenied applies the destinations that the client may not reach now.
	updateDenied() error

	// configChanged applies a new configuration of the proxy. site reports
	// whether it has a site of the session's user.
	configChanged(site bool)

	// notify schedules an update of the client's routes and DNS configuration,
	// if they changed. It never blocks.
	notify()

	// status describes the session for Server.Sessions.
	status() SessionStatus

	// addAges notes in a how long packets have waited in the session.
	addAges(a *connectip.Ages)
}

// endFunc takes a session that ended with err out of the table, and logs the
// end at level.
type endFunc func(level slog.Level, err error)

// sessionBase is the part that both kinds of session share.
type sessionBase struct {
	shared *shared

	// The fields of this group are set before the session starts.

	id     string // decimal number, set by sessions.add
	user   User   // as authenticated
	method string // authentication method
	since  time.Time
	log    *slog.Logger

	// instance identifies one run of a client program. A session replaces older
	// ones of the same instance, so a client whose path broke gets its
	// addresses back before the proxy notices. Empty if the client sent none.
	instance string

	// installation identifies a device of the user, over restarts of its client
	// program. Empty if the client sent none.
	installation string

	quic        *quic.Conn
	limitedConn *connlimit.Conn // quic in Server.connLimiter; nil if this proxy dialed

	// link is the pair that the session carries; nil for a session of a user,
	// or of a client without authentication.
	link *link

	// userState is shared by all sessions of the user or of the pair.
	userState *userState

	// ctx ends when stop is called, with its argument as the cause.
	ctx  context.Context
	stop context.CancelCauseFunc

	// done is closed when the session has released everything and is no longer
	// in the table.
	done chan struct{}

	stats connectip.Stats // atomic counters

	// allowed is the value of userState.allowed that the session applied last.
	// Guarded by userState.following.
	allowed *netipx.IPSet
}

func (b *sessionBase) base() *sessionBase { return b }

// owner returns the user or the pair.
func (b *sessionBase) owner() owner {
	if b.link != nil {
		return owner{pair: b.link.pair}
	}
	return owner{user: b.user.Name}
}

// The causes for which the proxy ends a session.
var (
	errKicked     = errors.New("ended by the operator")
	errProhibited = errors.New("the user may no longer reach its target")
	errRenewed    = errors.New("the user has other credentials now")
	errReplaced   = errors.New("replaced by a newer session of the same client")
	errSite       = errors.New("the [[site]] of its user was added or removed")
	errRevoked    = errors.New("the user was removed")
	errShutdown   = errors.New("the proxy is stopping")
)

// panicked ends the session because one of its goroutines panicked. It is
// called with no lock held.
func (b *sessionBase) panicked(e *rescue.Error) {
	b.shared.cfg().Logger.Error("a fault of this program ended a session; "+
		"please report it with this line",
		"session", b.id, "user", b.user.Name, "panic", fmt.Sprint(e.Value), "stack",
		string(e.Stack))
	b.stop(e)
}

// guarded returns a function that runs f. A panic in f ends this session
// instead of the program.
func (b *sessionBase) guarded(f func()) func() {
	return func() {
		defer rescue.Catch(b.panicked)
		f()
	}
}

// SessionStatus describes one session, in the format of a client's status.
type SessionStatus struct {
	connectip.Status
	ID     string `json:"id"`
	User   string `json:"user"`
	Remote string `json:"remote"` // address and UDP port
	Kind   string `json:"kind"`   // :protocol of the request, KindIP or KindUDP; KindPeer

	// Target is the host:port that the client requested. Empty for KindIP.
	Target string `json:"target,omitempty"`

	// Networks are the networks behind the client that it advertised and the
	// proxy accepted.
	Networks []netip.Prefix `json:"networks"`
}

// The kinds of sessions.
const (
	KindIP  = connectip.Protocol
	KindUDP = udpProtocol

	// KindPeer is a tunnel that carries a pair. User is the peer's domain.
	KindPeer = "peer"
)

// baseStatus returns the part of the status that both kinds share. Lists are
// empty.
func (b *sessionBase) baseStatus(kind string) SessionStatus {
	s := SessionStatus{ID: b.id, User: b.user.Name, Kind: kind,
		Remote: b.quic.RemoteAddr().String()}
	s.Schema, s.Name, s.State, s.Since = connectip.StatusSchema, b.shared.cfg().Name, "connected",
		b.since
	s.Proxy = connectip.ProxyStatus{Name: b.shared.cfg().Name,
		Endpoint: b.quic.LocalAddr().String(), HTTP: "h3"}
	s.RTT = b.quic.ConnectionStats().SmoothedRTT.Microseconds()
	s.SetTraffic(&b.stats)
	s.Networks, s.Addresses = []netip.Prefix{}, []netip.Prefix{}
	return s
}
