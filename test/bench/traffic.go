package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"masquevpn/internal/lab"
)

// tcp runs iperf3 from the client to the target for d, after a rampUp that is
// not measured, and pings meanwhile.
func (t *tunnel) tcp(ctx context.Context, d, rampUp time.Duration, args ...string) ([]value,
	error) {
	port, err := t.iperfServer(ctx)
	if err != nil {
		return nil, err
	}
	before, err := t.look(ctx)
	if err != nil {
		return nil, err
	}
	pings, stop := t.pingMeanwhile(ctx, 50*time.Millisecond)
	args = append([]string{"-J", "-c", lab.TargetIPv4.String(), "-p", port,
		"-t", strconv.Itoa(int(d.Seconds())), "-O", strconv.Itoa(int(rampUp.Seconds()))}, args...)
	c := t.Client.Command(ctx, "iperf3", args...)
	out, err := c.Output()
	stop()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, iperfError(out))
	}
	after, err := t.look(ctx)
	if err != nil {
		return nil, err
	}
	var r iperfReport
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("iperf3: %w", err)
	}
	values := []value{
		{"throughput", "Mbit/s", (r.End.Received.BitsPerSecond +
			r.End.Reverse.BitsPerSecond) / 1e6},
		{"retransmitted", "segments",
			float64(r.End.Sent.Retransmits + r.End.SentReverse.Retransmits)},
	}
	if received := r.End.Received.Bytes + r.End.Reverse.Bytes; rampUp == 0 && received > 0 {
		values = append(values, value{"CPU", "s/GB",
			(after.cpu - before.cpu).Seconds() / received * 1e9})
	}
	if t.ours && len(t.Wires) == 0 { // impaired networks lose packets in between
		lost, of := inside(before, after)
		values = append(values, value{"lost in our processes", "%",
			100 * float64(lost) / float64(max(of, 1))})
	}
	rtts, err := pings()
	if err != nil {
		return values, err
	}
	return append(values, rttValues(rtts)...), nil
}

// iperfReport contains the used fields of iperf3's JSON output.
type iperfReport struct {
	End struct {
		Sent        iperfSum `json:"sum_sent"`
		Received    iperfSum `json:"sum_received"`
		SentReverse iperfSum `json:"sum_sent_bidir_reverse"`
		Reverse     iperfSum `json:"sum_received_bidir_reverse"`
	} `json:"end"`
	Error string `json:"error"`
}

type iperfSum struct {
	Bytes         float64 `json:"bytes"`
	BitsPerSecond float64 `json:"bits_per_second"`
	Retransmits   int     `json:"retransmits"`
}

func iperfError(out []byte) string {
	var r iperfReport
	if json.Unmarshal(out, &r) == nil && r.Error != "" {
		return r.Error
	}
	return string(out)
}

// iperfServer starts a server for one test on the target and returns its port.
func (t *tunnel) iperfServer(ctx context.Context) (string, error) {
	t.servers++ // a server may still be busy with the last test
	port := strconv.Itoa(5200 + t.servers)
	server, err := launch(ctx, t.Target, "iperf3", "-s", "-1", "-p", port)
	if err != nil {
		return "", err
	}
	return port, until(ctx, server, func() bool {
		out, err := t.Target.Command(ctx, "ss", "-Hltn", "sport = :"+port).Output()
		return err == nil && len(out) > 0
	})
}

// ping sends n echo requests through the tunnel, one every interval, and
// returns the round-trip times.
func (t *tunnel) ping(ctx context.Context, n int, interval time.Duration) ([]time.Duration, error) {
	c := t.Client.Command(ctx, "ping", "-n", "-c", strconv.Itoa(n), "-W", "1",
		"-i", strconv.FormatFloat(interval.Seconds(), 'f', -1, 64), lab.TargetIPv4.String())
	out, err := c.Output()
	rtts := parsePing(out)
	if len(rtts) == 0 {
		return nil, fmt.Errorf("no ping was answered: %w\n%s", err, out)
	}
	return rtts, nil
}

// pingMeanwhile sends echo requests until stop is called. The other result then
// returns their round-trip times.
func (t *tunnel) pingMeanwhile(ctx context.Context,
	interval time.Duration) (result func() ([]time.Duration, error), stop func()) {
	var out bytes.Buffer
	c := t.Client.Command(ctx, "ping", "-n", "-i",
		strconv.FormatFloat(interval.Seconds(), 'f', -1, 64), lab.TargetIPv4.String())
	c.Stdout = &out
	err := c.Start()
	stop = func() {
		if err == nil {
			c.Stop(ctx) // the exit code only reports losses
		}
	}
	return func() ([]time.Duration, error) {
		rtts := parsePing(out.Bytes())
		if err == nil && len(rtts) == 0 {
			err = fmt.Errorf("no ping was answered: %s", logOf(c))
		}
		return rtts, err
	}, stop
}

// parsePing returns the round-trip times in the output of ping.
func parsePing(out []byte) []time.Duration {
	var rtts []time.Duration
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		_, rest, ok := strings.Cut(s.Text(), " time=")
		if !ok {
			continue
		}
		if rtt, err := time.ParseDuration(strings.ReplaceAll(rest, " ", "")); err == nil {
			rtts = append(rtts, rtt)
		}
	}
	return rtts
}

// rttValues returns the median and the 95th percentile.
func rttValues(rtts []time.Duration) []value {
	if len(rtts) == 0 {
		return nil
	}
	slices.Sort(rtts)
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return []value{{"round trip", "ms", ms(rtts[len(rtts)/2])},
		{"round trip, p95", "ms", ms(rtts[len(rtts)*95/100])}}
}
