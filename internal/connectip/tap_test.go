package connectip

import (
	"bytes"
	"context"
	"io"
	"testing"

	"github.com/gopacket/gopacket/pcapgo"

	"masquevpn/internal/capture"
	"masquevpn/tun"
)

// A tap captures packets in both directions as they are in the tunnel, but no
// dropped packets.
func TestTap(t *testing.T) {
	var tap capture.Tap
	_, proxy := remoteAccess(t, Config{Tap: tap.At("1")})
	capturing := tap.Start(capture.Options{Session: "1"})
	ctx, stop := context.WithCancel(t.Context())
	var file bytes.Buffer
	done := make(chan error, 1)
	go func() { done <- capturing.Write(ctx, &file) }()

	in := newInbox(proxy.Conn)
	receive := func(pkt []byte) {
		in.HandleDatagram(append([]byte{contextIPPacket}, pkt[tun.Headroom:]...))
	}
	receive(echoPacket(clientAddr4, target4, 64, 101))
	receive(echoPacket(target6, clientAddr6, 64, 102)) // dropped: not the client's address
	in.FlushDatagrams()
	proxy.device.next(t)
	if d := proxy.Send(echoPacket(target4, clientAddr4, 64, 103), tun.Headroom); d != DropNone {
		t.Fatal(d)
	}
	if d := proxy.Send(echoPacket(target4, target4, 64, 104), tun.Headroom); d != DropDestination {
		t.Fatal(d)
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}

	r, err := pcapgo.NewReader(&file)
	if err != nil {
		t.Fatal(err)
	}
	sizes := make(map[int]int)
	for {
		pkt, _, err := r.ReadPacketData()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		sizes[len(pkt)]++
		if p := parse(t, pkt); len(pkt) == 103 && p.HopLimit != 63 {
			t.Errorf("captured with hop limit %d, want 63 as sent", p.HopLimit)
		}
	}
	if sizes[101] != 1 || sizes[102] != 0 || sizes[103] != 1 || sizes[104] != 0 {
		t.Errorf("captured packets by size: %v", sizes)
	}
}
