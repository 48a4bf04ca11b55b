// Package congestion chooses who controls congestion on a connection that carries a tunnel: what runs inside the tunnel, or
// QUIC around it.
package congestion

import "fmt"

// Mode is the value of [tunnel] congestion.
type Mode string

const (
	// Inner leaves it to the connections inside the tunnel, which have congestion control of their own (RFC 9484 section 10).
	// QUIC's around them would see their losses twice, and queue what they send. Packets are Not-ECT outside.
	Inner Mode = "inner"
	// Outer is QUIC's own, NewReno, around everything.
	Outer Mode = "outer"
)

// Check returns m with its default, Inner, or an error when it is no mode.
func (m Mode) Check() (Mode, error) {
	switch m {
	case "":
		return Inner, nil
	case Inner, Outer:
		return m, nil
	}
	return m, fmt.Errorf("%q is neither %q nor %q", m, Inner, Outer)
}

// Describe says what m comes down to in this build.
func (m Mode) Describe() string {
	if !Selectable {
		return string(Outer) + ", by a stock quic-go; built with make, the programs leave it to what is inside"
	}
	m, _ = m.Check()
	return string(m)
}
