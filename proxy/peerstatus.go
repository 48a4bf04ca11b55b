package proxy

import (
	"net/netip"
	"strings"
	"time"
)

// PeerState is the state of a pair.
type PeerState string

// The states of a pair.
const (
	PeerConnected  PeerState = "connected"
	PeerConnecting PeerState = "connecting"
	PeerWaiting    PeerState = "waiting" // there will be another attempt
	PeerRefused    PeerState = "refused" // the peer refused; there will be another attempt
	PeerExpired    PeerState = "expired"
	PeerIdle       PeerState = "idle" // the peer has to connect, and has not
)

// PeerStates are all states of a pair.
var PeerStates = []PeerState{PeerConnected, PeerConnecting, PeerWaiting, PeerRefused, PeerExpired,
	PeerIdle}

// PeerStatus describes a pair: a peer, and the domain of the proxy that is
// linked with it.
type PeerStatus struct {
	Domain string    `json:"domain"`
	Local  string    `json:"local"`
	State  PeerState `json:"state"`

	// The fields of this group are set while the pair is connected.

	Identity   string         `json:"identity,omitempty"`
	Server     string         `json:"server,omitempty"`     // name in the peer's certificate
	Connection string         `json:"connection,omitempty"` // its ID
	DialedBy   string         `json:"dialed_by,omitempty"`  // "us" or "them"
	Since      *time.Time     `json:"since,omitempty"`
	Networks   []netip.Prefix `json:"networks"` // accepted networks of the peer

	Reason  string  `json:"reason,omitempty"`   // explains a state other than connected
	RetryIn float64 `json:"retry_in,omitempty"` // seconds until the next attempt
}

// PeerTotals are numbers of pairs.
type PeerTotals struct {
	Configured int `json:"configured"`
	Connected  int `json:"connected"`
}

// state returns the state of a pair that no stream carries.
func (d *peerDialer) state(p *Peer) (s PeerStatus) {
	s = PeerStatus{Domain: p.Domain, Local: p.Local, State: PeerIdle, Networks: []netip.Prefix{}}
	if p.expired(time.Now().Round(0)) {
		s.State = PeerExpired
		return s
	}
	d.mu.Lock()
	l := d.links[pairKey{p.Domain, p.Local}]
	d.mu.Unlock()
	if l == nil {
		return s
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.State, s.Reason = l.state, l.reason
	if !l.retry.IsZero() {
		s.RetryIn = max(time.Until(l.retry).Round(time.Millisecond).Seconds(), 0)
	}
	if s.State == PeerConnected { // its stream has just ended, or has just begun
		s.State = PeerConnecting
	}
	return s
}

// Peers describes the configured peers, in their order.
func (s *Server) Peers() []PeerStatus {
	list := make([]PeerStatus, len(s.cfg().Peers))
	for i := range list {
		p := &s.cfg().Peers[i]
		list[i] = s.peerDialer.state(p)
		if carriers := s.peers.bindings.of(p.pair()); len(carriers) > 0 {
			s.peers.describe(carriers[0], &list[i])
		}
	}
	return list
}

// describe sets the fields of p for a pair that ss carries.
func (t *peers) describe(ss *ipSession, p *PeerStatus) {
	conn := ss.link.conn
	known, _ := t.connections.proof(conn, ss.link.pair)
	since := ss.since
	p.State, p.Identity, p.Server = PeerConnected, known.Identity.String(), known.Name
	p.Connection, p.Since, p.DialedBy = conn.id, &since, "them"
	if conn.dialed {
		p.DialedBy = "us"
	}
	p.Networks = ss.status().Networks
	p.Reason, p.RetryIn = "", 0
}

// peerTotals returns the numbers of pairs, nil without a [[peer]].
func (c *Counters) peerTotals() *PeerTotals {
	if c.Peers == nil {
		return nil
	}
	t := &PeerTotals{Connected: c.Peers.States[PeerConnected]}
	for _, n := range c.Peers.States {
		t.Configured += n
	}
	return t
}

// peerStates returns the number of pairs in each state.
func (s *Server) peerStates() map[PeerState]int {
	states := make(map[PeerState]int)
	for _, state := range PeerStates {
		states[state] = 0
	}
	for _, p := range s.Peers() {
		states[p.State]++
	}
	return states
}

// DisconnectPeer ends all pairs with the peer of this domain, and returns their
// number. ok reports whether there is such a peer, which may come back.
func (s *Server) DisconnectPeer(domain string) (ended int, ok bool) {
	for _, p := range s.cfg().Peers {
		if !strings.EqualFold(p.Domain, domain) {
			continue
		}
		ok = true
		for _, ss := range s.peers.bindings.of(p.pair()) {
			s.peers.revoke(ss, errPeerKicked)
			ended++
		}
	}
	return ended, ok
}
