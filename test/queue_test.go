package test

import (
	"context"
	"slices"
	"strconv"
	"testing"
	"time"

	"masquevpn/internal/flowqueue"
	"masquevpn/internal/lab"
)

// A bulk transfer fills a path that is slower than it; what shares the tunnel
// with it does not wait behind it and loses nothing. The tunnel has congestion
// control around it, so that packets wait at its entrance.
func TestPingBesideBulkTransfer(t *testing.T) {
	const (
		rate  = 10_000_000 // bits per second
		pings = 9
		// fifo is how long a packet would wait behind all that the entrance has
		// room for.
		fifo = flowqueue.Limit * 1400 * 8 * time.Second / rate
	)
	outer := "\n[tunnel]\ncongestion = \"outer\"\n"
	// The wire loses nothing by itself.
	p := newPair(t, options{impair: &lab.Impairment{Delay: 5 * time.Millisecond, Rate: rate,
		Queue: 8 << 20}, client: outer, proxy: outer})
	p.connect(p.Client, "alice")
	for i, tc := range []struct {
		name  string
		args  []string
		drops func() map[string]uint64 // drops at the entrance
	}{
		{"up", nil, func() map[string]uint64 { return p.status(p.Client, "alice").Drops }},
		{"down", []string{"-R"}, func() map[string]uint64 { return p.sessions()[0].Drops }},
	} {
		port := strconv.Itoa(5201 + i)
		server := p.iperfServer(p.Target, port)
		bulk := p.Client.Command(p.ctx, "iperf3",
			append(tc.args, "-c", lab.TargetIPv4.String(), "-p", port, "-t", "60", "-C", "reno")...)
		check(t, bulk.Start())
		p.eventually("CoDel drops packets of the transfer", func() bool {
			return tc.drops()["queue_delay"] > 0
		})
		var waited []time.Duration
		for range pings {
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			a, err := p.Client.Probe(ctx, lab.Probe{To: lab.TargetIPv4})
			cancel()
			if err != nil || !a.Echo {
				t.Fatalf("%s: a ping is lost: %v, %v", tc.name, a, err)
			}
			waited = append(waited, a.RTT)
		}
		select {
		case <-bulk.Done():
			t.Fatalf("%s: iperf3 ended:\n%s", tc.name, p.log(bulk))
		default:
		}
		slices.Sort(waited)
		t.Logf("%s: pings took %v; %v dropped", tc.name, waited, tc.drops())
		if waited[pings/2] > fifo/4 {
			t.Errorf("%s: pings took %v, where a queue for all would have cost up to %v", tc.name,
				waited, fifo)
		}
		if n := tc.drops()["queue_full"]; n > 0 {
			t.Errorf("%s: %d packets dropped because the queue was full", tc.name, n)
		}
		ctx, cancel := context.WithTimeout(p.ctx, patience)
		_, _ = bulk.Stop(ctx), server.Stop(ctx)
		cancel()
	}
	if up, down := p.Wires[0].Stats(); up.QueueFull+down.QueueFull > 0 {
		t.Errorf("the wire dropped packets: %+v, %+v", up, down)
	}
}

// iperfServer starts a server for one run of iperf3. One that has not put the
// last run away refuses the next.
func (p *pair) iperfServer(host *lab.Host, port string) *lab.Cmd {
	p.t.Helper()
	server := host.Command(p.ctx, "iperf3", "-s", "-1", "-p", port)
	check(p.t, server.Start())
	p.eventually("iperf3 listens", func() bool {
		out, err := host.Command(p.ctx, "ss", "-Hltn", "sport = :"+port).Output()
		return err == nil && len(out) > 0
	})
	return server
}
