package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"masquevpn/proxy"
	"masquevpn/routing"
)

// killSwitch is a KillSwitch that records its calls and other events.
type killSwitch struct {
	health chan routing.KillSwitchHealth // values that Keep reports; nil: none

	mu     sync.Mutex // guards the fields below
	events []string
	err    error // returned by Close
}

func (k *killSwitch) Close(iface string) error {
	k.record(fmt.Sprintf("close but for %q", iface))
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
}

func (k *killSwitch) Maintain(ctx context.Context, report func(routing.KillSwitchHealth)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case h := <-k.health:
			report(h)
		}
	}
}

func (k *killSwitch) record(event string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.events = append(k.events, event)
}

// The client closes the kill switch before it opens the device, and again
// before each attempt to connect, because another program may have removed it.
func TestKillSwitchComesFirst(t *testing.T) {
	k := &killSwitch{}
	f := startProxy(t, nil)
	n := startClient(t, f, func(c *Config) {
		c.KillSwitch = k
		open := c.OpenDevice
		c.OpenDevice = func() (Device, error) {
			k.record("device")
			return open()
		}
	})
	n.awaitConnected(t)
	f.Kick(f.Sessions()[0].ID)
	n.await(t, "connected again", func(s Status) bool {
		return s.State == StateConnected && s.Reconnects > 0
	})
	iface := n.Status().Interface
	again := fmt.Sprintf("close but for %q", iface)
	k.mu.Lock()
	defer k.mu.Unlock()
	if want := []string{`close but for ""`, "device", again, again}; !slices.Equal(k.events, want) {
		t.Errorf("got %q, want %q", k.events, want)
	}
	if s := n.Status(); s.KillSwitch != KillSwitchClosed {
		t.Errorf("got kill switch %q in the status", s.KillSwitch)
	}
}

// If the kill switch cannot be closed, the client opens no device and does not
// connect.
func TestKillSwitchThatDoesNotClose(t *testing.T) {
	f := startProxy(t, func(c *proxy.Config) { c.Methods = []string{proxy.MethodNone} })
	n := startClient(t, f, func(c *Config) {
		c.KillSwitch = &killSwitch{err: fmt.Errorf("no nftables: %w", os.ErrPermission)}
		c.OpenDevice = func() (Device, error) { return nil, errors.New("the device was opened") }
	})
	if e := n.failure(t); e.Kind != KindPrivileges ||
		!strings.HasPrefix(e.Reason, "closing the kill switch: no nftables") {
		t.Errorf("got %+v", e)
	}
	if s := n.Status(); s.KillSwitch != KillSwitchOff {
		t.Errorf("got kill switch %q in the status", s.KillSwitch)
	}
}
