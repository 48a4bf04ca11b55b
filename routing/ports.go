package routing

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"
)

const (
	firstUserPort    = 1024 // below are the privileged ones
	lastPort         = 65535
	defaultFirstPort = 32768 // first port of this host's connections, unless somebody changed it
)

// portRange is the ports from low to high.
type portRange struct{ low, high uint16 }

// translationPorts returns the ports that connections of the tunnel get on this
// host's addresses: the widest range in which this host listened on none when
// it was first asked for. A user of the tunnel who chooses the port of a server
// of this host would get its packets (CVE-2021-3773). The range begins where
// the kernel takes ports for this host's own connections, as those are tracked,
// and so not given to two, while servers are usually below.
func (k *kernel) translationPorts(want State) (low, high uint16) {
	taken := slices.Clone(k.cachedPorts())
	for _, port := range want.Listen {
		taken = append(taken, portRange{port, port})
	}
	return widest(portRange{max(k.firstLocalPort, firstUserPort), lastPort}, taken)
}

// widest returns the widest part of all without what is taken; all of it when
// nothing is left.
func widest(all portRange, taken []portRange) (low, high uint16) {
	slices.SortFunc(taken, func(a, b portRange) int { return int(a.low) - int(b.low) })
	best := -1
	from := int(all.low)
	consider := func(to int) {
		if to = min(to, int(all.high)); to-from > best {
			best, low, high = to-from, uint16(from), uint16(to)
		}
	}
	for _, t := range taken {
		consider(int(t.low) - 1)
		from = max(from, int(t.high)+1)
	}
	consider(int(all.high))
	if best < 0 {
		return all.low, all.high
	}
	return low, high
}

// firstPort returns the lowest port that the kernel chooses for connections of
// this host.
func (k *kernel) firstPort() uint16 {
	v, _ := k.readSysctl("net/ipv4/ip_local_port_range")
	low, _, _ := strings.Cut(v, "\t")
	if n, err := strconv.ParseUint(low, 10, 16); err == nil && n > 0 {
		return uint16(n)
	}
	return defaultFirstPort
}

// usedPorts returns the ports on which this host listens, and those that its
// administrator has reserved.
func (k *kernel) usedPorts() (taken []portRange) {
	v, _ := k.readSysctl("net/ipv4/ip_local_reserved_ports")
	for part := range strings.SplitSeq(v, ",") {
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		low, err := strconv.ParseUint(first, 10, 16)
		high, err2 := strconv.ParseUint(last, 10, 16)
		if err == nil && err2 == nil && low <= high {
			taken = append(taken, portRange{uint16(low), uint16(high)})
		}
	}
	const listening, unconnected = "0A", "07" // TCP_LISTEN, and TCP_CLOSE for UDP
	for _, file := range []struct{ name, state string }{
		{"tcp", listening}, {"tcp6", listening}, {"udp", unconnected}, {"udp6", unconnected},
		{"udplite", unconnected}, {"udplite6", unconnected},
	} {
		taken = append(taken, sockets("/proc/thread-self/net/"+file.name, file.state)...)
	}
	return taken
}

// sockets returns the local ports of the sockets in a state that a file of
// /proc/net lists. It changes nothing that the file may be missing.
func sockets(path, state string) (taken []portRange) {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		const local, status = 1, 3
		fields := strings.Fields(lines.Text())
		if len(fields) <= status || fields[status] != state {
			continue
		}
		_, port, _ := strings.Cut(fields[local], ":")
		if n, err := strconv.ParseUint(port, 16, 16); err == nil && n != 0 {
			taken = append(taken, portRange{uint16(n), uint16(n)})
		}
	}
	return taken
}
