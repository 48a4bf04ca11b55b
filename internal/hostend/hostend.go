// Package hostend keeps this host's end of tunnels whole: a device, and the kernel's side of it. What other programs change there is
// put right, and when they delete the device, another one takes its place.
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
	// steady is how long a device has to last for the next one to be opened at once.
	steady = 30 * time.Second
	// spare is how many devices are opened at once, one soon after another.
	spare = 3
	// firstDelay and maxDelay are the waits before those after them.
	firstDelay = time.Second
	maxDelay   = 10 * time.Second
)

// repairDevice is what Health.Repairs calls a device that was opened in place of one that was lost.
const repairDevice = "device"

// errClosed is why no End is opened any more.
var errClosed = errors.New("closed")

// End is a device and what belongs to it. Its methods may be called concurrently.
type End interface {
	Name() string // of the device
	Read() error  // takes packets of the device until it is closed, which gives nil, or lost
	// Keep puts back what other programs change, as routing.Manager does.
	Keep(ctx context.Context, report func(routing.Health)) error
	Close() error // restores the host
}

// Keeper has one End after another, each until it is lost.
type Keeper[E End] struct {
	// Open opens an End. Where it is not the first, it gets what the last one had.
	Open   func() (E, error)
	Report func(routing.Health) // is called with every change of the health
	Logger *slog.Logger

	current atomic.Pointer[E] // nil before Start
	reading sync.WaitGroup
	lost    int       // devices, and attempts to open one, without a steady one in between
	lostAt  time.Time // the last of them

	mu     sync.Mutex
	open   bool              // current is
	closed bool              // by Close
	former map[string]uint64 // repairs of the Ends before the current one
	health routing.Health    // of the current one
	loss   string            // what is wrong with the device, "" for nothing
	deaf   string            // why changes are not noticed

	telling sync.Mutex      // taken before mu
	told    *routing.Health // the last report
}

// Start opens the first End.
func (k *Keeper[E]) Start() error {
	k.former = make(map[string]uint64)
	return k.reopen()
}

// Current returns the End in use, or one that was lost and has no successor yet; the zero E before Start.
func (k *Keeper[E]) Current() (e E) {
	if p := k.current.Load(); p != nil {
		e = *p
	}
	return e
}

// Close closes the current End. None is opened any more.
func (k *Keeper[E]) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	err := k.closeCurrent()
	k.reading.Wait()
	return err
}

// closeCurrent closes the current End, unless that was done. k.mu is held.
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

// Run takes the packets of the device and keeps the host's end whole until ctx ends.
func (k *Keeper[E]) Run(ctx context.Context) {
	for {
		why := k.use(ctx, k.Current())
		if ctx.Err() != nil || !k.replace(ctx, why) {
			return
		}
	}
}

// use is Run with one End. It returns when ctx ends or the device is lost, and why.
func (k *Keeper[E]) use(ctx context.Context, e E) error {
	calm := time.AfterFunc(steady, func() { k.noteLoss("") })
	defer calm.Stop()
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
	k.Logger.Warn("it is not noticed when another program changes this host's network", "error", err)
	k.mu.Lock()
	k.deaf = fmt.Sprintf("it is not noticed when another program changes this host's network: %v", err)
	k.mu.Unlock()
	k.tell()
	<-ctx.Done()
	return context.Cause(ctx)
}

// replace closes the current End, whose device is lost for the reason why, and opens another one, again and again until that
// succeeds, which it reports, or ctx ends.
func (k *Keeper[E]) replace(ctx context.Context, why error) bool {
	name := k.Current().Name()
	k.noteLoss(fmt.Sprintf("interface %s was lost and is opened anew: %v", name, why))
	k.mu.Lock()
	err := k.closeCurrent()
	k.former = k.sum()
	k.health = routing.Health{}
	k.mu.Unlock()
	if err != nil {
		k.Logger.Warn("something of a lost interface stays", "interface", name, "error", err)
	}
	for {
		wait := k.countLoss(time.Now())
		k.Logger.Warn("the interface is lost: opening it anew", "interface", name, "reason", why, "retry_in", wait.String())
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
		if why = k.reopen(); why == nil {
			break
		}
		if errors.Is(why, errClosed) {
			return false
		}
		k.noteLoss(fmt.Sprintf("interface %s was lost and cannot be opened anew: %v", name, why))
	}
	k.mu.Lock()
	k.former[repairDevice]++
	k.mu.Unlock()
	text := ""
	if k.lost > spare {
		text = fmt.Sprintf("another program deletes interface %s again and again: stop it", name)
	}
	k.noteLoss(text)
	return true
}

// countLoss counts a loss, or an attempt to open that failed, and returns how long to wait before the next attempt.
func (k *Keeper[E]) countLoss(now time.Time) time.Duration {
	if now.Sub(k.lostAt) >= steady {
		k.lost = 0
	}
	k.lost++
	k.lostAt = now
	if more := k.lost - spare; more > 0 {
		return min(firstDelay<<min(more-1, 16), maxDelay)
	}
	return 0
}

// sum returns all repairs so far. k.mu is held.
func (k *Keeper[E]) sum() map[string]uint64 {
	all := maps.Clone(k.former)
	for kind, n := range k.health.Repairs {
		all[kind] += n
	}
	return all
}

// report is called by Keep of the current End.
func (k *Keeper[E]) report(h routing.Health) {
	k.mu.Lock()
	k.health = h
	k.mu.Unlock()
	k.tell()
}

// noteLoss has the health say what is wrong with the device, "" for nothing.
func (k *Keeper[E]) noteLoss(text string) {
	k.mu.Lock()
	k.loss = text
	k.mu.Unlock()
	k.tell()
}

// tell reports the health, if it has changed.
func (k *Keeper[E]) tell() {
	k.telling.Lock() // reports come in their order
	defer k.telling.Unlock()
	k.mu.Lock()
	h := k.health
	h.Repairs = k.sum()
	h.Problem = cmp.Or(h.Problem, k.loss, k.deaf)
	same := k.told != nil && h.Equal(*k.told)
	k.told = &h
	k.mu.Unlock()
	if !same {
		k.Report(h)
	}
}
