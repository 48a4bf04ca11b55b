package routing

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInterfaceGone is returned by Maintain when the interface was deleted. Whoever
// made it has to make it anew, and open another Manager for it.
var ErrInterfaceGone = errors.New("the interface is gone")

const (
	// quietTime and maxQuietTime are for how long more changes that come
	// together are waited for, after the last and after the first of them.
	quietTime    = 10 * time.Millisecond
	maxQuietTime = 200 * time.Millisecond
	// restFactor is how much longer than a look the pause after it is: looking
	// takes a quarter of a processor at most, whatever others do.
	restFactor = 4
	// tickInterval is the time between two looks at what the kernel tells
	// nobody of: sysctls. At every ticksPerLook-th it is looked at everything,
	// should the kernel have kept a change to itself.
	tickInterval = time.Second
	ticksPerLook = 30
	// maxNames is how many things one line of the log names.
	maxNames = 16
)

// Health says how much of the state of the last Apply is in effect.
type Health struct {
	// Problem says what is not in effect and what to do about it, and also
	// when it is put back and does not last. "": all is well.
	Problem string
	// IPv6Held: the interface cannot have IPv6, see Manager.Held.
	IPv6Held bool
	// Interface is the interface's name, "" when it is gone.
	Interface string
	// Addresses are those of State.Addresses that the interface has.
	Addresses []netip.Prefix
	// Repairs are how many things others changed and Maintain put back, by kind:
	// link, mtu, address, route, rule, table, sysctl.
	Repairs map[string]uint64
}

// Equal says whether h and o are the same.
func (h Health) Equal(o Health) bool {
	return h.Problem == o.Problem && h.IPv6Held == o.IPv6Held && h.Interface == o.Interface &&
		slices.Equal(h.Addresses, o.Addresses) && maps.Equal(h.Repairs, o.Repairs)
}

// repair is what a Manager has put back.
type repair struct {
	feuds    map[string]*feud // key: kind
	counts   map[string]uint64
	lostIPv6 bool // IPv6 was turned off on the interface after it had been applied
}

// Maintain puts back what other programs change of the state that was applied
// last, until ctx ends, or with ErrInterfaceGone, or until Close. It logs what
// it puts back, and calls report first and after every change of the Health.
// What does not last is put back less and less often. It runs in the network
// namespace of the Manager, once at a time.
func (m *Manager) Maintain(ctx context.Context, report func(Health)) error {
	changed := make(chan struct{}, 1)
	routes, err := subscribe(unix.NETLINK_ROUTE, slices.Concat(linkGroups, routeGroups, ruleGroups),
		ownFilter(m.index))
	if err != nil {
		return fmt.Errorf("routing: notifications of changes: %w", explain(err))
	}
	go routes.follow(changed, quietTime, maxQuietTime)
	defer routes.close()
	if tables, err := subscribe(unix.NETLINK_NETFILTER, []uint{nftablesGroup}, nil); err == nil {
		go tables.follow(changed, quietTime, maxQuietTime)
		defer tables.close()
	} // else there is no nf_tables in this kernel
	var last *Health
	return keepLooking(ctx, changed, func(ticked bool) (again time.Duration, err error) {
		if ticked && !m.sysctlsDiffer() && !m.bypassDiffers() {
			return 0, nil
		}
		now := time.Now()
		h, next, err := m.look(now)
		if last == nil || !h.Equal(*last) {
			report(h)
			last = &h
		}
		if errors.Is(err, os.ErrClosed) {
			return 0, err
		}
		if err != nil {
			return 0, fmt.Errorf("routing: %w", err)
		}
		if !next.IsZero() {
			again = max(next.Sub(now), time.Millisecond)
		}
		return again, nil
	})
}

// keepLooking calls look at the start, after changes, when look asks for it by
// a time that is not zero, and at each tick, until ctx ends or look fails. It
// leaves pauses in between, however often there are changes.
func keepLooking(ctx context.Context, changed <-chan struct{},
	look func(ticked bool) (again time.Duration, err error)) error {
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	ticks, ticked := 0, false
	var retry <-chan time.Time
	for {
		began := time.Now()
		again, err := look(ticked)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if !ticked || again > 0 {
			retry = nil
		}
		if again > 0 {
			retry = time.After(again)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(restFactor * time.Since(began)):
		}
		ticked = false
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry:
		case <-tick.C:
			ticks++
			ticked = ticks%ticksPerLook != 0
		}
	}
}

