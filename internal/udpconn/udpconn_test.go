package udpconn

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long tests wait for an expected event.
const patience = 10 * time.Second

// families are the kinds of sockets and the addresses to reach them by.
var families = []struct{ name, network, listen, to string }{
	{"IPv4", "udp4", "127.0.0.1", "127.0.0.1"},
	{"IPv6", "udp6", "::1", "::1"},
	{"IPv4 on a socket for both", "udp", "::", "127.0.0.1"},
	{"IPv6 on a socket for both", "udp", "::", "::1"},
}

// listen opens a socket on a free port.
func listen(t testing.TB, network, ip string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP(network, &net.UDPAddr{IP: net.ParseIP(ip)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// newConn returns a Conn on c without logging.
func newConn(t testing.TB, c *net.UDPConn, dropped func(int)) *Conn {
	t.Helper()
	conn, err := New(c, slog.New(slog.DiscardHandler), dropped)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// set sets an integer option of a socket.
func set(t testing.TB, c *net.UDPConn, level, option, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), level, option, value)
	}); e != nil || err != nil {
		t.Fatalf("option %d of level %d: %v, %v", option, level, e, err)
	}
}

// sender opens a socket for sending to the IP address to of receiver. It also
// returns receiver's address with its port.
func sender(t testing.TB, to string, receiver *net.UDPConn) (*net.UDPConn, *net.UDPAddr) {
	t.Helper()
	c := listen(t, "udp", to)
	return c, &net.UDPAddr{IP: net.ParseIP(to), Port: receiver.LocalAddr().(*net.UDPAddr).Port}
}

// control returns a control message for a 64-bit kernel.
func control(level, typ int32, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(len(data))))
	binary.NativeEndian.PutUint32(b[8:], uint32(level))
	binary.NativeEndian.PutUint32(b[12:], uint32(typ))
	copy(b[16:], data)
	return b
}

// uint32s returns values in native byte order.
func uint32s(values ...uint32) (b []byte) {
	for _, v := range values {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

// gsoControl returns the control message for sending packets of n bytes at
// once.
func gsoControl(n int) []byte {
	return control(unix.IPPROTO_UDP, unix.UDP_SEGMENT,
		binary.NativeEndian.AppendUint16(nil, uint16(n)))
}

// ecn returns the control message for the ECN bits of a packet to ip.
func ecn(ip net.IP, bits uint32) []byte {
	if ip.To4() != nil {
		return control(unix.IPPROTO_IP, unix.IP_TOS, uint32s(bits))
	}
	return control(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, uint32s(bits))
}

// numbered returns n bytes that differ for different values of start.
func numbered(start, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(start + i + i>>8)
	}
	return b
}

// messages returns n messages with buffers of the sizes that quic-go uses.
func messages(n int) []ipv4.Message {
	ms := make([]ipv4.Message, n)
	for i := range ms {
		ms[i].Buffers, ms[i].OOB = [][]byte{make([]byte, 1500)}, make([]byte, 128)
	}
	return ms
}

// packet is a received message.
type packet struct {
	data string
	from netip.AddrPort
	ecn  int        // -1 if unknown
	to   netip.Addr // destination
}

// read converts a received message, and checks its control data.
func read(t testing.TB, m ipv4.Message) packet {
	t.Helper()
	p := packet{data: string(m.Buffers[0][:m.N]), from: m.Addr.(*net.UDPAddr).AddrPort(), ecn: -1}
	p.from = netip.AddrPortFrom(p.from.Addr().Unmap(), p.from.Port())
	all, err := unix.ParseSocketControlMessage(m.OOB[:m.NN])
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		switch [2]int32{c.Header.Level, c.Header.Type} {
		case [2]int32{unix.IPPROTO_IP, unix.IP_TOS}, [2]int32{unix.IPPROTO_IPV6, unix.IPV6_TCLASS}:
			p.ecn = int(c.Data[0] & 3)
		case [2]int32{unix.IPPROTO_IP, unix.IP_PKTINFO}:
			p.to = netip.AddrFrom4([4]byte(c.Data[8:12]))
		case [2]int32{unix.IPPROTO_IPV6, unix.IPV6_PKTINFO}:
			p.to = netip.AddrFrom16([16]byte(c.Data[:16])).Unmap()
		default:
			t.Errorf("control message of level %d, type %d is not for QUIC", c.Header.Level,
				c.Header.Type)
		}
	}
	return p
}

