package client

import (
	"crypto/tls"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// clock tells the time for the verification of certificates.
type clock struct {
	now func() time.Time

	// synchronised reports whether now is known to be correct.
	synchronised func() bool
}

// newClock returns the clock of config if it has one, and otherwise the host's.
func newClock(config *tls.Config) clock {
	if config != nil && config.Time != nil {
		return clock{now: config.Time, synchronised: func() bool { return true }}
	}
	return clock{now: func() time.Time {
		return notBefore(time.Now(), buildTime())
	}, synchronised: synchronised}
}

// notBefore returns the later of now and built. A clock that is before the time
// at which the program was built is wrong.
func notBefore(now, built time.Time) time.Time {
	if now.Before(built) {
		return built
	}
	return now
}

// buildTime returns the time of the commit that the program was built from. It
// is zero if unknown.
var buildTime = sync.OnceValue(func() time.Time {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return time.Time{}
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			t, _ := time.Parse(time.RFC3339, s.Value) // zero if invalid
			return t
		}
	}
	return time.Time{}
})

// synchronised reports whether the kernel considers its clock synchronised. It
// returns false if the process may not ask.
func synchronised() bool {
	var t unix.Timex
	_, err := unix.Adjtimex(&t)
	return err == nil && t.Status&unix.STA_UNSYNC == 0
}
