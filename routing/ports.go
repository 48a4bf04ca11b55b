package routing

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"
)

const (
	firstUserPort    = 1024 // lower ports are privileged
	lastPort         = 65535
	defaultFirstPort = 32768 // Linux's default of net.ipv4.ip_local_port_range
)

// portRange is a range of ports. It includes low and high.
type portRange struct{ low, high uint16 }

// translationPorts returns the range of ports for translated connections of the
// tunnel: the widest one on which this host did not listen at the first call. A
// user of the tunnel who gets the port of a server would receive its packets
// (CVE-2021-3773). Ports below the range of this host's own connections are not
// used, because servers usually have those. A port of a connection of this host
// is not given out twice, because that connection is tracked.
func (k *kernel) translationPorts(want State) (low, high uint16) {
	used := slices.Clone(k.cachedPorts())
	for _, port := range want.Listen {
		used = append(used, portRange{port, port})
	}
	return widest(portRange{max(k.firstLocalPort, firstUserPort), lastPort}, used)
}

// widest returns the widest part of all that contains no used port, or all if
// there is none.
func widest(all portRange, used []portRange) (low, high uint16) {
	slices.SortFunc(used, func(a, b portRange) int { return int(a.low) - int(b.low) })
	best := -1
	from := int(all.low)
	consider := func(to int) {
		if to = min(to, int(all.high)); to-from > best {
			best, low, high = to-from, uint16(from), uint16(to)
		}
	}
	for _, r := range used {
		consider(int(r.low) - 1)
		from = max(from, int(r.high)+1)
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

// usedPorts returns the ports on which this host listens, and the ports that
// the administrator has reserved.
func (k *kernel) usedPorts() (used []portRange) {
	v, _ := k.readSysctl("net/ipv4/ip_local_reserved_ports")
	for part := range strings.SplitSeq(v, ",") {
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		low, err := strconv.ParseUint(first, 10, 16)
		high, err2 := strconv.ParseUint(last, 10, 16)
		if err == nil && err2 == nil && low <= high {
			used = append(used, portRange{uint16(low), uint16(high)})
		}
	}
	const listening, unconnected = "0A", "07" // TCP_LISTEN, and TCP_CLOSE for UDP
	for _, file := range []struct{ name, state string }{
		{"tcp", listening}, {"tcp6", listening}, {"udp", unconnected}, {"udp6", unconnected},
		{"udplite", unconnected}, {"udplite6", unconnected},
	} {
		used = append(used, sockets("/proc/thread-self/net/"+file.name, file.state)...)
	}
	return used
}

// sockets returns the local ports of the sockets in a state, from a file in
// /proc/net. It returns nil if the file does not exist.
func sockets(path, state string) (used []portRange) {
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
			used = append(used, portRange{uint16(n), uint16(n)})
		}
	}
	return used
}
