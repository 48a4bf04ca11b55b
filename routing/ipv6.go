package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

func (s State) hasIPv6() bool {
	return slices.ContainsFunc(slices.Concat(s.Addresses, s.Routes, s.Unreachable, s.Exclude,
		s.Masquerade), isIPv6)
}

func (s State) ipv4Only() State {
	for _, list := range []*[]netip.Prefix{&s.Addresses, &s.Routes, &s.Unreachable, &s.Exclude,
		&s.Reach, &s.Masquerade} {
		*list = slices.DeleteFunc(slices.Clone(*list), isIPv6)
	}
	return s
}

func isIPv6(p netip.Prefix) bool { return p.Addr().Is6() }

// Held returns the reason if the last State was applied without IPv6 and its
// IPv6 routes are unreachable. The error matches ErrIPv6Disabled and names the
// remedy. Otherwise Held returns nil.
func (m *Manager) Held() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

// holdIPv6 returns the State that the interface can have. If the administrator
// turned IPv6 off, that is want without IPv6, with unreachable IPv6 routes, and
// reason is not nil. Without a mark, err is the reason instead.
func (k *kernel) holdIPv6(want State) (_ State, reason, err error) {
	err = k.checkIPv6(want)
	if k.Mark == 0 || !errors.Is(err, ErrIPv6Disabled) {
		return want, nil, err
	}
	held := want.ipv4Only()
	for _, p := range slices.Concat(want.Routes, want.Unreachable) {
		if isIPv6(p) {
			held.Unreachable = append(held.Unreachable, p)
		}
	}
	held.Exclude = want.Exclude
	return held, err, nil
}

// checkIPv6 returns an error if want has IPv6 and the interface cannot have it.
func (k *kernel) checkIPv6(want State) error {
	if !slices.ContainsFunc(slices.Concat(want.Addresses, want.Routes), isIPv6) {
		return nil
	}
	link, err := k.findLink()
	if err != nil || link == nil {
		return err
	}
	mtu := want.MTU
	if mtu == 0 {
		mtu = link.Attrs().MTU
	}
	if mtu < minMTU6 {
		return fmt.Errorf("interface %s: MTU %d is too small for IPv6, which needs %d: leave its addresses and routes out",
			k.Interface, mtu, minMTU6)
	}
	name := "net/ipv6/conf/" + link.Attrs().Name + "/disable_ipv6"
	if v, err := k.readSysctl(name); err == nil && v != "0" {
		return fmt.Errorf("%w: %s is %s, as net.ipv6.conf.default.disable_ipv6 was when %s was made: "+
			"set it to 0 to have IPv6 in the tunnel", ErrIPv6Disabled, dotted(name), v,
			link.Attrs().Name)
	}
	return nil
}

// feasible returns the applied State as the interface can have it now. held is
// the reason if that is without IPv6.
func (m *Manager) feasible() (_ State, held, err error) {
	state, held, err := m.holdIPv6(m.state)
	if errors.Is(err, ErrIPv6Disabled) {
		// Without a mark there are no tables in which IPv6 routes could be
		// unreachable.
		return m.state.ipv4Only(), err, nil
	}
	return state, held, err
}

// followIPv6 applies a new plan if IPv6 was turned off or on again on the
// interface. The changes of the new plan do not count as repairs.
func (m *Manager) followIPv6() error {
	state, held, err := m.feasible()
	if err != nil || (held != nil) == (m.held != nil) {
		return err
	}
	want, err := m.planFor(state)
	if err != nil {
		return err
	}
	m.repairs.lostIPv6 = held != nil
	m.applied, m.held = want, held
	return m.converge(want, true)
}
