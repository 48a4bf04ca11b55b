package client

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Keys of notices.
const (
	noticePeer    = "peer"    // who answers in the proxy's place
	noticeOverlap = "overlap" // a network of this host holds an address of the tunnel
)

// A notice is something about the tunnel that its user should know. Each has a
// key, so that whoever posted it can change it or take it back.
type notice struct {
	text     string
	degrades bool // the tunnel does not keep a promise: the state is degraded, not connected
}

// warn has the status list a warning under a key; "" takes it back. The state
// stays as it is. It logs nothing.
func (c *Client) warn(key, text string) { c.setNotice(key, notice{text: text}) }

// degrade makes the state of a connected tunnel StateDegraded, with text as its
// reason, until it is called with "" for the same key. It logs nothing.
func (c *Client) degrade(key, text string) { c.setNotice(key, notice{text: text, degrades: true}) }

// warnAll has the status list several warnings under a key, in place of those
// that it lists there, and logs those that are new. It is called with c.noting
// held.
func (c *Client) warnAll(key string, texts []string) {
	c.mu.Lock()
	var before []string
	for k, n := range c.notices {
		if strings.HasPrefix(k, key+" ") {
			before = append(before, n.text)
		}
	}
	c.mu.Unlock()
	for i := range max(len(before), len(texts)) {
		text := ""
		if i < len(texts) {
			text = texts[i]
		}
		if text != "" && !slices.Contains(before, text) {
			c.cfg.Logger.Warn(text)
		}
		c.warn(fmt.Sprintf("%s %02d", key, i), text)
	}
}

func (c *Client) setNotice(key string, n notice) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.notices[key]; old == n || !ok && n.text == "" {
		return
	}
	if n.text == "" {
		delete(c.notices, key)
	} else {
		c.notices[key] = n
	}
	c.status.Warnings = nil
	for _, key := range slices.Sorted(maps.Keys(c.notices)) {
		c.status.Warnings = append(c.status.Warnings, c.notices[key].text)
	}
	if c.status.State == StateConnected || c.status.State == StateDegraded {
		c.setStateLocked(StateConnected, c.connectedReason)
	}
	c.notify()
}

// degradation returns the text of the first notice that degrades the tunnel, ""
// for none. c.mu is held.
func (c *Client) degradation() string {
	for _, key := range slices.Sorted(maps.Keys(c.notices)) {
		if n := c.notices[key]; n.degrades {
			return n.text
		}
	}
	return ""
}

// HasSession reports whether s is of a tunnel with a session that was
// connected: its addresses, routes and interface are in use, even while it is
// degraded.
func HasSession(s Status) bool { return s.State == StateConnected || s.State == StateDegraded }
