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

// killSwitch keeps what it is told, and by whom it is called.
type killSwitch struct {
	health chan routing.KillSwitchHealth // values to report; nil: none

	mu     sync.Mutex
	events []string
	err    error
}

func (k *killSwitch) Close(iface string) error {
	k.note(fmt.Sprintf("close but for %q", iface))
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

func (k *killSwitch) note(event string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.events = append(k.events, event)
}

// The kill switch is closed before there is a device, and again before each
// attempt to connect: somebody may have removed it.
func TestKillSwitchComesFirst(t *testing.T) {
	k := &killSwitch{}
	f := startProxy(t, nil)
	n := startClient(t, f, func(c *Config) {
		c.KillSwitch = k
		open := c.OpenDevice
		c.OpenDevice = func() (Device, error) {
			k.note("device")
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
		t.Errorf("the status says %q", s.KillSwitch)
	}
}

// Nothing is opened, and nobody is dialed, while the kill switch cannot be
// closed.
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
		t.Errorf("the status says %q", s.KillSwitch)
	}
}
