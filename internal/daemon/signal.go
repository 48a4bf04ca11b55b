package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"masquevpn/internal/fault"
)

// ErrInterrupted is the cause of a SignalContext that ended with SIGINT: a user
// at a terminal stops the program. SIGTERM may also come from a service manager
// that restarts it.
var ErrInterrupted = fmt.Errorf("interrupted: %w", context.Canceled)

// SignalContext returns a context that ends with the first SIGINT or SIGTERM.
// The second one ends the process at once, as a failure; the next start then
// cleans up the host. The caller must call stop when it has stopped. stop also
// ends the context, and may be called more than once.
func SignalContext(parent context.Context, logger *slog.Logger) (ctx context.Context,
	stop context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		for stopping := false; ; stopping = true {
			select {
			case s := <-signals:
				if stopping {
					logger.Error("stopped by force; the next start cleans up the host",
						"signal", s.String())
					os.Exit(int(fault.Failure))
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