// receive reads n packets in batches of at most batch. It checks whether the
// kernel coalesced some of them.
func receive(t testing.TB, c *Conn, n, batch int, coalesced bool) []packet {
	t.Helper()
	var got []packet
	sawCoalesced := false
	for ms := messages(batch); len(got) < n; {
		k, err := c.ReadBatch(ms, 0)
		if err != nil {
			t.Fatalf("after %d packets: %v", len(got), err)
		}
		for _, m := range ms[:k] {
			got = append(got, read(t, m))
		}
		sawCoalesced = sawCoalesced || len(c.unread) > 0
	}
	if len(got) != n || sawCoalesced != coalesced {
		t.Errorf("received %d of %d packets; coalesced: %v, want %v", len(got), n, sawCoalesced,
			coalesced)
	}
	return got
}

// TestReceive sends packets one by one and with GSO, and checks that ReadBatch
// returns single packets in order, with their addresses and control data,
// whether or not the kernel coalesces them.
func TestReceive(t *testing.T) {
	const size, count, last, ce = 1200, 20, 77, 3
	for _, f := range families {
		for _, gro := range []bool{true, false} {
			name := f.name
			if !gro {
				name += " without GRO"
			}
			t.Run(name, func(t *testing.T) {
				socket := listen(t, f.network, f.listen)
				c := newConn(t, socket, nil)
				if !gro { // like a kernel without GRO
					set(t, socket, unix.IPPROTO_UDP, unix.UDP_GRO, 0)
				}
				set(t, socket, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
				set(t, socket, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
				if f.network != "udp4" {
					set(t, socket, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
					set(t, socket, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
				}
				from, to := sender(t, f.to, socket)
				second, _ := sender(t, f.to, socket)
				send := func(c *net.UDPConn, data, oob []byte) {
					t.Helper()
					if _, _, err := c.WriteMsgUDP(data, oob, to); err != nil {
						t.Fatal(err)
					}
				}
				run := numbered(1, (count-1)*size+last)
				send(from, run, slices.Concat(gsoControl(size), ecn(to.IP, ce)))
				send(second, []byte("one"), nil)
				send(second, []byte{}, nil) // ignored by ReadBatch
				send(from, []byte("another"), ecn(to.IP, 2))

				want := make([]packet, 0, count+2)
				add := func(c *net.UDPConn, ecn int, data string) {
					addr := c.LocalAddr().(*net.UDPAddr).AddrPort()
					want = append(want,
						packet{data, netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), ecn,
							netip.MustParseAddr(f.to)})
				}
				for segment := range slices.Chunk(run, size) {
					add(from, ce, string(segment))
				}
				add(second, 0, "one")
				add(from, 2, "another")
				got := receive(t, c, len(want), 8, gro)
				for i := range want {
					if got[i] != want[i] && !(got[i].ecn == -1 && want[i].ecn == 0) {
						t.Errorf("packet %d is of %d bytes, %+v, want %d, %+v", i, len(got[i].data),
							got[i], len(want[i].data), want[i])
					}
				}
			})
		}
	}
}

// TestAddresses checks that returned addresses, which QUIC retains, do not
// change, and that packets from one source share one.
func TestAddresses(t *testing.T) {
	socket := listen(t, "udp4", "127.0.0.1")
	c := newConn(t, socket, nil)
	a, to := sender(t, "127.0.0.1", socket)
	b, _ := sender(t, "127.0.0.1", socket)
	var addrs []*net.UDPAddr
	ms := messages(1)
	for _, s := range []*net.UDPConn{a, a, b, a} {
		if _, err := s.WriteToUDP([]byte("x"), to); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadBatch(ms, 0); err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, ms[0].Addr.(*net.UDPAddr))
	}
	for i, s := range []*net.UDPConn{a, a, b, a} {
		if addrs[i].String() != s.LocalAddr().String() {
			t.Errorf("packet %d is from %v, want %v", i, addrs[i], s.LocalAddr())
		}
	}
	if addrs[0] != addrs[1] {
		t.Error("ReadBatch allocated an address for each packet")
	}
	if got := testing.AllocsPerRun(100, func() {
		if _, err := a.WriteToUDPAddrPort([]byte("x"), to.AddrPort()); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadBatch(ms, 0); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("%v allocations per packet", got)
	}
}

// TestLongPackets checks that a packet longer than its buffer is truncated and
// does not affect the next one.
func TestLongPackets(t *testing.T) {
	socket := listen(t, "udp4", "127.0.0.1")
	c := newConn(t, socket, nil)
	from, to := sender(t, "127.0.0.1", socket)
	for _, data := range [][]byte{numbered(1, 9000), []byte("short")} {
		if _, err := from.WriteToUDP(data, to); err != nil {
			t.Fatal(err)
		}
	}
	got := receive(t, c, 2, 8, false)
	if len(got[0].data) != 1500 || got[1].data != "short" {
		t.Errorf("received %d bytes, then %q, want 1500 bytes, then \"short\"", len(got[0].data),
			got[1].data)
	}
}

// TestDropped fills the receive buffer and checks that the packets dropped by
// the kernel are reported once, with the next packet that arrives.
func TestDropped(t *testing.T) {
	dropped := 0
	socket := listen(t, "udp4", "127.0.0.1")
	c := newConn(t, socket, func(n int) { dropped += n })
	set(t, socket, unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10)
	from, to := sender(t, "127.0.0.1", socket)
	sent, got := 0, 0
	send := func(n int) {
		for range n {
			if _, err := from.WriteToUDP(make([]byte, 500), to); err != nil {
				t.Fatal(err)
			}
			sent++
		}
	}
	drain := func() {
		for ms := messages(8); readable(t, socket); {
			n, err := c.ReadBatch(ms, 0)
			if err != nil {
				t.Fatal(err)
			}
			got += n
		}
	}
	for range 2 {
		before := dropped
		send(500)
		drain()
		send(1)
		drain()
		if dropped == before || got+dropped != sent {
			t.Errorf("%d packets received and %d dropped of %d", got, dropped, sent)
		}
		before = dropped
		send(1)
		drain()
		if dropped != before || got+dropped != sent {
			t.Errorf("%d dropped, before it %d, although the buffer had room; %d of %d received",
				dropped, before,
				got, sent)
		}
	}
}

// readable reports whether a packet waits in c.
func readable(t testing.TB, c *net.UDPConn) bool {
	t.Helper()
	size := 0
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) {
		size, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
	}); e != nil || err != nil {
		t.Fatal(e, err)
	}
	return size > 0
}

func TestClose(t *testing.T) {
	c := newConn(t, listen(t, "udp4", "127.0.0.1"), nil)
	ended := make(chan error)
	go func() {
		_, err := c.ReadBatch(messages(1), 0)
		ended <- err
	}()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the waiting ReadBatch returned %v, want net.ErrClosed", err)
	}
	if _, err := New(c.UDPConn, slog.New(slog.DiscardHandler), nil); err == nil {
		t.Error("New accepted a closed socket")
	}
}

