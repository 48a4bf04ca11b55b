// Package congestion selects the congestion control of a QUIC connection that
// carries a tunnel. Either the connections inside the tunnel control
// congestion, or QUIC does.
//
// Stock quic-go always controls congestion itself. The choice exists only in
// builds with the tag quicpatch, which use an edited quic-go; see [Selectable].
package congestion

import "fmt"

// Mode is a value of the configuration key congestion in section tunnel.
type Mode string

const (
	// Inner leaves congestion control to the connections inside the tunnel,
	// which have their own (RFC 9484 section 10). With QUIC's in addition, each
	// loss would slow them down twice, and their packets would wait in QUIC.
	// The packets of the outer connection are Not-ECT.
	Inner Mode = "inner"

	// Outer uses QUIC's NewReno for all packets of the tunnel.
	Outer Mode = "outer"
)

// Check returns m, or the default Inner if m is empty. The error means that m
// is not a Mode.
func (m Mode) Check() (Mode, error) {
	switch m {
	case "":
		return Inner, nil
	case Inner, Outer:
		return m, nil
	}
	return m, fmt.Errorf("%q is neither %q nor %q", m, Inner, Outer)
}

// Describe returns the effect of m in this build, for users.
func (m Mode) Describe() string {
	if !Selectable {
		return string(Outer) + ", by a stock quic-go; build the programs with make to leave it to the connections inside"
	}
	m, _ = m.Check()
	return string(m)
}
