package test

import (
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"masquevpn/internal/lab"
)

// A few hundred datagrams that a program sends at once arrive, in both
// directions: the device's queue holds them until they are read.
func TestBurstOfDatagrams(t *testing.T) {
	const size, bursts = 1200, 5
	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	for _, tc := range []struct {
		name     string
		from, to *lab.Host
		addr     netip.Addr
	}{{"up", p.Client, p.Target, lab.TargetIPv4}, {"down", p.Target, p.Client, client4}} {
		for _, burst := range []int{200, 400} {
			t.Run(tc.name+"/"+strconv.Itoa(burst), func(t *testing.T) {
				in, err := tc.to.ListenPacket("udp4", netip.AddrPortFrom(tc.addr, 0).String())
				check(t, err)
				defer in.Close()
				raw, err := in.(*net.UDPConn).SyscallConn()
				check(t, err)
				check(t, raw.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
				}))
				check(t, err)
				out, err := tc.from.DialContext(t.Context(), "udp4", in.LocalAddr().String())
				check(t, err)
				defer out.Close()
				check(t, in.SetReadDeadline(time.Now().Add(patience)))
				datagram, got := make([]byte, size), make([]byte, 1500)
				for i := range bursts {
					for range burst {
						_, err := out.Write(datagram)
						check(t, err)
					}
					for n := range burst {
						if _, _, err := in.ReadFrom(got); err != nil {
							t.Fatalf("burst %d: %d of %d datagrams arrived; the client dropped %v, the proxy %v", i, n, burst,
								p.status(p.Client, "alice").Drops, p.sessions()[0].Drops)
						}
					}
				}
			})
		}
	}
}
