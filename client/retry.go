package client

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// steadyAfter is the duration of a session after which the backoff starts
	// again with firstDelay.
	steadyAfter = 10 * time.Second
	firstDelay  = 250 * time.Millisecond
)

// retry runs sessions with exponential backoff between them.
type retry struct {
	enabled  bool          // false: the first failure is final
	service  bool          // Config.Service
	maxDelay time.Duration // limits the delay between two sessions
	logger   *slog.Logger

	// everApplied reports whether the kernel has had a proxy's configuration.
	// nil means false.
	everApplied func() bool

	// beforeWait is called with the failure before each wait.
	beforeWait func(everConnected bool, e *Error)

	// awaitReason waits until ctx is done, or until there is a reason to retry
	// early, and then returns true. It may be nil.
	awaitReason func(ctx context.Context) bool
}

// run calls runSession repeatedly until ctx is done or a failure is final. It
// returns nil if ctx is done, and otherwise that failure. runSession returns
// its failure and how long it was connected.
func (r retry) run(ctx context.Context,
	runSession func(context.Context) (connected time.Duration, err error)) error {
	wait := &backoff.ExponentialBackOff{
		InitialInterval: firstDelay, RandomizationFactor: backoff.DefaultRandomizationFactor,
		Multiplier: 2, MaxInterval: r.maxDelay,
	}
	wait.Reset()
	everConnected, logged := false, ""
	for {
		connected, err := runSession(ctx)
		if ctx.Err() != nil {
			return nil
		}
		everConnected = everConnected || connected > 0
		var e *Error
		if !errors.As(err, &e) {
			e = fail(causeFailure, err, err.Error(), "")
		}
		later := everConnected || r.everApplied != nil && r.everApplied()
		if attemptOf(e).cause.final(r.service, later) || !r.enabled {
			return e
		}
		if connected > steadyAfter {
			wait.Reset()
		}
		delay := wait.NextBackOff()
		level := slog.LevelWarn
		if statusText(e) == logged {
			level = slog.LevelInfo
		}
		logged = statusText(e)
		message := "connection attempt failed"
		if connected > 0 {
			message = "session ended"
		}
		r.logger.Log(ctx, level, message, "reason", logged, "retry_in",
			delay.Round(time.Millisecond).String())
		r.beforeWait(everConnected, e)
		if r.wait(ctx, delay) {
			wait.Reset()
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// wait waits for delay, or until ctx is done. It returns true if there was a
// reason to end early.
func (r retry) wait(ctx context.Context, delay time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, delay)
	defer cancel()
	if r.awaitReason != nil {
		return r.awaitReason(ctx)
	}
	<-ctx.Done()
	return false
}
