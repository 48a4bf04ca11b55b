package fault

import (
	"errors"
	"testing"
)

func TestError(t *testing.T) {
	for _, tt := range []struct {
		name    string
		err     *Error
		summary string
		all     string
	}{
		{"reason", &Error{Reason: "why"}, "why", "why"},
		{"remedy", &Error{Reason: "why", Remedy: "do this"}, "why", "why: do this"},
		{"key", &Error{Key: "tls.ca", Reason: "why", Remedy: "do this"}, "tls.ca: why",
			"tls.ca: why: do this"},
		{"place", &Error{File: "f.toml", Line: 3, Key: "tls.ca", Value: `"x"`, Reason: "why",
			Remedy: "do this"}, `f.toml:3: tls.ca = "x": why`,
			`f.toml:3: tls.ca = "x": why; do this`},
		{"syntax", &Error{File: "f.toml", Line: 3, Reason: "why"}, "f.toml:3: why",
			"f.toml:3: why"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.err.Summary(); got != tt.summary {
				t.Errorf("Summary: got %s, want %s", got, tt.summary)
			}
			if got := tt.err.Error(); got != tt.all {
				t.Errorf("Error: got %s, want %s", got, tt.all)
			}
		})
	}
}

func TestFlatten(t *testing.T) {
	for kind := Failure; kind <= Refused; kind++ {
		e := &Error{Kind: kind, Reason: "why", Remedy: "do this"}
		err := Flatten(e)
		if got, ok := errors.AsType[*Error](err); !ok || got.Kind != kind ||
			got.Error() != "why: do this" {
			t.Errorf("kind %d: %v", kind, err)
		}
		err = Flatten(errors.Join(e, errors.New("a route stayed")))
		if got, ok := errors.AsType[*Error](err); !ok || got.Kind != kind ||
			got.Error() != "why: do this\na route stayed" {
			t.Errorf("kind %d with more: %v", kind, err)
		}
	}
	if err := Flatten(nil); err != nil {
		t.Errorf("nil is %v", err)
	}
}