// sysctlsDiffer says whether a sysctl is not as the applied plan wants it, or
// as the last look found it.
func (m *Manager) sysctlsDiffer() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return true
	}
	if _, held, err := m.possible(); err != nil || (held != nil) != (m.held != nil) {
		return true
	}
	set, _, err := m.diffSysctls(m.applied)
	return err != nil || len(set) > 0
}

// bypassDiffers says whether packets for the tunnel go elsewhere, or do so no
// longer, since the last look. The kernel does not tell of all that leads
// there.
func (m *Manager) bypassDiffers() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bypassed() != m.bypass
}

// look compares what the kernel has with the applied plan, and makes the
// changes that are due. It returns when to look again, zero for when something
// changes.
func (m *Manager) look(now time.Time) (h Health, again time.Time, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return h, again, os.ErrClosed
	}
	p := pass{now: now, restored: make(map[string][]string), failed: make(map[string]error)}
	var have observed
	var held ops
	if m.applied.up {
		if err := m.followIPv6(); err != nil {
			p.problem = err.Error()
			again = now.Add(maxTruce)
		}
	}
	for range maxPasses {
		if have, err = m.observe(); err != nil {
			p.problem = fmt.Sprintf("it cannot be seen whether the tunnel is whole: %v", err)
			again = now.Add(firstTruce)
			break
		}
		if have.link == nil {
			return Health{Problem: fmt.Sprintf("interface %s was deleted", m.Interface),
				Repairs: maps.Clone(m.repair.counts)}, again, ErrInterfaceGone
		}
		list, err := m.diff(have, m.applied)
		if err != nil {
			p.problem = err.Error()
			again = now.Add(maxTruce)
			break
		}
		if list, held = m.repair.due(list, now); len(list) == 0 {
			if len(held) == 0 {
				m.sealed = have.chains
			}
			break
		}
		if !m.run(list, &p) {
			break
		}
	}
	m.repair.note(m, &p, held)
	m.noteBypass()
	h.Problem, h.Repairs = p.problem, maps.Clone(m.repair.counts)
	h.IPv6Held = m.held != nil
	if m.repair.lostIPv6 && h.Problem == "" {
		h.Problem = fmt.Sprintf("IPv6 was turned off on %s while the tunnel was up: set net.ipv6.conf.%s.disable_ipv6 to 0", m.Interface, m.Interface)
	}
	if h.Problem == "" {
		h.Problem = m.bypass
	}
	if have.link != nil {
		h.Interface = have.link.Attrs().Name
	}
	for _, a := range m.applied.addrs {
		if _, ok := have.addrs[a]; ok {
			h.Addresses = append(h.Addresses, a)
		}
	}
	if next := m.repair.next(now, held); again.IsZero() || !next.IsZero() && next.Before(again) {
		again = next
	}
	return h, again, nil
}

// followIPv6 makes a new plan when IPv6 was turned off on the interface, or on
// again. What that changes is not another program's work.
func (m *Manager) followIPv6() error {
	state, held, err := m.possible()
	if err != nil || (held != nil) == (m.held != nil) {
		return err
	}
	want, err := m.planFor(state)
	if err != nil {
		return err
	}
	m.repair.lostIPv6 = held != nil
	m.applied, m.held = want, held
	return m.converge(want, true)
}

// possible returns the state as the interface can have it now, and why that is
// without IPv6.
func (m *Manager) possible() (_ State, held, err error) {
	state, held, err := m.hold(m.state)
	if errors.Is(err, ErrIPv6Disabled) { // and there are no rules, whose routes could lead nowhere
		return m.state.ipv4Only(), err, nil
	}
	return state, held, err
}

// pass is what one look restored.
type pass struct {
	now      time.Time
	restored map[string][]string // what was done, by kind
	failed   map[string]error    // the first error of each kind
	problem  string
}

