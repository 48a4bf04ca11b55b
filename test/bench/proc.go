package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

// clockTick is the unit of times in /proc/PID/stat, the same on every Linux
// that Go supports.
const clockTick = 10 * time.Millisecond

// cpu returns the processor time used by both ends of the tunnel so far.
func (t *tunnel) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, c := range []*lab.Cmd{t.client, t.proxy} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.PID()))
		if err != nil {
			return 0, fmt.Errorf("%s has ended: %w", c, err)
		}
		// The second field is the name in parentheses; utime and stime are the
		// 14th and 15th.
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, f := range fields[11:13] {
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/%d/stat: %w", c.PID(), err)
			}
			sum += time.Duration(n) * clockTick
		}
	}
	return sum, nil
}

// memory returns the resident memory of a program in bytes.
func memory(c *lab.Cmd) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", c.PID()))
	if err != nil {
		return 0, fmt.Errorf("%s has ended: %w", c, err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "VmRSS:"); ok {
			n, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
			return n * 1024, err
		}
	}
	return 0, fmt.Errorf("no VmRSS of %s", c)
}

// look is a reading of all counters at one time.
type look struct {
	cpu time.Duration
	// drops lists the same places in each look, in a packet's order.
	drops []drop
	c, p  client.Status // masquevpn only
}

// drop counts the packets lost at one place.
type drop struct {
	where string
	n     uint64
}

// look reads all counters of a tunnel and its hosts.
func (t *tunnel) look(ctx context.Context) (l look, err error) {
	add := func(where string, count func() (uint64, error)) {
		if err == nil {
			var n uint64
			n, err = count()
			l.drops = append(l.drops, drop{where, n})
		}
	}
	if l.cpu, err = t.cpu(); err != nil {
		return l, err
	}
	if t.ours {
		if l.c, l.p, err = t.status(ctx); err != nil {
			return l, err
		}
	}
	add("client's device", func() (uint64, error) { return deviceDrops(ctx, t.Client, t.iface) })
	if t.ours {
		add("client", func() (uint64, error) { return sum(l.c.Drops), nil })
	}
	add("client's socket", func() (uint64, error) { return socketDrops(t.Client) })
	add("kernel's backlog", backlogDrops)
	add("proxy's socket", func() (uint64, error) { return socketDrops(t.Proxy) })
	if t.ours {
		add("proxy", func() (uint64, error) { return sum(l.p.Drops), nil })
	}
	add("proxy's device", func() (uint64, error) { return deviceDrops(ctx, t.Proxy, t.iface) })
	return l, err
}

// sum returns the number of packets that a program dropped, without those that
// the kernel dropped at its device: deviceDrops counts them.
func sum(drops map[string]uint64) (total uint64) {
	for reason, n := range drops {
		if reason != "device_full" {
			total += n
		}
	}
	return total
}

// inside returns the number of packets lost by masquevpn's two processes
// between two looks, and the number of all packets. Losses are the drops of the
// processes, and packets that one process sent but neither the other process
// nor its socket received.
func inside(before, after look) (lost, of int64) {
	for i, d := range after.drops {
		n := int64(d.n - before.drops[i].n)
		switch d.where {
		case "client", "proxy":
			lost += n
		case "client's socket", "proxy's socket", "kernel's backlog":
			lost -= n
		}
	}
	up := int64(after.c.Packets.TX - before.c.Packets.TX)
	down := int64(after.p.Packets.TX - before.p.Packets.TX)
	lost += up - int64(after.p.Packets.RX-before.p.Packets.RX) +
		down - int64(after.c.Packets.RX-before.c.Packets.RX)
	return max(lost, 0), up + down
}

// deviceDrops returns the packets dropped by the kernel at a device in both
// directions.
func deviceDrops(ctx context.Context, h *lab.Host, iface string) (uint64, error) {
	out, err := output(ctx, h, "ip", "-s", "-j", "link", "show", "dev", iface)
	if err != nil {
		return 0, err
	}
	type direction struct {
		Dropped uint64 `json:"dropped"`
	}
	var links []struct {
		Stats struct {
			RX direction `json:"rx"`
			TX direction `json:"tx"`
		} `json:"stats64"`
	}
	if err := json.Unmarshal(out, &links); err != nil || len(links) != 1 {
		return 0, fmt.Errorf("ip -s link: %w in %s", err, out)
	}
	return links[0].Stats.RX.Dropped + links[0].Stats.TX.Dropped, nil
}

// socketDrops returns the packets dropped in a host because the buffer of a UDP
// socket was full.
func socketDrops(h *lab.Host) (n uint64, err error) {
	err = h.Do(func() error {
		for _, f := range []struct{ file, prefix string }{{"snmp", "Udp: "},
			{"snmp6", "Udp6RcvbufErrors"}} {
			b, err := os.ReadFile("/proc/thread-self/net/" + f.file)
			if err != nil {
				return err
			}
			n += rcvbufErrors(string(b), f.prefix)
		}
		return nil
	})
	return n, err
}

// unread returns the packets dropped at the IPv4 UDP sockets of a port because
// their buffers were full.
func unread(h *lab.Host, port int) (n int, err error) {
	err = h.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/udp")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			// The second field is the local address in hexadecimal, the last
			// one the number of drops.
			if f := strings.Fields(line); strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				dropped, err := strconv.Atoi(f[len(f)-1])
				if err != nil {
					return fmt.Errorf("/proc/net/udp: %w", err)
				}
				n += dropped
			}
		}
		return nil
	})
	return n, err
}

// rcvbufErrors reads a counter in /proc/net/snmp, which has a line of names
// above each line of numbers, or in snmp6, which has one counter per line.
func rcvbufErrors(text, prefix string) uint64 {
	var names []string
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, prefix) {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) == 2 {
			n, _ := strconv.ParseUint(fields[1], 10, 64)
			return n
		}
		if names == nil {
			names = fields
			continue
		}
		for i, name := range names {
			if name == "RcvbufErrors" && i < len(fields) {
				n, _ := strconv.ParseUint(fields[i], 10, 64)
				return n
			}
		}
	}
	return 0
}

// backlogDrops returns the packets dropped by the kernel between virtual
// interfaces, on the whole machine.
func backlogDrops() (n uint64, err error) {
	b, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 {
			dropped, err := strconv.ParseUint(f[1], 16, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/net/softnet_stat: %w", err)
			}
			n += dropped
		}
	}
	return n, nil
}
