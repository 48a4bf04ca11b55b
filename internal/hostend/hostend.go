// Package hostend maintains this host's end of the tunnels: a device with its
// addresses, routes and rules in the kernel, called an [End].
//
// While a [Keeper] runs, the End restores the changes of other programs. If
// another program deletes the device, the Keeper opens a new End. It counts
// repairs and reports problems as a routing.Health.
package hostend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"masquevpn/routing"
)

const (
	// steady is the time after which a loss is forgotten. A device that lasts
	// so long is replaced without delay.
	steady = 30 * time.Second

	// freeAttempts is the number of losses in quick succession after which the
	// device is opened without delay.
	freeAttempts = 3

	// firstDelay and maxDelay are the first and the longest delay before later
	// attempts.
	firstDelay = time.Second
	maxDelay   = 10 * time.Second
)

// repairDevice is the kind in Health.Repairs of replacing a lost device.
const repairDevice = "device"

// errClosed means that the Keeper is closed and opens no more Ends.
var errClosed = errors.New("closed")

// End is a device with its configuration in the kernel. Its methods may be
// called concurrently.
type End interface {
	// Name returns the name of the device.
	Name() string

	// Read forwards packets from the device. It returns nil after Close, and an
	// error if the device is lost.
	Read() error

	// Keep restores the changes of other programs until ctx is done, like the
	// method of routing.Manager.
	Keep(ctx context.Context, report func(routing.Health)) error

	// Close removes the device and restores the host.
	Close() error
}

// Keeper has one End at a time and replaces it when its device is lost. The
// exported fields are set before Start.
type Keeper[E End] struct {
	// Open opens an End. The new End has the configuration of its predecessor.
	Open func() (E, error)

	// Report is called with each change of the health.
	Report func(routing.Health)

	Logger *slog.Logger

	current atomic.Pointer[E] // nil before Start
	reading sync.WaitGroup

	// losses counts lost devices and failed attempts to open one since the last
	// steady device. lastLoss is the time of the last one. Both belong to Run.
	losses   int
	lastLoss time.Time

	mu     sync.Mutex // guards the fields below
	open   bool       // the current End is open
	closed bool       // Close was called

	// previousRepairs counts the repairs of Ends before the current one, by
	// kind.
	previousRepairs map[string]uint64

	// health is the last report of the current End.
	health routing.Health

	// deviceProblem and watchProblem are empty or texts for Health.Problem. The
	// first is about the device, the second about watching for changes.
	deviceProblem string
	watchProblem  string

	reportMu sync.Mutex      // guards reported; locked before mu
	reported *routing.Health // argument of the last Report
}

// Start opens the first End.
func (k *Keeper[E]) Start() error {
	k.previousRepairs = make(map[string]uint64)
	return k.reopen()
}

// Current returns the current End, which may be lost and not replaced yet. It
// returns the zero E before Start.
func (k *Keeper[E]) Current() (e E) {
	if p := k.current.Load(); p != nil {
		e = *p
	}
	return e
}

// Close closes the current End. No End is opened after it.
func (k *Keeper[E]) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	err := k.closeCurrent()
	k.reading.Wait()
	return err
}

// closeCurrent closes the current End unless it is closed. k.mu is held.
func (k *Keeper[E]) closeCurrent() error {
	if !k.open {
		return nil
	}
	k.open = false
	return k.Current().Close()
}

// reopen opens an End and makes it the current one.
func (k *Keeper[E]) reopen() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return errClosed
	}
	e, err := k.Open()
	if err != nil {
		return err
	}
	k.current.Store(&e)
	k.open = true
	return nil
}

// Run forwards packets, restores changes and replaces lost devices until ctx is
// done.
func (k *Keeper[E]) Run(ctx context.Context) {
	for {
		err := k.use(ctx, k.Current())
		if ctx.Err() != nil || !k.replace(ctx, err) {
			return
		}
	}
}

