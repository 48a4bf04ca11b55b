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

// ErrInterfaceGone is returned by Maintain if the interface was deleted. The
// caller has to create it again and open another Manager for it.
var ErrInterfaceGone = errors.New("the interface is gone")

const (
	// Maintain handles a burst of changes at once: when no change has come for
	// settleDelay, and at the latest maxSettleDelay after the first one.
	settleDelay    = 10 * time.Millisecond
	maxSettleDelay = 200 * time.Millisecond

	// pauseFactor is the ratio of the pause after a comparison to the time that
	// the comparison took. It limits Maintain to a fifth of a processor,
	// however often other programs make changes.
	pauseFactor = 4

	// tickInterval is the time between checks of sysctls and of the effective
	// routes, for which the kernel has no notifications. Every ticksPerRound-th
	// check compares everything, in case a notification was lost.
	tickInterval  = time.Second
	ticksPerRound = 30

	// maxNames is the number of repairs that one line of the log names.
	maxNames = 16
)

// Health tells how much of the applied State is in effect.
type Health struct {
	// Problem names the missing part and the remedy. It is also set if another
	// program undoes each repair. Empty means that everything is in effect.
	Problem string

	// IPv6Held means that the interface cannot have IPv6, see Manager.Held.
	IPv6Held bool

	// Interface is the name of the interface, empty if it is gone.
	Interface string

	// Addresses are the addresses of State.Addresses that the interface has.
	Addresses []netip.Prefix

	// Repairs counts the changes of other programs that Maintain undid, by
	// kind: link, mtu, address, route, rule, table, sysctl.
	Repairs map[string]uint64
}

// Equal reports whether h and o are the same.
func (h Health) Equal(o Health) bool {
	return h.Problem == o.Problem && h.IPv6Held == o.IPv6Held && h.Interface == o.Interface &&
		slices.Equal(h.Addresses, o.Addresses) && maps.Equal(h.Repairs, o.Repairs)
}

// repairs is the history of the repairs of a Manager.
type repairs struct {
	backoffs map[string]*backoff // key: kind
	counts   map[string]uint64   // number of repairs; key: kind

	// lostIPv6 means that IPv6 was turned off on the interface after it had
	// been applied.
	lostIPv6 bool
}

// Maintain restores the changes of other programs to the applied State. It
// returns nil when ctx is done or the Manager is closed, and ErrInterfaceGone
// if the interface was deleted. It logs each repair, and calls report at the
// start and after each change of the Health. If another program undoes each
// repair of a kind, the repairs become less frequent.
//
// Maintain works in the network namespace of the calling thread, which must be
// the namespace of Open. It must not run twice at a time.
func (m *Manager) Maintain(ctx context.Context, report func(Health)) error {
	changed := make(chan struct{}, 1)
	routes, err := subscribe(unix.NETLINK_ROUTE, slices.Concat(linkGroups, routeGroups, ruleGroups),
		notificationFilter(m.index))
	if err != nil {
		return fmt.Errorf("routing: notifications of changes: %w", explain(err))
	}
	go routes.follow(changed, settleDelay, maxSettleDelay)
	defer routes.close()
	if tables, err := subscribe(unix.NETLINK_NETFILTER, []uint{nftablesGroup}, nil); err == nil {
		go tables.follow(changed, settleDelay, maxSettleDelay)
		defer tables.close()
	} // otherwise the kernel has no nf_tables
	var last *Health
	return reconcileLoop(ctx, changed, func(ticked bool) (again time.Duration, err error) {
		if ticked && !m.sysctlsChanged() && !m.bypassChanged() {
			return 0, nil
		}
		now := time.Now()
		h, next, err := m.reconcile(now)
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

// reconcileLoop calls f at the start, after changes, at each tick, and after
// the duration that f returned unless it is 0. It returns when ctx is done or f
// returns an error, and pauses after each call of f. ticked means that f is
// called for a tick at which it need not compare everything.
func reconcileLoop(ctx context.Context, changed <-chan struct{},
	f func(ticked bool) (again time.Duration, err error)) error {
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	ticks, ticked := 0, false
	var retry <-chan time.Time
	for {
		began := time.Now()
		again, err := f(ticked)
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
		case <-time.After(pauseFactor * time.Since(began)):
		}
		ticked = false
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry:
		case <-tick.C:
			ticks++
			ticked = ticks%ticksPerRound != 0
		}
	}
}

// sysctlsChanged reports whether a sysctl differs from the applied plan, or
// whether the interface has gained or lost IPv6.
func (m *Manager) sysctlsChanged() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return true
	}
	if _, held, err := m.feasible(); err != nil || (held != nil) != (m.held != nil) {
		return true
	}
	set, _, err := m.diffSysctls(m.applied)
	return err != nil || len(set) > 0
}

// bypassChanged reports whether the result of bypassed has changed. Some causes
// of a bypass have no notification.
func (m *Manager) bypassChanged() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bypassed() != m.bypass
}

