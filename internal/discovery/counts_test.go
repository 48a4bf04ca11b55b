package discovery_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"masquevpn/internal/discovery"
	"masquevpn/internal/discovery/discoverytest"
	"masquevpn/internal/logtest"
)

// TestCounts checks that each resolution of a domain is counted once by its
// outcome, and each request for a delegation file by its result.
func TestCounts(t *testing.T) {
	w := delegating()
	w.DNS["_masque._udp.srv.example"] = discoverytest.Node{
		SRV: []string{"10 0 443 vpn.example.net."}}
	r := w.Resolver()
	for _, input := range []string{"example.org", "example.org", "srv.example", "missing.example",
		"192.0.2.1", "vpn.example.net:443", "example.org."} {
		_, _ = r.Resolve(t.Context(), query(input))
	}
	w.DNS["_masque._udp.srv.example"] = discoverytest.Node{
		Fail: map[string]string{"*": "SERVFAIL"}}
	_, _ = r.Resolve(t.Context(), query("srv.example"))
	w.DNS["other.example"] = w.DNS["vpn.example.net"]
	w.DNS["_masque._udp.other.example"] = w.DNS["_masque._udp.srv.example"]
	w.HTTPS["https://other.example"+discovery.FilePath] = discoverytest.Page{Status: 404}
	_, _ = r.Resolve(t.Context(), query("other.example"))
	want := discovery.Counts{Discoveries: map[discovery.Outcome]uint64{
		{Step: "well-known/address", Result: "ok"}: 3,
		{Step: "srv", Result: "ok"}:                1,
		{Step: "none", Result: "no_addresses"}:     1,
		{Step: "srv", Result: "stale"}:             1,
		{Step: "address", Result: "degraded"}:      1,
	}, FileRequests: map[string]uint64{"valid": 1, "definite": 1, "temporary": 2}}
	if diff := cmp.Diff(want, r.Counts()); diff != "" {
		t.Error(diff)
	}
}

// TestUnusedFileIsLogged checks that the log has one warning for each reason
// why a delegation file is not used, and none for a file that is not there.
func TestUnusedFileIsLogged(t *testing.T) {
	w := delegating()
	var log logtest.Buffer
	r := w.Resolver()
	r.Logger = log.Logger()
	const u = "https://example.org" + discovery.FilePath
	for _, page := range []discoverytest.Page{
		{Status: 404}, {Error: "timeout"}, {Status: 200, Body: "{}"}, {Status: 200, Body: "[]"},
		{Status: 200, PadTo: discovery.MaxFile + 1}, {Status: 503}, {Status: 200, Body: "{}"},
	} {
		w.HTTPS[u] = page
		if _, err := r.Resolve(t.Context(), query("example.org")); err != nil {
			t.Fatal(err)
		}
		w.Now = w.Now.Add(2 * time.Hour)
	}
	warnings := log.Lines("level=WARN")
	for i, line := range warnings {
		_, warnings[i], _ = strings.Cut(line, "level=WARN ")
	}
	want := []string{
		`msg="the delegation file is not used" domain=example.org reason=invalid`,
		`msg="the delegation file is not used" domain=example.org reason="too large"`,
	}
	if diff := cmp.Diff(want, warnings); diff != "" {
		t.Error(diff)
	}
	if debug := log.Lines("level=DEBUG"); len(debug) != 5 {
		t.Errorf("lines for debugging: %q", debug)
	}
}
