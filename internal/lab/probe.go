package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// Probe describes one ICMP echo request.
type Probe struct {
	To       netip.Addr
	HopLimit int // 0: 64
	// Size is the length of the whole IP packet in bytes. 0: the headers and 56
	// bytes of data, like ping.
	Size int
	// DontFragment sets DF on IPv4. On both families it also sends packets that
	// exceed the known path MTU.
	DontFragment bool
}

// Answer is the answer to a [Probe]: an echo reply or an ICMP error.
type Answer struct {
	From netip.Addr
	RTT  time.Duration
	// Echo is true for a reply and false for an ICMP error, which has the next
	// three fields.
	Echo bool
	Type int // ICMP or ICMPv6 type
	Code int
	MTU  int // MTU in Packet Too Big or Fragmentation Needed
}

// String describes the answer in words.
func (a Answer) String() string {
	if a.Echo {
		return fmt.Sprintf("echo from %s in %v", a.From, a.RTT.Round(10*time.Microsecond))
	}
	s := fmt.Sprintf("ICMP type %d code %d from %s", a.Type, a.Code, a.From)
	if a.MTU > 0 {
		s += fmt.Sprintf(", MTU %d", a.MTU)
	}
	return s
}

// pingData is the size of the data that ping sends, in bytes.
const pingData = 56

// family describes the differences between ICMP for IPv4 and IPv6.
type family struct {
	network, unspecified string
	headerLen            int // bytes of the IP header
	protocol             int // IP protocol number
	echo, reply          icmp.Type
}

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return family{"ip4:icmp", "0.0.0.0", ipv4.HeaderLen, 1, ipv4.ICMPTypeEcho,
			ipv4.ICMPTypeEchoReply}
	}
	return family{"ip6:ipv6-icmp", "::", ipv6.HeaderLen, 58, ipv6.ICMPTypeEchoRequest,
		ipv6.ICMPTypeEchoReply}
}

// Probe sends one echo request from the host and waits for the answer until ctx
// ends.
func (h *Host) Probe(ctx context.Context, p Probe) (Answer, error) {
	a, err := h.probe(ctx, p)
	if err != nil {
		return a, fmt.Errorf("lab: echo from %s to %s: %w", h.name, p.To, err)
	}
	return a, nil
}

func (h *Host) probe(ctx context.Context, p Probe) (Answer, error) {
	f := familyOf(p.To)
	var conn *net.IPConn
	err := h.Do(func() error {
		c, err := (&net.ListenConfig{Control: p.control}).ListenPacket(ctx, f.network,
			f.unspecified)
		if err != nil {
			return err
		}
		conn = c.(*net.IPConn)
		return nil
	})
	if err != nil {
		return Answer{}, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()

	size := pingData
	if p.Size > 0 {
		size = max(p.Size-f.headerLen-8, 0)
	}
	// The identifier is random because other programs may ping too.
	echo := &icmp.Echo{ID: rand.IntN(1 << 16), Seq: 1, Data: make([]byte, size)}
	msg, err := (&icmp.Message{Type: f.echo, Body: echo}).Marshal(nil)
	if err != nil {
		return Answer{}, err
	}
	start := time.Now()
	if _, err := conn.WriteTo(msg, &net.IPAddr{IP: p.To.AsSlice(), Zone: p.To.Zone()}); err != nil {
		return Answer{}, err
	}
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFromIP(buf)
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return Answer{}, fmt.Errorf("no answer: %w", err)
		}
		if a, ok := f.answer(buf[:n], p.To, echo.ID); ok {
			addr, _ := netip.AddrFromSlice(from.IP)
			a.From, a.RTT = addr.Unmap(), time.Since(start)
			return a, nil
		}
	}
}

