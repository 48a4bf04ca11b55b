package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"masquevpn/internal/lab"
)

// content returns the first n bytes of the data that all transfers send.
func content(n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{7}), n)
}

// flow opens a TCP connection from one host to an address of another. The
// connection is closed after the given time. When it is closed for writing,
// received receives the digest of the data that arrived.
func (p *pair) flow(from, to *lab.Host, addr netip.Addr, within time.Duration) (conn *net.TCPConn,
	received <-chan string) {
	p.t.Helper()
	ln, err := to.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	check(p.t, err)
	p.t.Cleanup(func() { ln.Close() })
	arrived := make(chan string, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			arrived <- err.Error()
			return
		}
		defer c.Close()
		arrived <- digest(c)
	}()
	ctx, cancel := context.WithTimeout(p.ctx, within)
	p.t.Cleanup(cancel)
	c, err := from.DialContext(ctx, "tcp", ln.Addr().String())
	if err != nil {
		p.t.Fatalf("connecting from %s to %v: %v", from.Name(), addr, err)
	}
	context.AfterFunc(ctx, func() { c.Close() })
	return c.(*net.TCPConn), arrived
}

// transfer sends n bytes by TCP from one host to an address of another and
// compares the data that arrives.
func (p *pair) transfer(from, to *lab.Host, addr netip.Addr, n int64) {
	p.t.Helper()
	conn, received := p.flow(from, to, addr, 5*patience)
	defer conn.Close()
	_, err := io.Copy(conn, content(n))
	check(p.t, conn.CloseWrite())
	if err != nil {
		p.t.Errorf("sending from %s to %v: %v", from.Name(), addr, err)
		return
	}
	if got, want := <-received, digest(content(n)); got != want {
		p.t.Errorf("from %s to %v: received %s, sent %s", from.Name(), addr, got, want)
	}
}

// exchangeUDP sends a datagram of each size, in bytes, from one host to an
// address of another, which sends it back.
func (p *pair) exchangeUDP(from, to *lab.Host, addr netip.Addr, sizes ...int) {
	p.t.Helper()
	far, err := to.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
	check(p.t, err)
	defer far.Close()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, peer, err := far.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = far.WriteTo(buf[:n], peer)
		}
	}()
	near, err := from.DialContext(p.ctx, "udp", far.LocalAddr().String())
	check(p.t, err)
	defer near.Close()
	buf := make([]byte, 1<<16)
	for _, size := range sizes {
		sent, err := io.ReadAll(content(int64(size)))
		check(p.t, err)
		ok := false
		// A datagram may be lost, so it is sent again.
		for end := time.Now().Add(patience); !ok && time.Now().Before(end); {
			_, err = near.Write(sent)
			check(p.t, err)
			check(p.t, near.SetReadDeadline(time.Now().Add(time.Second)))
			var n int
			if n, err = near.Read(buf); err == nil {
				ok = bytes.Equal(buf[:n], sent)
			}
		}
		if !ok {
			p.t.Errorf("%d bytes by UDP from %s to %v and back: %v", size, from.Name(), addr, err)
		}
	}
}

// digest reads r to its end and returns the number of bytes and their SHA-256.
func digest(r io.Reader) string {
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d bytes, %s", n, hex.EncodeToString(h.Sum(nil)))
}

// split is the table [routes] of a split tunnel to the target's networks.
const split = `accept = ["192.0.2.0/24", "2001:db8:3::/64"]`

// Data arrives unchanged in both families and directions, through a full and a
// split tunnel.
func TestTransfer(t *testing.T) {
	for name, tc := range map[string]struct {
		options options
		size    int64
	}{"full tunnel": {options{}, 200 << 20}, "split tunnel": {options{routes: split}, 20 << 20}} {
		t.Run(name, func(t *testing.T) {
			p, size := newPair(t, tc.options), tc.size
			before := p.snapshot(p.Client)
			p.connect(p.Client, "alice")
			p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
			p.ping(p.Target, client4, client6)
			p.transfer(p.Client, p.Target, lab.TargetIPv4, size)
			p.transfer(p.Client, p.Target, lab.TargetIPv6, size)
			p.transfer(p.Target, p.Client, client4, size)
			p.transfer(p.Target, p.Client, client6, size)
			p.down(p.Client, "alice")
			p.wantUnchanged(p.Client, before)
		})
	}
}

// iperf3 works through the tunnel: TCP in both directions, and UDP.
func TestIperf(t *testing.T) {
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	for i, tc := range []struct {
		name string
		args []string
	}{
		{"TCP up", []string{"-c", lab.TargetIPv4.String(), "-t", "2"}},
		{"TCP down", []string{"-c", lab.TargetIPv6.String(), "-t", "2", "-R", "-C", "cubic"}},
		{"UDP up", []string{"-c", lab.TargetIPv4.String(), "-t", "2", "-u", "-b", "20M", "-l",
			"1200"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			port := strconv.Itoa(5201 + i)
			server := p.iperfServer(p.Target, port)
			out, err := p.Client.Command(p.ctx, "iperf3",
				append(tc.args, "-p", port)...).CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s\n%s", err, out, p.log(server))
			}
			ctx, cancel := context.WithTimeout(p.ctx, patience)
			_ = server.Stop(ctx)
			cancel()
		})
	}
}
