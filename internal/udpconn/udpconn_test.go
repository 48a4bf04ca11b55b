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

// patience bounds waits for things that take no time.
const patience = 10 * time.Second

// families are the ways to reach a socket.
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

func newConn(t testing.TB, c *net.UDPConn, dropped func(int)) *Conn {
	t.Helper()
	conn, err := New(c, slog.New(slog.DiscardHandler), dropped)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// set sets an option of a socket.
func set(t testing.TB, c *net.UDPConn, level, option, value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, value) }); e != nil || err != nil {
		t.Fatalf("option %d of level %d: %v, %v", option, level, e, err)
	}
}

// sender opens a socket to send from to receiver, which is reached at the address to, and returns where that is.
func sender(t testing.TB, to string, receiver *net.UDPConn) (*net.UDPConn, *net.UDPAddr) {
	t.Helper()
	c := listen(t, "udp", to)
	return c, &net.UDPAddr{IP: net.ParseIP(to), Port: receiver.LocalAddr().(*net.UDPAddr).Port}
}

// control is one control message.
func control(level, typ int32, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(len(data)))) // of a 64-bit kernel
	binary.NativeEndian.PutUint32(b[8:], uint32(level))
	binary.NativeEndian.PutUint32(b[12:], uint32(typ))
	copy(b[16:], data)
	return b
}

func uint32s(values ...uint32) (b []byte) {
	for _, v := range values {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

// segmentSize is the control message of a send of several packets at once.
func segmentSize(n int) []byte {
	return control(unix.IPPROTO_UDP, unix.UDP_SEGMENT, binary.NativeEndian.AppendUint16(nil, uint16(n)))
}

// ecn is the control message for the ECN bits of what is sent to ip.
func ecn(ip net.IP, bits uint32) []byte {
	if ip.To4() != nil {
		return control(unix.IPPROTO_IP, unix.IP_TOS, uint32s(bits))
	}
	return control(unix.IPPROTO_IPV6, unix.IPV6_TCLASS, uint32s(bits))
}

// numbered is n bytes, different for each call with another start.
func numbered(start, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(start + i + i>>8)
	}
	return b
}

func messages(n int) []ipv4.Message {
	ms := make([]ipv4.Message, n)
	for i := range ms {
		ms[i].Buffers, ms[i].OOB = [][]byte{make([]byte, 1500)}, make([]byte, 128) // as quic-go has them
	}
	return ms
}

// packet is what came of a message.
type packet struct {
	data string
	from netip.AddrPort
	ecn  int        // -1 when it is not said
	to   netip.Addr // of the packet
}

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
			t.Errorf("control message %d, %d is none of QUIC's", c.Header.Level, c.Header.Type)
		}
	}
	return p
}

// receive reads n packets, few at a time, of which the kernel has some in one piece when inOnePiece.
func receive(t testing.TB, c *Conn, n, atATime int, inOnePiece bool) []packet {
	t.Helper()
	var got []packet
	kept := false
	for ms := messages(atATime); len(got) < n; {
		k, err := c.ReadBatch(ms, 0)
		if err != nil {
			t.Fatalf("after %d packets: %v", len(got), err)
		}
		for _, m := range ms[:k] {
			got = append(got, read(t, m))
		}
		kept = kept || len(c.rest) > 0
	}
	if len(got) != n || kept != inOnePiece {
		t.Errorf("%d packets of %d; came in one piece: %v, want %v", len(got), n, kept, inOnePiece)
	}
	return got
}

