package daemon

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
)

// events records the order of events.
type events struct {
	mu   sync.Mutex
	list []string
}

func (e *events) add(event string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, event)
}

func (e *events) String() string { return strings.Join(e.list, ", ") }

// waiting returns a task that is ready at once and runs until it is stopped.
func waiting(e *events, name string) Task {
	return NewTask(name, func(ctx context.Context, ready func()) error {
		e.add(name + " starts")
		ready()
		<-ctx.Done()
		e.add(name + " stops")
		return nil
	})
}

func TestRun(t *testing.T) {
	broken := errors.New("it broke")
	for _, tt := range []struct {
		name  string
		tasks func(e *events, stop func()) []Task
		want  string
		err   error
	}{
		{"a signal", func(e *events, stop func()) []Task {
			return []Task{waiting(e, "a"), waiting(e, "b"),
				NewTask("c", func(ctx context.Context, ready func()) error {
					ready()
					stop()
					<-ctx.Done()
					e.add("c stops")
					return nil
				})}
		}, "a starts, b starts, c stops, b stops, a stops", nil},
		{"a task ends", func(e *events, _ func()) []Task {
			return []Task{waiting(e, "a"), NewTask("b", func(context.Context, func()) error {
				e.add("b ends")
				return nil
			}), waiting(e, "c")}
		}, "a starts, b ends, a stops", nil},
		{"a task fails", func(e *events, _ func()) []Task {
			return []Task{waiting(e, "a"), NewTask("b", func(context.Context, func()) error {
				return broken
			}), waiting(e, "c")}
		}, "a starts, a stops", broken},
		{"a signal before a task is ready", func(e *events, stop func()) []Task {
			return []Task{NewTask("a", func(ctx context.Context, _ func()) error {
				stop()
				<-ctx.Done()
				e.add("a stops")
				return nil
			}), waiting(e, "b")}
		}, "a stops", nil},
		{"a reporter", func(e *events, stop func()) []Task {
			reported := make(chan struct{})
			return []Task{NewReporter("a", func(ctx context.Context) {
				<-ctx.Done()
				e.add("a reports")
				close(reported)
			}), NewTask("b", func(ctx context.Context, ready func()) error {
				ready()
				stop()
				<-reported
				<-ctx.Done()
				e.add("b stops")
				return nil
			})}
		}, "a reports, b stops", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var e events
			if err := Run(ctx, slog.New(slog.DiscardHandler),
				tt.tasks(&e, stop)...); !errors.Is(err, tt.err) {
				t.Errorf("got %v, want %v", err, tt.err)
			}
			if got := e.String(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}
