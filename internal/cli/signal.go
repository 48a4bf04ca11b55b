package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// ErrInterrupted is the cause of a SignalContext that ended with SIGINT:
// somebody at a terminal wants an end. SIGTERM may as well be a service
// manager's way to restart.
var ErrInterrupted = fmt.Errorf("interrupted: %w", context.Canceled)

// SignalContext ends with the first SIGINT or SIGTERM. The second makes the
// process exit at once, as a Failure: what it changed on the host is then
// cleaned up by its next start. The caller calls the function when it has
// stopped; it ends the context too, and may be called more than once.
func SignalContext(parent context.Context, logger *slog.Logger) (context.Context,
	context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		for stopping := false; ; stopping = true {
			select {
			case s := <-signals:
				if stopping {
					logger.Error("stopped by force; what is left on the host is cleaned up by the next start", "signal", s.String())
					os.Exit(int(Failure))
				}
				logger.Info("stopping; once more to force it", "signal", s.String())
				if s == syscall.SIGINT {
					cancel(ErrInterrupted)
				} else {
					cancel(nil)
				}
			case <-done:
				return
			}
		}
	}()
	return ctx, sync.OnceFunc(func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	})
}