// What is sent, at once or one by one, arrives as single packets in their order, with addresses and control data, whether the
// kernel hands over many at a time or not, and however many are asked for.
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
				if !gro { // as a kernel that refuses it
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
				send(from, run, slices.Concat(segmentSize(size), ecn(to.IP, ce)))
				send(second, []byte("one"), nil)
				send(second, []byte{}, nil) // is nothing to QUIC
				send(from, []byte("another"), ecn(to.IP, 2))

				want := make([]packet, 0, count+2)
				add := func(c *net.UDPConn, ecn int, data string) {
					addr := c.LocalAddr().(*net.UDPAddr).AddrPort()
					want = append(want, packet{data, netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), ecn, netip.MustParseAddr(f.to)})
				}
				for segment := range slices.Chunk(run, size) {
					add(from, ce, string(segment))
				}
				add(second, 0, "one")
				add(from, 2, "another")
				got := receive(t, c, len(want), 8, gro)
				for i := range want {
					if got[i] != want[i] && !(got[i].ecn == -1 && want[i].ecn == 0) {
						t.Errorf("packet %d is of %d bytes, %+v, want %d, %+v", i, len(got[i].data), got[i], len(want[i].data), want[i])
					}
				}
			})
		}
	}
}

// QUIC keeps addresses: one that was handed over stays as it is, and is not made anew for each packet.
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
		t.Error("a new address for each packet")
	}
	if got := testing.AllocsPerRun(100, func() {
		if _, err := a.WriteToUDPAddrPort([]byte("x"), to.AddrPort()); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadBatch(ms, 0); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("%v allocations for a packet", got)
	}
}

// A packet that is longer than the buffer for it does not spill into the next.
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
		t.Errorf("%d bytes, then %q", len(got[0].data), got[1].data)
	}
}

// What the kernel drops because the buffer is full is reported with the next packet that arrives, once.
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
		for ms := messages(8); atHand(t, socket); {
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
			t.Errorf("%d packets came and %d were dropped of %d", got, dropped, sent)
		}
		before = dropped
		send(1)
		drain()
		if dropped != before || got+dropped != sent {
			t.Errorf("%d were dropped after %d, without need; %d came of %d", dropped, before, got, sent)
		}
	}
}

// atHand reports whether a packet waits in c.
func atHand(t testing.TB, c *net.UDPConn) bool {
	t.Helper()
	size := 0
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { size, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }); e != nil || err != nil {
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
		t.Errorf("a read that waited ended with %v", err)
	}
	if _, err := New(c.UDPConn, slog.New(slog.DiscardHandler), nil); err == nil {
		t.Error("a closed socket is taken")
	}
}

func TestBuffers(t *testing.T) {
	for name, tc := range map[string]struct {
		granted
		want []string
	}{
		"all":           {granted{true, true, bufferSize, bufferSize}, []string{"level=DEBUG"}},
		"about enough":  {granted{true, true, enoughBuffer, enoughBuffer}, []string{"level=DEBUG"}},
		"small receive": {granted{true, true, 212992, bufferSize}, []string{"level=WARN", "receive_buffer=212992", "net.core.rmem_max and net.core.wmem_max to 8388608"}},
		"small send":    {granted{true, true, bufferSize, 212992}, []string{"level=WARN", "send_buffer=212992", "net.core.rmem_max"}},
		"no GRO":        {granted{true, false, bufferSize, bufferSize}, []string{"level=WARN", "gro=false", "Linux 5.0"}},
		"no GSO":        {granted{false, true, bufferSize, bufferSize}, []string{"level=WARN", "gso=false", "Linux 5.0"}},
		"nothing":       {granted{}, []string{"rmem_max", "; use Linux 5.0"}},
	} {
		var text bytes.Buffer
		c := &Conn{UDPConn: listen(t, "udp4", "127.0.0.1"), logger: logger(&text)}
		c.report(tc.granted)
		for _, want := range tc.want {
			if !strings.Contains(text.String(), want) || strings.Count(text.String(), "\n") != 1 {
				t.Errorf("%s: the log lacks %q:\n%s", name, want, &text)
			}
		}
		if quiet := strings.Contains(tc.want[0], "DEBUG"); quiet == strings.Contains(text.String(), "remedy") {
			t.Errorf("%s: %s", name, &text)
		}
	}
}

