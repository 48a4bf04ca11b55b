// Package daemon runs a program in the foreground until a signal stops it.
//
// A program is a list of tasks. [Run] starts them one after the other, each
// when the one before it is ready, and stops them in reverse order: a task can
// rely on those before it for its whole life. The rest of the package are the
// parts that both programs share: [SignalContext], the tasks [Control],
// [Metrics] and [PCAP], and the logs.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
)

// Task is a part of a program.
type Task interface {
	// Run runs the task until ctx is done or the task fails. It is called once.
	Run(ctx context.Context) error

	// Ready returns a channel that Run closes when the next task may start.
	Ready() <-chan struct{}

	// String returns the name of the task.
	String() string
}

// Run runs tasks until ctx is done or one of them ends. It starts them in
// order, each when the one before it is ready. It stops them in reverse order,
// each when the ones after it have ended; only the context of a [Reporter] is
// done as soon as ctx is. It returns the errors of all tasks, the last task's
// first.
func Run(ctx context.Context, logger *slog.Logger, tasks ...Task) error {
	type running struct {
		task  Task
		stop  context.CancelFunc
		ended chan struct{}
		err   error // valid when ended is closed
	}
	var started []*running
	first := make(chan struct{}) // closed when the first task ends
	closeFirst := sync.OnceFunc(func() { close(first) })
	stopping := false
	for _, t := range tasks {
		parent := context.WithoutCancel(ctx)
		if _, ok := t.(*Reporter); ok {
			parent = ctx
		}
		taskCtx, stop := context.WithCancel(parent)
		r := &running{task: t, stop: stop, ended: make(chan struct{})}
		started = append(started, r)
		go func() {
			defer closeFirst()
			defer close(r.ended)
			r.err = t.Run(taskCtx)
		}()
		select {
		case <-t.Ready():
		case <-first:
		case <-ctx.Done():
		}
		select {
		case <-first:
			stopping = true
		default:
			stopping = ctx.Err() != nil
		}
		if stopping {
			break
		}
	}
	if !stopping {
		select {
		case <-first:
		case <-ctx.Done():
		}
	}
	var errs []error
	for _, r := range slices.Backward(started) {
		logger.Debug("stopping a task", "name", r.task.String())
		r.stop()
		<-r.ended
		errs = append(errs, r.err)
	}
	return errors.Join(errs...)
}

// task is a Task made of a function.
type task struct {
	name  string
	run   func(ctx context.Context, ready func()) error
	ready chan struct{}
}

// NewTask returns a Task that calls run. run calls ready, once, when the next
// task may start.
func NewTask(name string, run func(ctx context.Context, ready func()) error) Task {
	return &task{name: name, run: run, ready: make(chan struct{})}
}

func (t *task) Run(ctx context.Context) error {
	return t.run(ctx, sync.OnceFunc(func() { close(t.ready) }))
}

func (t *task) Ready() <-chan struct{} { return t.ready }
func (t *task) String() string         { return t.name }

// Reporter is a task that reports how the program is. It is ready at once, and
// learns at once that the program stops, while the other tasks still run.
type Reporter struct{ task }

// NewReporter returns a Reporter that calls run.
func NewReporter(name string, run func(ctx context.Context)) *Reporter {
	return &Reporter{task{name: name, ready: make(chan struct{}),
		run: func(ctx context.Context, ready func()) error {
			ready()
			run(ctx)
			return nil
		}}}
}