func TestBuffers(t *testing.T) {
	for name, tt := range map[string]struct {
		features
		want []string
	}{
		"all":          {features{true, true, bufferSize, bufferSize}, []string{"level=DEBUG"}},
		"about enough": {features{true, true, enoughBuffer, enoughBuffer}, []string{"level=DEBUG"}},
		"small receive": {features{true, true, 212992, bufferSize},
			[]string{"level=WARN", "receive_buffer=212992",
				"net.core.rmem_max and net.core.wmem_max to 8388608"}},
		"small send": {features{true, true, bufferSize, 212992},
			[]string{"level=WARN", "send_buffer=212992", "net.core.rmem_max"}},
		"no GRO": {features{true, false, bufferSize, bufferSize},
			[]string{"level=WARN", "gro=false", "Linux 5.0"}},
		"no GSO": {features{false, true, bufferSize, bufferSize},
			[]string{"level=WARN", "gso=false", "Linux 5.0"}},
		"nothing": {features{}, []string{"rmem_max", "; use Linux 5.0"}},
	} {
		t.Run(name, func(t *testing.T) {
			var text bytes.Buffer
			c := &Conn{UDPConn: listen(t, "udp4", "127.0.0.1"), logger: logger(&text)}
			c.report(tt.features)
			for _, want := range tt.want {
				if !strings.Contains(text.String(), want) ||
					strings.Count(text.String(), "\n") != 1 {
					t.Errorf("the log lacks %q:\n%s", want, &text)
				}
			}
			if quiet := strings.Contains(tt.want[0],
				"DEBUG"); quiet == strings.Contains(text.String(),
				"remedy") {
				t.Errorf("%s", &text)
			}
		})
	}
}

