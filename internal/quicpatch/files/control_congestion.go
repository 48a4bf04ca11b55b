package quic

import "sync/atomic"

// congestionSwitch turns congestion control on; nil where it always is.
func (c *Conn) congestionSwitch() *atomic.Bool {
	if !c.config.Uncontrolled {
		return nil
	}
	return &c.controlled
}

// ControlCongestion turns congestion control on, for good, on a connection with
// Config.Uncontrolled.
func (c *Conn) ControlCongestion() { c.controlled.Store(true) }