// run makes changes as far as it can, and says whether all went well.
func (m *Manager) run(list ops, p *pass) (well bool) {
	well = true
	for _, o := range list {
		if p.failed[kindLink] != nil && needsLink(o) {
			continue
		}
		err := o.do()
		m.logOp(o, err)
		switch {
		case err != nil:
			well = false
			if p.failed[o.kind] == nil {
				p.failed[o.kind] = fmt.Errorf("%s: %w", o.what, err)
			}
		case o.kind != kindShared:
			m.repair.counts[o.kind]++
			p.restored[o.kind] = append(p.restored[o.kind], o.what)
		}
	}
	return well
}

// needsLink says whether a change is possible only while the interface is up.
func needsLink(o op) bool { return o.kind == kindAddress || o.kind == kindRoute }

// due takes apart the changes that may be made now and those that others undid
// too often.
func (r *repair) due(list ops, now time.Time) (due, held ops) {
	early := func(kind string) bool {
		f := r.feuds[kind]
		return f != nil && f.due(now).After(now)
	}
	linkHeld := early(kindLink) && slices.ContainsFunc(list, func(o op) bool {
		return o.kind == kindLink
	})
	for _, o := range list {
		if early(o.kind) || linkHeld && needsLink(o) {
			held = append(held, o)
		} else {
			due = append(due, o)
		}
	}
	return due, held
}

// note takes note of a look after which the changes in held were still to be
// made, and fills in its problem.
func (r *repair) note(m *Manager, p *pass, held ops) {
	for kind := range r.kinds(p) {
		f := r.feuds[kind]
		if f == nil {
			f = &feud{maxTruce: maxTruce}
			r.feuds[kind] = f
		}
		done, err := p.restored[kind], p.failed[kind]
		f.maxTruce = truceFor(kind, err)
		before := f.problem(p.now)
		switch {
		case err != nil:
			f.note(p.now, kind, err)
		case len(done) > 0:
			f.note(p.now, done[0], nil)
		case !slices.ContainsFunc(held, func(o op) bool { return o.kind == kind }):
			f.settled()
		}
		problem := f.problem(p.now)
		switch {
		case err != nil:
			if problem != before {
				m.Logger.Warn("another program changed this host's network, and it cannot be put right", "kind", kind, "error", err)
			}
		case f.contested(p.now):
			if before == "" {
				m.Logger.Warn("another program undoes what the tunnel needs, again and again: stop it", "kind", kind, "restored", names(done),
					"retry_in", f.truce().String())
			}
		case len(done) > 0:
			m.Logger.Warn("another program changed this host's network: put right", "kind", kind,
				"restored", names(done))
		}
		if p.problem == "" {
			p.problem = problem
		}
	}
}

// truceFor returns how long a change that another program makes again and again
// may stay at most. What leaves the host meanwhile, or is let in, cannot be
// taken back; where nothing is put right, there is no gain in haste.
func truceFor(kind string, err error) time.Duration {
	switch {
	case err != nil, kind == kindMTU, kind == kindSysctl:
		return maxTruce
	}
	return leakTruce
}

// kinds returns the kinds that were restored or failed, now or before, in
// order.
func (r *repair) kinds(p *pass) func(func(string) bool) {
	all := make(map[string]struct{})
	for kind := range r.feuds {
		all[kind] = struct{}{}
	}
	for kind := range p.restored {
		all[kind] = struct{}{}
	}
	for kind := range p.failed {
		all[kind] = struct{}{}
	}
	return slices.Values(slices.Sorted(maps.Keys(all)))
}

// next returns when something is to be done without a change in the kernel,
// the zero time for never.
func (r *repair) next(now time.Time, held ops) (next time.Time) {
	sooner := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	for _, f := range r.feuds {
		sooner(f.until(now))
		if f.err != nil {
			sooner(f.due(now))
		}
	}
	for _, o := range held {
		if f := r.feuds[o.kind]; f != nil {
			sooner(f.due(now))
		}
	}
	return next
}

// names is a list for the log.
func names(list []string) string {
	if more := len(list) - maxNames; more > 0 {
		list = append(slices.Clone(list[:maxNames]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(list, "; ")
}
