package tun

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

var (
	host4, peer4 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	host6, peer6 = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
)

// eachBackend runs test with the offload device and with the plain device.
func eachBackend(t *testing.T, test func(t *testing.T, offload bool)) {
	for name, offload := range map[string]bool{"offload": true, "plain": false} {
		t.Run(name, func(t *testing.T) { test(t, offload) })
	}
}

// needTUN skips the test on a kernel without TUN devices. When the test ends,
// needTUN fails it if goroutines or descriptors leaked.
func needTUN(t *testing.T) {
	t.Helper()
	fd, err := openNode()
	if err := openError("test", err); err != nil && errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	unix.Close(fd)
	ignore := goleak.IgnoreCurrent()
	nodes, sockets := len(descriptors(t, nodePath)), len(descriptors(t, "socket:"))
	t.Cleanup(func() {
		goleak.VerifyNone(t, ignore)
		nodes, sockets := len(descriptors(t, nodePath))-nodes,
			len(descriptors(t, "socket:"))-sockets
		if nodes != 0 || sockets != 0 {
			t.Errorf("%d devices and %d sockets leaked", nodes, sockets)
		}
	})
}

// descriptors returns the process's descriptors of files whose path starts
// with prefix.
func descriptors(t *testing.T, prefix string) (fds []int) {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, _ := os.Readlink(filepath.Join(dir, e.Name()))
		if strings.HasPrefix(target, prefix) {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
		}
	}
	return fds
}

// openDevice opens a device that is closed when the test ends.
func openDevice(t *testing.T, cfg Config) *Device {
	t.Helper()
	needTUN(t)
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if d.Offload() != cfg.Offload {
		t.Skip("this kernel has no TUN offload")
	}
	return d
}

// bringUp gives the device addresses and sets it up, as package routing does
// for programs.
func bringUp(t *testing.T, d *Device) {
	t.Helper()
	link, err := netlink.LinkByIndex(d.Index())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{host4, host6} {
		bits := a.BitLen() - 4
		err := netlink.AddrAdd(link, &netlink.Addr{
			IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())},
			Flags: unix.IFA_F_NODAD,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []netlink.Link{link,
		&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo"}}} {
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	// The kernel adds the local route of a new IPv6 address in the background.
	waitFor(t, "local address", func() bool {
		routes, err := netlink.RouteGet(host6.AsSlice())
		return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
	})
}

// mirror takes the part of the peer behind a device. It returns each packet
// with exchanged addresses, so that the host sees its own packets arrive from
// peer4 or peer6. A connection to one of these addresses is a connection of the
// host with itself, and its packets of any protocol pass through the device in
// both directions.
type mirror struct {
	maxBatch atomic.Int64  // most packets of one Read
	written  atomic.Uint64 // packets
}

// startMirror starts a mirror, which runs until the test ends and closes d.
func startMirror(t *testing.T, d *Device) *mirror {
	m := new(mirror)
	var done sync.WaitGroup
	done.Go(func() {
		bufs, sizes := buffers(d.BatchSize())
		out := make([][]byte, 0, len(bufs))
		for {
			n, err := d.Read(bufs, sizes, Headroom)
			if err != nil {
				if err != os.ErrClosed {
					t.Errorf("mirror: %v", err)
				}
				return
			}
			m.maxBatch.Store(max(m.maxBatch.Load(), int64(n)))
			out = out[:0]
			for i := range n {
				b := bufs[i][:Headroom+sizes[i]]
				if swapAddrs(b[Headroom:]) {
					out = append(out, b)
				}
			}
			n, err = d.Write(out, Headroom)
			if err != nil && err != os.ErrClosed {
				t.Errorf("mirror: %v", err)
			}
			m.written.Add(uint64(n))
		}
	})
	t.Cleanup(func() {
		d.Close()
		done.Wait()
	})
	return m
}

// swapAddrs exchanges the addresses of a packet to peer4 or peer6 and reports
// whether p is one. Checksums stay valid.
func swapAddrs(p []byte) bool {
	start, n := 12, 4
	if p[0]>>4 == 6 {
		start, n = 8, 16
	}
	src, dst := p[start:start+n], p[start+n:start+2*n]
	if a, _ := netip.AddrFromSlice(dst); a != peer4 && a != peer6 {
		return false
	}
	for i := range src {
		src[i], dst[i] = dst[i], src[i]
	}
	return true
}

// buffers returns n buffers with Headroom and room for any packet, and sizes
// for Read.
func buffers(n int) ([][]byte, []int) {
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = make([]byte, Headroom+MaxPacketLen)
	}
	return bufs, make([]int, n)
}

// onThread runs f on a new operating system thread that ends with f, so that f
// may change the thread's attributes, such as its namespaces.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The thread ends because it is never unlocked.
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// waitForRead waits until a goroutine blocks in Device.Read.
func waitForRead(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	waitFor(t, "reader", func() bool {
		for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			header, stack, _ := strings.Cut(g, "\n")
			if strings.Contains(header, "[IO wait") &&
				strings.Contains(stack, "tun.(*Device).Read") {
				return true
			}
		}
		return false
	})
}

// patience is how long tests wait for an expected event.
const patience = 20 * time.Second

func waitFor(t *testing.T, event string, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !happened(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s after %v", event, patience)
		}
	}
}
