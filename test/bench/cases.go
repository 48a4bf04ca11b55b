package main

import (
	"context"
	"time"

	"masquevpn/internal/lab"
)

// benchCase is something to measure.
type benchCase struct {
	name     string
	about    string
	quick    bool            // part of the subset
	oursOnly bool            // others have nothing like it
	bare     bool            // the hosts only; run starts the tunnel
	path     *lab.Impairment // of the network between the two ends; nil: as fast as the machine
	time     time.Duration   // of one measurement
	run      func(context.Context, *tunnel, time.Duration) ([]value, error)
}

// allCases are the cases, in the order in which they run.
var allCases = join(tcpCases, networkCases)

var tcpCases = []benchCase{
	tcpCase("tcp/up/cubic", "one flow to the target", true, "-C", "cubic"),
	tcpCase("tcp/up/bbr", "one flow to the target", false, "-C", "bbr"),
	tcpCase("tcp/down/cubic", "one flow from the target", true, "-C", "cubic", "-R"),
	tcpCase("tcp/down/bbr", "one flow from the target", false, "-C", "bbr", "-R"),
	tcpCase("tcp/up4/cubic", "four flows to the target", false, "-C", "cubic", "-P", "4"),
	tcpCase("tcp/up4/bbr", "four flows to the target", false, "-C", "bbr", "-P", "4"),
	tcpCase("tcp/both/cubic", "one flow in each direction at once", false, "-C", "cubic", "--bidir"),
	tcpCase("tcp/both/bbr", "one flow in each direction at once", false, "-C", "bbr", "--bidir"),
}

func tcpCase(name, about string, quick bool, args ...string) benchCase {
	return benchCase{name: name, about: "TCP, " + about, quick: quick, time: 3 * time.Second,
		run: func(ctx context.Context, t *tunnel, d time.Duration) ([]value, error) {
			return t.tcp(ctx, d, 0, args...)
		}}
}

// networkCases are networks with delay, loss and a limit on their rate.
var networkCases = []benchCase{
	networkCase("net/20ms-200M/cubic8", true, 20, 200, 0, "-C", "cubic", "-P", "8"),
	networkCase("net/20ms-500M-0.1%/cubic8", false, 20, 500, 0.001, "-C", "cubic", "-P", "8"),
	networkCase("net/20ms-500M-0.1%/bbr1", true, 20, 500, 0.001, "-C", "bbr"),
	networkCase("net/50ms-200M-1%/cubic8", false, 50, 200, 0.01, "-C", "cubic", "-P", "8"),
	networkCase("net/50ms-200M-1%/bbr1", false, 50, 200, 0.01, "-C", "bbr"),
}

// networkCase is a case with a path of the given round trip time in ms, rate in Mbit/s, and loss in each direction.
// Its queue takes 10 ms.
func networkCase(name string, quick bool, rtt, mbits int, loss float64, args ...string) benchCase {
	const settle = 2 * time.Second // which iperf3 leaves out
	path := &lab.Impairment{
		Delay: time.Duration(rtt) * time.Millisecond / 2, Rate: int64(mbits) * 1e6, Queue: mbits * 1e6 / 8 / 100, Loss: loss,
	}
	return benchCase{name: name, about: "TCP to the target over a slow path", quick: quick, path: path, time: 5 * time.Second,
		run: func(ctx context.Context, t *tunnel, d time.Duration) ([]value, error) {
			return t.tcp(ctx, d, settle, args...)
		}}
}

func join(lists ...[]benchCase) []benchCase {
	var all []benchCase
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}
