// Package routingtest provides a network configuration in memory. It has the
// methods of routing.Network that the client and the proxy call, records the
// states that they apply, and lets a test play the kernel's part: report its
// health, lose the device, or fail.
//
// Tests with it need no privileges and run in a synctest bubble.
package routingtest

import (
	"context"
	"slices"
	"sync"

	"masquevpn/routing"
)

// Network is a network configuration in memory. The zero value is a healthy
// host without other routes. Its methods may be called concurrently.
type Network struct {
	// Health is the source of the reports of Maintain; nil means that there are
	// none. It is set before the Network is used.
	Health chan routing.Health

	// Lost ends Maintain with the error that is sent; nil means never. It is
	// set before the Network is used.
	Lost chan error

	mu        sync.Mutex // guards the fields below
	states    []routing.State
	changed   chan struct{} // closed by the next Apply; nil: nobody waits
	applyErr  error
	heldErr   error
	conflicts []string
	closed    bool
}

// Apply records s, or returns the error of FailApply.
func (n *Network) Apply(s routing.State) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.applyErr != nil {
		return n.applyErr
	}
	n.states = append(n.states, s)
	if n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
	return nil
}

// Maintain reports the values of Health until ctx ends or an error is sent
// to Lost.
func (n *Network) Maintain(ctx context.Context, report func(routing.Health)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case h := <-n.Health:
			report(h)
		case err := <-n.Lost:
			return err
		}
	}
}

// FollowHost returns the conflicts of SetConflicts.
func (n *Network) FollowHost() (conflicts []string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.conflicts, nil
}

// Held returns the error of SetHeld.
func (n *Network) Held() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.heldErr
}

// Close records that it was called.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	return nil
}

// FailApply makes Apply return err from now on; nil makes it succeed again.
func (n *Network) FailApply(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.applyErr = err
}

// SetHeld makes Held return err from now on.
func (n *Network) SetHeld(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.heldErr = err
}

// SetConflicts makes FollowHost return conflicts from now on.
func (n *Network) SetConflicts(conflicts []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conflicts = conflicts
}

// States returns the applied states, oldest first.
func (n *Network) States() []routing.State {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.states)
}

// Last returns the state that was applied last, the zero value if there is
// none.
func (n *Network) Last() routing.State {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last()
}

// last is Last with n.mu held.
func (n *Network) last() routing.State {
	if len(n.states) == 0 {
		return routing.State{}
	}
	return n.states[len(n.states)-1]
}

// Closed reports whether Close was called.
func (n *Network) Closed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

// Await waits until ok accepts the state that was applied last. It returns
// that state, and ctx.Err() if ctx ends first.
func (n *Network) Await(ctx context.Context, ok func(routing.State) bool) (routing.State, error) {
	for {
		n.mu.Lock()
		state := n.last()
		if n.changed == nil {
			n.changed = make(chan struct{})
		}
		changed := n.changed
		n.mu.Unlock()
		if ok(state) {
			return state, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return state, ctx.Err()
		}
	}
}