// reconcile compares the kernel with the applied plan and makes the repairs
// that are due. It returns the time of the next call, zero if none is needed
// before the next change.
func (m *Manager) reconcile(now time.Time) (h Health, again time.Time, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return h, again, os.ErrClosed
	}
	rd := round{now: now, restored: make(map[string][]string), failed: make(map[string]error)}
	var have observed
	var deferred ops
	if m.applied.up {
		if err := m.followIPv6(); err != nil {
			rd.problem = err.Error()
			again = now.Add(maxDelay)
		}
	}
	for range maxRounds {
		if have, err = m.observe(); err != nil {
			rd.problem = fmt.Sprintf("cannot read this host's network configuration: %v", err)
			again = now.Add(firstDelay)
			break
		}
		if have.link == nil {
			return Health{Problem: fmt.Sprintf("interface %s was deleted", m.Interface),
				Repairs: maps.Clone(m.repairs.counts)}, again, ErrInterfaceGone
		}
		list, err := m.diff(have, m.applied)
		if err != nil {
			rd.problem = err.Error()
			again = now.Add(maxDelay)
			break
		}
		if list, deferred = m.repairs.split(list, now); len(list) == 0 {
			if len(deferred) == 0 {
				m.verified = have.chains
			}
			break
		}
		if !m.run(list, &rd) {
			break
		}
	}
	m.repairs.record(m, &rd, deferred)
	m.updateBypass()
	h.Problem, h.Repairs = rd.problem, maps.Clone(m.repairs.counts)
	h.IPv6Held = m.held != nil
	if m.repairs.lostIPv6 && h.Problem == "" {
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
	if next := m.repairs.next(now, deferred); again.IsZero() ||
		!next.IsZero() && next.Before(again) {
		again = next
	}
	return h, again, nil
}

// round is the result of one call of reconcile.
type round struct {
	now      time.Time
	restored map[string][]string // repairs by kind
	failed   map[string]error    // first error by kind
	problem  string              // for Health.Problem
}

// run makes all changes that it can. It reports whether there was no error.
func (m *Manager) run(list ops, rd *round) (ok bool) {
	ok = true
	for _, o := range list {
		if rd.failed[kindLink] != nil && needsLink(o) {
			continue
		}
		err := o.do()
		m.logOp(o, err)
		switch {
		case err != nil:
			ok = false
			if rd.failed[o.kind] == nil {
				rd.failed[o.kind] = fmt.Errorf("%s: %w", o.text, err)
			}
		case o.kind != kindShared:
			m.repairs.counts[o.kind]++
			rd.restored[o.kind] = append(rd.restored[o.kind], o.text)
		}
	}
	return ok
}

// needsLink reports whether the change needs an interface that is up.
func needsLink(o op) bool { return o.kind == kindAddress || o.kind == kindRoute }

// split separates the changes that are due from those that the backoff defers.
func (r *repairs) split(list ops, now time.Time) (due, deferred ops) {
	early := func(kind string) bool {
		b := r.backoffs[kind]
		return b != nil && b.due(now).After(now)
	}
	linkDeferred := early(kindLink) && slices.ContainsFunc(list, func(o op) bool {
		return o.kind == kindLink
	})
	for _, o := range list {
		if early(o.kind) || linkDeferred && needsLink(o) {
			deferred = append(deferred, o)
		} else {
			due = append(due, o)
		}
	}
	return due, deferred
}

// record records and logs the repairs of a round, and sets the round's problem.
// The changes in deferred remain to be made.
func (r *repairs) record(m *Manager, rd *round, deferred ops) {
	for kind := range r.kinds(rd) {
		b := r.backoffs[kind]
		if b == nil {
			b = &backoff{maxDelay: maxDelay}
			r.backoffs[kind] = b
		}
		done, err := rd.restored[kind], rd.failed[kind]
		b.maxDelay = maxDelayOf(kind, err)
		before := b.problem(rd.now)
		switch {
		case err != nil:
			b.record(rd.now, kind, err)
		case len(done) > 0:
			b.record(rd.now, done[0], nil)
		case !slices.ContainsFunc(deferred, func(o op) bool { return o.kind == kind }):
			b.resolved()
		}
		problem := b.problem(rd.now)
		switch {
		case err != nil:
			if problem != before {
				m.Logger.Warn("another program changed this host's network, and it cannot be put right", "kind", kind, "error", err)
			}
		case b.contested(rd.now):
			if before == "" {
				m.Logger.Warn("another program undoes what the tunnel needs, again and again: stop it", "kind", kind, "restored", joinNames(done),
					"retry_in", b.delay().String())
			}
		case len(done) > 0:
			m.Logger.Warn("another program changed this host's network: put right", "kind", kind,
				"restored", joinNames(done))
		}
		if rd.problem == "" {
			rd.problem = problem
		}
	}
}

// maxDelayOf returns the longest delay between repairs of a kind. It is short
// if a missing object lets packets leave outside the tunnel or into this host,
// unless the repair fails.
func maxDelayOf(kind string, err error) time.Duration {
	switch {
	case err != nil, kind == kindMTU, kind == kindSysctl:
		return maxDelay
	}
	return leakDelay
}

// kinds returns, in order, the kinds that were repaired or failed, in this
// round or earlier.
func (r *repairs) kinds(rd *round) func(func(string) bool) {
	all := make(map[string]struct{})
	for kind := range r.backoffs {
		all[kind] = struct{}{}
	}
	for kind := range rd.restored {
		all[kind] = struct{}{}
	}
	for kind := range rd.failed {
		all[kind] = struct{}{}
	}
	return slices.Values(slices.Sorted(maps.Keys(all)))
}

// next returns the time at which reconcile must run even if the kernel does not
// change, zero for never.
func (r *repairs) next(now time.Time, deferred ops) (next time.Time) {
	earliest := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	for _, b := range r.backoffs {
		earliest(b.clearsAt(now))
		if b.err != nil {
			earliest(b.due(now))
		}
	}
	for _, o := range deferred {
		if b := r.backoffs[o.kind]; b != nil {
			earliest(b.due(now))
		}
	}
	return next
}

// joinNames joins a list for the log.
func joinNames(list []string) string {
	if more := len(list) - maxNames; more > 0 {
		list = append(slices.Clone(list[:maxNames]), fmt.Sprintf("and %d more", more))
	}
	return strings.Join(list, "; ")
}
