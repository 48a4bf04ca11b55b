package endpoint

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"masquevpn/routing"
)

// machine opens fake Endpoints.
type machine struct {
	mu        sync.Mutex // guards the fields below
	opened    []time.Time
	endpoints []*fakeEndpoint
	fail      error // returned by open if not nil
}

// fakeEndpoint is an Endpoint without a device.
type fakeEndpoint struct {
	lost   chan error          // makes Maintain return
	health chan routing.Health // reported by Maintain
	closed chan struct{}       // closed by Close
}

func (m *machine) open() (*fakeEndpoint, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.opened = append(m.opened, time.Now())
	if m.fail != nil {
		return nil, m.fail
	}
	e := &fakeEndpoint{lost: make(chan error, 1), health: make(chan routing.Health),
		closed: make(chan struct{})}
	m.endpoints = append(m.endpoints, e)
	return e, nil
}

func (m *machine) last() *fakeEndpoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.endpoints[len(m.endpoints)-1]
}

func (m *machine) setFail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

func (*fakeEndpoint) Device() Device { return nil }

func (*fakeEndpoint) Name() string { return "tun0" }

func (e *fakeEndpoint) Read() error {
	<-e.closed
	return nil
}

func (e *fakeEndpoint) Maintain(ctx context.Context, report func(routing.Health)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case h := <-e.health:
			report(h)
		case err := <-e.lost:
			return err
		}
	}
}

func (e *fakeEndpoint) Close() error {
	close(e.closed)
	return nil
}

// supervised is a Supervisor that runs in a synctest bubble.
type supervised struct {
	machine
	supervisor Supervisor[*fakeEndpoint]
	health     routing.Health // last report
}

func (x *supervised) report(h routing.Health) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.health = h
}

// now returns the last report and the number of attempts to open a device.
func (x *supervised) now() (routing.Health, int) {
	synctest.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.health, len(x.opened)
}

// inBubble runs f in a synctest bubble with a running Supervisor.
func inBubble(t *testing.T, f func(t *testing.T, x *supervised)) {
	synctest.Test(t, func(t *testing.T) {
		x := &supervised{}
		x.supervisor = Supervisor[*fakeEndpoint]{Open: x.open, Report: x.report,
			Logger: slog.New(slog.DiscardHandler)}
		if err := x.supervisor.Start(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			x.supervisor.Run(ctx)
		}()
		synctest.Wait()
		f(t, x)
		cancel()
		<-done
		if err := x.supervisor.Close(); err != nil {
			t.Error(err)
		}
		for _, e := range x.endpoints {
			<-e.closed
		}
	})
}

// TestLostDevice checks that an Endpoint whose device is lost is closed and
// replaced without delay, and that its repairs still count.
func TestLostDevice(t *testing.T) {
	inBubble(t, func(t *testing.T, x *supervised) {
		first := x.last()
		first.health <- routing.Health{Interface: "tun0", Repairs: map[string]uint64{"rule": 2}}
		first.lost <- routing.ErrInterfaceGone
		synctest.Wait()
		<-first.closed
		if x.supervisor.Current() != x.last() || x.last() == first {
			t.Fatal("the lost Endpoint was not replaced")
		}
		x.last().health <- routing.Health{Interface: "tun0",
			Repairs: map[string]uint64{"rule": 1, "link": 1}}
		synctest.Wait()
		if h, _ := x.now(); h.Problem != "" || h.Repairs["rule"] != 3 || h.Repairs["link"] != 1 ||
			h.Repairs["device"] != 1 {
			t.Errorf("got %+v", h)
		}
	})
}

// TestRepeatedlyLostDevice checks that a device that is deleted again and again
// is opened at increasing intervals, and is a problem until one lasts.
func TestRepeatedlyLostDevice(t *testing.T) {
	inBubble(t, func(t *testing.T, x *supervised) {
		begin := time.Now()
		for time.Since(begin) < 5*time.Minute {
			if e := x.supervisor.Current(); e == x.last() {
				select {
				case <-e.closed: // the Supervisor waits before it opens the next one
				default:
					e.lost <- routing.ErrInterfaceGone
				}
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if _, n := x.now(); n < 20 || n > 45 {
			t.Errorf("%d devices in five minutes, want 20 to 45", n)
		}
		if h, _ := x.now(); !strings.Contains(h.Problem, "tun0") {
			t.Errorf("problem %q, want one with tun0", h.Problem)
		}
		time.Sleep(maxDelay + steady)
		synctest.Wait()
		if h, _ := x.now(); h.Problem != "" {
			t.Errorf("problem %q after a device lasted, want none", h.Problem)
		}
	})
}

// TestDeviceThatCannotBeOpened checks that the Supervisor retries, and reports
// the error as a problem until it succeeds.
func TestDeviceThatCannotBeOpened(t *testing.T) {
	inBubble(t, func(t *testing.T, x *supervised) {
		x.setFail(os.ErrPermission)
		x.last().lost <- routing.ErrInterfaceGone
		time.Sleep(time.Minute)
		synctest.Wait()
		if _, n := x.now(); n < 6 || n > 15 {
			t.Errorf("%d attempts in a minute, want 6 to 15", n)
		}
		if h, _ := x.now(); !strings.Contains(h.Problem, "permission denied") || h.Interface != "" {
			t.Errorf("got %+v", h)
		}
		x.setFail(nil)
		time.Sleep(maxDelay)
		synctest.Wait()
		x.last().health <- routing.Health{Interface: "tun0"}
		time.Sleep(steady)
		synctest.Wait()
		if h, _ := x.now(); h.Problem != "" || h.Interface != "tun0" {
			t.Errorf("got %+v", h)
		}
	})
}

// TestWithoutNotifications checks that the Endpoint stays in use if the kernel
// sends no notifications of changes, and that this is a problem.
func TestWithoutNotifications(t *testing.T) {
	inBubble(t, func(t *testing.T, x *supervised) {
		x.last().lost <- errors.New("no netlink")
		time.Sleep(time.Hour)
		synctest.Wait()
		if h, n := x.now(); n != 1 || !strings.Contains(h.Problem, "no netlink") {
			t.Errorf("%d Endpoints, problem %q, want 1 and the error", n, h.Problem)
		}
	})
}
