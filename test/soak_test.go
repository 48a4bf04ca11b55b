package test

import (
	"flag"
	"fmt"
	"testing"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

// cycles is for more than a test: go test ./test -run TestNothingAccumulates -v
// -cycles 1000
var cycles = flag.Int("cycles", 8, "how often TestNothingAccumulates connects")

// held is what a process has that must not get more with time.
type held struct{ goroutines, files float64 }

// Sessions that have ended, connections that were lost, and reloads leave
// nothing in either process.
func TestNothingAccumulates(t *testing.T) {
	const file = "\n[metrics]\nlisten = \"127.0.0.1:9484\"\n[reconnect]\nmax_delay = \"1s\"\n"
	p := newPair(t, options{clients: 2, client: file})
	alice, bob := p.invite("alice"), p.invite("bob")
	stays, goes := p.Clients[0], p.Clients[1]
	p.up(stays, alice)
	proxy, staying := newScraper(p, p.Proxy), newScraper(p, stays)
	holds := func(s *scraper, say string) held {
		m := s.scrape()
		if say != "" {
			t.Logf("%-8s %s: %3.0f goroutines, %3.0f files, %5.1f MB resident, %4.1f MB heap goal",
				say, s.host.Name(),
				m["go_goroutines"], m["process_open_fds"], m["process_resident_memory_bytes"]/1e6,
				m["go_memstats_next_gc_bytes"]/1e6)
		}
		return held{m["go_goroutines"], m["process_open_fds"]}
	}
	cycle := func() {
		p.up(goes, bob)
		p.ping(goes, lab.TargetIPv4)
		p.must(p.Proxy, "masque-proxy", "reload")
		before := p.status(stays, "alice").Reconnects
		p.kick("alice")
		p.eventually("alice is back", func() bool {
			s := p.status(stays, "alice")
			return s.Reconnects > before && s.State == client.StateConnected
		})
		p.down(goes, "bob")
	}
	for range 3 { // what is made once is there after that
		cycle()
	}
	var least [2]held
	for i, s := range []*scraper{proxy, staying} {
		least[i] = holds(s, "before")
	}
	for i := range *cycles {
		cycle()
		if (i+1)%50 == 0 {
			holds(proxy, fmt.Sprint(i+1))
			holds(staying, fmt.Sprint(i+1))
		}
	}
	for i, s := range []*scraper{proxy, staying} {
		p.eventually(s.host.Name()+" holds what it held", func() bool {
			now := holds(s, "")
			const few = 4 // come and go; one for each cycle would be more
			return now.goroutines < least[i].goroutines+few && now.files < least[i].files+few
		})
		holds(s, "after")
	}
}
