package test

import (
	"flag"
	"fmt"
	"testing"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

// cycles can be raised for a longer run: go test ./test -run
// TestNothingAccumulates -v -cycles 1000
var cycles = flag.Int("cycles", 8, "number of connections of TestNothingAccumulates")

// resources are the resources of a process that must not grow over time.
type resources struct{ goroutines, files float64 }

// Ended sessions, lost connections and reloads leave no goroutines or files
// behind in either program.
func TestNothingAccumulates(t *testing.T) {
	const file = "\n[metrics]\nlisten = \"127.0.0.1:9484\"\n[reconnect]\nmax_delay = \"1s\"\n"
	p := newPair(t, options{clients: 2, client: file})
	alice, bob := p.invite("alice"), p.invite("bob")
	stays, goes := p.Clients[0], p.Clients[1]
	p.up(stays, alice)
	proxy, staying := newScraper(p, p.Proxy), newScraper(p, stays)
	measure := func(s *scraper, label string) resources {
		m := s.scrape()
		if label != "" {
			t.Logf("%-8s %s: %3.0f goroutines, %3.0f files, %5.1f MB resident, %4.1f MB heap goal",
				label, s.host.Name(),
				m["go_goroutines"], m["process_open_fds"], m["process_resident_memory_bytes"]/1e6,
				m["go_memstats_next_gc_bytes"]/1e6)
		}
		return resources{m["go_goroutines"], m["process_open_fds"]}
	}
	cycle := func() {
		p.up(goes, bob)
		p.ping(goes, lab.TargetIPv4)
		p.must(p.Proxy, "masque-proxy", "reload")
		before := p.status(stays, "alice").Reconnects
		p.kick("alice")
		p.eventually("alice has reconnected", func() bool {
			s := p.status(stays, "alice")
			return s.Reconnects > before && s.State == client.StateConnected
		})
		p.down(goes, "bob")
	}
	for range 3 { // allocates everything that is allocated once
		cycle()
	}
	var least [2]resources
	for i, s := range []*scraper{proxy, staying} {
		least[i] = measure(s, "before")
	}
	for i := range *cycles {
		cycle()
		if (i+1)%50 == 0 {
			measure(proxy, fmt.Sprint(i+1))
			measure(staying, fmt.Sprint(i+1))
		}
	}
	for i, s := range []*scraper{proxy, staying} {
		p.eventually(s.host.Name()+" has as many resources as before", func() bool {
			now := measure(s, "")
			const few = 4 // short-lived ones; a leak has at least one for each cycle
			return now.goroutines < least[i].goroutines+few && now.files < least[i].files+few
		})
		measure(s, "after")
	}
}
