package source

import (
	"net"
	"testing"
)

func TestKey(t *testing.T) {
	for _, tc := range []struct{ name, remote, want string }{
		{"IPv4", "192.0.2.1:9", "192.0.2.1/32"},
		{"IPv4-mapped", "[::ffff:192.0.2.1]:9", "192.0.2.1/32"},
		{"IPv6", "[2001:db8:1:2:3:4:5:6]:9", "2001:db8:1:2::/64"},
		{"link-local with a zone", "[fe80::1%1]:9", "fe80::/64"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			addr, err := net.ResolveUDPAddr("udp", tc.remote)
			if err != nil {
				t.Fatal(err)
			}
			if got := Key(addr); got != tc.want {
				t.Errorf("Key: got %q, want %q", got, tc.want)
			}
			if got := KeyOf(tc.remote); got != tc.want {
				t.Errorf("KeyOf: got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestKeyOfOtherText(t *testing.T) {
	for _, s := range []string{"", "alice", "192.0.2.1"} {
		t.Run(s, func(t *testing.T) {
			if got := KeyOf(s); got != "" {
				t.Errorf("got %q, want none", got)
			}
		})
	}
	if got := Key(&net.UnixAddr{Name: "/run/x"}); got != "/run/x" {
		t.Errorf("a Unix address: got %q, want its text", got)
	}
}