// control sets the socket options of a probe.
func (p Probe) control(_, _ string, c syscall.RawConn) error {
	hops := p.HopLimit
	if hops == 0 {
		hops = 64
	}
	var err error
	cerr := c.Control(func(s uintptr) {
		fd := int(s)
		discover := unix.IP_PMTUDISC_DONT
		if p.DontFragment {
			discover = unix.IP_PMTUDISC_PROBE
		}
		if p.To.Is4() {
			err = errors.Join(
				unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, hops),
				unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, discover))
			return
		}
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, hops),
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, hops),
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, discover))
	})
	return errors.Join(err, cerr)
}

// answer parses an ICMP message and reports whether it answers the echo request
// with the identifier id.
func (f family) answer(b []byte, to netip.Addr, id int) (Answer, bool) {
	m, err := icmp.ParseMessage(f.protocol, b)
	if err != nil {
		return Answer{}, false
	}
	if e, ok := m.Body.(*icmp.Echo); ok {
		return Answer{Echo: true}, m.Type == f.reply && e.ID == id
	}
	const header = 8 // length of the ICMP error's header
	if len(b) < header || !f.quotes(b[header:], to, id) {
		return Answer{}, false
	}
	a := Answer{Type: int(b[0]), Code: int(b[1])}
	switch {
	case m.Type == ipv4.ICMPTypeDestinationUnreachable && a.Code == 4:
		a.MTU = int(binary.BigEndian.Uint16(b[6:]))
	case m.Type == ipv6.ICMPTypePacketTooBig:
		a.MTU = int(binary.BigEndian.Uint32(b[4:]))
	}
	return a, true
}

// quotes reports whether b begins with the echo request to the address with the
// identifier id.
func (f family) quotes(b []byte, to netip.Addr, id int) bool {
	if len(b) < f.headerLen {
		return false
	}
	n, protocol, dst := f.headerLen, b[6], b[16:20]
	if to.Is4() {
		n, protocol = int(b[0]&0xf)*4, b[9]
	} else {
		dst = b[24:40]
	}
	return n >= f.headerLen && len(b) >= n+8 && int(protocol) == f.protocol &&
		string(dst) == string(to.AsSlice()) && int(binary.BigEndian.Uint16(b[n+4:])) == id
}

// Ping sends echo requests, one at a time, until it receives a reply, and
// returns the round-trip time. If ctx ends first, the error includes the last
// ICMP error.
func (h *Host) Ping(ctx context.Context, to netip.Addr) (time.Duration, error) {
	const wait, interval = time.Second, 100 * time.Millisecond
	last := "no answer"
	for {
		pctx, cancel := context.WithTimeout(ctx, wait)
		a, err := h.Probe(pctx, Probe{To: to})
		cancel()
		switch {
		case err == nil && a.Echo:
			return a.RTT, nil
		case err == nil:
			last = a.String()
		case !errors.Is(err, context.DeadlineExceeded):
			last = err.Error()
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return 0, fmt.Errorf("lab: ping from %s to %s: %s: %w", h.name, to, last, ctx.Err())
		}
	}
}

// Hop is one line of a [Host.Traceroute].
type Hop struct {
	Answer
	Silent bool // no answer
}

// Traceroute discovers routers by echo requests with a hop limit of 1, 2 and so
// on, up to limit. It waits for each answer up to the duration wait, and ends
// with the first answer other than Time Exceeded.
func (h *Host) Traceroute(ctx context.Context, to netip.Addr, limit int, wait time.Duration) ([]Hop,
	error) {
	var hops []Hop
	for n := 1; n <= limit; n++ {
		pctx, cancel := context.WithTimeout(ctx, wait)
		a, err := h.Probe(pctx, Probe{To: to, HopLimit: n})
		cancel()
		switch {
		case ctx.Err() != nil:
			return hops, ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			hops = append(hops, Hop{Silent: true})
			continue
		case err != nil:
			return hops, err
		}
		hops = append(hops, Hop{Answer: a})
		if a.Echo || !a.timeExceeded() {
			break
		}
	}
	return hops, nil
}

func (a Answer) timeExceeded() bool {
	if a.From.Is4() {
		return a.Type == int(ipv4.ICMPTypeTimeExceeded)
	}
	return a.Type == int(ipv6.ICMPTypeTimeExceeded)
}
