// Package endpoint maintains an endpoint of tunnels on this host: a device with
// its addresses, routes and rules in the kernel, called an [Endpoint].
//
// While a [Supervisor] runs, the Endpoint restores the changes of other
// programs. If another program deletes the device, the Supervisor opens a new
// Endpoint. It counts repairs and reports problems as a routing.Health.
package endpoint

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

// errClosed means that the Supervisor is closed and opens no more Endpoints.
var errClosed = errors.New("closed")

// Endpoint is a device with its configuration in the kernel. Its methods may be
// called concurrently.
type Endpoint interface {
	// Name returns the name of the device.
	Name() string

	// Device returns the device, for writing.
	Device() Device

	// Read forwards packets from the device. It returns nil after Close, and an
	// error if the device is lost.
	Read() error

	// Maintain restores the changes of other programs until ctx is done, like
	// the method of routing.Manager.
	Maintain(ctx context.Context, report func(routing.Health)) error

	// Close removes the device and restores the host.
	Close() error
}

// Supervisor has one Endpoint at a time and replaces it when its device is
// lost. The exported fields are set before Start.
type Supervisor[E Endpoint] struct {
	// Open opens an Endpoint. The new Endpoint has the configuration of its
	// predecessor.
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
	open   bool       // the current Endpoint is open
	closed bool       // Close was called

	// previousRepairs counts the repairs of Endpoints before the current one,
	// by kind.
	previousRepairs map[string]uint64

	// health is the last report of the current Endpoint.
	health routing.Health

	// deviceProblem and watchProblem are empty or texts for Health.Problem. The
	// first is about the device, the second about watching for changes.
	deviceProblem string
	watchProblem  string

	reportMu sync.Mutex      // guards reported; locked before mu
	reported *routing.Health // argument of the last Report
}

// Start opens the first Endpoint.
func (s *Supervisor[E]) Start() error {
	s.previousRepairs = make(map[string]uint64)
	return s.reopen()
}

// Current returns the current Endpoint, which may be lost and not replaced yet.
// It returns the zero E before Start.
func (s *Supervisor[E]) Current() (e E) {
	if p := s.current.Load(); p != nil {
		e = *p
	}
	return e
}

// Close closes the current Endpoint. No Endpoint is opened after it.
func (s *Supervisor[E]) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	err := s.closeCurrent()
	s.reading.Wait()
	return err
}

// closeCurrent closes the current Endpoint unless it is closed. s.mu is held.
func (s *Supervisor[E]) closeCurrent() error {
	if !s.open {
		return nil
	}
	s.open = false
	return s.Current().Close()
}

// reopen opens an Endpoint and makes it the current one.
func (s *Supervisor[E]) reopen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	e, err := s.Open()
	if err != nil {
		return err
	}
	s.current.Store(&e)
	s.open = true
	return nil
}

// Run forwards packets, restores changes and replaces lost devices until ctx is
// done.
func (s *Supervisor[E]) Run(ctx context.Context) {
	for {
		err := s.use(ctx, s.Current())
		if ctx.Err() != nil || !s.replace(ctx, err) {
			return
		}
	}
}

// use does the work of Run for one Endpoint. It returns the reason when ctx is
// done or the device is lost.
func (s *Supervisor[E]) use(ctx context.Context, e E) error {
	forget := time.AfterFunc(steady, func() { s.setDeviceProblem("") })
	defer forget.Stop()
	ctx, lose := context.WithCancelCause(ctx)
	defer lose(nil)
	s.mu.Lock()
	if !s.closed {
		s.reading.Go(func() {
			if err := e.Read(); err != nil {
				lose(err)
			}
		})
	}
	s.mu.Unlock()
	err := e.Maintain(ctx, s.report)
	if err == nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, routing.ErrInterfaceGone) {
		return err
	}
	const text = "it is not noticed when another program changes this host's network"
	s.Logger.Warn(text, "error", err)
	s.mu.Lock()
	s.watchProblem = fmt.Sprintf("%s: %v", text, err)
	s.mu.Unlock()
	s.reportChange()
	<-ctx.Done()
	return context.Cause(ctx)
}

// replace closes the current Endpoint, whose device is lost because of reason,
// and opens another one. It retries until it succeeds, and returns false if ctx
// is done or the Supervisor closed before that.
func (s *Supervisor[E]) replace(ctx context.Context, reason error) bool {
	name := s.Current().Name()
	s.setDeviceProblem(fmt.Sprintf("interface %s was lost and is being opened again: %v", name,
		reason))
	s.mu.Lock()
	err := s.closeCurrent()
	s.previousRepairs = s.repairs()
	s.health = routing.Health{}
	s.mu.Unlock()
	if err != nil {
		s.Logger.Warn("cannot remove all configuration of a lost interface", "interface", name,
			"error", err)
	}
	for {
		wait := s.countLoss(time.Now())
		s.Logger.Warn("the interface is lost: opening it again", "interface", name,
			"reason", reason,
			"retry_in", wait.String())
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
		if reason = s.reopen(); reason == nil {
			break
		}
		if errors.Is(reason, errClosed) {
			return false
		}
		s.setDeviceProblem(fmt.Sprintf("interface %s was lost and cannot be opened again: %v", name,
			reason))
	}
	s.mu.Lock()
	s.previousRepairs[repairDevice]++
	s.mu.Unlock()
	text := ""
	if s.losses > freeAttempts {
		text = fmt.Sprintf("another program deletes interface %s again and again: stop it", name)
	}
	s.setDeviceProblem(text)
	return true
}

// countLoss counts a loss or a failed attempt to open, and returns the delay
// before the next attempt.
func (s *Supervisor[E]) countLoss(now time.Time) time.Duration {
	if now.Sub(s.lastLoss) >= steady {
		s.losses = 0
	}
	s.losses++
	s.lastLoss = now
	if more := s.losses - freeAttempts; more > 0 {
		return min(firstDelay<<min(more-1, 16), maxDelay)
	}
	return 0
}

// repairs returns the number of all repairs by kind. s.mu is held.
func (s *Supervisor[E]) repairs() map[string]uint64 {
	sum := maps.Clone(s.previousRepairs)
	for kind, n := range s.health.Repairs {
		sum[kind] += n
	}
	return sum
}

// report is called by Maintain of the current Endpoint with its health.
func (s *Supervisor[E]) report(h routing.Health) {
	s.mu.Lock()
	s.health = h
	s.mu.Unlock()
	s.reportChange()
}

// setDeviceProblem sets the problem of the device and reports it. An empty text
// means that there is none.
func (s *Supervisor[E]) setDeviceProblem(text string) {
	s.mu.Lock()
	s.deviceProblem = text
	s.mu.Unlock()
	s.reportChange()
}

// reportChange calls Report if the health has changed.
func (s *Supervisor[E]) reportChange() {
	s.reportMu.Lock() // also keeps reports in order
	defer s.reportMu.Unlock()
	s.mu.Lock()
	h := s.health
	h.Repairs = s.repairs()
	h.Problem = cmp.Or(h.Problem, s.deviceProblem, s.watchProblem)
	same := s.reported != nil && h.Equal(*s.reported)
	s.reported = &h
	s.mu.Unlock()
	if !same {
		s.Report(h)
	}
}
