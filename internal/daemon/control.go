package daemon

import (
	"context"
	"log/slog"
	"net/http"

	"masquevpn/internal/control"
)

// Control returns a task that serves the control socket of an instance. The
// caller must hold the lock of the instance.
func Control(dir, instance string, h http.Handler, logger *slog.Logger) Task {
	return NewTask("control socket", func(ctx context.Context, ready func()) error {
		server, err := control.Serve(dir, instance, h, logger)
		if err != nil {
			return err
		}
		ready()
		<-ctx.Done()
		return server.Close()
	})
}
