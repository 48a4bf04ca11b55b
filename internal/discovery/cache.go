package discovery

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// maxCached limits the domains whose delegation files, and whose SRV records,
// are kept.
const maxCached = 256

// A fileKey names a delegation file and who uses it.
type fileKey struct {
	host    string
	purpose Purpose
	private bool
}

// A file is what is known of a delegation file. The zero value is of a file
// that was not asked for.
type file struct {
	turn chan struct{} // holds one value while somebody asks for the file
	used time.Time     // guarded by Resolver.mu

	// The following are guarded by turn.

	name      Name // the zero Name without an answer
	since     time.Time
	until     time.Time // end of the lifetime of name
	failure   string    // why there is no answer, or no newer one
	temporary bool      // failure is
	failures  int       // temporary ones, in a row
	notBefore time.Time // the file is not asked for again before
	warned    []string  // failures that the log has
}

// A fileResult is the outcome of asking for a delegation file.
type fileResult struct {
	name    Name // the zero Name without a valid file
	until   time.Time
	status  string // as Result.WellKnown
	unknown bool   // as Result.FileUnknown
}

// delegation returns what the delegation file of the resolution's domain says:
// a former answer within its lifetime, or a new one.
func (x *resolution) delegation(ctx context.Context) fileResult {
	f := x.file(fileKey{x.input, x.query.Purpose, x.query.Private})
	select {
	case f.turn <- struct{}{}:
		defer func() { <-f.turn }()
	case <-ctx.Done():
		return fileResult{status: "error: timeout", unknown: true}
	}
	now := x.Now()
	if f.name != (Name{}) && now.After(f.until.Add(staleness)) {
		f.name = Name{}
	}
	switch {
	case f.name != (Name{}) && now.Before(f.refreshAt()):
		return f.result("cached")
	case now.Before(f.notBefore):
		return f.failed("cached error")
	}
	name, lifetime, ferr := x.fetchFile(ctx, x.input)
	switch {
	case ferr == nil:
		x.countFile("valid")
		now = x.Now()
		f.name, f.since, f.until = name, now, now.Add(lifetime)
		f.failure, f.failures, f.notBefore = "", 0, time.Time{}
		return f.result("valid")
	case ctx.Err() != nil:
		// The resolution ended, which tells nothing about the file.
		return fileResult{status: "error: " + ferr.reason, unknown: true}
	}
	f.note(x, ferr)
	return f.failed("error: " + ferr.reason)
}

// refreshAt returns when the answer is asked for again: in the last fifth of
// its lifetime.
func (f *file) refreshAt() time.Time {
	return f.until.Add(-f.until.Sub(f.since) / 5)
}

// note notes a failure. A definite one ends a former answer.
func (f *file) note(x *resolution, err *fileError) {
	f.log(x, err)
	if !err.temporary {
		x.countFile("definite")
		f.name, f.failures = Name{}, 0
		f.notBefore = x.Now().Add(x.jittered(errorLifetime))
		return
	}
	x.countFile("temporary")
	wait := min(minBackoff<<min(f.failures, 6), maxBackoff)
	f.failures++
	wait = x.jittered(wait)
	if err.after != 0 {
		wait = err.after
	}
	f.notBefore = x.Now().Add(wait)
}

// log writes a line about a failure: a warning for each reason why a file that
// is there is not used. Most domains have none.
func (f *file) log(x *resolution, err *fileError) {
	level := slog.LevelDebug
	missing := err.temporary || strings.HasPrefix(err.reason, "status ")
	if !missing && !slices.Contains(f.warned, err.reason) {
		f.warned = append(f.warned, err.reason)
		level = slog.LevelWarn
	}
	x.logger().Log(context.Background(), level, "the delegation file is not used", "domain",
		x.input,
		"reason", err.reason)
}

// failed returns the former answer if there is one, else the failure.
func (f *file) failed(status string) fileResult {
	if f.name != (Name{}) {
		return f.result("stale")
	}
	return fileResult{status: status, unknown: f.temporary}
}

func (f *file) result(status string) fileResult {
	return fileResult{name: f.name, until: f.until, status: status}
}

// file returns the entry of a file. When there are too many, the one that was
// not used for longest goes.
func (r *Resolver) file(key fileKey) *file {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.files == nil {
		r.files = make(map[fileKey]*file)
	}
	f := r.files[key]
	if f == nil {
		if len(r.files) >= maxCached {
			oldest := fileKey{}
			for k, f := range r.files {
				if o := r.files[oldest]; o == nil || f.used.Before(o.used) {
					oldest = k
				}
			}
			delete(r.files, oldest)
		}
		f = &file{turn: make(chan struct{}, 1)}
		r.files[key] = f
	}
	f.used = r.Now()
	return f
}
