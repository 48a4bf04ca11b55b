package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"masquevpn/internal/lab"
)

// benchCase is one measurement.
type benchCase struct {
	name     string
	about    string
	quick    bool // part of the subset for -quick
	oursOnly bool // other tunnels have no counterpart
	// bare cases make only the hosts; run starts the tunnel.
	bare bool
	// path is the network between the ends. nil: no impairment.
	path *lab.Impairment
	time time.Duration // duration of one measurement
	run  func(context.Context, *tunnel, time.Duration) ([]value, error)
}

// allCases returns the cases in their order of execution.
var allCases = slices.Concat(tcpCases, networkCases, udpCases, otherCases)

var tcpCases = []benchCase{
	tcpCase("tcp/up/cubic", "one flow to the target", true, "-C", "cubic"),
	tcpCase("tcp/up/bbr", "one flow to the target", false, "-C", "bbr"),
	tcpCase("tcp/down/cubic", "one flow from the target", true, "-C", "cubic", "-R"),
	tcpCase("tcp/down/bbr", "one flow from the target", false, "-C", "bbr", "-R"),
	tcpCase("tcp/up4/cubic", "four flows to the target", false, "-C", "cubic", "-P", "4"),
	tcpCase("tcp/up4/bbr", "four flows to the target", false, "-C", "bbr", "-P", "4"),
	tcpCase("tcp/both/cubic", "one flow in each direction at once", false, "-C", "cubic",
		"--bidir"),
	tcpCase("tcp/both/bbr", "one flow in each direction at once", false, "-C", "bbr", "--bidir"),
}

func tcpCase(name, about string, quick bool, args ...string) benchCase {
	return benchCase{name: name, about: "TCP, " + about, quick: quick, time: 3 * time.Second,
		run: func(ctx context.Context, t *tunnel, d time.Duration) ([]value, error) {
			return t.tcp(ctx, d, 0, args...)
		}}
}

// networkCases returns networks with delay, loss and a limited rate.
var networkCases = []benchCase{
	networkCase("net/20ms-200M/cubic8", false, 20, 200, 0, "-C", "cubic", "-P", "8"),
	networkCase("net/20ms-500M-0.1%/cubic8", false, 20, 500, 0.001, "-C", "cubic", "-P", "8"),
	networkCase("net/20ms-500M-0.1%/bbr1", true, 20, 500, 0.001, "-C", "bbr"),
	networkCase("net/50ms-200M-1%/cubic8", false, 50, 200, 0.01, "-C", "cubic", "-P", "8"),
	networkCase("net/50ms-200M-1%/bbr1", false, 50, 200, 0.01, "-C", "bbr"),
}

// networkCase returns a case with a round-trip time in ms, a rate in Mbit/s,
// and a loss in each direction. Its queue holds 10 ms.
func networkCase(name string, quick bool, rtt, mbits int, loss float64, args ...string) benchCase {
	const rampUp = 2 * time.Second // omitted by iperf3
	path := &lab.Impairment{
		Delay: time.Duration(rtt) * time.Millisecond / 2, Rate: int64(mbits) * 1e6,
		Queue: mbits * 1e6 / 8 / 100, Loss: loss,
	}
	return benchCase{name: name, about: "TCP to the target over a slow path", quick: quick,
		path: path, time: 5 * time.Second,
		run: func(ctx context.Context, t *tunnel, d time.Duration) ([]value, error) {
			return t.tcp(ctx, d, rampUp, args...)
		}}
}

var udpCases = []benchCase{
	udpCase("udp/1200", "to the target", true, udpLoad{size: 1200}),
	udpCase("udp/64", "to the target", false, udpLoad{size: 64}),
	udpCase("udp/down/1200", "from the target", false, udpLoad{size: 1200, down: true}),
	udpCase("udp/down/64", "from the target", false, udpLoad{size: 64, down: true}),
	{name: "udp/1200/1G", about: "UDP, 1200 bytes, offered at 1 Gbit/s to all",
		time: 2 * time.Second,
		run: func(ctx context.Context, t *tunnel, d time.Duration) ([]value, error) {
			values, _, err := t.udpAt(ctx, "", udpLoad{size: 1200}, 1e9/8/1200, d)
			return values, err
		}},
}

func udpCase(name, about string, quick bool, load udpLoad) benchCase {
	return benchCase{name: name, about: fmt.Sprintf("UDP %s, %d bytes, at 50, 100 and 200 %% of what the tunnel can", about, load.size), quick: quick,
		time: 2 * time.Second,
		run: func(ctx context.Context, t *tunnel, d time.Duration) ([]value, error) {
			return t.udpLevels(ctx, load, d)
		}}
}

var otherCases = []benchCase{
	{name: "rtt/idle", about: "round trip of a ping, nothing else going on", quick: true,
		time: 2 * time.Second, run: idleRTT},
	{name: "start", about: "from the start of the client's process to the first answer",
		quick: true, bare: true, run: startTime},
	{name: "sessions", about: "idle sessions at the proxy: memory, and how fast they come up",
		oursOnly: true, bare: true, run: manySessions},
}

func idleRTT(ctx context.Context, t *tunnel, d time.Duration) ([]value, error) {
	const interval = 10 * time.Millisecond
	rtts, err := t.ping(ctx, int(d/interval), interval)
	return rttValues(rtts), err
}

// startTime measures the start of a client, after starting a proxy if none
// runs, and stops the client again.
func startTime(ctx context.Context, t *tunnel, _ time.Duration) (values []value, err error) {
	if t.proxy == nil {
		if err := t.kind.proxy(ctx, t); err != nil {
			return nil, err
		}
	}
	start := time.Now()
	if err := t.kind.client(ctx, t); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stop(ctx, t.client)) }()
	// A packet sent too early is lost. An answer takes a fraction of this time,
	// so waiting longer is useless.
	const wait = 2 * time.Millisecond
	for {
		pctx, cancel := context.WithTimeout(ctx, wait+time.Since(start)/20)
		a, err := t.Client.Probe(pctx, lab.Probe{To: lab.TargetIPv4})
		cancel()
		if err == nil && a.Echo {
			break
		}
		if time.Since(start) > patience {
			return nil, fmt.Errorf("no ping is answered: %w\n%s", err, logOf(t.client))
		}
		if err := sleep(ctx, wait/5); err != nil {
			return nil, err
		}
	}
	values = append(values, value{"first answer after", "ms",
		float64(time.Since(start)) / float64(time.Millisecond)})
	for _, end := range []struct {
		name string
		c    *lab.Cmd
	}{{"client", t.client}, {"proxy", t.proxy}} {
		used, err := memory(end.c)
		if err != nil {
			return values, err
		}
		values = append(values, value{end.name + "'s memory", "MB", used / 1e6})
	}
	return values, nil
}