// TestSetUp checks the features of a socket on this kernel.
func TestSetUp(t *testing.T) {
	socket := listen(t, "udp4", "127.0.0.1")
	raw, err := socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var f features
	if err := raw.Control(func(fd uintptr) { f = setUp(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	if !f.gso || !f.gro || f.receiveBuffer <= 0 || f.receiveBuffer > bufferSize ||
		f.sendBuffer <= 0 || f.sendBuffer > bufferSize {
		t.Errorf("features: %+v", f)
	}
}

func logger(to *bytes.Buffer) *slog.Logger {
	return slog.New(slog.NewTextHandler(to, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// TestRefusedSegments checks that a path without GSO is logged once.
func TestRefusedSegments(t *testing.T) {
	var text bytes.Buffer
	c := &Conn{logger: logger(&text)}
	remote := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443}
	wrap := func(e unix.Errno) error {
		return &net.OpError{Op: "write", Net: "udp", Err: os.NewSyscallError("sendmsg", e)}
	}
	c.noteError(wrap(unix.EPERM), remote)
	c.noteError(context.DeadlineExceeded, remote)
	if text.Len() > 0 {
		t.Errorf("other errors were logged: %s", &text)
	}
	c.noteError(wrap(unix.EIO), remote)
	c.noteError(wrap(unix.EIO), remote)
	if s := text.String(); strings.Count(s, "\n") != 1 ||
		!strings.Contains(s, "remote=192.0.2.1:443") || !strings.Contains(s, "ethtool") {
		t.Errorf("logged: %s", s)
	}
}

// TestWriteErrors checks that the errors of writes reach QUIC, which uses them
// for path MTU discovery and to detect GSO.
func TestWriteErrors(t *testing.T) {
	c := newConn(t, listen(t, "udp4", "127.0.0.1"), nil)
	to := c.LocalAddr().(*net.UDPAddr)
	if n, _, err := c.WriteMsgUDP(numbered(1, 5000), gsoControl(1200), to); n != 5000 ||
		err != nil {
		t.Errorf("%d bytes sent: %v", n, err)
	}
	if _, _, err := c.WriteMsgUDP(make([]byte, 1<<16), nil, to); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("a packet that is too long: %v, want EMSGSIZE", err)
	}
}

// TestUnsent checks that packets which cannot leave the host are an error
// before IgnoreSendErrors and lost after it, and that Unsent returns the
// reason.
func TestUnsent(t *testing.T) {
	// The kernel refuses broadcasts with one of the errors of its firewall.
	const refused = unix.EACCES
	to := &net.UDPAddr{IP: net.IPv4bcast, Port: 9}
	c := newConn(t, listen(t, "udp4", "127.0.0.1"), nil)
	set(t, c.UDPConn, unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
	write := func(to *net.UDPAddr) error {
		_, _, err := c.WriteMsgUDP([]byte("x"), nil, to)
		return err
	}
	if err := write(to); !errors.Is(err, refused) || !errors.Is(c.Unsent(), refused) {
		t.Fatalf("%v, %v", err, c.Unsent())
	}
	c.IgnoreSendErrors()
	if err := write(to); err != nil || !errors.Is(c.Unsent(), refused) {
		t.Errorf("%v, %v", err, c.Unsent())
	}
	if _, _, err := c.WriteMsgUDP(make([]byte, 1<<16), nil,
		c.LocalAddr().(*net.UDPAddr)); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("a packet that is too long: %v, want EMSGSIZE", err)
	}
	if err := write(c.LocalAddr().(*net.UDPAddr)); err != nil || c.Unsent() != nil {
		t.Errorf("%v, %v", err, c.Unsent())
	}
}

// FuzzControl checks that parse accepts any control data and returns only
// complete messages.
func FuzzControl(f *testing.F) {
	gro := control(unix.IPPROTO_UDP, unix.UDP_GRO, uint32s(1200))
	drops := control(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, uint32s(7))
	tos := control(unix.IPPROTO_IP, unix.IP_TOS, []byte{2})
	info := control(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, make([]byte, 20))
	f.Add(slices.Concat(gro, drops, tos, info))
	f.Add(slices.Concat(tos, control(unix.IPPROTO_UDP, unix.UDP_GRO, uint32s(1<<31))))
	f.Add(control(unix.IPPROTO_UDP, unix.UDP_GRO, nil))
	f.Add(control(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, []byte{1}))
	f.Add(tos[:len(tos)-7])
	f.Add(tos[:9])
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, oob []byte) {
		oob = slices.Clone(oob) // lets the runtime detect reads beyond the end
		dropped := 0
		c := &Conn{dropped: func(n int) { dropped += n }, segmentSize: 100}
		c.parse(oob)
		if c.segmentSize <= 0 || dropped < 0 || len(c.control) > len(oob) {
			t.Errorf("%x: segments of %d bytes, %d dropped, control data %x", oob, c.segmentSize,
				dropped,
				c.control)
		}
		if _, err := unix.ParseSocketControlMessage(c.control); err != nil {
			t.Errorf("%x: control is %x: %v", oob, c.control, err)
		}
	})
}

// TestDisableOffload checks that a message of several packets is refused like
// on a path without GSO, and that GRO is off.
func TestDisableOffload(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			c, far := listen(t, f.network, f.listen), listen(t, f.network, f.listen)
			conn := newConn(t, c, nil)
			if err := conn.DisableOffload(); err != nil {
				t.Fatal(err)
			}
			to := &net.UDPAddr{IP: net.ParseIP(f.to), Port: far.LocalAddr().(*net.UDPAddr).Port}
			segment := binary.NativeEndian.AppendUint16(nil, 100)
			oob := make([]byte, unix.CmsgSpace(len(segment)))
			h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
			h.Level, h.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
			h.SetLen(unix.CmsgLen(len(segment)))
			copy(oob[unix.CmsgLen(0):], segment)
			var system *os.SyscallError // the type that quic-go expects
			if _, _, err := conn.WriteMsgUDP(make([]byte, 300), oob, to); !errors.As(err,
				&system) || system.Err != unix.EIO {
				t.Errorf("several packets in one message: %v, want EIO", err)
			}
			if _, _, err := conn.WriteMsgUDP(make([]byte, 300), nil, to); err != nil {
				t.Errorf("one packet: %v", err)
			}
			raw, err := c.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			_ = raw.Control(func(fd uintptr) {
				if gro, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP,
					unix.UDP_GRO); err == nil && gro != 0 {
					t.Error("GRO is still enabled")
				}
			})
		})
	}
}
