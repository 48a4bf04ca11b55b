package test

import (
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"

	"masquevpn/internal/lab"
)

// If both ends write a key log, a capture on either host has each QUIC packet
// as it is on the wire, so that other programs can decrypt it. No captured
// packet is larger than the MTU of the link.
func TestKeyLogCapture(t *testing.T) {
	dir := t.TempDir()
	log := func(end string) string {
		return fmt.Sprintf("\n[log]\nkey_log = %q\n", filepath.Join(dir, end))
	}
	p := newPair(t, options{proxy: log("proxy"), client: log("client")})
	p.connect(p.Client, "alice")
	var largest, packets atomic.Int64
	for _, host := range []*lab.Host{p.Client, p.Proxy} {
		_, err := host.Capture("eth0", func(pkt lab.Packet) bool {
			packets.Add(1)
			largest.Store(max(largest.Load(), int64(len(pkt.Data()))))
			return false
		})
		check(t, err)
	}
	p.transfer(p.Client, p.Target, lab.TargetIPv4, 16<<20)
	p.transfer(p.Target, p.Client, client4, 16<<20)
	const single = 1514 // longest frame of one packet, in bytes
	if packets.Load() == 0 || largest.Load() > single {
		t.Errorf("the largest of %d packets has %d bytes, want %d at most", packets.Load(),
			largest.Load(), single)
	}
}
