package client

import (
	"crypto/tls"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A clock tells the time by which certificates are verified.
type clock struct {
	now          func() time.Time
	synchronised func() bool // reports whether now is known to be right
}

// newClock returns the host's clock, or that of config, if it has one.
func newClock(config *tls.Config) clock {
	if config != nil && config.Time != nil {
		return clock{now: config.Time, synchronised: func() bool { return true }}
	}
	return clock{now: func() time.Time {
		return notBefore(time.Now(), buildTime())
	}, synchronised: synchronised}
}

// notBefore returns now, or built where that is later. A clock that says
// otherwise is wrong: it cannot be earlier than when the program was made.
func notBefore(now, built time.Time) time.Time {
	if now.Before(built) {
		return built
	}
	return now
}

// built returns the time of the source that this program was made from, the
// zero Time where it is not known.
var buildTime = sync.OnceValue(func() time.Time {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return time.Time{}
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			t, _ := time.Parse(time.RFC3339, s.Value) // zero if it is none
			return t
		}
	}
	return time.Time{}
})

// synchronised reports whether the kernel takes its clock for synchronised. A
// service may not be allowed to ask.
func synchronised() bool {
	var t unix.Timex
	_, err := unix.Adjtimex(&t)
	return err == nil && t.Status&unix.STA_UNSYNC == 0
}