// use does the work of Run for one End. It returns the reason when ctx is done
// or the device is lost.
func (k *Keeper[E]) use(ctx context.Context, e E) error {
	forget := time.AfterFunc(steady, func() { k.setDeviceProblem("") })
	defer forget.Stop()
	ctx, lose := context.WithCancelCause(ctx)
	defer lose(nil)
	k.mu.Lock()
	if !k.closed {
		k.reading.Go(func() {
			if err := e.Read(); err != nil {
				lose(err)
			}
		})
	}
	k.mu.Unlock()
	err := e.Keep(ctx, k.report)
	if err == nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, routing.ErrInterfaceGone) {
		return err
	}
	const text = "it is not noticed when another program changes this host's network"
	k.Logger.Warn(text, "error", err)
	k.mu.Lock()
	k.watchProblem = fmt.Sprintf("%s: %v", text, err)
	k.mu.Unlock()
	k.reportChange()
	<-ctx.Done()
	return context.Cause(ctx)
}

// replace closes the current End, whose device is lost because of reason, and
// opens another one. It retries until it succeeds, and returns false if ctx is
// done or the Keeper closed before that.
func (k *Keeper[E]) replace(ctx context.Context, reason error) bool {
	name := k.Current().Name()
	k.setDeviceProblem(fmt.Sprintf("interface %s was lost and is being opened again: %v", name,
		reason))
	k.mu.Lock()
	err := k.closeCurrent()
	k.previousRepairs = k.repairs()
	k.health = routing.Health{}
	k.mu.Unlock()
	if err != nil {
		k.Logger.Warn("cannot remove all configuration of a lost interface", "interface", name,
			"error", err)
	}
	for {
		wait := k.countLoss(time.Now())
		k.Logger.Warn("the interface is lost: opening it again", "interface", name,
			"reason", reason,
			"retry_in", wait.String())
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
		if reason = k.reopen(); reason == nil {
			break
		}
		if errors.Is(reason, errClosed) {
			return false
		}
		k.setDeviceProblem(fmt.Sprintf("interface %s was lost and cannot be opened again: %v", name,
			reason))
	}
	k.mu.Lock()
	k.previousRepairs[repairDevice]++
	k.mu.Unlock()
	text := ""
	if k.losses > freeAttempts {
		text = fmt.Sprintf("another program deletes interface %s again and again: stop it", name)
	}
	k.setDeviceProblem(text)
	return true
}

// countLoss counts a loss or a failed attempt to open, and returns the delay
// before the next attempt.
func (k *Keeper[E]) countLoss(now time.Time) time.Duration {
	if now.Sub(k.lastLoss) >= steady {
		k.losses = 0
	}
	k.losses++
	k.lastLoss = now
	if more := k.losses - freeAttempts; more > 0 {
		return min(firstDelay<<min(more-1, 16), maxDelay)
	}
	return 0
}

// repairs returns the number of all repairs by kind. k.mu is held.
func (k *Keeper[E]) repairs() map[string]uint64 {
	sum := maps.Clone(k.previousRepairs)
	for kind, n := range k.health.Repairs {
		sum[kind] += n
	}
	return sum
}

// report is called by Keep of the current End with its health.
func (k *Keeper[E]) report(h routing.Health) {
	k.mu.Lock()
	k.health = h
	k.mu.Unlock()
	k.reportChange()
}

// setDeviceProblem sets the problem of the device and reports it. An empty text
// means that there is none.
func (k *Keeper[E]) setDeviceProblem(text string) {
	k.mu.Lock()
	k.deviceProblem = text
	k.mu.Unlock()
	k.reportChange()
}

// reportChange calls Report if the health has changed.
func (k *Keeper[E]) reportChange() {
	k.reportMu.Lock() // also keeps reports in order
	defer k.reportMu.Unlock()
	k.mu.Lock()
	h := k.health
	h.Repairs = k.repairs()
	h.Problem = cmp.Or(h.Problem, k.deviceProblem, k.watchProblem)
	same := k.reported != nil && h.Equal(*k.reported)
	k.reported = &h
	k.mu.Unlock()
	if !same {
		k.Report(h)
	}
}
