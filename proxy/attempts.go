package proxy

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// failureBurst is how many failures to authenticate of one source, or about
	// one user, are answered at once; failureRate how many in a second after
	// that; maxFailureDelay the longest that one waits.
	failureBurst    = 20
	failureRate     = 1
	maxFailureDelay = 5 * time.Second
	// maxWaitingFailures is how many wait, of all sources.
	maxWaitingFailures = 1024
	// maxSources is how many sources are remembered, twice.
	maxSources = 4096
	// forgetSources is when a source that did not fail again is as good as a
	// new one.
	forgetSources = failureBurst / failureRate * time.Second
)

// attempts slows those down who fail to authenticate. Sources are remembered in
// two maps, of which the older one is dropped from time to time; so they are
// forgotten without a look at each.
type attempts struct {
	now func() time.Time // nil: time.Now

	mu            sync.Mutex
	recent, older map[string]*rate.Limiter
	since         time.Time // start of the time that recent counts
	waiting       int
}

// begin notes a failure of who is at remote, about the user of that name, ""
// for nobody. It returns how long the answer has to wait, after which end is to
// be called; or false when so many wait that this one must not.
func (a *attempts) begin(remote net.Addr, user string) (time.Duration, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if a.now != nil {
		now = a.now()
	}
	delay := a.delay(source(remote), now)
	if user != "" {
		delay = max(delay, a.delay(user, now))
	}
	if a.waiting >= maxWaitingFailures {
		return 0, false
	}
	a.waiting++
	return delay, true
}

func (a *attempts) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting--
}

// delay counts one more failure of key.
func (a *attempts) delay(key string, now time.Time) time.Duration {
	if len(a.recent) >= maxSources || now.Sub(a.since) >= forgetSources {
		a.recent, a.older, a.since = make(map[string]*rate.Limiter), a.recent, now
	}
	l := a.recent[key]
	if l == nil {
		if l = a.older[key]; l == nil {
			l = rate.NewLimiter(failureRate, failureBurst)
		}
		a.recent[key] = l
	}
	r := l.ReserveN(now, 1)
	d := r.DelayFrom(now)
	if d > maxFailureDelay {
		r.CancelAt(now) // or the debt would grow without end
		d = maxFailureDelay
	}
	return d
}

// source is what one client has at most: an IPv4 address or a /64 of IPv6.
func source(remote net.Addr) string {
	a, ok := addrOf(remote)
	if !ok {
		return remote.String()
	}
	bits := a.BitLen()
	if a.Is6() {
		bits = 64
	}
	return netip.PrefixFrom(a.WithZone(""), bits).Masked().String()
}
