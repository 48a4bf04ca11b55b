package discovery

import "maps"

// Counts are what a Resolver did so far.
type Counts struct {
	// Discoveries counts the resolutions of domains by their outcome.
	Discoveries map[Outcome]uint64
	// FileRequests counts the requests for delegation files: "valid" for a
	// file that is used, "definite" for none, "temporary" for failures that are
	// tried again.
	FileRequests map[string]uint64
}

// An Outcome is how a resolution ended.
type Outcome struct {
	Step string // as Result.Step; "none" for an error
	// Result is "ok", "degraded" or "stale" as in Result, or the Code of the
	// error.
	Result string
}

// Counts returns the current counts.
func (r *Resolver) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Counts{maps.Clone(r.discoveries), maps.Clone(r.fileRequests)}
}

// count counts the outcome of a resolution. err is nil if there is a result.
func (r *Resolver) count(res *Result, err *Error) {
	o := Outcome{Step: "none"}
	switch {
	case err != nil:
		o.Result = string(err.Code)
	case res.Degraded:
		o = Outcome{res.Step, "degraded"}
	case res.Stale:
		o = Outcome{res.Step, "stale"}
	default:
		o = Outcome{res.Step, "ok"}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.discoveries == nil {
		r.discoveries = make(map[Outcome]uint64)
	}
	r.discoveries[o]++
}

// countFile counts a request for a delegation file.
func (r *Resolver) countFile(result string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fileRequests == nil {
		r.fileRequests = make(map[string]uint64)
	}
	r.fileRequests[result]++
}
