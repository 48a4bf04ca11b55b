package client

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Keys of notices.
const (
	noticePeer    = "peer"    // another peer answers in the proxy's place
	noticeOverlap = "overlap" // a network of this host has an address of the tunnel
)

// notice is a text for the user of the tunnel. It has a key, by which its
// sender replaces or removes it.
type notice struct {
	text string

	// degrades means that the tunnel does not keep a promise: its state is
	// StateDegraded instead of StateConnected.
	degrades bool
}

// warn adds a warning with a key to the status or replaces it. Empty text
// removes it. The state does not change, and nothing is logged.
func (c *Client) warn(key, text string) { c.setNotice(key, notice{text: text}) }

// degrade is warn that also changes the state of a connected tunnel to
// StateDegraded, with text as its reason.
func (c *Client) degrade(key, text string) { c.setNotice(key, notice{text: text, degrades: true}) }

// warnAll replaces the warnings with a key by texts, and logs the new ones.
// c.notingMu is held.
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

// setNotice replaces the notice with a key. An empty text removes it.
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

// HasSession reports whether s describes a tunnel that carries packets: its
// state is StateConnected or StateDegraded.
func HasSession(s Status) bool { return s.State == StateConnected || s.State == StateDegraded }
