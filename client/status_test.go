package client

import "testing"

// Client and UDPForwarder count the packets that the kernel dropped because a
// UDP socket was full, for all their sockets together.
func TestFullSocketsAreCounted(t *testing.T) {
	c, err := New(Config{Proxy: "p"})
	if err != nil {
		t.Fatal(err)
	}
	c.dialer.dial.Dropped(2)
	c.dialer.dial.Dropped(3)
	if got := c.Status().Drops["socket_full"]; got != 5 {
		t.Errorf("the status has %d dropped packets, want 5", got)
	}
	f, err := NewUDPForwarder(UDPConfig{Proxy: "p", Listen: "127.0.0.1:0", Target: "192.0.2.1:53"})
	if err != nil {
		t.Fatal(err)
	}
	f.dialer.dial.Dropped(4)
	if got := f.Stats().Receive.Drops()["socket_full"]; got != 4 {
		t.Errorf("the forwarder has %d dropped packets, want 4", got)
	}
}
