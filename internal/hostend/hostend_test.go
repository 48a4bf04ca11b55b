package hostend

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

// machine makes ends.
type machine struct {
	mu     sync.Mutex
	opened []time.Time
	ends   []*side
	fail   error // of opening
}

// side is an end of a machine.
type side struct {
	lost   chan error
	health chan routing.Health
	closed chan struct{}
}

func (m *machine) open() (*side, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.opened = append(m.opened, time.Now())
	if m.fail != nil {
		return nil, m.fail
	}
	s := &side{lost: make(chan error, 1), health: make(chan routing.Health), closed: make(chan struct{})}
	m.ends = append(m.ends, s)
	return s, nil
}

func (m *machine) last() *side {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ends[len(m.ends)-1]
}

func (m *machine) setFail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

func (*side) Name() string { return "tun0" }

func (s *side) Read() error {
	<-s.closed
	return nil
}

func (s *side) Keep(ctx context.Context, report func(routing.Health)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case h := <-s.health:
			report(h)
		case err := <-s.lost:
			return err
		}
	}
}

func (s *side) Close() error {
	close(s.closed)
	return nil
}

// keeping is a Keeper that runs in a bubble.
type keeping struct {
	machine
	k      Keeper[*side]
	health routing.Health // the last one, read after synctest.Wait
}

func (x *keeping) report(h routing.Health) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.health = h
}

// now returns the last health, and how many devices there were attempts to open.
func (x *keeping) now() (routing.Health, int) {
	synctest.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.health, len(x.opened)
}

func inBubble(t *testing.T, f func(t *testing.T, x *keeping)) {
	synctest.Test(t, func(t *testing.T) {
		x := &keeping{}
		x.k = Keeper[*side]{Open: x.open, Report: x.report, Logger: slog.New(slog.DiscardHandler)}
		if err := x.k.Start(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			x.k.Run(ctx)
		}()
		synctest.Wait()
		f(t, x)
		cancel()
		<-done
		if err := x.k.Close(); err != nil {
			t.Error(err)
		}
		for _, e := range x.ends {
			<-e.closed
		}
	})
}

// An end whose device is lost is closed, and another one takes its place at once; what the lost one had repaired still counts.
func TestLostDevice(t *testing.T) {
	inBubble(t, func(t *testing.T, x *keeping) {
		first := x.last()
		first.health <- routing.Health{Interface: "tun0", Repairs: map[string]uint64{"rule": 2}}
		first.lost <- routing.ErrInterfaceGone
		synctest.Wait()
		<-first.closed
		if x.k.Current() != x.last() || x.last() == first {
			t.Fatal("there is no other end")
		}
		x.last().health <- routing.Health{Interface: "tun0", Repairs: map[string]uint64{"rule": 1, "link": 1}}
		synctest.Wait()
		if h, _ := x.now(); h.Problem != "" || h.Repairs["rule"] != 3 || h.Repairs["link"] != 1 || h.Repairs["device"] != 1 {
			t.Errorf("got %+v", h)
		}
	})
}

// A device that is deleted again and again is opened less and less often, and that is a problem until one lasts.
func TestDeviceThatIsLostAgainAndAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, x *keeping) {
		begin := time.Now()
		for time.Since(begin) < 5*time.Minute {
			if e := x.k.Current(); e == x.last() {
				select {
				case <-e.closed: // and it is waited before the next
				default:
					e.lost <- routing.ErrInterfaceGone
				}
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if _, n := x.now(); n < 20 || n > 45 {
			t.Errorf("%d devices in five minutes", n)
		}
		if h, _ := x.now(); !strings.Contains(h.Problem, "tun0") {
			t.Errorf("problem %q", h.Problem)
		}
		time.Sleep(maxDelay + steady)
		synctest.Wait()
		if h, _ := x.now(); h.Problem != "" {
			t.Errorf("when the device lasts: problem %q", h.Problem)
		}
	})
}

// While no device can be opened, it is tried again, and the health says why there is none.
func TestDeviceThatCannotBeOpened(t *testing.T) {
	inBubble(t, func(t *testing.T, x *keeping) {
		x.setFail(os.ErrPermission)
		x.last().lost <- routing.ErrInterfaceGone
		time.Sleep(time.Minute)
		synctest.Wait()
		if _, n := x.now(); n < 6 || n > 15 {
			t.Errorf("%d attempts in a minute", n)
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

// Where the kernel tells nothing of changes, that is a problem, and the end is used all the same.
func TestWithoutNotifications(t *testing.T) {
	inBubble(t, func(t *testing.T, x *keeping) {
		x.last().lost <- errors.New("no netlink")
		time.Sleep(time.Hour)
		synctest.Wait()
		if h, n := x.now(); n != 1 || !strings.Contains(h.Problem, "no netlink") {
			t.Errorf("%d ends, problem %q", n, h.Problem)
		}
	})
}
