package lab

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"golang.org/x/sys/unix"
)

func isEcho(p Packet) bool {
	icmp, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	return ok && icmp.TypeCode.Type() == layers.ICMPv4TypeEchoRequest
}

func TestCaptureSeesHopLimit(t *testing.T) {
	dir := t.TempDir()
	l := newLab(t, WithArtifacts(dir))
	topo, err := NewTopology(l, TopologyOptions{})
	must(t, err)
	in, err := topo.Router.Capture("client1", isEcho)
	must(t, err)
	out, err := topo.Router.Capture("proxy", isEcho)
	must(t, err)
	_, err = topo.Client.Probe(testContext(t), Probe{To: ProxyIPv4, HopLimit: 17})
	must(t, err)
	for c, want := range map[*Capture]struct {
		ttl      uint8
		outgoing bool
	}{in: {17, false}, out: {16, true}} {
		p, err := c.Wait(testContext(t), func(Packet) bool { return true })
		must(t, err)
		ip := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
		if ip.TTL != want.ttl || p.Outgoing != want.outgoing ||
			!ip.SrcIP.Equal(ClientIPv4.AsSlice()) {
			t.Errorf("TTL %d, outgoing %t, from %s", ip.TTL, p.Outgoing, ip.SrcIP)
		}
		must(t, c.Close())
		if n := len(c.Packets()); n != 1 {
			t.Errorf("%d packets, want 1", n)
		}
	}

	f, err := os.Open(filepath.Join(dir, "router-1-client1.pcap"))
	must(t, err)
	defer f.Close()
	r, err := pcapgo.NewReader(f)
	must(t, err)
	if _, _, err := r.ReadPacketData(); err != nil {
		t.Errorf("the capture file: %v", err)
	}
}

// TestCaptureCloseReadsAll sends a burst and closes at once.
func TestCaptureCloseReadsAll(t *testing.T) {
	topo := newTopology(t, TopologyOptions{})
	isUDP := func(p Packet) bool { return p.Layer(layers.LayerTypeUDP) != nil }
	c, err := topo.Client.Capture("eth0", isUDP)
	must(t, err)
	conn, err := topo.Client.DialContext(testContext(t), "udp", "203.0.113.5:9")
	must(t, err)
	defer conn.Close()
	sink, err := topo.Proxy.ListenPacket("udp", ":9")
	must(t, err)
	defer sink.Close()
	const n = 100
	for range n {
		if _, err := conn.Write(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	must(t, c.Close())
	must(t, c.Close())
	if got := len(c.Packets()); got != n {
		t.Errorf("%d packets, want %d", got, n)
	}
}

func TestCaptureWaitEnds(t *testing.T) {
	h := newHost(t, newLab(t), "a")
	c, err := h.Capture("lo", nil)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Wait(ctx, isEcho); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the context's error", err)
	}
	must(t, c.Close())
	if _, err := c.Wait(t.Context(), isEcho); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
	if _, err := h.Capture("eth7", nil); err == nil {
		t.Error("Capture on a missing interface succeeded")
	}
}

// TestCaptureTUN captures on a device without Ethernet headers.
func TestCaptureTUN(t *testing.T) {
	needTUN(t)
	h := newHost(t, newLab(t), "a")
	tun, err := h.openTUN("tun0", unix.IFF_TUN)
	must(t, err)
	defer tun.Close()
	sh(t, h, "ip addr add 10.0.0.1/24 dev tun0; ip -6 addr add fd00::1/64 dev tun0; ip link set tun0 up")
	c, err := h.Capture("tun0", func(p Packet) bool { return p.Layer(layers.LayerTypeUDP) != nil })
	must(t, err)
	for _, to := range []string{"10.0.0.2", "fd00::2"} {
		conn, err := h.DialContext(testContext(t), "udp", net.JoinHostPort(to, "9"))
		must(t, err)
		_, err = conn.Write([]byte("hello " + to))
		must(t, err)
		must(t, conn.Close())
		p, err := c.Wait(testContext(t), func(p Packet) bool {
			return string(p.ApplicationLayer().Payload()) == "hello "+to
		})
		must(t, err)
		if got := p.NetworkLayer().NetworkFlow().Dst().String(); got != to {
			t.Errorf("to %s, want %s", got, to)
		}
	}
}
