package quic

import "sync/atomic"

// congestionSwitch returns the switch of congestion control, which is on when
// it is true. It returns nil if congestion control is always on.
func (c *Conn) congestionSwitch() *atomic.Bool {
	if !c.config.Uncontrolled {
		return nil
	}
	return &c.controlled
}

// ControlCongestion turns congestion control on for good. It affects
// connections with Config.Uncontrolled.
func (c *Conn) ControlCongestion() { c.controlled.Store(true) }