// What is granted is what a socket has.
func TestGranted(t *testing.T) {
	socket := listen(t, "udp4", "127.0.0.1")
	raw, err := socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var g granted
	if err := raw.Control(func(fd uintptr) { g = setUp(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	if !g.gso || !g.gro || g.receiveBuffer <= 0 || g.receiveBuffer > bufferSize || g.sendBuffer <= 0 || g.sendBuffer > bufferSize {
		t.Errorf("granted: %+v", g)
	}
}

func logger(to *bytes.Buffer) *slog.Logger {
	return slog.New(slog.NewTextHandler(to, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// A path that refuses many packets at a time is named once; QUIC, which is told each time, sends one by one.
func TestRefusedSegments(t *testing.T) {
	var text bytes.Buffer
	c := &Conn{logger: logger(&text)}
	remote := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443}
	wrap := func(e unix.Errno) error {
		return &net.OpError{Op: "write", Net: "udp", Err: os.NewSyscallError("sendmsg", e)}
	}
	c.failed(wrap(unix.EPERM), remote)
	c.failed(context.DeadlineExceeded, remote)
	if text.Len() > 0 {
		t.Errorf("other errors are logged: %s", &text)
	}
	c.failed(wrap(unix.EIO), remote)
	c.failed(wrap(unix.EIO), remote)
	if s := text.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, "remote=192.0.2.1:443") || !strings.Contains(s, "ethtool") {
		t.Errorf("the log is: %s", s)
	}
}

// Errors of a write reach QUIC, which tells by them that a packet is too long or a path is no good for many at a time.
func TestWriteErrors(t *testing.T) {
	c := newConn(t, listen(t, "udp4", "127.0.0.1"), nil)
	to := c.LocalAddr().(*net.UDPAddr)
	if n, _, err := c.WriteMsgUDP(numbered(1, 5000), segmentSize(1200), to); n != 5000 || err != nil {
		t.Errorf("%d bytes sent: %v", n, err)
	}
	if _, _, err := c.WriteMsgUDP(make([]byte, 1<<16), nil, to); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too long a packet: %v", err)
	}
}

// What this host does not let out is lost without an error, once that is asked for, and can be asked about.
func TestUnsent(t *testing.T) {
	// The kernel refuses to broadcast with the error that it has for a firewall.
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
	c.LoseUnsent()
	if err := write(to); err != nil || !errors.Is(c.Unsent(), refused) {
		t.Errorf("%v, %v", err, c.Unsent())
	}
	if _, _, err := c.WriteMsgUDP(make([]byte, 1<<16), nil, c.LocalAddr().(*net.UDPAddr)); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too large a packet: %v", err)
	}
	if err := write(c.LocalAddr().(*net.UDPAddr)); err != nil || c.Unsent() != nil {
		t.Errorf("%v, %v", err, c.Unsent())
	}
}

// No control data makes parse fail, or hand over what is not whole.
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
		oob = slices.Clone(oob) // so that reading beyond its end is seen
		dropped := 0
		c := &Conn{dropped: func(n int) { dropped += n }, size: 100}
		c.parse(oob)
		if c.size <= 0 || dropped < 0 || len(c.control) > len(oob) {
			t.Errorf("%x: segments of %d bytes, %d dropped, control data %x", oob, c.size, dropped, c.control)
		}
		if _, err := unix.ParseSocketControlMessage(c.control); err != nil {
			t.Errorf("%x: what is left is %x: %v", oob, c.control, err)
		}
	})
}

// Without offload, a message of several packets is refused as by a path that cannot take it, and the kernel hands over one packet at a time.
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
			var system *os.SyscallError // what quic-go looks for
			if _, _, err := conn.WriteMsgUDP(make([]byte, 300), oob, to); !errors.As(err, &system) || system.Err != unix.EIO {
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
				if gro, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO); err == nil && gro != 0 {
					t.Error("the kernel still hands over many packets at a time")
				}
			})
		})
	}
}
