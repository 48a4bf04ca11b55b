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

// A bulk transfer fills a slow path. Pings through the same tunnel do not wait
// behind it, and none is lost. The tunnel uses congestion control, so that
// packets queue at its entrance.
func TestPingBesideBulkTransfer(t *testing.T) {
	const (
		rate  = 10_000_000 // bits per second
		pings = 9
		// fifo is the delay of a full FIFO queue at the entrance.
		fifo = flowqueue.Limit * 1400 * 8 * time.Second / rate
	)
	outer := "\n[tunnel]\ncongestion = \"outer\"\n"
	// The queue of the wire is long enough to drop nothing.
	p := newPair(t, options{impair: &lab.Impairment{Delay: 5 * time.Millisecond, Rate: rate,
		Queue: 8 << 20}, client: outer, proxy: outer})
	p.connect(p.Client, "alice")
	for i, tc := range []struct {
		name  string
		args  []string
		drops func() map[string]uint64 // drops at the entrance of this direction
	}{
		{"up", nil, func() map[string]uint64 { return p.status(p.Client, "alice").Drops }},
		{"down", []string{"-R"}, func() map[string]uint64 { return p.sessions()[0].Drops }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			port := strconv.Itoa(5201 + i)
			server := p.iperfServer(p.Target, port)
			bulk := p.Client.Command(p.ctx, "iperf3",
				append(tc.args, "-c", lab.TargetIPv4.String(), "-p", port, "-t", "60", "-C",
					"reno")...)
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
					t.Fatalf("a ping is lost: %v, %v", a, err)
				}
				waited = append(waited, a.RTT)
			}
			select {
			case <-bulk.Done():
				t.Fatalf("iperf3 ended:\n%s", p.log(bulk))
			default:
			}
			slices.Sort(waited)
			t.Logf("pings took %v; %v dropped", waited, tc.drops())
			if waited[pings/2] > fifo/4 {
				t.Errorf("pings took %v, a FIFO queue would delay them by up to %v", waited, fifo)
			}
			if n := tc.drops()["queue_full"]; n > 0 {
				t.Errorf("%d packets dropped because the queue was full", n)
			}
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			_, _ = bulk.Stop(ctx), server.Stop(ctx)
			cancel()
		})
	}
	if up, down := p.Wires[0].Stats(); up.QueueFull+down.QueueFull > 0 {
		t.Errorf("the wire dropped packets: %+v, %+v", up, down)
	}
}

// iperfServer starts a server for one run of iperf3 and waits until it listens.
// Each run needs its own port, because a server may still refuse the next run.
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
