package client

import "testing"

// What the kernel drops because a UDP socket is full is counted, over all
// sockets that there were, and shown.
func TestFullSocketsAreCounted(t *testing.T) {
	c, err := New(Config{Proxy: "p"})
	if err != nil {
		t.Fatal(err)
	}
	c.dialer.dropped(2)
	c.dialer.dropped(3)
	if got := c.Status().Drops["socket_full"]; got != 5 {
		t.Errorf("the status has %d of 5 packets", got)
	}
	f, err := NewUDPForwarder(UDPConfig{Proxy: "p", Listen: "127.0.0.1:0", Target: "192.0.2.1:53"})
	if err != nil {
		t.Fatal(err)
	}
	f.dialer.dropped(4)
	if got := f.Stats().Receive.Drops()["socket_full"]; got != 4 {
		t.Errorf("the forwarder has %d of 4 packets", got)
	}
}
