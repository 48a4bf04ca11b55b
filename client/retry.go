package client

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// steadyAfter is how long a session has to last for the next wait before
	// reconnecting to be short again.
	steadyAfter = 10 * time.Second
	firstDelay  = 250 * time.Millisecond
)

// retry says what follows when a session ends or none comes about.
type retry struct {
	enabled     bool
	service     bool          // nobody waits for the outcome of the start
	maxDelay    time.Duration // between attempts
	logger      *slog.Logger
	everApplied func() bool                        // the kernel has followed a proxy; nil for never
	beforeWait  func(everConnected bool, e *Error) // called before each wait
	// sooner waits until ctx ends, or until trying again is worth it before its
	// time, which it reports. It may be nil.
	awaitReason func(ctx context.Context) bool
}

// run has one session after another until ctx ends, which gives nil, or until
// trying again cannot help. session returns why it ended, and how long it was
// connected.
func (r retry) run(ctx context.Context,
	session func(context.Context) (connected time.Duration, err error)) error {
	wait := &backoff.ExponentialBackOff{
		InitialInterval: firstDelay, RandomizationFactor: backoff.DefaultRandomizationFactor,
		Multiplier: 2, MaxInterval: r.maxDelay,
	}
	wait.Reset()
	everConnected, logged := false, ""
	for {
		connected, err := session(ctx)
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
		r.logger.Log(ctx, level, "no session", "reason", logged, "retry_in",
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

// wait waits for delay, or until ctx ends. It reports whether it ended before,
// because something has changed.
func (r retry) wait(ctx context.Context, delay time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, delay)
	defer cancel()
	if r.awaitReason != nil {
		return r.awaitReason(ctx)
	}
	<-ctx.Done()
	return false
}
